"""How long documents are, in a few numbers that add up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BINS = 40


@dataclass(frozen=True)
class Lengths:
    """Documents by their tokens, end-of-text included: `powers[i]` have 2^i to 2^(i+1) - 1."""

    powers: tuple[int, ...] = ()
    shortest: int = 0
    longest: int = 0

    def plus(self, tokens: npt.NDArray[np.int64]) -> Lengths:
        """With documents of so many tokens each."""
        if not len(tokens):
            return self
        powers = np.bincount(np.frexp(np.maximum(tokens, 1))[1] - 1, minlength=_BINS)
        shortest, longest = int(tokens.min()), int(tokens.max())
        return self.merged(Lengths(_trimmed(powers.tolist()), shortest, longest))

    def merged(self, other: Lengths) -> Lengths:
        """Both together."""
        if not self.powers or not other.powers:
            return self if self.powers else other
        pairs = itertools.zip_longest(self.powers, other.powers, fillvalue=0)
        return Lengths(
            tuple(a + b for a, b in pairs),
            min(self.shortest, other.shortest),
            max(self.longest, other.longest),
        )

    def quantile(self, share: float) -> float:
        """The length that `share` of the documents are shorter than: exact to its power of two,
        between powers as if lengths were spread evenly on a log scale."""
        below, wanted = 0.0, share * sum(self.powers)
        for power, count in enumerate(self.powers):
            if count and below + count >= wanted:
                length = 2.0 ** (power + (wanted - below) / count)
                return float(min(max(length, self.shortest), self.longest))
            below += count
        return float(self.longest)


def _trimmed(powers: list[int]) -> tuple[int, ...]:
    while powers and not powers[-1]:
        powers.pop()
    return tuple(powers)

"""How far a score may be off that is made of right and wrong answers.

    centred    (accuracy - chance) / (1 - chance): 0 for a guess, 1 for all right
    error      of one accuracy: half of Wilson's interval of one standard deviation
    bootstrap  of a mean of centred accuracies: answers drawn anew within each task

Drawing n answers anew is one draw of a binomial, so that no answer need be looked at twice. They
are right with probability (right + 1/2) / (n + 1), the mean of Jeffreys' posterior, and not
right / n, by which a few that are all right would leave nothing open (Brown, Cai and DasGupta
2001); of many answers both are alike. What counts is how far a draw is from that mean, which lies
nearer to 1/2 than what was observed: over many tasks this would add up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

DRAWS = 20_000
SEED = 0
INTERVAL = (2.5, 97.5)  # percentiles

Document = dict[str, Any]  # a result as JSON has it
Number = TypeVar("Number", float, npt.NDArray[np.float64])


@dataclass(frozen=True)
class Count:
    """`right` of `n` answers, where a guess is right with probability `baseline`."""

    right: int
    n: int
    baseline: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def centred(self) -> float:
        return centred(self.accuracy, self.baseline)

    @property
    def error(self) -> float:
        """Of the accuracy: half the width of Wilson's score interval at z = 1.

        It is sqrt(p (1 - p) / n) for many answers, and not zero where all of a few are right or
        all wrong (Wilson 1927; Brown, Cai and DasGupta 2001).
        """
        p, n = self.accuracy, self.n
        return math.sqrt(p * (1 - p) / n + 1 / (4 * n * n)) / (1 + 1 / n)


@dataclass(frozen=True)
class Spread:
    """A standard error, and the interval that holds 95% of the draws."""

    error: float
    low: float
    high: float


def centred(accuracy: Number, baseline: float) -> Number:
    """Where an accuracy lies between a guess, 0, and all right, 1 (the CORE metric of DCLM)."""
    return (accuracy - baseline) / (1 - baseline)


def bootstrap(counts: Sequence[Count]) -> Spread:
    """Of the mean of centred accuracies, about that mean. The draws are the same each time."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    total = np.zeros(DRAWS)
    for count in counts:
        p = (count.right + 0.5) / (count.n + 1)
        off = generator.binomial(count.n, p, size=DRAWS) / count.n - p
        total += centred(count.accuracy + off, count.baseline)
    means = total / len(counts)
    low, high = np.percentile(means, INTERVAL)
    return Spread(error=float(means.std(ddof=1)), low=float(low), high=float(high))

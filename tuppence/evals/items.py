"""What a suite asks of a model, and what it answers. Text and ids only, no tensors.

task ──number──▶ asks    texts in ids, of each of which the last `scored` ids count
model            answers nats of what counts, and whether each id of it was the likeliest
task ──answers─▶ judged  the choice that the model made, and whether it was right
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Judged = dict[str, int | bool]  # choice (of several; else absent), correct, and a suite's own


@dataclass(frozen=True)
class Ask:
    """One text, of which the last `scored` ids count (0 where a continuation has none)."""

    ids: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Answer:
    """Summed nats of the ids that count; `greedy` where each was the likeliest there."""

    nats: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class Task:
    """`count` items, asked by number (from 0). The asks of an item may share how they begin."""

    label: str
    count: int
    asks: Callable[[int], list[Ask]]
    judge: Callable[[int, list[Answer]], Judged]


class Text(Protocol):
    """Text to ids, as a model reads it."""

    @property
    def start(self) -> int | None:
        """The id that a text begins with: end-of-text, or a model's own; None where it has none."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """The ids after which nothing of a text follows."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Without start or end. Raises UserError for what cannot be encoded."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

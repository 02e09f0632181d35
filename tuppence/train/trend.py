"""Whether the training loss rises: a test over a long stretch, not a glance at the last steps.

    losses ──▶ means of blocks of equal length ──▶ the last 8 blocks beside the lowest 8 before them
    rises:  last - lowest  >  6 standard errors  and  > 2% of the lowest

The standard error is that of the difference of the two means, from the scatter of the blocks within
each. Blocks grow with the run, to at least 32 steps before anything is said, so that 8 of them are
longer than noise that lasts (a hard stretch of the text). The lowest of many stretches is low by
chance too, hence 6; tests/test_gauges.py tries flat, falling and wandering losses.
"""

import math
import statistics
from dataclasses import dataclass, field

MOST_BLOCKS, STRETCH = 64, 8
LEAST_STEPS = 32  # in a block, before the test says anything
ERRORS, SHARE = 6.0, 0.02


@dataclass(frozen=True)
class Rise:
    """From one mean loss to another, over so many steps at most; `noise` is what it had to be more
    than."""

    before: float
    after: float
    noise: float
    steps: int


@dataclass
class Trend:
    """The losses so far as block means, oldest first."""

    blocks: list[float] = field(default_factory=list)
    each: int = 1
    _sum: float = 0.0
    _count: int = 0
    _step: int = 0

    def add(self, step: int, loss: float) -> None:
        """A step's loss. A step that was there before begins anew: the run went back."""
        if step <= self._step:
            self.blocks, self._sum, self._count = [], 0.0, 0
        self._step = step
        self._sum += loss
        self._count += 1
        if self._count < self.each:
            return
        self.blocks.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.blocks) == MOST_BLOCKS:
            pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
            self.blocks, self.each = [(a + b) / 2 for a, b in pairs], 2 * self.each

    def rise(self) -> Rise | None:
        """What the last blocks say; None while there are too few."""
        count = len(self.blocks)
        if self.each < LEAST_STEPS or count < 2 * STRETCH:
            return None
        stretches = [self.blocks[i : i + STRETCH] for i in range(count - 2 * STRETCH + 1)]
        place = min(range(len(stretches)), key=lambda i: sum(stretches[i]))
        lowest, last = stretches[place], self.blocks[-STRETCH:]
        error = math.sqrt((statistics.variance(lowest) + statistics.variance(last)) / STRETCH)
        before = statistics.fmean(lowest)
        noise = max(ERRORS * error, SHARE * abs(before))
        return Rise(before, statistics.fmean(last), noise, (count - place) * self.each)

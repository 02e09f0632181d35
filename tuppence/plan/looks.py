"""How often to look whether validation has turned, once text repeats.

    tokens   1 epoch   x 1.3   x 1.3   x 1.3   the gap grows: x g   x g   x g   it has turned
                  marks of the run's own cadence lie in between, and count as looks

A turn shows three looks after it at the soonest (train/turning.py), so that with g = 1.02 it may be
seen within 6% of its tokens. Looking costs an evaluation, and a save while the loss still falls:
g is the least at which all of it stays within LOOK_SHARE of the run.
"""

import math

GROWTH = 1.02  # of tokens between two looks, while over-fitting is suspected
CALM_GROWTH = 1.3  # before
LATE_GROWTH = 1.25  # from which on a turn is seen when the tokens have about doubled since
MOST_GROWTH = 2.0
SPAN = 2.0  # by which tokens grew between the suspicion and the turn, in runs here
LOOK_SHARE = 0.03  # of a run's time


def growth_for(seconds_each: float, *, epochs: float, marks: int, seconds: float) -> float | None:
    """The growth of a run of so many epochs in `seconds`, with its own evaluations at so many even
    marks; None where text does not repeat, or not even the rarest looks are affordable."""
    growth = GROWTH
    while epochs > 1 and growth <= MOST_GROWTH:  # also if it is faster than expected
        taken = looks(growth, epochs=max(SPAN, epochs), marks=marks) * seconds_each
        if taken <= LOOK_SHARE * seconds:
            return growth
        growth *= 1.02
    return None


def looks(growth: float | None, *, epochs: float, marks: int) -> float:
    """About how many evaluations come beside those at marks, were the run to turn at its end."""
    if growth is None or epochs <= 1 or math.isinf(epochs):
        return 0.0
    first, suspected = 1 / epochs, max(1 / epochs, 1 / SPAN)
    calm = _between(first, suspected, max(growth, CALM_GROWTH), marks)
    return calm + _between(suspected, 1.0, growth, marks)


def _between(low: float, high: float, growth: float, marks: int) -> float:
    """The same between two fractions of the run: as long as the even marks are farther apart, one
    for every `growth`, less the marks themselves."""
    every = 1 / math.log(growth)
    high = min(high, every / marks)
    return math.log(high / low) * every - (high - low) * marks if high > low else 0.0

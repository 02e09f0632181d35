"""Whether validation has turned: a test over many evaluations, never a single point.

    val    \\_      _./   a parabola through the evaluations around the best now rises
    train    \\___        while the training loss went on falling,
    gap    ___...-'       and the gap between them is wider than when text began to repeat

Of the evaluations since more than one epoch was seen (nothing is over-fitted that was seen once),
with `best` the lowest, validation has turned when all of these hold:

    after   at least AFTER evaluations follow the best one; by its name all lie above it
    gap     mean (val - train) of the last three - of the first three > LEAST_GAP of the loss
    fall    mean train loss around the best - of the last three > TRAIN_SIGMAS of its noise;
            where it rises too the run is unstable, which is the guard's matter
    rise    mean val loss of the last three - around the best > VAL_SIGMAS of its noise, and
            > LEAST_RISE of the loss
    slope   of the parabola in log tokens, fitted since BACK times fewer tokens than at the best,
            at the last evaluation > SLOPE_SIGMAS of its standard error

The best of many noisy numbers is low by luck, therefore "around the best" are the one before it and
the one after.
Noise is the evaluations' own: the median distance of each of the last WINDOW from the line between
its neighbours, so that neither a slope nor an outlier counts as noise.

The constants were measured (docs/LOG.md). Where small models over-fit, the gap has grown by 0.24 to
0.5 of the loss when validation turns; in fifty noisy runs that did not, by 0.07 at most, while
their val loss alone "rose" by up to 5 of its sigmas: the gap keeps noise out. The slope keeps out
a stall, in which the gap grows too, and sees a turn sooner than the rise would: the whole curve
tells it, and not six points.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from tuppence.checkpoint import Point, State

Series = Sequence[tuple[float, float]]

AFTER, AROUND, LEAST = 3, 3, 8
WINDOW, BACK = 16, 1.35
VAL_SIGMAS, TRAIN_SIGMAS, SLOPE_SIGMAS = 1.0, 1.0, 3.0
LEAST_RISE, LEAST_GAP = 0.001, 0.1
GRAIN = 1.01  # of points closer in tokens than this the lower one is kept: a state stays small


def turned(points: Sequence[Point]) -> str | None:
    """What was found, in a sentence, of evaluations in the order of steps; None where the test
    above does not hold."""
    at = min(range(len(points)), key=lambda i: points[i].val_loss, default=0)
    if len(points) < LEAST or at < 1 or len(points) <= at + AFTER:
        return None
    best, last = points[at], points[-AROUND:]
    near = [points[at - 1], points[at + 1]]
    rise, fall, gap = _val(last) - _val(near), _train(near) - _train(last), gap_growth(points)
    spread = math.sqrt(1 / len(near) + 1 / len(last))
    val, train = (noise(_series(points[-WINDOW:], name)) for name in ("val_loss", "train_loss"))
    if (
        gap <= LEAST_GAP
        or fall <= TRAIN_SIGMAS * spread * train
        or rise <= max(VAL_SIGMAS * spread * val, LEAST_RISE * best.val_loss)
    ):
        return None
    recent = [point for point in points if point.tokens * BACK >= best.tokens]
    slope, error = slope_now(_series(max(recent, points[-LEAST:], key=len), "val_loss"), val)
    if slope <= SLOPE_SIGMAS * error:
        return None
    return (
        f"val loss rises, by {slope:.2f} ({_sigmas(slope, error)}) where tokens grow e-fold: the "
        f"last {AROUND} lie {rise:.4f} above those around the best, {best.val_loss:.4f} of step "
        f"{best.step:,}; meanwhile train loss fell by {fall:.4f} "
        f"({_sigmas(fall, spread * train)}); since text began to repeat the gap has grown by "
        f"{gap:.0%} of the loss"
    )


def slope_now(series: Series, sigma: float) -> tuple[float, float]:
    """The slope in log tokens of the parabola through (tokens, loss), at the last one, and its
    standard error: by the distances from the parabola, or by `sigma` where that is more."""
    xs = [math.log(tokens / series[-1][0]) for tokens, _ in series]
    bend = _centred([x * x for x in xs])
    line = _without(_centred(xs), bend)
    rest = _without(_centred([loss for _, loss in series]), bend)
    norm = _dot(line, line)
    slope = _dot(line, rest) / norm
    off = _without(rest, line)
    spread = math.sqrt(_dot(off, off) / (len(series) - 3))
    return slope, max(spread, sigma) / math.sqrt(norm)


def gap_growth(points: Sequence[Point]) -> float:
    """How much wider the gap between val and train loss is now than at first, as a share of the
    lowest val loss."""
    first, last = points[:AROUND], points[-AROUND:]
    least = min(p.val_loss for p in points)
    return (_val(last) - _train(last) - _val(first) + _train(first)) / least


def suspected(points: Sequence[Point]) -> bool:
    """Whether the gap has grown half-way to a turn, so that it is time to look more often."""
    return len(points) > AROUND and gap_growth(points) > LEAST_GAP / 2


def noise(series: Series) -> float:
    """The standard deviation of (tokens, loss) around a smooth curve; infinite for less than five.

    A loss on the line between its neighbours, with shares a and b of them, has the variance
    (1 + a^2 + b^2) sigma^2 around it.
    """
    off = []
    for (x0, y0), (x1, y1), (x2, y2) in zip(series, series[1:], series[2:], strict=False):
        b = math.log(x1 / x0) / math.log(x2 / x0)
        off.append(abs(y1 - (1 - b) * y0 - b * y2) / math.sqrt(1 + (1 - b) ** 2 + b**2))
    return 1.4826 * statistics.median(off) if len(off) >= 3 else math.inf


def seen(state: State, val_loss: float, *, epoch_tokens: int) -> State:
    """The state after a whole evaluation: a point more, once text repeats, and the training loss
    is added up anew."""
    if not state.loss_count:  # not one step was taken since the last
        return state
    here = Point(
        step=state.step,
        tokens=state.tokens,
        val_loss=val_loss,
        train_loss=state.loss_sum / state.loss_count,
        trained=state.loss_count,
    )
    points = _with(state.points, here) if state.tokens > epoch_tokens else ()
    return replace(state, points=points, loss_sum=0.0, loss_count=0)


def _with(points: tuple[Point, ...], here: Point) -> tuple[Point, ...]:
    if not points or here.tokens > GRAIN * points[-1].tokens:
        return (*points, here)
    before, trained = points[-1], points[-1].trained + here.trained
    both = before.train_loss * before.trained + here.train_loss * here.trained
    lower = min(before, here, key=lambda p: p.val_loss)
    return (*points[:-1], replace(lower, train_loss=both / trained, trained=trained))


def _series(points: Sequence[Point], name: str) -> Series:
    return [(point.tokens, getattr(point, name)) for point in points]


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _without(values: Sequence[float], other: Sequence[float]) -> list[float]:
    """The part of a vector that is at right angles to another one."""
    share = _dot(values, other) / _dot(other, other)
    return [a - share * b for a, b in zip(values, other, strict=True)]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _val(points: Sequence[Point]) -> float:
    return math.fsum(p.val_loss for p in points) / len(points)


def _train(points: Sequence[Point]) -> float:
    return math.fsum(p.train_loss for p in points) / len(points)


def _sigmas(value: float, noise: float) -> str:
    return f"{value / noise:.1f} sigma" if noise else "without noise"

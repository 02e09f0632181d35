"""A loss curve in a terminal's characters: two by four dots in each.

2.10┤⢣        train: the mean of the steps that fall into a column of dots
    │ ⠑⢄●     val: ●, the best one ◆
1.40┤   ⠑⠢⠤◆⣀▒  ▒ what was promised of the end
    0   step 480
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuppence.config import Interval
from tuppence.report.history import History

POINTS = 2048  # of a curve that is kept: more than any terminal has columns of dots
WARM = 0.1  # of the steps, whose losses may be cut off at the top
DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column of a character
SMOOTH = 100  # of the dots' columns one, to either side, is averaged into a column
MARGIN = 8  # columns for the axis on the left

Part = tuple[str, str]
Line = list[Part]


@dataclass(frozen=True)
class Curve:
    """At most POINTS means of the training loss, and the evaluations that count, by step."""

    steps: np.ndarray
    losses: np.ndarray
    val: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None


def curve_of(
    history: History, evals: Sequence[tuple[int, float]] = (), best_step: int | None = None
) -> Curve:
    """What a chart needs of a run, however many steps it has."""
    steps, losses = history["step"], history["loss"]
    known = np.isfinite(losses)
    steps, losses = _means(steps[known].astype(float), losses[known], POINTS)
    return Curve(steps, losses, tuple(evals), best_step)


def _means(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The means of equally many points each, where there are more than `bins`."""
    if len(x) <= bins:
        return x, y
    cuts = np.linspace(0, len(x), bins + 1).astype(int)
    sizes = np.diff(cuts)
    return x[cuts[1:] - 1], np.add.reduceat(y, cuts[:-1]) / sizes


def chart(curve: Curve, promised: Interval | None, *, width: int, height: int) -> list[Line]:
    """`height` lines, the last of them the axis; nothing where there is nothing to draw."""
    columns, rows = width - MARGIN - 2, height - 1
    if not len(curve.steps) or columns < 8 or rows < 2:
        return []
    last = max(float(curve.steps[-1]), 1.0)
    means = _columns(curve, last, 2 * columns)
    low, high = _range(curve, means, promised)
    cells = _line(means, (low, high), rows)
    styles = [["train"] * columns for _ in range(rows)]
    for step, loss in curve.val:
        if loss > high:
            continue
        row, column = _row(loss, (low, high), rows), min(columns - 1, int(step / last * columns))
        best = step == curve.best_step
        if cells[row][column] != "◆":
            cells[row][column] = "◆" if best else "●"
            styles[row][column] = "val"
    lines = []
    for row in range(rows):
        goal = " "
        if promised is not None:
            top, bottom = (
                _row(promised.high, (low, high), rows),
                _row(promised.low, (low, high), rows),
            )
            goal = "▒" if top <= row <= bottom else " "
        lines.append(
            [*_axis(row, rows, low, high), *_runs(cells[row], styles[row]), (goal, "promise")]
        )
    end = f"step {int(curve.steps[-1]):,}"
    lines.append([(" " * MARGIN + "0" + end.rjust(columns - 1), "dim")])
    return lines


def _columns(curve: Curve, last: float, wide: int) -> np.ndarray:
    """The training loss in each column of dots; nan before the first step that is known."""
    place = np.minimum((curve.steps / last * wide).astype(int), wide - 1)
    count = np.bincount(place, minlength=wide)
    mean = np.bincount(place, weights=curve.losses, minlength=wide) / np.maximum(count, 1)
    there = np.flatnonzero(count)
    every = _smooth(np.interp(np.arange(wide), there, mean[there]))
    every[: there[0]] = np.nan
    return every


def _smooth(means: np.ndarray) -> np.ndarray:
    """Over neighbouring columns: the noise of steps is nothing to look at."""
    reach = len(means) // SMOOTH
    padded = np.pad(means, reach, mode="edge")
    return np.convolve(padded, np.full(2 * reach + 1, 1 / (2 * reach + 1)), mode="valid")


def _range(curve: Curve, means: np.ndarray, promised: Interval | None) -> tuple[float, float]:
    """Losses from the bottom to the top: the first ones, which fall steeply, may be above it."""
    settled = means[int(WARM * len(means)) :]
    val = [loss for step, loss in curve.val if step >= WARM * curve.steps[-1]]
    ends = [] if promised is None else [promised.low, promised.high]
    low = min([float(np.nanmin(settled)), *val, *ends])
    high = max([float(np.nanmax(settled)), *val, *ends])
    pad = max(high - low, 1e-3 * abs(high), 1e-6) * 0.04
    return low - pad, high + pad


def _row(loss: float, ends: tuple[float, float], rows: int) -> int:
    """The row of a loss, from the top; the nearest where it lies outside."""
    low, high = ends
    return min(rows - 1, max(0, int((high - loss) / (high - low) * rows)))


def _line(means: np.ndarray, ends: tuple[float, float], rows: int) -> list[list[str]]:
    """The training loss as braille, each column of dots joined to the one before."""
    bits = [[0] * (len(means) // 2) for _ in range(rows)]
    before = None
    for x, mean in enumerate(means):
        if np.isnan(mean) or mean > ends[1]:
            before = 0 if mean > ends[1] else None  # it comes from above
            continue
        here = _row(mean, ends, 4 * rows)
        start = here if before is None else before
        for y in range(min(start, here), max(start, here) + 1):
            if y != start or y == here:
                bits[y // 4][x // 2] |= DOT[y % 4][x % 2]
        before = here
    return [[chr(0x2800 + bit) if bit else " " for bit in row] for row in bits]


def _axis(row: int, rows: int, low: float, high: float) -> Line:
    """A number at the top, the middle and the bottom."""
    if row not in (0, rows // 2, rows - 1):
        return [(" " * (MARGIN - 1) + "│", "dim")]
    value = high - (row + 0.5) / rows * (high - low)
    return [(f"{value:{MARGIN - 2}.3f} ┤", "dim")]


def _runs(cells: Sequence[str], styles: Sequence[str]) -> Line:
    """Neighbours of one style as one part."""
    found: Line = []
    for cell, style in zip(cells, styles, strict=True):
        if found and found[-1][1] == style:
            found[-1] = (found[-1][0] + cell, style)
        else:
            found.append((cell, style))
    return found

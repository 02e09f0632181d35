"""The receipt's pictures: losses, rates, scores, and where every cent went.

A line is at most some hundreds of points, however long the run was: each is a mean of neighbours.
"""

import html
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.plot import Points, Series, chart, legend, mark, short, stack
from tuppence.report.history import History

Document = dict[str, Any]
Column = npt.NDArray[np.float64]

AXES = ("tokens", "usd", "hours")
NAMES = {"tokens": "tokens", "usd": "dollars"}
TIMES = (("seconds", 1 / 3600), ("minutes", 1 / 60), ("hours", 1.0), ("days", 24.0))
FEW, CALM = 40, 160  # points of a loss curve: enough to see the trend, too few to see the noise
NEAR = 0.5  # of the way to the promised end, before which its place would press the curve flat
MOST_DOTS = 80  # evaluations that are drawn each; more are a line
MOST_PARTS = 40  # pieces of thrown-away work that are drawn, the longest
CUT = 0.015  # of the steps, whose losses need not be seen: they would press the rest flat
LEAST_SPENT = 0.97  # of a budget in dollars or hours: what is promised to be used (docs/budgets.md)
TALL = (640, 400)  # as high as the account beside it
SMALL, SPARSE = (320, 170), 90  # the size of a small picture, and the points of its lines

PHASES = {
    "train": "training",
    "data_wait": "waiting for data",
    "compile": "compiling",
    "evaluate": "evaluation",
    "save": "saving",
    "provision": "start-up",
    "install": "installing",
    "prepare": "preparing data",
    "store": "storage",
    "egress": "egress",
    "lost": "thrown away",
    "idle": "idle",
}


def phase_name(phase: str) -> str:
    """A phase as people call it."""
    return PHASES.get(phase, phase)


def in_order(phases: list[Document]) -> list[Document]:
    """Phases as they are told: the work first."""
    order = list(PHASES)
    return sorted(phases, key=lambda p: order.index(p["phase"]) if p["phase"] in PHASES else 99)


# ---------------------------------------------------------------- columns to points


def thin(x: Column, y: Column, *, most: int) -> Points:
    """At most so many points, each the mean of its share of those that are known."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= most:
        return list(zip(x.tolist(), y.tolist(), strict=True))
    edges = np.linspace(0, len(x), most + 1).astype(np.int64)
    counts = np.diff(edges)
    means = (np.add.reduceat(column, edges[:-1]) / counts for column in (x, y))
    return list(zip(*(mean.tolist() for mean in means), strict=True))


def _calm(steps: int) -> int:
    return min(CALM, max(FEW, steps // 10))


def hours_in(hours: float) -> tuple[str, float]:
    """A unit in which so long a run is easily read, and its hours."""
    return next(((unit, length) for unit, length in TIMES[:-1] if hours < 90 * length), TIMES[-1])


def _axis(steps: dict[str, Column], name: str, unit: float) -> Column:
    column = steps[name].astype(np.float64)
    return column / unit if name == "hours" else column


def _pieces(steps: History, name: str, unit: float) -> list[Points]:
    """Losses that do not count, a piece for each time that steps were thrown away."""
    dropped = steps.dropped
    if not len(dropped.get("step", ())):
        return []
    breaks = np.flatnonzero((np.diff(dropped["step"]) != 1) | (np.diff(dropped["attempt"]) != 0))
    x, y = _axis(dropped, name, unit), dropped["loss"]
    parts = np.split(np.arange(len(x)), breaks + 1)
    longest = sorted(parts, key=len, reverse=True)[:MOST_PARTS]
    every = sum(map(len, longest))
    most = _calm(len(steps) + every)
    share = [max(2, round(most * len(part) / (len(steps) + every))) for part in longest]
    pieces = (thin(x[p], y[p], most=few) for p, few in zip(longest, share, strict=True))
    return [piece for piece in pieces if piece]


# ---------------------------------------------------------------- losses


def losses(told: Document, steps: History) -> list[tuple[str, str]]:
    """(axis, picture with its legend) against tokens, dollars and time, where these are known."""
    return [
        (name, picture)
        for axis in AXES
        for name, picture in [_loss(told, steps, axis)]
        if picture is not None
    ]


def _loss(told: Document, steps: History, axis: str) -> tuple[str, str | None]:
    unit_name, unit = hours_in(told["actual"]["hours"])
    unit = unit if axis == "hours" else 1.0
    name = NAMES.get(axis, unit_name)
    x, y = _axis(steps.columns, axis, unit), steps["loss"]
    if not np.isfinite(x).any():
        return name, None
    val = _points(told["evaluations"], axis, unit)
    gone = _points(told["thrown_away"]["evaluations"], axis, unit)[-MOST_DOTS:]
    series = [Series("thrown away", piece, kind="faint") for piece in _pieces(steps, axis, unit)]
    series.append(Series("training loss", thin(x, y, most=_calm(len(x)))))
    series += [Series("thrown-away validation", gone, kind="hollow", colour=1)] if gone else []
    many = len(val) > MOST_DOTS
    val = thin(*np.array(val).T, most=MOST_DOTS) if many else val
    errors = None if many else _errors(told["evaluations"], axis)
    kind = "line" if many else "dots"
    series.append(Series("validation loss", val, kind=kind, errors=errors, colour=1))
    reached = max(float(np.nanmax(x)), *(float(at) for at, _ in gone), 0.0)
    band, beyond = _promise(told, axis, unit), ""
    if band and reached < NEAR * band[0][0]:
        low, high = (short(end) for end, _, _ in (band[0], band[-1]))
        beyond = "promised: {:.3f} to {:.3f}".format(*band[0][1:]) + f" at {low} to {high} {name}"
        band = []
    drawn = chart(
        series,
        x_label=name,
        y_label="loss, nats per token",
        title=f"training and validation loss against {name}",
        band=band,
        size=TALL,
        y_high=_roof(y, [*val, *((x, high) for x, _, high in band)]),
    )
    named = {one.name: one for one in series if one.points}
    told_band = "promised (80%)" if band else beyond
    return name, drawn + legend(list(named.values()), band=told_band)


def _points(rows: list[Document], axis: str, unit: float) -> Points:
    unit = unit if axis == "hours" else 1.0
    return [(row[axis] / unit, row["loss"]) for row in rows if row[axis] is not None]


def _errors(rows: list[Document], axis: str) -> list[float]:
    """Of the same points; zero where none is known."""
    return [row["error"] or 0.0 for row in rows if row[axis] is not None]


def _promise(told: Document, axis: str, unit: float) -> list[tuple[float, float, float]]:
    """Where the run was to end: between two lengths, between two losses."""
    loss = told["predicted"]["val_loss"]
    if loss is None:
        return []
    ends = told["intervals"][axis]
    return [(end / unit, loss["low"], loss["high"]) for end in ends]


def _roof(losses: Column, others: Points) -> float | None:
    """The loss above which nothing is drawn: that of the first steps, unless others lie higher."""
    known = losses[np.isfinite(losses)]
    if len(known) < 50:
        return None
    first = int(CUT * len(known)) + 1
    return float(max([known[first : 2 * first + 5].mean(), *(y for _, y in others)]))


# ---------------------------------------------------------------- small ones


def rates(steps: History) -> list[tuple[str, str]]:
    """(title, picture) of the learning rate, speed, gradient and memory, where these are known."""
    shown = (
        ("learning rate", "lr"),
        ("tokens per second", "tokens_per_second"),
        ("gradient norm", "grad_norm"),
        ("memory, GiB", "memory_gib"),
    )
    x = steps["tokens"].astype(np.float64)
    out = []
    for title, name in shown:
        points = thin(x, steps[name], most=SPARSE)
        if len(points) > 1:
            line = Series(title, points, colour=2)
            out.append((title, chart([line], x_label="tokens", y_label=title, size=SMALL)))
    return out


def scores(told: Document, tokens_at: dict[int, int]) -> list[tuple[str, str]]:
    """(title, picture) of each suite that was asked more than once, with standard errors."""
    out = []
    for name, points in told["scores"].items():
        core = name == "core"
        key, error = ("score", "error") if core else ("acc_norm", "error_norm")
        label = "CORE" if core else "HellaSwag acc_norm"
        shown = [p for p in points if p["step"] in tokens_at and p[key] is not None]
        if len(shown) > 1:
            at = [(float(tokens_at[p["step"]]), p[key]) for p in shown]
            dots = Series(label, at, kind="dots", errors=[p[error] for p in shown], colour=3)
            line = Series(label, at, kind="line", colour=3)
            out.append((label, chart([line, dots], x_label="tokens", y_label=label, size=SMALL)))
    return out


# ---------------------------------------------------------------- money


def bars(told: Document) -> str:
    """Promised and paid dollars by phase, one bar below the other on one scale."""
    promised, paid = told["predicted_phases"], told["phases"]
    total = max(sum(p["usd"] for p in phases) for phases in (promised, paid)) or None
    out = []
    for who, phases in (("promised", promised), ("paid", paid)):
        parts = [
            (p["phase"], p["usd"], f"{phase_name(p['phase'])} ${p['usd']:.4f}")
            for p in in_order(phases)
        ]
        title = f"{who}: " + ", ".join(label for _, _, label in parts)
        out.append(f"<dt>{who}</dt><dd>{stack(parts, total=total, title=title)}</dd>")
    return f'<dl class="bars">{"".join(out)}</dl>'


def promise_mark(told: Document, key: str) -> str:
    """What was paid on the interval that was promised; nothing where one is not known, or where
    the run is still to come there."""
    paid = told["actual"].get(key)
    promised = told["predicted"].get(key)
    if paid is None or promised is None or (key in (*AXES, "val_loss") and not told["finished"]):
        return ""
    if key == "val_loss":
        return mark(promised["low"], promised["mid"], promised["high"], paid)
    if key not in told["intervals"]:
        return ""
    low, high = told["intervals"][key]
    if high - low < (1 - LEAST_SPENT) * promised:  # the budget itself
        kind, limit = told["budget"]["kind"], told["budget"]["limit"]
        low = LEAST_SPENT * promised
        high = promised * max(1.0, limit / told["predicted"].get(kind, limit))
    return mark(low, promised, high, paid)


def escaped(text: object) -> str:
    """Text for a page, whoever wrote it: control characters could do anything there."""
    said = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )
    return html.escape(said)

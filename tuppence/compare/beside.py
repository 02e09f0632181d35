"""Runs side by side: what differs, and how they stand at equal tokens, hours and dollars.

    at equal x    the val loss of each at the largest x that all have come to
    to reach y    the first x at which each is down at y, the worst of their best losses

Both read a run's val loss between two evaluations from the straight line that joins them. A run's
loss falls ever slower, so that such a line lies above it: what is read is no better than it was.

What may be compared at all is decided by alike.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence import config
from tuppence.config import Plan
from tuppence.evals.identity import refuse
from tuppence.folder import RunFolder
from tuppence.ledger import charged
from tuppence.report.account import build
from tuppence.report.history import History, read
from tuppence.watch.standing import Follower, machine_of

Document = dict[str, Any]
Column = npt.NDArray[np.float64]

AXES = ("tokens", "hours", "usd")
NAMES = {"tokens": "tokens", "hours": "hours", "usd": "dollars"}
EQUAL = 0.02  # nearer to each other two places on an axis are one: runs end where they can
TRAIN_SHARE = 0.05  # of the steps up to a place: those whose mean training loss is told
TWINS_APART = 0.05  # of the tokens: further apart, two seeds have not done the same
RATE_APART = 0.05  # of the peak learning rate: further apart, two schedules are not at one point


@dataclass(frozen=True)
class Side:
    """One run of those that are compared. `told` is its receipt, `evals` its evaluations that are
    alike; `places` says of every axis where each step of `history` ends."""

    label: str
    folder: RunFolder
    plan: Plan
    asked: Document
    told: Document
    history: History
    evals: list[Document]
    left_out: int
    places: dict[str, Column]
    state: str

    @property
    def head(self) -> Document | None:
        """The evaluation that says what all of them are of."""
        return self.evals[-1] if self.evals else None


@dataclass(frozen=True)
class Curve:
    """A run's val losses and where they lie on each axis."""

    at: dict[str, Column]
    value: Column

    def end(self, axis: str) -> float:
        return float(self.at[axis][-1])

    def read(self, axis: str, x: float) -> float | None:
        """The loss at `x`, or at the run's end where that is about there; None before the first
        evaluation and beyond the last."""
        places = self.at[axis]
        low, high = x * (1 - EQUAL), x * (1 + EQUAL)
        if low <= places[-1] <= high:  # the end itself, where the learning rate is down
            return float(self.value[-1])
        if not places[0] <= high or places[-1] < x:
            return None
        return float(np.interp(x, places, self.value))

    def reaches(self, axis: str, value: float) -> float | None:
        """The first place at which the loss is down at `value`; None: nowhere, or before the first
        evaluation."""
        there = np.flatnonzero(self.value <= value)
        if not len(there) or (there[0] == 0 and self.value[0] < value):
            return None
        k, places = int(there[0]), self.at[axis]
        if k == 0:
            return float(places[0])
        above, below = float(self.value[k - 1]), float(self.value[k])
        part = (above - value) / (above - below)
        return float(places[k - 1] + part * (places[k] - places[k - 1]))


# ---------------------------------------------------------------- one run


def side(folder: RunFolder, label: str, *, away: bool = False) -> Side:
    """A run as it is now; `away`: its folder is a copy of what lies on a bucket. Raises UserError
    where no step was taken yet."""
    history = read(folder)
    told = build(folder, history)
    rows = folder.latest("evals")
    evals = _alike(rows)
    return Side(
        label=label,
        folder=folder,
        plan=folder.plan(),
        asked=config.asked(folder.run()),
        told=told,
        history=history,
        evals=evals,
        left_out=len(rows) - len(evals),
        places=_places(folder, history),
        state=_state(folder, told, away),
    )


def _state(folder: RunFolder, told: Document, away: bool) -> str:
    """Finished, stopped early, or what it is doing and how far it is."""
    if told["finished"]:
        return "stopped early" if told["early_stop"] else "finished"
    state = Follower(folder, remote=away).read().state
    return f"{state}, {told['budget']['fraction']:.1%} of its budget"


def _alike(rows: list[Document]) -> list[Document]:
    """Without evaluations that were cut short, or are of something else than the last one."""
    whole = [row for row in rows if row["tokens"] == row.get("of_tokens", row["tokens"])] or rows
    says = not whole or refuse(whole[-1], whole[-1]) is None
    return [row for row in whole if not says or refuse(row, whole[-1]) is None]


def _places(folder: RunFolder, history: History) -> dict[str, Column]:
    usd = history["usd"]
    hours = np.where(np.isnan(history["hours"]), _clock(folder)(usd), history["hours"])
    return {"tokens": history["tokens"].astype(np.float64), "hours": hours, "usd": usd}


def _clock(folder: RunFolder) -> Callable[[Any], Column]:
    """Hours that were charged when so many dollars were, by the ledger: every price is above 0."""
    rows = charged(folder)
    hours = np.cumsum([0.0, *((row["end"] - row["start"]) / 3600 for row in rows)])
    dollars = np.cumsum([0.0, *(row["usd"] for row in rows)])
    return lambda usd: np.interp(usd, dollars, hours)


def curve(one: Side, unit: str) -> Curve:
    """The val losses of a run in this unit, loss or bpb."""
    steps = np.array([row["step"] for row in one.evals], dtype=np.int64)
    value = np.array([_number(row[unit]) for row in one.evals], dtype=np.float64)
    usd = np.array([_number(row.get("usd")) for row in one.evals], dtype=np.float64)
    at = {"tokens": one.history.at(steps, "tokens"), "hours": _clock(one.folder)(usd), "usd": usd}
    good = np.isfinite(value) & np.all([np.isfinite(column) for column in at.values()], axis=0)
    return Curve({axis: column[good] for axis, column in at.items()}, value[good])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def train_loss(one: Side, axis: str, x: float) -> float | None:
    """The mean training loss of the steps that lead up to `x`."""
    stop = max(1, int(np.searchsorted(one.places[axis], x, side="right")))
    part = one.history["loss"][stop - max(1, round(TRAIN_SHARE * stop)) : stop]
    return float(np.nanmean(part)) if np.isfinite(part).any() else None


def rate_share(one: Side, axis: str, x: float) -> float | None:
    """The learning rate at `x` as a share of its peak: how far the schedule has come down."""
    rates = one.history["lr"]
    if not np.isfinite(rates).all() or rates.max() <= 0:
        return None
    return float(np.interp(x, one.places[axis], rates) / rates.max())


# ---------------------------------------------------------------- all of them


def differs(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Of the keys that were asked those that are not the same in all runs; None: not asked."""
    names = [key for key in config.keys() if key != "name"]  # noqa: SIM118 (no dictionary)
    values = {key: [one.asked.get(key) for one in sides] for key in names}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found)}


def twins(sides: Sequence[Side]) -> list[tuple[int, int]]:
    """Pairs of runs of which the same was asked but for the seed."""
    rest = [
        {key: value for key, value in one.asked.items() if key not in ("name", "train.seed")}
        for one in sides
    ]
    seeds = [one.plan.step.seed for one in sides]
    pairs = itertools.combinations(range(len(sides)), 2)
    return [(a, b) for a, b in pairs if rest[a] == rest[b] and seeds[a] != seeds[b]]


def noise(pairs: Sequence[tuple[int, int]], values: Sequence[float | None]) -> float | None:
    """How far apart twins are; None: there are none."""
    apart = [
        abs(first - second)
        for a, b in pairs
        if (first := values[a]) is not None and (second := values[b]) is not None
    ]
    return max(apart, default=None)


def final_noise(sides: Sequence[Side], curves: Sequence[Curve]) -> float | None:
    """How far apart twins end that have seen about as many tokens."""
    ends = [each.end("tokens") for each in curves]
    alike = [
        (a, b)
        for a, b in twins(sides)
        if abs(ends[a] - ends[b]) <= TWINS_APART * max(ends[a], ends[b])
    ]
    return noise(alike, [float(each.value[-1]) for each in curves])


def at_equal(sides: Sequence[Side], curves: Sequence[Curve], axis: str, *, train: bool) -> Document:
    """Every run's loss at the largest place on `axis` that all were evaluated up to.

    At equal hours or dollars the noise is also that of the machine, by which twins got further.
    """
    ends = [each.end(axis) for each in curves]
    x = min(ends)
    values = [each.read(axis, x) for each in curves]
    apart = noise(twins(sides), values)
    return {
        "axis": axis,
        "at": x,
        "end_of": sides[ends.index(x)].label,
        "val": values,
        "train": [train_loss(one, axis, x) if train else None for one in sides],
        "share_of_end": [x / end if end else None for end in ends],
        "rate_share": [rate_share(one, axis, x) for one in sides],
        "noise": apart,
        **verdict(values, apart),
    }


def verdict(values: Sequence[float | None], apart: float | None = None) -> Document:
    """Which is the lowest, and which are no further `apart` from it than noise puts them; neither
    where two are the lowest."""
    there = [value for value in values if value is not None]
    low = min(there, default=math.nan)
    if len(there) < 2 or there.count(low) > 1:
        return {"best": None, "near": []}
    best = values.index(low)
    near = [
        i
        for i, value in enumerate(values)
        if i != best and value is not None and value - low <= (apart or 0.0)
    ]
    return {"best": best, "near": near}


def to_reach(sides: Sequence[Side], curves: Sequence[Curve]) -> Document:
    """What it takes each to come down to the worst of their best losses: their last may lie above,
    where validation has turned."""
    lows = [float(each.value.min()) for each in curves]
    loss = max(lows)
    takes = {axis: [each.reaches(axis, loss) for each in curves] for axis in AXES}
    return {
        "loss": loss,
        "of": sides[lows.index(loss)].label,
        "takes": takes,
        "best": {  # one that is not known may have taken less
            axis: None if None in found else verdict(found)["best"] for axis, found in takes.items()
        },
    }


def mid_schedule(found: Sequence[Document], sides: Sequence[Side]) -> str | None:
    """That at equal x one run was done with its schedule and another was not, in one sentence."""
    apart = []
    for each in found:
        shares = [share for share in each["rate_share"] if share is not None]
        if len(shares) == len(sides) and max(shares) - min(shares) > RATE_APART:
            said = ", ".join(f"{one.label} {s:.0%}" for one, s in zip(sides, shares, strict=True))
            apart.append(f"{NAMES[each['axis']]} ({said})")
    if not apart:
        return None
    return (
        f"learning rates are at different parts of their peaks at equal {', '.join(apart)}: one "
        f"that is not down yet would have a lower loss in a run that ends there"
    )


# ---------------------------------------------------------------- figures


def figures(one: Side) -> Document:
    """What a run asked for, ran on, cost and came to."""
    told, plan, actual = one.told, one.plan, one.told["actual"]
    by_loss = sorted(one.evals, key=lambda row: float(row["loss"]))
    last, best = one.head or {}, by_loss[0] if by_loss else {}
    ends = {"last": last, "best": best}
    return {
        "label": one.label,
        "name": told["name"],
        "path": str(one.folder.path),
        "finished": told["finished"],
        "state": one.state,
        "progress": told["progress"],
        "asked": one.asked,
        "model": {
            "family": plan.model.family,
            "params": plan.model.params,
            "flops_per_token": plan.model.flops_per_token,
            "sequence_len": plan.model.sequence_len,
        },
        "data": {
            "source": plan.data.source,
            "tokenizer": plan.data.tokenizer,
            "train_tokens": plan.data.train_tokens,
            "bytes_per_token": plan.data.bytes_per_token,
        },
        "machine": told["machine"],
        "place": machine_of(plan),
        "budget": told["budget"],
        "prices": told["prices"],
        **{key: actual[key] for key in ("usd", "hours", "tokens", "tokens_per_second", "mfu")},
        "peak_memory_gib": actual["peak_memory_gib"],
        "steps": told["steps"],
        "attempts": told["attempts"],
        "val_loss": {which: row.get("loss") for which, row in ends.items()},
        "val_error": {which: row.get("error") for which, row in ends.items()},
        "val_bpb": {which: row.get("bpb") for which, row in ends.items()},
        "best_step": best.get("step"),
        "evaluated": [last["tokens"], last.get("of_tokens")] if last else None,
    }

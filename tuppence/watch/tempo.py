"""How fast a run goes, and what that makes of the rest of its budget; from its last steps."""

import math
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]

SMOOTH_STEPS = 20  # over which loss, speed and waits are told
TELLING_PROGRESS = 0.01  # before it the plan knows better how long the run takes
KEYS = {"steps": "step", "tokens": "tokens"}


def means(rows: Sequence[Document]) -> dict[str, float | None]:
    """Loss, speed, MFU and the share of waits over the last of these steps."""
    rows = rows[-SMOOTH_STEPS:]
    seconds = sum(row["step_seconds"] for row in rows)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    names = ("loss", "tokens_per_second", "mfu", "data_wait")
    found: dict[str, float | None] = dict.fromkeys(names)
    if losses:
        found["loss"] = math.fsum(losses) / len(losses)
    if seconds:
        for name in ("tokens_per_second", "mfu"):  # each is a rate: weighed by time
            found[name] = sum(row[name] * row["step_seconds"] for row in rows) / seconds
        found["data_wait"] = sum(row.get("data_wait", 0.0) for row in rows) / seconds
    return found


def seconds_left(
    limits: Sequence[Document],
    rows: Sequence[Document],
    stopping: Document | None,
    *,
    progress: float,
    charged: float,
    usd_per_hour: float | None,
    since: float,
    promised: float | None,
) -> float | None:
    """Seconds until the first limit, or until the anneal of an early stop is done.

    `charged` seconds had passed `since` seconds ago; the plan `promised` so many in all.
    """
    if stopping and rows:
        each = sum(row["step_seconds"] for row in rows) / len(rows)
        return float(max(0, last_step(stopping) - rows[-1]["step"]) * each)
    found: list[float] = []
    for limit in limits:
        kind, rest = limit["kind"], max(0.0, limit["limit"] - limit["spent"])
        if kind == "hours":
            found.append(max(0.0, rest * 3600 - since))
        elif kind == "usd" and usd_per_hour:
            found.append(max(0.0, rest / usd_per_hour * 3600 - since))
        elif (each_takes := _each_takes(rows, KEYS.get(kind, ""))) is not None:
            found.append(rest * each_takes)
        elif progress > TELLING_PROGRESS:
            found.append(charged * (1 / progress - 1))
        elif promised is not None:
            found.append(max(0.0, promised - charged))
    return min(found, default=None)


def _each_takes(rows: Sequence[Document], key: str) -> float | None:
    """Charged seconds of a step or a token lately: evaluations and saves are in it. None where
    there are few of them, or where an older run's lines do not say."""
    if len(rows) < SMOOTH_STEPS or rows[0].get("hours") is None:
        return None
    first, last = rows[0], rows[-1]
    if key not in last or last[key] <= first[key]:
        return None
    return float((last["hours"] - first["hours"]) * 3600 / (last[key] - first[key]))


def last_step(stopping: Document) -> int:
    """The step at which an early stop's anneal ends."""
    back = stopping.get("back_to")
    return int(stopping["step"] if back is None else back) + int(stopping.get("anneal_steps", 0))

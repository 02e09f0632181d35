"""The meter: what has been charged, by phase, over every attempt of a run.

    ledger.jsonl    {start, end, phase, node, usd_per_hour, usd, attempt} for each closed interval
    heartbeat.json  the interval still open, and when it was last seen

A killed process leaves its interval open; the next attempt closes it at the last heartbeat. Time in
which no process ran is not charged, unless the machine is rented (`Held`): then all of it is, from
its own start to its own end, and each second once. All times are seconds since the epoch.
"""

import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tuppence.errors import Fault
from tuppence.folder import RunFolder, gone_back
from tuppence.held import Held
from tuppence.host import process_space

BEAT_SECONDS = 1.0
WORK = ("train", "evaluate")  # phases whose results a kill can throw away


@dataclass(frozen=True)
class Spent:
    """What the closed intervals add up to."""

    seconds: float
    usd: float


class Meter:
    """Charges the present attempt to the run's ledger. Use `with meter.phase(...)` inside it."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        usd_per_hour: float,
        attempt: int,
        start: float,
        held: Held | None = None,
    ) -> None:
        """Begin charging at `start` (before now: the process's own start) as provision; on a
        machine that was `held` before it, from then on."""
        self.folder, self.usd_per_hour, self.attempt = folder, usd_per_hour, attempt
        self.tail_seconds = held.tail_seconds if held else 0.0
        _close_abandoned(folder)
        rows = list(folder.rows("ledger"))
        last = max((row["end"] for row in rows), default=0.0)
        self.before = Spent(sum(r["end"] - r["start"] for r in rows), sum(r["usd"] for r in rows))
        self._epoch = time.time() - time.monotonic()  # immune to clock changes while it runs
        self._phase = "provision"
        self.start = self._since = max(held.since if held else start, last)
        if held is not None:
            self._before_process(held.phases(start), start)
        self._beaten = 0.0
        self.beat()

    def now(self) -> float:
        return self._epoch + time.monotonic()

    def seconds(self) -> float:
        """Charged so far, all attempts."""
        return self.before.seconds + max(0.0, self.now() - self.start)

    def usd(self) -> float:
        """Charged so far, all attempts."""
        return self.before.usd + max(0.0, self.now() - self.start) / 3600 * self.usd_per_hour

    def seconds_left(self, *, usd: float | None, hours: float | None) -> float:
        """Seconds that this process may use until the first of the two limits; infinite where
        there is none."""
        by_usd = (usd - self.usd()) / self.usd_per_hour * 3600 if usd is not None else float("inf")
        by_hours = hours * 3600 - self.seconds() if hours is not None else float("inf")
        return min(by_usd, by_hours) - self.tail_seconds

    def spent_at(self, *, usd: float | None, hours: float | None) -> float:
        """When the first of the two limits is reached; infinite where there is none."""
        return self.now() + self.seconds_left(usd=usd, hours=hours) + self.tail_seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to `name`, then go back to the phase before."""
        outer = self._phase
        self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, name: str) -> None:
        """Close the open interval and open the next."""
        now = self.now()
        self._append(now)
        self._since, self._phase = max(now, self._since), name
        self._beaten = 0.0
        self.beat()

    def beat(self) -> None:
        """Say that the open interval is still charged; at most once a second."""
        now = self.now()
        if now - self._beaten < BEAT_SECONDS:
            return
        self._beaten = now
        who = {"pid": os.getpid(), "space": process_space()}
        self.folder.write_beat({**self._interval(now), **who})

    def close(self, *, allowance: float = 0.0, ended: bool = False) -> None:
        """Stop charging; `allowance` seconds are charged in advance for what remains, as save.

        Where the run has `ended`, a held machine's last seconds are charged too, as idle: no later
        attempt will.
        """
        self.switch("save")
        end = max(self._since, self.now() + allowance)
        self._append(end)
        if ended:
            self._since, self._phase = end, "idle"
            self._append(end + self.tail_seconds)
        self.folder.forget_beat()

    def _before_process(self, phases: list[tuple[str, float, float]], start: float) -> None:
        """Charge what a held machine did before this process began at `start`. Where an earlier
        attempt was charged for a part of it, it only waited since."""
        waited = bool(phases) and self._since > phases[0][1]
        for phase, begun, end in [("idle", self._since, start)] if waited else phases:
            self._since, self._phase = max(self._since, begun), phase
            self._append(end)
        self._since, self._phase = max(self._since, start), "provision"

    def _append(self, end: float) -> None:
        if end > self._since:
            self.folder.append("ledger", self._interval(end))

    def _interval(self, end: float) -> dict[str, Any]:
        return {
            "start": self._since,
            "end": end,
            "phase": self._phase,
            "node": platform.node(),
            "usd_per_hour": self.usd_per_hour,
            "usd": (end - self._since) / 3600 * self.usd_per_hour,
            "attempt": self.attempt,
        }


def charge_idle(folder: RunFolder, held: Held, *, until: float) -> None:
    """Charge a held machine whose trainer is gone, and could not: from its last sign of life."""
    _close_abandoned(folder)
    rows = [row for row in folder.rows("ledger") if row["end"] > held.since]
    last = max(rows, key=lambda row: float(row["end"]), default=None)
    if last is None or last["end"] >= until:
        return
    usd = (until - last["end"]) / 3600 * last["usd_per_hour"]
    folder.append(
        "ledger", {**last, "start": last["end"], "end": until, "phase": "idle", "usd": usd}
    )


def _close_abandoned(folder: RunFolder) -> None:
    """Charge a killed attempt's open interval up to its last heartbeat."""
    try:
        open_row = _beat(folder)
    except Fault:  # a power cut can empty it; what it said cannot be known any more
        folder.event("heartbeat_damaged", "the last attempt's open interval is not charged")
        folder.forget_beat()
        return
    if open_row is None:
        return
    for key in ("pid", "space"):
        open_row.pop(key, None)
    charged = {(row["attempt"], row["start"]) for row in folder.rows("ledger")}
    if (open_row["attempt"], open_row["start"]) not in charged:
        folder.append("ledger", open_row)
    folder.forget_beat()


def _beat(folder: RunFolder) -> dict[str, Any] | None:
    """The open interval. Raises Fault where heartbeat.json is anything else."""
    beat: Any = folder.read_json("heartbeat.json")
    if beat is None:
        return None
    numbers = ("start", "end", "usd_per_hour", "usd", "attempt")
    if not isinstance(beat, dict) or not all(
        isinstance(beat.get(name), (int, float)) for name in numbers
    ):
        raise Fault(f"{folder.file('heartbeat.json')} is damaged: not a heartbeat")
    return {"phase": "train", **beat}


def spent(folder: RunFolder) -> Spent:
    """What the run has cost so far."""
    rows = list(folder.rows("ledger"))
    return Spent(sum(r["end"] - r["start"] for r in rows), sum(r["usd"] for r in rows))


def worked(rows: Iterable[dict[str, Any]], since: float, until: float = math.inf) -> Spent:
    """Training and evaluation of these rows of a ledger between two moments."""
    seconds = usd = 0.0
    for row in rows:
        part = _covered(row["start"], row["end"], [(since, until)])
        if row["phase"] in WORK and part > 0:
            seconds += part
            usd += row["usd"] * part / (row["end"] - row["start"])
    return Spent(seconds, usd)


def charged(folder: RunFolder) -> list[dict[str, Any]]:
    """The ledger, and the interval that is open, or was when a kill came, up to its last beat."""
    rows = list(folder.rows("ledger"))
    try:
        beat = _beat(folder)
    except Fault:  # the next attempt will say so
        return rows
    closed = {(row["attempt"], row["start"]) for row in rows}
    if beat is None or (beat["attempt"], beat["start"]) in closed or beat["end"] <= beat["start"]:
        return rows
    return [*rows, beat]


def by_phase(folder: RunFolder, rows: Iterable[dict[str, Any]] | None = None) -> dict[str, Spent]:
    """The ledger (or these of its rows) by phase, with work that was thrown away moved to `lost`.

    What an attempt trained and evaluated after the checkpoint from which the next one went on (or
    at all, where that began anew) had to be done again; what came after the weights that a run went
    back to (a rewind, an early stop) is in no weights.
    """
    away = _thrown_away(folder)
    out: dict[str, Spent] = {}
    for row in folder.rows("ledger") if rows is None else rows:
        seconds, lost = row["end"] - row["start"], 0.0
        if row["phase"] in WORK:
            lost = _covered(
                row["start"], row["end"], [w[1:] for w in away if row["attempt"] <= w[0]]
            )
        for phase, part in ((row["phase"], seconds - lost), ("lost", lost)):
            if part > 0:
                old = out.get(phase, Spent(0.0, 0.0))
                usd = old.usd + row["usd"] * part / seconds
                out[phase] = Spent(old.seconds + part, usd)
    return out


def _thrown_away(folder: RunFolder) -> list[tuple[int, float, float]]:
    """(attempt, from, to): what this attempt and earlier ones did in that time is in no weights."""
    found = [
        (event["attempt"] - 1, event.get("saved_at", 0.0), float("inf"))
        for event in folder.rows("events")
        if event["code"] in ("start", "resume")
    ]
    return found + [(e["attempt"], e["saved_at"], e["time"]) for e in gone_back(folder)]


def _covered(start: float, end: float, spans: Iterable[tuple[float, float]]) -> float:
    """How much of an interval lies in any of the spans."""
    total, reached = 0.0, start
    for low, high in sorted(spans):
        low, high = max(low, reached), min(high, end)
        if high > low:
            total, reached = total + high - low, high
    return total

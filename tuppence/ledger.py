"""The meter: what has been charged, by phase, over every attempt of a run.

    ledger.jsonl    {start, end, phase, node, usd_per_hour, usd, attempt} for each closed interval
    heartbeat.json  the interval still open, and when it was last seen

A killed process leaves its interval open; the next attempt closes it at the last heartbeat. Time in
which no process ran is not charged. All times are seconds since the epoch.
"""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tuppence.errors import Fault
from tuppence.folder import RunFolder

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
        self, folder: RunFolder, *, usd_per_hour: float, attempt: int, start: float
    ) -> None:
        """Begin charging at `start` (before now: the process's own start) as provision."""
        self.folder, self.usd_per_hour, self.attempt = folder, usd_per_hour, attempt
        _close_abandoned(folder)
        rows = list(folder.rows("ledger"))
        last = max((row["end"] for row in rows), default=0.0)
        self.before = Spent(sum(r["end"] - r["start"] for r in rows), sum(r["usd"] for r in rows))
        self._epoch = time.time() - time.monotonic()  # immune to clock changes while it runs
        self.start = self._since = max(start, last)
        self._phase = "provision"
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
        """Seconds until the first of the two limits; infinite where there is none."""
        by_usd = (usd - self.usd()) / self.usd_per_hour * 3600 if usd is not None else float("inf")
        by_hours = hours * 3600 - self.seconds() if hours is not None else float("inf")
        return min(by_usd, by_hours)

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
        self.folder.write_beat({**self._interval(now), "pid": os.getpid()})

    def close(self, *, allowance: float = 0.0) -> None:
        """Stop charging; `allowance` seconds are charged in advance for what remains, as save."""
        self.switch("save")
        self._append(self.now() + allowance)
        self.folder.forget_beat()

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


def _close_abandoned(folder: RunFolder) -> None:
    """Charge a killed attempt's open interval up to its last heartbeat."""
    try:
        open_row = folder.read_json("heartbeat.json")
    except Fault:  # a power cut can empty it; what it said cannot be known any more
        folder.event("heartbeat_damaged", "the last attempt's open interval is not charged")
        folder.forget_beat()
        return
    if open_row is None:
        return
    open_row.pop("pid", None)
    charged = {(row["attempt"], row["start"]) for row in folder.rows("ledger")}
    if (open_row["attempt"], open_row["start"]) not in charged:
        folder.append("ledger", open_row)
    folder.forget_beat()


def spent(folder: RunFolder) -> Spent:
    """What the run has cost so far."""
    rows = list(folder.rows("ledger"))
    return Spent(sum(r["end"] - r["start"] for r in rows), sum(r["usd"] for r in rows))


def by_phase(folder: RunFolder) -> dict[str, Spent]:
    """The ledger by phase, with work that a kill threw away moved to `lost`.

    What an attempt trained and evaluated after the checkpoint from which the next one went on (or
    at all, where that began anew) had to be done again.
    """
    cuts = {
        event["attempt"]: event.get("saved_at", 0.0)
        for event in folder.rows("events")
        if event["code"] in ("start", "resume")
    }
    out: dict[str, Spent] = {}
    for row in folder.rows("ledger"):
        seconds, lost = row["end"] - row["start"], 0.0
        later = [at for attempt, at in cuts.items() if attempt > row["attempt"]]
        if later and row["phase"] in WORK:
            lost = max(0.0, row["end"] - max(min(later), row["start"]))
        for phase, part in ((row["phase"], seconds - lost), ("lost", lost)):
            if part > 0:
                old = out.get(phase, Spent(0.0, 0.0))
                usd = old.usd + row["usd"] * part / seconds
                out[phase] = Spent(old.seconds + part, usd)
    return out

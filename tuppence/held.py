"""A rented machine as its script sees it: since when it is paid, and until when there is money.

held.json      what assets/node.sh tells the trainer (--held): the clock began before the process
deadline.json  what the trainer tells the dead-man timer, once it knows what was spent before
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from tuppence.errors import Fault
from tuppence.files import write_whole

HELD, DEADLINE = "held.json", "deadline.json"


@dataclass(frozen=True)
class Held:
    """One machine. All times are seconds since the epoch: paid `since`, set-up began at `setup`,
    a preparation outside the trainer at `prepare`. `tail_seconds` are paid after the trainer's end;
    `price_note` says what is doubtful about the price."""

    since: float
    setup: float
    usd_per_hour: float
    tail_seconds: float
    prepare: float | None = None
    price_note: str | None = None

    def phases(self, until: float) -> list[tuple[str, float, float]]:
        """What the machine did before a process that began at `until`: (phase, from, to)."""
        marks = [("provision", self.since), ("install", self.setup)]
        marks += [] if self.prepare is None else [("prepare", self.prepare)]
        ends = [start for _, start in marks[1:]] + [until]
        spans = [(n, s, min(e, until)) for (n, s), e in zip(marks, ends, strict=True)]
        return [(name, start, end) for name, start, end in spans if end > start]


def read(path: Path) -> Held:
    """Raises Fault where it is missing or damaged."""
    try:
        return Held(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Fault(f"{path} does not say since when the machine is paid: {error}") from None


def write(folder: Path, held: Held) -> None:
    write_whole(folder / HELD, (json.dumps(dataclasses.asdict(held)) + "\n").encode())


def tell_deadline(folder: Path, *, spent_at: float, tail_seconds: float) -> None:
    """When the dead-man timer is to stop the machine; nothing where no limit is in sight.

    A trainer that keeps to its budget ends `tail_seconds` before the money is spent, at `spent_at`.
    Half of that is left for what it still sends, half for the machine's own end.
    """
    if math.isfinite(spent_at):
        at = json.dumps({"deadline": spent_at - tail_seconds / 2})
        write_whole(folder / DEADLINE, f"{at}\n".encode())

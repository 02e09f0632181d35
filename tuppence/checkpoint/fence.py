"""Fencing by attempt: of two processes that take themselves for the run, the later one is right.

    attempt.json    {"attempt", "token", "pid", "node", "time"}: who holds the run

The lock on a run folder keeps two processes of one machine apart. On a file system that machines
share, one that was given up for lost may come back while its successor trains. Each attempt claims
the run with a token of its own; before anything that lasts (a checkpoint's rename, a pointer) the
writer looks whether the token is still there. What it wrote until then lies in a folder aside whose
name has its token, where nobody looks. Between the look and the rename pass microseconds, not
none: what slips through is a whole checkpoint of an older attempt, and those of a newer one go
before it whatever its step (layout.by_age).
"""

import json
import os
import platform
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

from tuppence.errors import Fault, Overtaken
from tuppence.folder import RunFolder

CLAIM = "attempt.json"


@dataclass(frozen=True)
class Claim:
    """attempt.json."""

    attempt: int
    token: str
    pid: int
    node: str
    time: float


class Fence:
    """An attempt's hold on its run. Where no `token` is given, that of the claim which is there."""

    def __init__(self, folder: RunFolder, attempt: int, token: str | None = None) -> None:
        self.folder, self.attempt = folder, attempt
        there = holder(folder)
        if there is None:
            raise Fault(f"{folder.path} was not claimed for attempt {attempt} ({CLAIM} is missing)")
        theirs: str = there["token"] if there["attempt"] == attempt else ""
        self.token = theirs if token is None else token
        self.check()

    def check(self) -> None:
        """Raise Fault unless the run is still this attempt's."""
        there = holder(self.folder)
        if there is not None and there["token"] == self.token:
            return
        who = "another process" if there is None else f"attempt {there['attempt']}"
        if there is not None and there["attempt"] == self.attempt:
            who = f"another process of attempt {self.attempt}"
        raise Overtaken(
            f"{who} has taken {self.folder.path} over; this one (attempt {self.attempt}) stops and "
            f"writes nothing more"
        )


def claim(folder: RunFolder, attempt: int) -> Fence:
    """Take the run over for an attempt. Raises Fault where a newer one has it."""
    there = holder(folder)
    if there is not None and there["attempt"] > attempt:
        raise Overtaken(
            f"attempt {there['attempt']} has taken {folder.path} over; this one would be attempt "
            f"{attempt}: it stops and writes nothing"
        )
    made = Claim(attempt, secrets.token_hex(4), os.getpid(), platform.node(), time.time())
    aside = folder.file(f".{CLAIM}.{made.token}")  # two machines may give two writers one pid
    try:
        with aside.open("w", encoding="utf-8") as out:
            out.write(json.dumps(asdict(made)) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, folder.file(CLAIM))
    finally:
        aside.unlink(missing_ok=True)
    return Fence(folder, attempt, made.token)


def holder(folder: RunFolder) -> dict[str, Any] | None:
    """Who holds the run, or None where it was never claimed. Raises Fault where it cannot be told:
    whoever cannot tell must not write."""
    path = folder.file(CLAIM)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"attempt": int(found["attempt"]), "token": str(found["token"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(f"{path} does not say who holds the run: {error!r}") from None

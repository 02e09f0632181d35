"""The run folder: the one thing that parts share, written so that a kill loses nothing.

    runs/NAME/  run.json plan.json argv.txt env.json  ledger.jsonl metrics.jsonl evals.jsonl
                events.jsonl samples.jsonl  checkpoints/  tokenizer/  receipt.{json,md,html}

Two rules. A JSON document is written aside and renamed, so that it is the old one or the new one.
A JSON line is appended with its newline in one write; a torn last line (a kill inside the write)
is no line: readers pass over it and the next attempt cuts it off.
"""

import errno
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tuppence import config
from tuppence.config import Plan, Run
from tuppence.errors import Fault, UserError
from tuppence.files import try_lock

T = TypeVar("T")
LINES = {  # and what every line of theirs says
    "ledger": ("start", "end", "phase", "usd_per_hour", "usd", "attempt"),
    "metrics": (),
    "evals": ("step",),
    "events": ("code",),
    "samples": ("step", "attempt"),
}


class RunFolder:
    """Paths and file habits of one run; holds no state but open line files."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """Of many ranks one `writes`; what the others append and beat goes nowhere."""
        self.path, self.writes = path, writes
        self._open: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()  # checkpoints are saved, and say so, in a thread

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def file(self, name: str) -> Path:
        return self.path / name

    def exists(self) -> bool:
        return self.file("run.json").exists()

    def run(self) -> Run:
        """What was asked. Raises UserError where this is not a run folder."""
        if not self.exists():
            raise UserError(
                f"{self.path} is not a run folder (no run.json); `tuppence runs` lists them"
            )
        return load(Run, self.file("run.json"))

    def plan(self) -> Plan:
        """What was solved. Raises UserError where the run was not planned yet."""
        if not self.file("plan.json").exists():
            raise UserError(f"{self.path} has no plan.json yet; train it first")
        return load(Plan, self.file("plan.json"))

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON document as a whole."""
        write_text(self.file(name), json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """A JSON document, or None where there is none."""
        path = self.file(name)
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError:
            raise Fault(f"{path} is damaged: not JSON") from None

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Append one line to ledger, metrics, evals, events or samples."""
        assert name in LINES, name
        if not self.writes:
            return
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self._lock:
            if name not in self._open:
                self._open[name] = _open_for_append(self.file(f"{name}.jsonl"))
            handle = self._open[name]
            # one write of one whole line: a kill leaves it complete, absent or torn at the very end
            written = handle.write(line)
            if written != len(line):
                handle.truncate(handle.seek(0, os.SEEK_END) - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file(name)))

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """The complete lines of a file, oldest first."""
        path = self.file(f"{name}.jsonl")
        if not path.exists():
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    try:
                        row = json.loads(line)
                    except ValueError:  # not JSON, or not even text
                        raise Fault(f"{path} line {number} is damaged: not JSON") from None
                    if not isinstance(row, dict):
                        raise Fault(f"{path} line {number} is damaged: not an object")
                    if lacking := [key for key in LINES[name] if key not in row]:
                        raise Fault(f"{path} line {number} is damaged: no {lacking[0]}")
                    yield row

    def latest(self, name: str) -> list[dict[str, Any]]:
        """The row that counts of each step, in the order of steps.

        A resumed run repeats some steps, and what an earlier attempt did beyond the checkpoint it
        was resumed from never happened; nor did what an attempt did before it went back.
        """
        from_step, gone = counts_until(self), list(gone_back(self))
        counts: dict[int, dict[str, Any]] = {}
        for row in self.rows(name):
            later = [at for attempt, at in from_step.items() if attempt > row["attempt"]]
            later += [
                event["back_to"] for event in gone if row.get("usd", math.inf) <= event["usd"]
            ]
            if row["step"] <= min(later, default=row["step"]):
                if counts and row["step"] <= next(reversed(counts)):
                    counts = {step: kept for step, kept in counts.items() if step < row["step"]}
                counts[row["step"]] = row
        return [counts[step] for step in sorted(counts)]

    def write_beat(self, row: dict[str, Any]) -> None:
        """Replace heartbeat.json; not flushed, since it guards against kills, not power cuts."""
        if not self.writes:
            return
        aside = self.file(".heartbeat")
        aside.write_text(json.dumps(row))
        os.replace(aside, self.file("heartbeat.json"))

    def forget_beat(self) -> None:
        """Nothing is charged from here on."""
        if self.writes:
            self.file("heartbeat.json").unlink(missing_ok=True)

    def event(self, code: str, message: str, **details: Any) -> None:
        """Record something that happened, with a stable code."""
        self.append("events", {"time": time.time(), "code": code, "message": message, **details})

    def close(self) -> None:
        with self._lock:
            for handle in self._open.values():
                handle.close()
            self._open.clear()


def counts_until(folder: RunFolder) -> dict[int, int]:
    """The step that each attempt went on from: no earlier attempt's later steps count."""
    return {
        event["attempt"]: event["step"]
        for event in folder.rows("events")
        if event["code"] in ("start", "resume")
    }


def gone_back(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Events of a run that went back to older weights: `back_to` a step, with `usd` charged."""
    return (event for event in folder.rows("events") if "back_to" in event and "usd" in event)


def load(kind: type[T], path: Path) -> T:
    """A dataclass from its file. Raises Fault naming the file where it is damaged."""
    try:
        return config.from_json(kind, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Fault(f"{path} is damaged: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename: the old document or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _open_for_append(path: Path) -> BinaryIO:
    """Open unbuffered at the end of the last complete line."""
    handle = path.open("ab+", buffering=0)
    end = handle.seek(0, os.SEEK_END)
    back = min(end, 1 << 20)
    handle.seek(end - back)
    torn = len(handle.read(back).rpartition(b"\n")[2])
    if torn:
        handle.truncate(end - torn)
    return handle


class RunLock:
    """One process at a time may write a run folder; the lock vanishes with its process."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.file(".lock")
        self.handle: BinaryIO | None = None

    def __enter__(self) -> "RunLock":
        self.handle = self.path.open("a+b")
        if not try_lock(self.handle):
            self.handle.close()
            raise UserError(f"another process is writing {self.path.parent}; wait or stop it")
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle:
            self.handle.close()


def find(name: str, root: Path) -> RunFolder:
    """The run folder that a person means by `name`: a path to one, or a name under `root`.

    Raises UserError, listing what is there.
    """
    for path in (Path(name), root / name):
        if (path / "run.json").exists():
            return RunFolder(path)
    there = sorted(p.parent.name for p in root.glob("*/run.json"))
    close = config.nearest(name, there) if there else f"; {root}/ holds no runs yet"
    raise UserError(f"no run {name!r}{close}")

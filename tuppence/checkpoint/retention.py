"""Which checkpoints stay, and in which order they go for want of room.

kept: last, best | the newest few | milestones (step % keep_every == 0)
over max_bytes: the oldest milestones go, then the older of the newest few; never last or best
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuppence.checkpoint.layout import by_age, complete, pointer, step_of
from tuppence.folder import RunFolder

SPARE_BYTES = 1 << 20  # for lines and documents beside a checkpoint


@dataclass(frozen=True)
class Retention:
    """How many of the newest are kept (one at least), which milestones, how many bytes in all."""

    keep_last: int
    keep_every: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        assert self.keep_last >= 1, self.keep_last

    def is_milestone(self, path: Path) -> bool:
        return self.keep_every is not None and step_of(path) % self.keep_every == 0


def enforce(folder: RunFolder, keep: Retention) -> None:
    """Delete what need not be kept, and what there is no room for."""
    fixed, newest = _pointed(folder), by_age(folder)[-keep.keep_last :]
    for path in by_age(folder):
        if path not in newest and path.name not in fixed and not keep.is_milestone(path):
            _delete(path)
    make_room(folder, keep, 0)
    there = size(folder)
    if keep.max_bytes is not None and there > keep.max_bytes:
        message = f"checkpoints take {there:,} bytes, over {keep.max_bytes:,}: last and best stay"
        folder.event("over_disk_limit", message, bytes=there)


def make_room(folder: RunFolder, keep: Retention, needed: int) -> None:
    """Delete until `needed` more bytes stay within the limit and fit the disk, if that can be."""
    for path in _expendable(folder, keep):
        if _fits(folder, keep, needed):
            return
        _delete(path)
        if keep.is_milestone(path):
            message = f"step {step_of(path)}, a milestone, made room for what is newer"
            folder.event("milestone_deleted", message, step=step_of(path))


def _expendable(folder: RunFolder, keep: Retention) -> list[Path]:
    """What may go, in the order in which it goes."""
    there = by_age(folder)
    fixed, newest = _pointed(folder), there[-keep.keep_last :]
    free = [p for p in there[:-1] if p.name not in fixed]  # never the newest, pointed at or not

    def place(path: Path) -> int:
        return 2 if path in newest else int(keep.is_milestone(path))

    return sorted(free, key=place)  # stable: the oldest first in each class


def _fits(folder: RunFolder, keep: Retention, needed: int) -> bool:
    within = keep.max_bytes is None or size(folder) + needed <= keep.max_bytes
    return within and (not needed or _free(folder) >= needed + SPARE_BYTES)


def _free(folder: RunFolder) -> int:
    return shutil.disk_usage(folder.path).free


def size(folder: RunFolder) -> int:
    """The bytes of all complete checkpoints."""
    return sum(file.stat().st_size for path in complete(folder) for file in path.iterdir())


def sweep(folder: RunFolder, is_dead: Callable[[Path], bool]) -> None:
    """Delete folders that saves left aside, but a step's older save where it is the only one."""
    for path in folder.checkpoints.glob(".step_*"):
        only = path.name.endswith(".replaced") and not _final(path).exists()
        if not only and is_dead(path):
            shutil.rmtree(path, ignore_errors=True)


def _final(aside: Path) -> Path:
    return aside.with_name(aside.name[1:].removesuffix(".replaced"))


def aside_name(name: str, attempt: int, token: str, number: int) -> str:
    """Where an attempt's `number`-th save is written before it is renamed."""
    return f".{name}.a{attempt}.{token}.{number}"


def _of(aside: Path) -> tuple[int, str, int] | None:
    """Attempt, token and number of a save's folder aside; None where it is none."""
    found = re.fullmatch(r"\.step_\d+\.a(\d+)\.(\w+)\.(\d+)", aside.name)
    return (int(found[1]), found[2], int(found[3])) if found else None


def is_dead(aside: Path, attempt: int, token: str, number: int) -> bool:
    """Whether nobody writes there any more, told by an attempt that is past its `number`-th save.

    Other ranks may have begun the next one; a newer attempt is never disturbed.
    """
    found = _of(aside)
    if found is None:
        return True
    theirs, mark, count = found
    return theirs < attempt or (theirs == attempt and (mark != token or count <= number))


def _pointed(folder: RunFolder) -> set[str]:
    """The names that last and best point at."""
    return {p.path for p in (pointer(folder, "last"), pointer(folder, "best")) if p}


def drop_later(folder: RunFolder, step: int) -> None:
    """Delete what was saved after a step that the run goes back to; pointers then say so."""
    for path in complete(folder):
        if step_of(path) > step:
            _delete(path)
    for name in ("last", "best"):
        found = pointer(folder, name)
        if found is not None and found.step > step:
            (folder.checkpoints / f"{name}.json").unlink()


def _delete(path: Path) -> None:
    """A checkpoint is whole or absent: a kill inside leaves a folder aside."""
    aside = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)

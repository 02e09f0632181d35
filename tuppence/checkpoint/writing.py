"""Writing a checkpoint: every rank its part into a folder aside, rank 0 the rest and the rename.

    .step_00001000.a2.<token>.<number>/   model-*, optimizer-*          every rank
                                          part-00002-of-00002.json      a rank's last word: hashes
                                          state.json checkpoint.json    rank 0, when all parts came
    step_00001000/                        the rename is the commit

There is no collective in it, so that it runs beside training and over any shared file system. What
a failed or killed save left is never taken for a later one's: the folder's name has the attempt's
token and the number of the save within the attempt, which every rank counts alike.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tuppence import config
from tuppence.checkpoint import tensors
from tuppence.checkpoint.layout import (
    KINDS,
    MANIFEST,
    STATE,
    VERSION,
    File,
    Files,
    Manifest,
    State,
    complete,
    flush_folder,
    name_of,
    shard,
    sidecar,
    step_of,
)
from tuppence.checkpoint.tensors import Image
from tuppence.errors import Fault
from tuppence.folder import RunFolder, write_text
from tuppence.folder import load as load_json

POLL_SECONDS = 0.02
CHECK_SECONDS = 1.0
PATIENCE_SECONDS = 600.0  # for the slowest rank's part

Images = Mapping[str, Image]  # by kind


@dataclass(frozen=True)
class Part:
    """A rank's sidecar: what it wrote, or why it could not."""

    files: Files
    error: str | None


def write_part(aside: Path, images: Images, *, rank: int, world: int) -> Files:
    """A rank's files."""
    aside.mkdir(parents=True, exist_ok=True)
    names = {kind: shard(kind, rank, world) for kind in KINDS}
    return {name: tensors.write(aside / name, images[kind]) for kind, name in names.items()}


def tell(aside: Path, part: Part, *, rank: int, world: int) -> None:
    """Leave the sidecar that rank 0 waits for."""
    write_text(aside / sidecar(rank, world), config.to_json(part))


def gather(aside: Path, *, world: int, seconds: float, check: Callable[[], None]) -> Files:
    """The files of all ranks but 0, once they are there. `check` is called about every second.

    Raises Fault naming the ranks that could not write, or whose part did not come in time.
    """
    late = {rank: aside / sidecar(rank, world) for rank in range(1, world)}
    files: Files = {}
    checked = time.monotonic()
    deadline = checked + seconds
    while late:
        for rank in [rank for rank, path in late.items() if path.exists()]:
            files |= _part(late.pop(rank), rank)
        if late and time.monotonic() > deadline:
            ranks = ", ".join(map(str, late))
            raise Fault(f"the part of rank {ranks} did not come within {seconds:g} s")
        if time.monotonic() > checked + CHECK_SECONDS:
            checked = time.monotonic()
            check()
        if late:
            time.sleep(POLL_SECONDS)
    return files


def _part(path: Path, rank: int) -> Files:
    part = load_json(Part, path)
    if part.error is not None:
        raise Fault(f"rank {rank}: {part.error}")
    return part.files


def seal(aside: Path, state: State, files: Files, *, attempt: int, world: int) -> None:
    """What makes the parts a checkpoint: state.json, checkpoint.json, everything flushed."""
    files = {**files, STATE: _write_state(aside, state)}
    for rank in range(1, world):
        (aside / sidecar(rank, world)).unlink()
    ordered = {name: files[name] for name in sorted(files)}
    write_text(aside / MANIFEST, config.to_json(Manifest(VERSION, attempt, ordered)))
    flush_folder(aside)


def _write_state(aside: Path, state: State) -> File:
    return tensors.write_bytes(aside / STATE, config.to_json(state).encode())


def commit(folder: RunFolder, aside: Path, step: int) -> Path:
    """Rename it into place. A step that is saved again takes the place of its older save."""
    final = folder.checkpoints / name_of(step)
    old = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(aside, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    flush_folder(folder.checkpoints)
    return final


def cannot_save(folder: RunFolder, step: int, error: Exception, *, kept: str | None = None) -> str:
    """The line for a person; `kept` says where the last good one is, if not in the folder."""
    there = complete(folder)
    if kept is None:
        kept = f"the last good one is step {step_of(there[-1])}" if there else "none was saved yet"
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(folder.path).free / 2**20:.0f} MiB free)"
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"cannot save step {step} in {folder.checkpoints}: {reason}{free}; "
        f"{kept}: make room or give write access, then run the same command to continue"
    )

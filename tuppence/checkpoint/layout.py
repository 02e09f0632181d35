"""What a checkpoint is called, what lies in it, and whether it is whole.

checkpoint.json   {"version": 2, "attempt", "files": {name: {"sha256", "bytes"}}}
last.json         {"step", "path", "sha256"}
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tuppence import config
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256
from tuppence.folder import RunFolder, write_text
from tuppence.folder import load as load_json

VERSION = 2
KINDS = ("model", "optimizer")
MANIFEST = "checkpoint.json"
STATE = "state.json"


@dataclass(frozen=True)
class Point:
    """A whole evaluation, and the mean loss of the `trained` steps since the one before."""

    step: int
    tokens: int
    val_loss: float
    train_loss: float
    trained: int


@dataclass(frozen=True)
class Anneal:
    """The last steps of a run that stops early (train/annealing.py): `steps` of them, from step
    `back_to` on, with the learning rate coming down from `factor` times its peak."""

    reason: str
    back_to: int
    steps: int
    factor: float


@dataclass(frozen=True)
class State:
    """Where a run is: everything besides tensors that the next step depends on. `losses` and what
    follows are the guard's (train/guard.py); `points` and what follows say when to stop
    (train/turning.py)."""

    step: int
    tokens: int
    tokens_sha: str
    progress: float
    finished: bool
    evaluation_due: bool
    began_seconds: float
    bad_steps: int
    best_step: int | None
    best_val_loss: float | None
    attempt: int
    saved_at: float
    micro_batch: int
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    skipped_batches: int
    rewound_steps: int
    trouble_step: int
    back_to: int
    points: tuple[Point, ...] = ()
    loss_sum: float = 0.0
    loss_count: int = 0
    evaluated_tokens: int = 0
    sample_due: bool = True
    stays: bool = False
    anneal: Anneal | None = None


@dataclass(frozen=True)
class File:
    """What a file must be, bit for bit."""

    sha256: str
    bytes: int


Files = dict[str, File]


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json: every other file, and the attempt that wrote them."""

    version: int
    attempt: int
    files: Files


@dataclass(frozen=True)
class Pointer:
    """One checkpoint, named by what it is for (`last`, `best`)."""

    step: int
    path: str
    sha256: str


# ---------------------------------------------------------------- names


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[5:])


def shard(kind: str, rank: int, world: int) -> str:
    """The file that a rank writes; alone it is the one file that every reader of weights knows."""
    return f"{kind}.safetensors" if world == 1 else f"{kind}-{_of(rank, world)}.safetensors"


def sidecar(rank: int, world: int) -> str:
    """Where a rank tells rank 0 that its part is on disk."""
    return f"part-{_of(rank, world)}.json"


def _of(rank: int, world: int) -> str:
    return f"{rank + 1:05d}-of-{world:05d}"


def complete(folder: RunFolder) -> list[Path]:
    """Every complete checkpoint, in the order of steps."""
    there = (p for p in folder.checkpoints.glob("step_*") if p.name[5:].isdigit())
    return sorted(there, key=step_of)


def by_age(folder: RunFolder, *, doubtful_last: bool = False) -> list[Path]:
    """Every complete checkpoint, in the order in which the run made them: by attempt, then step.

    Not by a clock, which may step back. An attempt that passed over a damaged step 1000 went on
    from step 500: its step 600 is newer than the old 1000. One whose attempt cannot be read counts
    as the oldest, or with `doubtful_last` as of the last attempt.
    """
    attempts = {path: _attempt(path) for path in complete(folder)}
    last = max((a for a in attempts.values() if a is not None), default=0)
    unknown = last if doubtful_last else -1
    known = {path: unknown if a is None else a for path, a in attempts.items()}
    return sorted(known, key=lambda path: (known[path], step_of(path)))


def _attempt(path: Path) -> int | None:
    try:
        return manifest(path).attempt
    except Fault:
        return None


# ---------------------------------------------------------------- pointers


def point(folder: RunFolder, name: str, pointer: Pointer) -> None:
    """Replace a pointer file."""
    write_text(folder.checkpoints / f"{name}.json", json.dumps(asdict(pointer)) + "\n")


def pointer(folder: RunFolder, name: str) -> Pointer | None:
    """What `last` or `best` points at, or None where it was never set."""
    path = folder.checkpoints / f"{name}.json"
    return load_json(Pointer, path) if path.exists() else None


def pointer_to(path: Path) -> Pointer:
    """The pointer to a complete checkpoint."""
    return Pointer(step_of(path), path.name, weights_sha256(path))


def choose(folder: RunFolder, which: str) -> Path:
    """The checkpoint that a person means: best, last, or a step. Raises UserError."""
    there = complete(folder)
    steps = ", ".join(str(step_of(p)) for p in there) or "none"
    if which in ("best", "last"):
        found = pointer(folder, which)
        if found is None:
            raise UserError(
                f"{folder.path} has no {which} checkpoint yet; steps saved: {steps} "
                f"(--checkpoint last takes the newest)"
            )
        path = folder.checkpoints / found.path
        if found.path != name_of(found.step) or found.sha256 != weights_sha256(path):
            raise Fault(f"{which}.json does not name the weights in {path}: one of them is damaged")
        return path
    digits = which.isascii() and which.isdigit()
    path = folder.checkpoints / name_of(int(which)) if digits else Path("?")
    if path not in there:
        raise UserError(f"--checkpoint {which}: write best, last or one of the steps {steps}")
    return path


# ---------------------------------------------------------------- whole or damaged


def manifest(path: Path) -> Manifest:
    """What a checkpoint's files must be. Raises Fault where checkpoint.json does not say it."""
    try:
        found = config.from_json(Manifest, (path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault(f"checkpoint {path} is damaged: {MANIFEST}: {error}") from None
    if found.version != VERSION:
        raise Fault(
            f"checkpoint {path} is damaged: {MANIFEST} is of version {found.version}, not {VERSION}"
        )
    if sorted(found.files) not in (whole := sorted(_names(found.files)), _light(whole)):
        raise Fault(f"checkpoint {path} is damaged: {MANIFEST} does not list its files")
    return found


def _names(there: Iterable[str]) -> list[str]:
    """The files of a checkpoint that as many ranks wrote as there are files of weights."""
    world = max(1, sum(name.startswith("model") for name in there))
    return [STATE, *(shard(kind, rank, world) for kind in KINDS for rank in range(world))]


def _light(names: list[str]) -> list[str]:
    """Of a checkpoint that was fetched to be looked at: without the optimizer's state."""
    return [name for name in names if not name.startswith("optimizer")]


def is_light(path: Path) -> bool:
    """Whether it has weights alone: to evaluate and export, and not to train on from."""
    return not files_of(path, "optimizer")


def files_of(path: Path, kind: str) -> list[Path]:
    """The files of the model or of the optimizer, in the order of ranks."""
    return [path / name for name in sorted(manifest(path).files) if name.startswith(kind)]


def weights_sha256(path: Path) -> str:
    """The hash that names a checkpoint's weights, as checkpoint.json has it.

    That of the one file; of several, the sha256 of their hex hashes one after the other.
    """
    files = manifest(path).files
    hashes = [files[name].sha256 for name in sorted(files) if name.startswith("model")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def verify(path: Path) -> None:
    """Compare every file with its size and hash. Raises Fault naming the damaged file."""
    files = manifest(path).files
    for name, expected in files.items():
        if not (path / name).exists():
            raise Fault(f"checkpoint {path} is damaged: {name} is missing")
        try:
            there = (path / name).stat().st_size
            same = there == expected.bytes and file_sha256(path / name) == expected.sha256
        except OSError as error:
            raise Fault(
                f"checkpoint {path} is damaged: {name} cannot be read: {error.strerror}"
            ) from None
        if not same:
            what = f" ({there:,} of {expected.bytes:,} bytes)" if there != expected.bytes else ""
            raise Fault(
                f"checkpoint {path} is damaged: {name} does not match its sha256{what}; "
                f"use another checkpoint (--checkpoint) or resume the run from an older one"
            )


def flush_folder(path: Path) -> None:
    """Make what was renamed in a folder last through a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

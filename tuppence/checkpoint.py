"""Checkpoints: complete or absent, verified by hash, nothing in them that can execute.

    checkpoints/step_00001000/  model.safetensors optimizer.safetensors state.json checkpoint.json
    checkpoints/last.json best.json      {"step", "path", "sha256"}

A checkpoint is written into a folder aside, flushed, and renamed: its name is its completeness.
checkpoint.json holds the sha256 of the other files; a pointer holds the sha256 of the weights.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tuppence import config
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256
from tuppence.folder import RunFolder, write_text
from tuppence.folder import load as load_json

Optimizers = Sequence[torch.optim.Optimizer]
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class State:
    """Where a run is: everything besides tensors that the next step depends on."""

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


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json: the hash of every other file."""

    version: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Pointer:
    """One checkpoint, named by what it is for (`last`, `best`)."""

    step: int
    path: str
    sha256: str


def save(folder: RunFolder, model: nn.Module, optimizers: Optimizers, state: State) -> Pointer:
    """Write a checkpoint and point `last` at it.

    Raises Fault, leaving every earlier checkpoint as it was, when the disk is full or read-only.
    """
    name = f"step_{state.step:08d}"
    final = folder.checkpoints / name
    aside = folder.checkpoints / f".{name}.{os.getpid()}"
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        sha256 = _write(aside, model, optimizers, state)
        if final.exists():  # a resumed run reached this step again
            os.replace(final, folder.checkpoints / f".{name}.replaced")
        os.replace(aside, final)
        _flush_folder(folder.checkpoints)
    except (OSError, SafetensorError) as error:  # a full disk is either, by who was writing
        shutil.rmtree(aside, ignore_errors=True)
        raise Fault(_cannot_save(folder, state.step, error)) from error
    pointer = Pointer(state.step, name, sha256)
    point(folder, "last", pointer)
    return pointer


def point(folder: RunFolder, name: str, pointer: Pointer) -> None:
    """Replace a pointer file."""
    write_text(folder.checkpoints / f"{name}.json", json.dumps(asdict(pointer)) + "\n")


def pointer(folder: RunFolder, name: str) -> Pointer | None:
    """What `last` or `best` points at, or None where it was never set."""
    path = folder.checkpoints / f"{name}.json"
    return load_json(Pointer, path) if path.exists() else None


def complete(folder: RunFolder) -> list[Path]:
    """Every complete checkpoint, oldest first."""
    return sorted(folder.checkpoints.glob("step_*"))


def retain(folder: RunFolder, *, keep_last: int) -> None:
    """Delete all but the newest few and whatever is pointed at, and leftovers of killed saves."""
    kept = {p.path for p in (pointer(folder, "last"), pointer(folder, "best")) if p}
    for path in complete(folder)[:-keep_last]:
        if path.name not in kept:
            shutil.rmtree(path)
    for path in folder.checkpoints.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def choose(folder: RunFolder, which: str) -> Path:
    """The checkpoint that a person means: best, last, or a step. Raises UserError."""
    there = complete(folder)
    steps = ", ".join(str(int(p.name[5:])) for p in there) or "none"
    if which in ("best", "last"):
        found = pointer(folder, which)
        if found is None:
            raise UserError(
                f"{folder.path} has no {which} checkpoint yet; steps saved: {steps} "
                f"(--checkpoint last takes the newest)"
            )
        return folder.checkpoints / found.path
    digits = which.isascii() and which.isdigit()
    path = folder.checkpoints / f"step_{int(which):08d}" if digits else Path("?")
    if path not in there:
        raise UserError(f"--checkpoint {which}: write best, last or one of the steps {steps}")
    return path


def load_newest(folder: RunFolder, model: nn.Module, optimizers: Optimizers) -> State | None:
    """Load the newest checkpoint that verifies; None where there is none at all.

    A damaged one is passed over with an event. Raises Fault where all are damaged. The pointers
    are set as the save that made it would have set them, had a kill not come between.
    """
    there = complete(folder)
    for path in reversed(there):
        try:
            state = load(path, model, optimizers)
        except Fault as error:
            folder.event("checkpoint_damaged", str(error), path=path.name)
            continue
        here = Pointer(state.step, path.name, file_sha256(path / "model.safetensors"))
        point(folder, "last", here)
        if state.best_step == state.step:
            point(folder, "best", here)
        return state
    if there:
        raise Fault(
            f"all {len(there)} checkpoints of {folder.path} are damaged (events.jsonl says how); "
            f"restore one from a copy, or start over with --fresh"
        )
    return None


def load(path: Path, model: nn.Module, optimizers: Optimizers = ()) -> State:
    """Verify a checkpoint's hashes and load it. Raises Fault naming the damaged file."""
    verify(path)
    tensors = load_file(path / "model.safetensors")
    parameters = dict(model.named_parameters())
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise Fault(f"{path} is of another model: {odd[0]} stands in only one of the two")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{list(tensors[name].shape)}, not {list(parameter.shape)}"
            raise Fault(f"{path} is of another model: {name} is {shapes}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    if optimizers:
        _load_optimizers(path, model, optimizers)
    return load_json(State, path / "state.json")


def verify(path: Path) -> None:
    """Compare every file with its hash."""
    manifest = path / "checkpoint.json"
    try:
        found = config.from_json(Manifest, manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault(f"checkpoint {path} is damaged: checkpoint.json: {error}") from None
    if found.version != 1 or sorted(found.sha256) != sorted(FILES):
        raise Fault(f"checkpoint {path} is damaged: checkpoint.json does not list its files")
    for name, expected in found.sha256.items():
        if not (path / name).exists():
            raise Fault(f"checkpoint {path} is damaged: {name} is missing")
        if file_sha256(path / name) != expected:
            raise Fault(
                f"checkpoint {path} is damaged: {name} does not match its sha256; "
                f"use another checkpoint (--checkpoint) or resume the run from an older one"
            )


def _write(aside: Path, model: nn.Module, optimizers: Optimizers, state: State) -> str:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, aside / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizers), aside / "optimizer.safetensors")
    (aside / "state.json").write_text(config.to_json(state))
    for name in FILES:
        _flush(aside / name)
    hashes = {name: file_sha256(aside / name) for name in FILES}
    write_text(aside / "checkpoint.json", config.to_json(Manifest(1, hashes)))
    _flush_folder(aside)
    return hashes["model.safetensors"]


def _optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """`{"<parameter>.<moment>": tensor}`; names, not positions, so that any order can load it."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizers(path: Path, model: nn.Module, optimizers: Optimizers) -> None:
    tensors = load_file(path / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        parameter = parameters[name]
        owner[parameter].state[parameter][key] = tensor.to(parameter.device)


def _cannot_save(folder: RunFolder, step: int, error: Exception) -> str:
    there = complete(folder)
    kept = f"the last good one is step {int(there[-1].name[5:])}" if there else "none was saved yet"
    free = shutil.disk_usage(folder.path).free / 2**20
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"cannot save step {step} in {folder.checkpoints}: {reason} ({free:.0f} MiB free); "
        f"{kept}: make room or give write access, then run the same command to continue"
    )


def _flush(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

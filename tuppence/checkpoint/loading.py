"""Choosing the newest checkpoint that is whole, and loading it."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tuppence.checkpoint import pieces
from tuppence.checkpoint.layout import (
    STATE,
    State,
    by_age,
    complete,
    is_light,
    name_of,
    point,
    pointer,
    pointer_to,
    verify,
)
from tuppence.checkpoint.pieces import Optimizers, Pieces
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.folder import load as load_json


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint that verifies, None where there is none at all, and what is wrong
    with each newer one."""

    path: Path | None
    damaged: tuple[str, ...]


def newest(folder: RunFolder) -> Newest:
    """Verify from the newest on. A damaged one is passed over with an event `checkpoint_damaged`.

    Raises Fault where all are damaged. In a run of many ranks it is rank 0's, which tells the
    others its choice.
    """
    _put_back(folder)
    damaged: list[str] = []
    for path in reversed(by_age(folder, doubtful_last=True)):
        try:
            verify(path)
        except Fault as error:
            folder.event("checkpoint_damaged", str(error), path=path.name)
            damaged.append(str(error))
            continue
        if is_light(path):
            raise UserError(
                f"{path} has weights alone (tuppence fetch); to train on from it here: tuppence "
                f"fetch with --checkpoint last"
            )
        return Newest(path, tuple(damaged))
    if damaged:
        raise Fault(
            f"all {len(damaged)} checkpoints of {folder.path} are damaged (events.jsonl says how); "
            f"restore one from a copy, or start over with --fresh"
        )
    return Newest(None, ())


def _put_back(folder: RunFolder) -> None:
    """A kill between the two renames of a step that was saved again left its old save aside."""
    for aside in folder.checkpoints.glob(".step_*.replaced"):
        final = aside.with_name(aside.name[1:].removesuffix(".replaced"))
        if not final.exists():
            os.replace(aside, final)


def mend_pointers(folder: RunFolder, path: Path, state: State) -> None:
    """Set the pointers as they were when `path` was saved, had a kill not come between.

    A best one that lies beyond, in steps that will be taken again, is none.
    """
    point(folder, "last", pointer_to(path))
    if state.best_step != state.step and _best_stands(folder, state):
        return
    best = folder.checkpoints / name_of(-1 if state.best_step is None else state.best_step)
    if best in complete(folder):
        point(folder, "best", pointer_to(best))
    else:
        (folder.checkpoints / "best.json").unlink(missing_ok=True)


def _best_stands(folder: RunFolder, state: State) -> bool:
    try:
        best = pointer(folder, "best")
    except Fault as error:
        folder.event("pointer_damaged", str(error))
        return False
    there = best is not None and (folder.checkpoints / best.path).exists()
    return best is not None and there and best.step <= state.step


def state_of(path: Path) -> State:
    """Where the run was. Raises Fault where it is damaged."""
    return load_json(State, path / STATE)


def load(path: Path, model: nn.Module, optimizers: Optimizers = ()) -> State:
    """Verify a checkpoint and load it into what is not sharded, whoever wrote it.

    Raises Fault naming the damaged file or the tensor of another model; nothing is changed then.
    """
    verify(path)
    weights = pieces.whole(dict(model.named_parameters()))
    copies = pieces.plan_copies(path, weights, "model")
    moments = _moments(path, model, optimizers) if optimizers else {}
    if optimizers:
        copies += pieces.plan_copies(path, moments, "optimizer")
    pieces.fill(copies)
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for full, piece in moments.items():
        name, _, key = full.rpartition(".")
        owner[parameters[name]].state[parameters[name]][key] = piece.tensor
    return state_of(path)


def _moments(path: Path, model: nn.Module, optimizers: Optimizers) -> Pieces:
    """Room for every moment that the checkpoint has, on its parameter's device."""
    parameters = dict(model.named_parameters())
    owned = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    room = {}
    for full, spec in pieces.index(path, "optimizer").items():
        parameter = parameters.get(full.rpartition(".")[0])
        if parameter is None or parameter not in owned:
            raise Fault(f"{path} is of another optimizer: nothing here has {full}")
        room[full] = torch.empty(spec.shape, dtype=spec.dtype, device=parameter.device)
    return pieces.whole(room)

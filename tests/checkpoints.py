"""What tests of checkpoints share: a small model in training, ranks that cut it, states."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuppence import checkpoint
from tuppence.checkpoint import (
    Piece,
    Pieces,
    Pointer,
    Retention,
    Saver,
    State,
    layout,
    pieces,
    retention,
    writing,
)
from tuppence.errors import Fault
from tuppence.folder import RunFolder

KNOWN: dict[str, Any] = {
    "tokens_sha": "ab" * 32,
    "began_seconds": 1.5,
    "bad_steps": 1,
    "attempt": 1,
    "saved_at": 1.7e9 + 1 / 3,
}


def state_of(step: int, **known: Any) -> State:
    """A state of a step; fields that no test asks for have the empty value of their type."""
    best = None if step == 1 else 1
    known = {**KNOWN, "step": step, "progress": step / 7, "best_step": best, **known}
    known |= {} if best is None else {"best_val_loss": 10 / 3}
    kinds = typing.get_type_hints(State)
    return State(**{name: known.get(name, _empty(kind)) for name, kind in kinds.items()})


def _empty(kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        return ()
    return kind() if kind in (int, float, bool, str) else None


class Net(nn.Module):
    """Every kind of tensor that a GPT has: tables, matrices, vectors, a tied head, one number."""

    def __init__(self, *, vocab: int = 11, width: int = 6, layers: int = 2, tied: bool = True):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * self.scale
        return self.head(x)


@dataclasses.dataclass
class Trained:
    """A model and its optimizers; every `step` is a function of the step's number."""

    model: Net
    optimizers: list[torch.optim.Optimizer]

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(11, (4, 9), generator=generator)
        logits = self.model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()

    def save(self, folder: RunFolder, step: int) -> Pointer:
        return save(folder, self.model, self.optimizers, state_of(step))

    def pieces(self) -> tuple[Pieces, Pieces]:
        return checkpoint.pieces_of(self.model, self.optimizers)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of weights and moments by name."""
        weights, moments = self.pieces()
        return {name: piece.tensor.clone() for name, piece in {**weights, **moments}.items()}


def fresh(*, seed: int = 0, **shape: Any) -> Trained:
    """AdamW for vectors and tables, momentum for matrices."""
    torch.manual_seed(seed)
    model = Net(**shape)
    matrices = [block.weight for block in model.blocks]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, fused=True)
    return Trained(model, [adamw, torch.optim.SGD(matrices, lr=1e-2, momentum=0.9)])


def trained(steps: int = 3) -> Trained:
    made = fresh()
    for number in range(steps):
        made.step(number)
    return made


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit, NaN or not."""
    return a.keys() == b.keys() and all(_bits(a[k]).equal(_bits(b[k])) for k in a)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# ---------------------------------------------------------------- one process, at once


def save(
    folder: RunFolder, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: State
) -> Pointer:
    """Write a checkpoint of what is not sharded, without a saver, and point `last` at it."""
    both = checkpoint.pieces_of(model, optimizers)
    images = {kind: pieces.staged(held) for kind, held in zip(layout.KINDS, both, strict=True)}
    aside = folder.checkpoints / f".{layout.name_of(state.step)}.{os.getpid()}"
    try:
        files = writing.write_part(aside, images, rank=0, world=1)
        writing.seal(aside, state, files, attempt=1, world=1)
        made = layout.pointer_to(writing.commit(folder, aside, state.step))
        checkpoint.point(folder, "last", made)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise Fault(writing.cannot_save(folder, state.step, error)) from error
    return made


def load_newest(
    folder: RunFolder, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> State | None:
    """Load the newest that verifies, if there is one, and set the pointers."""
    path = checkpoint.newest(folder).path
    if path is None:
        return None
    state = checkpoint.load(path, model, optimizers)
    checkpoint.mend_pointers(folder, path, state)
    return state


def newest_verified(folder: RunFolder) -> Path | None:
    """The path alone."""
    return checkpoint.newest(folder).path


def retain(folder: RunFolder, *, keep_last: int) -> None:
    """Delete all but the newest few, whatever is pointed at, and leftovers of killed saves."""
    retention.enforce(folder, Retention(keep_last))
    retention.sweep(folder, lambda path: True)


# ---------------------------------------------------------------- run folders


def run_folder(tmp_path: Path) -> Iterator[RunFolder]:
    """A fixture: an empty one."""
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    yield made
    made.close()


def saved_twice(folder: RunFolder) -> RunFolder:
    """A fixture: checkpoints of steps 1 and 2."""
    made = fresh()
    for step in (1, 2):
        made.step(step)
        made.save(folder, step)
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def steps(folder: RunFolder) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.complete(folder)]


def codes(folder: RunFolder) -> list[str]:
    return [event["code"] for event in folder.rows("events")]


# ---------------------------------------------------------------- ranks

Cut = Callable[[Tensor, int, int], Piece]


def replicated(tensor: Tensor, rank: int, world: int) -> Piece:
    return Piece(tensor, 0, tuple(tensor.shape))


def by_rows(tensor: Tensor, rank: int, world: int) -> Piece:
    """As torch cuts rows for fully sharded training: the first ranks have more, the last may have
    none; a single number is everywhere."""
    if not tensor.dim():
        return replicated(tensor, rank, world)
    rows = -(-len(tensor) // world)
    part = tensor[rank * rows : (rank + 1) * rows]
    row = tensor[0].numel()
    return Piece(part, min(rank * rows, len(tensor)) * row, tuple(tensor.shape))


def by_elements(tensor: Tensor, rank: int, world: int) -> Piece:
    """Anywhere: cuts inside rows, of unequal length."""
    count = tensor.numel()
    ends = [count * (r + 1) ** 2 // world**2 for r in range(world)]
    begin = ends[rank - 1] if rank else 0
    return Piece(tensor.flatten()[begin : ends[rank]], begin, tuple(tensor.shape))


CUTS: dict[str, Cut] = {"replicated": replicated, "rows": by_rows, "elements": by_elements}


def cut(pieces: Pieces, how: Cut, rank: int, world: int) -> Pieces:
    """What one of the ranks holds of whole tensors."""
    return {name: how(piece.tensor, rank, world) for name, piece in pieces.items()}


def savers(folder: RunFolder, world: int, *, attempt: int = 1, **options: Any) -> list[Saver]:
    """A saver for each rank, the run claimed for them."""
    fence = checkpoint.claim(folder, attempt)
    options.setdefault("keep", Retention(5))
    return [
        Saver(folder, attempt=attempt, rank=rank, world=world, **(options | {"fence": fence}))
        for rank in range(world)
    ]


def save_on(
    folder: RunFolder, made: Trained, step: int, *, world: int = 1, how: Cut = by_rows
) -> Path:
    """A checkpoint that `world` ranks wrote."""
    ranks = savers(folder, world)
    for rank, saver in enumerate(ranks):
        weights, moments = made.pieces()
        saver.save(cut(weights, how, rank, world), cut(moments, how, rank, world), state_of(step))
    for saver in ranks:
        saver.close()
    return folder.checkpoints / f"step_{step:08d}"


class Held:
    """Stops the saver's thread where a function is called, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        function = getattr(module, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.go.wait(60)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, held)

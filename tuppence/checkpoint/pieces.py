"""Parts of named tensors: what a rank holds, what a file holds, and the way between them.

    whole, flattened   0 ......................................... numel
    in the files       |---- rank 1 of 3 ----|--- 2 ---|---- 3 ----|
    wanted here                     |--------------------|

A piece is a range of the flattened whole, so that any number of ranks reads what any other number
wrote. A file says of a piece that is not whole where it starts and of which shape, in its metadata
under one key, `pieces`.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from tuppence.checkpoint import tensors
from tuppence.checkpoint.layout import files_of
from tuppence.checkpoint.tensors import Image, Spec
from tuppence.errors import Fault

Optimizers = Sequence[torch.optim.Optimizer]
KEY = "pieces"  # in a file's metadata


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + tensor.numel()) of the flattened whole of `shape`, as held here."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def is_whole(self) -> bool:
        return self.tensor.numel() == math.prod(self.shape)


Pieces = Mapping[str, Piece]


def whole(named: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Pieces that are all there is of each tensor."""
    return {name: Piece(t.detach(), 0, tuple(t.shape)) for name, t in named.items()}


def pieces_of(model: nn.Module, optimizers: Optimizers) -> tuple[Pieces, Pieces]:
    """A model's parameters and `<parameter>.<moment>` of its optimizers, where nothing is sharded.

    Names, not positions, so that optimizers in any order can load them.
    """
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return whole(dict(model.named_parameters())), whole(moments)


# ---------------------------------------------------------------- into a file


@torch.no_grad()
def staged(pieces: Pieces, before: Image | None = None) -> Image:
    """The file of these pieces, copied into memory: that of the save `before` where it fits.

    One thread copies as fast as the memory takes it. From a GPU all copies are under way at once,
    into pinned memory, and waited for together.
    """
    held = {name: piece.tensor for name, piece in pieces.items() if piece.tensor.numel()}
    devices = _gpus(pieces)
    image = room_for(pieces, before)
    slots = [image.slots[name].view(tensor.shape) for name, tensor in held.items()]
    if held:
        torch._foreach_copy_(slots, list(held.values()), non_blocking=bool(devices))
    for device in devices:
        torch.cuda.synchronize(device)
    return image


def room_for(pieces: Pieces, before: Image | None = None) -> Image:
    """Memory for the file of these pieces: that of `before` where it fits."""
    specs = {n: Spec(p.tensor.dtype, _shape(p)) for n, p in pieces.items() if p.tensor.numel()}
    parts = {
        name: {"start": pieces[name].start, "shape": list(pieces[name].shape)}
        for name in sorted(specs)
        if not pieces[name].is_whole
    }
    metadata = {KEY: json.dumps(parts)} if parts else {}
    if before is not None and before.header == tensors.header_of(specs, metadata):
        return before
    return tensors.image_of(specs, metadata, pinned=bool(_gpus(pieces)))


def _gpus(pieces: Pieces) -> set[torch.device]:
    return {p.tensor.device for p in pieces.values() if p.tensor.device.type == "cuda"}


def _shape(piece: Piece) -> tuple[int, ...]:
    """The shape in the file: the whole's, whole rows of it, or flat.

    It follows from the range alone, however the tensor that holds it is viewed.
    """
    if piece.is_whole:
        return piece.shape
    row = math.prod(piece.shape[1:])
    if piece.start % row == 0 and piece.tensor.numel() % row == 0:
        return (piece.tensor.numel() // row, *piece.shape[1:])
    return (piece.tensor.numel(),)


# ---------------------------------------------------------------- out of files


@dataclass(frozen=True)
class Stored:
    """A piece in a file, and the byte at which it begins there."""

    file: Path
    at: int
    dtype: torch.dtype
    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """Elements [start, end) of a whole, from a file into a piece."""

    source: Stored
    into: Piece
    start: int
    end: int


Index = Mapping[str, list[Stored]]


def stored(path: Path, kind: str) -> dict[str, list[Stored]]:
    """Every piece in a checkpoint's files of the model or the optimizer, in the order of starts."""
    found: dict[str, list[Stored]] = {}
    for file in files_of(path, kind):
        entries, metadata = tensors.entries_of(file)
        try:
            parts = json.loads(metadata.get(KEY, "{}"))
            for name, entry in entries.items():
                spec, part = entry.spec, parts.get(name, {"start": 0, "shape": entry.spec.shape})
                start, shape = int(part["start"]), tuple(map(int, part["shape"]))
                piece = Stored(file, entry.at, spec.dtype, start, start + spec.numel, shape)
                found.setdefault(name, []).append(piece)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Fault(f"{file} is damaged: {error!r} in its metadata") from None
    for name, pieces in found.items():
        _check_agreed(path, name, pieces)
        pieces.sort(key=lambda piece: (piece.start, -piece.end))
    return found


def _check_agreed(path: Path, name: str, pieces: Sequence[Stored]) -> None:
    first = pieces[0]
    if any((p.shape, p.dtype) != (first.shape, first.dtype) for p in pieces):
        raise Fault(f"{path} is damaged: its files disagree on {name}")
    if any(p.start < 0 or p.end > math.prod(p.shape) for p in pieces):
        raise Fault(f"{path} is damaged: a part of {name} lies outside it")


def index(path: Path, kind: str) -> dict[str, Spec]:
    """The whole tensors that a checkpoint has of the model or the optimizer."""
    return {name: Spec(p[0].dtype, p[0].shape) for name, p in stored(path, kind).items()}


def read(path: Path, wanted: Pieces, kind: str, *, partial: bool = False) -> None:
    """Fill the tensors of `wanted` from a checkpoint's files, whoever wrote which part of them.

    `wanted` names every tensor of the checkpoint, those of which nothing is held here by an empty
    piece; with `partial` it may leave names out. Raises Fault naming the tensor, before anything
    was changed, for names or shapes of another model and for parts that no file holds. The files
    are taken as they are: `verify` says whether they are what was written.
    """
    fill(plan_copies(path, wanted, kind, partial=partial))


def plan_copies(
    path: Path, wanted: Pieces, kind: str, *, partial: bool = False, there: Index | None = None
) -> list[Copy]:
    """What `read` would copy; it raises all that can be known before."""
    there = stored(path, kind) if there is None else there
    odd = wanted.keys() - there.keys() if partial else wanted.keys() ^ there.keys()
    if odd:
        raise Fault(f"{path} is of another model: {min(odd)} stands in only one of the two")
    for name, piece in wanted.items():
        source = there[name][0]
        if source.shape != piece.shape:
            shapes = f"{list(source.shape)}, not {list(piece.shape)}"
            raise Fault(f"{path} is of another model: {name} is {shapes}")
        if source.dtype != piece.tensor.dtype:
            raise Fault(f"{path}: {name} is {source.dtype}, not {piece.tensor.dtype}")
    return [c for name, p in wanted.items() for c in _cover(path, name, p, there[name])]


def _cover(path: Path, name: str, piece: Piece, sources: Sequence[Stored]) -> Iterator[Copy]:
    """The copies that fill one piece. Where several files hold a part, the first one's is taken."""
    at = piece.start
    for source in sources:
        end = min(source.end, piece.end)
        if source.start <= at < end:
            yield Copy(source, piece, at, end)
            at = end
    if at < piece.end:
        raise Fault(f"{path} is damaged: no file holds {name} from element {at} on")


def fill(copies: Sequence[Copy]) -> None:
    """Read what was planned."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        files: dict[Path, BinaryIO] = {}
        for copy in copies:
            name = copy.source.file
            if name not in files:
                files[name] = stack.enter_context(name.open("rb", buffering=0))
            _copy(copy, files[name])


def _copy(copy: Copy, file: BinaryIO) -> None:
    tensor, begin = copy.into.tensor, copy.start - copy.into.start
    count = copy.end - copy.start
    at = copy.source.at + (copy.start - copy.source.start) * tensor.dtype.itemsize
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        tensors.read_into(tensor.detach().view(-1)[begin : begin + count], file, at)
        return
    flat = torch.empty(count, dtype=tensor.dtype)
    tensors.read_into(flat, file, at)
    if count == tensor.numel():
        tensor.copy_(flat.view(tensor.shape))
    elif tensor.is_contiguous():
        tensor.view(-1)[begin : begin + count].copy_(flat)
    else:  # a part of what is not flat in memory
        both = tensor.flatten()
        both[begin : begin + count].copy_(flat)
        tensor.copy_(both.view(tensor.shape))


def consolidated(path: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, however many ranks wrote it."""
    there = stored(path, "model")
    named = {name: torch.empty(p[0].shape, dtype=p[0].dtype) for name, p in there.items()}
    fill(plan_copies(path, whole(named), "model", there=there))
    return named

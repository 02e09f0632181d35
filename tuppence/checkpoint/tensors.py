"""The safetensors format, written from host memory and read by byte ranges.

    8 bytes: length of the header | header, JSON, padded with spaces to 8 | data

A file is built once in memory as an `Image`: every save copies tensors to where the file has them,
and writing is one pass over that memory which also hashes it. The library's own writer copies each
tensor once more and holds the interpreter's lock meanwhile, which would stall training; a test
holds our bytes equal to its.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tuppence.checkpoint.layout import File
from tuppence.errors import Fault

BLOCK = 1 << 20  # bytes hashed and then written while they are in the cache
# In the library's order, largest first: every tensor begins at a multiple of its element's size.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ORDER = {code: place for place, code in enumerate(DTYPES)}


@dataclass(frozen=True)
class Spec:
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Image:
    """A file in memory. `slots` are views of `data`, one flat tensor for each name."""

    header: bytes
    data: Tensor
    slots: dict[str, Tensor]


def header_of(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in _in_order(specs):
        spec = specs[name]
        offsets = [at, at := at + spec.nbytes]
        shape = list(spec.shape)
        entries[name] = {"dtype": CODES[spec.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def image_of(specs: Mapping[str, Spec], metadata: Mapping[str, str], *, pinned: bool) -> Image:
    """Room for a file; `pinned` for copies from a GPU."""
    size = sum(spec.nbytes for spec in specs.values())
    data = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    slots, at = {}, 0
    for name in _in_order(specs):
        spec = specs[name]
        slots[name] = data[at : at + spec.nbytes].view(spec.dtype)
        at += spec.nbytes
    return Image(header_of(specs, metadata), data, slots)


def _in_order(specs: Mapping[str, Spec]) -> list[str]:
    return sorted(specs, key=lambda name: (ORDER[CODES[specs[name].dtype]], name))


def write(path: Path, image: Image) -> File:
    """Write and flush a file, hashing it on the way."""
    return write_bytes(path, image.header, image.data.numpy().data)


def write_bytes(path: Path, *parts: bytes | memoryview) -> File:
    """Write and flush a file, hashing it on the way. The interpreter's lock is free meanwhile."""
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)  # Windows' own
    handle = os.open(path, flags, 0o666)
    try:
        for part in parts:
            for start in range(0, len(part), BLOCK):
                block = memoryview(part)[start : start + BLOCK]
                digest.update(block)
                while block:  # a write may take less than it was given
                    written = os.write(handle, block)
                    size, block = size + written, block[written:]
        os.fsync(handle)
    finally:
        os.close(handle)
    return File(digest.hexdigest(), size)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, and the byte of the file at which it begins."""

    spec: Spec
    at: int


def entries_of(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor of a file, and its metadata. Raises Fault where it is not such a file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length + 8 > size:
                raise ValueError("it is cut short")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(entry, 8 + length, size) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(f"{path} is damaged: {error}") from None
    return entries, metadata


def _entry(entry: dict[str, Any], start: int, size: int) -> Entry:
    spec = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= size - start or end - begin != spec.nbytes:
        raise ValueError("a tensor does not lie within it")
    return Entry(spec, start + begin)


def read_into(flat: Tensor, file: BinaryIO, at: int) -> None:
    """Fill a flat CPU tensor with the bytes of a file from `at` on."""
    file.seek(at)
    rest: memoryview = flat.view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise Fault(f"{file.name} is damaged: it is cut short")
        rest = rest[count:]

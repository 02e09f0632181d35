"""How an input is cut into slices: what one machine takes at a time, and what one shard comes from.

    a.parquet (200 MB)                     b.jsonl   c.jsonl   d.jsonl ...
    | part 0 of 3 | part 1 of 3 | 2 of 3 | together up to 64 MiB | ...

The cut follows from the list of files and their sizes alone, so every machine of a job knows all
slices without reading anything, and files added at the end leave those before them as they are.
Parquet and plain JSONL can be entered in the middle; what is compressed, and a text, cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tuppence.text.inputs import InputFile

SLICE_BYTES = 1 << 26


class Part(NamedTuple):
    """The `nth` (from 0) of `of` equal stretches of input file number `file`."""

    file: int
    nth: int = 0
    of: int = 1

    def span(self, file_bytes: int) -> tuple[int, int]:
        """Where it begins and ends in its file."""
        return self.nth * file_bytes // self.of, (self.nth + 1) * file_bytes // self.of


Slice = tuple[Part, ...]


def slices_of(files: Sequence[InputFile]) -> list[Slice]:
    """The slices, in reading order."""
    slices: list[Slice] = []
    held: list[Part] = []
    held_bytes = 0
    for number, file in enumerate(files):
        if held and held_bytes + file.bytes > SLICE_BYTES:
            slices.append(tuple(held))
            held, held_bytes = [], 0
        if file.bytes <= SLICE_BYTES:
            held.append(Part(number))
            held_bytes += file.bytes
        else:
            of = -(-file.bytes // SLICE_BYTES) if _enterable(file) else 1
            slices += [(Part(number, index, of),) for index in range(of)]
    return [*slices, tuple(held)] if held else slices


def _enterable(file: InputFile) -> bool:
    return not file.compression and file.kind in ("parquet", "jsonl")

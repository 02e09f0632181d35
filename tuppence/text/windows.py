"""Items in windows: what one worker turns into tokens at a time, and within which it is shuffled.

    slice   | window 0 | window 1 | window 2 | ...        4 MiB or so of what was read, each

A window ends with the item that fills it, or with its file, so it follows from the input alone.
Texts that are files of their own share windows; a long one, which comes in pieces, has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tuppence.text.formats import Item, Meter, read_items
from tuppence.text.inputs import InputFile
from tuppence.text.slices import Slice
from tuppence.tokenizer.pieces import Cut

WINDOW_BYTES = 1 << 22


@dataclass(frozen=True)
class Window:
    """Some items of a slice: whole documents, or pieces of one. `number` counts from 0 in it."""

    slice: int
    number: int
    items: list[Item]


def windows_of(
    slice_: Slice,
    number: int,
    files: Sequence[InputFile],
    *,
    text_field: str,
    cut: Cut,
    meter: Meter,
) -> Iterator[Window]:
    """The windows of slice `number`, in order. Raises UserError for a file that cannot be read."""
    groups = _groups(slice_, files, text_field=text_field, cut=cut, meter=meter)
    for count, items in enumerate(groups):
        yield Window(number, count, items)


def _groups(
    slice_: Slice, files: Sequence[InputFile], *, text_field: str, cut: Cut, meter: Meter
) -> Iterator[list[Item]]:
    held: list[Item] = []
    held_bytes = 0
    for part in slice_:
        for item in read_items(files[part.file], part, text_field=text_field, cut=cut, meter=meter):
            if held and item.whole != held[-1].whole:
                yield held
                held, held_bytes = [], 0
            held.append(item)
            held_bytes += item.bytes()
            if held_bytes >= WINDOW_BYTES or (not item.whole and item.last):
                yield held
                held, held_bytes = [], 0
        if held and files[part.file].kind != "txt":  # files that follow change nothing before them
            yield held
            held, held_bytes = [], 0
    if held:
        yield held

"""Leave out documents that came before: of each group that is alike, the first in the stream stays.

    for each band:  sort (key, place);  where a key is that of its neighbour, the later one goes

A document goes if it is like any earlier one, whether or not that one stayed: so the answer depends
on nothing but the stream, and one band at a time is in memory (16 bytes a document).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.data.shards import HEADER_BYTES, header
from tuppence.data.shelf import Shelf
from tuppence.data.work import Done, Part, name_of
from tuppence.files import file_sha256

Rows = npt.NDArray[np.uint64]  # [documents, 1 + bands]: where each begins in its slice, its keys


def without(done: Sequence[Done], shelf: Shelf, *, token_bytes: npt.NDArray[Any]) -> list[Done]:
    """The slices without duplicates, in files of their own; a slice that has none as it is."""
    rows = [_rows(each, shelf) for each in done]
    gone = duplicates(rows)
    borders = np.cumsum([0] + [len(each) for each in rows])
    return [
        _cleaned(each, row, gone[first:stop], shelf, token_bytes=token_bytes)
        if gone[first:stop].any()
        else each
        for each, row, first, stop in zip(done, rows, borders[:-1], borders[1:], strict=True)
    ]


def duplicates(rows: Sequence[Rows]) -> npt.NDArray[np.bool_]:
    """[documents] whether each is like one before it in any band."""
    rows = [each for each in rows if len(each)]
    gone = np.zeros(sum(len(each) for each in rows), dtype=bool)
    for band in range(1, rows[0].shape[1] if rows else 0):
        keys = np.concatenate([each[:, band] for each in rows])
        order = np.argsort(keys, kind="stable")  # equal keys stay in the stream's order
        again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        gone[order[again]] = True
    return gone


def _rows(done: Done, shelf: Shelf) -> Rows:
    """Read through a map: only the band that is looked at comes into memory."""
    if not done.documents:
        return np.empty((0, 1), dtype=np.uint64)
    path = shelf.need(f"{name_of(done.slice)}.keys")
    return np.asarray(np.memmap(path, dtype="<u8", mode="r").reshape(done.documents, -1))


def _cleaned(
    done: Done,
    rows: Rows,
    gone: npt.NDArray[np.bool_],
    shelf: Shelf,
    *,
    token_bytes: npt.NDArray[Any],
) -> Done:
    """The slice's shards without the documents that are `gone`."""
    starts = np.append(rows[:, 0], np.uint64(done.tokens)).astype(np.int64)
    spans = [(starts[index], starts[index + 1]) for index in np.flatnonzero(gone)]
    parts, dropped, dropped_bytes, begin = [], 0, 0, 0
    for part in done.parts:
        tokens = shelf.tokens(part)
        cuts = np.clip(np.array(spans).reshape(-1, 2) - begin, 0, part.tokens)
        begin += part.tokens
        for first, stop in cuts:
            dropped += int(stop - first)
            dropped_bytes += int(token_bytes[tokens[first:stop]].sum(dtype=np.int64))
        borders = np.concatenate([[0], cuts.ravel(), [part.tokens]]).reshape(-1, 2)
        kept = (tokens[first:stop] for first, stop in borders)
        count = int((borders[:, 1] - borders[:, 0]).sum())
        parts.append(_write(part, kept, count, tokens.dtype, shelf.folder))
    shelf.keep(part.file for part in parts)
    return replace(
        done,
        parts=tuple(part for part in parts if part.tokens),
        tokens=done.tokens - dropped,
        documents=done.documents - int(gone.sum()),
        bytes=done.bytes - dropped_bytes,
    )


def _write(
    part: Part,
    kept: Iterable[npt.NDArray[Any]],
    count: int,
    dtype: np.dtype[Any],
    folder: Path,
) -> Part:
    path = folder / part.file.replace("slice_", "slice_unique_")
    with path.open("wb") as file:
        file.write(header(dtype=dtype, count=count))
        for tokens in kept:
            file.write(np.ascontiguousarray(tokens).data)
        file.flush()
        os.fsync(file.fileno())
    assert path.stat().st_size == HEADER_BYTES + count * dtype.itemsize
    return Part(path.name, count, file_sha256(path))

"""From slices to the shards of a split: the last step of a preparation.

    slice_000000_000 | slice_000001_000 | ... | slice_000007_000
    └ val ┘└ train_000000 ┘└ train_000001 ┘    └ train_000007 ┘ over the cap

A slice that is wanted whole is only renamed; one that a border runs through is copied up to it.
What is done stays done, so a kill in the middle costs nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.data.shards import Shard, header, token_dtype
from tuppence.data.shelf import Shelf
from tuppence.data.split import Split
from tuppence.data.work import Done, Part
from tuppence.files import file_sha256
from tuppence.tokenizer.spec import Tokenizer

_COPY_TOKENS = 1 << 20


@dataclass(frozen=True)
class Cut:
    """The tokens [first, stop) of a slice's shard, as a shard of a split."""

    name: str
    split: str
    part: Part
    first: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the slice's shard."""
        return self.stop - self.first == self.part.tokens


@dataclass(frozen=True)
class Tally:
    """Of a stretch of tokens: how many, their UTF-8 bytes, how many end a document, their hash
    (as little-endian uint32)."""

    tokens: int
    bytes: int
    ends: int
    sha256: str


def cuts_of(parts: Iterable[Part], split: Split) -> list[Cut]:
    """The shards of both splits, in stream order."""
    cuts: list[Cut] = []
    counts = {"train": 0, "val": 0}
    begin = 0
    for part in parts:
        for name, (first, stop) in (("train", split.train), ("val", split.val)):
            low, high = max(first - begin, 0), min(stop - begin, part.tokens)
            if low < high:
                cuts.append(Cut(f"{name}_{counts[name]:06d}.bin", name, part, low, high))
                counts[name] += 1
        begin += part.tokens
    return cuts


def place(cuts: list[Cut], shelf: Shelf, *, vocab_size: int) -> list[Shard]:
    """Make every shard where the slices are. On a bucket, which cannot rename, what is wanted whole
    keeps its name."""
    folder = shelf.folder
    for cut in cuts:  # copies first: a rename takes away what they are made from
        if not cut.whole and not (folder / cut.name).exists():
            _copy(cut, shelf, vocab_size=vocab_size)
    shards = []
    for cut in cuts:
        name, sha256 = cut.name, cut.part.sha256
        if not cut.whole:
            sha256 = file_sha256(folder / name)
        elif shelf.store is not None:
            name = cut.part.file
        elif not (folder / name).exists():
            shelf.tokens(cut.part)  # which looks at it
            os.replace(folder / cut.part.file, folder / name)
        shards.append(Shard(name, cut.split, cut.stop - cut.first, sha256))
    return shards


def tally(
    pieces: Iterable[npt.NDArray[Any]], *, token_bytes: npt.NDArray[np.int32], end: int | None
) -> Tally:
    """Counts over a stretch of tokens that comes in pieces."""
    digest = hashlib.sha256()
    tokens = text_bytes = ends = 0
    for piece in pieces:
        digest.update(piece.astype("<u4").data)
        tokens += len(piece)
        text_bytes += int(token_bytes[piece].sum(dtype=np.int64))
        ends += 0 if end is None else int(np.count_nonzero(piece == end))
    return Tally(tokens, text_bytes, ends, digest.hexdigest())


def tokens_between(
    parts: Iterable[Part], shelf: Shelf, first: int, stop: int
) -> Iterator[npt.NDArray[Any]]:
    """The stream's tokens [first, stop), a million at a time."""
    begin = 0
    for part in parts:
        low, high = max(first - begin, 0), min(stop - begin, part.tokens)
        if low < high:
            tokens = shelf.tokens(part)
            for at in range(low, high, _COPY_TOKENS):
                yield tokens[at : min(at + _COPY_TOKENS, high)]
        begin += part.tokens


def _copy(cut: Cut, shelf: Shelf, *, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    tokens = shelf.tokens(cut.part)
    aside = shelf.folder / f"{cut.name}.tmp"
    with aside.open("wb") as file:
        file.write(header(dtype=dtype, count=cut.stop - cut.first))
        for at in range(cut.first, cut.stop, _COPY_TOKENS):
            file.write(np.ascontiguousarray(tokens[at : min(at + _COPY_TOKENS, cut.stop)]).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, shelf.folder / cut.name)


@dataclass(frozen=True)
class Made:
    """The shards of both splits, and what is in them."""

    shards: list[Shard]
    documents: int
    train_tokens: int
    bytes: int
    val: Tally


def assemble(done: Sequence[Done], shelf: Shelf, split: Split, tokenizer: Tokenizer) -> Made:
    """Make the shards of `split` from the slices on the shelf, and count what they hold."""
    parts = [part for each in done for part in each.parts]
    cuts = cuts_of(parts, split)
    shards = place(cuts, shelf, vocab_size=tokenizer.vocab_size)
    token_bytes, end = tokenizer.token_bytes(), tokenizer.end_of_text
    train, val = ([s for s in shards if s.split == name] for name in ("train", "val"))
    gap_stop = split.val[0] if split.val[0] >= split.train[1] else sum(p.tokens for p in parts)
    gap = tokens_between(parts, shelf, split.train[1], gap_stop)
    dropped = tally(gap, token_bytes=token_bytes, end=end)
    begun = dropped.ends
    if dropped.tokens and not _ends_document(train, shelf, end):
        begun -= 1  # which is of a document that is there in part
    return Made(
        shards=shards,
        documents=sum(each.documents for each in done) - max(0, begun),
        train_tokens=split.train[1] - split.train[0],
        bytes=sum(each.bytes for each in done) - dropped.bytes,
        val=tally(
            tokens_between(_as_parts(val), shelf, 0, split.val[1] - split.val[0]),
            token_bytes=token_bytes,
            end=end,
        ),
    )


def _as_parts(shards: Sequence[Shard]) -> list[Part]:
    return [Part(shard.file, shard.tokens, shard.sha256) for shard in shards]


def _ends_document(train: Sequence[Shard], shelf: Shelf, end: int | None) -> bool:
    """Whether the training tokens stop between documents."""
    return all(int(shelf.tokens(part)[-1]) == end for part in _as_parts(train[-1:]))

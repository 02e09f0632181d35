"""Batches from shards: every one a pure function of (manifest, seed, step, rank, world size).

Nothing is saved and nothing is remembered, so any step can be built again and 1, 2 or 8 ranks
train on the same stream. Sample k of a run is a window of the split's token stream:

    k = step * batch_size + row        epoch, i = divmod(k, n_windows)
    start(k) = offset(seed, epoch) + sequence_len * order(seed, epoch)[i]

Windows do not overlap, so an epoch sees each token at most once and all but an edge; the offset
moves the borders from epoch to epoch, anywhere that leaves room for all windows (at least
`sequence_len` ways), so that every token has its turn; `order` is a keyed permutation, within
blocks of BLOCK_TOKENS and of the blocks (`permute.Order`): few shards are read at a time, and which
ones come next is known. They may be on a bucket (`cache`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.data.cache import Cache, load_bucket, to_stderr
from tuppence.data.permute import U64, Order, Visit, key_of, mix, permuted
from tuppence.data.shards import Tokens, check_sizes, load_manifest, open_shard, token_dtype
from tuppence.errors import UserError

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[Any]  # [sequences, tokens]: int64, or what tokens are on disk

BLOCK_TOKENS = 2**27  # 256 MiB of uint16, a block and the next: half a GiB of a bucket
# Window starts are computed for this many samples at once: numpy's cost per call, spread thin.
_SAMPLES_AT_ONCE = 4096


class _Stream:
    """All shards of a split as one sequence of tokens, read through memory maps."""

    def __init__(self, folder: Path, *, split: str, say: Callable[[str], None] = to_stderr) -> None:
        manifest = load_manifest(folder)
        shards, bucket = manifest.of_split(split), load_bucket(folder)
        self._cache = None if bucket is None else Cache(folder, manifest, bucket, say=say)
        if self._cache is None:
            check_sizes(folder, dataclasses.replace(manifest, shards=shards))
        self._folder, self._shards = folder, [shard for shard in shards if shard.tokens]
        self._ends = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._maps: list[Tokens | None] = [None] * len(self._shards)
        self.tokens = int(self._ends[-1])
        self.source, self.dtype = manifest.source, token_dtype(manifest.vocab_size)

    def copy(self, rows: Rows, starts: Ints) -> None:
        """Fill each row with the tokens from its start on: one copy, from the map."""
        indices = np.searchsorted(self._ends, starts, side="right") - 1
        insides, length = starts - self._ends[indices], rows.shape[1]
        # by rows: numpy has no gather that converts as well, and a row costs half a microsecond
        places = zip(indices.tolist(), insides.tolist(), strict=True)
        for row, (index, inside) in zip(rows, places, strict=True):
            part = self._mapped(index)[inside : inside + length]
            if len(part) == length:
                row[:] = part
            else:
                self._copy_across(row, index, part)

    def windows(self, starts: Ints, *, length: int) -> Ints:
        """[len(starts), length] tokens from each start on."""
        rows = np.empty((len(starts), length), dtype=np.int64)
        self.copy(rows, starts)
        return rows

    def keep(self, now: Sequence[range], soon: Sequence[range]) -> None:
        """Tokens of these ranges are asked for until the next call, and then those of `soon`."""
        here, coming = self._holding(now), self._holding(soon)
        for index in {*range(len(self._maps))} - {*here}:
            self._maps[index] = None
        if self._cache is not None:
            self._cache.keep([self._shards[i] for i in here], [self._shards[i] for i in coming])

    @property
    def remote(self) -> bool:
        """Whether shards come from a bucket."""
        return self._cache is not None

    def close(self) -> None:
        """Nothing more is fetched."""
        if self._cache is not None:
            self._cache.close()

    def _holding(self, ranges: Sequence[range]) -> list[int]:
        """The shards that hold these tokens."""
        found: set[int] = set()
        for tokens in ranges:
            first, last = np.searchsorted(self._ends, [tokens[0], tokens[-1]], side="right") - 1
            found |= {*range(int(first), int(last) + 1)}
        return sorted(found)

    def _mapped(self, index: int) -> Tokens:
        found = self._maps[index]
        if found is None:
            shard = self._shards[index]
            path = self._folder / shard.file
            found = open_shard(path) if self._cache is None else self._cache.open(shard)
            self._maps[index] = found
        return found

    def _copy_across(self, row: npt.NDArray[Any], index: int, part: Tokens) -> None:
        """Fill a row that begins with `part`, a shard's end, from the shards after it."""
        filled = 0
        while True:
            row[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(row):
                return
            index += 1
            part = self._mapped(index)[: len(row) - filled]


class Loader:
    """Training batches of a prepared folder; `batch_size` counts the global batch's sequences.

    One thread may use it at a time. `say` gets what a person should know of a bucket's shards.
    """

    def __init__(
        self,
        folder: Path,
        *,
        split: str = "train",
        sequence_len: int,
        batch_size: int,
        seed: int,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        self.sequence_len, self.batch_size, self.seed = sequence_len, batch_size, seed
        self._stream = _Stream(folder, split=split, say=say)
        self.tokens = self._stream.tokens
        if self.tokens < sequence_len + 1:
            raise UserError(_too_short(self._stream, split=split, sequence_len=sequence_len))
        # as many as leave a choice of sequence_len offsets: every epoch has the same number
        self.n_windows = max(1, (self.tokens - sequence_len) // sequence_len)
        self._offsets = self.tokens - self.n_windows * sequence_len
        block = max(1, BLOCK_TOKENS // sequence_len)
        self._order = Order(self.n_windows, block=block, key=key_of("loader", seed, split))
        self._kept = range(0)  # samples of the block that is read now
        self._drawn: tuple[int, Ints] = (-1, np.empty(0, dtype=np.int64))

    @property
    def dtype(self) -> np.dtype[Any]:
        """What tokens are on disk."""
        return self._stream.dtype

    @property
    def remote(self) -> bool:
        """Whether a batch may have to wait for a network."""
        return self._stream.remote

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Ints:
        """[batch_size / world_size, sequence_len + 1] tokens: inputs [:, :-1], targets [:, 1:].

        The ranks' batches, one below the other, are the batch of a world of one.
        """
        rows = np.empty((self.rows(world_size), self.sequence_len + 1), dtype=np.int64)
        self.fill(rows, step, rank=rank)
        return rows

    def fill(self, rows: Rows, step: int, *, rank: int = 0) -> None:
        """The same into an array that is there, whose rows are one of the ranks' share."""
        first, count = step * self.batch_size + rank * len(rows), len(rows)
        self._keep(first, first + count)
        self._stream.copy(rows, self._starts(first, count))

    def rows(self, world_size: int) -> int:
        """A rank's sequences in each batch."""
        if self.batch_size % world_size:
            raise UserError(
                f"a batch of {self.batch_size} sequences cannot be shared by {world_size} ranks; "
                "make train.batch_tokens a multiple of ranks x sequence_len"
            )
        return self.batch_size // world_size

    def epochs(self, step: int) -> float:
        """How often the split has been seen when `step` steps are done."""
        return step * self.batch_size / self.n_windows

    def close(self) -> None:
        """Nothing more is read ahead."""
        self._stream.close()

    def _keep(self, first: int, end: int) -> None:
        """Have the blocks of these samples at hand, and the next one on its way."""
        if first in self._kept and end - 1 in self._kept:
            return
        if self._order.n_blocks == 1:  # all of it, for ever
            self._kept = range(sys.maxsize)
            return self._stream.keep([range(self.tokens)], [])
        visits = [self._order.visit(first)]
        while visits[-1].end < end:
            visits.append(self._order.visit(visits[-1].end))
        now, soon = [self._tokens_of(visit) for visit in visits], []
        self._kept = range(0)
        if len(visits) == 1:  # what reaches into the next block leaves the one after it for later
            self._kept = range(visits[0].first, visits[0].end)
            soon = [self._tokens_of(self._order.visit(visits[0].end))]
        return self._stream.keep(now, soon)

    def _tokens_of(self, visit: Visit) -> range:
        length = self.sequence_len
        offset = int(self._epoch_offsets(np.array([visit.epoch], dtype=np.uint64))[0])
        return range(offset + visit.low * length, offset + visit.high * length + 1)

    def _starts(self, first: int, count: int) -> Ints:
        """Window starts of samples first ... first + count - 1, through the last ones drawn."""
        found = []
        while count:
            batch, inside = divmod(first, _SAMPLES_AT_ONCE)
            if self._drawn[0] != batch:
                self._drawn = (batch, self._draw(batch))
            found.append(self._drawn[1][inside : inside + count])
            first, count = first + len(found[-1]), count - len(found[-1])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _draw(self, batch: int) -> Ints:
        first = np.uint64(batch * _SAMPLES_AT_ONCE)
        samples = np.arange(_SAMPLES_AT_ONCE, dtype=np.uint64) + first
        offsets = self._epoch_offsets(samples // np.uint64(self.n_windows))
        windows = self._order.at(samples)
        return (offsets + windows * np.uint64(self.sequence_len)).astype(np.int64)

    def _epoch_offsets(self, epochs: U64) -> U64:
        keys = self._order.keys(epochs)
        return mix(keys ^ np.uint64(key_of("offset"))) % np.uint64(self._offsets)


def _too_short(stream: _Stream, *, split: str, sequence_len: int) -> str:
    return (
        f"{stream.source}: its {split} split has {stream.tokens:,} tokens, but one window of "
        f"sequence_len {sequence_len:,} needs {sequence_len + 1:,}; make model.sequence_len "
        "smaller or give more text"
    )


@dataclass(frozen=True)
class EvalBatches:
    """Windows of the validation split, in an order such that any first part is a fair sample.

    `tokens` is how many are predicted in all; `starts` [n_windows] is where each window begins.
    """

    stream: _Stream
    starts: Ints
    sequence_len: int
    tokens: int

    def batches(self, batch_size: int) -> Iterator[tuple[Ints, Ints]]:
        """(inputs, targets), each [rows, sequence_len]; a target of -1 is padding: ignore it."""
        for first in range(0, len(self.starts), batch_size):
            yield self._rows(self.starts[first : first + batch_size])

    def _rows(self, starts: Ints) -> tuple[Ints, Ints]:
        length = self.sequence_len
        whole = starts + length < self.stream.tokens
        inputs = np.zeros((len(starts), length), dtype=np.int64)
        targets = np.full((len(starts), length), -1, dtype=np.int64)
        windows = self.stream.windows(starts[whole], length=length + 1)
        inputs[whole], targets[whole] = windows[:, :-1], windows[:, 1:]
        for row in np.flatnonzero(~whole):  # at most one: the last window may be ragged
            left = self.stream.tokens - int(starts[row])
            tail = self.stream.windows(starts[row : row + 1], length=left)[0]
            inputs[row, : left - 1], targets[row, : left - 1] = tail[:-1], tail[1:]
        return inputs, targets


def val_windows(folder: Path, *, sequence_len: int, max_tokens: int | None = None) -> EvalBatches:
    """Windows that predict every validation token but the first exactly once.

    With `max_tokens`, an evenly strided part of them: m = max_tokens // sequence_len windows (at
    least one), the j-th being number floor(j * n_windows / m). The order is one fixed permutation
    (seed 0), so an evaluation that a deadline cuts short has still seen an unbiased sample.
    """
    stream = _Stream(folder, split="val")
    if stream.tokens < 2:
        raise UserError(
            f"{stream.source}: its validation split has {stream.tokens} tokens, 2 are the least; "
            "make data.val_tokens larger or give more text"
        )
    predicted = stream.tokens - 1
    n_windows = -(-predicted // sequence_len)
    chosen = np.arange(n_windows)
    if max_tokens is not None and max_tokens < predicted:
        count = max(1, max_tokens // sequence_len)
        chosen = np.arange(count) * n_windows // count
    order = permuted(
        np.arange(len(chosen), dtype=np.uint64),
        n=len(chosen),
        keys=np.full(len(chosen), key_of("val", 0), dtype=np.uint64),
    )
    starts = chosen[order.astype(np.int64)] * sequence_len
    tokens = int(np.minimum(sequence_len, predicted - starts).sum())
    return EvalBatches(stream, starts, sequence_len, tokens)


def rolling_sha(previous: str, batch: npt.NDArray[np.integer[Any]]) -> str:
    """A stream's hash: sha256 of the previous hex digest and the batch, as little-endian uint32."""
    digest = hashlib.sha256(previous.encode("ascii"))
    digest.update(np.ascontiguousarray(batch, dtype="<u4").data)
    return digest.hexdigest()

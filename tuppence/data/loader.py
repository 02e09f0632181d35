"""Batches from shards: every one a pure function of (manifest, seed, step, rank, world size).

Nothing is saved and nothing is remembered, so any step can be built again and 1, 2 or 8 ranks
train on the same stream. Sample k of a run is a window of the split's token stream:

    k = step * batch_size + row        epoch, i = divmod(k, n_windows)
    start(k) = offset(seed, epoch) + sequence_len * order(seed, epoch)[i]

Windows do not overlap, so an epoch sees each token at most once and all but an edge; the offset
moves the borders from epoch to epoch, anywhere that leaves room for all windows (at least
`sequence_len` ways), so that every token has its turn; `order` is a keyed permutation
(`permute`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.data.permute import U64, key_of, mix, permuted
from tuppence.data.shards import Tokens, check_sizes, load_manifest, open_shard
from tuppence.errors import UserError

Ints = npt.NDArray[np.int64]

# Window starts are computed for this many samples at once: numpy's cost per call, spread thin.
_BLOCK_SAMPLES = 4096


class _Stream:
    """All shards of a split as one sequence of tokens, read through memory maps."""

    def __init__(self, folder: Path, *, split: str) -> None:
        manifest = load_manifest(folder)
        check_sizes(folder, manifest)
        shards = [shard for shard in manifest.of_split(split) if shard.tokens]
        self._shards: list[Tokens] = [open_shard(folder / shard.file) for shard in shards]
        self._ends = np.cumsum([0] + [shard.tokens for shard in shards])
        self.tokens = int(self._ends[-1])
        self.source = manifest.source

    def windows(self, starts: Ints, *, length: int) -> Ints:
        """[len(starts), length] tokens from each start on."""
        if len(self._shards) == 1:
            places = starts[:, None] + np.arange(length)
            return self._shards[0].take(places).astype(np.int64)
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._copy(row, start)
        return rows

    def _copy(self, row: Ints, start: int) -> None:
        """Fill the row from `start` on, across shards where it must."""
        index = int(np.searchsorted(self._ends, start, side="right")) - 1
        filled = 0
        while filled < len(row):
            inside = start + filled - int(self._ends[index])
            part = self._shards[index][inside : inside + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            index += 1


class Loader:
    """Training batches of a prepared folder; `batch_size` counts the global batch's sequences."""

    def __init__(
        self,
        folder: Path,
        *,
        split: str = "train",
        sequence_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.sequence_len, self.batch_size, self.seed = sequence_len, batch_size, seed
        self._stream = _Stream(folder, split=split)
        self.tokens = self._stream.tokens
        if self.tokens < sequence_len + 1:
            raise UserError(_too_short(self._stream, split=split, sequence_len=sequence_len))
        # as many as leave a choice of sequence_len offsets: every epoch has the same number
        self.n_windows = max(1, (self.tokens - sequence_len) // sequence_len)
        self._offsets = self.tokens - self.n_windows * sequence_len
        self._key = key_of("loader", seed, split)
        self._block: tuple[int, Ints] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Ints:
        """[batch_size / world_size, sequence_len + 1] tokens: inputs [:, :-1], targets [:, 1:].

        The ranks' batches, one below the other, are the batch of a world of one.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"a batch of {self.batch_size} sequences cannot be shared by {world_size} ranks; "
                "make train.batch_tokens a multiple of ranks x sequence_len"
            )
        rows = self.batch_size // world_size
        first = step * self.batch_size + rank * rows
        return self._stream.windows(self._starts(first, rows), length=self.sequence_len + 1)

    def epochs(self, step: int) -> float:
        """How often the split has been seen when `step` steps are done."""
        return step * self.batch_size / self.n_windows

    def _starts(self, first: int, count: int) -> Ints:
        """Window starts of samples first ... first + count - 1, through the last block computed."""
        found = []
        while count:
            block, inside = divmod(first, _BLOCK_SAMPLES)
            if self._block[0] != block:
                self._block = (block, self._starts_of_block(block))
            found.append(self._block[1][inside : inside + count])
            first, count = first + len(found[-1]), count - len(found[-1])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _starts_of_block(self, block: int) -> Ints:
        samples = np.arange(_BLOCK_SAMPLES, dtype=np.uint64) + np.uint64(block * _BLOCK_SAMPLES)
        epochs, places = np.divmod(samples, np.uint64(self.n_windows))
        keys: U64 = mix(epochs + np.uint64(self._key))
        offsets = mix(keys ^ np.uint64(key_of("offset"))) % np.uint64(self._offsets)
        windows = permuted(places, n=self.n_windows, keys=keys)
        return (offsets + windows * np.uint64(self.sequence_len)).astype(np.int64)


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

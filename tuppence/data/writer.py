"""Write a stream of tokens into shards, and cut the end of it off into shards of another split.

Which tokens are the last is known only when the stream ends, so all of it is written as train
shards first; then the tail is copied into val shards, block by block, and the train shards are
cut there.

    train_000000 | train_000001 | train_000002       ─▶   train_000000 | train_0000   val_000000
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from tuppence.data.shards import HEADER_BYTES, Shard, header, open_shard, token_dtype
from tuppence.files import file_sha256

_COPY_TOKENS = 1 << 20


class ShardWriter:
    """Appends tokens to `<split>_000000.bin`, `<split>_000001.bin` ... of `shard_tokens` each."""

    def __init__(
        self, folder: Path, split: str, *, dtype: np.dtype[Any], shard_tokens: int
    ) -> None:
        self.paths: list[Path] = []
        self._folder, self._split = folder, split
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._file: BinaryIO | None = None
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """Write tokens, over as many shards as they need."""
        tokens = np.ascontiguousarray(tokens, dtype=self._dtype)
        while len(tokens):
            if self._file is None or self._count == self._shard_tokens:
                self._next()
            assert self._file is not None
            part = tokens[: self._shard_tokens - self._count]
            self._file.write(part.data)
            self._count += len(part)
            tokens = tokens[len(part) :]

    def _next(self) -> None:
        self._close()
        self.paths.append(self._folder / f"{self._split}_{len(self.paths):06d}.bin")
        self._file = self.paths[-1].open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._count = 0

    def _close(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.write(header(dtype=self._dtype, count=self._count))
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Tail:
    """All shards after the cut, hashed; UTF-8 bytes and hash (as uint32) of the tail's tokens."""

    shards: list[Shard]
    bytes: int
    sha256: str


def cut_tail(
    paths: list[Path],
    *,
    tail_tokens: int,
    shard_tokens: int,
    token_bytes: npt.NDArray[np.int32],
    vocab_size: int,
) -> Tail:
    """Move the last `tail_tokens` of the train shards at `paths` into val shards beside them."""
    folder, dtype = paths[0].parent, token_dtype(vocab_size)
    counts = [len(open_shard(path)) for path in paths]
    kept_tokens = sum(counts) - tail_tokens
    digest, tail_bytes = hashlib.sha256(), 0
    with ShardWriter(folder, "val", dtype=dtype, shard_tokens=shard_tokens) as writer:
        for tokens in _blocks(paths, first=kept_tokens):
            writer.append(tokens)
            digest.update(tokens.astype("<u4").data)
            tail_bytes += int(token_bytes[tokens].sum(dtype=np.int64))
            del tokens  # Windows does not shorten a file that is mapped
    shards = []
    for path, count in zip(paths, counts, strict=True):
        kept = min(count, kept_tokens)
        _shorten(path, dtype=dtype, count=kept, was=count)
        kept_tokens -= kept
        shards += [(path, "train", kept)] * bool(kept)
    shards += [(path, "val", len(open_shard(path))) for path in writer.paths]
    return Tail(_hashed(shards), tail_bytes, digest.hexdigest())


def _blocks(paths: list[Path], *, first: int) -> Iterator[npt.NDArray[Any]]:
    """The tokens from number `first` on, a million at a time."""
    for path in paths:
        tokens = open_shard(path)
        for start in range(min(first, len(tokens)), len(tokens), _COPY_TOKENS):
            yield tokens[start : start + _COPY_TOKENS]
        first = max(0, first - len(tokens))


def _shorten(path: Path, *, dtype: np.dtype[Any], count: int, was: int) -> None:
    if count == 0:
        path.unlink()
    elif count < was:
        with path.open("r+b") as file:
            file.write(header(dtype=dtype, count=count))
            file.truncate(HEADER_BYTES + count * dtype.itemsize)


def _hashed(shards: list[tuple[Path, str, int]]) -> list[Shard]:
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(file_sha256, (path for path, _, _ in shards)))
    return [
        Shard(path.name, split, tokens, sha256)
        for (path, split, tokens), sha256 in zip(shards, hashes, strict=True)
    ]

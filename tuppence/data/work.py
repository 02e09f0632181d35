"""The work folder of a preparation: each slice's tokens so far, and how far that is.

    slice_000003_000.bin   its tokens, in shards of at most `shard_tokens`
    slice_000003.keys      for each document, where it begins and its keys (where duplicates go)
    slice_000003.json      what is certain: so many windows, tokens, documents; the rest is a kill's

The JSON is replaced every few seconds, after what it speaks of is on the disk. Whatever kills a
preparation, the next one cuts the files back to it and goes on with the window that follows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tuppence.data.encode import Encoded
from tuppence.data.lengths import Lengths
from tuppence.data.shards import HEADER_BYTES, header
from tuppence.files import file_sha256, write_whole
from tuppence.text.documents import Bad

COMMIT_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """A shard of a slice; `sha256` is "" until the slice is finished."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Done:
    """What has been written of a slice: of its first `windows` windows, or `all` of them.

    `bad` counts the documents that were left out by why, `named` has the first of each;
    `bytes` is the UTF-8 text that the tokens stand for; `begun` are the tokens of a document that
    goes on in the next window, and is not among the lengths yet.
    """

    slice: int
    windows: int = 0
    all: bool = False
    finished: bool = False
    parts: tuple[Part, ...] = ()
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    named: dict[str, str] = dataclasses.field(default_factory=dict)
    lengths: Lengths = dataclasses.field(default_factory=Lengths)
    begun: int = 0
    languages: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Done:
        content: dict[str, Any] = json.loads(text)
        content["parts"] = tuple(Part(**part) for part in content["parts"])
        lengths = content["lengths"]
        content["lengths"] = Lengths(**lengths | {"powers": tuple(lengths["powers"])})
        return Done(**content)


def name_of(slice_: int) -> str:
    """What the files of a slice are called, before their suffix."""
    return f"slice_{slice_:06d}"


def done_of(folder: Path, slice_: int) -> Done:
    """What is certain of a slice; nothing, where none of it was committed."""
    path = folder / f"{name_of(slice_)}.json"
    return Done.from_json(path.read_text(encoding="utf-8")) if path.exists() else Done(slice_)


class SliceWriter:
    """Appends windows to one slice's files, going on from what is certain.

    `check` raises where what was read is not what was asked for; then it does not become certain.
    """

    def __init__(
        self,
        folder: Path,
        slice_: int,
        *,
        dtype: np.dtype[Any],
        shard_tokens: int,
        bands: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.done, self._check = done_of(folder, slice_), check
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._shard: BinaryIO | None = None
        self._keys: BinaryIO | None = None
        self._committed = time.monotonic()
        if not self.done.all:
            self._cut_back(bands)

    def append(self, encoded: Encoded) -> None:
        """Write the next window. What is broken in it is counted."""
        done = self.done
        assert (encoded.slice, encoded.number) == (done.slice, done.windows)
        if self._keys is not None:
            starts = (encoded.starts + done.tokens).astype("<u8")[:, None]
            self._keys.write(np.hstack([starts, encoded.keys.astype("<u8")]).tobytes())
        self._write(encoded.ids)
        lengths, begun = _lengths(encoded, done.begun)
        self.done = replace(
            self.done,
            finished=False,
            windows=done.windows + 1,
            tokens=done.tokens + len(encoded.ids),
            documents=done.documents + len(encoded.starts),
            bytes=done.bytes + encoded.text_bytes,
            bad=dict(Counter(done.bad) + Counter(bad.why for bad in encoded.bad)),
            named={**_first_of_each(encoded.bad), **done.named},
            lengths=done.lengths.plus(lengths),
            begun=begun,
            languages=dict(Counter(done.languages) + encoded.languages),
        )
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make what was written certain."""
        self._check()
        for file in (self._shard, self._keys):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        path = self._folder / f"{name_of(self.done.slice)}.json"
        write_whole(path, self.done.to_json().encode())
        self._committed = time.monotonic()

    def finish(self, *, all_: bool) -> Done:
        """Close the files, hash them, and commit."""
        self._close_shard()
        paths = [self._folder / part.file for part in self.done.parts]
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(file_sha256, paths))
        parts = [replace(p, sha256=h) for p, h in zip(self.done.parts, hashes, strict=True)]
        self.done = replace(self.done, parts=tuple(parts), finished=True, all=all_)
        self.commit()
        self.close()
        return self.done

    def close(self) -> None:
        """Let go of the files, of what is not certain too."""
        for file in (self._shard, self._keys):
            if file is not None:
                file.close()
        self._shard = self._keys = None

    def _cut_back(self, bands: int) -> None:
        """Leave in the files what is certain, and stand behind it."""
        name, parts = name_of(self.done.slice), self.done.parts
        known = {part.file for part in parts}
        for path in self._folder.glob(f"{name}_*.bin"):
            if path.name not in known:
                path.unlink()
        if parts:
            self._shard = (self._folder / parts[-1].file).open("r+b")
            self._shard.truncate(HEADER_BYTES + parts[-1].tokens * self._dtype.itemsize)
            self._shard.seek(0, os.SEEK_END)
        if bands:
            self._keys = (self._folder / f"{name}.keys").open("ab")
            self._keys.truncate(self.done.documents * 8 * (1 + bands))

    def _write(self, ids: npt.NDArray[Any]) -> None:
        while len(ids):
            parts = self.done.parts
            if self._shard is None or parts[-1].tokens == self._shard_tokens:
                self._next_shard()
                parts = self.done.parts
            assert self._shard is not None
            room = self._shard_tokens - parts[-1].tokens
            self._shard.write(np.ascontiguousarray(ids[:room]).data)
            last = replace(parts[-1], tokens=parts[-1].tokens + min(room, len(ids)), sha256="")
            self.done = replace(self.done, parts=(*parts[:-1], last))
            ids = ids[room:]

    def _next_shard(self) -> None:
        self._close_shard()
        file = f"{name_of(self.done.slice)}_{len(self.done.parts):03d}.bin"
        self._shard = (self._folder / file).open("w+b")
        self._shard.write(bytes(HEADER_BYTES))
        self.done = replace(self.done, parts=(*self.done.parts, Part(file, 0, "")))

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.seek(0)
            self._shard.write(header(dtype=self._dtype, count=self.done.parts[-1].tokens))
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
            self._shard = None


def _lengths(encoded: Encoded, begun: int) -> tuple[npt.NDArray[np.int64], int]:
    """Tokens of the documents that end in the window, and of the one that goes on; `begun` are
    those that its first has before it."""
    lengths = np.diff(encoded.starts, prepend=0, append=len(encoded.ids))
    lengths[0] += begun
    lengths = lengths[0 if lengths[0] else 1 :]  # unless a document begins with the window
    if not encoded.goes_on:
        return lengths, 0
    return lengths[:-1], int(lengths[-1:].sum())


def _first_of_each(bad: list[Bad]) -> dict[str, str]:
    return {each.why: each.message for each in reversed(bad)}

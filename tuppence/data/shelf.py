"""Where the files of a preparation are: in its work folder, or, as they are finished, on a bucket.

    here      slice_000003_000.bin, .keys, .json
    bucket    the same; the .json is the last to arrive, and says that the others are there

With a bucket, what is finished is sent and deleted here: the disk holds the slice in hand. Another
machine that makes other slices of the same preparation, or puts them together, finds them there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from tuppence.data.shards import Tokens, open_shard
from tuppence.data.work import Done, Part, done_of, name_of
from tuppence.errors import Fault
from tuppence.files import file_sha256, write_whole
from tuppence.store import Away, Store

PAUSES = (1.0, 3.0, 10.0, 30.0)
_T = TypeVar("_T")


class Shelf:
    """A work folder, and the bucket behind it where there is one."""

    def __init__(self, folder: Path, store: Store | None = None) -> None:
        self.folder, self.store = folder, store

    @property
    def place(self) -> str:
        """Where what is finished lies, for people."""
        return str(self.folder) if self.store is None else self.store.url

    def look(self) -> None:
        """Learn which slices are finished by now, whoever made them."""
        if self.store is None:
            return
        store = self.store
        for name in self._tried(store.find):
            if not (name.startswith("slice_") and name.endswith(".json")):
                continue
            number = int(name.removesuffix(".json").rpartition("_")[2])
            if not done_of(self.folder, number).finished:
                content = self._tried(partial(store.read, name))
                for path in self.folder.glob(f"{name_of(number)}*"):  # begun here, ended there
                    path.unlink()
                if content is not None:
                    write_whole(self.folder / name, content)

    def need(self, name: str, sha256: str = "") -> Path:
        """A file of this preparation, brought here where it is not."""
        path = self.folder / name
        if path.exists() or self.store is None:
            return path
        store, aside = self.store, path.with_name(f"{name}.fetching")
        self._tried(partial(store.fetch, name, aside))
        if sha256 and file_sha256(aside) != sha256:
            raise Fault(f"{store.url}/{name} is not what was sent; delete it, and run this again")
        os.replace(aside, path)
        return path

    def tokens(self, part: Part) -> Tokens:
        """The tokens of a shard that was made here. Raises Fault for one that is half written."""
        return open_shard(self.need(part.file, part.sha256), tokens=part.tokens)

    def finished(self, done: Done) -> None:
        """A slice is through."""
        if self.store is None:
            return
        keys = f"{name_of(done.slice)}.keys"
        there = [keys] if (self.folder / keys).exists() else []
        self.keep([part.file for part in done.parts] + there)
        self.write(f"{name_of(done.slice)}.json", done.to_json().encode())

    def keep(self, names: Iterable[str]) -> None:
        """Send finished files, and delete them here."""
        if self.store is None:
            return
        store = self.store
        for path in (self.folder / name for name in names):
            digest = store.digest(path)
            self._tried(partial(store.send, path, path.name, digest))
            path.unlink()

    def write(self, name: str, content: bytes) -> None:
        """Replace a small object on the bucket."""
        assert self.store is not None
        store = self.store
        self._tried(partial(store.write, name, content))

    def note(self, name: str, content: bytes) -> None:
        """Write a note for whoever works at this preparation."""
        write_whole(self.folder / name, content)
        if self.store is not None:
            self.write(name, content)

    def noted(self, name: str) -> bytes | None:
        """A note, as the bucket has it where there is one."""
        if self.store is not None:
            return self._tried(partial(self.store.read, name))
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Delete what slices have left, here and on the bucket, but for these."""
        kept = set(keep)
        for path in self.folder.glob("slice_*"):
            if path.name not in kept:
                path.unlink()
        if self.store is not None:
            store = self.store
            for name in self._tried(store.find):
                if name.startswith("slice_") and name not in kept:
                    self._tried(partial(store.delete, name))

    def _tried(self, act: Callable[[], _T]) -> _T:
        """What `act` returns, tried again where the bucket is away."""
        for pause in PAUSES:
            try:
                return act()
            except Away:
                time.sleep(pause)
        try:
            return act()
        except Away as error:
            raise Fault(f"{error}; run the same command to go on") from error

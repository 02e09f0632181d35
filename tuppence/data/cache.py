"""Shards that are on a bucket, kept in a prepared folder while they are needed, in bounded space.

    bucket.json     {"url", "cache_bytes"} beside manifest.json
    open(shard)     whole and here? else fetched: aside ──▶ sha256 ──▶ renamed
    keep(now, soon) one thread brings what is not here yet, ahead of its use; where that takes room
                    the shards of neither go, those used longest ago first

Several processes may share the folder. Each shard has a lock, for whoever fetches or deletes it,
and the folder has one for whoever takes or gives room; one that is killed holds none. The shards of
the val split are small, and stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuppence import config
from tuppence.data.shards import (
    HEADER_BYTES,
    Manifest,
    Shard,
    Tokens,
    check_sizes,
    open_shard,
    token_dtype,
)
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256, locked, try_lock
from tuppence.store import Away, Store

BUCKET = "bucket.json"
ASIDE = ".fetching"  # in the folder: locks, and what has not arrived whole yet
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)  # in all less than a watchdog's patience
DAMAGED_TRIES = 2
LAST_SECONDS = 2.0  # for the thread to end: one that waits for the network ends with the process


@dataclass(frozen=True)
class Bucket:
    """Where the shards of a folder are, and how much of the disk those brought here may take."""

    url: str
    cache_bytes: int


class _Damaged(Away):
    """An object arrived that is not what the manifest says."""


def load_bucket(folder: Path) -> Bucket | None:
    """What the folder's bucket.json says; None where all shards are in the folder itself."""
    path = folder / BUCKET
    if not path.exists():
        return None
    try:
        return config.from_json(Bucket, path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise Fault(f"{path} is damaged: {error}; re-run prepare") from None


def to_stderr(text: str) -> None:
    """A line for the person, where nobody else is there to say it."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Cache:
    """The shards of one folder, fetched when they are wanted. `say` gets what a person should
    know: that the network is away and back, and that cache_bytes is too little."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        bucket: Bucket,
        *,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        self.folder, self.bucket, self._say = folder, bucket, say
        self._manifest = manifest
        self._train = [shard for shard in manifest.of_split("train") if shard.tokens]
        self._val_bytes = sum(map(self.bytes_of, manifest.of_split("val")))
        self._needed: frozenset[str] = frozenset()
        self._limit = bucket.cache_bytes
        self._store: Store | None = None
        self._making_store = threading.Lock()
        self._said_little = False
        self._changed = threading.Condition()
        self._soon: list[Shard] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def bytes_of(self, shard: Shard) -> int:
        """What a shard takes on disk."""
        return HEADER_BYTES + shard.tokens * token_dtype(self._manifest.vocab_size).itemsize

    def open(self, shard: Shard) -> Tokens:
        """The shard's tokens, mapped; waits for them where they are not here yet.

        Raises Fault where they cannot be had: at once where that will not change by itself.
        """
        damaged = away = 0
        while True:
            try:
                found = self._opened(shard)
                break
            except _Damaged as error:
                damaged += 1
                if damaged == DAMAGED_TRIES:
                    raise Fault(f"{error}; send it there again") from None
            except Away as error:
                if away == len(RETRY_SECONDS) or _lasting(error):
                    raise Fault(f"{error}; run the same command to go on") from error
                if not away:
                    self._say(f"{error}; tried again until it works")
                if self._closing.wait(RETRY_SECONDS[away]):
                    raise
                away += 1
            except OSError as error:  # of this machine's disk
                raise Fault(
                    f"{self._path(shard)}: {error}; run the same command to go on"
                ) from None
        if away:
            self._say(f"{self.bucket.url} answers again")
        return found

    def keep(self, now: Sequence[Shard], soon: Sequence[Shard]) -> None:
        """These are in use, and these come next. The thread begins to bring what is not here."""
        needed = {shard.file: shard for shard in (*now, *soon)}
        least = self._val_bytes + sum(map(self.bytes_of, needed.values()))
        if least > self.bucket.cache_bytes and not self._said_little:
            self._said_little = True
            self._say(
                f"cache_bytes={self.bucket.cache_bytes:,} is less than the {least:,} bytes of what "
                f"is read now and next: that much of {self.folder} is used"
            )
        self._needed, self._limit = frozenset(needed), max(least, self.bucket.cache_bytes)
        for shard in needed.values():
            self._touch(shard)
        with self._room():
            self._make_room(0)
        with self._changed:
            # from its end: whoever reads begins at the other, and two fetch twice as fast
            self._soon = [*reversed(now), *(s for s in soon if s not in now)]
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shards", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread, and whatever waits for a network."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        """Bring what comes next, for as long as it takes."""
        pauses = itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1]))
        while (shard := self._next()) is not None:
            try:
                if not self._is_here(shard):
                    self._opened(shard)
            except Exception as error:  # where it lasts, whoever opens the shard hears of it
                if isinstance(error, Away) and not _lasting(error):
                    self._closing.wait(next(pauses))
                    continue
            pauses = itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1]))
            with self._changed:
                self._soon = [other for other in self._soon if other != shard]

    def _next(self) -> Shard | None:
        with self._changed:
            self._changed.wait_for(lambda: self._soon or self._closing.is_set())
            return None if self._closing.is_set() else self._soon[0]

    # ------------------------------------------------------------ a shard

    def _opened(self, shard: Shard) -> Tokens:
        """Mapped while nobody may delete it, and fetched before, where it has to be. One try."""
        lock = self._aside(shard, ".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, on_wait=lambda: None):
            if not self._is_here(shard):
                self._fetch(shard)
            self._touch(shard)
            return open_shard(self._path(shard))

    def _is_here(self, shard: Shard) -> bool:
        """Whether it is here, and as long as it should be: its content was verified on arrival."""
        try:
            check_sizes(self.folder, dataclasses.replace(self._manifest, shards=[shard]))
        except (Fault, FileNotFoundError):  # the second: it was deleted just now
            return False
        return True

    def _fetch(self, shard: Shard) -> None:
        aside = self._aside(shard)
        aside.unlink(missing_ok=True)  # a killed process left it
        with self._room():
            if shard.split == "train":  # the room of val is never another's
                self._make_room(self.bytes_of(shard))
            aside.touch()  # it counts as the whole from here on
        try:
            self._bring(shard, aside)
            with self._room():
                self._path(shard).parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside, self._path(shard))
        finally:
            aside.unlink(missing_ok=True)

    def _bring(self, shard: Shard, aside: Path) -> None:
        """Fetch and verify; flushed to disk, so that a power cut leaves no shard half there."""
        try:
            self._bucket().fetch(shard.file, aside)
        except FileNotFoundError:
            raise Fault(
                f"{self.bucket.url}/{shard.file} is not there, though the manifest names it; send "
                f"the prepared folder again"
            ) from None
        sha256, size = file_sha256(aside), aside.stat().st_size
        if sha256 != shard.sha256:
            raise _Damaged(
                f"{self.bucket.url}/{shard.file} is damaged: {size:,} bytes with sha256 "
                f"{sha256[:12]} instead of {shard.sha256[:12]}"
            )
        with aside.open("rb+") as content:
            os.fsync(content.fileno())

    def _bucket(self) -> Store:
        with self._making_store:
            self._store = self._store or Store(self.bucket.url)
            return self._store

    def _touch(self, shard: Shard) -> None:
        """It is in use, also in the eyes of other processes."""
        with contextlib.suppress(FileNotFoundError):  # it is not here, or just was
            os.utime(self._path(shard))

    def _path(self, shard: Shard) -> Path:
        return self.folder / shard.file

    def _aside(self, shard: Shard, ending: str = "") -> Path:
        return self.folder / ASIDE / f"{shard.file}{ending}"

    # ------------------------------------------------------------ room

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Nobody else takes or gives room meanwhile."""
        (self.folder / ASIDE).mkdir(exist_ok=True)
        with locked(self.folder / ASIDE / "room.lock", on_wait=lambda: None):
            yield

    def _make_room(self, size: int) -> None:
        """Delete what is not needed, used longest ago first, until so many bytes more fit in."""
        here = {shard: used for shard in self._train if (used := self._last_used(shard))}
        coming = [shard for shard in self._train if self._is_coming(shard)]
        taken = self._val_bytes + sum(map(self.bytes_of, (*here, *coming)))
        for shard in sorted(here, key=lambda shard: here[shard]):
            if taken + size <= self._limit:
                return
            if shard.file not in self._needed and self._deleted(shard, self._path(shard)):
                taken -= self.bytes_of(shard)

    def _last_used(self, shard: Shard) -> float | None:
        try:
            return self._path(shard).stat().st_mtime
        except FileNotFoundError:
            return None

    def _is_coming(self, shard: Shard) -> bool:
        """Whether a process fetches it now; what a killed one left aside is deleted."""
        aside = self._aside(shard)
        return aside.exists() and not self._deleted(shard, aside)

    def _deleted(self, shard: Shard, path: Path) -> bool:
        """Whether the file could be deleted: not while anyone fetches or opens the shard."""
        lock = self._aside(shard, ".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+b") as file:
            if not try_lock(file):
                return False
            try:
                path.unlink(missing_ok=True)
            except PermissionError:  # Windows, while it is mapped
                return False
            return True


def _lasting(error: Away) -> bool:
    """Whether waiting is of no use: a damaged object, a full disk, nothing to be let in with."""
    cause = error.__cause__
    full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
    refused = isinstance(cause, PermissionError) or "Credential" in type(cause).__name__
    return isinstance(error, _Damaged) or full or refused

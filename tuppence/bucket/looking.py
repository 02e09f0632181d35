"""A run on a bucket, looked at again and again: each time only what is new is brought.

    metrics.jsonl there   ├────────── here already ──────────┤── new ──┤
                                                        ├─┤ the same?

An object cannot be appended to, so lines are sent whole each time; but they only grow. They are
brought from where the copy here ends, with the last bytes before it: where those are others, it is
another file, which comes whole. What has the tag that it had is not brought at all.

To be watched over a telephone's network a month of steps is too much: of a file that is big when it
is first seen only pieces are brought, evenly spread, and its end.
"""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuppence.bucket.layout import (
    KEPT,
    OWNER,
    PREFIX,
    Identity,
    document,
    documents,
    identity_of,
    look,
)
from tuppence.errors import UserError
from tuppence.folder import RunFolder, write_text
from tuppence.store import Changed, Entry, Store

BROUGHT = ".brought.json"  # what each document here was on the bucket: tag and sizes
OVERLAP_BYTES = 1024
PIECES = {"metrics.jsonl": 64, "events.jsonl": 0}  # of those that may come thinned, how many
PIECE_BYTES = 8 << 10
END_BYTES = 256 << 10
AT_ONCE = 8
UNSEEN = (".html", ".md")  # what a screen has no use for
UNLISTED = ("metrics.jsonl", "samples.jsonl")  # nor a list of runs


class Onlooker:
    """Keeps a copy of a run's documents in `folder`: what a screen shows, or a line of a list."""

    def __init__(self, url: str, path: Path, *, brief: bool = False) -> None:
        """`brief`: without the lines of steps. Raises UserError where the bucket is not usable."""
        self.url, self.folder, self.brief = url, RunFolder(path), brief
        self.store = Store(url)
        self.store.reach()

    def look(self) -> RunFolder:
        """Bring what is new. Raises Away where that cannot be done now, UserError where there is
        no such run."""
        owner = identity_of(document(self.store.read(OWNER)))
        head = None if owner is None else self._head(owner)
        if head is None:
            raise UserError(f"no run {self.url.rpartition('/')[2]!r} on {self.url}")
        prefix, there = head
        self.folder.path.mkdir(parents=True, exist_ok=True)
        bring(self.folder, self.store, prefix, self._wanted(there), thin=not self.brief)
        if not self.brief:
            _best(self.folder, self.store.read(f"{prefix}/checkpoints/best.json"))
        return self.folder

    def _head(self, owner: Identity) -> tuple[str, dict[str, Entry]] | None:
        """The newest attempt whose documents are whole, and what lies directly below it."""
        there = self._below(owner.prefix)
        if "run.json" in there:
            return owner.prefix, there
        remote = look(self.store)  # an attempt that has just begun
        older = remote.head() if remote else None
        return None if older is None else (older, self._below(older))

    def _below(self, prefix: str) -> dict[str, Entry]:
        found = self.store.entries(prefix, depth=1)
        return {name.removeprefix(f"{prefix}/"): entry for name, entry in found.items()}

    def _wanted(self, there: dict[str, Entry]) -> dict[str, Entry]:
        return {
            name: entry
            for name, entry in there.items()
            if not name.endswith(UNSEEN) and not (self.brief and name in UNLISTED)
        }


def runs_below(store: Store) -> list[str]:
    """Names of the folders that hold a run."""
    names = store.folders()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        owned = list(pool.map(lambda name: store.read(f"{name}/{OWNER}") is not None, names))
    return [name for name, is_run in zip(names, owned, strict=True) if is_run]


def bring(
    folder: RunFolder, store: Store, prefix: str, there: dict[str, Entry], *, thin: bool = False
) -> None:
    """Make the documents here those of an attempt; what it has not is not here either."""
    assert PREFIX.fullmatch(prefix), prefix
    folder.close()  # lines that are open would go on in the old file
    found = {name: entry for name, entry in there.items() if name != KEPT}
    known = _known(folder)
    for name in documents(folder).keys() - found.keys():
        folder.file(name).unlink()
    brought = {}
    for name in [n for n in found if n != "run.json"] + [n for n in found if n == "run.json"]:
        pieces = PIECES.get(name) if thin else None
        one = _Document(store, f"{prefix}/{name}", folder.file(name), found[name], pieces)
        brought[name] = one.brought(known.get(name))
    if brought != known:
        write_text(folder.file(BROUGHT), json.dumps(brought))


class _Document:
    """One document: there, and here. `pieces` None: it comes whole."""

    def __init__(
        self, store: Store, name: str, local: Path, entry: Entry, pieces: int | None
    ) -> None:
        self.store, self.name, self.local, self.entry = store, name, local, entry
        self.pieces = pieces

    def brought(self, known: Any) -> list[Any]:
        """Bring what is not here; gives tag, bytes there and bytes here, as `known` was before."""
        tag, size = self.entry.tag, self.entry.bytes
        with contextlib.suppress(FileNotFoundError, TypeError, ValueError, Changed):
            old_tag, old_bytes, here = known
            if self.local.stat().st_size == here:
                if tag and (tag, size) == (old_tag, old_bytes):
                    return list(known)
                if self.local.suffix == ".jsonl" and self._appended(old_bytes):
                    return self._now(tag, size)
        self.local.parent.mkdir(parents=True, exist_ok=True)
        if self.pieces is not None and size > END_BYTES + self.pieces * PIECE_BYTES:
            self._replace(lambda aside: aside.write_bytes(self._thinned()))
            return self._now(tag, size)
        self._replace(lambda aside: self.store.fetch(self.name, aside))
        came = self.local.stat().st_size
        return self._now(tag if came == size else "", came)  # it may be another by now

    def _now(self, tag: str, size: int) -> list[Any]:
        return [tag, size, self.local.stat().st_size]

    def _replace(self, write: Callable[[Path], object]) -> None:
        aside = self.local.with_name(f".{self.local.name}.fetch")
        write(aside)
        os.replace(aside, self.local)

    def _appended(self, old_bytes: int) -> bool:
        """Bring the lines after the first `old_bytes`; False where it is not what was here."""
        with self.local.open("rb+") as lines:
            end = lines.seek(0, os.SEEK_END)
            lines.seek(end - min(end, old_bytes, OVERLAP_BYTES))
            last = lines.read()
            if not last or self.entry.bytes < old_bytes:
                return False
            new = self._range(old_bytes - len(last), self.entry.bytes)
            if not new.startswith(last) or not new.endswith(b"\n"):
                return False
            lines.write(new[len(last) :])
        return True

    def _thinned(self) -> bytes:
        """Whole lines of the pieces, and all of the end."""
        assert self.pieces is not None
        last = self.entry.bytes - END_BYTES
        starts = [last * number // self.pieces for number in range(self.pieces)]
        spans = [(start, start + PIECE_BYTES) for start in starts] + [(last, self.entry.bytes)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(lambda span: self._range(*span), spans))
        return b"".join(
            piece[piece.find(b"\n") + 1 if start else 0 : piece.rfind(b"\n") + 1]
            for (start, _), piece in zip(spans, found, strict=True)
        )

    def _range(self, start: int, stop: int) -> bytes:
        found = self.store.read_range(self.name, start, stop, self.entry.tag)
        if len(found) != stop - start:
            raise Changed(f"{self.name} did not arrive whole")
        return found


def _known(folder: RunFolder) -> dict[str, Any]:
    """What was brought before; nothing where that is not known."""
    try:
        found = document(folder.file(BROUGHT).read_bytes())
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _best(folder: RunFolder, pointer: bytes | None) -> None:
    """Which checkpoint is the best, without its weights."""
    path = folder.checkpoints / "best.json"
    if pointer is None:
        path.unlink(missing_ok=True)
    elif document(pointer) is not None:
        folder.checkpoints.mkdir(exist_ok=True)
        write_text(path, pointer.decode())

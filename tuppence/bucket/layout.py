"""What lies where on the bucket, and which attempt's it is.

    NAME/attempt.json                          whose the run is now: {"attempt", "token"}
    NAME/a00002-1f2e3d4c/                      all that attempt 2 wrote: a run folder of its own
        run.json plan.json metrics.jsonl ...   run.json is sent last: then the documents are whole
        kept.json                              the checkpoints that the run keeps
        checkpoints/step_00001000/...          checkpoint.json is sent last: with it, it is complete
        checkpoints/last.json best.json
        checkpoints/.step_00001000.a2....      parts on their way to the lead's machine: relay.py

**An attempt writes only below its own name, but for attempt.json.** So a writer that should be dead
can spoil nothing of its successor's, whenever it wakes, though no store that is meant here can
compare and write in one request. Whose the run is, is read before every marker, pointer, document
and deletion; that only makes such a writer stop soon.
"""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from tuppence.folder import RunFolder
from tuppence.store import Store

OWNER = "attempt.json"
MARKER = "checkpoint.json"
KEPT = "kept.json"
NOTE = "bucket.json"  # in the local folder: what restore left on the bucket
POINTERS = ("last", "best")
SUFFIXES = (".json", ".jsonl", ".txt", ".md", ".html")
PREFIX = re.compile(r"a(\d{5,})-(\w{1,8})")
STEP = re.compile(r"step_\d{8,}")


class Damaged(Exception):
    """A checkpoint that is not what its marker says."""


@dataclass(frozen=True)
class Identity:
    """One attempt; the token tells apart two that took the same number."""

    attempt: int
    token: str

    @property
    def prefix(self) -> str:
        return f"a{self.attempt:05d}-{self.token[:8]}"


@dataclass(frozen=True)
class Entry:
    """What a marker says of one file."""

    sha256: str
    bytes: int


def identity_of(content: Any) -> Identity | None:
    """From attempt.json's content, or None where it says nothing."""
    try:
        return Identity(int(content["attempt"]), str(content["token"]))
    except (TypeError, KeyError, ValueError):
        return None


def document(content: bytes | None) -> Any:
    """A small JSON object, or None where there is none or half of one."""
    try:
        return None if content is None else json.loads(content)
    except ValueError:
        return None


def entries(marker: bytes) -> dict[str, Entry]:
    """The files of a checkpoint. Raises Damaged."""
    try:
        files = json.loads(marker)["files"]
        found = {name: Entry(str(e["sha256"]), int(e["bytes"])) for name, e in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged(f"{MARKER} is not what a save writes") from None
    if not found or any(name != Path(name).name for name in found):
        raise Damaged(f"{MARKER} names no files, or files elsewhere")
    return found


def weights_sha256(files: dict[str, Entry]) -> str:
    """What a pointer holds: the one file's hash, or the hash over the shards' hashes."""
    names = sorted(name for name in files if name.startswith("model"))
    if len(names) == 1:
        return files[names[0]].sha256
    return hashlib.sha256("".join(files[name].sha256 for name in names).encode()).hexdigest()


def step_of(name: str) -> int:
    """The step of a checkpoint's name."""
    return int(name[len("step_") :])


def age(marker: bytes | None, name: str, *, sent_by: int = 0) -> tuple[int, int]:
    """(attempt that made it, step): checkpoints go by this order, as `checkpoint.by_age` does.

    An attempt that passed over a damaged step 1000 went on from 500: its 600 is the newer. A marker
    that does not tell is taken for the sender's own, so that it is looked at and spoken of.
    """
    said = document(marker)
    attempt = said.get("attempt") if isinstance(said, dict) else None
    return attempt if isinstance(attempt, int) else sent_by, step_of(name)


def attempt_of(prefix: str) -> int:
    """The attempt's number in its prefix."""
    return int(prefix[1:].partition("-")[0])


def local_checkpoints(folder: RunFolder) -> list[Path]:
    """Complete ones here, newest first."""
    found = {}
    for marker in folder.checkpoints.glob(f"step_*/{MARKER}"):
        with contextlib.suppress(FileNotFoundError):  # deleted just now
            if STEP.fullmatch(marker.parent.name):
                found[marker.parent] = age(marker.read_bytes(), marker.parent.name)
    return sorted(found, key=found.__getitem__, reverse=True)


def documents(folder: RunFolder) -> dict[str, tuple[int, int]]:
    """Size and time of every small file, by its name below the folder."""
    top = (p for p in folder.path.glob("*") if p.suffix in SUFFIXES)
    found = {}
    for path in [*top, *folder.tokenizer.rglob("*")]:
        hidden = path.name.startswith(".") or path.name in (OWNER, NOTE)
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not hidden:
                stat = path.stat()
                name = path.relative_to(folder.path).as_posix()
                found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def left_there(folder: RunFolder) -> dict[str, str]:
    """Checkpoints that are only on the bucket, as restore noted: the attempt's prefix by name."""
    note = folder.read_json(NOTE)
    return dict(note["left"]) if note else {}


@dataclass(frozen=True)
class Remote:
    """A run on the bucket, as one listing shows it."""

    store: Store
    owner: Identity
    objects: dict[str, int]

    def prefixes(self) -> list[str]:
        """Of all attempts that wrote something: the owner's, then from the newest to the oldest."""
        found = {name.partition("/")[0] for name in self.objects}
        mine = self.owner.prefix
        return sorted(filter(PREFIX.fullmatch, found), key=lambda p: (p == mine, p), reverse=True)

    def head(self) -> str | None:
        """The newest attempt whose documents are whole."""
        whole = (p for p in self.prefixes() if f"{p}/run.json" in self.objects)
        return next(whole, None)

    def documents(self, prefix: str) -> list[str]:
        """Names, relative to the attempt's, of what is no checkpoint and stays below a folder."""
        inside = [n.removeprefix(f"{prefix}/") for n in self.objects if n.startswith(f"{prefix}/")]
        plain = (n for n in inside if ".." not in PurePosixPath(n).parts)
        return sorted(n for n in plain if not n.startswith("checkpoints/") and n != KEPT)

    def parts(self, prefix: str, inside: str) -> list[str]:
        """Where a file of a checkpoint came first, from a machine beside the lead's (relay.py)."""
        _, checkpoint, file = inside.split("/")
        start, end = f"{prefix}/checkpoints/.{checkpoint}.", f"/{file}"
        return [name for name in self.objects if name.startswith(start) and name.endswith(end)]

    @cached_property
    def checkpoints(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Each complete one's age by (attempt's prefix, name), newest first.

        Of what one attempt made, copies that a later one sent come first.
        """
        prefixes = self.prefixes()
        ages = {}
        for prefix in prefixes:
            for name in self._complete(prefix):
                marker = self.store.read(f"{prefix}/checkpoints/{name}/{MARKER}")
                ages[prefix, name] = age(marker, name, sent_by=attempt_of(prefix))

        def order(key: tuple[str, str]) -> tuple[int, int, int]:
            attempt, step = ages[key]
            return -attempt, prefixes.index(key[0]), -step

        return {key: ages[key] for key in sorted(ages, key=order)}

    def _complete(self, prefix: str) -> list[str]:
        start, end = f"{prefix}/checkpoints/", f"/{MARKER}"
        found = [n for n in self.objects if n.startswith(start) and n.endswith(end)]
        return list(filter(STEP.fullmatch, (n[len(start) : -len(end)] for n in found)))

    def read(self, name: str) -> Any:
        """A small JSON document, or None."""
        return document(self.store.read(name)) if name in self.objects else None


def look(store: Store) -> Remote | None:
    """The run at this place, or None where there is none."""
    owner = identity_of(document(store.read(OWNER)))
    return None if owner is None else Remote(store, owner, store.find())

"""One file that text is read from, wherever it lies, and what its name tells of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from tuppence.errors import Fault

KINDS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "xz", "zst")
SUFFIXES = {
    "txt": "txt",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "parquet": "parquet",
}
MOST_NAMED = 12  # names in a message
MOST_NAME = 60  # characters of one


@dataclass(frozen=True)
class InputFile:
    """A file to read: `path` is a local path or a URL, `shown` its name in messages and manifests.

    `kind` is one of KINDS; `compression` one of COMPRESSIONS or "". `bytes` is its size as it
    lies there. `identity` says what its content is, as the place tells it without being read
    (a Hub's sha256, an ETag); "" for a local file, which is hashed where that matters. Then
    `modified_ns` says when it was last written to.
    """

    path: str
    shown: str
    kind: str
    compression: str
    bytes: int
    identity: str = ""
    modified_ns: int | None = None

    @property
    def remote(self) -> bool:
        """Whether it lies on another machine."""
        return "://" in self.path


def check_unchanged(file: InputFile) -> None:
    """Raises Fault where a local file that was hashed is not the same any more."""
    if file.modified_ns is None:
        return
    try:
        found = os.stat(file.path)
    except OSError as error:
        raise Fault(f"{file.shown}: gone since it was hashed ({error.strerror})") from None
    if (found.st_size, found.st_mtime_ns) != (file.bytes, file.modified_ns):
        changed = f"it has {found.st_size:,} bytes, and had {file.bytes:,}"
        what = changed if found.st_size != file.bytes else "it was written to"
        raise Fault(
            f"{file.shown} is not what it was when it was hashed: {what}; run this again when it "
            "is written to no more"
        )


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) told from a file's name, or None where it is of no kind known here.

    What is called `.json` is read as JSONL, as most of it on the Hub is.
    """
    parts = name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS else ""
    kind = SUFFIXES.get(parts[-1]) if len(parts) > 1 else None
    return (kind, compression) if kind else None


def suffix_of(name: str) -> str:
    """What a file's name ends in, for people: `.md`, or `.md.gz` where it is packed."""
    parts = name.rpartition("/")[2].lower().split(".")[1:]
    packed = len(parts) > 1 and parts[-1] in COMPRESSIONS
    return "".join(f".{part}" for part in parts[-2 if packed else -1 :]) or "without a suffix"


def some_of(names: Iterable[str]) -> str:
    """The first of them, in one line, and how many more there are."""
    every = [" ".join(name.split())[:MOST_NAME] for name in names]
    more = f" and {len(every) - MOST_NAMED:,} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + more

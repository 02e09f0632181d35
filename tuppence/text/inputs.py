"""One file that text is read from, wherever it lies, and what its name tells of it."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "xz", "zst")
SUFFIXES = {"txt": "txt", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """A file to read: `path` is a local path or a URL, `shown` its name in messages and manifests.

    `kind` is one of KINDS; `compression` one of COMPRESSIONS or "". `bytes` is its size as it
    lies there. `identity` says what its content is, as the place tells it without being read
    (a Hub's sha256, an ETag); "" for a local file, which is hashed where that matters.
    """

    path: str
    shown: str
    kind: str
    compression: str
    bytes: int
    identity: str = ""

    @property
    def remote(self) -> bool:
        """Whether it lies on another machine."""
        return "://" in self.path


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) told from a file's name, or None where it is of no kind known here.

    What is called `.json` is read as JSONL, as most of it on the Hub is.
    """
    parts = name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS else ""
    kind = SUFFIXES.get(parts[-1]) if len(parts) > 1 else None
    return (kind, compression) if kind else None

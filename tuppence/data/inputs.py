"""One file that text is read from, wherever it lies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputFile:
    """A file to read: `path` is a local path or a URL, `shown` its name in messages and manifests.

    `kind` is txt, jsonl or parquet; `compression` gz, xz, zst or "". `bytes` is its size as it
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

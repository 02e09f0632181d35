"""The ends of files that grow: what was written since the last look, and nothing else."""

import json
import os
from pathlib import Path
from typing import Any

from tuppence.errors import Fault


class Replaced(Exception):
    """Another file stands there now; what was made of the lines before is no longer true."""


class Tail:
    """The complete lines of one file, each given once; at most the last `within` bytes of what is
    new (None: all of it)."""

    def __init__(self, path: Path, *, within: int | None = None) -> None:
        self.path, self.within = path, within
        self._offset, self._file = 0, 0

    def rows(self) -> list[dict[str, Any]]:
        """What is new. Raises Fault naming the file where a line is damaged, Replaced."""
        try:
            lines = self.path.open("rb")
        except FileNotFoundError:
            if self._offset:
                raise Replaced from None
            return []
        with lines:
            size, number = _stat(lines.fileno())
            if self._offset and (number != self._file or size < self._offset):
                raise Replaced
            self._file = number
            if size == self._offset:
                return []
            skipped = self.within is not None and size - self._offset > self.within
            start = size - (self.within or 0) if skipped else self._offset
            lines.seek(start)
            new = lines.read(size - start)
        whole = new.rfind(b"\n") + 1  # a torn last line is no line yet
        self._offset = start + whole
        cut = new.find(b"\n", 0, whole) + 1 if skipped else 0  # it begins inside a line
        return [self._row(line) for line in new[cut:whole].splitlines()]

    def _row(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            raise Fault(f"{self.path} is damaged: a line is not JSON") from None
        if not isinstance(row, dict):
            raise Fault(f"{self.path} is damaged: a line is no object")
        return row


def _stat(handle: int) -> tuple[int, int]:
    """A file's size and its number on the disk."""
    found = os.fstat(handle)
    return found.st_size, found.st_ino

"""What a model has answered, a line an item: task, item, nats, tokens, greedy, judged.

The first line is the identity of whoever was asked, and of what, and the file's name has 8 digits
of its hash: what is asked in between, of another model or of other items, has a journal of its own.
A line is appended whole; a kill leaves a torn last one at most, which is cut off, and its item is
asked again, as is that of a line whose checksum is not its own.
"""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tuppence.errors import Fault, UserError
from tuppence.evals.items import Answer, Judged
from tuppence.files import try_lock, write_whole

VERSION = 1

Key = tuple[str, int]  # a task's label, an item's number
Row = dict[str, Any]


class Journal:
    """Of one identity; `open` makes sure that one process at a time has it.

    `path` is given without the identity's digits: suite.jsonl becomes suite.1a2b3c4d.jsonl.
    """

    def __init__(self, path: Path, identity: Row, say: Callable[[str], None]) -> None:
        head = {"journal": VERSION, **identity}
        digits = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:8]
        self.path = path.with_name(f"{path.stem}.{digits}{path.suffix}")
        self.say, self.head = say, json.loads(json.dumps(head))
        self._lines: BinaryIO | None = None
        self._lock: BinaryIO | None = None

    def open(self) -> dict[Key, Judged]:
        """What it holds already.

        Raises UserError where another process has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.path.with_name(f".{self.path.name}.lock").open("ab")
        if not try_lock(self._lock):
            self._lock.close()
            raise UserError(f"{self.path}: another process is evaluating; wait, or say --out DIR")
        rows = self._rows()
        self._lines = self.path.open("ab", buffering=0)
        return {(row["task"], row["item"]): row["judged"] for row in rows}

    def add(self, key: Key, answers: list[Answer], judged: Judged) -> None:
        """Append an item's answers, and what was made of them."""
        assert self._lines is not None
        row = {
            "task": key[0],
            "item": key[1],
            "nats": [answer.nats for answer in answers],
            "tokens": [answer.tokens for answer in answers],
            "greedy": [answer.greedy for answer in answers],
            "judged": judged,
        }
        line = _line(row)
        if self._lines.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Let others have it."""
        for file in (self._lines, self._lock):
            if file is not None:
                file.close()

    def _rows(self) -> list[Row]:
        """The rows that are whole; what else the file holds is taken out of it."""
        content = self.path.read_bytes() if self.path.exists() else b""
        *whole, torn = content.split(b"\n")
        rows = [_row(line) for line in whole[1:]]
        good = [row for row in rows if row is not None]
        if whole and _object(whole[0]) != self.head:
            self.say(f"{self.path}: its first line is damaged; all its items are asked anew")
            whole, good = [], []
        elif damaged := len(rows) - len(good):
            self.say(f"{self.path}: {damaged} damaged line(s) left out; their items are asked anew")
        if torn or not whole or len(good) < len(rows):
            head = json.dumps(self.head, separators=(",", ":")).encode() + b"\n"
            write_whole(self.path, head + b"".join(map(_line, good)))
        return good


def head_of(path: Path) -> Row:
    """A journal's first line; nothing where it is damaged."""
    return _object(path.read_bytes().split(b"\n", 1)[0]) or {}


def rows_of(path: Path) -> Iterator[Row]:
    """Every whole line of a journal but the first. Raises Fault where there is no such file."""
    if not path.exists():
        raise Fault(f"{path}: no such journal; evaluate again")
    for line in path.read_bytes().split(b"\n")[1:-1]:
        if (row := _row(line)) is not None:
            yield row


def set_aside(path: Path) -> Path:
    """Give a file the first free name of NAME.1, NAME.2, ..."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _line(row: Row) -> bytes:
    """With a checksum of all the rest."""
    whole = row | {"crc32": _checksum(row)}
    return json.dumps(whole, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _checksum(row: Row) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _object(line: bytes) -> Row | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _row(line: bytes) -> Row | None:
    """A line as it was written; None where it is not."""
    row = _object(line)
    return row if row is not None and row.pop("crc32", None) == _checksum(row) else None

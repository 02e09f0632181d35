"""What a model has answered, a line an item: task, item, nats, tokens, greedy, judged.

The first line is the identity of whoever was asked, and of what. A line is appended whole; a kill
leaves a torn last one at most, which is cut off, and its item is asked again.
"""

import errno
import json
import os
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
    """Open for one process at a time, which `open` makes sure of."""

    def __init__(self, path: Path, identity: Row, say: Callable[[str], None]) -> None:
        head = {"journal": VERSION, **identity}
        self.path, self.say, self.head = path, say, json.loads(json.dumps(head))
        self._lines: BinaryIO | None = None
        self._lock: BinaryIO | None = None

    def open(self) -> dict[Key, Judged]:
        """What it holds of the same identity; of another it is set aside, and begun anew.

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
        """The rows that count; what else the file holds is taken out of it or set aside."""
        content = self.path.read_bytes() if self.path.exists() else b""
        *whole, torn = content.split(b"\n")
        rows = [_row(line) for line in whole[1:]]
        good = [row for row in rows if row is not None]
        if whole and _object(whole[0]) != self.head:
            aside = set_aside(self.path)
            self.say(f"{self.path} was of another model or suite; it is kept as {aside.name}")
            whole, good = [], []
        elif damaged := len(rows) - len(good):
            self.say(f"{self.path}: {damaged} damaged line(s) left out; their items are asked anew")
        if torn or not whole or len(good) < len(rows):
            write_whole(self.path, b"".join(map(_line, [self.head, *good])))
        return good


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
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _object(line: bytes) -> Row | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _row(line: bytes) -> Row | None:
    """A line as it was written; None where it is not."""
    kinds = {"task": str, "item": int, "nats": list, "judged": dict}
    row = _object(line)
    whole = row is not None and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
    return row if whole else None

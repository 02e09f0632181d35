"""A run's metrics as columns: a month of steps in a second or two, and what is new in no time.

    metrics.jsonl ──32 MB of whole lines──▶ pyarrow ──▶ numpy columns ──▶ the rows that count

A million steps are half a gigabyte of JSON; as Python objects they would be twice that again.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from tuppence.errors import Fault
from tuppence.folder import RunFolder, counts_until, gone_back

CHUNK_BYTES = 32 << 20
WHOLE = ("step", "attempt", "tokens")
REAL = (
    *("loss", "lr", "grad_norm", "step_seconds", "data_wait", "tokens_per_second", "mfu"),
    *("usd", "hours", "progress", "memory_gib"),
)
SCHEMA = pa.schema([(name, pa.int64()) for name in WHOLE] + [(name, pa.float64()) for name in REAL])


@dataclass(frozen=True)
class History:
    """The row that counts of each step, in the order of steps.

    `columns` are int64 (step, attempt, tokens) or float64 with nan where a row says nothing;
    `last` is the last row as it was written; `dropped` are the rows that do not count, in the order
    in which they were written: repeated after a kill, or gone back from.
    """

    columns: dict[str, np.ndarray]
    last: dict[str, Any]
    dropped: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def at(self, steps: Any, name: str) -> np.ndarray:
        """A column at these steps; nan at those that do not count."""
        there = self.columns["step"]
        wanted = np.asarray(steps, dtype=np.int64)
        places = np.minimum(np.searchsorted(there, wanted), max(0, len(there) - 1))
        if not len(there):
            return np.full(wanted.shape, np.nan)
        return np.where(there[places] == wanted, self.columns[name][places], np.nan)


class Reader:
    """Reads a run's metrics; again and again, each time only what was written since."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._blocks: list[dict[str, np.ndarray]] = []
        self._offset = 0
        self._last: dict[str, Any] = {}
        self._file: int | None = None

    def read(self) -> History:
        """The metrics as of now. Raises Fault naming the file where a line is damaged."""
        path = self.folder.file("metrics.jsonl")
        there = path.stat() if path.exists() else None
        if there is None or there.st_ino != self._file or there.st_size < self._offset:
            self._blocks, self._offset, self._last = [], 0, {}  # another file than before
            self._file = None if there is None else there.st_ino
        if there is not None:
            for lines in self._chunks():
                self._blocks.append(_parsed(lines, path))
                self._last = json.loads(lines[lines.rfind(b"\n", 0, len(lines) - 1) + 1 :])
        if len(self._blocks) > 1:
            self._blocks = [_joined(self._blocks)]
        every = self._blocks[0] if self._blocks else _empty()
        counts = _counts(every, counts_until(self.folder), gone_back(self.folder))
        dropped = {name: column[~counts] for name, column in every.items()}
        return History({n: c[counts] for n, c in every.items()}, self._last, dropped)

    def _chunks(self) -> Iterator[bytes]:
        """Whole lines from where the last reading ended; a torn last one is no line yet."""
        with self.folder.file("metrics.jsonl").open("rb") as lines:
            whole = 1
            while whole:
                lines.seek(self._offset)
                more = lines.read(CHUNK_BYTES)
                whole = more.rfind(b"\n") + 1
                if whole:
                    yield more[:whole]
                    self._offset += whole


def read(folder: RunFolder) -> History:
    """The metrics that count of a run. Raises Fault naming the file where a line is damaged."""
    return Reader(folder).read()


def _parsed(lines: bytes, path: Path) -> dict[str, np.ndarray]:
    options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
    try:
        table = pyarrow.json.read_json(pa.BufferReader(lines), parse_options=options)
    except (pa.ArrowException, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise Fault(f"{path} is damaged: {first}") from None
    for name in WHOLE:
        if table[name].null_count:
            raise Fault(f"{path} is damaged: a line has no {name}")
    return {name: table[name].to_numpy() for name in SCHEMA.names}  # what a row lacks is nan


def _empty() -> dict[str, np.ndarray]:
    return {name: np.empty(0, np.int64 if name in WHOLE else np.float64) for name in SCHEMA.names}


def _joined(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in SCHEMA.names}


def _counts(
    rows: dict[str, np.ndarray], until: dict[int, int], gone: Iterable[dict[str, Any]]
) -> np.ndarray:
    """Which rows count, by the rule of `RunFolder.latest`."""
    step, attempt = rows["step"], rows["attempt"]
    counts = np.ones(len(step), bool)
    for number in np.unique(attempt):
        later = [at for other, at in until.items() if other > number]
        if later:
            counts &= (attempt != number) | (step <= min(later))
    for event in gone:
        counts &= (step <= event["back_to"]) | ~(rows["usd"] <= event["usd"])
    kept = np.flatnonzero(counts)
    if len(kept) > 1:  # of those, each that no later one repeats or lies before
        least_after = np.minimum.accumulate(step[kept][::-1])[::-1]
        counts[kept[:-1][step[kept][:-1] >= least_after[1:]]] = False
    return counts

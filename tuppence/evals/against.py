"""Two results of one suite held against each other: the difference, and how far it may be off.

    paired      both answered the same items and their journals say which were right: what both got
                right or wrong drops out, and the error is of the items' differences (the normal
                form of McNemar's test)
    unpaired    the two errors added as squares: wider, since the same hard items count twice

Results of other items, or measured otherwise, are refused in one sentence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuppence.evals.identity import WHO, refuse
from tuppence.evals.journal import head_of, rows_of

Document = dict[str, Any]
Right = dict[str, dict[int, Mapping[str, Any]]]  # task, item, what was judged
COMPARED = {  # scores of a suite: the key of its error, and of what was judged
    "core": {"score": ("error", "correct")},
    "hellaswag": {"acc": ("error", "correct"), "acc_norm": ("error_norm", "correct_norm")},
}
SAME = {  # what two results of a suite must have in common
    "core": {"version": "version", "bundle_sha256": "bundle", "max_per_task": "--max-per-task"},
    "hellaswag": {"version": "version", "sha256": "rows", "n": "items asked"},
}


@dataclass(frozen=True)
class Result:
    """A result's document and the folder it is in, where the journal is that it names."""

    document: Document
    folder: Path


@dataclass(frozen=True)
class Difference:
    """Mine less the other's. `how` says what `error` is of; of a whole split there is none."""

    score: str
    mine: float
    other: float
    difference: float
    error: float | None
    how: str
    n: int


def refusal(name: str, mine: Document, other: Document) -> str | None:
    """Why these two results may not be compared."""
    if name == "bpb":
        return refuse(mine, other, unit="bpb")
    for key, told in SAME[name].items():
        if mine.get(key) != other.get(key):
            return f"of {told} one has {_short(mine.get(key))}, the other {_short(other.get(key))}"
    if name == "core" and [t["n"] for t in mine["tasks"]] != [t["n"] for t in other["tasks"]]:
        return f"one was cut short: {mine['n']:,} items against {other['n']:,}"
    if any(each[score] is None for each in (mine, other) for score in COMPARED[name]):
        return "one of them has no score, since it was cut short"
    return None


def differences(name: str, mine: Result, other: Result) -> list[Difference]:
    """Of every score that both have; `refusal` was asked before."""
    a, b = mine.document, other.document
    if name == "bpb":
        keys = ["bpb"] if refuse(a, b) else ["loss", "bpb"]
        how = "the same text, all of it" if a["tokens"] == a["of_tokens"] else "the same part"
        kept = [key for key in keys if a[key] is not None and b[key] is not None]
        return [
            Difference(key, a[key], b[key], a[key] - b[key], None, how, a["tokens"]) for key in kept
        ]
    rows = _right(mine), _right(other)
    found = []
    for score, (error, judged) in COMPARED[name].items():
        pairs = None if None in rows else _pairs(rows[0], rows[1], judged, a["n"])  # type: ignore[arg-type]
        if pairs is None:
            size, how = math.hypot(a[error], b[error]), "unpaired"
        else:
            size = _error(pairs, _weights(name, a))
            apart = sum(d != 0 for each in pairs.values() for d in each)
            how = f"paired, {apart:,} items apart"
        gap = a[score] - b[score]
        found.append(Difference(score, a[score], b[score], gap, size, how, a["n"]))
    return found


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else "none" if value is None else f"{value:,}"


def _right(result: Result) -> Right | None:
    """What was judged of each item that the result counts, by the journal that it was made of."""
    document = result.document
    path = result.folder / Path(document.get("journal") or ".").name
    if not path.is_file() or not _is_of(head_of(path), document):
        return None
    counted = {row["task"]: row["n"] for row in document.get("tasks", [])}
    found: Right = {}
    for row in rows_of(path):
        if row["item"] < counted.get(row["task"], document["n"]):
            found.setdefault(row["task"], {})[row["item"]] = row["judged"]
    return found


def _is_of(head: Document, document: Document) -> bool:
    """Whether a journal with this first line holds what the result counts."""
    subject, suite = head.get("subject", {}), head.get("suite", {})
    asked = suite | {key: subject.get(key) for key in WHO}
    return all(document.get(key) == value for key, value in asked.items())


def _pairs(a: Right, b: Right, judged: str, n: int) -> dict[str, list[int]] | None:
    """Of each item 1, 0 or -1; None where the journals are not of the same items."""
    if sum(map(len, a.values())) != n or {t: r.keys() for t, r in a.items()} != {
        t: r.keys() for t, r in b.items()
    }:
        return None
    return {
        task: [bool(row[judged]) - bool(b[task][item][judged]) for item, row in rows.items()]
        for task, rows in a.items()
    }


def _weights(name: str, document: Document) -> dict[str, float] | None:
    """How much of the score a task's accuracy is."""
    if name != "core":
        return None
    rows = document["tasks"]
    return {row["task"]: 1 / (1 - row["baseline"]) / len(rows) for row in rows}


def _error(pairs: Mapping[str, Sequence[int]], weights: dict[str, float] | None) -> float:
    """Of the weighted sum of the tasks' mean differences.

    Half an item more is counted of each kind, both right, both wrong, mine alone, the other's
    alone: that of a few none is apart does not say that none ever is (Agresti and Min 2005).
    """
    total = 0.0
    for task, each in pairs.items():
        n, apart = len(each) + 2, sum(d != 0 for d in each) + 1
        spread = apart / n - (sum(each) / n) ** 2
        total += (weights[task] if weights else 1.0) ** 2 * spread / n
    return math.sqrt(total)

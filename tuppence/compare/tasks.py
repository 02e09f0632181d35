"""Scores in tasks beside each other, as far as the errors of their differences tell them apart.

evals/against decides what may be compared, and how far a difference may be off.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from tuppence.compare.beside import Side
from tuppence.evals.against import COMPARED, Result, differences, refusal

Document = dict[str, Any]

ERRORS_APART = 1.96  # standard errors: nearer, the difference is within the noise
NAMES = {"core": "CORE", "hellaswag": "HellaSwag"}


def tasks(sides: Sequence[Side]) -> tuple[Document, list[Document]]:
    """Scores with their errors of every suite that was asked; why some say nothing together."""
    found: Document = {}
    warnings = []
    for suite, scores in COMPARED.items():
        there = _asked(sides, suite)
        if not any(there):
            continue
        rows = {}
        for score, (error, _) in scores.items():
            values = [each.document[score] if each else None for each in there]
            rows[score] = {
                "values": values,
                "errors": [each.document[error] if each else None for each in there],
                **_best_score(suite, score, there, values),
            }
        if why := _refused_tasks(sides, suite, there):
            rows = {key: row | {"best": None, "near": []} for key, row in rows.items()}
            message = f"{NAMES[suite]} is not compared: {why}"
            warnings.append({"code": "tasks_not_comparable", "message": message})
        found[suite] = rows
    return found, warnings


def _asked(sides: Sequence[Side], suite: str) -> list[Result | None]:
    """Each run's result: of `tuppence eval` where all that were asked have one, else the run's."""
    later = [[e for e in one.told["later"] if e["metric"] == suite] for one in sides]
    own = [one.told["tasks"].get(suite) for one in sides]
    if any(mine and not each for mine, each in zip(own, later, strict=True)):
        later = [[] for _ in sides]
    return [
        Result(each[-1], one.folder.file("evaluations") / each[-1]["checkpoint"])
        if each
        else Result(mine, one.folder.path)
        if mine
        else None
        for one, each, mine in zip(sides, later, own, strict=True)
    ]


def _refused_tasks(sides: Sequence[Side], suite: str, there: Sequence[Result | None]) -> str | None:
    asked = [(one.label, each) for one, each in zip(sides, there, strict=True) if each]
    for (a, first), (b, second) in itertools.combinations(asked, 2):
        if why := refusal(suite, first.document, second.document):
            return f"{a} and {b}: {why}"
    return None


def _best_score(
    suite: str, score: str, there: Sequence[Result | None], values: Sequence[float | None]
) -> Document:
    """The highest, and those that are no further from it than twice the difference's error; neither
    where two are the highest."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or known.count(max(known)) > 1:
        return {"best": None, "near": []}
    best = values.index(max(known))
    near = []
    for i, other in enumerate(there):
        winner = there[best]
        if i == best or other is None or winner is None or values[i] is None:
            continue
        if refusal(suite, winner.document, other.document):
            continue
        (apart,) = [d for d in differences(suite, winner, other) if d.score == score]
        if apart.error is not None and apart.difference <= ERRORS_APART * apart.error:
            near.append(i)
    return {"best": best, "near": near}

"""A suite asked of a model item by item; what was answered once is not asked again.

    tasks ───▶ waves     items 0..3 of every task, 4..15, ...: each asked together, by length
    answers ─▶ journal   a line an item, so that a killed evaluation goes on where it was
    waves ───▶ result    of the waves that are whole

The items of a task come in a shuffled order, so that the first n of every task are a fair sample:
a deadline costs precision and not fairness. How many cores and ranks there are and how many texts
share a pass change nothing but time, and need not be as they were when a journal was begun.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.evals.items import Judged, Task
from tuppence.evals.journal import Journal, Key
from tuppence.evals.score import answers
from tuppence.evals.subject import Subject
from tuppence.ranks import ALONE, Ranks

FIRST, TIMES, WIDEST = 4, 4, 256  # items of a task in a wave: what is asked lies in memory
CAUTION = 1.25  # times what a wave should take must be left: one that is cut short is lost whole

T = TypeVar("T")


def run(
    subject: Subject,
    tasks: Sequence[Task],
    *,
    journal: Path | None = None,
    suite: dict[str, Any] | None = None,
    batch: int | None = None,
    ranks: Ranks = ALONE,
    deadline: float = math.inf,
    tick: Callable[[], None] = lambda: None,
    told: Callable[[int, int], None] = lambda done, of: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Judged]]:
    """The first items of every task, as many of each, as they were judged; on all ranks the same.

    All items, unless the `deadline` (the lead's time.monotonic seconds) comes first. `suite` is
    what the items depend on; with the subject's identity it tells whose answers a journal holds,
    and how it is named beside `journal`. `told` hears of how many items the answers are there,
    `tick` is called between passes, and `say` gets what a person should know. Raises UserError
    where another process has the journal.
    """
    by_label = {task.label: task for task in tasks}
    kept = journal_of(journal, subject, suite, say) if journal is not None else None
    found = {} if kept is None else _known(kept, tasks, ranks)
    kept = kept if ranks.lead else None
    total, asked, whole, began = sum(task.count for task in tasks), 0, 0, time.monotonic()
    told(len(found), total)
    try:
        while stop := _stop(tasks, found, whole, asked, began, deadline, ranks):
            keys = _keys(tasks, whole, stop)
            new = [(key, by_label[key[0]].asks(key[1])) for key in keys if key not in found]
            for key, got in answers(
                subject, new, batch=batch, ranks=ranks, deadline=deadline, tick=tick
            ):
                found[key] = by_label[key[0]].judge(key[1], got)
                asked += 1
                if kept is not None:
                    kept.add(key, got, found[key])
                told(len(found), total)
            if any(key not in found for key in keys):
                break
            whole = stop
    finally:
        if kept is not None:
            kept.close()
    return {
        task.label: [found[task.label, n] for n in range(min(whole, task.count))] for task in tasks
    }


def journal_of(
    path: Path, subject: Subject, suite: dict[str, Any] | None, say: Callable[[str], None]
) -> Journal:
    """What such a subject answers to such a suite, in a file named after `path` and both."""
    return Journal(path, {"subject": subject.identity, "suite": suite or {}}, say)


def led(ranks: Ranks, name: str, do: Callable[[], T]) -> T:
    """What the lead does for all ranks, told as JSON; what stops it stops them all."""
    if ranks.world == 1:
        return do()

    def tried() -> dict[str, Any]:
        try:
            return {"done": do()}
        except (UserError, DoesNotFit, Fault) as error:
            return {"error": str(error), "exit": error.exit_code}

    heard = ranks.told(name, tried)
    if "error" not in heard:
        done: T = heard["done"]
        return done
    if ranks.lead:
        ranks.let_leave()
    else:
        ranks.leave()
    kind = next(k for k in (UserError, DoesNotFit, Fault) if k.exit_code == heard["exit"])
    raise kind(heard["error"])


def _known(kept: Journal, tasks: Sequence[Task], ranks: Ranks) -> dict[Key, Judged]:
    """What the lead's journal has of these tasks."""
    counts = {task.label: task.count for task in tasks}

    def rows() -> list[tuple[str, int, Judged]]:
        return [(*key, judged) for key, judged in kept.open().items()]

    heard = led(ranks, f"journal {kept.path.name}", rows)
    return {(label, n): judged for label, n, judged in heard if n < counts.get(label, 0)}


def _keys(tasks: Sequence[Task], first: int, stop: int) -> list[Key]:
    return [(task.label, n) for task in tasks for n in range(first, min(stop, task.count))]


def _stop(
    tasks: Sequence[Task],
    found: dict[Key, Judged],
    first: int,
    asked: int,
    began: float,
    deadline: float,
    ranks: Ranks,
) -> int:
    """Where the wave that begins with item `first` ends; 0 where there is none any more.

    One that would not be whole at the deadline, going by what was `asked` so far, is made smaller.
    """
    most = max((task.count for task in tasks), default=0)
    if first >= most:
        return 0
    stop = min(most, max(FIRST, min(TIMES * first, first + WIDEST)))
    now = time.monotonic()
    pace = (now - began) / asked if asked else 0.0

    def seconds(stop: int) -> float:
        return pace * sum(key not in found for key in _keys(tasks, first, stop))

    while stop > first and now + CAUTION * seconds(stop) > deadline:
        stop = first + (stop - first) // 2
    stop = round(ranks.leads(stop))
    return stop if stop > first else 0

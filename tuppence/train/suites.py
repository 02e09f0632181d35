"""The tasks that a run is judged by, as its tokenizer reads them: CORE, HellaSwag."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuppence.config import Plan, SuitePlan
from tuppence.evals import bundle, core, hellaswag
from tuppence.evals.items import Judged, Task, Text
from tuppence.evals.subject import RunText
from tuppence.tokenizer.spec import Tokenizer

Document = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """A suite's tasks, what they depend on, and what is made of their answers."""

    plan: SuitePlan
    tasks: Sequence[Task]
    told: Document
    summary: Callable[[dict[str, list[Judged]]], Document]

    @property
    def count(self) -> int:
        """Items of all tasks."""
        return sum(task.count for task in self.tasks)


def load(plan: Plan, tokenizer: Tokenizer, *, say: Callable[[str], None]) -> list[Suite]:
    """The planned suites, fetched where they are not here yet.

    Raises UserError for a place that does not hold them, and for a tokenizer that cannot encode
    the first item of a task.
    """
    context = plan.model.sequence_len
    suites = () if plan.tasks is None else plan.tasks.suites
    found = [_suite(suite, RunText(tokenizer), context, say) for suite in suites]
    for task in (task for suite in found for task in suite.tasks):
        task.asks(0)
    return found


def _suite(plan: SuitePlan, text: Text, context: int, say: Callable[[str], None]) -> Suite:
    if plan.name == "core":
        there = bundle.core_bundle(plan.data, say=say)
        tasks = core.tasks(there, text, context=context, max_per_task=plan.items)
        most = plan.items
        told = core.suite(there, max_per_task=most)
        return Suite(
            plan, tasks, told, lambda judged: core.summary(there, judged, max_per_task=most)
        )
    assert plan.name == "hellaswag", plan.name
    rows = bundle.hellaswag_rows(plan.data, say=say)
    tasks = hellaswag.tasks(rows, text, max_items=plan.items)
    told = hellaswag.suite(rows)
    return Suite(plan, tasks, told, lambda judged: hellaswag.summary(judged, sha256=rows.sha256))


def is_due(plan: SuitePlan, step: int) -> bool:
    """Whether it is due after so many steps, the end apart."""
    return plan.every_steps is not None and step % plan.every_steps == 0

"""CORE: the 22 tasks of DCLM (arXiv 2406.11794), asked as nanochat asks them.

    items      shuffled by Random(1337), then cut to so many a task
    examples   of item i: drawn by Random(1234 + i) from the others that are left
    text       start, then "example\\n\\n" for each example, then the item
    score      mean over the tasks of (accuracy - chance) / (1 - chance)

    multiple choice        query + delimiter + each choice: least mean nats of the ids after those
                           that all texts begin with
    schema                 each context + delimiter + continuation: least mean nats of the ids that
                           all texts end with
    language modelling     context + delimiter + continuation: each id of the continuation likeliest

A choice that is the beginning of another has no ids of its own (four of PIQA have none with
GPT-2's tokens): its mean is nan, and Python's `min` takes nan where it comes first and never else,
which is what nanochat does with it. A text longer than the model's context keeps its last ids, and
of what counts so much as is left behind the first of them, where nanochat stops with an error.
Where a tokenizer joins the end of a context with the continuation, what counts begins at the first
id that differs. With fewer items a task than examples are needed, the examples come from the first
items that suffice; nanochat stops there, too.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tuppence.errors import UserError
from tuppence.evals.bundle import GPT2, CoreBundle, CoreTask, Row, core_tasks
from tuppence.evals.items import Answer, Ask, Judged, Task, Text
from tuppence.evals.statistics import Count, Document, bootstrap, centred

VERSION = 1
SHUFFLE_SEED, EXAMPLES_SEED = 1337, 1234


def suite(bundle: CoreBundle, *, max_per_task: int | None) -> Document:
    """What the items depend on: examples are drawn from the items that a cap leaves."""
    return {
        "metric": "core",
        "version": VERSION,
        "bundle_sha256": bundle.sha256,
        "max_per_task": max_per_task,
    }


def tasks(bundle: CoreBundle, text: Text, *, context: int, max_per_task: int | None) -> list[Task]:
    """The 22 tasks, with at most so many items each, whose texts are made when they are asked.

    Raises UserError, now or then, where the tokenizer cannot encode them.
    """
    if text.start is None:
        raise UserError(
            "CORE begins each text with end-of-text, which this model's tokenizer lacks; train "
            "with data.tokenizer=gpt2, byte or bpe:N"
        )
    if context < 2:
        raise UserError(f"CORE asks what follows a text, and a context of {context} has no room")
    made = [
        _Items(bundle, task, text, text.start, _count(bundle, task, max_per_task))
        for task in core_tasks()
    ]
    return [Task(each.task.label, each.count, each.asks, each.judge) for each in made]


def _count(bundle: CoreBundle, task: CoreTask, max_per_task: int | None) -> int:
    count = bundle.count(task)
    return count if max_per_task is None else min(count, max_per_task)


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class _Items:
    """The items of a task that are asked, in their shuffled order."""

    bundle: CoreBundle
    task: CoreTask
    text: Text
    start: int
    count: int

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Those that are asked, and more only where examples take more."""
        order = list(range(self.bundle.count(self.task)))
        random.Random(SHUFFLE_SEED).shuffle(order)
        return self.bundle.items(self.task, order[: max(self.count, self.task.shots + 1)])

    def asks(self, number: int) -> list[Ask]:
        """One for each choice or context; one alone for a continuation."""
        texts = rendered(self.task, self.rows[number], self._examples(number))
        try:
            ids = [[self.start, *each] for each in self.text.encode_batch(texts)]
        except UserError as error:
            raise UserError(
                f"CORE's {self.task.label} cannot be read with this model's tokenizer ({error}); "
                f"train with data.tokenizer=gpt2, byte or bpe:N"
            ) from None
        return asked(self.task.kind, ids)

    def judge(self, number: int, answers: list[Answer]) -> Judged:
        """The choice of least mean nats; a continuation is right where each id is likeliest."""
        if self.task.kind == "language_modeling":
            return {"correct": answers[0].greedy and answers[0].tokens > 0}
        means = [a.nats / a.tokens if a.tokens else math.nan for a in answers]
        choice = means.index(min(means))
        return {"choice": choice, "correct": choice == self.rows[number]["gold"]}

    def _examples(self, number: int) -> list[Row]:
        """Of the others, so many as the task shows."""
        others = range(len(self.rows) - 1)
        drawn = random.Random(EXAMPLES_SEED + number).sample(others, self.task.shots)
        return [self.rows[i + (i >= number)] for i in drawn]


def rendered(task: CoreTask, item: Row, examples: Sequence[Row]) -> list[str]:
    """The texts of an item; of language modelling without its continuation, and with it."""
    between = task.delimiter
    shown = "".join(f"{_solved(task, example)}\n\n" for example in examples)
    if task.kind == "multiple_choice":
        return [f"{shown}{item['query']}{between}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        options, end = item["context_options"], item["continuation"]
        return [f"{shown}{option}{between}{end}" for option in options]
    without = f"{shown}{item['context'].strip()}{between}"
    # without the space behind it, which is the first of the continuation in most vocabularies
    return [without.strip(), without + item["continuation"]]


def _solved(task: CoreTask, example: Row) -> str:
    """An example with its answer."""
    if task.kind == "multiple_choice":
        question, answer = example["query"], example["choices"][example["gold"]]
    elif task.kind == "schema":
        question, answer = example["context_options"][example["gold"]], example["continuation"]
    else:
        question, answer = example["context"].strip(), example["continuation"]
    return f"{question}{task.delimiter}{answer}"


def asked(kind: str, ids: list[list[int]]) -> list[Ask]:
    """Encoded texts of an item, and how many ids at their ends count."""
    if kind == "schema":
        shared = shared_start([each[::-1] for each in ids])
        return [Ask(each, min(shared, len(each) - 1)) for each in ids]
    shared = shared_start(ids)
    counted = ids[1:] if kind == "language_modeling" else ids
    return [Ask(each, len(each) - shared) for each in counted]


def shared_start(texts: Sequence[list[int]]) -> int:
    """How many ids all texts begin with: those that the least and the greatest share."""
    least, most = min(texts), max(texts)
    pairs = enumerate(zip(least, most, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(least))


# ---------------------------------------------------------------- the score


def summary(
    bundle: CoreBundle, judged: dict[str, list[Judged]], *, max_per_task: int | None = None
) -> Document:
    """The result: accuracies, centred, their mean with its bootstrap error and 95% interval.

    A score of some tasks only would be another metric: where any has no items, `score` is None
    and `missing` names them.
    """
    counts = {task.label: _counted(task, judged.get(task.label, [])) for task in core_tasks()}
    missing = [label for label, count in counts.items() if not count.n]
    there = [count for count in counts.values() if count.n]
    spread = None if missing else bootstrap(there)
    return {
        **suite(bundle, max_per_task=max_per_task),
        "score": None if missing else sum(count.centred for count in there) / len(there),
        "error": spread.error if spread else None,
        "interval": [spread.low, spread.high] if spread else None,
        "n": sum(count.n for count in there),
        "missing": missing,
        "tasks": [_told(task, counts[task.label]) for task in core_tasks()],
    }


def _counted(task: CoreTask, judged: Sequence[Judged]) -> Count:
    return Count(sum(bool(each["correct"]) for each in judged), len(judged), task.baseline)


def _told(task: CoreTask, count: Count) -> Document:
    known = count.n > 0
    return {
        "task": task.label,
        "kind": task.kind,
        "shots": task.shots,
        "accuracy": count.accuracy if known else None,
        "centered": count.centred if known else None,
        "baseline": task.baseline,
        "n": count.n,
        "error": count.error if known else None,
    }


def published() -> dict[str, float]:
    """The scores of the four GPT-2s by nanochat's published tables: of all items for the small
    one, of a thousand a task for the others."""
    every = core_tasks()
    return {
        model: sum(centred(task.published[model], task.baseline) for task in every) / len(every)
        for model in GPT2
    }


def table(document: Document) -> str:
    """For people: a line a task beside the GPT-2s' accuracies, then the score. 99 columns."""
    beside = {task.label: task.published for task in core_tasks()}
    lines = [_line("", "n", "accuracy", "+-", "centered", ["GPT-2", "medium", "large", "XL"])]
    for row in document["tasks"]:
        others = [f"{beside[row['task']][model]:.1%}" for model in GPT2]
        accuracy, error = (_shown(row[key], ".1%") for key in ("accuracy", "error"))
        centred_one = _shown(row["centered"], ".4f")
        lines.append(_line(row["task"], f"{row['n']:,}", accuracy, error, centred_one, others))
    score, error = (_shown(document[key], ".4f") for key in ("score", "error"))
    others = [f"{value:.4f}" for value in published().values()]
    lines.append(_line("CORE", f"{document['n']:,}", "", error, score, others))
    if document["missing"]:
        lines.append(f"no score: no item of {', '.join(document['missing'])} was answered in time")
    else:
        low, high = document["interval"]
        lines.append(f"95% of bootstrap draws: {low:.4f} to {high:.4f}")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(
    label: str, n: str, accuracy: str, error: str, centred: str, others: Sequence[str]
) -> str:
    beside = "".join(f"{other:>8}" for other in others)
    return f"{label:32}{n:>8}{accuracy:>10}{error:>7}{centred:>10}{beside}"

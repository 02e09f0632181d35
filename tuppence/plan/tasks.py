"""What the tasks cost that a run is judged by: CORE and HellaSwag, in tokens and in seconds.

    an item     its beginning once + every continuation, in bytes / bytes per token; where that is
                longer than the context, a context for each continuation
    a suite     of each task as many items as asked, or as there are
    seconds     tokens x a forward pass's without the head's, the head's where an id is asked for,
                and something for each continuation on the host

Asked for by train.{core,hellaswag}_{every,items}; how long one took in a run replaces the guess.
"""

import csv
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tuppence.config import DataPlan, Run, SuitePlan, TasksPlan, Train
from tuppence.errors import UserError
from tuppence.files import asset

SUITES = ("hellaswag", "core")  # in the order in which they are asked: the cheap one first
CORE_ITEMS = 500  # of a task, where only `core_every` is said: nanochat's own during training
TASKS_SHARE = 0.10  # of a run that its tasks may take before that is said
HEAD = 1.5  # of the head's time in a val loss: here it keeps its logits, and reads them thrice
TASKS_GIB = 0.3  # CORE's texts a third, and what passes of many shapes leave in the allocator
FIXED_TOKENS, FIXED_ROWS = 48, 12  # new ones of a fixed prompt; prompts x temperatures
FIXED_SHARE = 0.01  # of a run that they may take together
ALONE = 4.0  # tokens of a continuation that is the only one, about
ASK_SECONDS, BYTE_SECONDS = 3e-5, 1e-7  # twice of what one core of this kind (Zen 5) takes


@dataclass(frozen=True)
class Priced:
    """One task: how many items it has, and UTF-8 bytes of one: its beginning once and all its
    continuations, and the beginning with one of them."""

    label: str
    items: int
    asks: float
    item_bytes: float
    ask_bytes: float

    def tokens(self, bytes_per_token: float, context: int) -> float:
        """That one item reads, on average. Texts that are cut share no beginning."""
        if self.ask_bytes / bytes_per_token > context:
            return self.asks * context
        return self.item_bytes / bytes_per_token

    def wanted(self, bytes_per_token: float, context: int) -> float:
        """Tokens of one item that a logit is read for: those of its continuations."""
        if self.asks == 1:
            return ALONE
        each = (self.item_bytes - self.ask_bytes) / (self.asks - 1)
        return self.asks * min(each / bytes_per_token, context)

    @property
    def host_seconds(self) -> float:
        """Of one item: text to ids, ids to rows."""
        return self.asks * (ASK_SECONDS + BYTE_SECONDS * self.ask_bytes)


HELLASWAG = Priced("hellaswag", 10_042, 4, 791.4, 365.8)


@cache
def core_rows() -> tuple[dict[str, str], ...]:
    """CORE's tasks as the package lists them."""
    with asset("core_tasks.csv").open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(lines))


def priced(suite: str) -> tuple[Priced, ...]:
    """The tasks of a suite."""
    if suite == "hellaswag":
        return (HELLASWAG,)
    sizes = ("asks", "item_bytes", "ask_bytes")
    return tuple(
        Priced(row["label"], int(row["items"]), *(float(row[size]) for size in sizes))
        for row in core_rows()
    )


def solve_tasks(
    run: Run, data: DataPlan, *, context: int, head: float, token_seconds: float
) -> TasksPlan | None:
    """The suites that are asked for; None where none is. A token of a forward pass takes
    `token_seconds`, of which the head is a share.

    Raises UserError for what cannot be evaluated.
    """
    found = [
        _solve(suite, run.train, data, context, head, token_seconds)
        for suite in SUITES
        if _is_asked(suite, run.train)
    ]
    return TasksPlan(tuple(found)) if found else None


def head_share(n_embd: int, vocab_size: int, flops_per_token: float) -> float:
    """Of a pass's FLOPs, those that end in logits."""
    return min(1.0, 6 * n_embd * vocab_size / flops_per_token)


def _is_asked(suite: str, train: Train) -> bool:
    every, items, where = (getattr(train, f"{suite}_{key}") for key in ("every", "items", "data"))
    if where is not None and every is None and items is None:
        raise UserError(
            f"train.{suite}_data={where}: say train.{suite}_items or train.{suite}_every too, "
            f"or leave it out"
        )
    return every is not None or items is not None


def _solve(
    suite: str, train: Train, data: DataPlan, context: int, head: float, token_seconds: float
) -> SuitePlan:
    every, items = getattr(train, f"{suite}_every"), getattr(train, f"{suite}_items")
    if data.tokenizer.partition(":")[0] == "char":
        raise UserError(
            f"train.{suite}_{'items' if items else 'every'}={items or every}: a tokenizer of "
            f"characters ({data.tokenizer[:20]}) cannot read its texts; use data.tokenizer=gpt2, "
            f"byte or bpe:N, or leave it out"
        )
    tasks, size = priced(suite), (data.bytes_per_token, context)
    if items is None and suite == "core":
        items = CORE_ITEMS
    if items is not None and items >= max(task.items for task in tasks):
        items = None
    counts = [task.items if items is None else min(items, task.items) for task in tasks]
    of_tasks = list(zip(counts, tasks, strict=True))
    tokens = sum(n * task.tokens(*size) for n, task in of_tasks)
    wanted = sum(n * task.wanted(*size) for n, task in of_tasks)
    passes = token_seconds * (tokens * (1 - head) + HEAD * wanted * head)
    return SuitePlan(
        name=suite,
        items=items,
        every_steps=every,
        data=getattr(train, f"{suite}_data"),
        tokens=round(tokens),
        seconds=passes + sum(n * task.host_seconds for n, task in of_tasks),
    )


# ---------------------------------------------------------------- over a run


def _before_the_end(every_steps: int | None, steps: float) -> float:
    """How often something that is due every so many steps comes before the last one."""
    return 0 if every_steps is None else max(0, (steps - 1) // every_steps)


def multiples(most: float, periods: Iterable[int]) -> float:
    """How many of 1 ... `most` are a multiple of any of the periods."""
    known = set(periods)
    return sum(
        (1 if size % 2 else -1) * (most // math.lcm(*some))
        for size in range(1, len(known) + 1)
        for some in itertools.combinations(known, size)
    )


def rate(periods: Iterable[int]) -> float:
    """Which share of numbers is a multiple of any of the periods."""
    known = set(periods)
    return multiples(math.lcm(*known), known) / math.lcm(*known)


def evaluations(tasks: TasksPlan | None, steps: float) -> float:
    """Of the loss, that come with tasks in so many steps, the end apart."""
    suites = () if tasks is None else tasks.suites
    return steps * rate(s.every_steps for s in suites if s.every_steps)


def step_seconds(tasks: TasksPlan | None) -> float:
    """A step's share of what is evaluated between steps."""
    suites = () if tasks is None else tasks.suites
    return sum(s.seconds / s.every_steps for s in suites if s.every_steps)


def run_seconds(tasks: TasksPlan | None, steps: float) -> float:
    """What all suites take in a run of so many steps."""
    suites = () if tasks is None else tasks.suites
    return sum(s.seconds * (1 + _before_the_end(s.every_steps, steps)) for s in suites)


def too_much(tasks: TasksPlan | None, *, steps: float, seconds: float) -> str | None:
    """What to say where tasks take more than their share of the run's `seconds`."""
    taken = run_seconds(tasks, steps)
    if tasks is None or taken <= TASKS_SHARE * seconds:
        return None
    wanted = TASKS_SHARE / (1 - TASKS_SHARE) * max(0.0, seconds - taken)  # beside all the rest
    fewer = [
        f"train.{suite.name}_items={max(1, int(_items(suite) * wanted / taken))}"
        for suite in tasks.suites
    ]
    return (
        f"tasks take {taken / seconds:.0%} of the run's time; {' and '.join(fewer)} would take "
        f"about {TASKS_SHARE:.0%}"
    )


def _items(suite: SuitePlan) -> int:
    return suite.items or max(task.items for task in priced(suite.name))

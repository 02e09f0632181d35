"""CORE as nanochat asks it, beside ours: the same ids, the same answers, and the time it takes.

    python bench/core_peers.py NANOCHAT --core BUNDLE
    python bench/core_peers.py NANOCHAT --core BUNDLE --ids       every id of all 91,037 items

NANOCHAT is a checkout of it: its own `core_eval.evaluate_task` asks the same model of transformers
(a fresh GPT-2 of 124M parameters, or --model FOLDER), in fp32 and on all cores. The two take turns
task by task. Its choices are read from the comparison with an item's `gold`, so that every item is
compared and not the mean.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# before torch is imported, as every verb of ours has it: threads that spin for long hold up a busy
# machine, and nanochat most (docs/LOG.md)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from common import machine
from torch import Tensor

from tuppence import host
from tuppence.evals import bundle, core, foreign, score
from tuppence.evals.bundle import CoreTask
from tuppence.evals.items import Answer, Task, Text
from tuppence.evals.subject import RunText, Subject
from tuppence.tokenizer.spec import build_tokenizer

TIE = 1e-5  # nats a token: choices that are nearer may fall either way
LEAST_ITEMS = 11  # below it nanochat has too few examples


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("nanochat", type=Path, help="a checkout")
    asked.add_argument("--core", required=True, help="the bundle: a folder or an archive")
    asked.add_argument("--ids", action="store_true", help="compare ids of all items; no model")
    asked.add_argument("--model", help="a folder of transformers (a fresh GPT-2 124M)")
    asked.add_argument("--tasks", help="labels, with commas between (all)")
    asked.add_argument("--items", type=int, default=24, help="of each task")
    args = asked.parse_args()
    if args.items < LEAST_ITEMS:
        raise SystemExit(f"--items {args.items}: nanochat needs at least {LEAST_ITEMS}")
    sys.path.insert(0, str(args.nanochat))
    peer = importlib.import_module("nanochat.core_eval")
    found = bundle.core_bundle(args.core, say=print)
    if args.ids:
        return same_ids(peer, found)
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        source = args.model or fresh_gpt2(Path(place))
        subject = foreign.of_transformers(
            source, precision="fp32", device="cpu", cores=host.usable_cores(), say=print
        )
        labels = args.tasks.split(",") if args.tasks else [t.label for t in bundle.core_tasks()]
        compare(peer, subject, found, labels, items=args.items)


def fresh_gpt2(folder: Path) -> str:
    """GPT-2 124M as it is before training, with GPT-2's tokens; weights a little larger, so that
    choices differ."""
    import json

    import transformers

    torch.manual_seed(0)
    ends = {"bos_token_id": 50256, "eos_token_id": 50256}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    build_tokenizer("gpt2", texts=lambda: iter(())).save(folder)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return str(folder)


# ---------------------------------------------------------------- what nanochat is given


class Tokens:
    """A text's ids as nanochat asks for them, from the tokenizer that we use."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def get_bos_token_id(self) -> int:
        assert self.text.start is not None
        return self.text.start

    def __call__(self, texts: Sequence[str], prepend: int) -> list[list[int]]:
        return [[prepend, *ids] for ids in self.text.encode_batch(texts)]


class Model:
    """A model of transformers with the signature that nanochat calls."""

    def __init__(self, subject: Subject) -> None:
        self.model, self.max_seq_len = subject.workers.model, subject.context

    def __call__(self, idx_BT: Tensor) -> Tensor:
        logits: Tensor = self.model(idx_BT, use_cache=False).logits
        return logits


class Gold(int):
    """The right choice, which keeps what it is compared with."""

    chosen: int | None = None

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, int)
        self.chosen = int(other)
        return int(self) == int(other)

    __hash__ = int.__hash__


def data_of(found: bundle.CoreBundle, task: CoreTask, items: int | None) -> list[dict[str, Any]]:
    """The items as its script shuffles and cuts them."""
    data = found.items(task, range(found.count(task)))
    random.Random(1337).shuffle(data)
    return [{**row, "gold": Gold(row["gold"])} if "gold" in row else row for row in data[:items]]


def meta_of(task: CoreTask) -> dict[str, Any]:
    return {
        "task_type": task.kind,
        "num_fewshot": task.shots,
        "continuation_delimiter": task.delimiter,
    }


# ---------------------------------------------------------------- the same answers, in less time


def compare(
    peer: Any, subject: Subject, found: bundle.CoreBundle, labels: list[str], *, items: int
) -> None:
    """A line a task: items a second of both, and how many answers are equal."""
    made = core.tasks(found, subject.text, context=subject.context, max_per_task=items)
    by_label = {task.label: task for task in made}
    print(f"{'':34}{'items':>6}{'equal':>7}{'ties':>6}{'nanochat/s':>12}{'ours/s':>9}{'times':>7}")
    totals, ratios = [0, 0, 0, 0.0, 0.0], []
    answer(subject, by_label["copa"])  # both once, unmeasured
    theirs(peer, subject, data_of(found, labelled("copa"), LEAST_ITEMS), labelled("copa"))
    for turn, label in enumerate(labels):
        data = data_of(found, labelled(label), items)
        measured: dict[str, Any] = {}
        for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            began = time.perf_counter()
            if side == "ours":
                measured["answers"] = answer(subject, by_label[label])
            else:
                measured["right"] = theirs(peer, subject, data, labelled(label))
            measured[side] = time.perf_counter() - began
        equal, ties = agreement(by_label[label], measured["answers"], data, measured["right"])
        ratios.append(measured["theirs"] / measured["ours"])
        row = [len(data), equal, ties, measured["theirs"], measured["ours"]]
        totals = [total + each for total, each in zip(totals, row, strict=True)]
        print(line(label, *row), flush=True)
    print(line("all", *totals))
    print(f"median of the tasks: {statistics.median(ratios):.1f}x")


def line(label: str, items: int, equal: int, ties: int, theirs: float, ours: float) -> str:
    rates = f"{items / theirs:>12.2f}{items / ours:>9.2f}{theirs / ours:>6.1f}x"
    return f"{label:34}{items:>6}{equal:>7}{ties:>6}{rates}"


def labelled(label: str) -> CoreTask:
    return next(task for task in bundle.core_tasks() if task.label == label)


def answer(subject: Subject, task: Task) -> dict[int, list[Answer]]:
    """All items of a task, from their texts on."""
    with threads(1):
        asked = [(number, task.asks(number)) for number in range(task.count)]
        return dict(score.answers(subject, asked))


def theirs(peer: Any, subject: Subject, data: list[dict[str, Any]], task: CoreTask) -> list[bool]:
    """Whether each item is right, as nanochat's own evaluation of a task finds it."""
    right: list[bool] = []
    one_item = peer.evaluate_example

    def noted(*given: Any) -> bool:
        right.append(bool(one_item(*given)))
        return right[-1]

    subject.workers.train(False)
    peer.evaluate_example = noted
    try:
        with threads(host.usable_cores()):
            peer.evaluate_task(
                Model(subject), Tokens(subject.text), data, torch.device("cpu"), meta_of(task)
            )
    finally:
        peer.evaluate_example = one_item
    return right


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Of one operation: ours runs a pass on each core, nanochat one pass on all."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def agreement(
    task: Task, answers: dict[int, list[Answer]], data: list[dict[str, Any]], right: list[bool]
) -> tuple[int, int]:
    """How many items have the same choice, or are both right or wrong; of the rest, ties."""
    equal = ties = 0
    for number, row in enumerate(data):
        judged = task.judge(number, answers[number])
        if "choice" in judged:
            same = judged["choice"] == row["gold"].chosen
        else:
            same = judged["correct"] == right[number]
        equal += same
        ties += not same and tied(answers[number])
    return equal, ties


def tied(answers: list[Answer]) -> bool:
    means = sorted(a.nats / a.tokens for a in answers if a.tokens)
    return len(means) > 1 and means[1] - means[0] < TIE


# ---------------------------------------------------------------- the same ids


def same_ids(peer: Any, found: bundle.CoreBundle) -> None:
    """Prompts, ids and where what counts begins and ends, of every item, with GPT-2's tokens."""
    import functools

    peer.Template = functools.cache(peer.Template)  # compiled once
    text = RunText(build_tokenizer("gpt2", texts=lambda: iter(())))
    made = core.tasks(found, text, context=1024, max_per_task=None)
    total = 0
    for task, ours in zip(bundle.core_tasks(), made, strict=True):
        data = data_of(found, task, None)
        same = sum(
            expected(peer, task, data, number, Tokens(text)) == indices(ours, number)
            for number in range(len(data))
        )
        total += same
        print(f"{task.label:34}{same:>7,} of {len(data):,} items have equal ids", flush=True)
    print(f"{'all':34}{total:>7,}")


def expected(
    peer: Any, task: CoreTask, data: list[dict[str, Any]], number: int, tokens: Tokens
) -> Any:
    """Ids, starts and ends by nanochat's functions; examples are drawn as its evaluation does."""
    examples = []
    if task.shots:
        others = [i for i in range(len(data)) if i != number]
        drawn = random.Random(1234 + number).sample(others, task.shots)
        examples = [data[i] for i in drawn]
    kind = {"multiple_choice": "mc", "schema": "schema", "language_modeling": "lm"}[task.kind]
    prompts = getattr(peer, f"render_prompts_{kind}")(data[number], task.delimiter, examples)
    return getattr(peer, f"batch_sequences_{kind}")(tokens, prompts)


def indices(task: Task, number: int) -> Any:
    asks = task.asks(number)
    ids = [list(ask.ids) for ask in asks]
    return ids, [len(ask.ids) - ask.scored for ask in asks], [len(each) for each in ids]


if __name__ == "__main__":
    main()

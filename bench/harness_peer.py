"""CORE's multiple choice and HellaSwag as lm-evaluation-harness's own model of transformers scores
them: prompts rendered here from the field's files, ids, batches, passes and softmax all of HFLM.

Nothing of tuppence is used, so that equal choices are two implementations agreeing.
"""

from __future__ import annotations

import itertools
import json
import lzma
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Ids = list[int]


@dataclass(frozen=True)
class Scored:
    """Of an item: mean and summed nats of each choice (nan where a choice has no ids)."""

    means: list[float]
    sums: list[float]

    @property
    def choice(self) -> int:
        return self.means.index(min(self.means))

    @property
    def choice_by_sum(self) -> int:
        return self.sums.index(min(self.sums))


def core(lm: Any, folder: Path, label: str, items: int) -> list[Scored]:
    """The first items of a multiple choice task of `folder`, the unpacked bundle."""
    import yaml

    config = yaml.safe_load((folder / "core.yaml").read_text())
    task = next(task for task in config["icl_tasks"] if task["label"] == label)
    assert task["icl_task_type"] == "multiple_choice", label
    lines = (folder / "eval_data" / task["dataset_uri"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(rows)
    rows = rows[:items]
    shots, between = task["num_fewshot"][0], task.get("continuation_delimiter", " ")
    asked = []
    for number, row in enumerate(rows):
        others = [i for i in range(len(rows)) if i != number]
        shown = [rows[i] for i in random.Random(1234 + number).sample(others, shots)]
        before = "".join(
            each["query"] + between + each["choices"][each["gold"]] + "\n\n" for each in shown
        )
        asked.append([before + row["query"] + between + choice for choice in row["choices"]])
    return _scored(lm, [_core_pairs(lm, prompts) for prompts in asked])


def _core_pairs(lm: Any, prompts: Sequence[str]) -> list[tuple[Ids, Ids]]:
    """What all prompts begin with, and what is each one's own; of a long one the end is kept."""
    ids = [[lm.prefix_token_id, *lm.tok_encode(p, add_special_tokens=False)] for p in prompts]
    shared = _shared(ids)
    pairs = []
    for each in ids:
        cut = max(0, len(each) - lm.max_length)
        pairs.append((each[cut:shared], each[max(cut, shared) :]))
    return pairs


def _shared(ids: Sequence[Ids]) -> int:
    """How many ids all begin with."""
    columns = zip(*ids, strict=False)
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))


def hellaswag(lm: Any, path: Path, items: int) -> list[Scored]:
    """Items of the validation split (.jsonl, .jsonl.xz), in an order shuffled by Random(1337)."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        rows = [json.loads(line) for line in file]
    random.Random(1337).shuffle(rows)
    asked = []
    for row in rows[:items]:
        context = lm.tok_encode(row["ctx"], add_special_tokens=False)
        endings = [lm.tok_encode(" " + e, add_special_tokens=False) for e in row["endings"]]
        asked.append([(context, ending) for ending in endings])
    return _scored(lm, asked)


def _scored(lm: Any, asked: Sequence[Sequence[tuple[Ids, Ids]]]) -> list[Scored]:
    requests = [(None, *pair) for pairs in asked for pair in pairs if pair[1]]
    found = iter(lm._loglikelihood_tokens(requests, disable_tqdm=True))
    scored = []
    for pairs in asked:
        sums = [-next(found)[0] if own else math.nan for _, own in pairs]
        means = [s / max(1, len(own)) for s, (_, own) in zip(sums, pairs, strict=True)]
        scored.append(Scored(means, sums))
    return scored


def tied(values: Sequence[float], within: float = 1e-5) -> bool:
    """Whether the two least differ by so little that another order of sums may turn them."""
    first, second = sorted(values)[:2]
    return second - first < within

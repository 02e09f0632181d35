"""Suites of a few made-up items, and texts in bytes: what is asked without the field's data."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from tuppence.evals.bundle import CoreBundle, HellaSwag, Question, core_tasks
from tuppence.evals.subject import RunText
from tuppence.tokenizer.kinds import ByteTokenizer
from tuppence.tokenizer.ranked import RankedTokenizer

BYTES = RunText(ByteTokenizer())
GPT2 = RunText(RankedTokenizer("gpt2"))
ITEMS = {
    "multiple_choice": lambda n: {
        "query": f"Question {n}: what comes after {n}?",
        "choices": [f"{n}", f"{n + 1}", f"{n + 1} or so"],
        "gold": n % 3,
    },
    "schema": lambda n: {
        "context_options": [f"The {n} dogs", f"The {n} cats"],
        "continuation": "barked all night.",
        "gold": n % 2,
    },
    "language_modeling": lambda n: {"context": f" Count to {n} \n", "continuation": f"one {n}"},
}


def small_bundle(items: int = 30) -> CoreBundle:
    """All 22 tasks, of so many items each."""
    lines = {
        task.file: [json.dumps(ITEMS[task.kind](n)).encode() for n in range(items)]
        for task in core_tasks()
    }
    return CoreBundle(lines, sha256="made up")


def small_hellaswag(items: int = 30) -> HellaSwag:
    rows = [
        Question(f"A man counts {n} sheep. he", ("sleeps.", "counts on.", "eats.", "sings."), n % 4)
        for n in range(items)
    ]
    return HellaSwag(tuple(rows), "made up")


class Joins:
    """A tokenizer that joins what a context ends with to what follows: an id for two bytes."""

    start: int | None = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        padded = [text.encode() + b"~" * (len(text.encode()) % 2) for text in texts]
        return [np.frombuffer(each, dtype="<u2").tolist() for each in padded]

    def decode(self, ids: Sequence[int]) -> str:
        return np.array(ids, dtype="<u2").tobytes().decode()

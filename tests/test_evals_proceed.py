"""Texts continued side by side: each as if it were alone, up to a stop of its own."""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch
from hub_models import written

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a network
pytest.importorskip("transformers", reason="[dev] installs transformers")

from tuppence.evals import foreign
from tuppence.evals.proceed import Wanted, nucleus, proceed
from tuppence.evals.subject import Subject
from tuppence.tokenizer.spec import build_tokenizer

CONTEXT = 64
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "one"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    tokens = build_tokenizer("gpt2", texts=lambda: iter(()))
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    written(folder, tokens, "GPT2LMHeadModel", sharp=6, n_positions=CONTEXT)
    words = {"precision": "fp32", "device": "cpu", "cores": 2, "say": print}
    return foreign.of_transformers(str(folder), **words)


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def test_a_continuation_is_the_same_in_any_company(subject: Subject) -> None:
    draw = random.Random(3)
    ids = subject.text.encode_batch([text(draw, n) for n in (3, 9, 4, 20, 2)])
    for temperature in (0.0, 0.9):
        wanted = [Wanted(each, 10, ("g",), temperature, top_p=0.9) for each in ids]
        together = proceed(subject, wanted)
        assert proceed(subject, wanted, batch=1) == together
        assert len(set(together)) == 5
    drawn = [Wanted(each, 10, (), 0.9) for each in ids]
    assert proceed(subject, drawn, seed=1) != proceed(subject, drawn, seed=2)


def test_a_continuation_ends_where_texts_do(subject: Subject) -> None:
    ids = [464, 5417, 290]
    (whole,) = proceed(subject, [Wanted(ids, 6)])
    said = subject.text.encode_batch([whole])[0]
    third = next(i for i in said[1:] if i != said[0])
    text = dataclasses.replace(subject.text, ends=frozenset({third}))  # type: ignore[type-var]
    (cut,) = proceed(dataclasses.replace(subject, text=text), [Wanted(ids, 6)])
    assert cut == subject.text.decode(said[: said.index(third)])
    assert whole.startswith(cut)


def test_a_continuation_that_has_no_room(subject: Subject) -> None:
    ids = subject.text.encode_batch([text(random.Random(4), 100)])[0]
    (said,) = proceed(subject, [Wanted(ids, 10 * CONTEXT)])
    half = CONTEXT // 2
    assert proceed(subject, [Wanted(ids[-half:], half)]) == [said]
    (more,) = proceed(subject, [Wanted(ids[-4:], CONTEXT - 4)])
    assert len(more) > len(said)


def test_a_nucleus_is_the_likeliest_of_so_much() -> None:
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
    kept = nucleus(logits, 0.6, temperature=1.0)
    assert kept.isfinite().tolist() == [False, True, False, True]
    assert nucleus(logits, 0.01, temperature=1.0).isfinite().sum() == 1
    assert nucleus(logits, 1.0, temperature=1.0).isfinite().all()

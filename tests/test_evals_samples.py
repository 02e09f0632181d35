"""The fixed prompts, and bits per byte of a text in another model's tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SMALL, model_plan, on_one_thread, shaken
from torch import Tensor, nn

from tuppence.data.loader import val_windows
from tuppence.data.prepare import Options, prepare
from tuppence.errors import UserError
from tuppence.evals import samples as fixed
from tuppence.evals import subject, text_loss
from tuppence.evals.generate import generate
from tuppence.evals.loss import val_loss
from tuppence.evals.samples import samples
from tuppence.evals.subject import Subject
from tuppence.model.branches import Branches
from tuppence.tokenizer.kinds import ByteTokenizer, CharTokenizer
from tuppence.tokenizer.spec import Tokenizer
from tuppence.workers import Workers

one_thread = pytest.fixture(autouse=True)(on_one_thread)

CONTEXT = 48


def subject_of(tokenizer: Tokenizer, *, context: int = CONTEXT) -> Subject:
    plan = model_plan(vocab_size=tokenizer.vocab_size, sequence_len=context, **SMALL["gpt2"])
    workers = Workers(shaken(plan), count=1, device="cpu", precision="fp32")
    return subject.of_run(workers, tokenizer, context=context, identity={})


class Others:
    """The same texts with a beginning of their own, 257, as many models of others have it."""

    start: int | None = 257
    ends = frozenset({256})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def foreign(mine: Subject) -> Subject:
    """The same model as another's: read through its logits alone, never continued by ours."""

    class Same(Others):
        start = 256

    return dataclasses.replace(mine, text=Same())


# ---------------------------------------------------------------- samples


def test_every_prompt_is_continued_greedily_and_with_the_seed() -> None:
    mine = subject_of(ByteTokenizer())
    found = samples(mine, own="ROMEO:", new_tokens=12)
    assert found.left_out == []
    prompts = ["ROMEO:", *fixed.PROMPTS]
    assert [(r["prompt"], r["temperature"]) for r in found.rows] == [
        (prompt, temperature) for prompt in prompts for temperature in (0.0, 0.8)
    ]
    for row in found.rows:
        ids = [256, *row["prompt"].encode()]
        words = {"temperature": row["temperature"], "seed": row["seed"], "stop": 256}
        said = generate(mine.workers, ids, new_tokens=12, context=CONTEXT, **words)
        assert row["text"] == mine.text.decode(said)
        assert row["new_tokens"] == len(said) - len(ids) <= 12
    assert len({row["text"] for row in found.rows}) == len(found.rows)
    assert samples(mine, own="ROMEO:", new_tokens=12) == found


def test_a_model_of_others_says_the_same_through_its_logits() -> None:
    mine = subject_of(ByteTokenizer())
    mine.workers.train()
    other, modes = foreign(mine), set()

    def logits(model: nn.Module, *given: Any) -> Tensor:
        modes.add(model.training)
        return mine.logits(model, *given)

    other = dataclasses.replace(other, logits=logits)
    assert samples(other, new_tokens=8) == samples(mine, new_tokens=8)
    assert modes == {False}  # nothing is dropped out


def test_it_stops_where_a_text_ends() -> None:
    mine = foreign(subject_of(ByteTokenizer()))

    def ends(model: nn.Module, idx_BT: Tensor, read_N: Tensor, branches: Branches | None) -> Tensor:
        logits = torch.zeros(1, 257)
        logits[0, 256 if idx_BT.shape[1] > 60 else 65] = 100.0
        return logits

    found = samples(dataclasses.replace(mine, logits=ends, context=100), own="a" * 50)
    assert found.rows[0]["text"] == "a" * 50 + "A" * 10
    assert found.rows[0]["new_tokens"] == 10
    assert max(row["new_tokens"] for row in found.rows) == fixed.NEW_TOKENS


def test_prompts_that_cannot_be_encoded_are_left_out() -> None:
    lower = CharTokenizer(" ,.abcdefghijklmnopqrstuvwxyzTSw", end_of_text=False)
    found = samples(subject_of(lower), own="the end", new_tokens=2)
    assert {row["prompt"] for row in found.rows} == {"the end", fixed.PROMPTS[1], fixed.PROMPTS[2]}
    assert found.left_out == ["", *fixed.PROMPTS[3:]]


def test_the_deadline_ends_it() -> None:
    mine = subject_of(ByteTokenizer())
    assert samples(mine, deadline=time.monotonic() - 1).rows == []
    with pytest.MonkeyPatch.context() as patch:
        beats = iter(range(1000))
        patch.setattr("tuppence.evals.samples.time.monotonic", lambda: next(beats))
        found = samples(foreign(mine), new_tokens=5, deadline=16)
    assert [row["new_tokens"] for row in found.rows] == [5, 5, 4]


# ---------------------------------------------------------------- bits per byte of a text


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths, with letters of two bytes."""
    rng = random.Random(0)
    place = tmp_path_factory.mktemp("text")
    texts = ["".join(rng.choices("abcdefg ü", k=rng.randint(3, 90))) for _ in range(300)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (place / "mine.jsonl").write_text("".join(lines))
    options = Options(val_tokens=3000)
    source = str(place / "mine.jsonl")
    return prepare(source=source, tokenizer="byte", root=place, options=options).folder


@pytest.mark.parametrize("batch", [1, None])
def test_a_runs_own_tokens_give_the_loss_of_a_run(shards: Path, batch: int | None) -> None:
    mine = subject_of(ByteTokenizer())
    windows = val_windows(shards, sequence_len=CONTEXT)
    token_bytes = ByteTokenizer().token_bytes()
    whole = val_loss(
        mine.workers, windows.batches(4), of_tokens=windows.tokens, token_bytes=token_bytes
    )
    found = text_loss.text_loss(mine, shards, batch=batch)
    assert whole is not None
    assert (found.tokens, found.of_tokens) == (whole.tokens, whole.of_tokens) == (2999, 2999)
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    assert found.bpb == pytest.approx(whole.bpb, rel=1e-6)


def test_windows_of_a_model_that_begins_its_texts(shards: Path) -> None:
    """Its beginning stands before each window and is never asked for; every byte is."""

    class Padded(ByteTokenizer):
        vocab_size = 258

    mine = dataclasses.replace(subject_of(Padded()), text=Others())
    found = text_loss.text_loss(mine, shards)
    tokens = val_windows(shards, sequence_len=1).stream.windows(np.zeros(1, int), length=3000)[0]
    assert (found.tokens, found.of_tokens) == (3000, 3000)
    nats = 0.0
    for first in range(0, 3000, CONTEXT - 1):
        part = torch.tensor([[257, *tokens[first : first + CONTEXT - 1]]])
        with torch.no_grad():
            logits = mine.workers.model.eval()(part[:, :-1])[0].log_softmax(-1)
        nats -= logits.gather(1, part[0, 1:, None]).sum().item()
    assert found.loss == pytest.approx(nats / 3000, rel=1e-5)
    text_bytes = int((tokens != 256).sum())
    assert found.bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_another_tokenizer_is_held_to_the_same_bytes(shards: Path) -> None:
    """Uniform guesses: what a byte costs is what its ids cost."""
    letters = CharTokenizer("abcdefg ü", end_of_text=True)
    flat = dataclasses.replace(
        subject_of(letters), logits=lambda model, idx, read, branches: torch.zeros(len(read), 10)
    )
    found = text_loss.text_loss(flat, shards)
    tokens = val_windows(shards, sequence_len=1).stream.windows(np.zeros(1, int), length=3000)[0]
    text = ByteTokenizer().decode(tokens)
    ids = len(text) + int((tokens == 256).sum())
    assert found.tokens == ids - 1
    assert found.loss == pytest.approx(math.log(10), rel=1e-6)
    asked_bytes = len(text.encode()) - len(text[0].encode())
    assert found.bpb == pytest.approx(math.log2(10) * (ids - 1) / asked_bytes, rel=1e-6)


def test_a_text_that_a_tokenizer_lacks_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="is not among the tokenizer's"):
        text_loss.text_loss(subject_of(CharTokenizer("abc", end_of_text=True)), shards)


def test_a_tokenizer_that_makes_nothing_of_a_text_is_refused(shards: Path) -> None:
    class Nothing(Others):
        start = None
        ends = frozenset[int]()

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[] for _ in texts]

    mine = dataclasses.replace(subject_of(ByteTokenizer()), text=Nothing())
    with pytest.raises(UserError, match="no token to predict"):
        text_loss.text_loss(mine, shards)

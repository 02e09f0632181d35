"""Scoring: shared stems, batches, cuts and ranks change no answer (fp32, every family)."""

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, model_plan, on_one_thread, shaken
from gloo import start
from torch import nn

from tuppence.config import ModelPlan
from tuppence.evals import score, subject
from tuppence.evals.items import Answer, Ask
from tuppence.evals.subject import Subject
from tuppence.model import Family, build, layers
from tuppence.model.branches import Branches
from tuppence.ranks import join
from tuppence.tokenizer.kinds import CharTokenizer
from tuppence.workers import Workers

one_thread = pytest.fixture(autouse=True)(on_one_thread)

CONTEXT = 24
LETTERS = "".join(chr(97 + i) for i in range(26)) + "".join(chr(65 + i) for i in range(23))
MIXED = {
    "mixture": {**SMALL["looped"], "mixture_of_depths": True},
    "windows": {"family": "depth", "n_layer": 4, "window_pattern": "SSSL"},
}
MODELS = {**SMALL, **MIXED}


def subject_of(
    plan: ModelPlan, *, workers: int = 1, attention: str = "sdpa", end: int | None = None
) -> Subject:
    model = build(plan, attention=attention, document_end=end)
    model.load_state_dict(shaken(plan).state_dict())
    tokenizer = CharTokenizer(LETTERS, end_of_text=True)
    together = Workers(model, count=workers, device="cpu", precision="fp32")
    return subject.of_run(together, tokenizer, context=plan.sequence_len, identity={})


def plan_of(name: str) -> ModelPlan:
    return model_plan(sequence_len=CONTEXT, **MODELS[name])


def naive(model: Family, ask: Ask, keep: int = CONTEXT) -> Answer:
    """One text, fed whole, by itself."""
    ids = list(ask.ids)[-keep:]
    scored = min(ask.scored, len(ids) - 1)
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids[:CONTEXT]]))[0].log_softmax(-1)
    nats, greedy = 0.0, True
    for place in range(len(ids) - 1 - scored, len(ids) - 1):
        nats -= logits[place, ids[place + 1]].item()
        greedy &= bool(logits[place].argmax() == ids[place + 1])
    return Answer(nats, scored, greedy)


def questions(seed: int = 0, ids: int = 49) -> list[tuple[int, list[Ask]]]:
    """Items as suites ask them: choices of unlike lengths, one id each, a suffix, too long, odd."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> list[int]:
        return [rng.randrange(ids) for _ in range(rng.randint(least, most))]

    asked: list[list[Ask]] = []
    for _ in range(6):
        stem = text(5, 12)
        asked.append([Ask([*stem, *end], len(end)) for end in (text(1, 8) for _ in range(4))])
    stem = text(9, 9)
    asked.append([Ask([*stem, choice], 1) for choice in (1, 2, 3, 4)])
    suffix = text(4, 4)
    asked.append([Ask([7, *text(2, 6), *suffix], 4) for _ in range(2)])
    asked.append([Ask(text(6, 9), 3)])
    long = text(CONTEXT + 9, CONTEXT + 9)
    asked.append([Ask([*long, *end], len(end)) for end in ([3, 4], [5, 6], [7, 8, 9])])
    asked.append([Ask(text(CONTEXT + 6, CONTEXT + 6), CONTEXT + 2)])  # more than is left of it
    asked.append([Ask(stem, 0), Ask([*stem, 5], 1)])
    asked.append([Ask([4], 1)])
    return list(enumerate(asked))


def found_by(who: Subject, asked: list[tuple[int, list[Ask]]], **how: Any) -> dict[int, Any]:
    return dict(score.answers(who, asked, **how))


def same(a: dict[int, list[Answer]], b: dict[int, list[Answer]], bound: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for key, mine in a.items():
        for one, other in zip(mine, b[key], strict=True):
            assert one.tokens == other.tokens
            assert one.greedy == other.greedy
            assert one.nats == pytest.approx(other.nats, abs=bound * max(1, one.tokens))


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_text_by_itself(name: str, attention: str) -> None:
    who = subject_of(plan_of(name), attention=attention)
    asked = questions()
    alone = {key: [naive(who.workers.model, ask) for ask in asks] for key, asks in asked}  # type: ignore[arg-type]
    for how in ({}, {"batch": 1}, {"batch": 3}):
        same(found_by(who, asked, **how), alone)


@pytest.mark.parametrize("name", SMALL)
def test_answers_within_documents(name: str) -> None:
    """A model that attends within documents: the end-of-text that begins a text, and others."""
    who = subject_of(plan_of(name), end=49)
    asked = [(k, [Ask([49, *a.ids], a.scored) for a in asks]) for k, asks in questions(ids=50)]
    alone = {key: [naive(who.workers.model, ask) for ask in asks] for key, asks in asked}  # type: ignore[arg-type]
    same(found_by(who, asked), alone)


def test_a_subject_that_cannot_branch_answers_the_same() -> None:
    plan = plan_of("gpt2")
    who = subject_of(plan)
    seen: list[object] = []

    def logits(model: nn.Module, idx: Any, read: Any, branches: Branches | None) -> Any:
        seen.append(branches)
        return who.logits(model, idx, read, branches)

    apart = Subject(**{**vars(who), "branching": False, "logits": logits})
    same(found_by(apart, questions()), found_by(who, questions()))
    assert all(branches is None for branches in seen)


def test_workers_share_the_passes() -> None:
    alone, three = (subject_of(plan_of("depth"), workers=count) for count in (1, 3))
    same(found_by(three, questions()), found_by(alone, questions()))


def test_a_longer_keep_cuts_less() -> None:
    """lm-evaluation-harness keeps an id more: the last one is not fed."""
    who = subject_of(plan_of("gpt2"))
    asked = [(0, [Ask(list(range(40)), 6)])]
    longer = found_by(who, asked, keep=CONTEXT + 1)
    same(longer, {0: [naive(who.workers.model, asked[0][1][0], CONTEXT + 1)]})  # type: ignore[arg-type]
    assert longer[0][0].nats != found_by(who, asked)[0][0].nats


def test_what_is_shared_is_fed_once() -> None:
    """Four choices behind a stem of 20 are one row of 20 and what each adds; of one id, one row."""
    who = subject_of(plan_of("gpt2"))
    fed: list[tuple[int, ...]] = []

    def logits(model: nn.Module, idx: Any, read: Any, branches: Any) -> Any:
        fed.append((*idx.shape, len(read)))
        return who.logits(model, idx, read, branches)

    watched = Subject(**{**vars(who), "logits": logits})
    stem = list(range(20))
    found_by(watched, [(0, [Ask([*stem, 30 + i, 40, 41], 3) for i in range(4)])])
    found_by(watched, [(0, [Ask([*stem, 30 + i], 1) for i in range(4)])])
    assert fed == [(1, 20 + 4 * 2, 12), (1, 20, 4)]


def test_a_deadline_leaves_the_rest_out() -> None:
    who = subject_of(plan_of("gpt2"))
    assert found_by(who, questions(), deadline=time.monotonic() - 1) == {}
    some = iter(score.answers(who, questions(), batch=1, deadline=math.inf))
    assert next(some)[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_give_no_answers(value: float) -> None:
    who = subject_of(plan_of("gpt2"))
    who.workers.model.get_parameter("ln_f.weight").data.fill_(value)
    with pytest.raises(score.NotFinite, match=r"loss of an answer is .*the weights are broken"):
        found_by(who, questions())
    assert who.workers.model.training


def goes_on(who: Subject) -> tuple[int, list[Ask]]:
    """What the model itself goes on with."""
    ids = [3, 4]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(who.workers.model.eval()(torch.tensor([ids]))[0, -1].argmax()))
    return 99, [Ask(ids, 5)]


@pytest.mark.parametrize("name", SMALL)
def test_how_many_logits_are_read_at_once_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = subject_of(plan_of(name))
    likely = goes_on(who)
    whole = found_by(who, [*questions(), likely])
    for module, rows in ((score, 2), (layers, 16)):
        monkeypatch.setattr(module, "HEAD_CHUNK", {False: rows * 50})
    assert found_by(who, [*questions(), likely]) == whole
    assert whole[99][0].greedy


def test_modes_are_put_back() -> None:
    who = subject_of(plan_of("gpt2"))
    found_by(who, questions())
    assert who.workers.model.training


def _on_rank(folder: str) -> int:
    """What a rank hears, and how many passes it made, as a file of its own."""
    torch.set_num_threads(1)
    ranks, made = join("cpu"), [0]
    who = subject_of(plan_of("looped"))

    def logits(model: nn.Module, *args: Any) -> Any:
        made[0] += 1
        return who.logits(model, *args)

    found = found_by(Subject(**{**vars(who), "logits": logits}), questions(), ranks=ranks, batch=2)
    told = {key: [vars(one) for one in each] for key, each in found.items()}
    (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps([made[0], told]))
    ranks.part()
    return 0


def test_ranks_share_the_passes_and_all_hear(tmp_path: Path) -> None:
    started = start(2, _on_rank, str(tmp_path), folder=tmp_path)
    assert started.codes() == [0, 0], started.said(0) + started.said(1)
    alone = found_by(subject_of(plan_of("looped")), questions(), batch=2)
    made = []
    for rank in range(2):
        passes, told = json.loads((tmp_path / f"{rank}.json").read_text())
        same({int(key): [Answer(**one) for one in each] for key, each in told.items()}, alone)
        made.append(passes)
    assert made[0] == made[1]  # with FSDP a rank that stopped earlier would leave the other waiting
    assert made[0] < len(questions())


def compiled_kinds(plan: ModelPlan) -> Iterator[nn.Module]:
    whole, blocks = shaken(plan), shaken(plan)
    for block in blocks.blocks():
        block.compile()
    yield torch.compile(whole)  # type: ignore[misc]
    yield blocks


@pytest.mark.filterwarnings("ignore:.*script_method")
def test_a_compiled_model_is_asked_as_it_is() -> None:
    """Rows of every length would be compiled anew."""
    plan = plan_of("gpt2")
    for model in compiled_kinds(plan):
        workers = Workers(model, count=1, device="cpu", precision="fp32")
        tokenizer = CharTokenizer(LETTERS, end_of_text=True)
        who = subject.of_run(workers, tokenizer, context=CONTEXT, identity={})
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(found_by(who, questions()), found_by(subject_of(plan), questions()))

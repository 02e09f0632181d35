"""What judging a run by tasks costs: tokens, seconds, dollars, here and on the price book."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from tuppence import config
from tuppence.config import DataPlan, Plan, Run, SuitePlan, TasksPlan
from tuppence.errors import DoesNotFit, UserError
from tuppence.evals import samples
from tuppence.pipeline import on_this_machine
from tuppence.plan.describe import local_option, plan_text
from tuppence.plan.flags import flags
from tuppence.plan.hardware import Calibration
from tuppence.plan.options import Option, options
from tuppence.plan.prices import price_book
from tuppence.plan.solve import solve
from tuppence.plan.tasks import (
    FIXED_ROWS,
    FIXED_TOKENS,
    HELLASWAG,
    TASKS_GIB,
    TASKS_SHARE,
    Priced,
    multiples,
    priced,
    rate,
    run_seconds,
    solve_tasks,
    too_much,
)

HELLASWAG_FILE = Path(__file__).parents[2] / "shared/data/hellaswag_val.jsonl.xz"

Planner = Callable[..., Plan]


@pytest.fixture
def gpt2_data(data_plan: DataPlan) -> DataPlan:
    """A corpus in GPT-2's tokens, four bytes each."""
    return dataclasses.replace(
        data_plan, tokenizer="gpt2", vocab_size=50257, train_tokens=10**9, bytes_per_token=4.0
    )


@pytest.fixture
def planned(small_run: Run, gpt2_data: DataPlan, calibration: Calibration) -> Planner:
    """The small run with other words, on a made-up machine."""

    def planned(*words: str) -> Plan:
        return solve(config.override(small_run, [*words]), gpt2_data, calibration)

    return planned


def suite_of(plan: Plan, name: str) -> SuitePlan:
    assert plan.tasks is not None
    (found,) = (suite for suite in plan.tasks.suites if suite.name == name)
    return found


# ---------------------------------------------------------------- one evaluation


def test_an_item_reads_its_beginning_once_unless_it_is_cut() -> None:
    task = Priced("four choices", 10, asks=4, item_bytes=500.0, ask_bytes=350.0)
    assert task.tokens(5.0, 100) == 100  # 60 of the beginning, 10 of each choice
    assert task.wanted(5.0, 100) == 40
    assert task.tokens(5.0, 60) == 4 * 60  # 70 do not fit: each is cut elsewhere
    alone = Priced("one", 10, asks=1, item_bytes=500.0, ask_bytes=500.0)
    assert alone.tokens(5.0, 1000) == 100
    assert alone.wanted(5.0, 1000) < 10


def test_tokens_follow_items_up_to_what_there_is(planned: Planner) -> None:
    def core(items: int) -> SuitePlan:
        return suite_of(planned("budget.hours=1000", f"train.core_items={items}"), "core")

    two, four = core(2), core(4)
    assert two.tokens * 2 == pytest.approx(four.tokens, abs=2)
    every = core(100_000)
    assert every.items is None
    tasks = priced("core")
    assert sum(task.items for task in tasks) == 91_037
    assert every.tokens == round(sum(task.items * task.tokens(4.0, 32) for task in tasks))
    assert core(50).tokens < 50 / 4 * four.tokens  # one task has 32


def test_seconds_are_a_forward_passs(planned: Planner) -> None:
    plan = planned("train.core_items=20", "model.n_layer=8", "model.n_embd=512")
    suite, told = suite_of(plan, "core"), plan.predicted
    a_token = told.eval_seconds / plan.cadence.eval_tokens  # and a sample's share
    assert 0.3 * a_token < suite.seconds / suite.tokens < 1.5 * a_token


def test_unset_items_are_all_of_hellaswag_and_nanochats_of_core(planned: Planner) -> None:
    plan = planned("train.core_every=100", "train.hellaswag_every=50")
    assert (suite_of(plan, "core").items, suite_of(plan, "core").every_steps) == (500, 100)
    assert (suite_of(plan, "hellaswag").items, suite_of(plan, "hellaswag").every_steps) == (
        None,
        50,
    )
    assert suite_of(planned("train.core_items=3"), "core").every_steps is None


@pytest.mark.skipif(not HELLASWAG_FILE.exists(), reason="needs ../shared/data")
def test_hellaswag_is_as_long_as_the_plan_thinks() -> None:
    with lzma.open(HELLASWAG_FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    stems = sum(len(row["ctx"].encode()) for row in rows) / len(rows)
    ends = sum(len(f" {end}".encode()) for row in rows for end in row["endings"]) / len(rows)
    assert len(rows) == HELLASWAG.items
    assert HELLASWAG.item_bytes == pytest.approx(stems + ends, rel=0.01)
    assert HELLASWAG.ask_bytes == pytest.approx(stems + ends / 4, rel=0.01)


def test_the_fixed_prompts_are_as_many_as_the_plan_thinks(planned: Planner) -> None:
    assert len(samples.PROMPTS) * len(samples.TEMPERATURES) == FIXED_ROWS
    assert samples.NEW_TOKENS == FIXED_TOKENS
    plan = planned("budget.hours=1")
    assert plan.cadence.fixed_tokens == FIXED_TOKENS
    assert plan.predicted.fixed_seconds > 0
    silent = planned("budget.hours=1", "train.sample_tokens=0")
    assert (silent.cadence.fixed_tokens, silent.predicted.fixed_seconds) == (0, 0)


# ---------------------------------------------------------------- a run


def test_how_many_steps_are_a_multiple_of_any() -> None:
    for periods in ([], [3], [4, 6], [4, 6, 10], [5, 5]):
        counted = sum(any(n % p == 0 for p in periods) for n in range(1, 61))
        assert multiples(60, periods) == counted
        assert rate(periods) == pytest.approx(counted / 60)


@pytest.mark.parametrize("budget", ["budget.hours=1", "budget.steps=1000"])
def test_a_plan_counts_every_evaluation(planned: Planner, budget: str) -> None:
    words = [budget, "train.eval_every=30", "train.eval_tokens=512"]
    every = ["train.core_items=20", "train.core_every=100", "train.hellaswag_items=7"]
    plan = planned(*words, *every)
    told, steps = plan.predicted, int(plan.predicted.steps.mid)
    evals = 1 + sum(n % 30 == 0 or n % 100 == 0 for n in range(1, steps))
    tasks = suite_of(plan, "core").seconds * (1 + (steps - 1) // 100)
    tasks += suite_of(plan, "hellaswag").seconds
    expected = evals * told.eval_seconds + told.fixed_seconds + tasks
    assert told.phase_seconds["evaluate"] == pytest.approx(expected)
    assert tasks > 0.05 * told.hours.mid * 3600
    assert told.hours.mid * 3600 == pytest.approx(sum(told.phase_seconds.values()), rel=0.01)
    assert run_seconds(plan.tasks, steps) == pytest.approx(tasks)


def test_losses_that_come_with_tasks_keep_to_their_share(planned: Planner) -> None:
    words = ["budget.hours=1", "train.hellaswag_items=1"]
    rare = planned(*words)
    often = planned(*words, "train.hellaswag_every=20")
    assert often.cadence.eval_tokens < rare.cadence.eval_tokens
    told = often.predicted
    tasks = run_seconds(often.tasks, told.steps.mid)
    losses = told.phase_seconds["evaluate"] - tasks - told.fixed_seconds
    assert losses < 0.1 * told.hours.mid * 3600  # twice 4%, and a sample's each time
    asked = planned(*words, "train.hellaswag_every=20", "train.eval_tokens=5000")
    assert asked.cadence.eval_tokens == 5000


def test_tasks_that_leave_no_step_are_named(planned: Planner) -> None:
    with pytest.raises(DoesNotFit, match=r"tasks [\d.]+ s of it: lower train\.core_items"):
        planned("budget.usd=0.02", "train.core_items=10000")
    with pytest.raises(DoesNotFit, match=r"receipt take about [\d.]+ s: give"):
        planned("budget.usd=0.0001")


def test_what_tasks_take_is_not_trained(planned: Planner) -> None:
    plain, judged = (planned("budget.usd=0.1", *w) for w in ([], ["train.core_items=20"]))
    less = plain.predicted.phase_seconds["train"] - judged.predicted.phase_seconds["train"]
    step = plain.predicted.step_seconds.mid
    assert less == pytest.approx(suite_of(judged, "core").seconds, abs=2 * step)
    assert judged.predicted.usd.mid == pytest.approx(0.1, rel=0.01)
    gib = [plan.predicted.peak_memory_gib.mid for plan in (plain, judged)]
    assert gib[1] == pytest.approx(gib[0] + TASKS_GIB)  # the texts are held in memory
    usd = [local_option(plan)["usd"]["evaluate"] for plan in (plain, judged)]
    price = plain.machine.usd_per_hour / 3600
    assert usd[1] - usd[0] == pytest.approx(suite_of(judged, "core").seconds * price, rel=0.01)


def test_too_much_says_what_would_do(planned: Planner) -> None:
    words = ["budget.hours=0.1", "train.hellaswag_items=20", "train.core_every=10"]
    plan = planned(*words, "train.core_items=40")
    (warning,) = [w for w in plan.warnings if w.code == "tasks_share"]
    remedy = [word for word in warning.message.split() if word.startswith("train.")]
    assert len(remedy) == 2
    lower = planned(*words, *remedy)
    taken = run_seconds(lower.tasks, lower.predicted.steps.mid)
    whole = sum(lower.predicted.phase_seconds.values())
    assert 0.5 * TASKS_SHARE < taken / whole < 1.3 * TASKS_SHARE
    assert not [w for w in planned(*words[:2]).warnings if w.code == "tasks_share"]


def test_the_text_tells_of_tasks(planned: Planner) -> None:
    text = plan_text(planned("train.core_items=2", "train.hellaswag_every=100"))
    assert "tasks     hellaswag, every item, every 100 steps and at the end: " in text
    assert "core, 2 items a task, at the end: " in text
    assert "\ntasks " not in plan_text(planned())


def test_more_cores_are_faster_at_tasks_too(
    planned: Planner, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("train.core_items=2")
    wanted = config.override(small_run, [f"machine.threads={2 * plan.machine.threads}"])
    here = on_this_machine(plan, wanted)
    assert suite_of(here, "core").seconds == pytest.approx(suite_of(plan, "core").seconds / 2)
    assert here.predicted.eval_seconds == pytest.approx(plan.predicted.eval_seconds / 2)


# ---------------------------------------------------------------- the price book


def chosen(run: Run, data: DataPlan, *words: str) -> Option:
    words = ("model.n_layer=12", "model.n_embd=768", "model.n_head=12", *words)
    words = ("machine.gpu=H100", "machine.gpu_count=8", "machine.usd_per_hour=none", *words)
    words = ("model.sequence_len=1024", "train.batch_tokens=524288", *words)
    return options(config.override(run, [*words]), data, price_book())[0]


@pytest.mark.parametrize("budget", ["budget.usd=100", "budget.steps=2000"])
def test_machines_are_billed_for_tasks(small_run: Run, gpt2_data: DataPlan, budget: str) -> None:
    plain = chosen(small_run, gpt2_data, budget)
    often = ["train.core_every=250", "train.core_items=20"]
    judged = chosen(small_run, gpt2_data, budget, *often)
    assert plain.stages is not None
    assert judged.stages is not None
    assert judged.tokens is not None
    steps = judged.tokens.mid // 524_288
    once = run_seconds(tasks_at(judged, small_run, gpt2_data, budget, *often), 1)
    more = judged.stages.seconds["evaluate"] - plain.stages.seconds["evaluate"]
    assert more == pytest.approx(once * (1 + (steps - 1) // 250), rel=0.2)
    if budget.startswith("budget.usd"):
        assert judged.stages.training_usd == pytest.approx(100, rel=0.01)
        assert judged.stages.training_usd <= 100.01
    else:
        assert judged.stages.usd["evaluate"] > plain.stages.usd["evaluate"]


def tasks_at(option: Option, run: Run, data: DataPlan, *words: str) -> TasksPlan | None:
    assert option.tokens_per_second is not None
    token = 1 / (3 * option.tokens_per_second.mid)
    asked = config.override(run, [*words])
    return solve_tasks(asked, data, context=1024, head=0.27, token_seconds=token)


def test_a_machines_tasks_are_warned_of(small_run: Run, gpt2_data: DataPlan) -> None:
    found = []
    for items in (2, 5000):
        words = [f"train.core_items={items}", "budget.usd=20"]
        run = config.override(small_run, ["train.core_every=20", *words])
        option = chosen(run, gpt2_data)
        found.append({w.code for w in flags(run, gpt2_data, option, year=2026)})
    assert "tasks_share" not in found[0]
    assert "tasks_share" in found[1]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("train.core_every=0", "train.core_every=0: at least 1"),
        ("train.core_items=-3", "train.core_items=-3: at least 1"),
        ("train.hellaswag_items=0", "train.hellaswag_items=0: at least 1"),
        ("train.core_data=here", "train.core_data=here: say train.core_items or train.core_every"),
    ],
)
def test_what_is_no_way_to_judge_is_refused(planned: Planner, word: str, complaint: str) -> None:
    with pytest.raises(UserError) as refusal:
        planned(word)
    assert str(refusal.value).startswith(complaint)


@pytest.mark.parametrize("tokenizer", ["char", "char:abc"])
def test_characters_cannot_read_tasks(
    small_run: Run, data_plan: DataPlan, calibration: Calibration, tokenizer: str
) -> None:
    data = dataclasses.replace(data_plan, tokenizer=tokenizer)
    for word in ("train.core_items=2", "train.hellaswag_every=100"):
        with pytest.raises(UserError, match=r"a tokenizer of characters .* data\.tokenizer=gpt2"):
            solve(config.override(small_run, [word]), data, calibration)
        with pytest.raises(UserError, match="a tokenizer of characters"):
            options(config.override(small_run, [word, "machine.gpu=H100"]), data, price_book())


# ---------------------------------------------------------------- older files


def test_what_was_written_before_there_were_tasks_is_read(planned: Planner) -> None:
    document = json.loads(config.to_json(planned()))
    for group, key in ((document, "tasks"), (document["cadence"], "fixed_tokens")):
        del group[key]
    del document["predicted"]["fixed_seconds"]
    plan = config.from_json(Plan, json.dumps(document))
    assert (plan.tasks, plan.cadence.fixed_tokens) == (None, 0)
    run = json.loads(config.to_json(Run(name="x")))
    for key in ("core_every", "core_items", "core_data"):
        del run["train"][key]
    assert config.from_json(Run, json.dumps(run)) == Run(name="x")


def test_a_plan_with_tasks_round_trips(planned: Planner) -> None:
    plan = planned("train.core_items=2")
    again = config.from_json(Plan, config.to_json(plan))
    assert again == plan
    assert too_much(again.tasks, steps=1, seconds=1e-9) is not None

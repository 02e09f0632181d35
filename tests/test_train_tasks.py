"""Runs that are judged by tasks while they train: what is asked when, charged, kept and told."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gloo import command, start
from known import know_this_machine
from test_schedule_pace import Clock

from tuppence import cli, config, report, spending
from tuppence.config import Budget, DataPlan, Plan, Run, SuitePlan, TasksPlan
from tuppence.data.prepare import Options, prepare
from tuppence.errors import UserError
from tuppence.evals import running
from tuppence.evals.items import Judged
from tuppence.evals.score import NotFinite
from tuppence.folder import RunFolder
from tuppence.ledger import Meter, by_phase, spent
from tuppence.pipeline import on_this_machine
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.report.account import SUITES
from tuppence.train import judging, loop, setup
from tuppence.train.interrupt import Interrupted
from tuppence.train.loop import train
from tuppence.train.pace import OVERRUN, Pace

SHARED = Path(__file__).parents[2] / "shared/data"
CORE, HELLASWAG = SHARED / "core_eval.tar.xz", SHARED / "hellaswag_val.jsonl.xz"
there = pytest.mark.skipif(
    not (CORE.exists() and HELLASWAG.exists()), reason="needs the tasks of ../shared/data"
)
TEXT = "The old man sat by the sea, and the sea was still. " * 400
TINY = [
    "budget.steps=6",
    "machine.usd_per_hour=1",
    "machine.threads=1",
    "model.family=gpt2",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.sequence_len=64",
    "data.tokenizer=gpt2",
    "train.batch_tokens=128",
    "train.learning_rate=1e-2",
    "train.precision=fp32",
    "train.attention=sdpa",
    "train.eval_every=4",
    "train.eval_tokens=256",
]
IN_SUITES = [
    f"train.hellaswag_data={HELLASWAG}",
    "train.hellaswag_items=4",
    "train.hellaswag_every=3",
]
AT_THE_END = [f"train.core_data={CORE}", "train.core_items=2"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataPlan]:
    """A small text in GPT-2's tokens."""
    place = tmp_path_factory.mktemp("corpus")
    (place / "sea.txt").write_text(TEXT)
    source = str(place / "sea.txt")
    made = prepare(
        source=source, tokenizer="gpt2", root=place, options=Options(val_tokens=400, workers=1)
    )
    told = made.manifest
    return made.folder, DataPlan(
        source=source,
        tokenizer="gpt2",
        text_field="text",
        max_tokens=None,
        val_tokens_asked=400,
        vocab_size=told.vocab_size,
        train_tokens=told.train_tokens,
        val_tokens=told.val_tokens,
        bytes_per_token=told.bytes_per_token,
        inputs_sha256=told.inputs_sha256,
        exact=True,
        packing="plain",
    )


Spend = Callable[..., RunFolder]


@pytest.fixture
def plan_of(corpus: tuple[Path, DataPlan], calibration: Calibration) -> Callable[..., Plan]:
    def plan_of(*words: str) -> Plan:
        return solve(config.override(Run(name="sea"), [*TINY, *words]), corpus[1], calibration)

    return plan_of


@pytest.fixture
def spend(corpus: tuple[Path, DataPlan], tmp_path: Path) -> Spend:
    """One attempt at a plan."""

    def spend(plan: Plan, name: str = "run", attempt: int = 1) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        folder.write_json("plan.json", dataclasses.asdict(plan))
        price = plan.machine.usd_per_hour
        meter = Meter(folder, usd_per_hour=price, attempt=attempt, start=0.0)
        meter.start = meter._since = meter.now()  # the tests' own start-up is nobody's bill
        try:
            train(plan, folder, corpus[0], meter=meter, attempt=attempt)
        finally:
            meter.close()
            folder.close()
        return folder

    return spend


def without_time(told: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != "seconds"}


def results(folder: RunFolder) -> list[tuple[int, dict[str, Any]]]:
    """What tasks said, by step."""
    return [
        (row["step"], {name: without_time(row[name]) for name in SUITES if name in row})
        for row in folder.latest("evals")
    ]


def codes(folder: RunFolder) -> list[str]:
    return [event["code"] for event in folder.rows("events")]


# ---------------------------------------------------------------- in steps


@there
def test_tasks_are_asked_when_due_and_told_in_the_receipt(
    plan_of: Callable[..., Plan], spend: Spend
) -> None:
    folder = spend(plan_of(*IN_SUITES, *AT_THE_END, "train.sample_tokens=6"))
    asked = [(step, sorted(told)) for step, told in results(folder)]
    assert asked == [(3, ["hellaswag"]), (4, []), (6, ["core", "hellaswag"])]
    rows = list(folder.rows("evals"))
    assert [row["step"] for row in rows] == [3, 3, 4, 6, 6]  # the loss at once, and then again
    assert rows[0].items() <= {**rows[1], "usd": rows[0]["usd"]}.items()
    last = rows[-1]
    assert last["metric_version"] >= 1
    assert all(len(last[key]) == 64 for key in ("tokenizer_sha256", "val_sha256"))
    assert (last["core"]["n"], last["core"]["max_per_task"]) == (44, 2)
    assert (last["hellaswag"]["n"], last["hellaswag"]["of_items"]) == (4, 4)

    told = report.write(folder)
    assert told["tasks"]["core"]["score"] == last["core"]["score"]
    assert told["tasks"]["core"]["error"] > 0
    assert [point["step"] for point in told["scores"]["hellaswag"]] == [3, 6]
    assert told["actual"]["val_bpb"] == last["bpb"]
    evaluated = next(part for part in told["phases"] if part["phase"] == "evaluate")
    took = sum(row[name]["seconds"] for row in rows for name in SUITES if name in row)
    assert evaluated["seconds"] >= took
    assert evaluated["usd"] == pytest.approx(evaluated["seconds"] / 3600)
    said = {(row["prompt"], row["temperature"]) for row in told["samples"] if row["fixed"]}
    assert len(said) == 12
    text, page = report.as_text(told), folder.file("receipt.html").read_text()
    markdown = folder.file("receipt.md").read_text()
    for form in (text, markdown):
        assert f"{last['core']['score']:.4f} ± {last['core']['error']:.4f}" in form
        assert "44 of 44 items" in form
        assert f"acc {last['hellaswag']['acc']:.2%} ± " in form
    for form in (markdown, page):
        assert "bigbench_qa_wikidata" in form
        assert "GPT-2" in form
        assert "The largest planet that goes round our sun is" in form
    assert 'aria-label="HellaSwag acc_norm against tokens"' in page
    assert 'aria-label="CORE against tokens"' not in page  # of it there is one point


@there
def test_tasks_change_no_weight(plan_of: Callable[..., Plan], spend: Spend) -> None:
    plain, judged = spend(plan_of(), "plain"), spend(plan_of(*IN_SUITES), "judged")
    rows = [[(r["loss"], r["tokens_sha"]) for r in f.latest("metrics")] for f in (plain, judged)]
    assert rows[0] == rows[1]
    shas = [f.read_json("checkpoints/last.json")["sha256"] for f in (plain, judged)]
    assert shas[0] == shas[1]


@there
def test_a_signal_inside_a_suite_only_puts_it_off(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*IN_SUITES, "train.save_every=100"]
    straight = spend(plan_of(*words), "straight")
    run = running.run

    def struck(*args: Any, tick: Callable[[], None], **more: Any) -> dict[str, list[Judged]]:
        os.kill(os.getpid(), signal.SIGTERM)
        return run(*args, tick=tick, **more)

    monkeypatch.setattr(judging.running, "run", struck)
    with pytest.raises(Interrupted, match="step 3"):
        spend(plan_of(*words))
    monkeypatch.setattr(judging.running, "run", run)
    state = json.loads(next((straight.path.parent / "run").rglob("state.json")).read_text())
    assert (state["step"], state["evaluation_due"]) == (3, True)
    resumed = spend(plan_of(*words), attempt=2)
    assert results(resumed) == results(straight)
    rows = [[(r["step"], r["loss"]) for r in f.latest("metrics")] for f in (straight, resumed)]
    assert rows[0] == rows[1]


@there
def test_what_was_answered_of_saved_weights_is_not_asked_again(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"train.hellaswag_data={HELLASWAG}", "train.hellaswag_items=40", "budget.steps=2"]
    straight = spend(plan_of(*words), "straight")
    run, heard = running.run, []

    def struck(*args: Any, told: Callable[[int, int], None], **more: Any) -> Any:
        def noted(done: int, of: int) -> None:
            heard.append(done)
            if done == 10 and heard[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            told(done, of)

        return run(*args, told=noted, **more)

    monkeypatch.setattr(judging.running, "run", struck)
    with pytest.raises(Interrupted, match="step 2"):
        spend(plan_of(*words))
    assert heard[-1] < 40
    kept = heard[-1]
    heard.clear()
    resumed = spend(plan_of(*words), attempt=2)
    assert heard[0] == kept >= 10
    assert heard[-1] == 40
    assert results(resumed) == results(straight)
    (journal,) = resumed.file("evaluations").rglob("*.jsonl")
    assert journal.parent.name == "step_00000002"
    head, *rows = map(json.loads, journal.read_text().splitlines())
    weights = resumed.read_json("checkpoints/last.json")["sha256"]
    who = {"weights_sha256": weights, "precision": "fp32", "context": 64}
    assert who.items() <= head["subject"].items()
    assert head["suite"]["metric"] == "hellaswag"
    assert len(rows) == 40
    assert report.write(resumed)["later"] == []


@there
def test_an_answer_that_is_no_number_counts_for_nothing(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **more: Any) -> dict[str, list[Judged]]:
        raise NotFinite("an answer is nan nats")

    monkeypatch.setattr(judging.running, "run", broken)
    folder = spend(plan_of(*IN_SUITES, "budget.hours=1"))
    told = [e for e in folder.rows("events") if e["code"] == "eval_not_finite"]
    assert [e["step"] for e in told] == [3, loop.TASTE_STEPS, 6]
    assert "hellaswag: an answer is nan nats" in told[0]["message"]
    assert [step for step, found in results(folder) if found] == []
    assert "tasks_skipped" not in codes(folder)
    assert folder.latest("metrics")[-1]["step"] == 6


def test_another_attempt_may_be_told_another_place(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    """Where the tasks lie is not what the run is."""
    words = [*TINY, "train.core_items=2", "train.core_data="]
    first, second = (
        config.override(Run(name="sea"), [*words[:-1], f"{words[-1]}{place}"]) for place in "ab"
    )
    plan = plan_of("train.core_items=2", "train.core_data=a")
    assert plan.tasks is not None
    moved = on_this_machine(plan, second).tasks
    assert moved is not None
    assert (plan.tasks.suites[0].data, moved.suites[0].data) == ("a", "b")
    folder = RunFolder(tmp_path)
    folder.write_json("run.json", dataclasses.asdict(first))
    spending._check_same_run(folder, second)
    with pytest.raises(UserError, match="core_items=2, not 3"):
        spending._check_same_run(folder, config.override(second, ["train.core_items=3"]))


def test_no_samples_where_none_are_asked(plan_of: Callable[..., Plan], spend: Spend) -> None:
    folder = spend(plan_of("train.sample_tokens=0", "budget.steps=2"))
    assert not folder.file("samples.jsonl").exists()
    assert report.write(folder)["samples"] == []


# ---------------------------------------------------------------- in dollars


@there
def test_a_budget_in_dollars_ends_within_it(plan_of: Callable[..., Plan], spend: Spend) -> None:
    """Never above; how close below is for a machine that nobody else uses."""
    words = ["budget.usd=0.0022", "train.eval_every=1000000", *AT_THE_END]  # eight seconds
    words += [f"train.hellaswag_data={HELLASWAG}", "train.hellaswag_items=8"]
    folder = spend(plan_of(*words))
    assert spent(folder).usd <= 0.0022
    last = folder.latest("metrics")[-1]
    assert (last["progress"], last["lr"]) == (1.0, 0.0)
    judged = {name for _, told in results(folder) for name in told}
    missing = {e["suite"] for e in folder.rows("events") if e["code"] == "tasks_skipped"}
    assert judged | missing == {"core", "hellaswag"}  # said, or why not
    assert by_phase(folder)["evaluate"].usd > 0


@there
def test_a_suite_without_time_says_so(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "_behind", lambda trainer, name: 1e9)  # all is needed elsewhere
    plan = plan_of("budget.hours=0.003", "budget.steps=3", *AT_THE_END)
    folder = spend(plan)
    assert codes(folder).count("tasks_skipped") == 1
    assert results(folder)[-1] == (3, {})
    assert report.write(folder)["tasks"] == {}


@there
def test_a_suite_that_is_cut_short_says_of_how_much_it_is(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = running.run

    def some(subject: Any, tasks: Any, **more: Any) -> dict[str, list[Judged]]:
        return {label: each[:3] for label, each in run(subject, tasks, **more).items()}

    monkeypatch.setattr(judging.running, "run", some)
    folder = spend(plan_of(*IN_SUITES, "train.hellaswag_every=none"))
    told = folder.latest("evals")[-1]["hellaswag"]
    assert (told["n"], told["of_items"]) == (3, 4)
    (event,) = [e for e in folder.rows("events") if e["code"] == "tasks_cut"]
    assert "3 of 4 items" in event["message"]
    assert "3 of 4 items" in report.as_text(report.write(folder))


# ---------------------------------------------------------------- what the end keeps


@pytest.fixture
def pace(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Pace:
    """Of a plan with a suite of ten seconds, in simulated time."""
    plan = solve(dataclasses.replace(small_run, budget=Budget(hours=1.0)), data_plan, calibration)
    tasks = TasksPlan((SuitePlan("core", 5, None, None, 1000, 10.0),))
    plan = dataclasses.replace(plan, tasks=tasks)
    return Pace(plan, Clock(plan.machine.usd_per_hour))  # type: ignore[arg-type]


def test_the_end_keeps_what_tasks_take(pace: Pace) -> None:
    plain = Pace(dataclasses.replace(pace.plan, tasks=None), pace.meter)
    assert pace.reserve(0) - plain.reserve(0) == pytest.approx(11.0)
    step = pace.plan.predicted.step_seconds.mid
    for number in range(5):
        for one in (pace, plain):
            one.step_took(number, 1.5 * step)
    assert pace.suite_seconds("core") == pytest.approx(15.0)  # a guess is as far off as a step's
    pace.suite_took("core", 4.0)
    assert pace.reserve(0) - plain.reserve(0) == pytest.approx(4.2)  # timed: less care is needed
    for seconds in (6.0, 4.0, 5.0):  # a cold taste, and one beside which something else ran
        pace.suite_tasted("core", seconds)
    assert pace.suite_seconds("core") == 4.0
    pace.suite_took("core", math.inf)
    assert pace.suite_seconds("core") == pytest.approx(OVERRUN * 15.0)  # and no more than that


@there
def test_a_part_of_each_suite_is_timed_early_and_half_way(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    answered = judging._answered

    def noted(trainer: Any, suite: Any, tasks: Any, *rest: Any) -> dict[str, list[Judged]]:
        asked.append((trainer.state.step, sum(task.count for task in tasks)))
        return answered(trainer, suite, tasks, *rest)

    monkeypatch.setattr(judging, "_answered", noted)
    words = [*IN_SUITES, "train.hellaswag_every=none", "train.hellaswag_items=20"]
    words += ["budget.steps=12"]
    spend(plan_of(*words, "budget.hours=1"), "timed")
    part = 20 // judging.TASTE
    assert asked == [(loop.TASTE_STEPS, part), (6, part), (12, 20)]  # cold, half-way, whole
    asked.clear()
    spend(plan_of(*words), "stepped")  # where steps are counted time decides nothing
    assert asked == [(12, 20)]


def test_in_a_budget_of_time_a_suite_has_a_limit(pace: Pace) -> None:
    trainer = SimpleNamespace(
        pace=pace,
        ranks=SimpleNamespace(agree=lambda flag: flag, leads=lambda value: value),
        state=SimpleNamespace(step=7),
    )
    until = judging._until(trainer, "core")  # type: ignore[arg-type]
    assert until is not None
    assert until - time.monotonic() == pytest.approx(OVERRUN * 10.0, abs=1.0)
    pace.meter.time = 3600 - pace.reserve(7) - 12.0  # type: ignore[attr-defined]
    assert judging._until(trainer, "core") is None  # type: ignore[arg-type]
    pace.timed = False
    assert judging._until(trainer, "core") == math.inf  # type: ignore[arg-type]


# ---------------------------------------------------------------- best


def test_best_is_not_compared_with_another_measure(
    plan_of: Callable[..., Plan], spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = loop._log

    def stop_at_five(trainer: loop.Trainer, *rest: object) -> None:
        log(trainer, *rest)
        if trainer.state.step == 5 and trainer.state.attempt == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_log", stop_at_five)
    with pytest.raises(Interrupted):
        spend(plan_of())
    fields = setup.identity.fields

    def other(data: Path, *, sequence_len: int) -> dict[str, Any]:
        return {**fields(data, sequence_len=sequence_len), "val_sha256": "f" * 64}

    monkeypatch.setattr(setup.identity, "fields", other)
    monkeypatch.setattr(judging, "val_loss", worse(judging.val_loss))
    folder = spend(plan_of(), attempt=2)
    (event,) = [e for e in folder.rows("events") if e["code"] == "best_not_comparable"]
    assert "val splits hold other tokens" in event["message"]
    assert folder.read_json("checkpoints/best.json")["step"] == 6  # a first of its kind, if worse


def worse(val_loss: Callable[..., Any]) -> Callable[..., Any]:
    def found(*args: Any, **more: Any) -> Any:
        result = val_loss(*args, **more)
        return dataclasses.replace(result, loss=result.loss + 5.0)

    return found


# ---------------------------------------------------------------- from the command line


@pytest.fixture
def tuppence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    calibration: Calibration,
) -> Callable[..., tuple[int, str]]:
    """Runs one command line in this process, on a CPU that is known already."""
    from tuppence import host, pipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    monkeypatch.setattr(host, "process_start", time.time)
    monkeypatch.setattr(pipeline, "device_of", lambda run: "cpu")

    def tuppence(*words: str) -> tuple[int, str]:
        code = cli.main([*words])
        return code, capsys.readouterr().err

    return tuppence


@there
@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp"])  # where ranks must call the model equally often
def test_two_ranks_are_judged_as_one_process(
    corpus: tuple[Path, DataPlan], calibration: Calibration, cache_home: Path, how: str
) -> None:
    words = [*TINY, *IN_SUITES, *AT_THE_END, f"data.source={corpus[1].source}", "name=sea"]
    words += ["data.val_tokens=400", "train.sample_tokens=3", "train.eval_tokens=128"]
    each = [words, [*words, f"train.parallel={how}"]]
    know_this_machine(calibration, corpus[1], each[:1])
    know_this_machine(calibration, corpus[1], each[1:], ranks=(2,))
    found = []
    for world, asked in zip((1, 2), each, strict=True):
        home = cache_home / f"{world}"
        started = start(world, command, ["run", *asked], folder=home)
        assert started.codes() == [0] * world, started.said(0) + started.said(world - 1)
        folder = RunFolder(home / "runs/sea")
        found.append((results(folder), [row["prompt"] for row in folder.rows("samples")]))
    (one, said), (two, heard) = found
    assert [step for step, _ in one] == [step for step, _ in two] == [3, 4, 6]
    for (_, mine), (_, other) in zip(one, two, strict=True):
        assert mine == other
    assert said == heard  # what follows is drawn from all but flat odds, and may differ
    assert len(said) == 3 + 12


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train.core_items=2", "train.core_data=nowhere.zip"], "nowhere.zip: no such file"),
        (["train.hellaswag_items=2", "train.hellaswag_data=sea.txt"], "sea.txt is not HellaSwag"),
        (["train.core_items=2", "data.tokenizer=char"], "a tokenizer of characters"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_it_is_paid_for(
    tuppence: Callable[..., tuple[int, str]],
    tmp_path: Path,
    corpus: tuple[Path, DataPlan],
    calibration: Calibration,
    words: list[str],
    complaint: str,
) -> None:
    (tmp_path / "sea.txt").write_text(TEXT)
    know_this_machine(calibration, corpus[1], [TINY])
    code, said = tuppence("run", *TINY, "data.source=sea.txt", "name=sea", *words)
    assert code == 2, said
    assert complaint in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (tmp_path / "runs/sea").exists()  # the name is free
    assert not (tmp_path / "data").exists()  # and nothing was prepared

"""Knowing when to stop: the test on made-up curves; runs that over-fit 2,000 characters."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import start

from tuppence import checkpoint, config
from tuppence.checkpoint import Point, State, file_sha256
from tuppence.config import Budget, DataPlan, Plan, Run, SchedulePlan
from tuppence.data.prepare import prepare
from tuppence.errors import UserError
from tuppence.files import asset
from tuppence.folder import RunFolder
from tuppence.ledger import Meter, Spent, by_phase, spent
from tuppence.plan import looks
from tuppence.plan.describe import plan_text
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.ranks import ALONE, Ranks, join
from tuppence.train import annealing, loop
from tuppence.train.annealing import rate_factor, turn_of
from tuppence.train.pace import Pace, Turn
from tuppence.train.schedule import factor
from tuppence.train.setup import FIRST_STATE
from tuppence.train.step import StepResult
from tuppence.train.turning import GRAIN, gap_growth, noise, seen, suspected, turned

# ---------------------------------------------------------------- the test, on made-up curves

SEEDS = 40
Curve = Callable[[float], tuple[float, float]]


def points_of(curve: Curve, draw: random.Random, *, growth: float, sigma: float) -> Iterator[Point]:
    """Evaluations from one epoch on, of val and train losses with noise of `sigma` around them;
    what the weights do to both losses alike is half of it."""
    epochs = 1.0
    for number in range(1, 10_000):
        val, train = curve(epochs)
        both = draw.gauss(0, sigma / math.sqrt(2))
        apart = [draw.gauss(0, sigma / math.sqrt(2)) for _ in range(2)]
        tokens = round(1e6 * epochs)
        yield Point(number, tokens, val + both + apart[0], train + both + apart[1], 50)
        epochs *= growth


def over_fitting(epochs: float) -> tuple[float, float]:
    """Lowest after 12 epochs; curvature and gap are what models of this size have."""
    x = math.log(epochs / 12)
    val = 1.7 + (0.5 * x * x if x > -0.7 else -0.7 * x - 0.245)
    return val, val - 0.35 * math.exp(1.2 * x)


def falling(epochs: float) -> tuple[float, float]:
    return 2.4 - 0.2 * math.log(epochs), 2.3 - 0.25 * math.log(epochs)


def flat(epochs: float) -> tuple[float, float]:
    return 2.2, 2.15 - 0.02 * math.log(epochs)


def diverging(epochs: float) -> tuple[float, float]:
    """Both rise after six epochs: unstable, and not over-fitted."""
    x = max(0.0, math.log(epochs / 6))
    return 2.2 + x * x, 2.2 + 0.8 * x * x


def gap_without_rise(epochs: float) -> tuple[float, float]:
    return 1.8, 1.8 - 0.2 * math.log(epochs)


def stopped_at(
    curve: Curve, seed: int, *, growth: float, sigma: float, epochs: float
) -> float | None:
    """Epochs after which the test holds for the first time."""
    found: list[Point] = []
    for point in points_of(curve, random.Random(seed), growth=growth, sigma=sigma):
        if point.tokens > 1e6 * epochs:
            return None
        found.append(point)
        if turned(found):
            return point.tokens / 1e6
    raise AssertionError


def seen_at(sigma: float, *, growth: float) -> list[float]:
    """In turns of their tokens, when turns are seen, in order."""
    at = [stopped_at(over_fitting, s, growth=growth, sigma=sigma, epochs=60) for s in range(SEEDS)]
    known = sorted(epochs / 12 for epochs in at if epochs is not None)
    assert len(known) == SEEDS
    return known


def test_a_turn_is_seen_soon() -> None:
    known = seen_at(0.001, growth=1.03)
    assert known[0] > 1.05
    assert known[SEEDS // 2] <= 1.15


@pytest.mark.parametrize(("sigma", "late"), [(0.003, 1.25), (0.005, 1.35), (0.015, 1.7)])
def test_noise_makes_it_late_and_not_early(sigma: float, late: float) -> None:
    known = seen_at(sigma, growth=1.03)
    assert known[0] > 1
    assert known[-1] <= late


@pytest.mark.parametrize("curve", [falling, flat, diverging])
@pytest.mark.parametrize("growth", [1.02, 1.05, 1.2])
@pytest.mark.parametrize("sigma", [0.0, 0.003, 0.03])
def test_what_does_not_over_fit_is_not_stopped(curve: Curve, growth: float, sigma: float) -> None:
    for seed in range(SEEDS // 4):
        assert stopped_at(curve, seed, growth=growth, sigma=sigma, epochs=20) is None


def test_a_wide_gap_alone_is_no_turn() -> None:
    """A stall: seldom taken for a turn, however often it is looked at."""
    at = [
        stopped_at(gap_without_rise, s, growth=1.04, sigma=0.005, epochs=20) for s in range(SEEDS)
    ]
    assert sum(epochs is not None for epochs in at) <= SEEDS / 8


def test_one_point_or_two_turn_nothing() -> None:
    found = list(
        itertools.islice(points_of(over_fitting, random.Random(0), growth=1.04, sigma=0), 90)
    )
    best = min(range(len(found)), key=lambda i: found[i].val_loss)
    so_far = found[: best + 1]
    spike = dataclasses.replace(found[best + 1], val_loss=9.0)
    assert turned(so_far) is None
    assert turned([*so_far, spike]) is None
    assert turned([*so_far, spike, dataclasses.replace(found[best + 2], val_loss=9.0)]) is None
    assert turned(found) is not None


def test_the_sentence_says_what_was_found() -> None:
    found = list(
        itertools.islice(points_of(over_fitting, random.Random(0), growth=1.04, sigma=0), 90)
    )
    said = turned(found)
    assert said is not None
    best = min(found, key=lambda p: p.val_loss)
    assert f"{best.val_loss:.4f} of step {best.step}" in said
    assert f"grown by {gap_growth(found):.0%} of the loss" in said


def test_noise_is_that_of_the_points_and_not_their_slope() -> None:
    draw = random.Random(0)
    tokens = [1000 * 1.05**i * draw.uniform(0.99, 1.01) for i in range(400)]
    line = [(t, 3 - 0.5 * math.log(t)) for t in tokens]
    assert noise(line) == pytest.approx(0, abs=1e-9)
    assert noise([(t, y + draw.gauss(0, 0.01)) for t, y in line]) == pytest.approx(0.01, rel=0.15)
    assert noise(line[:4]) == math.inf


def test_points_close_together_are_one_the_lower() -> None:
    state = dataclasses.replace(FIRST_STATE, step=10, tokens=1100, loss_sum=6.0, loss_count=2)
    assert seen(state, 2.0, epoch_tokens=1100).points == ()  # seen once
    state = seen(state, 2.0, epoch_tokens=1000)
    assert (state.points, state.loss_count) == ((Point(10, 1100, 2.0, 3.0, 2),), 0)
    again = dataclasses.replace(state, step=11, tokens=1110, loss_sum=12.0, loss_count=4)
    assert again.tokens < GRAIN * state.tokens
    assert seen(again, 1.5, epoch_tokens=1000).points == (Point(11, 1110, 1.5, 3.0, 6),)
    assert seen(again, 2.5, epoch_tokens=1000).points == (Point(10, 1100, 2.0, 3.0, 6),)
    later = dataclasses.replace(again, tokens=1130)
    assert len(seen(later, 2.5, epoch_tokens=1000).points) == 2


# ---------------------------------------------------------------- the plan


def plan_with(run: Run, data: DataPlan, calibration: Calibration, **train: Any) -> Plan:
    train = dataclasses.replace(run.train, **train)
    return solve(dataclasses.replace(run, train=train), data, calibration)


def test_looks_are_as_rare_as_they_must_be() -> None:
    cheap = looks.growth_for(0.01, epochs=30, marks=10, seconds=1000)
    assert cheap == looks.GROWTH
    dear = looks.growth_for(2.0, epochs=30, marks=10, seconds=1000)
    assert dear is not None
    assert dear > cheap
    for growth, each in ((cheap, 0.01), (dear, 2.0)):
        taken = each * looks.looks(growth, epochs=30, marks=10)
        assert 0 < taken <= looks.LOOK_SHARE * 1000
    assert looks.growth_for(100.0, epochs=30, marks=1, seconds=1000) is None
    assert looks.growth_for(0.01, epochs=0.9, marks=10, seconds=1000) is None
    assert looks.looks(None, epochs=30, marks=10) == 0


def test_the_plan_charges_what_looking_takes(
    small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> None:
    run = dataclasses.replace(small_run, budget=Budget(usd=1.0))
    on, off = (plan_with(run, data_plan, calibration, early_stop=e) for e in (None, False))
    assert on.cadence.early_stop
    assert on.cadence.eval_growth == looks.GROWTH
    assert off.cadence.eval_growth is None
    whole = 3600 * on.predicted.hours.mid
    spent = [sum(p.predicted.phase_seconds[k] for k in ("evaluate", "save")) for p in (on, off)]
    assert 0 < spent[0] - spent[1] <= 1.05 * looks.LOOK_SHARE * whole
    assert sum(on.predicted.phase_seconds.values()) <= whole * (1 + 1e-9)
    assert on.predicted.steps.mid < off.predicted.steps.mid
    assert "stops early if validation turns" in plan_text(on)
    assert "stops early" not in plan_text(off)


def test_under_one_epoch_nothing_changes(
    small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> None:
    data = dataclasses.replace(data_plan, train_tokens=10**12)
    on, off = (plan_with(small_run, data, calibration, early_stop=e) for e in (None, False))
    assert on.cadence == dataclasses.replace(off.cadence, early_stop=True)
    assert on.predicted == off.predicted
    assert "stops early" not in plan_text(on)


def test_evaluations_that_were_asked_for_are_the_looks(
    small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> None:
    plan = plan_with(small_run, data_plan, calibration, eval_every=100)
    assert plan.cadence.early_stop
    assert plan.cadence.eval_growth is None


def test_a_turn_that_would_be_seen_late_is_said(
    small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> None:
    data = dataclasses.replace(data_plan, train_tokens=111_540)
    run = dataclasses.replace(small_run, budget=Budget(usd=0.005))
    late, soon = (plan_with(run, data, calibration, eval_tokens=n) for n in (None, 1000))
    assert "turn_late" in {warning.code for warning in late.warnings}
    assert "turn_late" not in {warning.code for warning in soon.warnings}


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_target_is_a_loss(
    loss: float, small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> None:
    with pytest.raises(UserError, match=r"train\.target_loss"):
        plan_with(small_run, data_plan, calibration, target_loss=loss)


def test_a_target_is_told(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> None:
    plan = plan_with(small_run, data_plan, calibration, target_loss=1.5, early_stop=False)
    assert plan.cadence.target_loss == 1.5
    assert plan.cadence.eval_growth is not None
    assert "stops early if val loss is 1.5" in plan_text(plan)


# ---------------------------------------------------------------- the steps of an anneal


def test_the_rate_comes_down_in_a_line_and_lands() -> None:
    schedule = SchedulePlan(shape="cosine", warmup=0.02, decay=0.0, floor=0.1)
    state = dataclasses.replace(FIRST_STATE, anneal=checkpoint.Anneal("turned", 40, 4, 0.9))
    found = []
    for step in range(40, 44):
        state = dataclasses.replace(state, step=step)
        turn = turn_of(state, Turn(0.2, False))
        assert turn is not None
        found.append((turn, rate_factor(state, turn, schedule)))
    assert [turn.last for turn, _ in found] == [False, False, False, True]
    assert [turn.progress for turn, _ in found] == pytest.approx([41 / 44, 42 / 44, 43 / 44, 1])
    assert [rate for _, rate in found] == pytest.approx([0.7, 0.5, 0.3, 0.1])


def test_the_budget_may_end_it_sooner() -> None:
    schedule = SchedulePlan(shape="cosine", warmup=0.02, decay=0.0, floor=0.1)
    anneal = checkpoint.Anneal("turned", 40, 400, 0.9)
    state = dataclasses.replace(FIRST_STATE, step=50, anneal=anneal)
    assert turn_of(state, None) is None
    last = turn_of(state, Turn(1.0, True))
    assert last == Turn(1.0, True)
    assert rate_factor(state, last, schedule) == 0.1


def test_without_one_nothing_changes() -> None:
    schedule = SchedulePlan(shape="wsd", warmup=0.02, decay=0.4, floor=0.0)
    turn = Turn(0.8, False)
    assert turn_of(FIRST_STATE, turn) == turn
    assert rate_factor(FIRST_STATE, turn, schedule) == factor(0.8, schedule)


def test_a_state_of_before_is_still_read() -> None:
    new = {f.name for f in dataclasses.fields(State)} - {"step", "back_to"}
    document = json.loads(config.to_json(FIRST_STATE))
    for name in ("points", "loss_sum", "loss_count", "evaluated_tokens", "sample_due", "stays"):
        assert name in new
        del document[name]
    del document["anneal"]
    assert config.from_json(State, json.dumps(document)) == FIRST_STATE


# ---------------------------------------------------------------- real runs

WORDS = [
    "budget.steps=400",
    "machine.usd_per_hour=1",
    "machine.threads=1",
    "model.family=depth",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=128",
    "model.sequence_len=16",
    "data.tokenizer=char",
    "train.optimizer=adamw",
    "train.learning_rate=0.01",
    "train.batch_tokens=256",
    "train.precision=fp32",
    "train.attention=sdpa",
    "train.eval_every=5",
    "train.save_every=50",
    "train.sample_tokens=0",
]
BATCH = 256


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataPlan]:
    """2,000 characters: shards, and what the plan knows of them."""
    root = tmp_path_factory.mktemp("small")
    text = root / "small.txt"
    text.write_text(asset("shakespeare.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    made = prepare(source=str(text), tokenizer="char", root=root / "data")
    there = made.manifest
    sizes = (there.vocab_size, there.train_tokens, there.val_tokens)
    plan = DataPlan(str(text), "char", "text", None, None, *sizes, 1.0, "0" * 64, True, "plain")
    return made.folder, plan


@pytest.fixture(scope="module")
def plan_of(corpus: tuple[Path, DataPlan], calibration: Calibration) -> Callable[..., Plan]:
    def plan_of(*words: str) -> Plan:
        return solve(config.override(Run(), [*WORDS, *words]), corpus[1], calibration)

    return plan_of


Spend = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def spend(corpus: tuple[Path, DataPlan]) -> Spend:
    def spend(plan: Plan, path: Path, *, attempt: int = 1, ranks: Ranks = ALONE) -> RunFolder:
        return train_on(plan, path, corpus[0], attempt=attempt, ranks=ranks)

    return spend


def train_on(
    plan: Plan, path: Path, shards: Path, *, attempt: int = 1, ranks: Ranks = ALONE
) -> RunFolder:
    """One attempt at a plan in a folder."""
    path.mkdir(exist_ok=True)
    folder = RunFolder(path, writes=ranks.lead)
    meter = Meter(folder, usd_per_hour=1.0, attempt=attempt, start=0.0)
    meter.start = meter._since = meter.now()
    try:
        loop.train(plan, folder, shards, meter=meter, attempt=attempt, ranks=ranks)
    finally:
        meter.close()
        folder.close()
    return folder


@pytest.fixture(scope="module")
def stopped(plan_of: Any, spend: Spend, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return spend(plan_of(), tmp_path_factory.mktemp("runs") / "stopped")


@pytest.fixture(scope="module")
def off(plan_of: Any, spend: Spend, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    plan = plan_of("train.early_stop=off")
    return spend(plan, tmp_path_factory.mktemp("runs") / "off")


def event_of(folder: RunFolder, code: str = "early_stop") -> dict[str, Any]:
    found = [event for event in folder.rows("events") if event["code"] == code]
    assert len(found) == 1, [event["code"] for event in folder.rows("events")]
    return found[0]


def rows_of(folder: RunFolder) -> list[tuple[Any, ...]]:
    """Of every step that counts what must not depend on what interrupted the run."""
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "tokens_sha", "progress")
    return [tuple(row[key] for key in keys) for row in folder.latest("metrics")]


def weights(folder: RunFolder, name: str = "last") -> tuple[int, str]:
    found = checkpoint.pointer(folder, name)
    assert found is not None
    checkpoint.verify(folder.checkpoints / found.path)
    assert file_sha256(folder.checkpoints / found.path / "model.safetensors") == found.sha256
    return found.step, found.sha256


def test_it_stops_where_validation_turned(stopped: RunFolder, off: RunFolder) -> None:
    event, curve = event_of(stopped), [row["loss"] for row in off.latest("evals")]
    smooth = [sum(curve[i - 1 : i + 2]) / 3 for i in range(1, len(curve) - 1)]
    turned_tokens = 5 * BATCH * (2 + smooth.index(min(smooth)))
    assert off.latest("metrics")[-1]["step"] == 400
    assert event["reason"] == "turned"
    assert abs(event["tokens"] / turned_tokens - 1) <= 0.25  # noisier than what the bench tries
    assert event["step"] < 250


def test_until_then_it_is_the_same_run(stopped: RunFolder, off: RunFolder) -> None:
    back = event_of(stopped)["back_to"]
    assert back > 100
    assert rows_of(stopped)[:back] == rows_of(off)[:back]
    before = [row["loss"] for row in stopped.rows("evals")][:-1]
    assert before == [row["loss"] for row in off.rows("evals")][: len(before)]


def test_it_goes_back_anneals_and_ends(stopped: RunFolder, plan_of: Any) -> None:
    event, plan = event_of(stopped), plan_of()
    back, steps = event["back_to"], event["anneal_steps"]
    best = min(list(stopped.rows("evals"))[:-1], key=lambda row: row["loss"])
    assert (back, event["turned_tokens"]) == (best["step"], best["step"] * BATCH)
    assert event["best_val_loss"] == best["loss"]
    left = 400 - event["step"]
    assert event["remaining"] == {"kind": "steps", "left": left}
    assert event["anneal_share"] == pytest.approx(steps / left)
    assert steps == int(0.05 * left)
    rows = stopped.latest("metrics")
    assert [row["step"] for row in rows] == list(range(1, back + steps + 1))
    assert rows[-1]["progress"] == 1.0
    assert rows[-1]["lr"] == 0.0
    falls = [a["lr"] - b["lr"] for a, b in itertools.pairwise(rows[back:])]
    assert falls == pytest.approx([rows[back]["lr"] / (steps - 1)] * (steps - 1))
    assert rows[back]["lr"] < rows[back - 1]["lr"] <= plan.optimizer.learning_rate
    assert [row["step"] for row in stopped.rows("evals")][-1] == back + steps


def test_the_better_of_before_and_after_is_best(stopped: RunFolder) -> None:
    event, evals = event_of(stopped), stopped.latest("evals")
    last, best = evals[-1], checkpoint.pointer(stopped, "best")
    assert best is not None
    assert checkpoint.step_of(checkpoint.complete(stopped)[-1]) == last["step"]  # none is newer
    better = last["loss"] < event["best_val_loss"]
    assert best.step == (last["step"] if better else event["back_to"])
    weights(stopped, "best")


class Killed(BaseException):
    """As a kill -9: nothing is saved after it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, attempt: int, step: int) -> None:
    """In this attempt, at this step of the anneal."""
    log = loop._log

    def _log(trainer: loop.Trainer, *rest: Any) -> None:
        log(trainer, *rest)
        at = (trainer.state.attempt, trainer.state.step)
        if trainer.state.anneal is not None and at == (attempt, step):
            trainer.saver.wait()
            raise Killed

    monkeypatch.setattr(loop, "_log", _log)


def test_killed_between_the_turn_and_the_end_it_is_the_same_run(
    stopped: RunFolder,
    plan_of: Any,
    spend: Spend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once when it has gone back and the anneal is not saved yet, once inside the anneal."""
    begin, back = annealing._begin, event_of(stopped)["back_to"]

    def killed(*given: Any) -> None:
        raise Killed

    monkeypatch.setattr(annealing, "_begin", killed)
    with pytest.raises(Killed):
        spend(plan_of(), tmp_path / "run")
    monkeypatch.setattr(annealing, "_begin", begin)
    killed_at(monkeypatch, 2, back + 7)
    with pytest.raises(Killed):
        spend(plan_of(), tmp_path / "run", attempt=2)
    folder = spend(plan_of(), tmp_path / "run", attempt=3)
    resumes = [event["step"] for event in folder.rows("events") if event["code"] == "resume"]
    assert resumes == [back, back]
    assert rows_of(folder) == rows_of(stopped)
    assert weights(folder) == weights(stopped)
    assert weights(folder, "best") == weights(stopped, "best")
    told = [event for event in folder.rows("events") if event["code"] == "early_stop"]
    assert [event["attempt"] for event in told] == [1, 2]  # what was not saved was decided again
    for event in told:
        assert all(event[key] == event_of(stopped)[key] for key in SAME)


SAME = ("reason", "step", "back_to", "best_val_loss", "val_loss", "test", "anneal_steps")


def test_a_target_ends_it_without_going_back(
    plan_of: Any, spend: Spend, off: RunFolder, tmp_path: Path
) -> None:
    reached = next(row for row in off.rows("evals") if row["loss"] <= 2.8)
    plan = plan_of("train.target_loss=2.8", "train.early_stop=off")
    folder = spend(plan, tmp_path / "run")
    event = event_of(folder)
    assert event["reason"] == "target"
    assert event["step"] == event["back_to"] == reached["step"]
    assert event["best_val_loss"] == event["val_loss"] == reached["loss"]
    rows = folder.latest("metrics")
    assert rows[-1]["step"] == reached["step"] + event["anneal_steps"]
    assert rows[-1]["lr"] == 0.0
    assert rows_of(folder)[: reached["step"]] == rows_of(off)[: reached["step"]]


def damaged(monkeypatch: pytest.MonkeyPatch, *, only_best: bool) -> None:
    """Weights are, when the run is about to go back: of the best step, or of those before too."""
    decided = annealing._decided

    def _decided(trainer: loop.Trainer) -> Any:
        best = trainer.state.best_step
        assert best is not None
        for saved in checkpoint.complete(trainer.folder):
            step = checkpoint.step_of(saved)
            if step == best or (step < best and not only_best):
                path = saved / "model.safetensors"
                path.write_bytes(path.read_bytes()[:-5] + b"wrong")
        return decided(trainer)

    monkeypatch.setattr(annealing, "_decided", _decided)


@pytest.mark.parametrize("only_best", [True, False])
def test_a_damaged_best_is_passed_over(
    only_best: bool, plan_of: Any, spend: Spend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(monkeypatch, only_best=only_best)
    folder = spend(plan_of("train.keep_every=50"), tmp_path / "run")
    event = event_of(folder)
    best, back = event["turned_tokens"] // BATCH, event["back_to"]
    found = {e["path"] for e in folder.rows("events") if e["code"] == "checkpoint_damaged"}
    assert checkpoint.name_of(best) in found
    if only_best:
        assert 50 <= back < best
        assert f"the best step's checkpoint is damaged; back to step {back}" in event["message"]
    else:
        assert back == event["step"]
        assert "no whole checkpoint is as old as the best step" in event["message"]
    lost = by_phase(folder).get("lost", Spent(0.0, 0.0))
    assert (lost.seconds > 0.02) == only_best  # evaluations and steps since, or nothing
    last = folder.latest("metrics")[-1]
    assert last["step"] == back + event["anneal_steps"]
    assert last["lr"] == 0.0
    step, _ = weights(folder, "best")
    assert step in (back, last["step"])
    assert step == last["step"] or only_best


def test_the_guard_ends_an_anneal(
    plan_of: Any, spend: Spend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, real, poisoned = loop._step, loop.train_step, [False]

    def _step(trainer: loop.Trainer, turn: Turn) -> None:
        poisoned[0] = trainer.state.anneal is not None
        step(trainer, turn)

    def train_step(*given: Any, **how: Any) -> StepResult:
        return StepResult(math.nan, 1.0, "loss nan") if poisoned[0] else real(*given, **how)

    monkeypatch.setattr(loop, "_step", _step)
    monkeypatch.setattr(loop, "train_step", train_step)
    folder = spend(plan_of("train.target_loss=2.9"), tmp_path / "run")
    event, given_up = event_of(folder), event_of(folder, "anneal_given_up")
    assert given_up["step"] == event["back_to"] + 5
    codes = [e["code"] for e in folder.rows("events")]
    assert "rewind" not in codes
    assert "late_end" not in codes
    assert weights(folder, "best")[0] == event["back_to"]
    assert folder.latest("evals")[-1]["loss"] == event["best_val_loss"]  # weights were left alone


def test_a_time_budget_keeps_its_rest(plan_of: Any, spend: Spend, tmp_path: Path) -> None:
    plan = plan_of("budget.hours=0.05", "budget.steps=none", "train.target_loss=2.9")
    folder = spend(plan, tmp_path / "run")
    event, paid = event_of(folder), spent(folder).seconds / 3600
    assert paid < 0.04
    assert event["remaining"]["kind"] == "hours"
    assert paid < 0.05 - 0.9 * event["remaining"]["left"]
    rows = folder.latest("metrics")
    assert rows[-1]["progress"] == 1.0
    assert rows[-1]["lr"] == 0.0
    assert rows[-1]["step"] == event["back_to"] + event["anneal_steps"]


def test_without_time_for_it_the_run_goes_on(
    plan_of: Any, spend: Spend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "room_for", lambda pace, seconds, step: False)
    monkeypatch.setattr(Pace, "room_to_evaluate", lambda pace, step: True)
    plan = plan_of("budget.hours=1", "budget.steps=40", "train.target_loss=9")
    folder = spend(plan, tmp_path / "run")
    told = event_of(folder, "no_early_stop")
    assert (told["reason"], told["step"]) == ("target", 5)
    assert not [event for event in folder.rows("events") if event["code"] == "early_stop"]
    last = folder.latest("metrics")[-1]
    assert (last["step"], last["lr"]) == (40, 0.0)


def test_looks_come_by_growth_and_do_not_speak(
    plan_of: Any, spend: Spend, corpus: tuple[Path, DataPlan], tmp_path: Path
) -> None:
    plan = plan_of("budget.steps=60", "train.eval_every=none", "train.sample_tokens=1")
    cadence = dataclasses.replace(plan.cadence, eval_every_progress=0.5, eval_growth=1.1)
    folder = spend(dataclasses.replace(plan, cadence=cadence), tmp_path / "run")
    steps = [row["step"] for row in folder.rows("evals")]
    epoch = corpus[1].train_tokens / BATCH
    assert steps[0] == math.ceil(epoch)
    assert 30 in steps
    assert [row["step"] for row in folder.rows("samples") if not row.get("fixed")] == [30, 60]
    state = checkpoint.state_of(checkpoint.choose(folder, "last"))
    assert [point.step for point in state.points] == steps[:-1]
    for before, after in itertools.pairwise(steps[:-1]):
        known = [point for point in state.points if point.step <= before]
        growth = 1.1 if suspected(known) else looks.CALM_GROWTH
        assert after == min(math.ceil(growth * before), 30 if before < 30 else 60)
    assert any(b / a < 1.2 for a, b in itertools.pairwise(steps[:-1]))


# ---------------------------------------------------------------- two ranks


def on_ranks(plan: Plan, path: Path, shards: Path) -> None:
    torch.set_num_threads(1)
    ranks = join("cpu")
    train_on(plan, path, shards, ranks=ranks)
    ranks.part()


def test_two_ranks_decide_alike(
    plan_of: Any, corpus: tuple[Path, DataPlan], off: RunFolder, tmp_path: Path
) -> None:
    """With a dollar budget beside the steps, so that the lead's clock has a say."""
    plan = plan_of("train.target_loss=2.9", "budget.usd=1")
    (tmp_path / "run").mkdir()
    started = start(2, on_ranks, plan, tmp_path / "run", corpus[0], folder=tmp_path / "logs")
    assert started.codes() == [0, 0], started.said(0) + started.said(1)
    folder = RunFolder(tmp_path / "run")
    event, rows = event_of(folder), folder.latest("metrics")
    alone = next(row for row in off.rows("evals") if row["loss"] <= 2.9)
    assert event["step"] == alone["step"]
    assert event["best_val_loss"] == pytest.approx(alone["loss"], abs=1e-3)
    assert rows[-1]["step"] == event["back_to"] + event["anneal_steps"]
    assert rows[-1]["lr"] == 0.0
    assert rows[-1]["tokens_sha"] == off.latest("metrics")[len(rows) - 1]["tokens_sha"]

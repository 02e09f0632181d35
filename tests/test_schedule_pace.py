"""Where a run ends: the schedule over progress, and progress over money, in simulated time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tuppence.config import Budget, DataPlan, Interval, Plan, Run, SchedulePlan
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.train.pace import Pace, Turn, finish_seconds
from tuppence.train.schedule import factor

# ---------------------------------------------------------------- schedule

SCHEDULES = [
    SchedulePlan(shape="cosine", warmup=0.02, decay=0.4, floor=0.0),
    SchedulePlan(shape="cosine", warmup=0.0, decay=0.0, floor=0.1),
    SchedulePlan(shape="cosine", warmup=0.5, decay=1.0, floor=0.1),
    SchedulePlan(shape="cosine", warmup=1.0, decay=0.0, floor=0.0),
    SchedulePlan(shape="wsd", warmup=0.02, decay=0.4, floor=0.0),
    SchedulePlan(shape="wsd", warmup=0.0, decay=1.0, floor=0.05),
    SchedulePlan(shape="wsd", warmup=0.3, decay=0.7, floor=0.1),
    SchedulePlan(shape="wsd", warmup=0.1, decay=0.0, floor=0.1),
]
GRID = [i / 1000 for i in range(1001)]
LIMIT = 1 + 1e-9  # what adding up floats may exceed a budget by


@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda s: f"{s.shape}-{s.warmup}-{s.decay}-{s.floor}"
)
def test_up_in_a_line_then_only_down_to_the_floor(schedule: SchedulePlan) -> None:
    for progress in GRID:
        if progress < schedule.warmup:
            assert factor(progress, schedule) == pytest.approx(progress / schedule.warmup)
    after = [factor(p, schedule) for p in GRID if p >= schedule.warmup]
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(1.0 if schedule.warmup < 1 else schedule.floor)
    assert after[-1] == factor(1.0, schedule) == factor(1.0 + 1e-9, schedule) == schedule.floor
    if not (schedule.warmup == 1 or (schedule.shape == "wsd" and schedule.decay == 0)):
        steepest = max(math.pi / 2 / (1 - schedule.warmup), 1 / (schedule.decay or 1))
        falls = [a - b for a, b in itertools.pairwise(after)]
        assert max(falls) <= 1.01 * steepest / 1000  # no jumps


def test_cosine_and_wsd_have_their_shapes() -> None:
    cosine = SchedulePlan(shape="cosine", warmup=0.2, decay=0.0, floor=0.1)
    assert factor(0.6, cosine) == pytest.approx(0.55)  # half-way down, half-way between 1 and 0.1
    assert factor(0.4, cosine) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    wsd = SchedulePlan(shape="wsd", warmup=0.2, decay=0.4, floor=0.1)
    assert [factor(p, wsd) for p in (0.2, 0.4, 0.6)] == pytest.approx([1.0, 1.0, 1.0])
    assert [factor(p, wsd) for p in (0.7, 0.8, 0.9)] == pytest.approx([0.775, 0.55, 0.325])


# ---------------------------------------------------------------- pace, in simulated time


@dataclass
class Clock:
    """A meter whose time is told, not measured."""

    price: float
    time: float = 0.0

    def seconds(self) -> float:
        return self.time

    def usd(self) -> float:
        return self.time / 3600 * self.price

    def seconds_left(self, *, usd: float | None, hours: float | None) -> float:
        by_usd = (usd - self.usd()) / self.price * 3600 if usd is not None else math.inf
        by_hours = hours * 3600 - self.time if hours is not None else math.inf
        return min(by_usd, by_hours)


@dataclass
class Machine:
    """What parts of a run really take, however they were planned."""

    startup: float
    step: Callable[[], float]
    evaluation: Callable[[], float]
    save: Callable[[], float]
    save_every: float = math.inf
    work: Callable[[int], float] = lambda step: 1.0


def simulate(plan: Plan, machine: Machine) -> tuple[list[Turn], float]:
    """The loop of train/loop.py with simulated work."""
    clock = Clock(plan.machine.usd_per_hour, machine.startup)
    pace, last_save = Pace(plan, clock, work=machine.work), machine.startup  # type: ignore[arg-type]
    turns: list[Turn] = []
    every = plan.cadence.eval_every_progress
    assert every is not None
    progress = 0.0

    def spend(seconds: float) -> float:
        clock.time += seconds
        return seconds

    def room_for(seconds: float) -> bool:
        return not pace.timed or pace.room_for(seconds, len(turns))

    while turn := pace.next(len(turns)):
        number = len(turns)
        pace.step_took(number, spend(machine.step() * machine.work(number)))
        turns.append(turn)
        if turn.last:
            break
        crossed = math.floor(turn.progress / every + 1e-9) > math.floor(progress / every + 1e-9)
        progress = turn.progress
        evaluates = crossed and room_for(pace.eval_seconds + pace.save_seconds)
        if evaluates:
            pace.evaluation_took(spend(machine.evaluation()))
        due = clock.time - last_save >= machine.save_every and room_for(pace.save_seconds)
        if evaluates or due:
            pace.save_seconds = spend(machine.save())
            last_save = clock.time
    spend(machine.save())
    finish = finish_seconds(plan, len(turns))
    left = pace.seconds_left() - finish
    spend(min(machine.evaluation(), max(0.0, left)))
    return turns, clock.time + finish


@dataclass(frozen=True)
class Case:
    """A time budget, and what was expected of the machine."""

    plan: Plan
    seconds: float
    step: float
    evaluation: float
    save: float
    startup: float


@pytest.fixture
def solved(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Callable[..., Plan]:
    """Plans the small run with another budget and other choices of training."""

    def solved(budget: Budget, **train: Any) -> Plan:
        train = dataclasses.replace(small_run.train, **train)
        run = dataclasses.replace(small_run, budget=budget, train=train)
        return solve(run, data_plan, calibration)

    return solved


@pytest.fixture
def case_of(solved: Callable[..., Plan]) -> Callable[[random.Random, float, float], Case]:
    """Draws a budget of `seconds` with about `steps` steps, in dollars or hours or both."""
    base = solved(Budget(usd=0.02))

    def case_of(draw: random.Random, seconds: float, steps: float) -> Case:
        price = 10 ** draw.uniform(-1.5, 2.5)
        usd, hours = price * seconds / 3600, seconds / 3600
        budget = draw.choice(
            [
                Budget(usd=usd),
                Budget(hours=hours),
                Budget(usd=usd, hours=hours * draw.uniform(1, 3)),
                Budget(usd=usd * draw.uniform(1, 3), hours=hours),
                Budget(usd=usd, steps=10**9),
            ]
        )
        count = draw.randint(1, 10)
        startup = min(5.0, 0.1 * seconds)
        evaluation = 0.03 * seconds / count
        save = min(0.01 * seconds / count, 1.0)
        finish = min(0.8, 0.01 * seconds)
        step = seconds / steps
        told = dataclasses.replace(
            base.predicted,
            step_seconds=Interval(step, step, step),
            eval_seconds=evaluation,
            save_seconds=save,
        )
        plan = dataclasses.replace(
            base,
            budget=budget,
            machine=dataclasses.replace(base.machine, usd_per_hour=price),
            step=dataclasses.replace(base.step, max_steps=budget.steps),
            cadence=dataclasses.replace(
                base.cadence, eval_every_progress=1 / count, finish_seconds=finish
            ),
            predicted=told,
        )
        return Case(plan, seconds, step, evaluation, save, startup)

    return case_of


def machine_of(
    draw: random.Random, case: Case, *, noise: float, slower: float | None = None, **changes: Any
) -> Machine:
    """A machine `slower` than was promised, whose steps vary by +-`noise`."""
    slower = draw.uniform(0.6, 1.6) if slower is None else slower
    machine = Machine(
        startup=case.startup,
        step=lambda: slower * case.step * draw.uniform(1 - noise, 1 + noise),
        evaluation=lambda: slower * case.evaluation * draw.uniform(0.95, 1.05),
        save=lambda: case.save * draw.uniform(0.8, 1.2),
    )
    return dataclasses.replace(machine, **changes)


def land(case: Case, machine: Machine, *, least: float) -> None:
    """Progress rises, and is 1 on the last step taken and on no other; the money is spent."""
    turns, seconds = simulate(case.plan, machine)
    assert all(0 < turn.progress < 1 and not turn.last for turn in turns[:-1])
    assert turns[-1] == Turn(1.0, True)
    assert least * case.seconds <= seconds <= case.seconds * LIMIT


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(20))
def test_time_budgets_land(seed: int, noise: float, case_of: Any) -> None:
    draw = random.Random(seed)
    case = case_of(draw, 60 * 10 ** draw.uniform(0, 3), draw.uniform(300, 1500))
    every = draw.choice([20.0, 60.0, math.inf])
    land(case, machine_of(draw, case, noise=noise, save_every=every), least=0.97)
    short = case_of(draw, 10 ** draw.uniform(0.5, 1.8), draw.uniform(5, 200))
    land(short, machine_of(draw, short, noise=noise), least=0)


def far_slower(case: Case, draw: random.Random) -> Machine:
    return machine_of(draw, case, noise=0.1, slower=2.5)


def far_faster(case: Case, draw: random.Random) -> Machine:
    return machine_of(draw, case, noise=0.1, slower=0.4)


def slower_half_way(case: Case, draw: random.Random) -> Machine:
    steps = itertools.chain([case.step] * 1000, itertools.repeat(2 * case.step))
    machine = machine_of(draw, case, noise=0.1, slower=2.0)
    return dataclasses.replace(machine, step=lambda: next(steps))


def now_and_then_far_slower(case: Case, draw: random.Random) -> Machine:
    machine = machine_of(draw, case, noise=0.1, slower=1.0, save_every=60.0)
    step = machine.step
    return dataclasses.replace(machine, step=lambda: step() * (8 if draw.random() < 0.03 else 1))


def slow_to_start(case: Case, draw: random.Random) -> Machine:
    """As with CUDA and torch.compile."""
    steps = itertools.chain([50 * case.step], itertools.repeat(case.step))
    machine = machine_of(draw, case, noise=0.1, slower=1.0)
    return dataclasses.replace(machine, step=lambda: next(steps))


@pytest.mark.parametrize(
    "odd", [far_slower, far_faster, slower_half_way, now_and_then_far_slower, slow_to_start]
)
def test_odd_machines_land(odd: Callable[[Case, random.Random], Machine], case_of: Any) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        case = case_of(draw, 600, 2000)
        land(case, odd(case, draw), least=0.97)


def test_steps_of_drawn_work_land(case_of: Any) -> None:
    """A looped model's steps differ up to eightfold, but it is known beforehand by how much."""
    for seed in range(20):
        draw = random.Random(seed)
        drawn = [min(3.5, max(0.4, math.exp(random.Random(n).gauss(0, 0.5)))) for n in range(10000)]
        case = case_of(draw, 600, 500)
        machine = machine_of(draw, case, noise=0.1, work=drawn.__getitem__)
        turns, _ = simulate(case.plan, machine)
        land(case, machine, least=0.97)
        jumps = [b.progress - a.progress for a, b in itertools.pairwise(turns)][5:-2]
        heavy = [jump for n, jump in enumerate(jumps, 6) if drawn[n] > 1.5]
        light = [jump for n, jump in enumerate(jumps, 6) if drawn[n] < 0.7]
        assert min(heavy) > max(0.0, sum(light) / len(light))  # progress is time, not steps


def test_a_late_last_step_is_paid_out_of_the_evaluation(case_of: Any) -> None:
    case = case_of(random.Random(0), 600, 500)
    pace = Pace(case.plan, Clock(case.plan.machine.usd_per_hour))  # type: ignore[arg-type]
    pace.meter.time = 600 - pace.reserve(10)  # type: ignore[attr-defined]  # no room but the end's
    assert pace.next(0) is None  # without a step there is nothing to land
    assert pace.next(10) == Turn(1.0, True)
    pace.meter.time = 600 - case.plan.cadence.finish_seconds  # type: ignore[attr-defined]
    assert pace.next(10) is None


def test_progress_is_the_largest_fraction_of_any_limit(case_of: Any) -> None:
    case = case_of(random.Random(0), 600, 500)
    step = dataclasses.replace(case.plan.step, max_steps=1000)
    limited = dataclasses.replace(case.plan, step=step)
    pace = Pace(limited, Clock(case.plan.machine.usd_per_hour, time=60.0))  # type: ignore[arg-type]
    by_time = pace.next(0)
    assert by_time is not None
    assert 0.1 < by_time.progress < 0.2
    turns = [pace.next(step) for step in (699, 999, 1000)]
    assert turns == [Turn(0.7, False), Turn(1.0, True), None]


@pytest.mark.parametrize("slow", [1e-3, 1e3])
@pytest.mark.parametrize(
    ("budget", "steps"),
    [(Budget(tokens=512 * 51 - 1), 50), (Budget(tokens=512 * 50, steps=7), 7)],
)
def test_steps_and_tokens_are_exact_whatever_the_time(
    solved: Callable[..., Plan], budget: Budget, steps: int, slow: float
) -> None:
    draw = random.Random(0)
    machine = Machine(3.0, lambda: slow * draw.uniform(0.1, 9), lambda: slow, lambda: slow)
    turns, _ = simulate(solved(budget), machine)
    expected = [Turn((i + 1) / steps, i + 1 == steps) for i in range(steps)]
    assert turns == expected


def test_the_reserve_holds_one_evaluation(solved: Callable[..., Plan]) -> None:
    both = Budget(usd=1.0, steps=1000)
    plans = [solved(both, eval_every=every, eval_tokens=11_154) for every in (10, 1000)]
    often, rarely = (Pace(plan, Clock(0.4)).reserve(0) for plan in plans)  # type: ignore[arg-type]
    assert often == pytest.approx(rarely)


def test_start_up_does_not_eat_the_warm_up(case_of: Any) -> None:
    """Charged it is, but the first step begins at progress 0, in a resumed run too."""
    case = case_of(random.Random(0), 600, 500)
    clock = Clock(case.plan.machine.usd_per_hour, time=100.0)
    first = Pace(case.plan, clock, began=100.0).next(0)  # type: ignore[arg-type]
    assert first is not None
    assert first.progress < 0.01
    clock.time = 350.0
    later = Pace(case.plan, clock, began=100.0).next(200)  # type: ignore[arg-type]
    assert later is not None
    assert 0.48 < later.progress < 0.60

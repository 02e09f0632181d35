"""Rank 0 decides one step ahead: all ranks hear the same, and budgets end where they should.

The clock is test_schedule_pace.py's: a meter whose time is told, a machine whose parts take what is
drawn for them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_schedule_pace as simulated
import torch
from gloo import start
from test_schedule_pace import LIMIT, Case, Clock, Machine, machine_of

from tuppence.config import Budget, Plan
from tuppence.ranks import ALONE, Ranks, join
from tuppence.train import lead as leading
from tuppence.train import pace as pacing
from tuppence.train.interrupt import Interrupt
from tuppence.train.lead import Lead
from tuppence.train.pace import Pace, Turn, finish_seconds

solved, case_of = simulated.solved, simulated.case_of  # fixtures

# ---------------------------------------------------------------- one step late, in simulated time


class Told:
    """An all-reduce in which the lead's words are all that is said."""

    def wait(self) -> None:
        pass


@pytest.fixture
def unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two that tells itself: what others would add is zero."""
    monkeypatch.setattr(leading.dist, "all_reduce", lambda message, async_op: Told())


def simulate(
    plan: Plan, machine: Machine, monkeypatch: pytest.MonkeyPatch, *, ranks: Ranks
) -> tuple[list[Turn], float]:
    """The loop of train/loop.py with simulated work, led as it is among `ranks`."""
    clock = Clock(plan.machine.usd_per_hour, machine.startup)
    monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: clock.time))
    if math.isfinite(machine.save_every):
        cadence = dataclasses.replace(
            plan.cadence, save_every_steps=None, save_every_seconds=machine.save_every
        )
        plan = dataclasses.replace(plan, cadence=cadence)
    pace = Pace(plan, clock, work=machine.work)  # type: ignore[arg-type]
    lead = Lead(ranks, pace, Interrupt())
    turns: list[Turn] = []
    every = plan.cadence.eval_every_progress
    assert every is not None
    progress = 0.0

    def spend(seconds: float) -> float:
        clock.time += seconds
        return seconds

    def save() -> None:
        pace.save_seconds = spend(machine.save())
        pace.last_save = clock.time
        lead.forget()

    while turn := lead.next(len(turns)):
        number = len(turns)
        pace.step_took(number, spend(machine.step() * machine.work(number)))
        turns.append(turn)
        if turn.last:
            break
        crossed = math.floor(turn.progress / every + 1e-9) > math.floor(progress / every + 1e-9)
        progress = turn.progress
        if crossed and lead.room_to_evaluate(len(turns)):
            pace.evaluation_took(spend(machine.evaluation()))
            lead.forget()
            save()
        elif lead.save_due(len(turns)):
            save()
    spend(machine.save())
    finish = finish_seconds(plan, len(turns))
    left = pace.seconds_left() - finish - pace.step_seconds()
    spend(min(machine.evaluation(), max(0.0, left)))
    return turns, clock.time + finish


Land = Callable[..., list[Turn]]


@pytest.fixture
def land(unheard: None, monkeypatch: pytest.MonkeyPatch) -> Land:
    """Progress rises, and is 1 on the last step taken and on no other; the money is spent."""

    def land(case: Case, machine: Machine, *, least: float) -> list[Turn]:
        turns, seconds = simulate(case.plan, machine, monkeypatch, ranks=Ranks(0, 2))
        assert all(0 < turn.progress < 1 and not turn.last for turn in turns[:-1])
        assert turns[-1] == Turn(1.0, True)
        assert least * case.seconds <= seconds <= case.seconds * LIMIT
        return turns

    return land


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(20))
def test_time_budgets_land(seed: int, noise: float, case_of: Any, land: Land) -> None:
    draw = random.Random(seed)
    case = case_of(draw, 60 * 10 ** draw.uniform(0, 3), draw.uniform(300, 1500))
    every = draw.choice([20.0, 60.0, math.inf])
    land(case, machine_of(draw, case, noise=noise, save_every=every), least=0.97)
    short = case_of(draw, 10 ** draw.uniform(0.5, 1.8), draw.uniform(5, 200))
    land(short, machine_of(draw, short, noise=noise), least=0)


@pytest.mark.parametrize(
    "odd",
    [
        simulated.far_slower,
        simulated.far_faster,
        simulated.slower_half_way,
        simulated.now_and_then_far_slower,
        simulated.slow_to_start,
    ],
)
def test_odd_machines_land(
    odd: Callable[[Case, random.Random], Machine], case_of: Any, land: Land
) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        case = case_of(draw, 600, 2000)
        land(case, odd(case, draw), least=0.97)


def test_steps_of_drawn_work_land(case_of: Any, land: Land) -> None:
    """A looped model's steps: the one that is still to be taken is counted at its own length."""
    for seed in range(20):
        draw = random.Random(seed)
        drawn = [min(3.5, max(0.4, math.exp(random.Random(n).gauss(0, 0.5)))) for n in range(10000)]
        case = case_of(draw, 600, 500)
        machine = machine_of(draw, case, noise=0.1, work=drawn.__getitem__)
        turns = land(case, machine, least=0.97)
        jumps = [b.progress - a.progress for a, b in itertools.pairwise(turns)][5:-2]
        heavy = [jump for n, jump in enumerate(jumps, 6) if drawn[n] > 1.5]
        light = [jump for n, jump in enumerate(jumps, 6) if drawn[n] < 0.7]
        assert min(heavy) > max(0.0, sum(light) / len(light))


def test_few_steps_far_slower_than_promised_stay_within(
    case_of: Any, unheard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is over before anything is known of its steps does not begin one too many."""
    for seed in range(100):
        draw = random.Random(seed)
        case = case_of(draw, 60, draw.uniform(5, 100))
        machine = simulated.far_slower(case, draw)
        _, seconds = simulate(case.plan, machine, monkeypatch, ranks=Ranks(0, 2))
        assert seconds <= case.seconds * LIMIT


def test_being_late_costs_next_to_nothing(
    case_of: Any, unheard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside deciding at once, on a machine that is as it was promised."""
    draw = random.Random(0)
    case = case_of(draw, 600, 500)
    machine = machine_of(draw, case, noise=0.0, slower=1.0)
    late, _ = simulate(case.plan, machine, monkeypatch, ranks=Ranks(0, 2))
    once, _ = simulate(case.plan, machine, monkeypatch, ranks=ALONE)
    assert abs(len(late) - len(once)) <= 0.02 * len(once)


def test_ahead_counts_the_step_that_is_still_to_be_taken(case_of: Any) -> None:
    case = case_of(random.Random(0), 600, 500)
    for at in (0.0, 100.0, 400.0):
        paces = [Pace(case.plan, Clock(case.plan.machine.usd_per_hour)) for _ in range(2)]  # type: ignore[arg-type]
        one = paces[0].step_seconds()
        for pace, now in zip(paces, (at, at + one), strict=True):
            pace.meter.time = now  # type: ignore[attr-defined]
        ahead, then = paces[0].next(7, ahead=True), paces[1].next(7)
        assert ahead is not None
        assert then is not None
        assert ahead.progress == pytest.approx(then.progress, rel=1e-3)
        assert ahead.progress > paces[0].next(7).progress  # type: ignore[union-attr]


def test_what_took_long_makes_a_decision_stale(case_of: Any, unheard: None) -> None:
    case = case_of(random.Random(0), 600, 500)
    clock = Clock(case.plan.machine.usd_per_hour)
    pace = Pace(case.plan, clock)  # type: ignore[arg-type]
    lead = Lead(Ranks(0, 2), pace, Interrupt())
    for step in range(10):
        lead.next(step)
        clock.time += pace.step_seconds()
    ahead = pace.next(10)
    assert ahead is not None
    clock.time += 300.0
    assert pace.next(10).progress > ahead.progress + 0.4  # type: ignore[union-attr]
    lead.forget()
    assert lead.next(10) == pace.next(10)
    clock.time += 100.0
    assert lead.next(11).progress < pace.next(11).progress - 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_are_counted_as_alone(steps: int, solved: Any, unheard: None) -> None:
    plan = solved(Budget(steps=steps))
    lead = Lead(Ranks(0, 2), Pace(plan, Clock(1.0)), Interrupt())  # type: ignore[arg-type]
    turns = []
    while turn := lead.next(len(turns)):
        turns.append(turn)
        if len(turns) % 3 == 0:
            lead.forget()
        if turn.last:
            break
    assert turns == [Turn((i + 1) / steps, i + 1 == steps) for i in range(steps)]


# ---------------------------------------------------------------- two ranks, each with its clock


def paced(plan: Plan, folder: Path) -> None:
    """A run in simulated time on each of two ranks, whose clocks and steps have nothing in common;
    then one in which each rank in its turn gets a signal."""
    ranks = join("cpu")
    clock = Clock(plan.machine.usd_per_hour, 3.0 if ranks.lead else 20.0)
    draw, took = random.Random(ranks.rank), 1.0 if ranks.lead else 5.0
    pacing.time = SimpleNamespace(monotonic=lambda: clock.time)  # type: ignore[assignment]
    lead, heard = Lead(ranks, Pace(plan, clock), Interrupt()), []  # type: ignore[arg-type]
    while turn := lead.next(len(heard)):
        clock.time += took * draw.uniform(0.8, 1.2)
        lead.pace.step_took(len(heard), took)
        done = len(heard) + 1
        room, due = lead.room_to_evaluate(done), lead.save_due(done)
        heard.append((turn, room, due))
        if turn.last:
            break
        if due or done % 11 == 0:
            clock.time += 3 * took
            lead.pace.last_save = clock.time
            lead.forget()
    found = {"heard": heard, "stops": [stopped(plan, ranks, who) for who in range(2)]}
    torch.save(found, folder / f"paced {ranks.rank}.pt")
    ranks.part()


def stopped(plan: Plan, ranks: Ranks, who: int) -> dict[str, Any]:
    """In which step each rank hears of a SIGTERM that rank `who` gets in step 5."""
    with Interrupt() as interrupt:
        lead = Lead(ranks, Pace(plan, Clock(1.0)), interrupt)  # type: ignore[arg-type]
        found: dict[str, Any] = {"before": lead.asked_to_stop_now()}
        for step in range(20):
            lead.next(step)
            if (step, ranks.rank) == (5, who):
                os.kill(os.getpid(), signal.SIGTERM)
            if lead.asked_to_stop():
                lead.forget()
                return found | {"step": step, "signal": lead.asked_to_stop()} | _now(lead)
    raise AssertionError("nobody heard of it")


def _now(lead: Lead) -> dict[str, Any]:
    return {"now": lead.asked_to_stop_now()}


@pytest.fixture(scope="module")
def plan(request: pytest.FixtureRequest) -> Plan:
    """Some 60 seconds of steps that take one, saved every five of them."""
    run, data = request.getfixturevalue("small_run"), request.getfixturevalue("data_plan")
    run = dataclasses.replace(run, budget=Budget(hours=60 / 3600))
    plan = simulated.solve(run, data, request.getfixturevalue("calibration"))
    return dataclasses.replace(
        plan,
        cadence=dataclasses.replace(
            plan.cadence, save_every_steps=None, save_every_seconds=5.0, finish_seconds=0.1
        ),
        predicted=dataclasses.replace(
            plan.predicted,
            step_seconds=simulated.Interval(1.0, 1.0, 1.0),
            eval_seconds=2.0,
            save_seconds=0.5,
        ),
    )


@pytest.fixture(scope="module")
def both(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("paced")
    started = start(2, paced, plan, folder, folder=folder / "logs")
    assert started.codes() == [0, 0], started.said(0) + started.said(1)
    return [torch.load(folder / f"paced {r}.pt", weights_only=False) for r in range(2)]


def test_all_ranks_hear_the_same(both: list[dict[str, Any]], plan: Plan) -> None:
    heard = both[0]["heard"]
    assert heard == both[1]["heard"]
    leads = Pace(plan, Clock(plan.machine.usd_per_hour, 3.0))  # type: ignore[arg-type]
    assert heard[0][0] == leads.next(0)
    assert heard[-1][0] == Turn(1.0, True)
    assert 30 < len(heard) < 60  # by the lead's clock; the other's was spent after ten
    for column in (1, 2):  # room to evaluate, a save that is due: both happen, neither always
        assert {turn[column] for turn in heard} == {True, False}


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_is_known_to_all_within_two_steps(
    who: int, both: list[dict[str, Any]]
) -> None:
    stops = [rank["stops"][who] for rank in both]
    assert stops[0] == stops[1]
    assert stops[0]["before"] is None
    assert 5 <= stops[0]["step"] <= 7
    assert stops[0]["signal"] is stops[0]["now"] is signal.SIGTERM

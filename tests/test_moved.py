"""An attempt on another machine than the plan's: what changes with it, and what does not."""

import dataclasses

import pytest

from tuppence import host
from tuppence.config import DataPlan, Plan, Run, override
from tuppence.pipeline import on_this_machine
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve

WORDS = ["machine.threads=2", "machine.usd_per_hour=3", "train.micro_batch=1"]


@pytest.fixture
def planned(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> tuple[Run, Plan]:
    run = override(small_run, WORDS)
    two = dataclasses.replace(calibration, threads=2)
    return run, solve(run, data_plan, two, ranks=2, nodes=2)


def here(monkeypatch: pytest.MonkeyPatch, *, world: int, nodes: int) -> None:
    monkeypatch.setattr(host, "world_size", lambda: world)
    monkeypatch.setattr(host, "local_world", lambda: world // nodes)


def test_on_the_planned_machine_it_is_the_plan(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = planned
    here(monkeypatch, world=2, nodes=2)
    assert on_this_machine(plan, run) == plan
    assert on_this_machine(plan, override(run, ["machine.usd_per_hour=none"])) == plan


def test_other_ranks_nodes_and_prices_change_speed_and_bill_alone(
    planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = planned
    assert plan.machine.usd_per_hour == 6
    here(monkeypatch, world=1, nodes=1)
    alone = on_this_machine(plan, override(run, ["machine.usd_per_hour=none"]))
    assert (alone.machine.usd_per_hour, alone.machine.nodes, alone.step.ranks) == (3, 1, 1)
    assert alone.machine.peak_tflops == pytest.approx(plan.machine.peak_tflops / 2)
    assert alone.predicted.step_seconds.mid == pytest.approx(2 * plan.predicted.step_seconds.mid)
    for part in ("model", "data", "optimizer", "schedule", "cadence", "budget"):
        assert getattr(alone, part) == getattr(plan, part)
    assert alone.step.batch_tokens == plan.step.batch_tokens
    dearer = on_this_machine(plan, override(run, ["machine.usd_per_hour=8"]))
    assert dearer.machine.usd_per_hour == 8
    cores = on_this_machine(plan, override(run, ["machine.threads=4"]))
    assert (cores.machine.threads, cores.step.workers) == (4, 4)

"""A rented machine's whole time on the bill: before the process, after it, each second once."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_schedule_pace
from known import know_this_machine
from test_folder_ledger import Time, seconds_of
from test_recovery import TINY, finished, tuppence, wait_for_step
from test_schedule_pace import case_of, solved  # noqa: F401 (fixtures)

from tuppence import config, held, host, ledger, pipeline, recipes, report
from tuppence.config import DataPlan
from tuppence.errors import Fault
from tuppence.folder import RunFolder
from tuppence.held import Held
from tuppence.ledger import Meter, spent
from tuppence.plan.hardware import Calibration
from tuppence.train.pace import finish_seconds

NOW = 1e7
RENTED = [*TINY[1:], "machine.usd_per_hour=3.6", "budget.usd=1", "name=x"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path)
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    told = Time(NOW)
    monkeypatch.setattr(ledger, "time", told)
    return told


def machine(since: float, *, setup: float = 30.0, tail: float = 5.0, usd: float = 3.6) -> Held:
    """Paid from `since`; set-up began so long after it."""
    return Held(since, since + setup, usd, tail)


def begin(folder: RunFolder, held: Held, *, attempt: int, start: float) -> Meter:
    """A meter at the machine's price; 3.60 an hour is a tenth of a cent each second."""
    price = held.usd_per_hour
    return Meter(folder, usd_per_hour=price, attempt=attempt, start=start, held=held)


def no_overlap(folder: RunFolder) -> None:
    rows = sorted((row["start"], row["end"]) for row in folder.rows("ledger"))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(rows)), rows


def test_the_time_around_the_process_is_charged(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, machine(NOW - 100), attempt=1, start=NOW - 10)
    assert meter.seconds() == pytest.approx(100)
    assert meter.usd() == pytest.approx(0.1)
    assert meter.seconds_left(usd=0.2, hours=None) == pytest.approx(95)  # the tail is kept back
    assert meter.seconds_left(usd=0.2, hours=150 / 3600) == pytest.approx(45)
    assert meter.spent_at(usd=0.2, hours=None) == pytest.approx(NOW + 100)
    clock.at += 20
    meter.switch("train")
    clock.at += 30
    meter.close(allowance=1.0, ended=True)
    found = {"provision": 30 + 30, "install": 60, "train": 30, "save": 1, "idle": 5}
    assert seconds_of(folder) == found
    assert spent(folder).usd == pytest.approx(0.156)
    rows = list(folder.rows("ledger"))
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(rows))


def test_a_preparation_before_the_trainer_is_told_apart(folder: RunFolder, clock: Time) -> None:
    there = Held(NOW - 100, NOW - 80, 3.6, 0.0, prepare=NOW - 50)
    begin(folder, there, attempt=1, start=NOW - 1).close()
    assert seconds_of(folder) == {"provision": 20 + 1, "install": 30, "prepare": 49}


def test_an_attempt_that_did_not_end_has_no_tail(folder: RunFolder, clock: Time) -> None:
    begin(folder, machine(NOW - 40), attempt=1, start=NOW).close(allowance=0.5)
    assert "idle" not in seconds_of(folder)


def test_attempts_on_one_machine_charge_no_second_twice(folder: RunFolder, clock: Time) -> None:
    """Killed -9, then begun again by the same script: what lay between was paid for waiting."""
    there = machine(NOW - 50)
    meter = begin(folder, there, attempt=1, start=NOW - 5)
    meter.switch("train")
    clock.at += 60
    meter.beat()
    clock.at += 7  # killed; nobody saw this
    folder.close()
    second = begin(folder, there, attempt=2, start=clock.at - 3)
    assert second.seconds() == pytest.approx(50 + 67)
    assert second.usd() == pytest.approx(0.117)
    second.switch("train")
    clock.at += 10
    second.close(ended=True)
    found = {"provision": 30 + 5 + 3, "install": 15, "train": 60 + 10, "idle": 4 + 5}
    assert seconds_of(folder) == found
    no_overlap(folder)


def test_the_tail_is_charged_once(folder: RunFolder, clock: Time) -> None:
    """A run that goes on inside the tail of the attempt before (it had ended, and was extended)."""
    there = machine(NOW - 50, tail=20)
    begin(folder, there, attempt=1, start=NOW - 5).close(ended=True)
    clock.at += 8
    second = begin(folder, there, attempt=2, start=clock.at - 2)
    assert second.seconds() == pytest.approx(50 + 20)
    clock.at += 30
    second.close(ended=True)
    assert spent(folder).seconds == pytest.approx(50 + 8 + 30 + 20)
    no_overlap(folder)


def test_a_resume_on_another_machine_has_its_price(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, machine(NOW - 100), attempt=1, start=NOW - 10)
    meter.beat()
    clock.at += 3600  # it was taken away, and for an hour there was none
    other = machine(clock.at - 40, usd=7.2)
    second = begin(folder, other, attempt=2, start=clock.at - 4)
    assert second.seconds() == pytest.approx(100 + 40)
    assert second.usd() == pytest.approx(0.1 + 0.08)
    assert second.seconds_left(usd=0.2, hours=None) == pytest.approx(10 - 5)
    second.close()
    prices = {row["attempt"]: row["usd_per_hour"] for row in folder.rows("ledger")}
    assert prices == {1: 3.6, 2: 7.2}


def test_what_a_killed_trainer_could_not_write_is_charged(folder: RunFolder, clock: Time) -> None:
    there = machine(NOW - 50)
    begin(folder, there, attempt=1, start=NOW - 5)
    for _ in range(2):  # a second time it is charged already
        ledger.charge_idle(folder, there, until=NOW + 30)
    found = seconds_of(folder)
    assert found == {"provision": 30 + 5, "install": 15, "idle": 30}
    ledger.charge_idle(folder, machine(NOW + 100), until=NOW + 300)  # of another machine: no word
    assert seconds_of(folder) == found


def test_files_for_the_script(tmp_path: Path) -> None:
    there = Held(1.5, 2.5, 3.6, 4.0, prepare=3.5, price_note="?")
    held.write(tmp_path, there)
    assert held.read(tmp_path / held.HELD) == there
    (tmp_path / held.HELD).write_text('{"since": 1}')
    for path in (tmp_path / held.HELD, tmp_path / "none"):
        with pytest.raises(Fault, match="does not say since when the machine is paid"):
            held.read(path)
    held.tell_deadline(tmp_path, spent_at=float("inf"), tail_seconds=4.0)
    assert not (tmp_path / held.DEADLINE).exists()
    held.tell_deadline(tmp_path, spent_at=100.0, tail_seconds=4.0)
    assert json.loads((tmp_path / held.DEADLINE).read_text()) == {"deadline": 98.0}


# ---------------------------------------------------------------- budgets, in simulated time


class HeldClock:
    """In place of the pace's own clock: a real meter, of a machine that was held before."""

    made: HeldClock

    def __init__(self, folder: RunFolder, clock: Time, held: Held, price: float, startup: float):
        self.clock, self.held = clock, held
        self.meter = Meter(folder, usd_per_hour=price, attempt=1, start=clock.at, held=held)
        self.clock.at += startup
        self.seconds, self.usd = self.meter.seconds, self.meter.usd
        self.seconds_left = self.meter.seconds_left
        HeldClock.made = self

    @property
    def time(self) -> float:
        return self.clock.at - self.held.since

    @time.setter
    def time(self, value: float) -> None:
        self.clock.at = self.held.since + value


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_covers_the_machine(
    seed: int,
    folder: RunFolder,
    clock: Time,
    case_of: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """97-100%, in dollars or hours or both, set-up before and machine's end behind it included."""
    draw = random.Random(seed)
    case = case_of(draw, 60 * 10 ** draw.uniform(0, 3), draw.uniform(300, 1500))
    before, tail = draw.uniform(0, 0.4) * case.seconds, draw.uniform(0, 0.1) * case.seconds
    price = case.plan.machine.usd_per_hour
    there = Held(NOW - before, NOW - before / 2, price, tail)
    monkeypatch.setattr(
        test_schedule_pace, "Clock", lambda *given: HeldClock(folder, clock, there, *given)
    )
    turns, _ = test_schedule_pace.simulate(
        case.plan, test_schedule_pace.machine_of(draw, case, noise=0.1)
    )
    allowance = finish_seconds(case.plan, len(turns))
    HeldClock.made.meter.close(allowance=allowance, ended=True)
    assert 0.97 * case.seconds <= spent(folder).seconds <= case.seconds * (1 + 1e-9)
    found = seconds_of(folder)
    assert found["idle"] == pytest.approx(tail)
    assert found["install"] == pytest.approx(before / 2)


# ---------------------------------------------------------------- plans


def test_a_plan_counts_what_was_charged_already(
    calibration: Calibration, data_plan: DataPlan
) -> None:
    words = ["budget.hours=0.1", *TINY]
    know_this_machine(calibration, data_plan, [words])
    run = config.override(recipes.get("shakespeare"), words)
    start = host.process_start()
    there = Held(start - 100, start - 70, 1.0, 7.0)
    alone, rented = pipeline.solved(run, data_plan), pipeline.solved(run, data_plan, held=there)
    phases = rented.predicted.phase_seconds
    assert phases["provision"] == pytest.approx(calibration.startup_seconds + 30)
    assert phases["install"] == pytest.approx(70)
    assert phases["idle"] == 7
    assert rented.predicted.steps.mid < alone.predicted.steps.mid
    assert sum(phases.values()) <= 360 + 1e-6
    assert sum(phases.values()) == pytest.approx(3600 * rented.predicted.hours.mid, rel=0.01)
    later = pipeline.solved(run, data_plan, held=there, spent_seconds=150.0).predicted.phase_seconds
    assert later["provision"] == pytest.approx(150 - 70)
    assert pipeline._beside_start(alone, {}) == alone
    assert pipeline._around(there) == pytest.approx({"provision": 30, "install": 70, "idle": 7})


# ---------------------------------------------------------------- whole processes


@pytest.fixture
def known(cache_home: Path, calibration: Calibration, data_plan: DataPlan) -> None:
    know_this_machine(calibration, data_plan, [["budget.steps=1", *TINY]])


def rented(place: Path, *, before: float, tail: float) -> str:
    """held.json of a machine that has been paid for so long."""
    place.mkdir(exist_ok=True)
    held.write(place, Held(time.time() - before, time.time() - before / 2, 3.6, tail))
    return str(place / held.HELD)


def phases_of(folder: RunFolder) -> dict[str, float]:
    told = report.write(folder)
    assert told["usd"] == pytest.approx(sum(part["usd"] for part in told["phases"]))
    assert told["usd"] == pytest.approx(spent(folder).usd)
    return {part["phase"]: part["seconds"] for part in told["phases"]}


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_a_run_on_a_rented_machine(tmp_path: Path) -> None:
    script = rented(tmp_path / "node", before=40, tail=5)
    words = [
        *TINY[1:],
        "budget.usd=1",
        "budget.steps=20",
        "machine.usd_per_hour=3.6",
        "name=x",
        "--held",
        script,
    ]
    code, _, err = finished(tuppence("run", *words, cwd=tmp_path))
    assert code == 0, err
    folder = RunFolder(tmp_path / "runs/x")
    phases = phases_of(folder)
    assert phases["idle"] == pytest.approx(5)
    assert phases["install"] >= 20
    assert phases["provision"] >= 20
    deadline = json.loads((tmp_path / "node" / held.DEADLINE).read_text())["deadline"]
    first = min(row["start"] for row in folder.rows("ledger"))
    assert deadline - first == pytest.approx(1000 - 2.5, abs=0.1)
    predicted = folder.plan().predicted.phase_seconds
    assert predicted["idle"] == 5
    assert predicted["install"] == pytest.approx(phases["install"], abs=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_killed_in_between_no_second_is_lost_or_charged_twice(tmp_path: Path) -> None:
    script = rented(tmp_path / "node", before=35, tail=5)
    words = [
        *TINY[1:],
        "budget.usd=1",
        "budget.steps=40",
        "machine.usd_per_hour=3.6",
        "name=x",
        "--held",
        script,
    ]
    process = tuppence("train", *words, cwd=tmp_path)
    wait_for_step(tmp_path / "runs/x", 12, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    code, _, err = finished(tuppence("train", *words, cwd=tmp_path))
    assert code == 0, err
    folder = RunFolder(tmp_path / "runs/x")
    no_overlap(folder)
    rows = sorted(folder.rows("ledger"), key=lambda row: float(row["start"]))
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(rows))
    assert phases_of(folder)["idle"] > 5  # and what lay between the two


@pytest.mark.usefixtures("known")
def test_what_is_doubtful_about_the_price_is_said(tmp_path: Path) -> None:
    held.write(tmp_path, Held(time.time() - 5, time.time() - 4, 3.6, 1.0, price_note="no price"))
    words = [*TINY, "budget.steps=1", "name=x", "--held", str(tmp_path / held.HELD)]
    code, _, err = finished(tuppence("train", *words, cwd=tmp_path))
    assert code == 0, err
    events = RunFolder(tmp_path / "runs/x").rows("events")
    assert [e["message"] for e in events if e["code"] == "price_unknown"] == ["no price"]
    assert not (tmp_path / held.DEADLINE).exists()  # no limit in time or money


@pytest.mark.usefixtures("known")
def test_money_that_is_spent_before_the_start_is_refused(tmp_path: Path) -> None:
    script = rented(tmp_path / "node", before=60, tail=5)
    words = [*TINY, "budget.usd=0.01", "name=x", "--held", script]
    code, _, err = finished(tuppence("train", *words, cwd=tmp_path))
    assert code == 3, err
    assert "budget" in err
    assert not (tmp_path / "runs/x").exists()

"""Where a run stands, from its folder: of runs that were killed, stopped and finished for real."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, command
from known import know_this_machine
from test_recovery import TINY, finished, tuppence, wait_for_step

from tuppence.config import Budget, DataPlan, Plan, Run
from tuppence.errors import Fault
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.watch import alive, standing
from tuppence.watch.standing import Follower, Standing

NOW = 2_000_000_000.0


@pytest.fixture(scope="session")
def plan(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Plan:
    return solve(small_run, data_plan, calibration)


@pytest.fixture
def folder(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A run that was planned, at a time of the test's own."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    made = RunFolder(tmp_path / "small")
    made.path.mkdir()
    made.write_json("run.json", {"name": "small", "budget": {"usd": 0.02}})
    made.write_json("plan.json", dataclasses.asdict(plan))
    yield made
    made.close()


def interval(start: float, end: float, phase: str = "train", attempt: int = 1) -> dict[str, Any]:
    """At $0.36 an hour: a second costs a hundredth of a cent."""
    usd = (end - start) * 1e-4
    row = {"start": start, "end": end, "phase": phase, "node": platform.node(), "usd": usd}
    return {**row, "usd_per_hour": 0.36, "attempt": attempt}


def step(number: int, attempt: int = 1, **others: Any) -> dict[str, Any]:
    row = {"step": number, "attempt": attempt, "tokens": 512 * number, "loss": 2.0, "lr": 1e-3}
    row |= {"step_seconds": 0.5, "data_wait": 0.05, "tokens_per_second": 1024.0, "mfu": 0.3}
    return {**row, "progress": number / 1000, "usd": 0.0, "hours": number / 3600, **others}


def beat(folder: RunFolder, end: float, **others: Any) -> None:
    folder.write_beat({**interval(end - 5, end), "pid": os.getpid(), **others})


# ---------------------------------------------------------------- for real


@pytest.fixture
def known(cache_home: Path, calibration: Calibration, data_plan: DataPlan) -> None:
    """No process measures the machine."""
    know_this_machine(calibration, data_plan, [["budget.steps=1", *TINY]])


def until(there: RunFolder, state: str) -> Standing:
    """Where it stands, once that is so."""
    for _ in range(500):
        found = standing.read(there)
        if found.state == state:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{found.state}: {found.said}, not {state}")


@pytest.mark.usefixtures("known")
def test_running_killed_running_stopped(tmp_path: Path) -> None:
    words = ["train", "budget.steps=100000", "name=x", *TINY]
    there = RunFolder(tmp_path / "runs" / "x")
    process = tuppence(*words, cwd=tmp_path)
    wait_for_step(there.path, 11, process)
    found = standing.read(there)
    assert (found.state, found.doing in ("train", "save")) == ("running", True)
    assert found.step >= 11
    assert found.seconds_left is not None
    assert found.resume is None
    process.kill()
    process.communicate()
    found = until(there, "dead")
    assert "is gone" in found.said
    assert found.seconds_left is None
    assert found.resume is not None
    assert found.resume.startswith("tuppence train budget.steps=100000")
    paid, seen = found.usd, found.step

    process = tuppence(*words, cwd=tmp_path)
    wait_for_step(there.path, seen + 5, process)
    found = until(there, "running")
    assert (found.attempt, found.usd > paid) == (2, True)
    process.send_signal(signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 128 + signal.SIGTERM, err
    found = standing.read(there)
    assert found.state == "stopped"
    assert found.said == f"SIGTERM: saved at step {found.saved_step}; the same command continues"


def broken() -> None:
    """Nothing is saved."""
    from tuppence.train import loop

    def save(trainer: Any) -> None:
        raise Fault("the disk is on fire")

    loop.save = save  # type: ignore[assignment]


@pytest.mark.usefixtures("known")
def test_finished_and_failed(tmp_path: Path) -> None:
    words = ["train", "budget.steps=12", *TINY]
    good = tuppence(*words, "name=good", cwd=tmp_path)
    bad = Forked(command, [*words, "name=bad"], cwd=tmp_path, before=broken)
    assert finished(good)[0] == 0
    assert finished(bad)[0] == 1
    found = standing.read(RunFolder(tmp_path / "runs" / "good"))
    assert (found.state, found.step, found.progress) == ("finished", 12, 1.0)
    assert found.val_loss == found.best_val_loss
    assert found.memory_gib is not None
    assert found.resume is None
    found = standing.read(RunFolder(tmp_path / "runs" / "bad"))
    assert (found.state, found.said) == ("failed", "the disk is on fire")
    assert found.resume is not None


# ---------------------------------------------------------------- whether anyone is at it


def test_nothing_was_charged_yet(folder: RunFolder) -> None:
    assert standing.read(folder).state == "unstarted"
    folder.file("plan.json").unlink()
    beat(folder, NOW, phase="prepare")
    found = standing.read(folder)
    assert (found.state, found.doing, found.name) == ("running", "prepare", "small")
    assert [(each["kind"], each["limit"]) for each in found.limits] == [("usd", 0.02)]


@pytest.mark.parametrize(("silent", "state"), [(1, "running"), (170, "running"), (200, "dead")])
def test_another_machines_beat_goes_by_its_age(
    folder: RunFolder, silent: float, state: str
) -> None:
    beat(folder, NOW - silent, node="elsewhere", pid=1)
    assert standing.read(folder).state == state
    assert Follower(folder, remote=True).read().state == "running"  # which comes in its time


def test_a_process_number_says_nothing_elsewhere(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "lives", lambda pid, before: False)
    beat(folder, NOW - 1)
    assert standing.read(folder).state == "dead"
    assert Follower(folder, remote=True).read().state == "running"  # a host of the same name
    beat(folder, NOW - 1, space="another container's")
    assert standing.read(folder).state == "running"
    assert not alive.is_at_it(folder)
    beat(folder, time.monotonic(), space=alive.process_space())
    assert alive.is_here(folder.read_json("heartbeat.json"))
    assert alive.is_here({"node": platform.node()})  # an older run's


def test_a_run_is_not_dead_because_its_bucket_is_away(folder: RunFolder) -> None:
    beat(folder, NOW - 1000, node="elsewhere")
    follower = Follower(folder, remote=True)
    assert follower.read().state == "dead"
    follower.seen_at = NOW - 900
    assert follower.read().state == "running"


def test_an_ending_that_was_told_counts_more_than_a_beat_that_was_kept(folder: RunFolder) -> None:
    folder.event("failed", "no space left on device", attempt=1)
    beat(folder, NOW - 1000, node="elsewhere")
    found = standing.read(folder)
    assert (found.state, found.said) == ("failed", "no space left on device")
    beat(folder, NOW, node="elsewhere", attempt=2)
    assert standing.read(folder).state == "running"


def test_a_stall_that_the_plan_grants_is_not_taken_for_death(folder: RunFolder, plan: Plan) -> None:
    patient = dataclasses.replace(plan.cadence, stall_seconds=1000.0)
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, cadence=patient)))
    beat(folder, NOW - 900, node="elsewhere")
    assert standing.read(folder).state == "running"


def test_a_process_of_this_machine_may_be_silent_for_long(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "lives", lambda pid, before: pid == 7)
    beat(folder, NOW - 5000, pid=7)
    assert standing.read(folder).state == "running"
    beat(folder, NOW, pid=8)
    assert standing.read(folder).state == "dead"


def test_a_number_that_another_process_has_now() -> None:
    assert alive.lives(os.getpid(), before=time.time())
    assert not alive.lives(os.getpid(), before=1000.0)
    assert not alive.lives(2**22 + 1, before=time.time())


@pytest.mark.parametrize("content", ["", "[]", '{"node": 5}', '{"usd": "x"}'])
def test_a_beat_that_is_no_beat(folder: RunFolder, content: str) -> None:
    folder.file("heartbeat.json").write_text(content)
    found = standing.read(folder)
    assert (found.state, found.alive_at) == ("dead", None)
    folder.append("ledger", interval(NOW - 100, NOW - 50))
    found = standing.read(folder)
    assert (found.state, found.alive_at, found.usd) == ("dead", NOW - 50, pytest.approx(0.005))


def test_a_copy_has_its_folders_name_and_no_command(folder: RunFolder, tmp_path: Path) -> None:
    folder.file("argv.txt").write_text("tuppence run name=small\n")
    folder.append("ledger", interval(NOW - 100, NOW - 50))
    assert standing.read(folder).resume == "tuppence run name=small"
    shutil.copytree(folder.path, tmp_path / "copy")
    found = standing.read(RunFolder(tmp_path / "copy"))
    assert (found.name, found.state, found.resume) == ("copy", "stopped", None)


def test_a_ledger_that_is_gone_is_told(folder: RunFolder) -> None:
    folder.append("metrics", step(3))
    folder.event("end", "finished", attempt=1)
    assert "nobody knows what it cost" in standing.read(folder).said


def test_a_meter_that_was_closed_without_a_word(folder: RunFolder) -> None:
    folder.append("ledger", interval(NOW - 100, NOW - 50))
    assert standing.read(folder).state == "stopped"
    folder.event("stalled", "no step in 120 s", attempt=1)
    assert (standing.read(folder).state, standing.read(folder).said) == (
        "failed",
        "no step in 120 s",
    )
    folder.event("resume", "", attempt=2, step=1)
    assert standing.read(folder).said == "its process left before the end"


# ---------------------------------------------------------------- what it comes to


def test_an_interval_counts_once_whether_open_or_closed(folder: RunFolder) -> None:
    folder.append("ledger", interval(NOW - 100, NOW - 60))
    beat(folder, NOW - 10)
    open_row = interval(NOW - 60, NOW - 10)
    folder.write_beat({**open_row, "pid": os.getpid()})
    assert standing.read(folder).usd == pytest.approx(90 * 1e-4)
    folder.append("ledger", open_row)
    found = standing.read(folder)
    assert found.usd == pytest.approx(90 * 1e-4)
    assert found.hours == pytest.approx(90 / 3600)
    assert found.limits[0]["fraction"] == pytest.approx(0.009 / 0.02)


def test_dollars_that_are_left_are_time(folder: RunFolder) -> None:
    beat(folder, NOW - 3)  # five seconds cost 0.0005 of 0.02
    found = standing.read(folder)
    assert found.seconds_left == pytest.approx(195 - 3)
    assert found.ends_at == pytest.approx(NOW + 192)


def test_steps_that_are_left_take_what_they_took_lately(folder: RunFolder, plan: Plan) -> None:
    budget = Budget(steps=200)
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    for number in range(1, 101):  # each took a second of charged time, half of it a step
        folder.append("metrics", step(number))
    beat(folder, NOW)
    found = standing.read(folder)
    assert found.seconds_left == pytest.approx(100.0)
    assert found.data_wait == pytest.approx(0.1)
    assert found.loss == pytest.approx(2.0)


def test_lines_of_older_runs_have_no_hours(folder: RunFolder, plan: Plan) -> None:
    budget = Budget(steps=200)
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    for number in range(1, 101):
        row = step(number, progress=number / 200)
        del row["hours"]
        folder.append("metrics", row)
    beat(folder, NOW)
    assert standing.read(folder).seconds_left == pytest.approx(5.0)  # as long as it took so far


def test_the_anneal_of_an_early_stop(folder: RunFolder) -> None:
    folder.append("metrics", step(80))
    details = {"reason": "turned", "step": 100, "back_to": 80, "anneal_steps": 10, "test": "it did"}
    folder.event("early_stop", "validation has turned", **details)
    folder.append("metrics", step(84))
    beat(folder, NOW)
    found = standing.read(folder)
    assert found.stopping is not None
    assert found.seconds_left == pytest.approx(6 * 0.5)


def test_what_counts_after_a_resume(folder: RunFolder) -> None:
    folder.event("start", "", attempt=1, step=0)
    for at, loss in ((10, 3.0), (20, 2.0)):
        folder.append("evals", {"step": at, "attempt": 1, "loss": loss, "bpb": 1.0})
        folder.append("metrics", step(at, loss=loss))
    follower = Follower(folder)
    assert (follower.read().val_loss, follower.read().loss) == (2.0, 2.5)
    folder.event("resume", "", attempt=2, step=10)
    folder.append("metrics", step(11, 2, loss=2.9))
    found = follower.read()
    assert (found.val_loss, found.best_step, found.loss) == (3.0, 10, 2.9)


# ---------------------------------------------------------------- how it reads


def test_only_the_end_of_the_metrics_is_read(folder: RunFolder) -> None:
    lines = "".join(json.dumps(step(number)) + "\n" for number in range(1, 2000))
    folder.file("metrics.jsonl").write_text("this is no line of metrics\n" * 1000 + lines)
    assert standing.read(folder).step == 1999


def test_only_what_is_new_is_read(folder: RunFolder) -> None:
    follower = Follower(folder)
    folder.append("ledger", interval(NOW - 100, NOW - 60))
    assert follower.read().usd == pytest.approx(0.004)
    path = folder.file("ledger.jsonl")
    path.write_bytes(path.read_bytes().replace(b"e", b"x"))  # seen by nobody
    with path.open("ab") as lines:
        lines.write(b'{"start": 1, "end": 3, ')  # torn: no line yet
    assert follower.read().usd == pytest.approx(0.004)
    with path.open("ab") as lines:
        lines.write(b'"usd": 0.001}\n')
    assert follower.read().usd == pytest.approx(0.005)


def test_a_run_that_is_begun_anew(folder: RunFolder) -> None:
    follower = Follower(folder)
    folder.append("ledger", interval(NOW - 100, NOW - 60))
    folder.append("metrics", step(7))
    assert follower.read().step == 7
    folder.close()
    aside = folder.file("aside")
    aside.write_text("".join(json.dumps(step(number)) + "\n" for number in (1, 2, 3)))
    aside.replace(folder.file("metrics.jsonl"))
    folder.file("ledger.jsonl").write_text("")
    found = follower.read()
    assert (found.step, found.usd, found.state) == (3, 0.0, "unstarted")
    folder.file("metrics.jsonl").unlink()
    assert follower.read().step == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ledger.jsonl", b"{nonsense\n"),
        ("ledger.jsonl", b"[1, 2]\n"),
        ("metrics.jsonl", b'{"step": 1}\n'),
        ("events.jsonl", b"{}\n"),
        ("evals.jsonl", b"[]\n"),
        ("evals.jsonl", b"{}\n"),
        ("plan.json", b"{}"),
        ("run.json", b"not even JSON"),
    ],
)
def test_a_damaged_file_is_named(folder: RunFolder, name: str, content: bytes) -> None:
    folder.file(name).write_bytes(content)
    with pytest.raises(Fault, match=f"{name}.* is damaged"):
        standing.read(folder)


def test_an_ending_without_a_word(folder: RunFolder) -> None:
    folder.append("events", {"time": NOW, "code": "failed"})
    assert standing.read(folder).state == "failed"


def test_steps_that_an_early_stop_went_back_from_are_spent(folder: RunFolder, plan: Plan) -> None:
    budget = Budget(steps=200)
    folder.write_json("plan.json", dataclasses.asdict(dataclasses.replace(plan, budget=budget)))
    details = {"reason": "turned", "step": 100, "back_to": 80, "anneal_steps": 10}
    folder.event("early_stop", "validation has turned", **details)
    folder.append("metrics", step(90))
    (limit,) = standing.read(folder).limits
    assert (limit["spent"], limit["fraction"]) == (110, 0.55)


def test_the_document_is_plain(folder: RunFolder) -> None:
    json.dumps(standing.read(folder).document(), allow_nan=False)
    folder.append("metrics", step(3))
    beat(folder, NOW)
    told = json.loads(json.dumps(standing.read(folder).document(), allow_nan=False))
    spent = {"spent": pytest.approx(0.0005), "fraction": pytest.approx(0.025)}
    assert told["limits"] == [{"kind": "usd", "limit": 0.02, **spent}]

"""The run folder under kills and full disks, and the meter that charges every second once."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuppence import folder as folder_module
from tuppence import ledger
from tuppence.config import DataPlan, Run
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder, RunLock, find, write_text
from tuppence.ledger import Meter, Spent, by_phase, spent
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path)
    yield made
    made.close()


def again(folder: RunFolder) -> None:
    """The folder as the next process sees it: all it holds is open files."""
    folder.close()


# ---------------------------------------------------------------- lines


def test_lines_come_back_in_order(folder: RunFolder) -> None:
    rows = [{"step": i, "loss": i / 7, "text": "ünï\ncode"} for i in range(5)]
    for row in rows:
        folder.append("metrics", row)
    assert list(folder.rows("metrics")) == rows
    assert list(folder.rows("evals")) == []
    with pytest.raises(AssertionError):
        folder.append("metric", {})


def test_a_line_is_on_disk_when_append_returns(folder: RunFolder) -> None:
    folder.append("events", {"code": "x"})
    assert folder.file("events.jsonl").read_bytes() == b'{"code": "x"}\n'


def test_a_torn_last_line_is_passed_over_and_cut_off(folder: RunFolder) -> None:
    folder.append("metrics", {"step": 1})
    folder.append("metrics", {"step": 2})
    whole = folder.file("metrics.jsonl").read_bytes()
    for length in range(len(b'{"step": 1}\n'), len(whole)):  # killed at any byte of the second
        folder.close()
        folder.file("metrics.jsonl").write_bytes(whole[:length])
        assert list(folder.rows("metrics")) == [{"step": 1}]
        again(folder)
        folder.append("metrics", {"step": 3})
        assert list(folder.rows("metrics")) == [{"step": 1}, {"step": 3}]


def test_a_file_that_is_only_torn_starts_over(folder: RunFolder) -> None:
    folder.file("ledger.jsonl").write_bytes(b'{"start": 1.0, "en')
    assert list(folder.rows("ledger")) == []
    folder.append("ledger", {"start": 2.0})
    assert list(folder.rows("ledger")) == [{"start": 2.0}]


def test_a_damaged_line_is_named(folder: RunFolder) -> None:
    folder.file("evals.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(Fault, match=r"evals\.jsonl line 2 is damaged"):
        list(folder.rows("evals"))


@pytest.mark.xfail(strict=True, raises=UnicodeDecodeError, reason="only JSON errors are caught")
def test_a_line_that_is_no_text_is_named(folder: RunFolder) -> None:
    folder.file("evals.jsonl").write_bytes(b'{"step": 1}\n{"step\xff": 2}\n')
    with pytest.raises(Fault, match=r"evals\.jsonl line 2 is damaged"):
        list(folder.rows("evals"))


@pytest.mark.xfail(
    strict=True, reason="what a failed append wrote stays, and the next one goes on it"
)
@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_line_cut_short_by_a_full_disk_is_no_line(folder: RunFolder) -> None:
    import resource

    folder.append("metrics", {"step": 1})
    size = folder.file("metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            folder.append("metrics", {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.append("metrics", {"step": 3})  # the failed checkpoint went, so there is room again
    assert [row["step"] for row in folder.rows("metrics")] == [1, 3]


def test_the_last_row_of_a_step_wins(folder: RunFolder) -> None:
    for step, attempt in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2)):
        folder.append("metrics", {"step": step, "attempt": attempt})
    found = [(row["step"], row["attempt"]) for row in folder.latest("metrics")]
    assert found == [(1, 1), (2, 2), (3, 2), (4, 2)]


@pytest.mark.xfail(strict=True, reason="a thrown-away step beyond the last one counts as trained")
def test_steps_that_a_resume_threw_away_are_not_the_latest(folder: RunFolder) -> None:
    rows = [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2)]  # resumed from 2, and the money ended at 3
    for step, attempt in rows:
        folder.append("metrics", {"step": step, "attempt": attempt})
    assert folder.latest("metrics")[-1] == {"step": 3, "attempt": 2}


def test_what_is_no_number_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        folder.append("evals", {"loss": float("nan")})
    assert list(folder.rows("evals")) == []


def test_what_is_no_plain_value_is_refused(folder: RunFolder) -> None:
    with pytest.raises(TypeError, match="Path"):
        folder.append("events", {"path": folder.path})
    assert list(folder.rows("events")) == []


def test_events_have_a_code_and_a_time(folder: RunFolder) -> None:
    folder.event("save", "step 5", step=5)
    (row,) = folder.rows("events")
    assert row.pop("time") > 0
    assert row == {"code": "save", "message": "step 5", "step": 5}


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_document_is_the_old_one_or_the_new_one(
    folder: RunFolder, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_json("receipt.json", {"usd": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(folder_module.os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            folder.write_json("receipt.json", {"usd": 2})
    assert folder.read_json("receipt.json") == {"usd": 1}
    assert [path.name for path in folder.path.iterdir()] == ["receipt.json"]
    folder.write_json("receipt.json", {"usd": 3})
    assert folder.read_json("receipt.json") == {"usd": 3}


def test_a_document_is_flushed_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(folder_module.os, "fsync", lambda f: (done.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(
        folder_module.os, "replace", lambda a, b: (done.append("replace"), replace(a, b))[1]
    )
    write_text(tmp_path / "last.json", "{}")
    assert done == ["fsync", "replace"]


def test_a_document_holds_finite_numbers_only(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("receipt.json", {"usd": float("inf")})
    assert folder.read_json("receipt.json") is None


def test_run_and_plan_come_back(
    folder: RunFolder, small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> None:
    with pytest.raises(UserError, match=r"is not a run folder"):
        folder.run()
    with pytest.raises(UserError, match=r"no plan\.json yet"):
        folder.plan()
    plan = solve(small_run, data_plan, calibration)
    folder.write_json("run.json", dataclasses.asdict(small_run))
    folder.write_json("plan.json", dataclasses.asdict(plan))
    assert folder.exists()
    assert (folder.run(), folder.plan()) == (small_run, plan)


@pytest.mark.xfail(
    strict=True, reason="says `not JSON: ...` without the file, as the input's fault"
)
def test_a_damaged_plan_is_named(folder: RunFolder) -> None:
    folder.file("plan.json").write_text('{"version": 1, ')
    with pytest.raises(Fault, match=r"plan\.json"):
        folder.plan()


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(UserError, match=r"no run 'small'; .*runs/ holds no runs yet"):
        find("small", root)
    (root / "small").mkdir(parents=True)
    (root / "small" / "run.json").write_text("{}")
    assert find("small", root).path == root / "small"
    assert find(str(root / "small"), tmp_path).path == root / "small"
    with pytest.raises(UserError, match=r"no run 'smalll'; did you mean small\?"):
        find("smalll", root)


# ---------------------------------------------------------------- lock

TAKE = (
    "import sys; from pathlib import Path; from tuppence.folder import RunFolder, RunLock\n"
    "with RunLock(RunFolder(Path(sys.argv[1]))):\n    print('taken', flush=True); {then}\n"
)


def take(folder: RunFolder, then: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", TAKE.format(then=then), str(folder.path)]
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_one_process_at_a_time_writes_a_run_folder(folder: RunFolder) -> None:
    with take(folder, "sys.stdin.read()") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        lock = RunLock(folder)
        with pytest.raises(UserError, match=rf"is being written by process {holder.pid}"):
            lock.__enter__()
        lock.__exit__()
        holder.kill()  # the lock vanishes with its process, however it ends
    with RunLock(folder), take(folder, "pass") as other:
        out, err = other.communicate()
        assert out == ""
        assert f"UserError: {folder.path} is being written by process {os.getpid()}" in err
    with take(folder, "pass") as other:
        assert other.communicate()[0] == "taken\n"


@pytest.mark.xfail(strict=True, reason="RunLock keeps the file open: a ResourceWarning later")
def test_a_lock_that_was_not_taken_holds_nothing(folder: RunFolder) -> None:
    lock = RunLock(folder)
    with RunLock(folder), pytest.raises(UserError):
        lock.__enter__()
    try:
        assert lock.handle is None or lock.handle.closed
    finally:
        lock.__exit__()


# ---------------------------------------------------------------- meter


class Time:
    """The clock of tuppence.ledger, told what time it is."""

    def __init__(self, now: float) -> None:
        self.at = now

    def time(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at - 1e6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """It is 10,000,000 s after the epoch, and time passes only where a test says so."""
    told = Time(1e7)
    monkeypatch.setattr(ledger, "time", told)
    return told


def begin(folder: RunFolder, *, attempt: int, start: float, price: float = 3.6) -> Meter:
    """A meter at 3.60 an hour: a tenth of a cent each second."""
    return Meter(folder, usd_per_hour=price, attempt=attempt, start=start)


def seconds_of(folder: RunFolder) -> dict[str, float]:
    return {name: round(part.seconds, 6) for name, part in by_phase(folder).items()}


def test_phases_add_up(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7 - 5)
    clock.at += 2
    with meter.phase("prepare"):
        clock.at += 3
    meter.switch("train")
    clock.at += 10
    with meter.phase("evaluate"):
        clock.at += 4
        with meter.phase("save"):
            clock.at += 1
        clock.at += 2
    clock.at += 10
    assert meter.seconds() == pytest.approx(37)
    assert meter.usd() == pytest.approx(0.037)
    assert meter.seconds_left(usd=0.05, hours=None) == pytest.approx(13)
    assert meter.seconds_left(usd=0.05, hours=40 / 3600) == pytest.approx(3)
    assert meter.seconds_left(usd=None, hours=None) == float("inf")
    meter.close(allowance=0.5)
    assert seconds_of(folder) == {
        "provision": 7,
        "prepare": 3,
        "train": 20.5,
        "evaluate": 6,
        "save": 1,
    }
    assert spent(folder).seconds == pytest.approx(37.5)
    assert spent(folder).usd == pytest.approx(0.0375)
    assert not folder.file("heartbeat.json").exists()
    rows = list(folder.rows("ledger"))
    keys = {"start", "end", "phase", "node", "usd_per_hour", "usd", "attempt"}
    assert all(row.keys() == keys for row in rows)
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(rows))


def test_a_phase_is_closed_when_what_is_inside_fails(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    meter.switch("train")

    def fails() -> None:
        with meter.phase("save"):
            clock.at += 2
            raise Fault("disk full")

    with pytest.raises(Fault):
        fails()
    clock.at += 1
    meter.close()
    assert seconds_of(folder) == {"save": 2, "train": 1}


def test_the_heart_beats_once_a_second_and_says_who(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    meter.switch("train")
    beats = []
    for _ in range(30):
        clock.at += 0.3
        meter.beat()
        beats.append(folder.read_json("heartbeat.json")["end"])
    assert len(set(beats)) == 8  # every 1.2 s, the first multiple of 0.3 s that is a second
    assert folder.read_json("heartbeat.json")["phase"] == "train"
    assert folder.read_json("heartbeat.json")["pid"] == os.getpid()
    meter.close()


def test_a_killed_attempt_is_charged_to_its_last_heartbeat(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    clock.at += 5
    meter.switch("train")
    clock.at += 20
    meter.beat()
    clock.at += 0.9  # killed here: no close, and this much nobody saw
    assert folder.read_json("heartbeat.json")["end"] == 1e7 + 25
    again(folder)
    clock.at += 1000  # no machine was held: not charged
    second = begin(folder, attempt=2, start=clock.at - 3)
    assert spent(folder).seconds == pytest.approx(25)
    assert second.seconds() == pytest.approx(28)
    assert second.usd() == pytest.approx(0.028)
    clock.at += 2
    second.close()
    assert spent(folder).seconds == pytest.approx(30)
    assert seconds_of(folder) == {"provision": 10, "train": 20}
    assert [row["attempt"] for row in folder.rows("ledger")] == [1, 1, 2]


def test_a_heartbeat_written_by_hand_is_charged_once(folder: RunFolder, clock: Time) -> None:
    open_row = {
        "start": 1e7 - 100,
        "end": 1e7 - 60,
        "phase": "train",
        "node": "gone",
        "usd_per_hour": 3.6,
        "usd": 0.04,
        "attempt": 1,
    }
    for _ in range(3):  # also when the next attempt dies between charging it and removing it
        folder.write_beat({**open_row, "pid": 1})
        again(folder)
        meter = begin(folder, attempt=2, start=1e7)
        rows = [row for row in folder.rows("ledger") if row["attempt"] == 1]
        assert rows == [open_row]
        assert meter.seconds() == pytest.approx(40)


def test_an_interval_that_was_closed_in_time_is_not_charged_again(
    folder: RunFolder, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    clock.at += 5
    meter.beat()
    with monkeypatch.context() as killed:
        killed.setattr(folder, "write_beat", lambda row: None)
        meter.switch("train")  # the ledger has the interval, the heartbeat still says it is open
    again(folder)
    begin(folder, attempt=2, start=clock.at)
    assert seconds_of(folder) == {"provision": 5}


def test_attempts_do_not_overlap(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    clock.at += 10
    meter.close()
    again(folder)
    second = begin(folder, attempt=2, start=1e7 + 5)  # a clock that was set back in between
    clock.at += 3
    second.close()
    assert spent(folder).seconds == pytest.approx(13)


@pytest.mark.xfail(strict=True, reason="an allowance charged in advance is charged again")
def test_an_allowance_is_not_charged_twice(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    clock.at += 10
    meter.close(allowance=0.5)
    again(folder)
    clock.at += 0.1
    second = begin(folder, attempt=2, start=clock.at)  # starts inside what is paid for
    second.switch("train")
    clock.at += 10
    second.close()
    assert spent(folder).seconds == pytest.approx(20.1)


@pytest.mark.xfail(
    strict=True, raises=json.JSONDecodeError, reason="a heartbeat is not flushed, nor checked"
)
def test_a_heartbeat_lost_in_a_power_cut_does_not_stop_the_run(
    folder: RunFolder, clock: Time
) -> None:
    folder.file("heartbeat.json").write_text("")
    assert begin(folder, attempt=2, start=1e7).seconds() == 0


# ---------------------------------------------------------------- lost


def attempt(folder: RunFolder, number: int, phases: list[tuple[str, float, float]]) -> None:
    for phase, start, end in phases:
        row: dict[str, Any] = {"start": start, "end": end, "phase": phase, "node": "here"}
        row |= {"usd_per_hour": 3.6, "usd": (end - start) * 1e-3, "attempt": number}
        folder.append("ledger", row)


def test_time_after_the_save_that_was_resumed_is_lost(folder: RunFolder) -> None:
    attempt(folder, 1, [("provision", 0, 5), ("train", 5, 30), ("evaluate", 30, 40)])
    folder.event("start", "", attempt=1)
    folder.event("resume", "", attempt=2, step=10, saved_at=20.0)
    attempt(folder, 2, [("provision", 100, 104), ("train", 104, 110)])
    assert seconds_of(folder) == {"provision": 9, "train": 21, "lost": 20}
    lost = by_phase(folder)["lost"]
    assert lost.usd == pytest.approx(0.02)
    total = [part.usd for part in by_phase(folder).values()]
    assert sum(total) == pytest.approx(spent(folder).usd)
    assert sum(p.seconds for p in by_phase(folder).values()) == pytest.approx(50)


def test_what_is_lost_again_and_again(folder: RunFolder) -> None:
    attempt(folder, 1, [("train", 0, 30)])
    folder.event("resume", "", attempt=2, step=10, saved_at=20.0)
    attempt(folder, 2, [("train", 100, 130)])  # killed before it saved anything
    folder.event("resume", "", attempt=3, step=10, saved_at=20.0)
    attempt(folder, 3, [("train", 200, 230)])
    folder.event("resume", "", attempt=4, step=30, saved_at=215.0)
    attempt(folder, 4, [("train", 300, 310)])
    assert seconds_of(folder) == {"train": 20 + 15 + 10, "lost": 10 + 30 + 15}


def test_nothing_is_lost_without_a_resume(folder: RunFolder) -> None:
    assert by_phase(folder) == {}
    assert spent(folder) == Spent(0, 0)
    attempt(folder, 1, [("train", 0, 30)])
    assert seconds_of(folder) == {"train": 30}


@pytest.mark.xfail(strict=True, reason="only resumes are looked at, not starts from the beginning")
def test_an_attempt_killed_before_its_first_save_is_lost(folder: RunFolder) -> None:
    folder.event("start", "", attempt=1)
    attempt(folder, 1, [("provision", 0, 5), ("train", 5, 30)])
    folder.event("start", "", attempt=2)
    attempt(folder, 2, [("provision", 100, 105), ("train", 105, 135)])
    assert seconds_of(folder)["train"] == 30
    assert seconds_of(folder)["lost"] >= 25

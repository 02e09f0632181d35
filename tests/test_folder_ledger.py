"""The run folder under kills and full disks, and the meter that charges every second once."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuppence import folder as folder_module
from tuppence import ledger
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder, RunLock
from tuppence.ledger import Meter, by_phase, spent


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path)
    yield made
    made.close()


# ---------------------------------------------------------------- lines


def test_a_torn_last_line_is_passed_over_and_cut_off(folder: RunFolder) -> None:
    folder.append("metrics", {"step": 1})
    folder.append("metrics", {"step": 2})
    whole = folder.file("metrics.jsonl").read_bytes()
    for length in range(len(b'{"step": 1}\n'), len(whole)):  # killed at any byte of the second
        folder.close()
        folder.file("metrics.jsonl").write_bytes(whole[:length])
        assert list(folder.rows("metrics")) == [{"step": 1}]
        folder.append("metrics", {"step": 3})
        assert list(folder.rows("metrics")) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("damaged", [b'{"st', b'{"step\xff": 2}'])
def test_a_damaged_line_is_named(folder: RunFolder, damaged: bytes) -> None:
    folder.file("evals.jsonl").write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(Fault, match=r"evals\.jsonl line 2 is damaged"):
        list(folder.rows("evals"))


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


# what was resumed from, in which order steps were taken, and what of it counts
RESUMES = {
    "once": ({1: 0, 2: 1}, [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)], [(1, 1), (2, 2), (3, 2)]),
    "the money ended": (
        {1: 0, 2: 2},
        [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2)],
        [(1, 1), (2, 1), (3, 2)],
    ),
    "twice": ({1: 0, 2: 3, 3: 1}, [(1, 1), (3, 1), (4, 2), (5, 2), (2, 3)], [(1, 1), (2, 3)]),
    "begun anew": ({1: 0, 2: 0}, [(1, 1), (2, 1), (1, 2)], [(1, 2)]),
}


@pytest.mark.parametrize(("resumes", "taken", "count"), RESUMES.values(), ids=RESUMES)
def test_the_rows_that_count(folder: RunFolder, resumes: Any, taken: Any, count: Any) -> None:
    for attempt, step in resumes.items():
        folder.event("resume" if step else "start", "", attempt=attempt, step=step)
    for step, attempt in taken:
        folder.append("metrics", {"step": step, "attempt": attempt})
    found = [(row["step"], row["attempt"]) for row in folder.latest("metrics")]
    assert found == count


def test_what_is_no_number_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        folder.append("evals", {"loss": float("nan")})
    assert list(folder.rows("evals")) == []
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("receipt.json", {"usd": float("inf")})
    assert folder.read_json("receipt.json") is None


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


@pytest.mark.parametrize("text", ['{"version": 1, ', '{"version": 1}', "[]"])
def test_a_damaged_document_is_named(folder: RunFolder, text: str) -> None:
    with pytest.raises(UserError, match=r"no plan\.json yet"):
        folder.plan()
    folder.file("plan.json").write_text(text)
    with pytest.raises(Fault, match=r"plan\.json is damaged: "):
        folder.plan()


# ---------------------------------------------------------------- lock


def take(folder: RunFolder) -> subprocess.Popen[str]:
    """Another process that takes the lock, says so, and holds it until it is killed or read out."""
    program = (
        "import sys; from pathlib import Path; from tuppence.folder import RunFolder, RunLock\n"
        "with RunLock(RunFolder(Path(sys.argv[1]))): print('taken', flush=True); sys.stdin.read()"
    )
    words, pipe = [sys.executable, "-c", program, str(folder.path)], subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_one_process_at_a_time_writes_a_run_folder(folder: RunFolder) -> None:
    with take(folder) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        lock = RunLock(folder)
        with pytest.raises(UserError, match="another process is writing"):
            lock.__enter__()
        assert lock.handle is not None
        assert lock.handle.closed  # what was not taken is not held
        holder.kill()  # the lock vanishes with its process, however it ends
    with RunLock(folder), take(folder) as other:
        out, err = other.communicate()
        assert out == ""
        assert f"UserError: another process is writing {folder.path}" in err
    with take(folder) as other:
        assert other.communicate()[0] == "taken\n"


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


def begin(folder: RunFolder, *, attempt: int, start: float) -> Meter:
    """A meter at 3.60 an hour: a tenth of a cent each second."""
    return Meter(folder, usd_per_hour=3.6, attempt=attempt, start=start)


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
    with contextlib.suppress(Fault), meter.phase("save"):
        clock.at += 3
        raise Fault("disk full")
    clock.at += 7
    assert meter.seconds() == pytest.approx(37)
    assert meter.usd() == pytest.approx(0.037)
    assert meter.seconds_left(usd=0.05, hours=None) == pytest.approx(13)
    assert meter.seconds_left(usd=0.05, hours=40 / 3600) == pytest.approx(3)
    assert meter.seconds_left(usd=None, hours=None) == float("inf")
    meter.close(allowance=0.5)
    found = {"provision": 7, "prepare": 3, "train": 17, "evaluate": 6, "save": 1 + 3 + 0.5}
    assert seconds_of(folder) == found
    assert spent(folder).seconds == pytest.approx(37.5)
    assert spent(folder).usd == pytest.approx(0.0375)
    assert not folder.file("heartbeat.json").exists()
    rows = list(folder.rows("ledger"))
    keys = {"start", "end", "phase", "node", "usd_per_hour", "usd", "attempt"}
    assert all(row.keys() == keys for row in rows)
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(rows))


def test_a_killed_attempt_is_charged_to_its_last_heartbeat(folder: RunFolder, clock: Time) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    clock.at += 5
    meter.switch("train")
    for _ in range(40):
        clock.at += 0.5
        meter.beat()
    clock.at += 0.9  # killed here: no close, and this much nobody saw
    beat = folder.file("heartbeat.json").read_text()
    clock.at += 1000  # no machine was held: not charged
    for _ in range(2):  # also where the next attempt dies between charging it and removing it
        folder.close()
        folder.file("heartbeat.json").write_text(beat)
        second = begin(folder, attempt=2, start=clock.at - 3)
        assert spent(folder).seconds == pytest.approx(25)
        assert second.seconds() == pytest.approx(28)
        assert second.usd() == pytest.approx(0.028)
    clock.at += 2
    second.close()
    assert seconds_of(folder) == {"provision": 10, "train": 20}
    assert [row["attempt"] for row in folder.rows("ledger")] == [1, 1, 2]


@pytest.mark.parametrize("back", [5.0, 0.4])  # a clock set back; a start within the allowance
def test_attempts_do_not_overlap(folder: RunFolder, clock: Time, back: float) -> None:
    meter = begin(folder, attempt=1, start=1e7)
    clock.at += 10
    meter.close(allowance=0.5)
    folder.close()
    clock.at += 0.5 - back
    second = begin(folder, attempt=2, start=clock.at)
    second.switch("train")
    clock.at += back + 3
    second.close()
    assert spent(folder).seconds == pytest.approx(13.5)


def test_a_heartbeat_lost_in_a_power_cut_does_not_stop_the_run(
    folder: RunFolder, clock: Time
) -> None:
    folder.file("heartbeat.json").write_text("")
    assert begin(folder, attempt=2, start=1e7).seconds() == 0
    assert [event["code"] for event in folder.rows("events")] == ["heartbeat_damaged"]


# ---------------------------------------------------------------- lost


def attempt(folder: RunFolder, number: int, phases: list[tuple[str, float, float]]) -> None:
    for phase, start, end in phases:
        row: dict[str, Any] = {"start": start, "end": end, "phase": phase, "node": "here"}
        row |= {"usd_per_hour": 3.6, "usd": (end - start) * 1e-3, "attempt": number}
        folder.append("ledger", row)


def test_work_after_the_save_that_was_resumed_is_lost(folder: RunFolder) -> None:
    assert by_phase(folder) == {}
    attempt(folder, 1, [("provision", 0, 5), ("train", 5, 30), ("save", 30, 31)])
    assert seconds_of(folder) == {"provision": 5, "train": 25, "save": 1}
    folder.event("start", "", attempt=1, step=0)
    folder.event("resume", "", attempt=2, step=10, saved_at=20.0)
    attempt(folder, 2, [("train", 100, 130)])  # killed before it saved anything
    assert seconds_of(folder) == {"provision": 5, "train": 15 + 30, "lost": 10, "save": 1}
    folder.event("resume", "", attempt=3, step=10, saved_at=20.0)
    attempt(folder, 3, [("train", 200, 220), ("evaluate", 220, 230)])
    folder.event("resume", "", attempt=4, step=30, saved_at=215.0)
    attempt(folder, 4, [("train", 300, 310)])
    found = {"provision": 5, "train": 15 + 15 + 10, "lost": 10 + 30 + 15, "save": 1}
    assert seconds_of(folder) == found
    by = by_phase(folder)
    assert by["lost"].usd == pytest.approx(0.055)
    assert sum(part.usd for part in by.values()) == pytest.approx(spent(folder).usd)


def test_an_attempt_killed_before_its_first_save_is_lost(folder: RunFolder) -> None:
    folder.event("start", "", attempt=1, step=0)
    attempt(folder, 1, [("provision", 0, 5), ("train", 5, 30), ("save", 30, 31)])
    folder.event("start", "", attempt=2, step=0)
    attempt(folder, 2, [("provision", 100, 105), ("train", 105, 135)])
    assert seconds_of(folder) == {"provision": 10, "lost": 25, "save": 1, "train": 30}


def test_what_a_run_went_back_from_is_lost(folder: RunFolder) -> None:
    folder.event("start", "", attempt=1, step=0)
    attempt(folder, 1, [("train", 0, 40), ("evaluate", 40, 50), ("train", 50, 60)])
    back = {"code": "early_stop", "message": "", "attempt": 1, "back_to": 3, "usd": 0.06}
    folder.append("events", {"time": 60.0, "saved_at": 30.0, **back})
    attempt(folder, 1, [("train", 60, 70)])
    assert seconds_of(folder) == {"train": 30 + 10, "lost": 30}
    folder.event("resume", "", attempt=2, step=5, saved_at=55.0)  # killed: both say it of 55 to 60
    assert seconds_of(folder) == {"train": 30, "lost": 40}

"""status, logs, stop and guard over a SkyPilot that says what the test wants."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_sky import FakeSky, cluster, cost, error, job
from test_launch_standing import LAUNCH

from tuppence import guarding
from tuppence.cli import main
from tuppence.cloud import ending, noted
from tuppence.cloud import record as records
from tuppence.cloud.record import Job, Record
from tuppence.cloud.sky import Sky
from tuppence.folder import RunFolder

Document = dict[str, Any]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for clouds here."""
    monkeypatch.setattr(ending, "ASK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(guarding, "LEAST_SECONDS", 0.0)


@pytest.fixture
def fake(tmp_path: Path) -> FakeSky:
    return FakeSky(tmp_path)


def launched(tmp_path: Path, fake: FakeSky, **given: Any) -> Path:
    """A launch that runs; its store is a folder."""
    launch = replace(LAUNCH, store=str(tmp_path / "store"), **given.pop("launch", {}))
    began = time.time() - 60
    record = Record(1, "sky", "started", launch, began, str(fake.python))
    record = replace(record, **{"jobs": (Job("tiny-abc123", 1, began),), **given})
    records.write(tmp_path / "runs" / launch.name, record)
    return tmp_path / "runs" / launch.name


def ran(tmp_path: Path, *, usd: float, ago: float = 5.0, ended: str | None = None) -> None:
    """The run's own folder on the store, whose ledger says so."""
    folder = RunFolder(tmp_path / "store" / "runs" / "tiny")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.file("ledger.jsonl").unlink(missing_ok=True)
    from tuppence import config, recipes

    folder.file("run.json").write_text(config.to_json(recipes.get("shakespeare")))
    end, who = time.time() - ago, {"phase": "train", "node": "elsewhere", "attempt": 1}
    row = {"start": end - 100, "end": end, "usd_per_hour": 20.0, "usd": usd, **who}
    folder.append("ledger", row)
    if ended:
        folder.event(ended, "")
    else:
        beat = {**row, "start": end, "usd": 0.0, "pid": 1, "space": "other"}
        folder.write_json("heartbeat.json", beat)
    folder.close()


def running(**given: Any) -> Document:
    start = time.time() - 600
    return job(task_id=1, submitted_at=start, start_at=start, **given)


def call(tmp_path: Path, *words: str) -> int:
    return main([*words, "--runs", str(tmp_path / "runs")])


def asked_json(capsys: pytest.CaptureFixture[str]) -> Document:
    found: Document = json.loads(capsys.readouterr().out)
    return found


def notes(folder: Path) -> list[str]:
    return [row["code"] for row in noted.events(folder)]


GONE: Document = {
    "queue": {"jobs": [running(status="CANCELLED", end_at=time.time())]},
    "clusters": {"clusters": []},
}


# ---------------------------------------------------------------- status


def test_status_tells_cost_so_far_and_at_the_end(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake)
    ran(tmp_path, usd=15.0)
    up = cost(usd=12.0, intervals=[[time.time() - 600, None]])
    fake.says("queue", {"jobs": [running(recoveries=1)]})
    fake.says("clusters", {"clusters": [cluster()]})
    fake.says("costs", {"clusters": [up]})
    assert call(tmp_path, "status", "tiny", "--json") == 0
    (found,) = asked_json(capsys)["launches"]
    assert (found["state"], found["stage"], found["recoveries"]) == ("running", "train", 1)
    train = found["stages"][1]
    assert train["metered_usd"] == 12.0
    assert 15.0 < train["inside_usd"] < 16.0  # and the seconds since the ledger's last word
    assert found["usd"] == train["inside_usd"]
    assert found["inside"]["usd"] == 15.0
    assert found["storage"]["bytes"] > 0
    assert call(tmp_path, "status", "tiny") == 0
    assert "running, train on aws p4d.24xlarge A100:8" in capsys.readouterr().out
    assert call(tmp_path, "status") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_status_without_an_answer_shows_what_was_seen_last(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake)
    fake.says("queue", {"jobs": [running()]})
    fake.says("costs", {"clusters": [cost(usd=7.5)]})
    assert call(tmp_path, "status") == 0
    assert "$7.50 so far" in capsys.readouterr().out
    fake.says("look", error("away", "no network"))
    assert call(tmp_path, "status") == 0
    out = capsys.readouterr().out
    assert "$7.50 so far" in out
    assert "not of now: " in out
    assert "no network" in out


def test_status_asks_nobody_of_what_is_over_unless_it_is_named(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = launched(tmp_path, fake)
    fake.says("queue", {"jobs": [running(status="SUCCEEDED", end_at=time.time())]})
    assert call(tmp_path, "status") == 0
    found = records.read(folder)
    assert found is not None
    records.write(folder, replace(found, state="finished"))
    before = len(fake.asked("look"))
    assert call(tmp_path, "status") == 0
    assert len(fake.asked("look")) == before
    assert call(tmp_path, "status", "tiny") == 0
    assert len(fake.asked("look")) == before + 1
    assert "finished" in capsys.readouterr().out


def test_status_of_nothing_and_of_a_wrong_name(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "status") == 0
    assert "nothing was launched" in capsys.readouterr().out
    launched(tmp_path, fake)
    assert call(tmp_path, "status", "tinny") == 2
    assert "tiny" in capsys.readouterr().err


# ---------------------------------------------------------------- logs


def test_logs_are_of_the_stage_that_runs_or_that_is_named(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake)
    done = running(task="tiny-prepare", status="SUCCEEDED") | {"task_id": 0}
    fake.says("queue", {"jobs": [done, running()]})
    fake.says("logs", {"_text": "step 7\n"})
    assert call(tmp_path, "logs", "tiny", "--tail", "5") == 0
    assert capsys.readouterr().out == "step 7\n"
    assert call(tmp_path, "logs", "tiny", "--stage", "prepare") == 0
    first, second = fake.asked("logs")
    assert (first["task"], first["tail"], first["ended"]) == (1, 5, False)
    assert (second["task"], second["ended"]) == (0, True)  # SkyPilot itself would wait for the end


def test_logs_of_a_job_of_one_task(tmp_path: Path, fake: FakeSky) -> None:
    launched(tmp_path, fake)
    fake.says("queue", {"jobs": [running(task="tiny-abc123")]})
    assert call(tmp_path, "logs", "tiny", "--stage", "train") == 0
    assert len(fake.asked("logs")) == 1


@pytest.mark.parametrize(
    ("row", "words", "told"),
    [
        ({}, ("--stage", "eval"), "has prepare, train"),
        ({}, ("--stage", "prepare"), "prepare of tiny has not begun"),
        ({}, ("--tail", "0"), "--tail 0"),
        ({"status": "RECOVERING"}, (), "--follow waits for it"),
    ],
)
def test_logs_that_cannot_be_shown_are_refused_in_one_line(
    tmp_path: Path,
    fake: FakeSky,
    capsys: pytest.CaptureFixture[str],
    row: Document,
    words: tuple[str, ...],
    told: str,
) -> None:
    launched(tmp_path, fake)
    fake.says("queue", {"jobs": [running(**row)]})
    assert call(tmp_path, "logs", "tiny", *words) == 2
    assert told in capsys.readouterr().err
    assert fake.asked("logs") == []


# ---------------------------------------------------------------- stop


def test_stop_cancels_waits_until_nothing_is_there_and_says_what_storage_costs(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = launched(tmp_path, fake)
    ran(tmp_path, usd=1.0)
    fake.says("queue", {"jobs": [running(status="CANCELLING")]}, GONE["queue"])
    fake.says("clusters", {"clusters": [cluster()]}, {"clusters": []})
    fake.says("cancel", {"requests": 0, "jobs": [1]}, {"requests": 0, "jobs": []})
    assert call(tmp_path, "stop", "tiny", "--yes") == 0
    err = capsys.readouterr().err
    assert "cancelled tiny-abc123" in err
    assert "nothing is left running" in err
    assert "tuppence stop tiny --bucket" in err
    assert fake.asked("cancel")[0] == {"name": "tiny-abc123"}
    assert fake.asked("look")[-1]["refresh"]  # the clouds themselves say that nothing is there
    assert fake.asked("down") == []  # SkyPilot does that for a job that is cancelled
    found = records.read(folder)
    assert found is not None
    assert found.state == "stopped"
    assert call(tmp_path, "stop", "tiny", "--yes") == 0  # again


def test_stop_takes_down_a_machine_whose_job_is_over(tmp_path: Path, fake: FakeSky) -> None:
    folder = launched(tmp_path, fake)
    long_ago = running(status="SUCCEEDED", end_at=time.time() - 300)
    fake.says("queue", {"jobs": [long_ago]})
    fake.says("clusters", {"clusters": [cluster()]})
    fake.says("down", {"down": True, "_then": {"clusters": {"clusters": []}}})
    assert call(tmp_path, "stop", "tiny", "--yes") == 0
    assert fake.asked("down") == [{"cluster": "tiny-train-1"}]
    found = records.read(folder)
    assert found is not None
    assert found.state == "finished"


def test_stop_of_a_half_launched_one_finds_it_by_its_name(tmp_path: Path, fake: FakeSky) -> None:
    """Its launcher was killed: SkyPilot had the request, and makes the job a moment later."""
    launched(tmp_path, fake, jobs=(Job("tiny-abc123", None, time.time()),), state="planned")
    fake.says("cancel", {"requests": 1, "jobs": []}, {"requests": 0, "jobs": [1]})
    fake.says("queue", {"jobs": [job(status="PENDING")]}, GONE["queue"])
    assert call(tmp_path, "stop", "tiny", "--yes") == 0
    assert fake.asked("cancel") == [{"name": "tiny-abc123"}] * 2


def test_stop_of_a_launch_that_asked_for_nothing_asks_nobody(tmp_path: Path, fake: FakeSky) -> None:
    folder = launched(tmp_path, fake, jobs=(), state="planned")
    assert call(tmp_path, "stop", "tiny", "--yes") == 0
    assert fake.asked() == []
    found = records.read(folder)
    assert found is not None
    assert found.state == "stopped"


def test_what_stop_cannot_end_is_a_fault_that_names_it(
    tmp_path: Path,
    fake: FakeSky,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = launched(tmp_path, fake)
    monkeypatch.setattr(ending, "STOP_SECONDS", 0.0)
    fake.says("queue", {"jobs": [running(status="CANCELLING")]})
    fake.says("clusters", {"clusters": [cluster()]})
    assert call(tmp_path, "stop", "tiny", "--yes") == 1
    err = capsys.readouterr().err
    assert "still there: job tiny-abc123 (CANCELLING), machine tiny-train-1" in err
    assert "sky down tiny-train-1" in err
    found = records.read(folder)
    assert found is not None
    assert found.state == "started"


def test_stop_without_an_answer_is_no_success(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = launched(tmp_path, fake)
    fake.says("cancel", error("away", "no network"))
    assert call(tmp_path, "stop", "tiny", "--yes") == 1
    assert "no network" in capsys.readouterr().err
    found = records.read(folder)
    assert found is not None
    assert found.state == "started"


def test_stop_bucket_deletes_what_the_launch_made_and_must_be_told_twice(
    tmp_path: Path, fake: FakeSky, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    launched(tmp_path, fake, made=(f"{store}/runs/tiny",))
    ran(tmp_path, usd=1.0)
    (store / "data").mkdir()
    (store / "data" / "shard.bin").write_bytes(b"x")
    fake.says("queue", GONE["queue"])
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody sits there
    assert call(tmp_path, "stop", "tiny", "--bucket") == 2
    assert "add --yes" in capsys.readouterr().err
    assert fake.asked() == []
    assert call(tmp_path, "stop", "tiny", "--bucket", "--yes") == 0
    assert not list((store / "runs").rglob("*.json*"))
    assert (store / "data" / "shard.bin").exists()


def test_skypilot_s_own_machine_is_told_of(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake)
    own = cluster("sky-jobs-controller-ab12", usd_per_hour=0.2, managed=False)
    fake.says("queue", GONE["queue"])
    fake.says("clusters", {"clusters": [own]})
    assert call(tmp_path, "stop", "tiny", "--yes") == 0
    assert "sky-jobs-controller-ab12" in capsys.readouterr().err
    assert fake.asked("down") == []


# ---------------------------------------------------------------- guard


def spent(tmp_path: Path, fake: FakeSky) -> None:
    """A trainer that was silent for ten minutes at $20 an hour, $1 below its budget."""
    ran(tmp_path, usd=39.0, ago=600.0)
    up = cost(usd=20.0, intervals=[[time.time() - 3600, None]])
    fake.says("queue", {"jobs": [running()]})
    fake.says("clusters", {"clusters": [cluster()]})
    fake.says("costs", {"clusters": [up]})
    fake.says("cancel", {"requests": 0, "jobs": [1], "_then": GONE})


def test_guard_cancels_what_has_spent_its_money(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = launched(tmp_path, fake)
    spent(tmp_path, fake)
    assert call(tmp_path, "guard", "tiny", "--every", "0") == 0
    assert fake.asked("cancel") == [{"name": "tiny-abc123"}]
    assert notes(folder) == ["near", "spent", "stopped"]
    err = capsys.readouterr().err
    assert "cancelled" in err
    last = noted.events(folder)[1]
    assert last["usd"] > 42.0


def test_a_cancel_that_was_not_heard_is_asked_for_again(tmp_path: Path, fake: FakeSky) -> None:
    folder = launched(tmp_path, fake)
    spent(tmp_path, fake)
    heard = {"requests": 0, "jobs": [1], "_then": GONE}
    fake.says("cancel", error("away", "no network"), heard)
    assert call(tmp_path, "guard", "tiny", "--every", "0") == 0
    assert len(fake.asked("cancel")) == 2
    assert notes(folder) == ["near", "away", "back", "spent", "stopped"]


def test_a_full_disk_does_not_keep_guard_from_cancelling(
    tmp_path: Path,
    fake: FakeSky,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    launched(tmp_path, fake)
    spent(tmp_path, fake)
    monkeypatch.setattr(noted, "note", full)
    monkeypatch.setattr(guarding, "write_text", full)
    assert call(tmp_path, "guard", "tiny", "--every", "0") == 0
    assert fake.asked("cancel") == [{"name": "tiny-abc123"}]
    err = capsys.readouterr().err
    assert "guard.jsonl: No space left on device" in err
    assert "standing.json: No space left on device" in err


def test_a_damaged_launch_keeps_nobody_from_the_others(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake)
    fake.says("queue", {"jobs": [running()]}, GONE["queue"])
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / records.FILE).write_text('{"version"')
    assert call(tmp_path, "guard", "--every", "0") == 0
    assert capsys.readouterr().err.count("torn/launch.json is passed over") == 1
    assert call(tmp_path, "status") == 0
    assert capsys.readouterr().out.startswith("tiny  stopped")


def test_guard_outlasts_a_network_that_is_down(tmp_path: Path, fake: FakeSky) -> None:
    folder = launched(tmp_path, fake)
    fake.says("queue", error("away", "a"), error("away", "b"), {"jobs": [running()]}, GONE["queue"])
    assert call(tmp_path, "guard", "tiny", "--every", "0") == 0
    assert notes(folder) == ["away", "back", "stopped"]


def test_guard_goes_on_where_another_one_left_off(tmp_path: Path, fake: FakeSky) -> None:
    folder = launched(tmp_path, fake)
    ran(tmp_path, usd=37.0)
    fake.says("queue", {"jobs": [running(recoveries=1)]})
    for _ in range(2):
        assert call(tmp_path, "guard", "tiny", "--once") == 0
    assert sorted(notes(folder)) == ["near", "recovery"]
    assert fake.asked("cancel") == []


def test_guard_takes_down_a_machine_that_was_left(tmp_path: Path, fake: FakeSky) -> None:
    folder = launched(tmp_path, fake)
    fake.says("queue", {"jobs": [running(status="SUCCEEDED", end_at=time.time() - 300)]})
    fake.says("clusters", {"clusters": [cluster()]})
    fake.says("down", {"down": True, "_then": {"clusters": {"clusters": []}}})
    assert call(tmp_path, "guard", "--every", "0") == 0
    assert fake.asked("down") == [{"cluster": "tiny-train-1"}]
    assert notes(folder) == ["finished", "left"]


def test_guard_of_all_leaves_out_what_is_over(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake, state="finished")
    assert call(tmp_path, "guard", "--once") == 0
    assert fake.asked() == []
    assert "there is nothing to guard" in capsys.readouterr().err


def test_guard_with_a_wrong_python_ends_at_once(
    tmp_path: Path, fake: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path, fake)
    fake.says("queue", error("login", "http://server"))
    assert call(tmp_path, "guard", "tiny", "--every", "0") == 2
    assert "sky api login" in capsys.readouterr().err


@pytest.mark.parametrize("every", ["-1", "4000"])
def test_guard_refuses_odd_pauses(tmp_path: Path, every: str) -> None:
    assert call(tmp_path, "guard", f"--every={every}") == 2


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        ("FAILED_NO_RESOURCE", "Failed to acquire", "no capacity for aws A100:8, lambda H100:8"),
        ("FAILED_NO_RESOURCE", "quota of 0 vCPUs", "ask the cloud for quota"),
        ("FAILED", "Job exited with exit code 124 (user", "the dead-man timer stopped it"),
        ("FAILED", "Job exited with exit code 3 (user", "it does not fit"),
    ],
)
def test_a_launch_that_failed_is_followed_to_its_end_and_says_why(
    tmp_path: Path, fake: FakeSky, status: str, said: str, told: str
) -> None:
    folder = launched(tmp_path, fake)
    failed = running(status=status, failure=said, end_at=time.time())
    fake.says("queue", {"jobs": [running()]}, {"jobs": [failed]})
    fake.says("clusters", {"clusters": [cluster()]}, {"clusters": [cluster()]}, {"clusters": []})
    lines: list[str] = []
    found = guarding.watch_launch(folder, Sky(fake.python), say=lines.append, every=0.0)
    assert found.state == "failed"
    assert told in found.failure
    assert not found.held  # it was followed until its machine was gone
    assert any(told in line for line in lines)
    assert guarding.end(folder, Sky(fake.python), say=lines.append, why="it is over") == []

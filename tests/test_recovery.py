"""Whole processes that are killed, signalled, starved of disk, or fed damaged files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, command
from gloo import start
from known import know_this_machine

from tuppence.config import DataPlan
from tuppence.plan.hardware import Calibration

REPOSITORY = Path(__file__).parents[1]
TINY = [
    "machine.usd_per_hour=1",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.sequence_len=32",
    "train.batch_tokens=256",
    "train.eval_tokens=2048",
    "train.sample_tokens=4",
    "train.save_every=10",
]
SMALLER = ["train.batch_tokens=512", "train.micro_batch=4", "train.eval_tokens=2048"]


@pytest.fixture(autouse=True)
def known(cache_home: Path, calibration: Calibration, data_plan: DataPlan) -> None:
    """No process measures the machine."""
    know_this_machine(calibration, data_plan, [["budget.steps=1", *TINY]])


def tuppence(*words: str, cwd: Path) -> Forked:
    """Start one command in `cwd`, its cache the test's own."""
    return Forked(command, words, cwd=cwd)


def finished(process: Forked) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.wait(), out, err


def one_line(err: str) -> str:
    """The line for the person; anything but one is a fault of ours."""
    lines = [line for line in err.splitlines() if line.startswith("tuppence: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def wait_for_step(run: Path, step: int, process: Forked) -> None:
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"it ended before step {step}: {process.communicate()}")


class Tree:
    """The bench's command and the processes under it, forked."""

    def __init__(self, site: Any) -> None:
        logs = site.place / "logs"
        self.started = start(site.config.ranks, command, site.words, folder=logs)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.started.processes)

    def ranks(self) -> list[int]:
        return sorted(process.pid or 0 for process in self.started.processes if process.is_alive())

    def wait(self) -> int:
        return max(abs(code) for code in self.started.codes() if code is not None)

    def kill(self) -> None:
        for process in self.started.processes:  # at once
            process.kill()
        self.started.end()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again_it_is_the_same_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calibration: Calibration,
    data_plan: DataPlan,
    ranks: int,
) -> None:
    """As the bench does it, which compares every loss, every token hash, evaluations and final
    weights, and kills under torchrun."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    import reliability
    import sites
    from sites import Config, Site

    monkeypatch.setattr(sites, "WORDS", [*sites.WORDS, *SMALLER])
    monkeypatch.setattr(Site, "start", lambda site: Tree(site))
    monkeypatch.setattr(reliability, "START_SECONDS", 0.2)  # a forked one is soon under way
    monkeypatch.setattr(reliability, "machine", lambda: "here")
    config, args = Config("depth", ranks, "none"), Namespace(seed=0, steps=60)
    args.out = tmp_path / "out.jsonl"
    know_this_machine(calibration, data_plan, [config.words(60)[1:]], ranks=(ranks,))
    reliability.share(tmp_path, config, 3, args)
    assert reliability.table(reliability._lines(args.out)) == 0
    out = capsys.readouterr().out
    assert "3 of 3 `kill -9`" in out


def test_sigint_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = ["run", "budget.steps=4000", "name=x", *TINY]
    process = tuppence(*words, cwd=tmp_path)
    wait_for_step(tmp_path / "runs/x", 20, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130
    saved = json.loads((tmp_path / "runs/x/checkpoints/last.json").read_text())["step"]
    assert f"SIGINT: saved at step {saved}; the same command continues" in err
    assert saved == len((tmp_path / "runs/x/metrics.jsonl").read_text().splitlines())
    assert not (tmp_path / "runs/x/heartbeat.json").exists()  # the meter stands
    process = tuppence(*words, cwd=tmp_path)
    wait_for_step(tmp_path / "runs/x", saved + 5, process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 143
    assert f"resuming from step {saved} (attempt 2)" in err


def test_full_disk_stops_with_one_line_and_goes_on_after(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8)
    words = ["run", "budget.steps=60", "name=x", *TINY, "train.eval_every=20"]
    code, _, _ = finished(tuppence("prepare", *words[1:], cwd=disk))
    assert code == 0
    room = os.statvfs(disk)
    with (disk / "ballast").open("wb") as ballast:  # leave too little for three checkpoints
        ballast.write(b"\0" * (room.f_bavail * room.f_bsize - 400_000))
    code, _, err = finished(tuppence(*words, cwd=disk))
    assert code == 1, err
    line = one_line(err)
    assert "No space left on device" in line
    assert "the same command" in line
    saved = json.loads((disk / "runs/x/checkpoints/last.json").read_text())
    assert saved["step"] >= 10
    (disk / "ballast").unlink()
    code, out, err = finished(tuppence(*words, "--json", cwd=disk))
    assert code == 0, err
    assert f"resuming from step {saved['step']}" in err
    assert json.loads(out)["budget"]["fraction"] == 1.0


def test_read_only_run_folder_is_one_line(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8)
    words = ["run", "budget.steps=20", "name=x", *TINY]
    assert finished(tuppence("prepare", *words[1:], cwd=disk))[0] == 0
    (disk / "runs/x").mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        code, _, err = finished(tuppence(*words, cwd=disk))
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert code == 1
    assert "Read-only file system" in one_line(err)


def test_truncated_shard_is_one_line(tmp_path: Path) -> None:
    words = ["budget.steps=5", "name=x", *TINY]
    code, out, _ = finished(tuppence("prepare", *words, "--json", cwd=tmp_path))
    assert code == 0
    folder = tmp_path / json.loads(out)["folder"]
    shard = next(folder.glob("*train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, _, err = finished(tuppence("run", *words, cwd=tmp_path))
    assert code == 1
    assert shard.name in one_line(err)


def test_flipped_byte_in_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    words = ["run", "budget.steps=5", "name=x", *TINY]
    assert finished(tuppence(*words, cwd=tmp_path))[0] == 0
    weights = next((tmp_path / "runs/x/checkpoints").glob("step_*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0x10
    weights.write_bytes(content)
    for verb in ("eval", "sample"):
        code, _, err = finished(tuppence(verb, "x", cwd=tmp_path))
        assert code == 1
        assert "model.safetensors does not match its sha256" in one_line(err)

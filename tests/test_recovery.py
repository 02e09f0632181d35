"""Whole processes that are killed, signalled, starved of disk, or fed damaged files."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def tuppence(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Start one command in `cwd`, its cache the test's own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuppence", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def one_line(err: str) -> str:
    """The line for the person; anything but one is a fault of ours."""
    lines = [line for line in err.splitlines() if line.startswith("tuppence: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"it ended before step {step}: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_killed_again_and_again_it_is_the_same_run(tmp_path: Path, ranks: str) -> None:
    """The bench compares every loss, every token hash, evaluations and final weights."""
    kind = ["--ranks", ranks, "--families", "depth", "--steps", "100"]
    command = ["bench/reliability.py", "--kills", "3", *kind, "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 `kill -9`" in done.stdout


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


def test_full_disk_stops_with_one_line_and_goes_on_after(small_disk: Path) -> None:
    words = ["run", "budget.steps=60", "name=x", *TINY, "train.eval_every=20"]
    code, _, _ = finished(tuppence("prepare", *words[1:], cwd=small_disk))
    assert code == 0
    room = os.statvfs(small_disk)
    with (small_disk / "ballast").open("wb") as ballast:  # leave too little for three checkpoints
        ballast.write(b"\0" * (room.f_bavail * room.f_bsize - 400_000))
    code, _, err = finished(tuppence(*words, cwd=small_disk))
    assert code == 1, err
    line = one_line(err)
    assert "No space left on device" in line
    assert "run the same command" in line
    saved = json.loads((small_disk / "runs/x/checkpoints/last.json").read_text())
    assert saved["step"] >= 10
    (small_disk / "ballast").unlink()
    code, out, err = finished(tuppence(*words, "--json", cwd=small_disk))
    assert code == 0, err
    assert f"resuming from step {saved['step']}" in err
    assert json.loads(out)["budget"]["fraction"] == 1.0


def test_read_only_run_folder_is_one_line(small_disk: Path) -> None:
    words = ["run", "budget.steps=20", "name=x", *TINY]
    assert finished(tuppence("prepare", *words[1:], cwd=small_disk))[0] == 0
    (small_disk / "runs/x").mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        code, _, err = finished(tuppence(*words, cwd=small_disk))
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert code == 1
    assert "Read-only file system" in one_line(err)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


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

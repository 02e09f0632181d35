"""Two nodes, each a network namespace with its own torchrun agent: one is cut off the other."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from known import know_this_machine

from tuppence.config import DataPlan
from tuppence.plan.hardware import Calibration

CAN = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(not CAN, reason="network namespaces need root and Debian's iproute2"),
]
ADDRESS = {"a": "10.77.31.1", "b": "10.77.31.2"}
WORDS = [
    *("train", "shakespeare", "name=two", "budget.steps=200", "machine.usd_per_hour=1"),
    *("model.depth=none", "model.n_head=2", "model.n_layer=2", "model.n_embd=32"),
    *("model.sequence_len=32", "train.batch_tokens=512", "train.precision=fp32"),
    *("train.attention=sdpa", "machine.threads=1", "train.save_every=10", "train.eval_every=200"),
    *("train.eval_tokens=2048", "train.sample_tokens=0", "train.stall_seconds=4"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Two namespaces with a cable between them: {"a": name, "b": name}."""
    names = {key: f"tuppence-{key}{os.getpid()}" for key in ADDRESS}
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", f"va{os.getpid()}", "type", "veth", "peer", "name", f"vb{os.getpid()}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        for key, name in names.items():
            cable = f"v{key}{os.getpid()}"
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{ADDRESS[key]}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            found = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for pid in found.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False)
            ip("netns", "del", name)


def agent(key: str, node: str, place: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A node's torchrun; it goes on with one node where the other is gone."""
    cable = f"v{key}{os.getpid()}"
    env = {**os.environ, "GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"}
    conf = f"is_host={int(key == 'a')},last_call_timeout=6,join_timeout=120,keep_alive_interval=1"
    words = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint={ADDRESS['a']}:29431", f"--rdzv-conf={conf}"]
    words += ["--rdzv-id=two", f"--local-addr={ADDRESS[key]}", "-m", "tuppence", *WORDS]
    run = [sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.Popen(
        ["ip", "netns", "exec", node, *run],
        cwd=place,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def lines(path: Path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_node_that_is_cut_off_ends_in_a_clean_restart(
    nodes: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibration: Calibration,
    data_plan: DataPlan,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    know_this_machine(calibration, data_plan, [WORDS[2:]], ranks=(1, 2))
    run = tmp_path / "runs/two"
    with (tmp_path / "a.log").open("wb") as a, (tmp_path / "b.log").open("wb") as b:
        first = agent("a", nodes["a"], tmp_path, a)
        second = agent("b", nodes["b"], tmp_path, b)
        until = time.monotonic() + 180
        while len(lines(run / "metrics.jsonl")) < 30 and time.monotonic() < until:
            assert first.poll() is None, (tmp_path / "a.log").read_text()[-3000:]
            time.sleep(0.1)
        ip("-n", nodes["b"], "link", "set", f"vb{os.getpid()}", "down")
        try:
            code = first.wait(timeout=240)
        finally:
            for one in (first, second):
                one.kill()
                one.wait()
    told = (tmp_path / "a.log").read_text()
    assert code == 0, told[-3000:]
    events = lines(run / "events.jsonl")
    by_code = {event["code"]: event for event in events}
    assert by_code["preflight"]["ranks"] == 2  # alone there is none
    assert "rank 1" in by_code["stalled"]["message"]
    assert by_code["resume"]["attempt"] == 2
    assert by_code["resume"]["step"] % 10 == 0
    assert by_code["end"]["attempt"] == 2
    rows = lines(run / "metrics.jsonl")
    assert rows[-1]["step"] == 200
    again = {row["step"]: row["tokens_sha"] for row in rows if row["attempt"] == 1}
    repeated = [row for row in rows if row["attempt"] == 2 and row["step"] in again]
    assert all(row["tokens_sha"] == again[row["step"]] for row in repeated)
    assert rows[-1]["loss"] < rows[0]["loss"]

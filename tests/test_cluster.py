"""End to end, as a person does it: `tuppence launch` through the real SkyPilot onto a real Slurm.

The cluster is one node of this machine with pretended GPUs (tests/cluster, docs/launch_locally.md),
the store a folder on the disk that they share. Prices are high, so that seconds are dollars.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sky_env import sky_python
from slurm_cluster import USD_PER_HOUR, Cluster, Command, until, up

from tuppence import checkpoint
from tuppence.cloud.tasks import CLUSTER_TAIL_SECONDS
from tuppence.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.root]

STEPS = 1500
MODEL = (
    *("quickstart", "model.n_layer=2", "model.n_head=2", "model.n_embd=64"),
    *("train.precision=fp32", "train.attention=sdpa", "train.micro_batch=12"),
    *("train.save_every=50", "train.eval_every=500", "train.eval_tokens=2048"),
    *("train.sample_tokens=4", "train.early_stop=off", "machine.threads=1"),
)
CLUSTER = (
    *("machine.cloud=slurm", "machine.gpu=A100", "machine.gpu_count=1"),
    f"machine.usd_per_hour={USD_PER_HOUR:g}",
)
SECONDS = 400  # of a budget: the plan refuses what does not buy 360 s of boot and set-up
USD_PER_SECOND = USD_PER_HOUR / 3600


def how(cluster: Cluster) -> list[str]:
    """What every launch here says."""
    found = ["--store", str(cluster.store), "--python", sys.executable]
    return [*found, "--sky", str(cluster.sky), "--yes"]


def run_of(cluster: Cluster, name: str) -> RunFolder:
    """Where its machines write."""
    return RunFolder(cluster.store / "runs" / name)


def events(folder: RunFolder, code: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows("events") if row["code"] == code]


def until_saved(launch: Command, folder: RunFolder, least: int) -> None:
    """Until a checkpoint of that step or a later one is there, and the launch goes on."""

    def saved() -> bool:
        assert launch.process.poll() is None, launch.said()
        return any(row["step"] >= least for row in events(folder, "save"))

    until(saved, f"{folder.path.name} saved step {least}")


def spent(folder: RunFolder) -> float:
    return float(sum(row["usd"] for row in folder.rows("ledger")))


def last_weights(folder: RunFolder) -> str:
    last = checkpoint.pointer(folder, "last")
    assert last is not None
    assert last.step == STEPS
    return str(last.sha256)


def nothing_left(cluster: Cluster, name: str) -> None:
    """Neither in Slurm's queue nor on SkyPilot's meter; and the node runs nothing of it."""
    until(lambda: not cluster.queue(name), f"{name}: no allocation")
    until(lambda: all(closed(row) for row in cluster.costs(name)), f"{name}: no open meter")
    assert cluster.stage_processes(f"{name}.") == []


def closed(row: dict[str, Any]) -> bool:
    return all(end is not None for _, end in row["intervals"])


# ---------------------------------------------------------------- what is tried


def recovered(cluster: Cluster) -> None:
    """Prepared on one machine, trained on another that is killed: the next goes on from its
    checkpoint to the same weights, and what SkyPilot's meter says is what the ledger says."""
    words = [*MODEL, f"budget.steps={STEPS}", "name=recovered"]
    launch = cluster.start("launch", *words, *CLUSTER, *how(cluster), "--apart")
    folder = run_of(cluster, "recovered")
    until_saved(launch, folder, 200)
    (first,) = cluster.queue("recovered-train")
    cluster.on_node("scancel", first)
    said = launch.said()
    assert said.code == 0, said.err + said.out
    (resume,) = events(folder, "resume")
    assert resume["step"] >= 200
    assert "recovering" in said.err or "recovered, for the first time" in said.err
    assert "nothing is left running" in said.err + said.out
    nothing_left(cluster, "recovered")
    assert len(cluster.costs("recovered-prepare")) == 1
    meter = cluster.costs("recovered-train")
    assert len(meter) == 2  # the machine that was killed, and the one after it
    more = (spent(folder) - sum(row["usd"] for row in meter)) / USD_PER_SECOND
    # no second is charged twice, and the end in advance; SkyPilot takes its time to see an end
    assert -60 * len(meter) <= more <= CLUSTER_TAIL_SECONDS + 5, (meter, spent(folder))
    here = RunFolder(cluster.desk / "runs" / "recovered")
    assert here.file("receipt.html").exists()
    told = json.loads(here.file("receipt.json").read_text())
    assert told["usd"] == pytest.approx(spent(folder), abs=0.01)
    straight = cluster.run("train", *words, "--runs", "straight", "--data", "straight-data")
    assert straight.code == 0, straight.err
    assert last_weights(folder) == last_weights(RunFolder(cluster.desk / "straight/recovered"))


def budgeted(cluster: Cluster) -> None:
    """A budget in dollars ends it, with boot, set-up and its end charged."""
    usd = SECONDS * USD_PER_SECOND
    words = [*MODEL, f"budget.usd={usd:g}", "name=budgeted"]
    said = cluster.run("launch", *words, *CLUSTER, *how(cluster))
    assert said.code == 0, said.err + said.out
    folder = run_of(cluster, "budgeted")
    assert 0.97 <= spent(folder) / usd <= 1.0
    phases = {row["phase"] for row in folder.rows("ledger")}
    assert {"provision", "install", "train", "idle"} <= phases
    seen = cluster.run("status", "budgeted", "--json", "--sky", str(cluster.sky)).document
    (launch,) = seen["launches"]
    assert launch["state"] == "finished"
    assert [job["status"] for job in launch["jobs"]] == ["SUCCEEDED"]
    nothing_left(cluster, "budgeted")


def hung(cluster: Cluster) -> None:
    """A trainer that stands still is ended by the timer on its machine, and not tried again."""
    usd = SECONDS * USD_PER_SECOND
    words = [*MODEL, f"budget.usd={usd:g}", "name=hung"]
    launch = cluster.start("launch", *words, *CLUSTER, *how(cluster))
    folder = run_of(cluster, "hung")
    until_saved(launch, folder, 50)
    (trainer,) = cluster.stage_processes("hung.train.")
    os.kill(trainer, signal.SIGSTOP)
    said = launch.said()
    assert said.code == 1, said.err + said.out
    assert "exit code 124" in said.line
    assert "dead-man timer" in said.line
    assert events(folder, "resume") == []
    nothing_left(cluster, "hung")
    (machine,) = cluster.costs("hung")  # it was not recovered
    for bill in (machine["usd"], spent(folder)):  # the timer's way to KILL, the machine's way down
        assert usd <= bill <= usd + 120 * USD_PER_SECOND
    page = cluster.run("status", "hung", "--sky", str(cluster.sky))
    assert [line for line in page.out.splitlines() if "exit code 124" in line]
    guarded = cluster.run("guard", "hung", "--once", "--sky", str(cluster.sky))
    assert guarded.code == 0, guarded.err


def stopped(cluster: Cluster) -> None:
    """Whoever followed it goes; it is looked at, read, and ended in the middle."""
    words = [*MODEL, "budget.steps=1000000", "name=stopped"]
    launch = cluster.start("launch", *words, *CLUSTER, *how(cluster))
    folder = run_of(cluster, "stopped")
    until_saved(launch, folder, 50)
    os.kill(launch.process.pid, signal.SIGINT)
    left = launch.said()
    assert left.code == 0, left.err
    assert "goes on, and costs money" in left.err + left.out
    sky = ("--sky", str(cluster.sky))

    def runs() -> Any:  # SkyPilot may not have noticed yet
        (seen,) = cluster.run("status", "stopped", "--json", *sky).document["launches"]
        return seen if seen["state"] == "running" else None

    seen = until(runs, "stopped: its status is running")
    assert seen["inside"]["step"] > 0
    (stage,) = seen["stages"]
    assert stage["state"] == "running"
    metered = sum(row["usd"] for row in cluster.costs("stopped"))
    assert seen["usd"] == pytest.approx(metered, abs=120 * USD_PER_SECOND)
    logs = cluster.run("logs", "stopped", "--tail", "200", *sky)
    assert "tok/s" in logs.out + logs.err
    ended = cluster.run("stop", "stopped", "--yes", *sky)
    assert ended.code == 0, ended.err
    assert "nothing is left running" in ended.err + ended.out
    assert "GB of it stay" in ended.err + ended.out
    nothing_left(cluster, "stopped")
    (seen,) = cluster.run("status", "stopped", "--json", *sky).document["launches"]
    assert seen["state"] == "stopped"


def refused(cluster: Cluster) -> None:
    """What the cluster has not is said in one line, and nothing is left."""
    words = [*MODEL, f"budget.steps={STEPS}"]
    many = [*CLUSTER, "machine.gpu_count=16", f"machine.usd_per_hour={16 * USD_PER_HOUR:g}"]
    many += ["train.batch_tokens=1024", "train.micro_batch=1"]
    said = cluster.run("launch", *words, *many, *how(cluster), "name=many")
    assert said.code in (1, 3), said.err + said.out
    assert "no capacity" in said.line
    assert "A100:16" in said.line
    nothing_left(cluster, "many")
    odd = cluster.run("launch", *words, *CLUSTER, "machine.gpu=B999", *how(cluster), "name=odd")
    assert odd.code == 2
    assert "B999" in odd.line
    assert not (cluster.desk / "runs" / "odd").exists()
    nothing_left(cluster, "odd")


Tried = Callable[[Cluster], None]
TRIED: tuple[Tried, ...] = (recovered, hung, budgeted, stopped, refused)  # the longest first


@pytest.fixture(scope="module")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Tried], None]]:
    """How one of them went. Those that are asked for run at once."""
    sky = sky_python()
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [call.params.get("tried") for call in calls if call is not None]
    kept = os.environ.get("CLUSTER_FOLDER")  # what is built there stays for the next time
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cluster")
    desk = tmp_path_factory.mktemp("desk")
    with up(folder, desk, sky, keep=bool(kept)) as cluster, ThreadPoolExecutor(len(TRIED)) as pool:
        begun = {each: pool.submit(each, cluster) for each in TRIED if each in asked}
        try:
            yield lambda each: begun[each].result()
        finally:
            for each in begun.values():
                each.cancel()


@pytest.mark.parametrize("tried", TRIED, ids=lambda each: each.__name__)
def test_launched(tried: Tried, outcome: Callable[[Tried], None]) -> None:
    outcome(tried)

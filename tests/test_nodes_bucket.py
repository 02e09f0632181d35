"""Two nodes whose run lives on a bucket, with no disk in common: each has its own cache folder.

Nodes are processes of this machine that count as nodes (LOCAL_WORLD_SIZE=1). What is the lead's
alone is out of bounds for the other: opening a file there ends it.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_runs import harm_delete, harm_flip, objects, steps_on, store_at
from forked import fork
from gloo import Started, _free_port, command, poisoned, start
from known import know_this_machine

from tuppence import bucket, checkpoint
from tuppence.config import DataPlan
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.store import Store

pytest_plugins = ["bucket_places"]
STEPS = 24
TINY = [
    *("machine.usd_per_hour=0.4", "machine.threads=1", "model.depth=none", "model.n_head=2"),
    *("model.n_layer=2", "model.n_embd=32", "model.sequence_len=32", "train.batch_tokens=512"),
    *("train.precision=fp32", "train.attention=sdpa", "train.eval_tokens=2048"),
    *("train.sample_tokens=4", "train.save_every=5", "train.eval_every=12"),
]
WORDS = ["train", "shakespeare", f"budget.steps={STEPS}", *TINY, "name=x"]
HOWS = ("zero1", "ddp", "fsdp")


class Nodes:
    """Starts words on two nodes."""

    def __init__(self, home: Path, s3: str) -> None:
        self.home, self.url, self.runs = home, s3, s3.rpartition("/")[0]
        self.started, self.apart = 0, True

    def cache(self, node: int) -> Path:
        return self.home / f"cache{node}"

    def words(self, words: list[str]) -> list[str]:
        return [*words, "--runs", self.runs, "--data", str(self.home / "data")]

    def start(
        self,
        words: list[str],
        work: Any = command,
        *how: Any,
        each: int = 1,
        env: Mapping[str, str] | None = None,
    ) -> Started:
        """On `each` ranks of a node; `env` is the other node's alone."""
        self.started += 1
        both = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        both |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(2 * each)}
        both |= {"LOCAL_WORLD_SIZE": str(each)}
        logs = [self.home / f"log{self.started}.{rank}" for rank in range(2 * each)]
        processes = []
        for rank, log in enumerate(logs):
            node = rank // each
            log.write_bytes(b"")
            place = self.home / f"node{node}"
            place.mkdir(exist_ok=True)
            own = {**both, "RANK": str(rank), "LOCAL_RANK": str(rank % each)}
            own |= {"XDG_CACHE_HOME": str(self.cache(node))} | (dict(env or {}) if node else {})
            apart = str(self.cache(0)) if node and self.apart else None
            given = (alone, apart, work, self.words(words), *how)
            processes.append(fork((str(log), str(log)), own, str(place), *given))
        return Started(processes, logs)

    def ended(self, started: Started) -> None:
        codes = started.codes()
        assert set(codes) == {0}, "".join(map(started.said, range(len(codes))))

    def lose(self, *nodes: int) -> None:
        """The machines are gone: of their caches what is known of machines is left."""
        for node in nodes:
            shutil.rmtree(self.cache(node) / "tuppence/buckets", ignore_errors=True)

    @property
    def run(self) -> RunFolder:
        """The run, as the lead has it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.cache(0)))
            return RunFolder(bucket.local_root(self.runs) / "x")


def alone(apart: str | None, work: Any, words: list[str], *how: Any) -> int:
    """`work(words)` in a process that must open nothing below `apart`."""

    def see(event: str, args: tuple[Any, ...]) -> None:
        touched = event in ("open", "os.mkdir", "os.rename") and str(args[0])
        if touched and touched.startswith(str(apart)):
            os.write(2, f"opened {touched}\n".encode())
            os._exit(99)

    if apart is not None:
        sys.addaudithook(see)
    return int(work(words, *how))


def killed_sending(words: list[str], file: str, number: int) -> int:
    """The same, but inside the `number`-th send of such a file this process is killed."""
    send, count = Store.send, [0]

    def dying(self: Store, local: Path, name: str, digest: Any) -> None:
        count[0] += name.endswith(file)
        if name.endswith(file) and count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        send(self, local, name, digest)

    Store.send = dying  # type: ignore[method-assign]
    return command(words)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration, data_plan: DataPlan
) -> Path:
    home = tmp_path_factory.mktemp("home")
    for name in ("cache0", "cache1", "cache"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(home / name))
            know_this_machine(calibration, data_plan, [WORDS[2:]], ranks=(1, 2))
    return home


@pytest.fixture
def nodes(home: Path, s3: str) -> Nodes:
    made = Nodes(home, s3)
    made.lose(0, 1)
    return made


@pytest.fixture(scope="module")
def straight(home: Path) -> dict[str, RunFolder]:
    """The same on one node of two ranks, in a folder, never interrupted."""
    runs = {}
    for how in HOWS:
        place = home / f"straight {how}"
        words = [*WORDS, f"train.parallel={how}", "--data", str(home / "data")]
        env = {"XDG_CACHE_HOME": str(home / "cache")}
        started = start(2, command, words, folder=place, env=env)
        assert started.codes() == [0, 0], started.said(0) + started.said(1)
        runs[how] = RunFolder(place / "runs/x")
    return runs


def rows(run: RunFolder) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "tokens_sha")
    return [tuple(row[key] for key in keys) for row in run.latest("metrics")]


def weights(run: RunFolder, which: str = "last") -> dict[str, torch.Tensor]:
    return checkpoint.consolidated(checkpoint.choose(run, which))


def check_same(run: RunFolder, other: RunFolder) -> None:
    """Every loss and the weights, bit for bit."""
    assert rows(run) == rows(other)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def codes_of(run: RunFolder) -> list[str]:
    return [event["code"] for event in run.rows("events")]


def resumes(run: RunFolder) -> list[int]:
    return [event["step"] for event in run.rows("events") if event["code"] == "resume"]


def until(started: Started, nodes: Nodes, step: int) -> None:
    """Wait until this step's checkpoint is complete on the bucket."""
    deadline = time.monotonic() + 120
    while max(steps_on(nodes.url), default=0) < step and time.monotonic() < deadline:
        assert all(p.is_alive() for p in started.processes), started.said(0) + started.said(1)
        time.sleep(0.02)


@pytest.mark.parametrize("how", HOWS)
def test_two_nodes_on_a_bucket_are_one_node_of_two_ranks(
    how: str, nodes: Nodes, straight: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.ended(nodes.start([*WORDS, f"train.parallel={how}"]))
    check_same(nodes.run, straight[how])
    assert nodes.run.plan().machine.nodes == 2
    assert not [name for name in objects(nodes.url) if "/." in name]  # no part is left behind
    monkeypatch.setenv("XDG_CACHE_HOME", str(nodes.home / "another"))
    brought = bucket.fetched(nodes.url, "last")
    path = checkpoint.choose(brought, "last")
    checkpoint.verify(path)
    assert len(checkpoint.manifest(path).files) == 5  # both ranks' parts
    ours, theirs = weights(brought), weights(straight[how])
    assert all(ours[name].equal(theirs[name]) for name in theirs)


# ---------------------------------------------------------------- killed, and gone on with


@pytest.mark.parametrize("lost", [(0, 1), (0,), (1,), ()], ids=str)
def test_all_are_killed_and_go_on_whatever_caches_are_left(
    lost: tuple[int, ...], nodes: Nodes, straight: dict[str, RunFolder]
) -> None:
    """A fresh machine, and one that has what an earlier attempt left."""
    started = nodes.start(WORDS)
    until(started, nodes, 10)
    started.end()
    nodes.lose(*lost)
    nodes.ended(nodes.start(WORDS))
    check_same(nodes.run, straight["zero1"])
    assert len(resumes(nodes.run)) == 1
    assert resumes(nodes.run)[0] >= 10


@pytest.mark.slow
def test_two_nodes_of_two_ranks_go_on_from_the_bucket_alone(nodes: Nodes) -> None:
    """The ranks of a node share what the first of them brings."""
    words = [*WORDS, "train.parallel=fsdp"]
    env = {"XDG_CACHE_HOME": str(nodes.home / "cache")}
    place, here = nodes.home / "four", [*words, "--data", str(nodes.home / "data")]
    started = start(4, command, here, folder=place, env=env)
    assert set(started.codes()) == {0}, started.said(0)
    started = nodes.start(words, each=2)
    until(started, nodes, 10)
    started.end()
    nodes.lose(0, 1)
    nodes.ended(nodes.start(words, each=2))
    assert resumes(nodes.run)[0] >= 10
    check_same(nodes.run, RunFolder(place / "runs/x"))


@pytest.mark.parametrize("harm", [harm_flip, harm_delete])
@pytest.mark.parametrize("part", [1, 2])
def test_a_damaged_newest_checkpoint_is_passed_over_by_both(
    part: int, harm: Any, nodes: Nodes, straight: dict[str, RunFolder]
) -> None:
    """On the bucket, whichever node's part it is; the other node's cache is stale."""
    started = nodes.start(WORDS)
    until(started, nodes, 10)
    started.end()
    nodes.lose(0)
    step = max(steps_on(nodes.url))
    file = f"checkpoints/step_{step:08d}/model-0000{part}-of-00002.safetensors"
    found = [name for name in objects(nodes.url) if name.endswith(file)]
    assert len(found) == 1
    harm(store_at(nodes.url), found[0])
    nodes.ended(nodes.start(WORDS))
    assert resumes(nodes.run)[0] < step
    assert "checkpoint_damaged" in codes_of(nodes.run)
    check_same(nodes.run, straight["zero1"])


def test_one_that_is_damaged_on_the_leads_disk_is_passed_over_by_both(
    nodes: Nodes, straight: dict[str, RunFolder]
) -> None:
    started = nodes.start(WORDS)
    until(started, nodes, 10)
    started.end()
    newest = checkpoint.by_age(nodes.run)[-1]
    (newest / "model-00002-of-00002.safetensors").write_bytes(b"")
    nodes.ended(nodes.start(WORDS))
    assert resumes(nodes.run)[0] < checkpoint.step_of(newest)
    check_same(nodes.run, straight["zero1"])


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "part-00002-of-00002.json"])
def test_a_node_killed_inside_an_upload_leaves_no_complete_checkpoint(
    file: str, nodes: Nodes, straight: dict[str, RunFolder]
) -> None:
    started = nodes.start(WORDS, _killed_on_the_other_node, file, 2)
    codes = started.codes()
    assert codes == [1, -signal.SIGKILL], started.said(0)
    assert [line for line in started.lines() if "is gone" in line], started.said(0)
    assert steps_on(nodes.url) == {5}
    assert [checkpoint.step_of(path) for path in checkpoint.complete(nodes.run)] == [5]
    nodes.lose(0, 1)
    nodes.ended(nodes.start(WORDS))
    assert resumes(nodes.run) == [5]
    check_same(nodes.run, straight["zero1"])
    assert not [name for name in objects(nodes.url) if "/." in name]


def _killed_on_the_other_node(words: list[str], file: str, number: int) -> int:
    return killed_sending(words, file, number) if os.environ["RANK"] == "1" else command(words)


# ---------------------------------------------------------------- back, and from other weights


def test_both_nodes_go_back_together(nodes: Nodes) -> None:
    words = [*WORDS, "budget.steps=80"]
    nodes.ended(nodes.start(words, poisoned, 1, 21, 25))
    rewinds = [e for e in nodes.run.rows("events") if e["code"] == "rewind"]
    assert [(e["from_step"], e["step"]) for e in rewinds] == [(26, 20)]
    assert [row["step"] for row in nodes.run.latest("metrics")] == [*range(1, 81)]
    assert math.isfinite(nodes.run.latest("metrics")[-1]["loss"])


def test_weights_that_only_the_lead_has_start_both(
    nodes: Nodes, straight: dict[str, RunFolder]
) -> None:
    """The other node's folder of the same name is not there: the lead's are copied."""
    place = nodes.home / "node0/first"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(straight["zero1"].path, place)
    words = [w for w in WORDS if not w.startswith("model.")]
    words = [*words, "model.depth=none", "train.init_from=first", "train.parallel=fsdp"]
    nodes.ended(nodes.start(words))
    both = nodes.home / "both"
    both.mkdir(exist_ok=True)
    shutil.copytree(straight["zero1"].path, both / "first")
    env = {"XDG_CACHE_HOME": str(nodes.home / "cache")}
    here = [*words, "--data", str(nodes.home / "data")]
    started = start(2, command, here, folder=both, env=env)
    assert started.codes() == [0, 0], started.said(0) + started.said(1)
    check_same(nodes.run, RunFolder(both / "runs/x"))


# ---------------------------------------------------------------- one line, one disk


def test_a_node_that_cannot_use_the_bucket_says_so_before_a_step(nodes: Nodes) -> None:
    started = nodes.start(WORDS, env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    started.processes[1].join(120)
    assert started.processes[1].exitcode == 1, started.said(1)
    started.end()  # as torchrun does; alone the lead would give up at the preflight
    said = started.said(1).splitlines()
    assert len(said) == 1, said
    assert "cannot be reached" in said[0]
    assert "writes its part of each checkpoint there" in said[0]
    assert not [*nodes.run.rows("metrics")]


def test_nodes_that_share_the_cache_gather_there(
    nodes: Nodes, straight: dict[str, RunFolder]
) -> None:
    """A cache folder on a disk that all nodes mount: nothing goes over the bucket twice."""
    env = {"XDG_CACHE_HOME": str(nodes.cache(0))}
    nodes.apart = False
    nodes.ended(nodes.start(WORDS, env=env))
    check_same(nodes.run, straight["zero1"])
    assert not (nodes.run.path.parent / "beside").exists()

"""Whole runs of many ranks: one curve on any number, whoever is killed; said and billed once.

Most ranks are forked (gloo.py), with torchrun's environment; where it matters torchrun starts them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import PATIENCE, Started, command, poisoned, start, struck
from known import know_this_machine

from tuppence import checkpoint, config
from tuppence.config import DataPlan, Run, Train
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.ledger import spent
from tuppence.plan.hardware import Calibration
from tuppence.plan.spread import spread_of

STEPS = 24
TINY = [
    "machine.usd_per_hour=0.4",
    "machine.threads=1",
    "model.depth=none",
    "model.n_head=2",
    "model.n_layer=2",
    "model.n_embd=32",
    "model.sequence_len=32",
    "train.batch_tokens=512",
    "train.precision=fp32",
    "train.attention=sdpa",
    "train.eval_tokens=2048",
    "train.sample_tokens=4",
    "train.save_every=5",
    "train.eval_every=12",
]
OTHERS = {  # what they draw (noise, iterations, dropout) is the global batch's, on every rank
    "ddp": [
        "model.family=looped",
        "model.n_layer=none",
        "model.exportable=none",
        "model.n_prelude=1",
        "model.n_recurrent=1",
        "model.n_coda=1",
        "model.mean_recurrence=3",
        "model.max_recurrence=5",
    ],
    "fsdp": [
        "model.family=gpt2",
        "model.exportable=none",
        "model.dropout=0.1",
        "train.attention=matmul",
        "train.learning_rate=0.01",
    ],
}
WORDS = ["train", "shakespeare", f"budget.steps={STEPS}", *TINY]
AGENT = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
LOSS = 3e-4  # nats, of every step and evaluation: adding up in another order came to 4e-5 here

Command = Callable[..., Started]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration, data_plan: DataPlan
) -> Path:
    """Where all runs of this module are, with what is known of the machine: nothing is measured."""
    home = tmp_path_factory.mktemp("home")
    each = [WORDS[2:], *([*WORDS[2:], *words] for words in OTHERS.values())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        know_this_machine(calibration, data_plan, each, ranks=(1, 2, 4))
    return home


def environment(home: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(home / "cache")}


@pytest.fixture
def ranks(home: Path) -> Command:
    """Starts words in a world of processes."""

    def ranks(world: int, words: list[str], work: Any = command, *how: Any) -> Started:
        logs = home / f"logs{len([*home.glob('logs*')])}"
        return start(world, work, words, *how, folder=logs, cwd=home, env=environment(home))

    return ranks


def ended(started: Started, *codes: int) -> None:
    """Every rank has ended with its code."""
    found = started.codes()
    assert found == [*codes], "\n".join(started.said(r) for r in range(len(codes)))


@pytest.fixture(scope="module")
def finished(home: Path) -> dict[str, RunFolder]:
    """The run that is the measure of all others, by one process and by two, uninterrupted."""
    runs = {}
    for world, name in ((1, "one"), (2, "two")):
        logs = home / f"straight{world}"
        words = [*WORDS, f"name={name}"]
        ended(
            start(world, command, words, folder=logs, cwd=home, env=environment(home)),
            *[0] * world,
        )
        runs[name] = RunFolder(home / "runs" / name)
    return runs


def column(run: RunFolder, key: str, rows: str = "metrics") -> list[Any]:
    return [row[key] for row in run.latest(rows)]


def codes_of(run: RunFolder) -> Counter[str]:
    return Counter(event["code"] for event in run.rows("events"))


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return checkpoint.consolidated(checkpoint.choose(run, "last"))


def check_close(run: RunFolder, other: RunFolder) -> None:
    """The same tokens, and losses within the bound."""
    assert column(run, "step") == [*range(1, STEPS + 1)]
    assert column(run, "tokens_sha") == column(other, "tokens_sha")
    assert column(run, "loss") == pytest.approx(column(other, "loss"), abs=LOSS)
    ours, theirs = column(run, "loss", "evals"), column(other, "loss", "evals")
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=LOSS)
    assert column(run, "tokens", "evals") == column(other, "tokens", "evals")


def check_same(run: RunFolder, other: RunFolder) -> None:
    """Every loss, norm, token hash and evaluation, and the weights: bit for bit."""
    for key in ("step", "loss", "grad_norm", "lr", "tokens_sha"):
        assert column(run, key) == column(other, key)
    assert column(run, "loss", "evals") == column(other, "loss", "evals")
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def check_one_bill(run: RunFolder) -> None:
    """No second is charged twice."""
    rows = sorted(run.rows("ledger"), key=lambda row: row["start"])
    assert all(a["end"] <= b["start"] + 1e-6 for a, b in itertools.pairwise(rows))
    assert not (run.path / "heartbeat.json").exists()


# ---------------------------------------------------------------- the same curve


def test_two_ranks_are_one_process(finished: dict[str, RunFolder]) -> None:
    check_close(finished["two"], finished["one"])
    assert column(finished["two"], "loss") != column(finished["one"], "loss")
    assert finished["two"].plan().machine.parallel == "zero1"
    check_one_bill(finished["two"])
    once = codes_of(finished["two"])
    assert (once["start"], once["end"], once["preflight"]) == (1, 1, 1)
    assert len(column(finished["two"], "text", "samples")) == 2
    assert len(checkpoint.manifest(checkpoint.choose(finished["two"], "last")).files) == 5


@pytest.mark.parametrize("how", OTHERS)
def test_other_families_and_ways_to_spread_are_one_process(
    how: str, ranks: Command, home: Path
) -> None:
    words = [*WORDS, *OTHERS[how]]
    ended(ranks(1, [*words, f"name={how} alone"]), 0)
    ended(ranks(2, [*words, f"name={how}", f"train.parallel={how}"]), 0, 0)
    run = RunFolder(home / "runs" / how)
    check_close(run, RunFolder(home / f"runs/{how} alone"))
    assert run.plan().machine.parallel == how


def test_stopped_on_two_goes_on_with_one_with_four_and_back(
    finished: dict[str, RunFolder], ranks: Command, home: Path
) -> None:
    """A SIGTERM to one rank stops all, each time at another step."""
    words, run = [*WORDS, "name=moved"], RunFolder(home / "runs/moved")
    for attempt, (world, step) in enumerate([(2, 6), (1, 11), (4, 16)], 1):
        started = ranks(world, words, struck, world - 1, step, signal.SIGTERM)
        ended(started, *[143] * world)
        there = checkpoint.pointer(run, "last")
        assert there is not None
        assert step < there.step <= step + 3  # the step in which it came, and two more
        assert codes_of(run)["start"] + codes_of(run)["resume"] == attempt
        said = f"SIGTERM: saved at step {there.step}; the same command continues"
        assert [line for line in started.lines() if "saved at" in line] == [f"tuppence: {said}"]
        check_one_bill(run)
        files = checkpoint.manifest(checkpoint.choose(run, "last")).files
        assert len(files) == 1 + 2 * world
    ended(ranks(2, words), 0, 0)
    check_close(run, finished["one"])
    assert len(column(run, "loss", "evals")) == 2


# ---------------------------------------------------------------- who is killed


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_is_killed_and_the_others_end(
    who: int, finished: dict[str, RunFolder], ranks: Command, home: Path
) -> None:
    words, run = [*WORDS, f"name=killed{who}"], RunFolder(home / f"runs/killed{who}")
    started = ranks(2, words, struck, who, 8, signal.SIGKILL)
    codes = started.codes()
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] == 1, started.said(1 - who)
    assert len(started.lines()) == 1, started.said(1 - who)
    assert "another rank is gone" in started.lines()[0]
    assert "step 5 is saved, and the same command goes on from there" in started.lines()[0]
    ended(ranks(2, words), 0, 0)
    check_same(run, finished["two"])
    assert [e["step"] for e in run.rows("events") if e["code"] == "resume"] == [5]
    check_one_bill(run)


@pytest.mark.slow
def test_all_are_killed_again_and_again(
    finished: dict[str, RunFolder], ranks: Command, home: Path
) -> None:
    """At random moments, wherever they are: setting up, training, saving, evaluating."""
    words, run = [*WORDS, "name=again"], RunFolder(home / "runs/again")
    chance, kills = random.Random(0), 0
    for least in (1, 9, 18):
        started = ranks(2, words)
        deadline = time.monotonic() + PATIENCE
        while len([*run.rows("metrics")]) < least and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.1))
        kills += sum(process.is_alive() for process in started.processes)
        started.end()
    assert kills >= 2
    ended(ranks(2, words), 0, 0)
    check_same(run, finished["two"])


# ---------------------------------------------------------------- not a number


def test_nan_on_one_rank_is_skipped_by_all(
    finished: dict[str, RunFolder], ranks: Command, home: Path
) -> None:
    ended(ranks(2, [*WORDS, "name=nan"], poisoned, 1, 7, 7), 0, 0)
    run = RunFolder(home / "runs/nan")
    skipped = [e["step"] for e in run.rows("events") if e["code"] == "step_skipped"]
    assert skipped == [8]
    losses, usual = column(run, "loss"), column(finished["two"], "loss")
    assert losses[:7] == usual[:7]
    assert losses[7] is None
    assert all(math.isfinite(loss) for loss in losses[8:])
    assert column(run, "tokens_sha") == column(finished["two"], "tokens_sha")
    check_one_bill(run)


def test_all_ranks_rewind_together(ranks: Command, home: Path) -> None:
    words = [*WORDS, "name=rewound", "budget.steps=80"]
    ended(ranks(2, words, poisoned, 1, 21, 25), 0, 0)
    run = RunFolder(home / "runs/rewound")
    rewinds = [e for e in run.rows("events") if e["code"] == "rewind"]
    assert [(e["from_step"], e["step"]) for e in rewinds] == [(26, 20)]
    assert column(run, "step") == [*range(1, 81)]
    assert math.isfinite(column(run, "loss")[-1])


# ---------------------------------------------------------------- said once


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["budget.stepz=3"], 2, "budget.stepz"),
        (["train.batch_tokens=96"], 2, "a whole number on each of 2 processes; the nearest is 128"),
        (["model.n_embd=20000", "model.n_layer=99"], 3, "GiB"),
        (["budget.steps=none", "budget.hours=1e-6"], 3, "budget"),
    ],
)
def test_what_is_refused_is_said_once(
    words: list[str], code: int, says: str, finished: Any, ranks: Command, home: Path
) -> None:
    started = ranks(2, [*WORDS, "name=wrong", *words])
    ended(started, code, code)
    assert len(started.lines()) == 1
    assert says in started.lines()[0]
    assert "Traceback" not in started.said(0) + started.said(1)
    assert not (home / "runs/wrong").exists()


def test_a_finished_run_says_so_and_ends_well(
    finished: dict[str, RunFolder], ranks: Command
) -> None:
    before = spent(finished["two"])
    started = ranks(2, [*WORDS, "name=two"])
    ended(started, 0, 0)
    assert "is finished; nothing to do" in started.said(0)
    assert started.said(1) == ""
    assert spent(finished["two"]) == before


def test_other_words_are_another_run_on_every_rank(
    finished: dict[str, RunFolder], ranks: Command
) -> None:
    started = ranks(2, [*WORDS, "name=two", "train.seed=9"])
    ended(started, 2, 2)
    assert len(started.lines()) == 1
    assert "train.seed" in started.lines()[0]


def test_ranks_that_do_not_divide_a_batch_cannot_go_on_with_it(
    finished: dict[str, RunFolder], ranks: Command, home: Path
) -> None:
    shutil.copytree(home / "runs/two", home / "runs/thirds")
    run = RunFolder(home / "runs/thirds")
    asked = run.read_json("run.json")
    run.write_json("run.json", {**asked, "name": "thirds"})
    text = "".join(json.dumps(row) + "\n" for row in run.rows("events") if row["code"] != "end")
    run.file("events.jsonl").write_text(text)
    started = ranks(3, [*WORDS, "name=thirds"])
    ended(started, 2, 2, 2)
    assert len(started.lines()) == 1
    assert "16 sequences cannot be shared by 3 processes" in started.lines()[0]


def test_gpus_without_torchrun_say_how_to_start() -> None:
    run = config.override(Run(name="x"), ["machine.gpu_count=2", "machine.nodes=3"])
    assert spread_of(run, ranks=6, nodes=3).parallel == "zero1"
    with pytest.raises(UserError, match=r"torchrun --nproc_per_node=2 -m tuppence train"):
        spread_of(run, ranks=1, nodes=1)


@pytest.mark.parametrize(("ranks", "asked"), [(1, "ddp"), (1, "fsdp"), (2, "none")])
def test_ways_to_spread_are_for_many(ranks: int, asked: str) -> None:
    run = Run(name="x", train=Train(parallel=asked))
    with pytest.raises(UserError, match=rf"train.parallel={asked}: with {ranks} process"):
        spread_of(run, ranks=ranks, nodes=1)


# ---------------------------------------------------------------- torchrun itself


def torchrun(home: Path, *words: str) -> subprocess.Popen[str]:
    """Two ranks, and the agent that watches them."""
    return subprocess.Popen(
        [sys.executable, "-m", *AGENT, "-m", "tuppence", *words],
        cwd=home,
        env={**os.environ, **environment(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_starts_again_and_runs_to_one_receipt(
    finished: dict[str, RunFolder], home: Path
) -> None:
    process = torchrun(home, "run", *WORDS[1:], "name=agent")
    run = RunFolder(home / "runs/agent")
    while process.poll() is None and not [*run.rows("metrics")]:
        time.sleep(0.002)
    os.kill(run.read_json("heartbeat.json")["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.count("receipt   agent: spent") == 1
    assert codes_of(run)["start"] + codes_of(run)["resume"] == 2
    check_same(run, finished["two"])  # forked ranks are ranks
    check_one_bill(run)
    assert run.read_json("receipt.json")["budget"]["fraction"] == 1.0


@pytest.mark.slow
def test_sigterm_to_the_agent_saves(finished: dict[str, RunFolder], home: Path) -> None:
    process = torchrun(home, *WORDS, "name=noticed", "budget.steps=1000000")
    run = RunFolder(home / "runs/noticed")
    while process.poll() is None and len([*run.rows("metrics")]) < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    there = checkpoint.pointer(run, "last")
    assert there is not None, err
    assert there.step == column(run, "step")[-1] >= 20
    assert err.count(f"tuppence: SIGTERM: saved at step {there.step}") == 1
    checkpoint.verify(checkpoint.choose(run, "last"))
    check_one_bill(run)


@pytest.mark.slow
def test_time_budgets_end_within_on_two_ranks(finished: Any, ranks: Command, home: Path) -> None:
    words = [
        "run",
        "shakespeare",
        "budget.hours=0.0025",
        *TINY[:-2],
        "name=timed",
        "train.warmup=0.1",
    ]
    started = ranks(2, words)
    ended(started, 0, 0)
    run = RunFolder(home / "runs/timed")
    assert spent(run).seconds <= 9.0
    rows = run.latest("metrics")
    assert rows[-1]["progress"] == 1.0
    plan = run.plan()
    floor = plan.optimizer.learning_rate * plan.schedule.floor
    assert rows[-1]["lr"] == pytest.approx(floor)
    assert max(row["lr"] for row in rows) > floor
    assert started.said(0).count("receipt   timed: spent") == 1
    assert started.said(1) == ""
    check_one_bill(run)

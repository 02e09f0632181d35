"""On a CUDA card: it plans, trains and evaluates there, and agrees with the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = {
    "gpt2": ["shakespeare", "model.family=gpt2", "model.n_layer=2"],
    "depth": ["shakespeare", "model.n_layer=2"],
    "looped": ["shakespeare_looped"],
}
TINY = [
    "machine.usd_per_hour=1",
    "model.n_head=2",
    "model.n_embd=64",
    "model.sequence_len=64",
    "train.batch_tokens=1024",
    "budget.steps=30",
    "train.eval_every=10",
]


def receipt(cwd: Path, family: str, *words: str) -> dict:
    every = [*FAMILIES[family], *TINY, *words]
    command = [sys.executable, "-m", "tuppence", "run", *every, "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_on_the_card(tmp_path: Path, family: str, precision: str) -> None:
    told = receipt(tmp_path, family, "name=card", f"train.precision={precision}")
    plan = json.loads((tmp_path / "runs/card/plan.json").read_text())
    assert plan["machine"]["device"] == "cuda"
    assert plan["step"]["workers"] == 1
    assert told["machine"]["name"] == torch.cuda.get_device_name()
    assert told["actual"]["val_loss"] < 4.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_agrees_with_the_cpu(tmp_path: Path, family: str) -> None:
    losses = {}
    for name in ("card", "cpu"):
        more = ["machine.gpu=cpu"] if name == "cpu" else []
        receipt(tmp_path, family, f"name={name}", "train.precision=fp32", *more)
        rows = (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert losses["card"] == pytest.approx(losses["cpu"], abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
def test_two_cards_agree_with_one(tmp_path: Path, parallel: str) -> None:
    words = ["train", *FAMILIES["depth"], *TINY, "train.precision=fp32"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]
    commands = {
        "one": [sys.executable, "-m", "tuppence", *words, "name=one"],
        "two": [*torchrun, "tuppence", *words, "name=two", f"train.parallel={parallel}"],
    }
    seen = {}
    for name, command in commands.items():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        seen[name] = [json.loads(line) for line in lines]
    for one, two in zip(seen["one"], seen["two"], strict=True):
        assert one["tokens_sha"] == two["tokens_sha"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-3)


def test_a_killed_run_on_the_card_goes_on(tmp_path: Path) -> None:
    words = ["train", *FAMILIES["depth"], *TINY, "budget.steps=3000", "train.save_every=20"]
    command = [sys.executable, "-m", "tuppence", *words, "name=killed", "train.precision=bf16"]
    metrics = tmp_path / "runs/killed/metrics.jsonl"
    for least in (100, 400):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not metrics.exists() or metrics.read_text().count("\n") < least
        ):
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    first: dict[int, dict] = {}
    for row in rows:  # what was done again is what was done before, to rounding
        before = first.setdefault(row["step"], row)
        assert row["tokens_sha"] == before["tokens_sha"]
        assert row["loss"] == pytest.approx(before["loss"], abs=0.02)
    assert rows[-1]["step"] == 3000

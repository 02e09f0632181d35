"""On a CUDA card: it plans, trains and evaluates there, and agrees with the CPU."""

import json
import subprocess
import sys
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

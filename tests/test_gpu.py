"""On a CUDA card: it plans, trains and evaluates there, and agrees with the CPU."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import SMALL, model_plan, shaken

from tuppence.evals import score, subject
from tuppence.evals.items import Ask
from tuppence.model import build
from tuppence.model.replay import Draws
from tuppence.tokenizer.kinds import CharTokenizer
from tuppence.workers import Workers

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


DOCUMENTS = {
    "gpt2": {"family": "gpt2", "n_layer": 2},
    "depth": {"family": "depth", "n_layer": 3, "n_kv_head": 2, "window_pattern": "SL"},
    "looped": SMALL["looped"],
    "routed": {**SMALL["looped"], "mixture_of_depths": True},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_on_the_card_are_those_of_the_cpu(name: str, compiled: bool) -> None:
    """FlexAttention over several blocks, forward and backward, and the way without it."""
    plan = model_plan(**DOCUMENTS[name], n_embd=64, sequence_len=300)
    idx = torch.randint(50, (3, 300), generator=torch.Generator().manual_seed(0))
    draws = Draws(torch.arange(3), 3) if plan.loop else None
    found = []
    for device, refusal in (("cpu", None), ("cuda", None), ("cuda", "a test asks for it")):
        model = build(plan, device=device, document_end=0)
        model.load_state_dict(shaken(plan).state_dict())
        model.documents = dataclasses.replace(model.documents, refusal=refusal)
        assert model.documents.way("cuda") == ("split" if refusal else "flex")
        run = torch.compile(model) if compiled and device == "cuda" and not refusal else model
        if draws is not None:
            draws = Draws(draws.key_B.to(device), draws.recurrence)
        loss = run(idx.to(device), idx.roll(-1, 1).to(device), draws=draws)
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        found.append((loss.item(), grads))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-3)
        assert torch.nn.functional.cosine_similarity(grads, found[0][1], 0) > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_documents_on_the_card_agrees_with_the_cpu(tmp_path: Path, family: str) -> None:
    letters = (chr(ord("a") + i * 7 % 26) * (5 + i % 90) for i in range(4000))
    lines = (json.dumps({"text": text}) + "\n" for text in letters)
    (tmp_path / "letters.jsonl").write_text("".join(lines))
    words = ["data.source=letters.jsonl", "data.tokenizer=byte", "data.packing=documents"]
    losses = {}
    for name in ("card", "cpu"):
        more = ["machine.gpu=cpu"] if name == "cpu" else []
        receipt(tmp_path, family, f"name={name}", "train.precision=fp32", *words, *more)
        rows = (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
        assert "packing" not in (tmp_path / f"runs/{name}/events.jsonl").read_text()
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_answers_on_the_card_are_those_of_the_cpu(name: str) -> None:
    """Branches, masks and cuts; fp32."""
    plan = model_plan(**DOCUMENTS[name], sequence_len=64)
    found = []
    for device in ("cpu", "cuda"):
        model = build(plan, device=device)
        model.load_state_dict(shaken(plan).state_dict())
        workers = Workers(model, count=1, device=device, precision="fp32")
        tokenizer = CharTokenizer("".join(map(chr, range(49))), end_of_text=True)
        who = subject.of_run(workers, tokenizer, context=64, identity={})
        stems = [[(7 * i + j) % 49 for j in range(30 + 11 * i)] for i in range(4)]
        asked = [
            (i, [Ask([*stem, *range(c, c + 3 + c)], 3 + c) for c in range(4)])
            for i, stem in enumerate(stems)
        ]
        found.append(dict(score.answers(who, asked)))
    for key, mine in found[0].items():
        for one, other in zip(mine, found[1][key], strict=True):
            assert one.nats == pytest.approx(other.nats, abs=1e-3)
            assert one.tokens == other.tokens

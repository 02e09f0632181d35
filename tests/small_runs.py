"""Small finished runs of every family and folders of weights: for tests of what goes in and out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tuppence import checkpoint, config
from tuppence.config import DataPlan, InitPlan, Run
from tuppence.folder import RunFolder
from tuppence.hub.load import load_into, plan_of
from tuppence.ledger import Meter
from tuppence.model import Family, build
from tuppence.origin import read
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.train.loop import train

WORDS = [
    "budget.steps=3",
    "machine.usd_per_hour=1",
    "machine.threads=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.sequence_len=16",
    "data.source=shakespeare",
    "data.tokenizer=char",
    "train.batch_tokens=64",
    "train.precision=fp32",
    "train.attention=sdpa",
    "train.eval_tokens=64",
    "train.sample_tokens=0",
]
BOLD = ["train.learning_rate=0.05", "train.head_rate=0.3"]  # three steps move every weight
LOOPED = [
    "model.family=looped",
    "model.n_prelude=1",
    "model.n_recurrent=2",
    "model.n_coda=1",
    "model.mean_recurrence=3",
    "model.max_recurrence=5",
    "model.lora_rank=4",
    *BOLD,
]
DEPTH = ["model.family=depth", "model.n_layer=2", "model.exportable=on", *BOLD]
GPT2 = ["model.family=gpt2", "model.n_layer=2", "train.learning_rate=0.01"]


def finished(
    path: Path, words: list[str], data: DataPlan, shards: Path, calibration: Calibration
) -> RunFolder:
    """A run of three steps with these words, in `path`."""
    asked = config.override(Run(name=path.name), [*WORDS, *words])
    plan = solve(asked, data, calibration)
    path.mkdir()
    folder = RunFolder(path)
    folder.write_json("run.json", dataclasses.asdict(asked))
    folder.write_json("plan.json", dataclasses.asdict(plan))
    meter = Meter(folder, usd_per_hour=1.0, attempt=1, start=0.0)
    meter.start = meter._since = meter.now()  # the tests' own start-up is nobody's bill
    try:
        train(plan, folder, shards, meter=meter, attempt=1)
    finally:
        meter.close()
        folder.close()
    return folder


def best_model(folder: RunFolder) -> Family:
    """The model of a run with its best weights."""
    model = build(folder.plan().model)
    checkpoint.load(checkpoint.choose(folder, "best"), model)
    return model


def text_ids(vocab_size: int, *, length: int = 16) -> torch.Tensor:
    """Two sequences of tokens."""
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(7))


def refusal(document: dict[str, Any]) -> str:
    """The one line that a command refused with, as wrong input."""
    assert document["error"]["exit_code"] == 2
    message: str = document["error"]["message"]
    assert "\n" not in message
    return message


def model_of(folder: Path) -> Any:
    """The model that an import holds."""
    origin = read(str(folder))
    model = build(plan_of(origin.model))
    load_into(model, InitPlan(str(folder), origin.sha256))
    return model


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
    """Save a folder's tensors again, changed."""
    tensors = change(load_file(path / "model.safetensors"))
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors")


def config_with(**settings: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | settings))

    return change

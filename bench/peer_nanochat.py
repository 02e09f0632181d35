"""nanochat's model and optimizer, trained as its scripts/base_train.py does with its defaults.

Model, first weights and optimizer are the checkout's own; so is what compiles them. The script
itself trains only on its own corpus and tokenizer, so its rules are stated here (read from the
script of July 2026): rates by batch, decay by size, and schedules.

    rates     x sqrt(batch / 2^19)
    decay     0.28 sqrt(batch / 2^19) (weights of depth 12 / weights), then half a cosine to 0
    rate      40 steps up, then flat, then 65% of the run down to a twentieth
    momentum  0.85 up to 0.97 in 400 steps, down to 0.90 while the rate falls
"""

import contextlib
import hashlib
import importlib
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuppence.config import Plan
from tuppence.workers import Workers

HEAD_DIM, ASPECT = 128, 64
DEPTH_REFERENCE, BATCH_REFERENCE = 12, 2**19
RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
DECAY = 0.28
WARMUP_STEPS, WARMDOWN, FINAL = 40, 0.65, 0.05
MOMENTUM_STEPS, MOMENTA = 400, (0.85, 0.97, 0.90)
SOURCES = ("gpt.py", "optim.py", "flash_attention.py", "common.py")


def version(checkout: Path) -> str:
    """A hash of the checkout's files that decide what is learned."""
    text = b"".join((checkout / "nanochat" / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(text).hexdigest()[:12]


class Peer:
    """One run of it, with the depth, vocabulary, context, batch, steps and seed of a plan."""

    def __init__(self, checkout: Path, plan: Plan) -> None:
        assert plan.step.max_steps is not None
        torch.set_num_threads(plan.machine.threads)
        gpt = imported(checkout)
        self.steps = plan.step.max_steps
        torch.manual_seed(plan.step.seed)
        with contextlib.redirect_stdout(sys.stderr):
            model = on_meta(gpt, plan, plan.model.n_layer)
            reference = weights(on_meta(gpt, plan, DEPTH_REFERENCE))
            model.to_empty(device="cpu")
            model.init_weights()
            root = math.sqrt(plan.step.batch_tokens / BATCH_REFERENCE)
            self.decay = DECAY * root * reference / weights(model)
            rates = {name: rate * root for name, rate in RATES.items()}
            self.optimizer = model.setup_optimizer(**rates, weight_decay=self.decay)
        self.model: Any = torch.compile(model, dynamic=False)
        judged = Judged(self.model)
        self.workers = Workers(judged, count=1, device="cpu", precision="fp32")  # casts by itself
        self.eval_batch = plan.step.batch_sequences
        self.params_matmul = int(model.num_matmul_params())

    def step(self, number: int, batch: np.ndarray) -> float:
        """Train on a batch [B, T+1]; its loss."""
        tokens = torch.from_numpy(batch)
        loss = self.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(number, self.steps)
            if group["kind"] == "muon":
                group["momentum"] = momentum(number, self.steps)
                group["weight_decay"] = self.decay * decay_factor(number, self.steps)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.item())


class Judged(nn.Module):
    """The peer's model with the signature that our evaluation calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx_BT: Tensor, targets_BT: Tensor, *, reduction: str) -> Tensor:
        total: Tensor = self.model(idx_BT, targets_BT, loss_reduction=reduction)
        return total


def imported(checkout: Path) -> ModuleType:
    """The checkout's nanochat.gpt, computing in bf16."""
    os.environ["NANOCHAT_DTYPE"] = "bfloat16"
    sys.path.insert(0, str(checkout))
    return importlib.import_module("nanochat.gpt")


def on_meta(gpt: ModuleType, plan: Plan, depth: int) -> Any:
    """The peer's model of a depth, without memory."""
    width = math.ceil(depth * ASPECT / HEAD_DIM) * HEAD_DIM
    config = gpt.GPTConfig(
        sequence_len=plan.model.sequence_len,
        vocab_size=plan.model.vocab_size,
        n_layer=depth,
        n_head=width // HEAD_DIM,
        n_kv_head=width // HEAD_DIM,
        n_embd=width,
        window_pattern="L",
    )
    with torch.device("meta"):
        return gpt.GPT(config)


def weights(model: Any) -> int:
    """What the peer's laws call its size: matrices and head."""
    counts = model.num_scaling_params()
    return int(counts["transformer_matrices"] + counts["lm_head"])


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rates, at a step from 0."""
    falling = round(WARMDOWN * steps)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = min(1.0, (steps - step) / falling) if falling else 1.0
    return left + (1 - left) * FINAL


def momentum(step: int, steps: int) -> float:
    """Muon's."""
    first, most, last = MOMENTA
    falling = round(WARMDOWN * steps)
    if step < MOMENTUM_STEPS:
        return first + (most - first) * step / MOMENTUM_STEPS
    done = max(0.0, (step - (steps - falling)) / falling) if falling else 0.0
    return most + (last - most) * done


def decay_factor(step: int, steps: int) -> float:
    """Of Muon's weight decay."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))

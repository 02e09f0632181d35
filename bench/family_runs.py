"""One run of an arm of families.py, ours or the peer's, in a process of its own."""

import gc
import hashlib
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import peer_nanochat
import torch
from peer_nanochat import Peer

from tuppence.config import Plan
from tuppence.data.loader import Loader, val_windows
from tuppence.evals.loss import val_loss
from tuppence.host import code_sha256
from tuppence.model import build
from tuppence.tokenizer.spec import load_tokenizer
from tuppence.train.optim import optimizers_of
from tuppence.train.schedule import factor
from tuppence.train.step import micro_batches, train_step
from tuppence.workers import Workers

EVAL_TOKENS = 2**18
WARM_STEPS = 6  # of a timed process: compiled, allocated, clocks up


@dataclass(frozen=True)
class Job:
    """One run of an arm: all that a fresh process needs. `checkout` is the peer's alone."""

    arm: str
    plan: Plan
    overrides: tuple[str, ...]
    shards: Path
    checkout: Path | None

    @property
    def recipe(self) -> str:
        """A hash of what is learned from, whatever the seed: the data, the batches, and the solved
        plan or the peer's code. How a batch is cut among micro-batches is not in it."""
        plan = self.plan
        parts: list[object] = [self.shards.name, EVAL_TOKENS]
        parts += [plan.step.batch_tokens, plan.step.max_steps, plan.model.sequence_len]
        if self.checkout:
            parts += [peer_nanochat.version(self.checkout), plan.model.n_layer]
        else:
            parts += [plan.model, plan.optimizer, plan.schedule]
            parts += [plan.machine.precision, plan.machine.attention]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[str, str, int]:
        """Of its line in the results."""
        return self.arm, self.recipe, self.plan.step.seed


class Ours:
    """A run of a planned model: what `tuppence train` does in a step."""

    def __init__(self, plan: Plan) -> None:
        assert plan.step.max_steps is not None
        torch.set_num_threads(plan.machine.threads if plan.step.workers == 1 else 1)
        self.plan, self.steps = plan, plan.step.max_steps
        model = build(plan.model, attention=plan.machine.attention)
        model.init_weights(plan.step.seed)
        count, precision = plan.step.workers, plan.machine.precision
        self.workers = Workers(model, count=count, device="cpu", precision=precision)
        self.optimizers = optimizers_of(model, plan.optimizer, self.workers)
        self.eval_batch = plan.cadence.eval_batch
        self.params_matmul = plan.model.params_matmul

    def step(self, number: int, batch: np.ndarray) -> float:
        """Train on a batch [B, T+1]; its loss."""
        micro, plan = self.plan.step.micro_batch, self.plan
        pieces = micro_batches(batch, micro_batch=micro, device="cpu", keys=None, recurrence=None)
        rate = factor((number + 1) / self.steps, plan.schedule)
        clip = plan.optimizer.grad_clip
        return train_step(self.workers, self.optimizers, pieces, factor=rate, grad_clip=clip).loss


def side_of(job: Job) -> Ours | Peer:
    """The arm, ready for its first step."""
    return Peer(job.checkout, job.plan) if job.checkout else Ours(job.plan)


def loader_of(job: Job) -> Loader:
    """The same batches for every arm of a seed."""
    step, length = job.plan.step, job.plan.model.sequence_len
    return Loader(job.shards, sequence_len=length, batch_size=step.batch_sequences, seed=step.seed)


def train(job: Job) -> dict[str, Any]:
    """One run from its first weights to its evaluation: a line of the results."""
    side, loader = side_of(job), loader_of(job)
    seconds, losses = [], []
    for number in range(side.steps):
        started = time.perf_counter()
        losses.append(side.step(number, loader.batch(number)))
        seconds.append(time.perf_counter() - started)
        if number == 0:
            gc.freeze()  # as both trainers do
    windows = val_windows(
        job.shards, sequence_len=job.plan.model.sequence_len, max_tokens=EVAL_TOKENS
    )
    token_bytes = load_tokenizer(job.shards / "tokenizer").token_bytes()
    batches = windows.batches(side.eval_batch)
    evaluating = time.perf_counter()
    judged = val_loss(side.workers, batches, of_tokens=windows.tokens, token_bytes=token_bytes)
    assert judged is not None
    batch_tokens, optimizer = job.plan.step.batch_tokens, job.plan.optimizer
    return {
        "arm": job.arm,
        "recipe": job.recipe,
        "seed": job.plan.step.seed,
        "val_bpb": judged.bpb,
        "val_loss": judged.loss,
        "train_loss": statistics.fmean(losses[-20:]),
        "tokens": side.steps * batch_tokens,
        "tokens_per_second": batch_tokens / statistics.median(seconds),
        "train_seconds": sum(seconds),
        "evaluation_seconds": time.perf_counter() - evaluating,
        "params_matmul": side.params_matmul,
        "overrides": list(job.overrides),
        "rate_decay": None if job.checkout else [optimizer.learning_rate, optimizer.weight_decay],
        "code": code_sha256()[:12],
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


_timed: tuple[Ours | Peer, Loader, int] | None = None


def burst(job: Job, steps: int) -> float:
    """Median seconds of so many steps, in a process that keeps its run between calls."""
    global _timed
    if _timed is None:
        _timed = (side_of(job), loader_of(job), 0)
        burst(job, WARM_STEPS)
    side, loader, first = _timed
    seconds = []
    for number in range(first, first + steps):
        started = time.perf_counter()
        side.step(number, loader.batch(number))
        seconds.append(time.perf_counter() - started)
    _timed = (side, loader, first + steps)
    return statistics.median(seconds)

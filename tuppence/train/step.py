"""One optimizer step: accumulate micro-batches, check, clip, update."""

import contextlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Autocast = Callable[[], AbstractContextManager[None]]


def autocast_for(device: str, precision: str) -> Autocast:
    """A context in which matmuls run in the planned precision; weights stay fp32."""
    if precision == "fp32":
        return contextlib.nullcontext
    assert precision == "bf16", precision
    return lambda: torch.autocast(device, dtype=torch.bfloat16)


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per token, gradient norm before clipping, and whether the weights moved."""

    loss: float
    grad_norm: float
    updated: bool


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    *,
    accumulation: int,
    learning_rate: float,
    grad_clip: float,
    autocast: Autocast,
    tick: Callable[[], None] = lambda: None,
) -> StepResult:
    """Take one step over `accumulation` micro-batches of (inputs, targets, dropout keys).

    All micro-batches have the same number of tokens, so the mean of their means is the large
    batch's mean. A loss or gradient that is not finite leaves weights and optimizer untouched.
    """
    loss = torch.zeros(())
    for inputs, targets, key_B in micro_batches:
        with autocast():
            micro_loss = model(inputs, targets, key_B=key_B) / accumulation
        micro_loss.backward()
        loss = loss.to(micro_loss.device) + micro_loss.detach()
        tick()
    clip = grad_clip if grad_clip > 0 else math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    finite = math.isfinite(grad_norm) and math.isfinite(loss.item())
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss.item(), grad_norm, finite)


def micro_batches(
    batch: np.ndarray, *, micro_batch: int, device: str, keys: np.ndarray | None
) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Cut a batch [B, T+1] into (inputs [b, T], targets [b, T], keys [b]) on the device."""
    for first in range(0, len(batch), micro_batch):
        rows = torch.from_numpy(batch[first : first + micro_batch]).to(device, non_blocking=True)
        key_B = None
        if keys is not None:
            key_B = torch.from_numpy(keys[first : first + micro_batch]).to(device)
        yield rows[:, :-1], rows[:, 1:], key_B


def dropout_keys(*, seed: int, step: int, batch_sequences: int) -> np.ndarray:
    """One key per sequence of the global batch, int64 [B]: a function of (seed, step, place)."""
    stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return stream.integers(0, 2**32, size=batch_sequences, dtype=np.int64)

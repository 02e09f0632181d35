"""One optimizer step: accumulate micro-batches, check, clip, update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tuppence.model.replay import Draws
from tuppence.workers import Workers


class MicroBatch(NamedTuple):
    """What one forward and backward pass takes: tokens [b, T] twice, and what it draws."""

    inputs: Tensor
    targets: Tensor
    draws: Draws


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per token, gradient norm before clipping, and whether the weights moved."""

    loss: float
    grad_norm: float
    updated: bool


def train_step(
    workers: Workers,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Sequence[MicroBatch],
    *,
    factor: float,
    grad_clip: float,
) -> StepResult:
    """Take one step over the micro-batches of a batch, all of the same size.

    The mean of their means is the large batch's mean. `factor` multiplies every group's peak
    learning rate. A loss or gradient that is not finite leaves weights and optimizers untouched.
    """

    def backward(model: nn.Module, micro: MicroBatch) -> Tensor:
        with workers.autocast():
            loss: Tensor = model(micro.inputs, micro.targets, draws=micro.draws) / len(batch)
        torch.autograd.backward(loss)
        return loss.detach()

    loss = torch.stack(workers.map(backward, batch)).sum().item()
    workers.sum_gradients()
    clip = grad_clip if grad_clip > 0 else math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(workers.model.parameters(), clip).item()
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
    workers.model.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, finite)


def micro_batches(
    batch: np.ndarray,
    *,
    micro_batch: int,
    device: str,
    keys: np.ndarray | None,
    recurrence: int | None,
) -> list[MicroBatch]:
    """Cut a batch [B, T+1], with a key for each row, into micro-batches on the device."""
    rows = torch.from_numpy(batch).to(device, non_blocking=True)
    key_B = None if keys is None else torch.from_numpy(keys).to(device)
    return [
        MicroBatch(
            rows[i : i + micro_batch, :-1],
            rows[i : i + micro_batch, 1:],
            Draws(None if key_B is None else key_B[i : i + micro_batch], recurrence),
        )
        for i in range(0, len(batch), micro_batch)
    ]

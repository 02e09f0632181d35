"""One optimizer step: accumulate micro-batches, check, clip, update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tuppence.model.replay import Draws
from tuppence.ranks import ALONE
from tuppence.train.parallel import Parallel
from tuppence.workers import Workers


class MicroBatch(NamedTuple):
    """What one forward and backward pass takes: tokens [b, T] twice, and what it draws."""

    inputs: Tensor
    targets: Tensor
    draws: Draws


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per token and gradient norm before clipping, of the global batch; why the step
    was not taken, where it was not."""

    loss: float
    grad_norm: float
    skipped: str | None

    @property
    def updated(self) -> bool:
        """Whether the weights moved."""
        return self.skipped is None


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Why a step must not be taken, or None."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return f"loss {loss}, gradient norm {grad_norm}"


def train_step(
    workers: Workers,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Sequence[MicroBatch],
    *,
    factor: float,
    grad_clip: float,
    parallel: Parallel | None = None,
    judge: Callable[[float, float], str | None] = not_finite,
    at: Callable[[str], None] = lambda place: None,
) -> StepResult:
    """Take one step over this rank's micro-batches, all of the same size on all ranks.

    The mean of their means is the global batch's mean. `factor` multiplies every group's peak
    learning rate. Loss and norm are the same on every rank, and so is what `judge` says of them; a
    step that it refuses leaves weights and optimizers untouched. `at` is told where the step is.
    """
    parallel = parallel or Parallel(workers.model, how="none", ranks=ALONE)  # type: ignore[arg-type]
    whole = len(batch) * parallel.ranks.world
    at("forward")
    losses = workers.map(lambda model, one: backward(workers, model, one, of=whole), batch)
    here = torch.stack(losses).sum().item()
    workers.sum_gradients()
    at("reduce")
    grads = parallel.reduce()
    norm = parallel.norm(grads)
    loss, grad_norm = parallel.ranks.sum(here)[0], norm.item()
    skipped = judge(loss, grad_norm)
    if skipped is None:
        at("update")
        clip = grad_clip if grad_clip > 0 else math.inf
        owned = [share.owned for share in parallel.shares if share.has_rows]
        torch.nn.utils.clip_grads_with_norm_(owned, clip, norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        parallel.spread()
    parallel.forget_gradients()
    return StepResult(loss, grad_norm, skipped)


def backward(workers: Workers, model: nn.Module, micro: MicroBatch, *, of: int) -> Tensor:
    """One micro-batch's loss, its `of`-th part of the step's, [], with its gradients."""
    with workers.autocast():
        loss: Tensor = model(micro.inputs, micro.targets, draws=micro.draws) / of
    torch.autograd.backward(loss)
    return loss.detach()


def micro_batches(
    batch: np.ndarray | Tensor,
    *,
    micro_batch: int,
    device: str,
    keys: np.ndarray | None,
    recurrence: int | None,
) -> list[MicroBatch]:
    """Cut a batch [B, T+1], with a key for each row, into micro-batches on the device."""
    rows = torch.as_tensor(batch).to(device)
    key_B = None if keys is None else torch.from_numpy(keys).to(device)
    return [
        MicroBatch(
            rows[i : i + micro_batch, :-1],
            rows[i : i + micro_batch, 1:],
            Draws(None if key_B is None else key_B[i : i + micro_batch], recurrence),
        )
        for i in range(0, len(batch), micro_batch)
    ]

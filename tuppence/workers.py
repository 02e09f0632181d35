"""A CPU's cores as workers: each runs whole micro-batches on its own, and they meet once a step.

    micro-batch i ──▶ worker i mod W: forward, backward into gradients of its own
    gradients of worker 0 += worker 1, 2, ...            always in this order

The usual way, every operation split over all cores, makes them wait for one another some five
hundred times a step; on a core that something else needs too, each wait can cost a scheduler's
slice (docs/LOG.md: throughput fell up to a hundredfold). Here a busy core costs its share and no
more. Nothing depends on timing, so the result is the same bit for bit however busy the machine is.
On a GPU there is one worker.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


def autocast_for(device: str, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which matmuls run in the planned precision; weights stay fp32."""
    if precision == "fp32":
        return contextlib.nullcontext
    assert precision == "bf16", precision
    return lambda: torch.autocast(device, dtype=torch.bfloat16)


class Workers:
    """Models that share their weights and have gradients of their own. `model` is the first."""

    def __init__(self, model: nn.Module, *, count: int, device: str, precision: str) -> None:
        self.model, self.device = model, device
        self.autocast = autocast_for(device, precision)
        self._models = [model, *(_sharing(model) for _ in range(count - 1))]
        self._pool = ThreadPoolExecutor(count - 1, initializer=_one_thread) if count > 1 else None
        if count > 1:
            _one_thread()

    def __len__(self) -> int:
        return len(self._models)

    def map(self, work: Callable[[nn.Module, Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work(model, item)` for each item, item i on worker i mod W; results in items' order."""
        count = len(self._models)

        def share(worker: int) -> list[Result]:
            return [work(self._models[worker], item) for item in items[worker::count]]

        others = [self._pool.submit(share, i) for i in range(1, count)] if self._pool else []
        try:
            first = share(0)
        finally:
            wait(others)  # an error of this one's leaves none of them at work
        shares = [first, *(other.result() for other in others)]
        return [shares[i % count][i // count] for i in range(len(items))]

    def spread(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work(item)` for each item, item i on core i mod W."""
        return self.map(lambda _, item: work(item), items)

    def sum_gradients(self) -> None:
        """Add every worker's gradients to the first one's, in a fixed order, and drop them."""
        into = [p.grad for p in self.model.parameters() if p.grad is not None]
        for other in self._models[1:]:
            grads = [p.grad for p in other.parameters() if p.grad is not None]
            if grads:  # fewer micro-batches than workers leave some without
                torch._foreach_add_(into, grads)
            other.zero_grad(set_to_none=True)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode, of all."""
        for model in self._models:
            model.train(mode)


def _one_thread() -> None:
    torch.set_num_threads(1)  # of the calling thread: OpenMP keeps this number for each


def _sharing(model: nn.Module) -> nn.Module:
    """A copy whose parameters are the same memory, with gradients of their own."""
    twin = copy.deepcopy(model)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data = mine.data
    return twin

"""A pass of the most that a step can ask for, before money is spent: the micro-batch that fits.

    planned micro-batch ──fits?──▶ it            two passes on every worker, at a looped model's
             └─ out of memory: next smaller      most iterations, gradients kept, moments reserved
                divisor of the rank's rows

A smaller micro-batch means more of them a step: the global batch and its token stream stay. What is
rehearsed leaves no trace in weights, gradients, moments or random numbers.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tuppence.config import Plan
from tuppence.errors import DoesNotFit
from tuppence.model.replay import Draws
from tuppence.train.step import MicroBatch, backward
from tuppence.workers import Workers

PASSES = 2  # a worker's second one holds the first one's gradients as well


def rehearse(
    workers: Workers,
    plan: Plan,
    *,
    micro_batch: int,
    rows: int,
    agree: Callable[[bool], bool],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> int:
    """The largest micro-batch that fits, at most `micro_batch` and a divisor of this rank's `rows`.

    `agree` says whether it is so on every rank; it is asked once for each size tried. Room is kept
    for the moments that `optimizers` will make in their first step. Raises DoesNotFit.

    A model under FSDP2 is to be built anew where the answer is less than `micro_batch`: torch does
    not recover from a backward pass that broke off, and later gradients are wrong in silence.
    """
    optimizers = tuple(optimizers)
    for size in sizes(micro_batch, rows):
        if agree(_fits(workers, plan, size, rows, optimizers)):
            return size
    raise DoesNotFit(
        f"a micro-batch of one sequence of {plan.model.sequence_len} tokens does not fit the "
        f"memory of {plan.machine.name}; make model.sequence_len or the model smaller, or set "
        f"train.activation_checkpointing=on"
    )


def sizes(micro_batch: int, rows: int) -> list[int]:
    """The divisors of `rows` up to `micro_batch`, largest first."""
    return [size for size in range(min(micro_batch, rows), 0, -1) if rows % size == 0]


def _fits(
    workers: Workers,
    plan: Plan,
    size: int,
    rows: int,
    optimizers: Sequence[torch.optim.Optimizer],
) -> bool:
    batch = min(rows // size, PASSES * len(workers))
    moments: list[Tensor] = []
    try:
        reserved = _tried(lambda: moments.extend(_moments(optimizers)))
        one = partial(_one_pass, workers, plan, size)
        return reserved and all(workers.map(one, [batch] * batch))
    finally:
        moments.clear()
        workers.map(lambda model, _: model.zero_grad(set_to_none=True), range(len(workers)))
        _give_back(workers.device)


def _one_pass(workers: Workers, plan: Plan, size: int, model: nn.Module, of: int) -> bool:
    """Forward and backward over tokens that mean nothing; whether there was room. Nothing of the
    pass outlives this function, nor does an error reach `map` while other workers compute."""
    return _tried(lambda: backward(workers, model, worst_of(plan, size, workers.device), of=of))


def _tried(work: Callable[[], object]) -> bool:
    """Whether `work` found the memory that it wanted."""
    try:
        work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it is an allocator's refusal: a GPU's, or on a CPU the system's."""
    refused = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError)


def worst_of(plan: Plan, size: int, device: str) -> MicroBatch:
    """A micro-batch of `size` sequences for which a model needs the most memory."""
    model = plan.model
    tokens = torch.arange(size * (model.sequence_len + 1), device=device) % model.vocab_size
    rows = tokens.view(size, -1)
    drawn = model.dropout > 0 or model.loop is not None
    key_B = torch.arange(size, device=device) if drawn else None
    most = model.loop.max_recurrence if model.loop else None
    return MicroBatch(rows[:, :-1], rows[:, 1:], Draws(key_B, most))


def _moments(optimizers: Iterable[torch.optim.Optimizer]) -> Iterable[Tensor]:
    """As much memory as the first step will take for moments: AdamW has two, Muon one."""
    for optimizer in optimizers:
        each = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                if not optimizer.state.get(p):
                    yield from (torch.empty_like(p, requires_grad=False) for _ in range(each))


def _give_back(device: str) -> None:
    """Leave the memory, and what is measured of it, as it was found."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

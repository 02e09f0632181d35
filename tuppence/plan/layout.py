"""How to run a shape on given cards: precision, parallelism, checkpointing, micro-batch.

Every way that fits the memory is timed by the roofline, and the fastest is taken. The global batch
is the contract: `micro_batch x accumulation x replicas` sequences, whatever the machine.
"""

import dataclasses
from dataclasses import dataclass

from tuppence.config import Interval, Train
from tuppence.errors import UserError
from tuppence.plan import memory, throughput
from tuppence.plan.cost import Shape
from tuppence.plan.gpus import supports
from tuppence.plan.job import Gpu, Job
from tuppence.plan.shapes import nearest_divisor

CLEARLY = 0.02  # a later, less simple way must be faster by this much
SINGLE = (("none", False), ("none", True))
MANY = (("ddp", False), ("zero1", False), ("zero1", True), ("fsdp", False), ("fsdp", True))


@dataclass(frozen=True)
class Layout:
    """A job that fits, with what it takes; or why nothing fits (`job` is None)."""

    job: Job | None
    peak_memory_gib: Interval | None
    step_seconds: Interval | None
    why_not: str | None


@dataclass(frozen=True)
class _Fitting:
    job: Job
    step_seconds: Interval


def lay_out(
    shape: Shape, gpu: Gpu, *, gpu_count: int, nodes: int, batch_sequences: int, train: Train
) -> Layout:
    """The fastest way that the person's choices and the card's memory allow.

    Raises UserError where the global batch does not divide over the cards.
    """
    cards = gpu_count * nodes
    if batch_sequences % cards:
        near = max(1, round(batch_sequences / cards)) * cards * shape.sequence_len
        raise UserError(
            f"train.batch_tokens={batch_sequences * shape.sequence_len} is not "
            f"model.sequence_len={shape.sequence_len} x a whole number on each of {cards} GPUs; "
            f"the nearest is {near}"
        )
    precision = train.precision or ("bf16" if supports(gpu, "bf16") else "fp16")
    if not supports(gpu, precision):
        return Layout(None, None, None, f"{gpu.name} has no {precision} matrix units")
    each = batch_sequences // cards
    smallest: float | None = None
    best: _Fitting | None = None
    for parallel, checkpointing in ways(cards, train):
        job = Job(
            shape=shape,
            gpu=gpu,
            gpu_count=cards,
            nodes=nodes,
            precision=precision,
            parallel=parallel,
            checkpointing=checkpointing,
            micro_batch=train.micro_batch or 1,
            accumulation=max(1, each // (train.micro_batch or 1)),
            optimizer=train.optimizer or "adamw",
        )
        found = _sized(job, each, train)
        if found is None:
            needs = memory.needed_gib(job)
            smallest = needs if smallest is None else min(smallest, needs)
            continue
        seconds = throughput.step_seconds(found)
        if best is None or seconds.mid < (1 - CLEARLY) * best.step_seconds.mid:
            best = _Fitting(found, seconds)
    if best is not None:
        return Layout(best.job, memory.peak_memory_gib(best.job), best.step_seconds, None)
    assert smallest is not None
    micro = f"micro-batch {train.micro_batch or 1}"
    return Layout(
        None,
        None,
        None,
        f"too little memory: {smallest:.1f} GiB at {micro}, {gpu.name} has {gpu.memory_gib:.1f}",
    )


def ways(cards: int, train: Train) -> list[tuple[str, bool]]:
    """(parallel, checkpointing) pairs to try, as far as the person left them open."""
    every: tuple[tuple[str, bool], ...] = SINGLE if cards == 1 else MANY
    if train.parallel is not None:
        if (train.parallel == "none") != (cards == 1):
            rest = "ddp, zero1 or fsdp" if cards > 1 else "none"
            many = "1 GPU" if cards == 1 else f"{cards} GPUs"
            raise UserError(f"train.parallel={train.parallel}: on {many} it is {rest}")
        every = tuple((train.parallel, again) for again in (False, True))
    wanted = train.activation_checkpointing
    return [(parallel, again) for parallel, again in every if wanted in (None, again)]


def _sized(job: Job, each: int, train: Train) -> Job | None:
    """The job with its micro-batch: as asked where that fits, else the largest that does."""
    if train.micro_batch is None:
        micro = memory.largest_micro_batch(job, each)
        return with_micro_batch(job, micro, each) if micro else None
    if each % train.micro_batch:
        near = nearest_divisor(each, train.micro_batch)
        raise UserError(
            f"train.micro_batch={train.micro_batch} x {job.gpu_count} GPUs x "
            f"{job.shape.sequence_len} tokens does not divide the global batch of "
            f"{each * job.gpu_count * job.shape.sequence_len} tokens; the nearest is {near}"
        )
    return job if memory.fits(job) else None


def with_micro_batch(job: Job, micro: int, each: int) -> Job:
    """The same job in steps of `micro` sequences, `each` on a replica."""
    return dataclasses.replace(job, micro_batch=micro, accumulation=each // micro)

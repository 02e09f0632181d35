"""Measures this machine in a few seconds: matmul ceilings, memory, disk, and a plan's own step.

What is measured is what the plan divides by: MFU has a real peak, and a small model's time on a
CPU (which is dispatch, softmax and GELU as much as matmul) comes from the step itself, timed in
each way it can be run here. The fastest way is the plan's choice, with its reason.
"""

import dataclasses
import gc
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import torch
from torch import nn

from tuppence import host
from tuppence.config import Plan
from tuppence.model import build
from tuppence.model.replay import Draws
from tuppence.plan import hardware
from tuppence.plan.hardware import Calibration, Timing
from tuppence.train.optim import optimizers_of
from tuppence.train.step import MicroBatch, train_step
from tuppence.workers import Workers

MATMUL_SECONDS = 0.25
SETUP_SECONDS = 0.8  # of a run beyond its imports: plan, data, model, first batch
HOPELESS = 0.1  # of the best ceiling
DISK_BYTES = 32 << 20
ROUNDS = 4  # of a step at least; the first half of them warms up and is not counted
ENOUGH_SECONDS = 0.4  # of rounds: quick ones are repeated until then
PROBE_FLOPS = {"cpu": 4e11, "cuda": 1e14}  # a probe's micro-batch is cut to about this work


def pick_device() -> str:
    """The accelerator torch can use here, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """The card or the processor as the system names it."""
    return host.cpu_name() if device == "cpu" else torch.cuda.get_device_name()


def measure_machine(device: str, threads: int) -> Calibration:
    """Ceilings of this machine. About two seconds; the machine should have nothing else to do."""
    torch.set_num_threads(1)  # cores are used as workers, and so they are measured
    started = time.time() - host.process_start()
    rss = host.peak_rss_gib() or 0.4  # before the measurements fill memory of their own
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Calibration(
        version=hardware.CALIBRATION_VERSION,
        name=device_name(device),
        device=device,
        threads=threads,
        torch=torch.__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        matmul_tflops={name: _matmul_tflops(device, kind, threads) for name, kind in kinds.items()},
        memory_gbs=_memory_gbs(device),
        memory_gib=_memory_gib(device),
        disk_write_mbs=_disk_write_mbs(),
        startup_seconds=started + SETUP_SECONDS,
        startup_rss_gib=rss if device == "cpu" else 0.5,
        timings={},
    )


def measure_step(plan: Plan, calibration: Calibration) -> Calibration:
    """Time the plan's step in each way it can be run here, and keep the timings.

    A micro-batch too large for a few seconds is timed in part and scaled up.
    """
    micro = plan.step.micro_batch
    affordable = (
        PROBE_FLOPS[calibration.device] / plan.model.flops_per_token / plan.model.sequence_len
    )
    probed = max(1, min(micro, int(affordable)))
    timings = []
    gc.collect()
    gc.freeze()  # as the training loop does
    for precision, attention in _ways(plan, calibration):
        timing = _time_step(plan, calibration.device, precision, attention, probed)
        timings.append(
            dataclasses.replace(
                timing,
                micro_batch=micro,
                round_seconds=timing.round_seconds * micro / probed,
                forward_seconds=timing.forward_seconds * micro / probed,
            )
        )
    gc.unfreeze()
    key = hardware.shape_key(plan.model, micro, plan.step.workers)
    return calibration.with_timings(key, timings)


def _ways(plan: Plan, calibration: Calibration) -> list[tuple[str, str]]:
    """(precision, attention) worth timing: what the plan has, and what might be faster.

    Dropout has the one attention that can drop; a precision with a small part of the best matmul
    ceiling (bf16 on a CPU without units for it) is not tried.
    """
    attentions = {plan.machine.attention}
    if not plan.model.dropout:
        attentions.add("sdpa")
        if calibration.device == "cpu" and plan.model.sequence_len <= 1024:
            attentions.add("matmul")
    ceilings = calibration.matmul_tflops
    worth = {p for p, rate in ceilings.items() if rate > HOPELESS * max(ceilings.values())}
    return [(p, a) for p in sorted({plan.machine.precision, *worth}) for a in sorted(attentions)]


def _time_step(plan: Plan, device: str, precision: str, attention: str, micro: int) -> Timing:
    model = build(plan.model, attention=attention, device=device)
    model.init_weights(0)
    workers = Workers(model, count=plan.step.workers, device=device, precision=precision)
    optimizers = optimizers_of(model, plan.optimizer, workers)
    generator = torch.Generator().manual_seed(0)
    shape = (micro, plan.model.sequence_len)
    tokens = torch.randint(plan.model.vocab_size, shape, generator=generator).to(device)
    drawn = plan.model.dropout > 0 or plan.model.loop is not None
    key_B = torch.zeros(micro, dtype=torch.int64, device=device) if drawn else None
    loop = plan.model.loop
    draws = Draws(key_B, round(loop.mean_recurrence) if loop else None)
    one_round = [MicroBatch(tokens, tokens, draws)] * len(workers)

    def step(rounds: int) -> Callable[[], object]:
        batch = one_round * rounds
        return lambda: train_step(workers, optimizers, batch, factor=0.0, grad_clip=1.0)

    def forward(model: nn.Module, batch: MicroBatch) -> None:
        with torch.no_grad(), workers.autocast():
            model(batch.inputs, batch.targets, reduction="sum")

    one = _seconds(step(1), device)
    two = _seconds(step(2), device) if one < 1.0 else one * 1.9
    round_seconds = min(one, max(0.5 * one, two - one))
    return Timing(
        precision=precision,
        attention=attention,
        compile=False,
        micro_batch=micro,
        workers=len(workers),
        round_seconds=round_seconds,
        update_seconds=one - round_seconds,
        forward_seconds=_seconds(lambda: workers.map(forward, one_round), device),
        source="measured by calibrate",
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """Median seconds of `work` once it is warm; fewer rounds when it is slow.

    The first dozen quick steps of a process take up to twice as long as those that follow.
    """
    taken: list[float] = []
    while len(taken) < ROUNDS or sum(taken) < ENOUGH_SECONDS:
        _synchronise(device)
        started = time.perf_counter()
        work()
        _synchronise(device)
        taken.append(time.perf_counter() - started)
        if sum(taken) > 2.0:
            break
    counted = sorted(taken[len(taken) // 2 :])
    return counted[len(counted) // 2]


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _matmul_tflops(device: str, kind: torch.dtype, threads: int) -> float:
    """Square matmuls of three sizes, in 1e12 FLOPs a second: the sum of each core's best."""
    if device != "cpu":
        return max(_best_rate(device, kind, n) for n in (2048, 4096, 8192))
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        at_once = [
            sum(pool.map(lambda _, size=n: _best_rate(device, kind, size), range(threads)))
            for n in (256, 512, 1024)
        ]
    return max(at_once)


def _best_rate(device: str, kind: torch.dtype, n: int) -> float:
    best = 0.0
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    deadline = time.perf_counter() + MATMUL_SECONDS / 3
    while time.perf_counter() < deadline:
        _synchronise(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started) / 1e12)
    return best


def _memory_gbs(device: str) -> float:
    """Copy bandwidth in GB/s, read and write counted."""
    source = torch.zeros(1 << 25, device=device)  # 128 MiB: beyond the caches
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device)
    return 2 * source.numel() * 4 / seconds / 1e9


def _memory_gib(device: str) -> float:
    """Memory that a run may fill, in GiB; 8 are assumed where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return host.memory_gib() or 8.0


def _disk_write_mbs() -> float:
    """Sequential write into the user's cache folder, flushed, in MB/s."""
    block = os.urandom(1 << 20)
    folder = hardware.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as out:
        started = time.perf_counter()
        for _ in range(DISK_BYTES >> 20):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
        return DISK_BYTES / (time.perf_counter() - started) / 1e6

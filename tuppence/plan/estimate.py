"""What a plan will take: seconds, bytes, and from them steps, dollars and their intervals."""

import dataclasses
import math
from dataclasses import dataclass

from tuppence.config import (
    Budget,
    CadencePlan,
    DataPlan,
    Interval,
    MachinePlan,
    ModelPlan,
    Predicted,
    Run,
    StepPlan,
)
from tuppence.errors import DoesNotFit
from tuppence.plan import cost, loss
from tuppence.plan.asked import divisors, limit_seconds
from tuppence.plan.hardware import Calibration, Timing, shape_key

CPU_MICRO_TOKENS = 4096  # larger micro-batches leave the caches and gain nothing
MEMORY_SHARE = 0.8  # of the machine's memory that a chosen micro-batch may fill
ROOFLINE_SHARE = 0.4  # of the matmul ceiling, where a step was not measured
MEASURED_SPREAD = (0.85, 1.0, 1.3)  # 80% interval of a step's time around a measurement of it
ROOFLINE_SPREAD = (0.5, 1.0, 2.5)
DISPATCH_SECONDS = 0.003  # of one forward pass over one short sequence, whatever its width
HASH_BYTES_PER_SECOND = 1.2e9


@dataclass(frozen=True)
class UnitSeconds:
    """What each part of a run takes once, in seconds, on one machine."""

    startup: float
    step: float
    eval_token: float
    sample_token: float
    save: float


def unit_seconds(
    model: ModelPlan, step: StepPlan, timing: Timing, calibration: Calibration
) -> UnitSeconds:
    """From a step's timing to the parts of a run."""
    written = cost.checkpoint_bytes(model.params)
    write = written / (calibration.disk_write_mbs * 1e6) + 2 * written / HASH_BYTES_PER_SECOND
    return UnitSeconds(
        startup=calibration.startup_seconds,
        step=step.accumulation * timing.micro_seconds + timing.update_seconds,
        eval_token=timing.forward_seconds / (timing.micro_batch * model.sequence_len),
        sample_token=DISPATCH_SECONDS + timing.forward_seconds / timing.micro_batch,
        save=0.05 + write,
    )


# ---------------------------------------------------------------- how to run the step


def largest_micro_batch(
    run: Run, model: ModelPlan, sequences: int, calibration: Calibration
) -> int:
    """The largest divisor of the batch that fits the memory (and on a CPU, roughly, the caches)."""
    best = 1
    for micro in divisors(sequences):
        timing = choose_timing(run, model, micro, calibration)
        room = MEMORY_SHARE * calibration.memory_gib
        small = calibration.device != "cpu" or micro * model.sequence_len <= CPU_MICRO_TOKENS
        if small and peak_memory_gib(model, micro, timing, calibration) <= room:
            best = micro
    return best


def peak_memory_gib(
    model: ModelPlan, micro: int, timing: Timing, calibration: Calibration
) -> float:
    """Predicted peak: the process itself, weights and optimizer, one micro-batch's activations."""
    activations = cost.activation_bytes(
        tokens=micro * model.sequence_len,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        vocab_size=model.vocab_size,
        sequence_len=model.sequence_len,
        precision=timing.precision,
        attention=timing.attention,
    )
    cast = 2 * model.params_matmul if timing.precision == "bf16" else 0
    state = cost.state_bytes(model.params) + cast
    return calibration.startup_rss_gib + (state + activations) / cost.GIB


def choose_timing(run: Run, model: ModelPlan, micro: int, calibration: Calibration) -> Timing:
    """The fastest measured way to run this step that the person's choices allow.

    Where this shape was not measured, a roofline: a share of the measured matmul ceiling.
    """
    train = run.train
    ways = [
        t
        for t in calibration.timings.get(shape_key(model, micro), ())
        if train.precision in (None, t.precision) and train.attention in (None, t.attention)
    ]
    if not ways:
        return _roofline(run, model, micro, calibration)
    medians = [_median(t, ways) for t in ways]
    fastest = min(medians, key=lambda t: t.micro_seconds)
    return dataclasses.replace(fastest, compile=train.compile or False)


def _median(timing: Timing, ways: list[Timing]) -> Timing:
    """The middle one of all measurements of the same way to run the step."""
    way = (timing.precision, timing.attention)
    same = [t for t in ways if (t.precision, t.attention) == way]
    return sorted(same, key=lambda t: t.micro_seconds)[len(same) // 2]


def _roofline(run: Run, model: ModelPlan, micro: int, calibration: Calibration) -> Timing:
    ceilings = calibration.matmul_tflops
    precision = run.train.precision or max(ceilings, key=lambda p: ceilings[p])
    if precision not in ceilings:
        raise DoesNotFit(f"train.precision={precision}: not on {calibration.name}")
    on_cpu = calibration.device == "cpu"
    faster = "matmul" if on_cpu and precision == "bf16" and model.sequence_len <= 512 else "sdpa"
    flops = model.flops_per_token * micro * model.sequence_len
    micro_seconds = flops / (ROOFLINE_SHARE * ceilings[precision] * 1e12)
    return Timing(
        precision=precision,
        attention=run.train.attention or faster,
        compile=run.train.compile or False,
        micro_batch=micro,
        micro_seconds=micro_seconds,
        update_seconds=40 * model.params / (calibration.memory_gbs * 1e9),
        forward_seconds=micro_seconds / 3,
        source="roofline",
    )


# ---------------------------------------------------------------- what the whole run takes


@dataclass(frozen=True)
class _Outcome:
    """A whole run at one speed."""

    steps: float
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def predict(
    budget: Budget,
    data: DataPlan,
    model: ModelPlan,
    machine: MachinePlan,
    step: StepPlan,
    cadence: CadencePlan,
    units: UnitSeconds,
    *,
    basis: str,
    peak_gib: float,
) -> Predicted:
    """The run at its middle speed, and at both ends of the 80% interval."""
    limit = limit_seconds(budget, machine.usd_per_hour)
    spread = ROOFLINE_SPREAD if basis == "roofline" else MEASURED_SPREAD
    fast, mid, slow = (_run_at(factor, limit, step, cadence, units) for factor in spread)
    step_seconds = [factor * units.step for factor in spread]
    rates = [step.batch_tokens / s for s in reversed(step_seconds)]
    peak_flops = machine.peak_tflops * 1e12
    steps = [slow.steps, mid.steps, fast.steps]
    hours = sorted(outcome.seconds / 3600 for outcome in (fast, mid, slow))
    tokens = Interval(*(n * step.batch_tokens for n in steps))
    val_loss, source = loss.predict(data, model, tokens.mid)
    return Predicted(
        step_seconds=Interval(*step_seconds),
        tokens_per_second=Interval(*rates),
        mfu=Interval(*(rate * model.flops_per_token / peak_flops for rate in rates)),
        steps=Interval(*steps),
        tokens=tokens,
        hours=Interval(*hours),
        usd=Interval(*(h * machine.usd_per_hour for h in hours)),
        phase_seconds=mid.phases,
        peak_memory_gib=Interval(0.85 * peak_gib, peak_gib, 1.25 * peak_gib),
        checkpoint_bytes=cost.checkpoint_bytes(model.params),
        epochs=tokens.mid / data.train_tokens,
        val_loss=val_loss,
        val_loss_source=source,
        basis=basis,
    )


def _run_at(
    factor: float, limit: float, step: StepPlan, cadence: CadencePlan, units: UnitSeconds
) -> _Outcome:
    """The run if computing takes `factor` times what is expected, within `limit` seconds."""
    one_eval = cadence.eval_tokens * units.eval_token + cadence.sample_tokens * units.sample_token
    steps = math.inf if step.max_steps is None else step.max_steps
    evals = 1 / cadence.eval_every_progress if cadence.eval_every_progress else 1.0
    if cadence.eval_every_steps and not math.isinf(steps):
        evals = max(1.0, steps / cadence.eval_every_steps)
    phases = {
        "provision": units.startup,
        "train": 0.0,
        "evaluate": evals * one_eval * factor,
        "save": evals * units.save + cadence.finish_seconds,  # each better evaluation saves
    }
    if not math.isinf(limit):
        left = limit - sum(phases.values())
        steps = min(steps, max(0, math.floor(left / (units.step * factor))))
    return _Outcome(steps, {**phases, "train": steps * units.step * factor})

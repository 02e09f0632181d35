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
    TasksPlan,
)
from tuppence.plan import cost, loss
from tuppence.plan.asked import limit_seconds, optimizer_of
from tuppence.plan.hardware import Calibration, Timing, shape_key
from tuppence.plan.looks import looks
from tuppence.plan.memory import cpu_activation_bytes
from tuppence.plan.shapes import divisors, expected_flops, planned_shape
from tuppence.plan.spread import (
    RECOMPUTED,
    Spread,
    held_bytes,
    per_machine_gib,
    staged_gib,
    wire_seconds,
)
from tuppence.plan.tasks import FIXED_ROWS, multiples, rate, run_seconds, step_seconds

CPU_MICRO_TOKENS = 4096  # larger micro-batches leave the caches and gain nothing
MEMORY_SHARE = 0.8  # of the machine's memory that a chosen micro-batch may fill
ROOFLINE_SHARE = 0.4  # of the matmul ceiling, where a step was not measured
MEASURED_SPREAD = (0.85, 1.0, 1.3)  # 80% interval of a step's time around a measurement of it
ROOFLINE_SPREAD = (0.5, 1.0, 2.5)
DISPATCH_SECONDS = 0.001  # of one layer over one token, whatever its width
HASH_BYTES_PER_SECOND = 1.2e9
PREPARED_SECONDS = 0.1
LIBRARIES_GIB = 0.10  # what kernels and allocators add to the bare process in the first steps
FRAGMENTED = 1.22  # of activations: what glibc holds for them on several threads (docs/LOG.md)
PREPARE_TOKENS_PER_SECOND = 1.5e6  # two cores, GPT-2 tokens (docs/BENCHMARKS.md)

ALONE = Spread()


@dataclass(frozen=True)
class UnitSeconds:
    """What each part of a run takes once, in seconds, on one machine."""

    startup: float
    step: float
    eval_token: float
    sample_token: float
    save: float


def unit_seconds(
    model: ModelPlan,
    step: StepPlan,
    optimizer: str,
    timing: Timing,
    calibration: Calibration,
    spread: Spread = ALONE,
) -> UnitSeconds:
    """From a step's timing to the parts of a run."""
    sequences = timing.micro_batch * timing.workers * spread.ranks
    written = saved_bytes(model, optimizer)
    wire = wire_seconds(
        model, spread, device=calibration.device, accumulation=step.accumulation // spread.ranks
    )
    again = RECOMPUTED if spread.recompute else 1.0
    usual = expected_flops(model) / model.flops_per_token  # it was timed at a looped model's median
    write = written / (calibration.disk_write_mbs * 1e6) + 2 * written / HASH_BYTES_PER_SECOND
    return UnitSeconds(
        startup=calibration.startup_seconds,
        step=rounds(step) * timing.round_seconds * usual * again + timing.update_seconds + wire,
        eval_token=timing.forward_seconds / sequences / model.sequence_len,
        sample_token=_sample_seconds(model, calibration),
        save=0.05 + write,
    )


def _sample_seconds(model: ModelPlan, calibration: Calibration) -> float:
    """Of one more token with cached keys: every layer is called, every weight read, once."""
    shape = planned_shape(model)
    read = sum(4 * m.k * m.n * m.runs for m in shape.matmuls) / (calibration.memory_gbs * 1e9)
    return DISPATCH_SECONDS * (2 + shape.layers_run) + read


def saved_bytes(model: ModelPlan, optimizer: str) -> int:
    """A checkpoint's weights and moments."""
    moved = planned_shape(model).params_muon if optimizer == "muon" else 0
    return cost.checkpoint_bytes(model.params, muon_params=moved)


def rounds(step: StepPlan) -> int:
    """How many micro-batches the busiest worker runs in a step."""
    return math.ceil(step.accumulation / (step.workers * step.ranks))


# ---------------------------------------------------------------- how to run the step


def workers_of(run: Run, micro: int, sequences: int, calibration: Calibration) -> int:
    """A core each, as far as there are micro-batches of a rank's `sequences`; one on a GPU, where
    torch compiles, and where no copy of the model may share its weights."""
    if calibration.device != "cpu" or run.train.compile or run.train.parallel == "fsdp":
        return 1
    return min(calibration.threads, sequences // micro)


def largest_micro_batch(
    run: Run, model: ModelPlan, sequences: int, calibration: Calibration, spread: Spread = ALONE
) -> int:
    """The largest divisor of a rank's `sequences` that fits the memory.

    On a CPU also: small enough that every core has one, and that it stays near the caches.
    """
    best = 1
    for micro in divisors(sequences):
        workers = workers_of(run, micro, sequences, calibration)
        timing = choose_timing(run, model, micro, workers, calibration)
        peak_gib = peak_memory_gib(model, optimizer_of(run), timing, calibration, spread)
        together = per_machine_gib(peak_gib, spread, device=calibration.device)
        fits = together <= MEMORY_SHARE * calibration.memory_gib
        if calibration.device == "cpu":
            cores = 1 if run.train.compile else min(calibration.threads, sequences)
            fits = fits and micro * model.sequence_len <= CPU_MICRO_TOKENS and workers >= cores
        if fits:
            best = micro
    return best


def peak_memory_gib(
    model: ModelPlan,
    optimizer: str,
    timing: Timing,
    calibration: Calibration,
    spread: Spread = ALONE,
) -> float:
    """Predicted peak of a rank: the process, weights and optimizer, a checkpoint that is being
    written, and for each worker its gradients, its cast weights and one micro-batch's activations:
    of a looped model at its most iterations, which a run of some hundred steps will draw."""
    shape = planned_shape(model, recurrence=model.loop.max_recurrence if model.loop else None)
    activations = cpu_activation_bytes(
        shape,
        tokens=timing.micro_batch * model.sequence_len,
        precision=timing.precision,
        attention=timing.attention,
        recompute=spread.recompute,
    )
    cast = 2 * model.params_matmul if timing.precision == "bf16" else 0
    state = held_bytes(model, spread, muon=optimizer == "muon")
    state += 4 * model.params * (timing.workers - 1)  # the other workers' gradients
    each = timing.workers * (cast + FRAGMENTED * activations)
    staged = staged_gib(saved_bytes(model, optimizer), spread)
    held = calibration.startup_rss_gib + LIBRARIES_GIB + (state + each) / cost.GIB
    return held + (staged if calibration.device == "cpu" else 0.0)


def choose_timing(
    run: Run, model: ModelPlan, micro: int, workers: int, calibration: Calibration
) -> Timing:
    """The fastest measured way to run this step that the person's choices allow.

    Where this shape was not measured, a roofline: a share of the measured matmul ceiling.
    """
    ways = ways_to_run(run, model, micro, workers, calibration)
    if not ways:
        return _roofline(run, model, micro, workers, calibration)
    fastest = min(ways, key=lambda t: t.round_seconds)
    return dataclasses.replace(fastest, compile=run.train.compile or False)


def ways_to_run(
    run: Run, model: ModelPlan, micro: int, workers: int, calibration: Calibration
) -> list[Timing]:
    """What was measured of this step and the person's choices allow; of each way the median."""
    ways: dict[tuple[str, str], list[Timing]] = {}
    for timing in calibration.timings.get(shape_key(model, micro, workers), ()):
        wanted = (run.train.precision, run.train.attention)
        way = (timing.precision, timing.attention)
        if all(ask in (None, have) for ask, have in zip(wanted, way, strict=True)):
            ways.setdefault(way, []).append(timing)
    by_time = (sorted(same, key=lambda t: t.round_seconds) for same in ways.values())
    return [same[len(same) // 2] for same in by_time]


def _roofline(
    run: Run, model: ModelPlan, micro: int, workers: int, calibration: Calibration
) -> Timing:
    ceilings = calibration.matmul_tflops
    precision = run.train.precision or max(ceilings, key=lambda p: ceilings[p])
    on_cpu = calibration.device == "cpu"
    faster = "matmul" if on_cpu and precision == "bf16" and model.sequence_len <= 512 else "sdpa"
    if model.dropout:
        faster = "matmul"
    share = ROOFLINE_SHARE * workers / (calibration.threads if on_cpu else 1)
    flops = model.flops_per_token * micro * workers * model.sequence_len
    round_seconds = flops / (share * ceilings[precision] * 1e12)
    return Timing(
        precision=precision,
        attention=run.train.attention or faster,
        compile=run.train.compile or False,
        micro_batch=micro,
        workers=workers,
        round_seconds=round_seconds,
        update_seconds=40 * model.params / (calibration.memory_gbs * 1e9),
        forward_seconds=round_seconds / 3,
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
    tasks: TasksPlan | None,
    optimizer: str,
    units: UnitSeconds,
    expectation: loss.Expectation,
    *,
    basis: str,
    peak_gib: float,
) -> Predicted:
    """The run at its middle speed, and at both ends of the 80% interval."""
    limit = limit_seconds(budget, machine.usd_per_hour)
    spread = ROOFLINE_SPREAD if basis == "roofline" else MEASURED_SPREAD
    prepare = _prepare_seconds(data)
    each = step.batch_tokens / data.train_tokens
    fast, mid, slow = (
        _run_at(f, limit, step, cadence, tasks, units, prepare, epochs=each) for f in spread
    )
    seconds = [factor * units.step for factor in spread]
    rates = [step.batch_tokens / s for s in reversed(seconds)]
    peak_flops = machine.peak_tflops * 1e12
    steps = [slow.steps, mid.steps, fast.steps]
    hours = [min(limit, outcome.seconds) / 3600 for outcome in (fast, mid, slow)]
    hours = [min(hours), hours[1], max(hours)]
    tokens = Interval(*(float(n * step.batch_tokens) for n in steps))
    val_loss, source = _expected_loss(expectation, tokens)
    return Predicted(
        step_seconds=Interval(*seconds),
        tokens_per_second=Interval(*rates),
        mfu=Interval(*(rate * model.flops_per_token / peak_flops for rate in rates)),
        steps=Interval(*map(float, steps)),
        tokens=tokens,
        hours=Interval(*hours),
        usd=Interval(*(h * machine.usd_per_hour for h in hours)),
        phase_seconds=mid.phases,
        eval_seconds=_eval_seconds(cadence, units),
        save_seconds=units.save,
        peak_memory_gib=Interval(0.85 * peak_gib, peak_gib, 1.25 * peak_gib),
        checkpoint_bytes=saved_bytes(model, optimizer),
        disk_bytes=_disk_bytes(saved_bytes(model, optimizer), cadence, mid.steps),
        epochs=tokens.mid / data.train_tokens,
        val_loss=val_loss,
        val_loss_source=source,
        basis=basis,
        fixed_seconds=_fixed_seconds(cadence, units),
    )


def _expected_loss(expectation: loss.Expectation, tokens: Interval) -> tuple[Interval | None, str]:
    """The loss after the middle of `tokens`; its interval covers that they are an interval."""
    found, why = expectation.at(tokens.mid)
    if found is None:
        return None, why
    ends = [expectation.at(n)[0] or found for n in (tokens.low, tokens.high)]
    width = math.hypot(found.mid - found.low, (ends[0].mid - ends[1].mid) / 2)
    return Interval(found.mid - width, found.mid, found.mid + width), why


def _disk_bytes(each: int, cadence: CadencePlan, steps: float) -> int:
    """What checkpoints take at most: the newest, the best, the one being written, milestones."""
    milestones = 0 if cadence.keep_every_steps is None else int(steps // cadence.keep_every_steps)
    asked = each * (cadence.keep_last + 2 + milestones)
    return asked if cadence.keep_bytes is None else min(asked, cadence.keep_bytes)


def _prepare_seconds(data: DataPlan) -> float:
    """Seconds until shards are there; those that are there are found, and their inputs hashed."""
    if data.inputs_sha256 is not None:
        return PREPARED_SECONDS
    return PREPARED_SECONDS + (data.train_tokens + data.val_tokens) / PREPARE_TOKENS_PER_SECOND


def _eval_seconds(cadence: CadencePlan, units: UnitSeconds) -> float:
    return cadence.eval_tokens * units.eval_token + cadence.sample_tokens * units.sample_token


def _fixed_seconds(cadence: CadencePlan, units: UnitSeconds) -> float:
    return FIXED_ROWS * cadence.fixed_tokens * units.sample_token


def _run_at(
    factor: float,
    limit: float,
    step: StepPlan,
    cadence: CadencePlan,
    tasks: TasksPlan | None,
    units: UnitSeconds,
    prepare: float,
    *,
    epochs: float,
) -> _Outcome:
    """The run if computing takes `factor` times what is expected, within `limit` seconds. A step is
    so many `epochs`.

    Tasks come with an evaluation of the loss, and all come once more at the end. Evaluations that
    only look whether validation has turned do not sample.
    """
    one_step = units.step * factor
    one_eval = _eval_seconds(cadence, units) * factor
    suites = () if tasks is None else tasks.suites
    every = [suite.every_steps for suite in suites if suite.every_steps]
    by_progress = 1  # evaluations that do not count steps: the last, and those at marks
    if cadence.eval_every_steps:
        every.append(cadence.eval_every_steps)
    else:
        assert cadence.eval_every_progress is not None
        by_progress = round(1 / cadence.eval_every_progress)
    side = (one_eval + units.save) * rate(every)  # a step's share of what is due between steps
    side += step_seconds(tasks) * factor
    last = (_fixed_seconds(cadence, units) + run_seconds(tasks, 1)) * factor
    ends = units.startup + prepare + cadence.finish_seconds + last
    steps = math.inf if step.max_steps is None else step.max_steps
    left = limit - ends - by_progress * (one_eval + units.save)
    one_look = cadence.eval_tokens * units.eval_token * factor
    most = min(steps, _fitting(left, one_step + side))
    seen = looks(cadence.eval_growth, epochs=most * epochs, marks=by_progress)
    steps = min(steps, _fitting(left - seen * (one_look + units.save), one_step + side))
    evals = by_progress + multiples(steps - 1, every)
    between = (run_seconds(tasks, steps) - run_seconds(tasks, 1)) * factor
    phases = {
        "provision": units.startup,
        "prepare": prepare,
        "train": steps * one_step,
        "evaluate": evals * one_eval + seen * one_look + last + between,
        # each better evaluation saves
        "save": (evals + seen) * units.save + cadence.finish_seconds,
    }
    return _Outcome(steps, phases)


def _fitting(seconds: float, each: float) -> float:
    """How many whole steps fit; infinite where nothing limits them."""
    return seconds if math.isinf(seconds) else max(0, math.floor(seconds / each))

"""Turns a `Run` into a `Plan` for one machine: every number explicit, nothing decided later.

    budget ──▶ seconds left after start-up, evaluations, saves ──▶ steps ──▶ tokens ──▶ loss

Pure arithmetic over three inputs: what was asked, what the corpus is, what the machine was
measured to do. Raises UserError where values contradict each other and DoesNotFit where they
cannot be had here; everything merely unwise is a warning with a code.
"""

import dataclasses
import math
from typing import Any

from tuppence.config import (
    Budget,
    CadencePlan,
    DataPlan,
    Interval,
    MachinePlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    Predicted,
    Run,
    SchedulePlan,
    StepPlan,
    Warning,
)
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan import cost, loss
from tuppence.plan.hardware import Calibration, Timing, shape_key

ASSUMED_USD_PER_HOUR = 0.40
FINISH_SECONDS = 0.8  # receipt and exit, charged in advance
EVAL_SHARE = 0.04  # of a time budget that evaluations may take together
MAX_EVALS = 10
SAVE_SECONDS = 60.0  # default distance of saves: what a kill can cost
CPU_MICRO_TOKENS = 4096  # larger micro-batches leave the caches and gain nothing
MEMORY_SHARE = 0.8  # of the machine's memory that a plan may fill
ROOFLINE_SHARE = 0.4  # of the matmul ceiling, where a step was not measured


def solve(run: Run, data: DataPlan, calibration: Calibration) -> Plan:
    """The plan of `run` on this machine, whose corpus is `data`."""
    check_supported(run)
    budget = check_budget(run.budget)
    model = solve_model(run, data)
    step, timing, warnings = _solve_step(run, data, model, calibration)
    machine = _solve_machine(run, calibration, timing, step)
    schedule, optimizer = _solve_recipe(run)
    cadence = _solve_cadence(run, data, model, step, machine, budget, timing, calibration)
    predicted = _predict(budget, data, model, machine, step, cadence, timing, calibration)
    step = dataclasses.replace(step, max_steps=_max_steps(budget, step))
    warnings += _warnings(run, budget, data, machine, step, cadence, predicted)
    _check_affordable(budget, machine, predicted)
    return Plan(
        version=1,
        name=run.name or (run.recipe or "run").rpartition(":")[2],
        budget=budget,
        model=model,
        data=data,
        machine=machine,
        optimizer=optimizer,
        schedule=schedule,
        step=step,
        cadence=cadence,
        predicted=predicted,
        warnings=tuple(warnings),
    )


def limit_seconds(budget: Budget, usd_per_hour: float) -> float:
    """Charged seconds that a budget allows; infinite where only tokens or steps limit it."""
    by_usd = budget.usd / usd_per_hour * 3600 if budget.usd is not None else math.inf
    by_hours = budget.hours * 3600 if budget.hours is not None else math.inf
    return min(by_usd, by_hours)


# ---------------------------------------------------------------- checks of what was asked


def check_supported(run: Run) -> None:
    """Refuse what this version cannot do, rather than do something else in silence."""
    only: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("model.family", run.model.family, ("gpt2",)),
        ("train.optimizer", run.train.optimizer, ("adamw",)),
        ("train.schedule", run.train.schedule, ("cosine", "wsd")),
        ("train.precision", run.train.precision, ("fp32", "bf16")),
        ("train.attention", run.train.attention, ("sdpa", "matmul")),
        ("train.parallel", run.train.parallel, ("none",)),
        ("train.activation_checkpointing", run.train.activation_checkpointing, (False,)),
        ("machine.gpu_count", run.machine.gpu_count, (0, 1)),
        ("machine.nodes", run.machine.nodes, (1,)),
        ("model.depth", run.model.depth, ()),
    ]
    for key, value, allowed in only:
        if value is not None and value not in allowed:
            there_are = " or ".join(str(a) for a in allowed) or "only model.n_layer and the like"
            raise UserError(f"{key}={value}: this version has {there_are}")
    elsewhere = {
        "machine.cloud": run.machine.cloud,
        "machine.instance_type": run.machine.instance_type,
        "machine.spot": run.machine.spot or None,
    }
    for key, value in elsewhere.items():
        if value is not None:
            raise DoesNotFit(
                f"{key}={value}: this version trains on this machine only; leave it out"
            )


def check_budget(budget: Budget) -> Budget:
    """At least one limit, all of them positive."""
    limits = {k: v for k, v in dataclasses.asdict(budget).items() if v is not None}
    for key, value in limits.items():
        if value <= 0:
            raise UserError(f"budget.{key}={value:g}: a budget is more than zero")
    if not limits:
        raise UserError("no budget: say budget.usd, budget.hours, budget.tokens or budget.steps")
    return budget


def solve_model(run: Run, data: DataPlan) -> ModelPlan:
    """The model with its exact counts. Raises UserError where dimensions do not divide."""
    asked = run.model
    needed = {k: getattr(asked, k) for k in ("n_layer", "n_head", "n_embd", "sequence_len")}
    for key, value in needed.items():
        if value is None:
            raise UserError(f"model.{key} is not set: the recipe or you must say it")
        if value < 1:
            raise UserError(f"model.{key}={value}: at least 1")
    heads, width = needed["n_head"], needed["n_embd"]
    if width % heads:
        down, up = width // heads * heads, (width // heads + 1) * heads
        near = up if up - width <= width - down or not down else down
        raise UserError(
            f"model.n_embd={width} does not divide into model.n_head={heads} heads; "
            f"the nearest width that does is {near}"
        )
    if asked.n_kv_head not in (None, heads):
        raise UserError(f"model.n_kv_head={asked.n_kv_head}: gpt2 has as many as n_head={heads}")
    vocab = asked.vocab_size or data.vocab_size
    if vocab < data.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab}: tokenizer {data.tokenizer} has {data.vocab_size} tokens; "
            f"at least that many, or leave it out"
        )
    dropout = asked.dropout or 0.0
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout:g}: a rate from 0 to below 1")
    tied = True if asked.tied_head is None else asked.tied_head
    bias = bool(asked.bias)
    layers, length = needed["n_layer"], needed["sequence_len"]
    matmul = cost.gpt2_params_matmul(n_layer=layers, n_embd=width, vocab_size=vocab)
    return ModelPlan(
        family=asked.family or "gpt2",
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        vocab_size=vocab,
        sequence_len=length,
        bias=bias,
        tied_head=tied,
        dropout=dropout,
        params=cost.gpt2_params(
            n_layer=layers,
            n_embd=width,
            vocab_size=vocab,
            sequence_len=length,
            bias=bias,
            tied_head=tied,
        ),
        params_matmul=matmul,
        flops_per_token=cost.flops_per_token(
            params_matmul=matmul, n_layer=layers, n_embd=width, sequence_len=length
        ),
    )


# ---------------------------------------------------------------- the step


def _solve_step(
    run: Run, data: DataPlan, model: ModelPlan, calibration: Calibration
) -> tuple[StepPlan, Timing, list[Warning]]:
    length = model.sequence_len
    batch_tokens = run.train.batch_tokens or 16 * length
    if batch_tokens < 1 or batch_tokens % length:
        near = max(1, round(batch_tokens / length)) * length
        raise UserError(
            f"train.batch_tokens={batch_tokens} is not a multiple of model.sequence_len={length}; "
            f"the nearest is {near}"
        )
    sequences = batch_tokens // length
    if data.train_tokens < length + 2:
        raise UserError(
            f"data.source={data.source}: {data.train_tokens:,} training tokens are less than one "
            f"sequence of {length} + 1; give more text or lower model.sequence_len"
        )
    if data.exact and data.train_tokens < batch_tokens + 1:
        raise UserError(
            f"data.source={data.source}: {data.train_tokens:,} training tokens are less than one "
            f"batch of {batch_tokens:,}; give more text or lower train.batch_tokens"
        )
    micro = run.train.micro_batch
    if micro is None:
        micro = _largest_micro(run, model, sequences, calibration)
    elif micro < 1 or sequences % micro:
        near = min(divisors(sequences), key=lambda d: (abs(d - micro), d))
        raise UserError(
            f"train.micro_batch={micro} does not divide the batch of {sequences} sequences "
            f"(train.batch_tokens={batch_tokens} / model.sequence_len={length}); nearest is {near}"
        )
    timing = choose_timing(run, model, micro, calibration)
    needed = peak_memory_gib(model, micro, timing, calibration)
    if needed > calibration.memory_gib:
        raise DoesNotFit(
            f"train.micro_batch={micro} needs {needed:.1f} GiB, this machine has "
            f"{calibration.memory_gib:.1f}; lower train.micro_batch or the model"
        )
    step = StepPlan(
        batch_tokens=batch_tokens,
        batch_sequences=sequences,
        micro_batch=micro,
        accumulation=sequences // micro,
        max_steps=None,
        seed=run.train.seed if run.train.seed is not None else 1337,
    )
    return step, timing, []


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _largest_micro(run: Run, model: ModelPlan, sequences: int, calibration: Calibration) -> int:
    """The largest divisor of the batch that fits the memory (and on a CPU, roughly, the caches)."""
    best = 1
    for micro in divisors(sequences):
        timing = choose_timing(run, model, micro, calibration)
        fits = peak_memory_gib(model, micro, timing, calibration) <= (
            MEMORY_SHARE * calibration.memory_gib
        )
        small = calibration.device != "cpu" or micro * model.sequence_len <= CPU_MICRO_TOKENS
        if fits and small:
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
    ways = [
        t
        for t in calibration.timings.get(shape_key(model, micro), ())
        if run.train.precision in (None, t.precision)
        and run.train.attention in (None, t.attention)
        and (run.train.compile or False) == t.compile
    ]
    if ways:
        best = min(ways, key=_micro_median(ways))
        return dataclasses.replace(best, micro_seconds=_micro_median(ways)(best))
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


def _micro_median(ways: list[Timing]) -> Any:
    """Median micro-batch seconds over the measurements of the same way to run the step."""

    def median(timing: Timing) -> float:
        same = sorted(
            t.micro_seconds
            for t in ways
            if (t.precision, t.attention) == (timing.precision, timing.attention)
        )
        return same[len(same) // 2]

    return median


def _solve_machine(
    run: Run, calibration: Calibration, timing: Timing, step: StepPlan
) -> MachinePlan:
    if run.machine.gpu not in (None, "cpu") and calibration.device == "cpu":
        raise DoesNotFit(
            f"machine.gpu={run.machine.gpu}: this machine has no CUDA GPU that torch can use; "
            f"leave it out to train on the CPU"
        )
    price = run.machine.usd_per_hour
    if price is not None and price <= 0:
        raise UserError(f"machine.usd_per_hour={price:g}: a price is more than zero")
    return MachinePlan(
        device=calibration.device,
        name=calibration.name,
        threads=calibration.threads,
        precision=timing.precision,
        precision_why=_why_precision(run, calibration, timing),
        attention=timing.attention,
        compile=timing.compile,
        peak_tflops=calibration.matmul_tflops[timing.precision],
        peak_source=f"measured {timing.precision} matmul ceiling of this machine",
        usd_per_hour=price if price is not None else ASSUMED_USD_PER_HOUR,
        price_source="machine.usd_per_hour" if price is not None else "assumed",
        deterministic=calibration.device == "cpu",
    )


def _why_precision(run: Run, calibration: Calibration, timing: Timing) -> str:
    if run.train.precision is not None:
        return "asked"
    if timing.source == "roofline":
        rates = calibration.matmul_tflops
        listed = ", ".join(f"{p} {rate:.2f}" for p, rate in rates.items())
        return f"highest measured matmul TFLOPS here: {listed}"
    return f"the faster step here, measured ({timing.source})"


def _solve_recipe(run: Run) -> tuple[SchedulePlan, OptimizerPlan]:
    train = run.train

    def fraction(key: str, value: float | None, default: float) -> float:
        value = default if value is None else value
        if not 0 <= value <= 1:
            raise UserError(f"train.{key}={value:g}: a fraction from 0 to 1")
        return value

    def positive(key: str, value: float | None, default: float) -> float:
        value = default if value is None else value
        if value < 0:
            raise UserError(f"train.{key}={value:g}: not below 0")
        return value

    schedule = SchedulePlan(
        shape=train.schedule or "cosine",
        warmup=fraction("warmup", train.warmup, 0.02),
        decay=fraction("decay", train.decay, 0.4),
        floor=fraction("lr_floor", train.lr_floor, 0.0),
    )
    if schedule.shape == "wsd" and schedule.warmup + schedule.decay > 1:
        raise UserError(
            f"train.warmup={schedule.warmup:g} + train.decay={schedule.decay:g} is more than the "
            f"whole run; the largest decay is {1 - schedule.warmup:g}"
        )
    optimizer = OptimizerPlan(
        name="adamw",
        learning_rate=positive("learning_rate", train.learning_rate, 1e-3),
        weight_decay=positive("weight_decay", train.weight_decay, 0.1),
        beta1=fraction("beta1", train.beta1, 0.9),
        beta2=fraction("beta2", train.beta2, 0.95),
        eps=1e-8,
        grad_clip=positive("grad_clip", train.grad_clip, 1.0),
    )
    return schedule, optimizer


# ---------------------------------------------------------------- cadence and prediction


def eval_seconds(tokens: int, model: ModelPlan, timing: Timing) -> float:
    """Predicted seconds of one evaluation over `tokens` validation tokens."""
    return tokens / (timing.micro_batch * model.sequence_len) * timing.forward_seconds


def step_seconds(step: StepPlan, timing: Timing) -> float:
    """Predicted seconds of one optimizer step."""
    return step.accumulation * timing.micro_seconds + timing.update_seconds


def sample_seconds(tokens: int, timing: Timing) -> float:
    """Predicted seconds to sample: one sequence at a time costs a few milliseconds of dispatch."""
    per_token = 0.003 + timing.forward_seconds / timing.micro_batch
    return tokens * per_token


def save_seconds(model: ModelPlan, calibration: Calibration) -> float:
    """Predicted seconds to write, hash and verify one checkpoint."""
    written = cost.checkpoint_bytes(model.params)
    return 0.05 + written / (calibration.disk_write_mbs * 1e6) + 2 * written / 1.2e9


def _solve_cadence(
    run: Run,
    data: DataPlan,
    model: ModelPlan,
    step: StepPlan,
    machine: MachinePlan,
    budget: Budget,
    timing: Timing,
    calibration: Calibration,
) -> CadencePlan:
    train = run.train
    for key in ("eval_every", "eval_tokens", "save_every", "sample_tokens"):
        value = getattr(train, key)
        if value is not None and value < (0 if key == "sample_tokens" else 1):
            raise UserError(f"train.{key}={value}: at least 1")
    seconds = limit_seconds(budget, machine.usd_per_hour)
    if math.isinf(seconds):
        assert (steps := _max_steps(budget, step)) is not None
        seconds = steps * step_seconds(step, timing)
    whole = eval_seconds(data.val_tokens, model, timing)
    part = min(1.0, EVAL_SHARE / 2 * seconds / whole) if whole > 0 else 1.0
    rows = max(1, int(part * data.val_tokens / model.sequence_len))
    tokens = data.val_tokens if part == 1.0 else rows * model.sequence_len
    tokens = min(train.eval_tokens or tokens, data.val_tokens)
    one = max(eval_seconds(tokens, model, timing), 1e-9)
    count = max(1, min(MAX_EVALS, int(EVAL_SHARE * seconds / one)))
    return CadencePlan(
        eval_every_steps=train.eval_every,
        eval_every_progress=None if train.eval_every else 1 / count,
        eval_tokens=tokens,
        eval_batch=max(1, min(CPU_MICRO_TOKENS // model.sequence_len, 64)),
        save_every_steps=train.save_every,
        save_every_seconds=None if train.save_every else SAVE_SECONDS,
        finish_seconds=FINISH_SECONDS,
        sample_prompt="\n" if train.sample_prompt is None else train.sample_prompt,
        sample_tokens=_sample_tokens(train.sample_tokens, seconds, timing),
    )


def _sample_tokens(asked: int | None, seconds: float, timing: Timing) -> int:
    """As asked, or 200 tokens where that is at most a hundredth of the run."""
    if asked is not None:
        return asked
    affordable = 0.01 * seconds / sample_seconds(1, timing)
    return int(min(200, affordable))


def _max_steps(budget: Budget, step: StepPlan) -> int | None:
    limits = []
    if budget.steps is not None:
        limits.append(budget.steps)
    if budget.tokens is not None:
        limits.append(budget.tokens // step.batch_tokens)
    return min(limits) if limits else None


def _predict(
    budget: Budget,
    data: DataPlan,
    model: ModelPlan,
    machine: MachinePlan,
    step: StepPlan,
    cadence: CadencePlan,
    timing: Timing,
    calibration: Calibration,
) -> Predicted:
    mid = step_seconds(step, timing)
    factors = (0.85, 1.0, 1.3) if timing.source != "roofline" else (0.5, 1.0, 2.5)
    seconds = Interval(*(f * mid for f in factors))
    one_eval = eval_seconds(cadence.eval_tokens, model, timing)
    one_eval += sample_seconds(cadence.sample_tokens, timing)
    fixed = calibration.startup_seconds + cadence.finish_seconds

    def run_at(step_time: float) -> tuple[float, float, dict[str, float]]:
        """(steps, charged seconds, seconds by phase) if a step takes `step_time`."""
        slower = step_time / mid
        save = save_seconds(model, calibration)
        limit = limit_seconds(budget, machine.usd_per_hour)
        most = _max_steps(budget, step)
        steps: float = math.inf if most is None else most
        evals = 1 / cadence.eval_every_progress if cadence.eval_every_progress else 1.0
        saves = evals  # each better evaluation saves; time-based saves fall between
        if cadence.eval_every_steps and not math.isinf(steps):
            evals = max(1.0, steps / cadence.eval_every_steps)
        side = evals * one_eval * slower + saves * save
        if not math.isinf(limit):
            steps = min(steps, max(0, math.floor((limit - fixed - side) / step_time)))
        phases = {
            "provision": calibration.startup_seconds,
            "train": steps * step_time,
            "evaluate": evals * one_eval * slower,
            "save": saves * save + cadence.finish_seconds,
        }
        return steps, sum(phases.values()), phases

    at = {name: run_at(getattr(seconds, name)) for name in ("low", "mid", "high")}
    steps = Interval(at["high"][0], at["mid"][0], at["low"][0])
    charged = sorted(at[name][1] for name in at)
    hours = Interval(*(c / 3600 for c in charged))
    tokens_per_second = Interval(*(step.batch_tokens / s for s in _descending(seconds)))
    mfu = Interval(
        *(
            rate * model.flops_per_token / (machine.peak_tflops * 1e12)
            for rate in dataclasses.astuple(tokens_per_second)
        )
    )
    tokens = Interval(*(s * step.batch_tokens for s in dataclasses.astuple(steps)))
    memory = peak_memory_gib(model, step.micro_batch, timing, calibration)
    val_loss, source = loss.predict(data, model, tokens.mid)
    return Predicted(
        step_seconds=seconds,
        tokens_per_second=tokens_per_second,
        mfu=mfu,
        steps=steps,
        tokens=tokens,
        hours=hours,
        usd=Interval(*(h * machine.usd_per_hour for h in dataclasses.astuple(hours))),
        phase_seconds=at["mid"][2],
        peak_memory_gib=Interval(0.85 * memory, memory, 1.25 * memory),
        checkpoint_bytes=cost.checkpoint_bytes(model.params),
        epochs=tokens.mid / max(1, data.train_tokens),
        val_loss=val_loss,
        val_loss_source=source,
        basis=timing.source,
    )


def _descending(interval: Interval) -> tuple[float, float, float]:
    return interval.high, interval.mid, interval.low


# ---------------------------------------------------------------- refusals and warnings


def _check_affordable(budget: Budget, machine: MachinePlan, predicted: Predicted) -> None:
    if predicted.steps.mid >= 1:
        return
    if math.isinf(limit_seconds(budget, machine.usd_per_hour)):
        raise DoesNotFit(f"budget.tokens={budget.tokens}: less than one batch of tokens")
    limit = limit_seconds(budget, machine.usd_per_hour)
    needed = sum(predicted.phase_seconds.values()) + predicted.step_seconds.mid
    usd = needed / 3600 * machine.usd_per_hour
    raise DoesNotFit(
        f"the budget buys {limit:.1f} s at ${machine.usd_per_hour:g}/h; start-up, one step of "
        f"{predicted.step_seconds.mid:.2f} s, evaluation, save and receipt take about "
        f"{needed:.1f} s: at least budget.usd={usd:.2g} or budget.hours={needed / 3600:.2g}"
    )


def _warnings(
    run: Run,
    budget: Budget,
    data: DataPlan,
    machine: MachinePlan,
    step: StepPlan,
    cadence: CadencePlan,
    predicted: Predicted,
) -> list[Warning]:
    found = []
    if machine.price_source == "assumed":
        found.append(
            Warning(
                "assumed_price",
                f"no price is known for this machine: ${machine.usd_per_hour:.2f}/h is assumed; "
                f"say machine.usd_per_hour=... for yours",
            )
        )
    if predicted.epochs > 16:
        text = f"{predicted.epochs:.0f} epochs: more than 16 teach next to nothing new"
        found.append(Warning("epochs_16", text))
    elif predicted.epochs > 4:
        text = f"{predicted.epochs:.1f} epochs: beyond 4, repeated text is worth less than new text"
        found.append(Warning("epochs_4", text))
    if math.isinf(limit_seconds(budget, machine.usd_per_hour)):
        text = (
            "no wall-clock stop: the budget is in tokens or steps; add budget.usd or budget.hours"
        )
        found.append(Warning("no_wall_clock_stop", text))
    if budget.tokens is not None and step.max_steps and budget.tokens % step.batch_tokens:
        whole = budget.tokens // step.batch_tokens * step.batch_tokens
        text = (
            f"budget.tokens={budget.tokens:,} is {whole:,} in whole batches; the rest is not used"
        )
        found.append(Warning("tokens_floor", text))
    if cadence.eval_tokens < data.val_tokens:
        part = cadence.eval_tokens / data.val_tokens
        text = (
            f"evaluations use {cadence.eval_tokens:,} val tokens, {part:.0%} of the split, to stay"
        )
        found.append(Warning("eval_part", text + " within 4% of the budget (train.eval_tokens)"))
    if not data.exact:
        text = "the corpus is not prepared yet: its token counts are an estimate"
        found.append(Warning("data_estimated", text))
    if not machine.deterministic:
        text = "replays are not bit for bit on this device: its attention and embedding gradients "
        found.append(Warning("not_deterministic", text + "add up in no fixed order"))
    if predicted.val_loss is None:
        found.append(Warning("loss_unknown", f"no loss is promised: {predicted.val_loss_source}"))
    if step_is_long(budget, machine, predicted):
        text = (
            f"one step takes {predicted.step_seconds.mid:.1f} s, more than 1% of the budget: "
            f"the spend may end below 97%; a smaller train.batch_tokens lands closer"
        )
        found.append(Warning("long_step", text))
    return found


def step_is_long(budget: Budget, machine: MachinePlan, predicted: Predicted) -> bool:
    """Whether one step is more than a hundredth of a time budget."""
    return predicted.step_seconds.mid > 0.01 * limit_seconds(budget, machine.usd_per_hour)

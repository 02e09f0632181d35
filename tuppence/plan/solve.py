"""Turns a `Run` into a `Plan` for one machine: every number explicit, nothing decided later.

    budget ──▶ seconds left after start-up, evaluations, saves ──▶ steps ──▶ tokens ──▶ loss

Pure arithmetic over three inputs: what was asked, what the corpus is, what the machine was
measured to do. Raises UserError where values contradict each other and DoesNotFit where they
cannot be had here; everything merely unwise is a warning with a code.
"""

import dataclasses
import math
import re

from tuppence.config import (
    Budget,
    CadencePlan,
    DataPlan,
    MachinePlan,
    ModelPlan,
    Plan,
    Predicted,
    Run,
    StepPlan,
    TasksPlan,
)
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan import laws, looks, loss
from tuppence.plan.asked import (
    batch_sequences,
    check_budget,
    check_micro_batch,
    check_ranks,
    check_trainable,
    check_values,
    limit_seconds,
    max_steps,
    optimizer_of,
    solve_model,
    solve_optimizer,
    solve_schedule,
    solve_track,
)
from tuppence.plan.cost import Shape
from tuppence.plan.estimate import (
    MEMORY_SHARE,
    ROOFLINE_SHARE,
    UnitSeconds,
    choose_timing,
    largest_micro_batch,
    peak_memory_gib,
    predict,
    unit_seconds,
    ways_to_run,
    workers_of,
)
from tuppence.plan.hardware import Calibration, Timing
from tuppence.plan.notices import notices
from tuppence.plan.prices import ASSUMED_USD_PER_HOUR
from tuppence.plan.shapes import export_warnings, shape_of
from tuppence.plan.spread import Spread, per_machine_gib, spread_of
from tuppence.plan.stages import EVAL_SHARE
from tuppence.plan.tasks import (
    FIXED_ROWS,
    FIXED_SHARE,
    FIXED_TOKENS,
    TASKS_GIB,
    evaluations,
    head_share,
    run_seconds,
    solve_tasks,
)

FINISH_SECONDS = 0.8  # receipt and exit, charged in advance
MAX_EVALS = 10
SAVE_SECONDS = 15.0  # default distance of saves: twice what a kill costs, beside the start
SAVE_SHARE = 0.05  # of the time that the thread which writes may be busy
SAMPLE_SHARE = 0.02  # of a run that its samples may take together
SAMPLE_TOKENS = 200
KEEP_LAST = 2
STALL_SECONDS, STALL_STEPS = 120.0, 20.0  # a rank may stand still for the longer of the two


def solve(
    run: Run, data: DataPlan, calibration: Calibration, *, ranks: int = 1, nodes: int = 1
) -> Plan:
    """The plan of `run` on this machine, whose corpus is `data`, in `ranks` processes on `nodes`
    such machines. `calibration` is of the threads or the GPU that one rank has."""
    check_values(run)
    check_trainable(run)
    budget = check_budget(run.budget)
    _check_device(run, calibration)
    model = solve_model(run, data)
    shape = shape_of(run.model, data.vocab_size)
    batch, tokens = _likely(run, budget, model, shape, calibration, ranks=ranks, nodes=nodes)
    spread = spread_of(run, ranks=ranks, nodes=nodes)
    spread = _sharded_if_it_must(run, model, batch, calibration, spread)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, parallel=spread.parallel))
    step = _solve_step(run, budget, data, model, batch, calibration, spread)
    timing = choose_timing(run, model, step.micro_batch, step.workers, calibration)
    peak_gib = peak_memory_gib(model, optimizer_of(run), timing, calibration, spread)
    _check_memory(step, per_machine_gib(peak_gib, spread, device=calibration.device), calibration)
    machine = _solve_machine(run, calibration, model, timing, spread)
    units = unit_seconds(model, step, optimizer_of(run), timing, calibration, spread)
    schedule = solve_schedule(run)
    recipe = laws.recipe(shape, optimizer_of(run), tokens, batch_tokens=step.batch_tokens)
    optimizer = solve_optimizer(run, model, laws.overridden(recipe, run.train))
    tasks = solve_tasks(
        run,
        data,
        context=model.sequence_len,
        head=head_share(model.n_embd, model.vocab_size, model.flops_per_token),
        token_seconds=units.eval_token,
    )
    if tasks is not None and calibration.device == "cpu":
        peak_gib += TASKS_GIB
    cadence = _solve_cadence(run, budget, data, model, step, machine, tasks, units)
    predicted = predict(
        budget,
        data,
        model,
        machine,
        step,
        cadence,
        tasks,
        optimizer.name,
        units,
        loss.Expectation(None, loss.STARTED)
        if run.train.init_from is not None
        else loss.expectation(data, model, step.batch_tokens, optimizer, schedule),
        basis=timing.source,
        peak_gib=peak_gib,
    )
    _check_affordable(budget, machine, tasks, predicted)
    _check_disk(run, predicted.checkpoint_bytes)
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
        warnings=(
            *notices(budget, data, machine, step, cadence, tasks, predicted),
            *export_warnings(run.model),
        ),
        tasks=tasks,
        track=solve_track(run.train),
    )


def _likely(
    run: Run,
    budget: Budget,
    model: ModelPlan,
    shape: Shape,
    calibration: Calibration,
    *,
    ranks: int,
    nodes: int,
) -> tuple[int, float]:
    """Tokens of a step, and about how many the run will see: what rates and decay follow from.

    Time is counted by the matmul ceiling alone, so that a machine's moods do not change the recipe.
    With a budget in steps either follows from the other, and they are found in turn.
    """
    price = (run.machine.usd_per_hour or ASSUMED_USD_PER_HOUR) * nodes
    flops = ROOFLINE_SHARE * max(calibration.matmul_tflops.values()) * 1e12 * ranks
    most = limit_seconds(budget, price) * flops / model.flops_per_token
    most = min(most, math.inf if budget.tokens is None else budget.tokens)

    def seen(batch: int) -> float:
        return min(most, math.inf if budget.steps is None else budget.steps * batch)

    asked = run.train.batch_tokens
    batch = 16 * model.sequence_len if asked is None else asked
    if asked is None and model.family != "gpt2":
        for _ in range(8):
            batch = laws.recipe(shape, optimizer_of(run), seen(batch)).batch_tokens
    return batch, seen(batch)


def _solve_step(
    run: Run,
    budget: Budget,
    data: DataPlan,
    model: ModelPlan,
    batch: int,
    calibration: Calibration,
    spread: Spread,
) -> StepPlan:
    sequences = batch_sequences(batch, data, model)
    each = check_ranks(sequences, spread.ranks, model.sequence_len)
    if run.train.micro_batch is not None:
        micro = check_micro_batch(run.train.micro_batch, each, model.sequence_len)
    else:
        micro = largest_micro_batch(run, model, each, calibration, spread)
    seed = 1337 if run.train.seed is None else run.train.seed
    if not 0 <= seed < 2**63:
        raise UserError(f"train.seed={seed}: a whole number from 0 to 2^63 - 1")
    batch_tokens = sequences * model.sequence_len
    return StepPlan(
        batch_tokens=batch_tokens,
        batch_sequences=sequences,
        micro_batch=micro,
        accumulation=sequences // micro,
        workers=workers_of(run, micro, each, calibration),
        ranks=spread.ranks,
        max_steps=max_steps(budget, batch_tokens),
        seed=seed,
    )


def _check_device(run: Run, calibration: Calibration) -> None:
    """Refuse a GPU that is not here."""
    wanted = {"gpu": run.machine.gpu, "gpu_count": run.machine.gpu_count}
    for key, value in wanted.items():
        if value not in (None, "cpu", 0) and calibration.device == "cpu":
            raise DoesNotFit(
                f"machine.{key}={value}: this machine has no CUDA GPU that torch can use; leave it "
                f"out to train on the CPU"
            )
    if (
        run.machine.gpu
        and calibration.device == "cuda"
        and not _names(run.machine.gpu, calibration)
    ):
        raise DoesNotFit(f"machine.gpu={run.machine.gpu}: this machine has {calibration.name}")


def _solve_machine(
    run: Run, calibration: Calibration, model: ModelPlan, timing: Timing, spread: Spread
) -> MachinePlan:
    price, ceiling = run.machine.usd_per_hour, f"the {timing.precision} matmul ceiling measured"
    return MachinePlan(
        device=calibration.device,
        name=calibration.name,
        threads=calibration.threads,
        precision=timing.precision,
        precision_why=_why_precision(run, calibration, model, timing),
        attention=timing.attention,
        compile=timing.compile,
        peak_tflops=calibration.matmul_tflops[timing.precision] * spread.ranks,
        peak_source=f"{ceiling} here" + (f" x {spread.ranks} ranks" if spread.ranks > 1 else ""),
        usd_per_hour=(price if price is not None else ASSUMED_USD_PER_HOUR) * spread.nodes,
        price_source="asked" if price is not None else "assumed",
        deterministic=calibration.device == "cpu",
        nodes=spread.nodes,
        parallel=spread.parallel,
        activation_checkpointing=spread.recompute,
    )


def _names(gpu: str, calibration: Calibration) -> bool:
    """Whether a short name (H100, A100-80GB, 4090) is in the card's own."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in (gpu, calibration.name)]
    return plain[0] in plain[1]


def _why_precision(run: Run, calibration: Calibration, model: ModelPlan, timing: Timing) -> str:
    if run.train.precision is not None:
        return "asked"
    if timing.source == "roofline":
        listed = ", ".join(f"{p} {rate:.2f}" for p, rate in calibration.matmul_tflops.items())
        return f"the higher matmul ceiling here ({listed} TFLOPS)"
    ways = ways_to_run(run, model, timing.micro_batch, timing.workers, calibration)
    listed = ", ".join(
        f"{t.precision} {t.attention} {t.round_seconds * 1e3:.1f}"
        for t in sorted(ways, key=lambda t: t.round_seconds)
    )
    return f"fastest here ({listed} ms a micro-batch, {timing.source})"


def _solve_cadence(
    run: Run,
    budget: Budget,
    data: DataPlan,
    model: ModelPlan,
    step: StepPlan,
    machine: MachinePlan,
    tasks: TasksPlan | None,
    units: UnitSeconds,
) -> CadencePlan:
    train = run.train
    for key in ("eval_every", "eval_tokens", "save_every", "keep_last", "keep_every"):
        value = getattr(train, key)
        if value is not None and value < 1:
            raise UserError(f"train.{key}={value}: at least 1")
    if train.sample_tokens is not None and train.sample_tokens < 0:
        raise UserError(f"train.sample_tokens={train.sample_tokens}: at least 0")
    if train.stall_seconds is not None and train.stall_seconds < 1:
        raise UserError(f"train.stall_seconds={train.stall_seconds:g}: at least 1")
    seconds = limit_seconds(budget, machine.usd_per_hour)
    if step.max_steps is not None:
        seconds = min(seconds, step.max_steps * units.step)
    save_every, save_seconds = train.save_every, max(SAVE_SECONDS, units.save / SAVE_SHARE)
    if save_every is None and math.isinf(limit_seconds(budget, machine.usd_per_hour)):
        save_every = max(1, round(save_seconds / units.step))  # where steps are counted, no clock
    with_tasks = evaluations(tasks, seconds / units.step)
    share = EVAL_SHARE * seconds / max(1, with_tasks)
    tokens = _eval_tokens(train.eval_tokens, data, model, share, units)
    count = max(1, min(MAX_EVALS, int(EVAL_SHARE * seconds / (tokens * units.eval_token))))
    samples = min(
        SAMPLE_TOKENS, int(SAMPLE_SHARE * seconds / (count + with_tasks) / units.sample_token)
    )
    fixed = int(FIXED_SHARE * seconds / FIXED_ROWS / units.sample_token)
    fixed = min(FIXED_TOKENS, fixed if train.sample_tokens is None else train.sample_tokens)
    early_stop = train.early_stop is not False
    growth = None
    if train.eval_every is None and (early_stop or train.target_loss is not None):
        growth = looks.growth_for(
            tokens * units.eval_token + units.save,
            epochs=seconds / units.step * step.batch_tokens / data.train_tokens,
            marks=count,
            seconds=seconds,
        )
    return CadencePlan(
        eval_every_steps=train.eval_every,
        eval_every_progress=None if train.eval_every else 1 / count,
        eval_tokens=tokens,
        eval_batch=step.micro_batch,  # what training holds in memory, evaluation does
        save_every_steps=save_every,
        save_every_seconds=None if save_every else save_seconds,
        keep_last=train.keep_last or KEEP_LAST,
        keep_every_steps=train.keep_every,
        keep_bytes=None if run.machine.disk_gb is None else int(run.machine.disk_gb * 1e9),
        stall_seconds=train.stall_seconds or max(STALL_SECONDS, STALL_STEPS * units.step),
        finish_seconds=FINISH_SECONDS,
        sample_prompt=train.sample_prompt,
        sample_tokens=samples if train.sample_tokens is None else train.sample_tokens,
        fixed_tokens=fixed,
        eval_growth=growth,
        early_stop=early_stop,
        target_loss=train.target_loss,
    )


def _eval_tokens(
    asked: int | None, data: DataPlan, model: ModelPlan, seconds: float, units: UnitSeconds
) -> int:
    """As asked; else the whole val split, or the part of it that `seconds` allow."""
    if asked is not None or data.val_tokens * units.eval_token <= seconds:
        return min(asked or data.val_tokens, data.val_tokens)
    windows = int(seconds / units.eval_token / model.sequence_len)
    return min(data.val_tokens, max(1, windows) * model.sequence_len)


# ---------------------------------------------------------------- refusals


def _sharded_if_it_must(
    run: Run, model: ModelPlan, batch: int, calibration: Calibration, spread: Spread
) -> Spread:
    """All by rows where the weights, whole on every rank, leave no room for one sequence."""
    if spread.ranks == 1 or run.train.parallel is not None:
        return spread
    rows = max(1, batch // model.sequence_len // spread.ranks)
    timing = choose_timing(run, model, 1, workers_of(run, 1, rows, calibration), calibration)
    needs = peak_memory_gib(model, optimizer_of(run), timing, calibration, spread)
    together = per_machine_gib(needs, spread, device=calibration.device)
    if together <= MEMORY_SHARE * calibration.memory_gib:
        return spread
    return dataclasses.replace(spread, parallel="fsdp")


def _check_memory(step: StepPlan, peak_gib: float, calibration: Calibration) -> None:
    if peak_gib > calibration.memory_gib:
        raise DoesNotFit(
            f"train.micro_batch={step.micro_batch} needs {peak_gib:.1f} GiB, this machine has "
            f"{calibration.memory_gib:.1f}; lower "
            f"{'train.micro_batch or ' if step.micro_batch > 1 else ''}the model"
        )


def _check_disk(run: Run, each: int) -> None:
    """Room for last, best and the one that is being written."""
    disk = run.machine.disk_gb
    if disk is not None and disk * 1e9 < 3 * each:
        raise DoesNotFit(
            f"machine.disk_gb={disk:g} is too little for three checkpoints of {each / 1e9:.3g} GB "
            f"(last, best, and the one being written); give {3 * each / 1e9:.2g} or more"
        )


def _check_affordable(
    budget: Budget, machine: MachinePlan, tasks: TasksPlan | None, predicted: Predicted
) -> None:
    if predicted.steps.mid >= 1:
        return
    limit = limit_seconds(budget, machine.usd_per_hour)
    needed = sum(predicted.phase_seconds.values()) + predicted.step_seconds.mid
    usd = needed / 3600 * machine.usd_per_hour
    names = [] if tasks is None else [f"train.{suite.name}_items" for suite in tasks.suites]
    judged = f" (tasks {run_seconds(tasks, 1):.1f} s of it: lower {' and '.join(names)})"
    raise DoesNotFit(
        f"the budget buys {limit:.1f} s at ${machine.usd_per_hour:g}/h; start-up, one step of "
        f"{predicted.step_seconds.mid:.2f} s, evaluation, save and receipt take about "
        f"{needed:.1f} s{judged if names else ''}: give at least budget.usd={usd:.2g} or "
        f"budget.hours={needed / 3600:.2g}"
    )

"""This machine's plan for reading, and as one option of `tuppence plan --json`."""

import dataclasses
from typing import Any

from tuppence.config import InitPlan, Interval, ModelPlan, OptimizerPlan, Plan, TasksPlan
from tuppence.live import duration, threads
from tuppence.plan.bill import KEPT_CHECKPOINTS
from tuppence.plan.stages import shard_bytes


def between(interval: Interval, form: str = ",.0f", unit: str = "") -> str:
    """`mid unit (low to high)`."""
    low, mid, high = (format(v, form) for v in dataclasses.astuple(interval))
    return f"{mid}{unit} ({low} to {high})"


def limits(plan: Plan) -> str:
    """The budget in words."""
    units = {"usd": "${:g}", "hours": "{:g} h", "tokens": "{:,} tokens", "steps": "{:,} steps"}
    asked = dataclasses.asdict(plan.budget)
    return ", ".join(units[k].format(v) for k, v in asked.items() if v is not None)


def _starts(init: InitPlan) -> str:
    return f"from the weights in {init.path} (sha256 {init.sha256[:12]})"


def _layers(model: ModelPlan) -> str:
    """How many blocks, and how often a loop runs some of them."""
    if model.loop is None:
        return f"{model.n_layer} layers"
    loop = model.loop
    return f"{model.n_layer} layers ({loop.n_recurrent} of them {loop.mean_recurrence:g} times)"


def _rates(plan: OptimizerPlan) -> str:
    """Peak rates by who moves what."""
    groups = plan.groups
    beside = ", ".join(f"{groups[kind].learning_rate:.3g} {kind}" for kind in ("embedding", "head"))
    apart = len({group.learning_rate for group in groups.values()}) > 1
    adam = f" (adamw beside it: {beside})" if apart else ""
    return f"{plan.name} {plan.learning_rate:.3g}{adam}, weight decay {plan.weight_decay:.3g}"


def _stops(plan: Plan) -> str:
    """What may end the run sooner."""
    cadence, told = plan.cadence, []
    if cadence.early_stop and plan.predicted.epochs > 1:
        told.append("validation turns")
    if cadence.target_loss is not None:
        told.append(f"val loss is {cadence.target_loss:g}")
    return f"; stops early if {' or '.join(told)}" if told else ""


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it before paying; intervals are 80%."""
    model, machine, step, told = plan.model, plan.machine, plan.step, plan.predicted
    price = f"${machine.usd_per_hour:.2f}/h ({machine.price_source})"
    loss = between(told.val_loss, ".3f", " nats/token") if told.val_loss else "not promised"
    rows = [
        ("plan", f"{plan.name}: spend {limits(plan)}"),
        (
            "model",
            f"{model.family}, {_layers(model)} x {model.n_embd}, {model.n_head} heads, "
            f"T={model.sequence_len}, vocabulary {model.vocab_size:,}: {model.params:,} "
            f"parameters, {model.flops_per_token / 1e6:,.1f} MFLOP/token",
        ),
        *([("starts", _starts(plan.init))] if plan.init else []),
        (
            "data",
            f"{plan.data.source}, {plan.data.tokenizer} tokens: {plan.data.train_tokens:,} train, "
            f"{plan.data.val_tokens:,} val{'' if plan.data.exact else ' (estimated)'}",
        ),
        ("machine", f"{machine.name}, {_processes(plan)}, {price}"),
        (
            "runs in",
            f"{machine.precision} with {machine.attention} attention: {machine.precision_why}",
        ),
        (
            "step",
            f"{step.batch_tokens:,} tokens = {step.accumulation} x {step.micro_batch} sequences; "
            f"{told.step_seconds.mid * 1e3:,.1f} ms",
        ),
        ("rates", _rates(plan.optimizer)),
        (
            "speed",
            f"{between(told.tokens_per_second)} tokens/s; MFU {told.mfu.mid:.0%} of "
            f"{machine.peak_tflops:.2f} TFLOPS ({machine.peak_source})",
        ),
        (
            "length",
            f"{between(told.steps)} steps, {told.tokens.mid:,.0f} tokens, {told.epochs:.1f} epochs"
            + _stops(plan),
        ),
        ("time", f"{duration(told.hours.mid * 3600)}: " + _phases(told.phase_seconds)),
        ("dollars", "$" + between(told.usd, ".4f")),
        (
            "memory",
            f"{between(told.peak_memory_gib, '.2f')} GiB; "
            f"checkpoint {told.checkpoint_bytes / 1e6:.1f} MB, on disk at most "
            f"{told.disk_bytes / 1e6:.1f} MB",
        ),
        ("val loss", f"{loss}; {told.val_loss_source}"),
        *([("tasks", _tasks(plan.tasks))] if plan.tasks else []),
    ]
    text = "\n".join(f"{name:9s} {value}" for name, value in rows)
    notes = "".join(f"\nwarning   {w.message} [{w.code}]" for w in plan.warnings)
    return text + notes


def _tasks(tasks: TasksPlan) -> str:
    """Which suites, how much of each, when."""
    told = []
    for suite in tasks.suites:
        items = "every item" if suite.items is None else f"{suite.items:,} items a task"
        when = f"every {suite.every_steps:,} steps and " if suite.every_steps else ""
        told.append(
            f"{suite.name}, {items}, {when}at the end: {suite.tokens:,} tokens, "
            f"{suite.seconds:,.1f} s each time"
        )
    return "; ".join(told)


def _processes(plan: Plan) -> str:
    """Ranks and what each has of the machine, and how the model lies on them."""
    ranks, machine = plan.step.ranks, plan.machine
    each = threads(machine.threads) if machine.device == "cpu" else "a GPU"
    if ranks == 1:
        return each if machine.device == "cpu" else "one GPU"
    nodes = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    return f"{ranks} ranks{nodes} of {each} ({machine.parallel})"


def _phases(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())


def local_option(plan: Plan) -> dict[str, Any]:
    """This machine as one option of the `--json` document: the keys of table.document."""
    told, machine = plan.predicted, plan.machine
    hourly = machine.usd_per_hour / 3600
    phases = {name: seconds * hourly for name, seconds in told.phase_seconds.items()}
    spans = {
        "tokens_per_second": told.tokens_per_second,
        "mfu": told.mfu,
        "tokens": told.tokens,
        "usd": told.usd,
        "train_hours": told.hours,
        "peak_memory_gib": told.peak_memory_gib,
        "step_seconds": told.step_seconds,
    }
    on_gpu = machine.device == "cuda"
    return {
        "here": True,
        "cloud": "local",
        "instance_type": machine.name,
        "region": "",
        "gpu": machine.name if on_gpu else "cpu",
        "gpu_count": plan.step.ranks // machine.nodes if on_gpu else 0,
        "nodes": machine.nodes,
        "spot": False,
        "usd_per_hour": machine.usd_per_hour,
        "price": {"terms": machine.price_source, "date": "", "source": machine.price_source},
        "fits": True,
        "why_not": None,
        "depth": plan.model.n_layer,
        "params": plan.model.params,
        "flops_per_token": plan.model.flops_per_token,
        "precision": machine.precision,
        "parallel": machine.parallel,
        "activation_checkpointing": machine.activation_checkpointing,
        "micro_batch": plan.step.micro_batch,
        "accumulation": plan.step.accumulation,
        "batch_tokens": plan.step.batch_tokens,
        "learning_rate": plan.optimizer.learning_rate,
        "weight_decay": plan.optimizer.weight_decay,
        **{name: span.mid for name, span in spans.items()},
        "mfu_peak": {"tflops": machine.peak_tflops, "source": machine.peak_source},
        "epochs": told.epochs,
        "disk_gb": _disk_gb(plan),
        "usd": {**phases, "store": 0.0, "egress": 0.0, "total": sum(phases.values())},
        "loss": dataclasses.asdict(told.val_loss) if told.val_loss else None,
        "loss_metric": "nats/token" if told.val_loss else None,
        "loss_source": told.val_loss_source,
        "intervals": {name: [span.low, span.high] for name, span in spans.items()},
        "notes": [],
    }


def _disk_gb(plan: Plan) -> float:
    """Shards, and the checkpoints that are kept."""
    tokens = plan.data.train_tokens + plan.data.val_tokens
    shards = shard_bytes(tokens, vocab_size=plan.data.vocab_size)
    return (shards + KEPT_CHECKPOINTS * plan.predicted.checkpoint_bytes) / 1e9

"""This machine's plan for reading, and as one option of `tuppence plan --json`."""

import dataclasses
from typing import Any

from tuppence.config import Interval, Plan
from tuppence.live import duration


def between(interval: Interval, form: str = ",.0f", unit: str = "") -> str:
    """`mid unit (low to high)`."""
    low, mid, high = (format(v, form) for v in dataclasses.astuple(interval))
    return f"{mid}{unit} ({low} to {high})"


def limits(plan: Plan) -> str:
    """The budget in words."""
    units = {"usd": "${:g}", "hours": "{:g} h", "tokens": "{:,} tokens", "steps": "{:,} steps"}
    asked = dataclasses.asdict(plan.budget)
    return ", ".join(units[k].format(v) for k, v in asked.items() if v is not None)


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it before paying; intervals are 80%."""
    model, machine, step, told = plan.model, plan.machine, plan.step, plan.predicted
    price = f"${machine.usd_per_hour:.2f}/h ({machine.price_source})"
    loss = between(told.val_loss, ".3f", " nats/token") if told.val_loss else "not promised"
    rows = [
        ("plan", f"{plan.name}: spend {limits(plan)}"),
        (
            "model",
            f"{model.family}, {model.n_layer} layers x {model.n_embd}, {model.n_head} heads, "
            f"T={model.sequence_len}, vocabulary {model.vocab_size:,}: {model.params:,} "
            f"parameters, {model.flops_per_token / 1e6:,.1f} MFLOP/token",
        ),
        (
            "data",
            f"{plan.data.source}, {plan.data.tokenizer} tokens: {plan.data.train_tokens:,} train, "
            f"{plan.data.val_tokens:,} val{'' if plan.data.exact else ' (estimated)'}",
        ),
        ("machine", f"{machine.name}, {machine.threads} threads, {price}"),
        (
            "runs in",
            f"{machine.precision} with {machine.attention} attention: {machine.precision_why}",
        ),
        (
            "step",
            f"{step.batch_tokens:,} tokens = {step.accumulation} x {step.micro_batch} sequences; "
            f"{told.step_seconds.mid * 1e3:,.1f} ms",
        ),
        (
            "speed",
            f"{between(told.tokens_per_second)} tokens/s; MFU {told.mfu.mid:.0%} of "
            f"{machine.peak_tflops:.2f} TFLOPS ({machine.peak_source})",
        ),
        (
            "length",
            f"{between(told.steps)} steps, {told.tokens.mid:,.0f} tokens, {told.epochs:.1f} epochs",
        ),
        ("time", f"{duration(told.hours.mid * 3600)}: " + _phases(told.phase_seconds)),
        ("dollars", "$" + between(told.usd, ".4f")),
        (
            "memory",
            f"{between(told.peak_memory_gib, '.2f')} GiB; "
            f"checkpoint {told.checkpoint_bytes / 1e6:.1f} MB",
        ),
        ("val loss", f"{loss}; {told.val_loss_source}"),
    ]
    text = "\n".join(f"{name:9s} {value}" for name, value in rows)
    notes = "".join(f"\nwarning   {w.message} [{w.code}]" for w in plan.warnings)
    return text + notes


def in_a_line(plan: Plan) -> str:
    """The plan where another machine is the better choice."""
    told = plan.predicted
    return (
        f"here      {plan.machine.name}: {between(told.tokens_per_second)} tokens/s, "
        f"{duration(told.hours.mid * 3600)}, {told.tokens.mid:,.0f} tokens, "
        f"${between(told.usd, '.2f')} (machine.gpu=cpu shows the whole plan)"
    )


def _phases(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())


def local_option(plan: Plan) -> dict[str, Any]:
    """This machine as one option of the `--json` document."""
    told, machine = plan.predicted, plan.machine
    hourly = machine.usd_per_hour / 3600
    phases = {name: seconds * hourly for name, seconds in told.phase_seconds.items()}
    spread = {
        name: [getattr(told, name).low, getattr(told, name).high]
        for name in (
            "tokens_per_second",
            "mfu",
            "steps",
            "tokens",
            "hours",
            "usd",
            "peak_memory_gib",
        )
    }
    return {
        "cloud": "local",
        "instance_type": machine.name,
        "gpu": machine.name if machine.device == "cuda" else "cpu",
        "gpu_count": 1 if machine.device == "cuda" else 0,
        "spot": False,
        "usd_per_hour": machine.usd_per_hour,
        "price": {"terms": machine.price_source, "date": None, "source": machine.price_source},
        "fits": True,
        "why_not": None,
        "params": plan.model.params,
        "flops_per_token": plan.model.flops_per_token,
        "precision": machine.precision,
        "accumulation": plan.step.accumulation,
        "batch_tokens": plan.step.batch_tokens,
        "learning_rate": plan.optimizer.learning_rate,
        "step_seconds": told.step_seconds.mid,
        "mfu_peak": {"tflops": machine.peak_tflops, "source": machine.peak_source},
        "epochs": told.epochs,
        "micro_batch": plan.step.micro_batch,
        "peak_memory_gib": told.peak_memory_gib.mid,
        "tokens_per_second": told.tokens_per_second.mid,
        "mfu": told.mfu.mid,
        "train_hours": told.hours.mid,
        "usd": {**phases, "total": sum(phases.values())},
        "tokens": told.tokens.mid,
        "loss": dataclasses.asdict(told.val_loss) if told.val_loss else None,
        "loss_source": told.val_loss_source,
        "intervals": spread,
    }

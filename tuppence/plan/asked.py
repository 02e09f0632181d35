"""What was asked, checked: each rule once, each refusal one line with the nearest valid value."""

import dataclasses
import math
from typing import Any

from tuppence.config import Budget, DataPlan, ModelPlan, OptimizerPlan, Run, SchedulePlan
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan import cost


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
    for key, least in (("val_tokens", 2), ("max_tokens", 1)):
        value = getattr(run.data, key)
        if value is not None and value < least:
            raise UserError(f"data.{key}={value}: at least {least}, or leave it out")
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
        nearest_width = max(1, (2 * width + heads) // (2 * heads)) * heads
        nearest_heads = min(divisors(width), key=lambda d: (abs(d - heads), d))
        raise UserError(
            f"model.n_head={heads} does not divide model.n_embd={width}; the nearest that fit: "
            f"model.n_embd={nearest_width}, or model.n_head={nearest_heads}"
        )
    if asked.n_kv_head not in (None, heads):
        raise UserError(f"model.n_kv_head={asked.n_kv_head}: gpt2 has as many as n_head={heads}")
    vocab = data.vocab_size if asked.vocab_size is None else asked.vocab_size
    if vocab < data.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab}: tokenizer {data.tokenizer} has {data.vocab_size} tokens; "
            f"at least that many, or leave it out"
        )
    dropout = asked.dropout or 0.0
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout:g}: a rate from 0 to below 1")
    if dropout and run.train.attention == "sdpa":
        raise UserError("train.attention=sdpa: model.dropout needs matmul attention")
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


def batch_sequences(run: Run, data: DataPlan, model: ModelPlan) -> int:
    """Sequences of the global batch. Raises UserError where it does not divide or fill."""
    length = model.sequence_len
    asked = run.train.batch_tokens
    batch_tokens = 16 * length if asked is None else asked
    if batch_tokens < 1 or batch_tokens % length:
        near = max(1, round(batch_tokens / length)) * length
        raise UserError(
            f"train.batch_tokens={batch_tokens} is not a multiple of model.sequence_len={length}; "
            f"the nearest is {near}"
        )
    needs = "give more text or lower"
    if data.train_tokens < length + 1:
        raise UserError(
            f"data.source={data.source}: {data.train_tokens:,} training tokens are less than one "
            f"sequence of {length:,} + 1; {needs} model.sequence_len"
        )
    if data.val_tokens < 2:
        raise UserError(
            f"data.source={data.source}: a val split of {data.val_tokens} tokens predicts nothing; "
            f"give more text or data.val_tokens=2 or more"
        )
    if data.train_tokens < batch_tokens + 1:
        raise UserError(
            f"data.source={data.source}: {data.train_tokens:,} training tokens are less than one "
            f"batch of {batch_tokens:,} + 1; {needs} train.batch_tokens"
        )
    return batch_tokens // length


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def check_micro_batch(micro: int, sequences: int, length: int) -> int:
    """The micro-batch asked for. Raises UserError where it does not divide the batch."""
    if micro < 1 or sequences % micro:
        near = min(divisors(sequences), key=lambda d: (abs(d - micro), d))
        raise UserError(
            f"train.micro_batch={micro} does not divide the batch of {sequences} sequences "
            f"(train.batch_tokens={sequences * length} / model.sequence_len={length}); "
            f"the nearest is {near}"
        )
    return micro


def solve_recipe(run: Run) -> tuple[SchedulePlan, OptimizerPlan]:
    train = run.train

    def fraction(key: str, value: float | None, default: float) -> float:
        value = default if value is None else value
        if not 0 <= value <= 1:
            raise UserError(f"train.{key}={value:g}: a fraction from 0 to 1")
        return value

    def below_one(key: str, value: float | None, default: float) -> float:
        if fraction(key, value, default) == 1:
            raise UserError(f"train.{key}=1: below 1")
        return default if value is None else value

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
        beta1=below_one("beta1", train.beta1, 0.9),
        beta2=below_one("beta2", train.beta2, 0.95),
        eps=1e-8,
        grad_clip=positive("grad_clip", train.grad_clip, 1.0),
    )
    return schedule, optimizer


def limit_seconds(budget: Budget, usd_per_hour: float) -> float:
    """Charged seconds that a budget allows; infinite where only tokens or steps limit it."""
    by_usd = budget.usd / usd_per_hour * 3600 if budget.usd is not None else math.inf
    by_hours = budget.hours * 3600 if budget.hours is not None else math.inf
    return min(by_usd, by_hours)


def max_steps(budget: Budget, batch_tokens: int) -> int | None:
    """Steps that a budget of steps or tokens allows; None where only time limits it.

    Raises DoesNotFit where the tokens are less than one batch.
    """
    limits = [] if budget.steps is None else [budget.steps]
    if budget.tokens is not None:
        if budget.tokens < batch_tokens:
            raise DoesNotFit(
                f"budget.tokens={budget.tokens:,} is less than one batch of {batch_tokens:,} "
                f"tokens; give at least that, or lower train.batch_tokens"
            )
        limits.append(budget.tokens // batch_tokens)
    return min(limits) if limits else None

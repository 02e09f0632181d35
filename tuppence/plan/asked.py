"""What was asked, checked: each rule once, each refusal one line with the nearest valid value."""

import dataclasses
import math
from typing import Any

from tuppence.config import (
    Budget,
    DataPlan,
    GroupPlan,
    LoopPlan,
    Model,
    ModelPlan,
    OptimizerPlan,
    Run,
    SchedulePlan,
    TrackPlan,
    Train,
    nearest,
)
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan.laws import Recipe
from tuppence.plan.shapes import (
    FAMILIES,
    LORA_RANK,
    laid_out,
    nearest_divisor,
    number,
    shape_of,
    windows,
)

OPTIMIZERS = ("adamw", "muon")
PARALLEL = ("none", "ddp", "zero1", "fsdp")
PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
SCHEDULES = ("cosine", "wsd")
DEDUPS = ("none", "exact", "near")
ON_BAD = ("refuse", "skip")
PACKINGS = ("plain", "documents")
ATTENTIONS = ("sdpa", "matmul")
WANDB = ("offline", "online", "off")
MOST = 10**15  # of anything: what is larger is a slip of the hand


def check_values(run: Run) -> None:
    """Refuse what is not a value of its key, whatever machine it is for."""
    least = {
        "data.val_tokens": 2,
        "data.max_tokens": 1,
        "data.seed": 0,
        "data.workers": 1,
        "machine.gpu_count": 0,
        "machine.nodes": 1,
        "model.sequence_len": 1,
        "model.backprop_depth": 1,
        "model.lora_rank": 0,
        "train.micro_batch": 1,
        "train.core_every": 1,
        "train.core_items": 1,
        "train.hellaswag_every": 1,
        "train.hellaswag_items": 1,
    }
    for key, bound in least.items():
        group, _, leaf = key.partition(".")
        value = getattr(getattr(run, group), leaf)
        if value is not None and value < bound:
            raise UserError(f"{key}={value}: at least {bound}, or leave it out")
        if value is not None and value > MOST:
            raise UserError(f"{key}={value:.3g}: at most {MOST:.0e}")
    above_zero = {
        "machine.usd_per_hour": (run.machine.usd_per_hour, "a price"),
        "machine.disk_gb": (run.machine.disk_gb, "a disk"),
        "data.cache_gb": (run.data.cache_gb, "a cache"),
        "machine.mfu": (run.machine.mfu, "a share of the peak"),
        "train.target_loss": (run.train.target_loss, "a loss in nats per token"),
    }
    for key, (amount, what) in above_zero.items():
        if amount is not None and not 0 < amount <= MOST:
            raise UserError(f"{key}={amount:g}: {what} is more than zero, and at most {MOST:.0e}")
    price = run.machine.usd_per_hour
    if price is not None and price < 1e-6:
        raise UserError(f"machine.usd_per_hour={price:g}: at least 0.000001")
    if run.machine.gpu_count == 0 and run.machine.gpu not in (None, "cpu"):
        raise UserError(f"machine.gpu_count=0 and machine.gpu={run.machine.gpu}: leave one out")
    if run.machine.mfu is not None and run.machine.mfu > 1:
        raise UserError(f"machine.mfu={run.machine.mfu:g}: a share of the peak, at most 1")
    check_rates(run)
    for key, value, allowed in (
        ("model.family", run.model.family, FAMILIES),
        ("data.dedup", run.data.dedup, DEDUPS),
        ("data.on_bad", run.data.on_bad, ON_BAD),
        ("data.packing", run.data.packing, PACKINGS),
        ("train.optimizer", run.train.optimizer, OPTIMIZERS),
        ("train.parallel", run.train.parallel, PARALLEL),
        ("train.precision", run.train.precision, PRECISIONS),
        ("train.schedule", run.train.schedule, SCHEDULES),
        ("train.attention", run.train.attention, ATTENTIONS),
        ("train.wandb", run.train.wandb, WANDB),
    ):
        if value is not None and value not in allowed:
            raise UserError(f"{key}={value}{nearest(value, list(allowed))}")


def solve_track(train: Train) -> TrackPlan:
    """Who else is told the figures."""
    return TrackPlan(
        tensorboard=train.tensorboard,
        wandb=None if train.wandb == "off" else train.wandb,
        wandb_project=train.wandb_project or TrackPlan.wandb_project,
    )


def check_trainable(run: Run) -> None:
    """Refuse what this version cannot train, rather than train something else in silence."""
    only: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("train.precision", run.train.precision, ("fp32", "bf16")),
    ]
    cannot = [
        f"{key}={value}: this version trains {' or '.join(str(a) for a in allowed)}"
        for key, value, allowed in only
        if value is not None and value not in allowed
    ]
    if cannot:
        raise UserError("; ".join(cannot) + " (tuppence plan plans it)")
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
        if value > MOST:
            raise UserError(f"budget.{key}={value:g}: at most {MOST:.0e}")
    if not limits:
        raise UserError("no budget: say budget.usd, budget.hours, budget.tokens or budget.steps")
    return budget


def solve_model(run: Run, data: DataPlan) -> ModelPlan:
    """The model with its exact counts. Raises UserError where dimensions do not divide."""
    asked = laid_out(run.model)
    dropout = asked.dropout or 0.0
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout:g}: a rate from 0 to below 1")
    if dropout and run.train.attention == "sdpa":
        raise UserError("train.attention=sdpa: model.dropout needs matmul attention")
    shape = shape_of(asked, data.vocab_size)
    loop = _loop(asked) if asked.family == "looped" else None
    length = number(asked, "sequence_len")
    layers = loop.n_prelude + loop.n_recurrent + loop.n_coda if loop else number(asked, "n_layer")
    return ModelPlan(
        family=asked.family or "gpt2",
        n_layer=layers,
        n_head=number(asked, "n_head"),
        n_kv_head=asked.n_kv_head or number(asked, "n_head"),
        n_embd=number(asked, "n_embd"),
        vocab_size=shape.vocab_size,
        sequence_len=length,
        bias=bool(asked.bias),
        tied_head=asked.family == "gpt2" and asked.tied_head is not False,
        dropout=dropout,
        windows=windows(asked.window_pattern, layers, length) or (length,) * layers,
        value_embeddings=bool(asked.value_embeddings),
        residual_scalars=bool(asked.residual_scalars),
        loop=loop,
        params=shape.params,
        params_matmul=shape.params_matmul,
        flops_per_token=round(shape.flops_per_token),
    )


def _loop(model: Model) -> LoopPlan:
    """The looped family's numbers; `shape_of` has checked them."""
    return LoopPlan(
        n_prelude=number(model, "n_prelude", least=0),
        n_recurrent=number(model, "n_recurrent"),
        n_coda=number(model, "n_coda", least=0),
        mean_recurrence=model.mean_recurrence or 0.0,
        max_recurrence=number(model, "max_recurrence"),
        backprop_depth=model.backprop_depth,
        lora_rank=LORA_RANK if model.lora_rank is None else model.lora_rank,
        mixture_of_depths=bool(model.mixture_of_depths),
    )


def optimizer_of(run: Run) -> str:
    """The optimizer that is asked for; else Muon, and for GPT-2 what it was published with."""
    return run.train.optimizer or ("adamw" if laid_out(run.model).family == "gpt2" else "muon")


def batch_sequences(batch_tokens: int, data: DataPlan, model: ModelPlan) -> int:
    """Sequences of the global batch. Raises UserError where it does not divide or fill."""
    length = model.sequence_len
    check_batch(batch_tokens, length)
    check_corpus(data, length=length, batch_tokens=batch_tokens)
    return batch_tokens // length


def check_batch(batch_tokens: int, length: int) -> None:
    """Refuse a batch that is not whole sequences."""
    if batch_tokens < 1 or batch_tokens % length:
        near = max(1, round(batch_tokens / length)) * length
        raise UserError(
            f"train.batch_tokens={batch_tokens} is not a multiple of model.sequence_len={length}; "
            f"the nearest is {near}"
        )


def check_corpus(data: DataPlan, *, length: int, batch_tokens: int) -> None:
    """Refuse a corpus that does not fill a sequence, a batch, or a val split."""
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


def check_ranks(sequences: int, ranks: int, length: int) -> int:
    """A rank's sequences of the batch. Raises UserError where they do not divide."""
    if sequences % ranks:
        near = max(1, round(sequences / ranks)) * ranks * length
        raise UserError(
            f"train.batch_tokens={sequences * length} is not model.sequence_len={length} x a whole "
            f"number on each of {ranks} processes; the nearest is {near}"
        )
    return sequences // ranks


def check_micro_batch(micro: int, sequences: int, length: int) -> int:
    """The micro-batch asked for. Raises UserError where it does not divide the batch."""
    if micro < 1 or sequences % micro:
        near = nearest_divisor(sequences, micro)
        raise UserError(
            f"train.micro_batch={micro} does not divide the batch of {sequences} sequences "
            f"(train.batch_tokens={sequences * length} / model.sequence_len={length}); "
            f"the nearest is {near}"
        )
    return micro


def solve_schedule(run: Run) -> SchedulePlan:
    """The learning rate's shape, cosine for AdamW, and for Muon straight down after a while.

    Raises UserError for what is no fraction of a run.
    """
    train, muon = run.train, optimizer_of(run) == "muon"

    def fraction(key: str, value: float | None, default: float) -> float:
        value = default if value is None else value
        if not 0 <= value <= 1:
            raise UserError(f"train.{key}={value:g}: a fraction from 0 to 1")
        return value

    schedule = SchedulePlan(
        shape=train.schedule or ("wsd" if muon else "cosine"),
        warmup=fraction("warmup", train.warmup, 0.02),
        decay=fraction("decay", train.decay, 0.65 if muon else 0.4),
        floor=fraction("lr_floor", train.lr_floor, 0.0),
    )
    if schedule.shape == "wsd" and schedule.warmup + schedule.decay > 1:
        raise UserError(
            f"train.warmup={schedule.warmup:g} + train.decay={schedule.decay:g} is more than the "
            f"whole run; the largest decay is {1 - schedule.warmup:g}"
        )
    return schedule


def check_rates(run: Run) -> None:
    """Refuse rates below zero, and averaging that never forgets."""
    train = run.train
    for key in ("learning_rate", "embedding_rate", "head_rate", "scalar_rate", "weight_decay"):
        value = getattr(train, key)
        if value is not None and value < 0:
            raise UserError(f"train.{key}={value:g}: not below 0")
    if train.grad_clip is not None and train.grad_clip < 0:
        raise UserError(f"train.grad_clip={train.grad_clip:g}: not below 0")
    if train.momentum is not None and optimizer_of(run) != "muon":
        raise UserError(
            f"train.momentum={train.momentum:g}: it is Muon's; AdamW has train.beta1, "
            f"or leave it out"
        )
    for key in ("beta1", "beta2", "momentum"):
        value = getattr(train, key)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"train.{key}={value:g}: a fraction from 0 to below 1")


def solve_optimizer(run: Run, model: ModelPlan, recipe: Recipe) -> OptimizerPlan:
    """A group for each kind of parameter, at the laws' rates or those that were asked.

    Embeddings and head decay too in GPT-2 under AdamW, as published; norms, biases and scalars
    never.
    """
    train, name = run.train, optimizer_of(run)
    muon = name == "muon"
    beta1 = train.beta1 if train.beta1 is not None else (0.8 if muon else 0.9)
    beta2 = train.beta2 if train.beta2 is not None else 0.95
    momentum = 0.95 if train.momentum is None else train.momentum
    tied = model.tied_head and train.embedding_rate is None
    embedding_rate = recipe.head_rate if tied else recipe.embedding_rate
    decay = recipe.weight_decay if model.family == "gpt2" and not muon else 0.0

    def adamw(rate: float, decay: float) -> GroupPlan:
        return GroupPlan("adamw", rate, decay, beta1, beta2)

    groups = {
        "matrix": GroupPlan("muon", recipe.learning_rate, recipe.weight_decay, momentum, 0.0)
        if muon
        else adamw(recipe.learning_rate, recipe.weight_decay),
        "embedding": adamw(embedding_rate, decay),
        "head": adamw(recipe.head_rate, decay),
        "norm": adamw(recipe.scalar_rate, 0.0),
        "scalar": adamw(recipe.scalar_rate, 0.0),
    }
    clip = 1.0 if train.grad_clip is None else train.grad_clip
    return OptimizerPlan(name=name, groups=groups, eps=1e-8, grad_clip=clip)


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

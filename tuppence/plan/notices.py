"""What a person should know before paying for a run on this machine: warnings with stable codes."""

import math

from tuppence.config import (
    Budget,
    CadencePlan,
    DataPlan,
    MachinePlan,
    Predicted,
    StepPlan,
    TasksPlan,
    Warning,
)
from tuppence.plan import looks, loss
from tuppence.plan.asked import limit_seconds
from tuppence.plan.tasks import too_much

GRACE_SECONDS = 30.0  # GCP's and Azure's notice; AWS gives 120


def notices(
    budget: Budget,
    data: DataPlan,
    machine: MachinePlan,
    step: StepPlan,
    cadence: CadencePlan,
    tasks: TasksPlan | None,
    predicted: Predicted,
) -> list[Warning]:
    """Those that hold of this plan, in the order of the list."""
    limit = limit_seconds(budget, machine.usd_per_hour)
    dear = too_much(tasks, steps=predicted.steps.mid, seconds=sum(predicted.phase_seconds.values()))
    tokens = budget.tokens or 0
    part = cadence.eval_tokens / data.val_tokens
    cases = [
        (
            machine.price_source == "assumed",
            "assumed_price",
            f"no price is known for this machine: ${machine.usd_per_hour:.2f}/h is assumed; "
            f"machine.usd_per_hour=... says yours",
        ),
        (
            predicted.epochs > loss.MANY_EPOCHS,
            "epochs_16",
            f"{predicted.epochs:.0f} epochs: more than 16 teach next to nothing new",
        ),
        (
            loss.FEW_EPOCHS < predicted.epochs <= loss.MANY_EPOCHS,
            "epochs_4",
            f"{predicted.epochs:.1f} epochs: beyond 4, repeated text is worth less than new text",
        ),
        (
            math.isinf(limit),
            "no_wall_clock_stop",
            "no clock stops a budget in tokens or steps; add budget.usd or budget.hours",
        ),
        (
            tokens % step.batch_tokens != 0,
            "tokens_floor",
            f"budget.tokens={tokens:,} is {tokens // step.batch_tokens * step.batch_tokens:,} in "
            f"whole batches; the rest is not used",
        ),
        (
            part < 1,
            "eval_part",
            f"evaluations use {cadence.eval_tokens:,} val tokens, {part:.1%} of the split, to stay "
            f"within their share of the run (train.eval_tokens sets it)",
        ),
        (dear is not None, "tasks_share", dear or ""),
        (
            _late(cadence, predicted.epochs),
            "turn_late",
            "too few evaluations are affordable to see soon that the run over-fits: smaller "
            "train.eval_tokens make more of them",
        ),
        (
            not data.exact,
            "data_estimated",
            "the corpus is not prepared yet: its token counts are estimates from a sample",
        ),
        (
            not machine.deterministic,
            "not_deterministic",
            "a replay on this device is not bit for bit: its attention and embedding gradients add "
            "up in no fixed order",
        ),
        (
            predicted.val_loss is None,
            "loss_unknown",
            f"no loss is promised: {predicted.val_loss_source}",
        ),
        (
            predicted.step_seconds.mid + predicted.save_seconds > GRACE_SECONDS,
            "no_grace",
            f"a step and a save take {predicted.step_seconds.mid + predicted.save_seconds:.0f} s: "
            f"clouds give spot machines {GRACE_SECONDS:.0f} s from the signal to the end, so that "
            f"only what was saved before counts (train.save_every)",
        ),
        (
            predicted.step_seconds.mid > 0.01 * limit,
            "long_step",
            f"one step takes {predicted.step_seconds.mid:.1f} s, more than 1% of the budget: the "
            f"spend may end below 97%; a smaller train.batch_tokens lands closer",
        ),
    ]
    return [Warning(code, message) for found, code, message in cases if found]


def _late(cadence: CadencePlan, epochs: float) -> bool:
    """Whether many epochs pass in between. Who gives `train.eval_every` looks as often as that."""
    if not cadence.early_stop or cadence.eval_every_steps is not None:
        return False
    growth = cadence.eval_growth
    return epochs > 2 * loss.FEW_EPOCHS and (growth is None or growth > looks.LATE_GROWTH)

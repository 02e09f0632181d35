"""What a person should know before paying, as warnings with stable codes (docs/plan.md lists them).

Refusals are not here: what does not fit carries its reason in the table, and exits with 3 where
nothing does.
"""

import math
import re

from tuppence.config import DataPlan, Run, Warning
from tuppence.plan.bill import tasks_of
from tuppence.plan.gpus import ceiling_tflops
from tuppence.plan.loss import FEW_EPOCHS, MANY_EPOCHS, effective_tokens
from tuppence.plan.options import Option
from tuppence.plan.shapes import R_SIGMA, export_warnings
from tuppence.plan.tasks import too_much
from tuppence.plan.work import fixed_tokens

POSSIBLE = 0.85  # of the measured matmul ceiling: no published run is above it in bf16
FEWEST_STEPS = 50
BESIDE = 0.05  # of a dollar budget, that is said when it is spent beside it


def flags(run: Run, data: DataPlan, option: Option, *, year: int) -> list[Warning]:
    """The warnings of the chosen option, in the order of their cost. `year` is the current one."""
    found = [
        *_speed(run, option),
        *_data(data, option),
        *_steps(option),
        *_money(run, option, year),
        *_beside(run, option),
        *_tasks(run, data, option),
        *_disk(run, option),
        *_told(option),
        *_loops(run),
    ]
    return [Warning(code, message) for code, message in found] + export_warnings(run.model)


Found = list[tuple[str, str]]


def _speed(run: Run, option: Option) -> Found:
    """Whether what was fixed can be at all: tokens in hours, or an MFU."""
    assert option.job is not None
    found: Found = []
    ceiling, source = ceiling_tflops(option.gpu, option.job.precision)
    ceiling *= option.job.gpu_count
    flops = option.work.shape.flops_per_token
    tokens, hours = fixed_tokens(run, option.work.recipe.batch_tokens), run.budget.hours
    if math.isfinite(tokens) and hours is not None:
        share = tokens * flops / (hours * 3600) / (ceiling * 1e12)
        if share > POSSIBLE:
            found.append(
                (
                    "faster_than_possible",
                    f"{tokens:,.0f} tokens in {hours:g} h are {share:.0%} of the {source}: "
                    f"{option.tokens.mid if option.tokens else 0:,.0f} is what fits",
                )
            )
    if run.machine.mfu is not None and option.mfu is not None:
        share = run.machine.mfu * option.peak_tflops / ceiling
        if share > POSSIBLE:
            found.append(
                (
                    "faster_than_possible",
                    f"machine.mfu={run.machine.mfu:g} of {option.peak_source} is {share:.0%} of "
                    f"{source}",
                )
            )
    return found


def _data(data: DataPlan, option: Option) -> Found:
    assert option.tokens is not None
    found: Found = []
    worth = effective_tokens(option.tokens.mid, float(data.train_tokens))
    told = (
        f"{option.epochs:.1f} epochs of {data.train_tokens:,} tokens, worth {worth:,.0f} new ones"
    )
    if option.epochs > MANY_EPOCHS:
        assert option.stages is not None
        used = MANY_EPOCHS / option.epochs * option.stages.training_usd
        found.append(
            (
                "epochs_16",
                f"{told}: beyond 16 epochs repeats teach next to nothing; here they are reached "
                f"after about ${used:,.2f}",
            )
        )
    elif option.epochs > FEW_EPOCHS:
        found.append(("epochs_4", f"{told}: beyond 4 epochs a repeat is worth less than new text"))
    if not data.exact:
        found.append(("data_estimated", f"the size of {data.source} is an estimate until prepared"))
    return found


def _steps(option: Option) -> Found:
    assert option.tokens is not None
    steps = option.tokens.mid / option.work.recipe.batch_tokens
    if steps >= FEWEST_STEPS:
        return []
    return [
        (
            "few_steps",
            f"{steps:.0f} optimizer steps are too few to learn from; a smaller train.batch_tokens "
            f"takes more",
        )
    ]


def _money(run: Run, option: Option, year: int) -> Found:
    found: Found = []
    offer = option.seller.offer
    if run.budget.usd is None and run.budget.hours is None:
        found.append(
            (
                "no_wall_clock_stop",
                "no clock stops a budget in tokens or steps; add budget.usd or budget.hours",
            )
        )
    if option.seller.assumed:
        found.append(
            (
                "assumed_price",
                f"no price is known for {option.gpu.name}: ${option.seller.usd_per_hour:.2f}/h is "
                f"assumed; machine.usd_per_hour=... says yours",
            )
        )
    elif offer.source != "own":
        said = re.search(r"20\d\d", offer.date or "")
        if said is None:
            found.append(("undated_price", f"the price of {offer.instance_type} has no date"))
        elif int(said[0]) < year:
            found.append(
                ("stale_price", f"the price of {offer.instance_type} is of {offer.date}: ask again")
            )
    return found


def _beside(run: Run, option: Option) -> Found:
    """A budget in dollars is the training machine's; what stands beside it can be more than a
    trifle."""
    assert option.stages is not None
    beside = option.stages.total_usd - option.stages.training_usd
    if run.budget.usd is None or beside <= BESIDE * run.budget.usd:
        return []
    return [
        (
            "beside_budget",
            f"preparation, storage and egress cost ${beside:,.2f} beside the budget of "
            f"${run.budget.usd:,.2f}",
        )
    ]


def _tasks(run: Run, data: DataPlan, option: Option) -> Found:
    """Tasks that take more than their share of the machine's time."""
    assert option.stages is not None
    assert option.tokens is not None
    assert option.tokens_per_second is not None
    dear = too_much(
        tasks_of(run, data, option.work.shape, option.tokens_per_second.mid),
        steps=option.tokens.mid // option.work.recipe.batch_tokens,
        seconds=option.stages.training_seconds,
    )
    return [] if dear is None else [("tasks_share", dear)]


def _disk(run: Run, option: Option) -> Found:
    room = run.machine.disk_gb
    if room is None or option.disk_gb <= room:
        return []
    return [
        (
            "checkpoint_vs_disk",
            f"shards and kept checkpoints take {option.disk_gb:,.0f} GB, machine.disk_gb={room:g}",
        )
    ]


def _told(option: Option) -> Found:
    if option.loss is None:
        return [("loss_unknown", f"no loss is promised: {option.loss_why}")]
    if option.loss.extrapolation > 2:
        return [("loss_extrapolated", option.loss.why)]
    return []


def _loops(run: Run) -> Found:
    """Work is counted at the set recurrence; training draws it log-normally around that."""
    mean = run.model.mean_recurrence
    if run.model.family != "looped" or mean is None:
        return []
    drawn = mean * math.exp(R_SIGMA**2 / 2)
    return [
        (
            "loops_vary",
            f"work is counted at r = {mean:g}; a log-normal r of that median has mean {drawn:.1f}",
        )
    ]

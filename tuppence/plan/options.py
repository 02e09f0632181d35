"""Every machine in the price book that could do a run, planned, priced and put in order.

    budget ──bill──▶ seconds of training ──roofline──▶ tokens ──fit──▶ loss
               for each machine, on demand and spot; for each size where the size is free

Pure arithmetic over a request, a corpus and a price book. What does not fit stays in the table with
the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tuppence.config import Budget, DataPlan, Interval, Run
from tuppence.errors import UserError
from tuppence.plan import shapes
from tuppence.plan.asked import check_budget, check_values, optimizer_of, solve_schedule
from tuppence.plan.bill import Outcome, disk_gb, outcome
from tuppence.plan.cost import Shape
from tuppence.plan.gpus import ceiling_tflops, find_gpu
from tuppence.plan.job import Gpu, Job
from tuppence.plan.layout import Layout, lay_out
from tuppence.plan.loss import (
    MANY_EPOCHS,
    STARTED,
    Group,
    Prediction,
    effective_tokens,
    find_group,
    predict,
    unknown,
)
from tuppence.plan.market import Seller, sellers
from tuppence.plan.prices import Book
from tuppence.plan.stages import Stages
from tuppence.plan.work import (
    DEPTHS,
    Work,
    check_sized,
    depth_for,
    fixed_tokens,
    off_optimal,
    work_of,
)

SIZES_TRIED = 2  # of the dial, on either side of the best so far
SIZES_KNOWN = 2  # a law of fewer sizes tells nothing of other sizes


@dataclass(frozen=True)
class Option:
    """One machine, and what the run would be on it. `why_not` says why it cannot be.

    `peak_tflops` is the ceiling, of all GPUs, that `mfu` is a share of.
    """

    seller: Seller
    gpu: Gpu
    nodes: int
    work: Work
    job: Job | None = None
    peak_memory_gib: Interval | None = None
    tokens_per_second: Interval | None = None
    step_seconds: Interval | None = None
    mfu: Interval | None = None
    peak_tflops: float = 0.0
    peak_source: str = ""
    tokens: Interval | None = None
    train_hours: Interval | None = None
    stages: Stages | None = None
    usd: Interval | None = None
    epochs: float = 0.0
    loss: Prediction | None = None
    loss_why: str = ""
    disk_gb: float = 0.0
    why_not: str | None = None
    contradicts: bool = False  # the words themselves, on this many GPUs

    @property
    def fits(self) -> bool:
        return self.why_not is None


@dataclass(frozen=True)
class Request:
    """What is asked of every machine alike; `layouts` are those found so far."""

    run: Run
    data: DataPlan
    book: Book
    group: Group | None
    layouts: dict[tuple[object, ...], Layout] = field(default_factory=dict)


def options(run: Run, data: DataPlan, book: Book) -> list[Option]:
    """The request on every machine it may use, the best first, what does not fit last.

    Raises UserError where values contradict or nothing in the book answers to machine.*.
    """
    request = _request(run, data, book)
    in_dollars = run.budget.usd is not None
    market = sellers(run.machine, book, in_dollars=in_dollars)
    found = [_best(request, seller) for seller in market]
    if all(option.contradicts for option in found):
        raise UserError(found[0].why_not or "")
    return [found[i] for i in ranked([_standing(request, o) for o in found], run.budget)]


def option_of(run: Run, data: DataPlan, book: Book, seller: Seller) -> Option:
    """The request on one machine."""
    return _best(_request(run, data, book), seller)


def _request(run: Run, data: DataPlan, book: Book) -> Request:
    check_values(run)
    check_budget(run.budget)
    solve_schedule(run)
    check_sized(run)
    group = find_group(
        source=data.source,
        tokenizer=data.tokenizer,
        family=shapes.laid_out(run.model).family or "",
        optimizer=optimizer_of(run),
    )
    return Request(run, data, book, group)


# ---------------------------------------------------------------- order


@dataclass(frozen=True)
class Standing:
    """What an option is ordered by. `usd_per_flop` is of training on new text: repeats count for
    less, and what is spent beyond MANY_EPOCHS for nothing."""

    fits: bool
    usd: float
    usd_per_flop: float
    loss: float | None


def ranked(standings: Sequence[Standing], budget: Budget) -> list[int]:
    """Their places, the best first: the cheapest where the work is fixed; where the dollars are,
    the lowest loss, then those of unknown loss; where the hours are, dollars for training FLOPs."""

    def key(i: int) -> tuple[bool, bool, float, float]:
        s = standings[i]
        if not s.fits or (budget.usd is None and budget.hours is None):
            return not s.fits, False, s.usd, s.usd
        if budget.usd is None or s.loss is None:
            return False, budget.usd is not None, s.usd_per_flop, s.usd
        return False, False, round(s.loss, 4), s.usd

    return sorted(range(len(standings)), key=key)


def usd_per_flop(usd: float, *, tokens: float, unique: float, flops_per_token: float) -> float:
    """Dollars for training FLOPs of new text, of the part of a run that learns from its text."""
    used = min(tokens, MANY_EPOCHS * unique)
    worth = effective_tokens(used, unique) * flops_per_token
    return usd * used / max(tokens, 1.0) / max(worth, 1.0)


def _standing(request: Request, option: Option) -> Standing:
    if option.usd is None or option.tokens is None:
        return Standing(False, math.inf, math.inf, None)
    each = usd_per_flop(
        option.usd.mid,
        tokens=option.tokens.mid,
        unique=float(request.data.train_tokens),
        flops_per_token=option.work.shape.flops_per_token,
    )
    told = None if option.loss is None else option.loss.interval.mid
    return Standing(option.fits, option.usd.mid, each, told)


# ---------------------------------------------------------------- sizes


def _best(request: Request, seller: Seller) -> Option:
    """The machine's plan: at the asked size; at the one that fixed tokens are enough for; or at
    the one of the dial that learns most there."""
    run = request.run
    tokens = fixed_tokens(run, run.train.batch_tokens)
    if shapes.is_sized(run.model):
        found = _planned(request, seller, run.model.depth)
    elif math.isfinite(tokens) and run.budget.usd is None and run.budget.hours is None:
        found = _planned(request, seller, depth_for(run, request.data, tokens))
    else:
        found = _sized(request, seller)
    if not found.fits or found.tokens is None or math.isfinite(tokens):
        return found
    again = _planned(request, seller, found.work.depth, tokens=found.tokens.mid)
    return again if again.fits else found  # the laws read at what the money really buys


def _sized(request: Request, seller: Seller) -> Option:
    """The dial turned to where the machine's plan is worth most; it has one optimum."""
    tried: dict[int, Option] = {}

    def at(i: int) -> Option:
        if i not in tried:
            tried[i] = _planned(request, seller, DEPTHS[i])
        return tried[i]

    low, high = 0, len(DEPTHS) - 1
    while high - low > 2 * SIZES_TRIED:
        middle = (low + high) // 2
        left, right = _worth(request, at(middle)), _worth(request, at(middle + 1))
        low, high = (middle, high) if right > left else (low, middle + 1)
    return max((at(i) for i in range(low, high + 1)), key=lambda option: _worth(request, option))


def _worth(request: Request, option: Option) -> tuple[bool, float]:
    """Larger is better: the lower loss; where no law tells of sizes, the nearer to optimal."""
    shape = option.work.shape
    if not option.fits or option.tokens is None:
        return False, -float(shape.params)  # a smaller one may fit
    group = request.group
    several = group is not None and (not group.sizes or len(group.sizes) >= SIZES_KNOWN)
    if option.loss is not None and several:
        return True, -option.loss.interval.mid
    return True, -off_optimal(request.run, request.data, shape, option.tokens.mid)


# ---------------------------------------------------------------- one machine, one size


def _planned(
    request: Request, seller: Seller, depth: int | None, *, tokens: float | None = None
) -> Option:
    """How the machine would run it, for how long, for what, to which loss.

    The laws are read at `tokens`, or at those that are fixed, else at the compute-optimal ones.
    """
    assert seller.offer.gpu is not None
    run = request.run
    gpu, nodes = find_gpu(seller.offer.gpu), run.machine.nodes or 1
    cards = seller.offer.gpu_count * nodes
    work = work_of(run, request.data, depth=depth, tokens=tokens, cards=cards)
    option = Option(seller=seller, gpu=gpu, nodes=nodes, work=work)
    try:
        layout = _layout(request, work, gpu, seller.offer.gpu_count, nodes)
    except UserError as error:
        return replace(option, why_not=str(error), contradicts=True)
    if layout.job is None:
        return replace(option, why_not=layout.why_not)
    laid = replace(option, job=layout.job, peak_memory_gib=layout.peak_memory_gib)
    return _priced(request, _timed(laid, layout, run.machine.mfu))


def _layout(request: Request, work: Work, gpu: Gpu, gpu_count: int, nodes: int) -> Layout:
    key = (work.shape, work.recipe.batch_tokens, gpu.name, gpu_count, nodes)
    if key not in request.layouts:
        request.layouts[key] = lay_out(
            work.shape,
            gpu,
            gpu_count=gpu_count,
            nodes=nodes,
            batch_sequences=work.recipe.batch_tokens // work.shape.sequence_len,
            train=work.train,
        )
    return request.layouts[key]


def _timed(option: Option, layout: Layout, fixed_mfu: float | None) -> Option:
    """Tokens a second and MFU, by the roofline or at the person's fixed MFU."""
    job, flops = layout.job, option.work.shape.flops_per_token
    assert job is not None
    if fixed_mfu is None:
        assert layout.step_seconds is not None
        seconds = layout.step_seconds
        ceiling, source = ceiling_tflops(option.gpu, job.precision)
    else:
        ceiling, source = option.gpu.sheet_tflops[job.precision], f"data sheet, {job.precision}"
        rate = fixed_mfu * ceiling * 1e12 * job.gpu_count / flops
        seconds = Interval(*(3 * [job.tokens_per_step / rate]))
    peak = ceiling * job.gpu_count
    rates = Interval(*(job.tokens_per_step / s for s in (seconds.high, seconds.mid, seconds.low)))
    shares = (r * flops / (peak * 1e12) for r in (rates.low, rates.mid, rates.high))
    return replace(
        option,
        step_seconds=seconds,
        tokens_per_second=rates,
        mfu=Interval(*shares),
        peak_tflops=peak,
        peak_source=source,
    )


def _priced(request: Request, option: Option) -> Option:
    """Tokens, hours, dollars and loss at the middle speed, with both ends of the interval."""
    speeds, run, data = option.tokens_per_second, request.run, request.data
    assert speeds is not None

    def at(rate: float) -> Outcome:
        return outcome(
            run,
            data,
            request.book,
            option.seller,
            option.work,
            nodes=option.nodes,
            tokens_per_second=rate,
        )

    slow, mid, fast = ends = at(speeds.low), at(speeds.mid), at(speeds.high)
    if mid.tokens < option.work.recipe.batch_tokens:
        return replace(option, why_not=_too_little(run, option, mid))
    hours = sorted(end.bill.training_seconds / 3600 for end in ends)
    usd = sorted(end.bill.total_usd for end in ends)
    tokens = Interval(slow.tokens, mid.tokens, fast.tokens)
    predicted = _loss(request, option.work.shape, tokens)
    return replace(
        option,
        tokens=tokens,
        train_hours=Interval(hours[0], mid.bill.training_seconds / 3600, hours[2]),
        stages=mid.bill,
        usd=Interval(usd[0], mid.bill.total_usd, usd[2]),
        epochs=mid.tokens / data.train_tokens,
        loss=predicted,
        loss_why="" if predicted else _unknown(request, option.work.shape, mid.tokens),
        disk_gb=disk_gb(data, option.work, mid.tokens),
    )


def _loss(request: Request, shape: Shape, tokens: Interval) -> Prediction | None:
    """By the group's law; the interval also covers that the tokens are an interval. None where no
    law is known, or the run is so short that it would say more than a guess at random loses."""
    group = request.group
    if group is None or tokens.low <= 0 or request.run.train.init_from is not None:
        return None
    unique = float(request.data.train_tokens)
    params = float(group.params_of(shape))
    at_low, at_mid, at_high = (
        predict(group, params=params, tokens=n, unique_tokens=unique)
        for n in (tokens.low, tokens.mid, tokens.high)
    )
    middle = at_mid.interval.mid
    if group.metric == "nats/token" and middle > math.log(shape.vocab_size):
        return None
    by_tokens = (at_low.interval.mid - at_high.interval.mid) / 2
    width = math.hypot(middle - at_mid.interval.low, by_tokens)
    return replace(at_mid, interval=Interval(middle - width, middle, middle + width))


def _unknown(request: Request, shape: Shape, tokens: float) -> str:
    if request.run.train.init_from is not None:
        return STARTED
    if request.group is not None:
        return "too short a run: no published one tells of it"
    return unknown(
        source=request.data.source,
        tokenizer=request.data.tokenizer,
        params=shape.params_matmul,
        tokens=tokens,
    )


def _too_little(run: Run, option: Option, mid: Outcome) -> str:
    """What the budget buys, and what would buy one step."""
    batch = option.work.recipe.batch_tokens
    if fixed_tokens(run, batch) < batch:
        return f"the budget is less than one step: {batch:,} tokens; lower train.batch_tokens"
    assert option.step_seconds is not None
    needed = mid.bill.training_seconds + option.step_seconds.mid
    usd = needed / 3600 * option.seller.usd_per_hour * option.nodes
    return f"the budget does not buy boot, set-up and one step: {needed:,.0f} s, ${usd:.2f}"

"""Every machine in the price book that could do a run, planned and priced.

    budget ──stages──▶ seconds of training ──roofline──▶ tokens ──fit──▶ loss
                 for each machine, on demand and spot; for each size where the size is free

Pure arithmetic over a request, a corpus and a price book. What does not fit stays in the table with
the reason. The cheapest first; where the dollars are fixed, what learns most for them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tuppence.config import Budget, DataPlan, Interval, Run, Train
from tuppence.errors import UserError
from tuppence.plan import laws, shapes
from tuppence.plan.asked import check_budget, check_values
from tuppence.plan.cost import Shape, checkpoint_bytes
from tuppence.plan.gpus import ceiling_tflops, find_gpu
from tuppence.plan.job import Gpu, Job
from tuppence.plan.layout import Layout, lay_out
from tuppence.plan.loss import (
    Group,
    Prediction,
    effective_tokens,
    find_group,
    predict,
    unknown,
)
from tuppence.plan.market import Seller, sellers
from tuppence.plan.prices import Book
from tuppence.plan.stages import Stages, affordable_train_seconds, stages

DEPTHS = (*range(2, 32, 2), *range(32, 65, 4))  # the dial's settings that are tried
SIZES_TRIED = 2  # of them on either side of the compute-optimal one
EVALUATIONS = 10
EVAL_TOKENS = 10 * 2**20  # each at most, about what llm.c and nanochat evaluate on
EVAL_SHARE = 0.04  # of training that evaluations take at most
KEPT_CHECKPOINTS = 2  # the last and the best
SAVE_EVERY_SECONDS = 600.0  # at least; longer where saves would take more than their share
SAVE_SHARE = 0.02
WRITE_BYTES_PER_SECOND = 1e9  # a cloud machine's own disk


@dataclass(frozen=True)
class Work:
    """A shape and how it is trained, whatever the machine."""

    shape: Shape
    depth: int | None
    train: Train
    recipe: laws.Recipe


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

    @property
    def budget(self) -> Budget:
        return self.run.budget


def options(run: Run, data: DataPlan, book: Book) -> list[Option]:
    """The request on every machine it may use, cheapest first, what does not fit last.

    Raises UserError where values contradict or nothing in the book answers to machine.*.
    """
    check_values(run)
    check_budget(run.budget)
    model = shapes.laid_out(run.model)
    group = find_group(
        source=data.source,
        tokenizer=data.tokenizer,
        family=model.family or "",
        optimizer=run.train.optimizer or "adamw",
    )
    request = Request(run, data, book, group)
    found = [_best(request, seller) for seller in sellers(run.machine, book)]
    if not any(option.fits for option in found) and all(o.contradicts for o in found):
        raise UserError(found[0].why_not or "")
    return [found[i] for i in ranked([_standing(request, o) for o in found], run.budget)]


@dataclass(frozen=True)
class Standing:
    """What an option is ordered by. `flops` are those of new text: repeats count for less."""

    fits: bool
    usd: float
    flops: float
    loss: float | None


def ranked(standings: Sequence[Standing], budget: Budget) -> list[int]:
    """Their places, the best first: the cheapest where the work is fixed. Where the dollars are,
    the lowest loss; then those of unknown loss, by dollars for training FLOPs."""

    def key(i: int) -> tuple[bool, bool, float]:
        s = standings[i]
        if budget.usd is None or not s.fits:
            return not s.fits, False, s.usd
        return False, s.loss is None, s.usd / max(s.flops, 1.0) if s.loss is None else s.loss

    return sorted(range(len(standings)), key=key)


def _standing(request: Request, option: Option) -> Standing:
    if option.usd is None or option.tokens is None:
        return Standing(False, math.inf, 0.0, None)
    worth = effective_tokens(option.tokens.mid, float(request.data.train_tokens))
    told = None if option.loss is None else option.loss.interval.mid
    return Standing(option.fits, option.usd.mid, worth * option.work.shape.flops_per_token, told)


# ---------------------------------------------------------------- sizes


def _best(request: Request, seller: Seller) -> Option:
    """The machine's plan at the asked size, or at the one of the dial that learns most there."""
    if shapes.is_sized(request.run.model):
        return _planned(request, seller, request.run.model.depth)
    tried: dict[int, Option] = {}

    def at(i: int) -> Option:
        depth = DEPTHS[min(max(i, 0), len(DEPTHS) - 1)]
        if depth not in tried:
            tried[depth] = _planned(request, seller, depth)
        return tried[depth]

    low, high = 0, len(DEPTHS) - 1
    while high - low > 2 * SIZES_TRIED:  # both objectives have one optimum along the dial
        middle = (low + high) // 2
        left, right = _worth(at(middle)), _worth(at(middle + 1))
        low, high = (middle, high) if right > left else (low, middle + 1)
    return max((at(i) for i in range(low, high + 1)), key=_worth)


def _worth(option: Option) -> tuple[bool, float]:
    """Larger is better: the lower loss; where none is known, the nearer to compute-optimal."""
    if not option.fits or option.tokens is None:
        return False, -float(option.work.shape.params)  # a smaller one may fit
    if option.loss is not None and option.loss.interval is not None:
        return True, -option.loss.interval.mid
    optimizer = option.work.train.optimizer or "adamw"
    wanted = laws.horizon_tokens(option.work.shape, optimizer)
    return True, -abs(math.log(option.tokens.mid / wanted))


def _work(request: Request, depth: int | None, tokens: float) -> Work:
    """The shape at a dial setting, and what the laws say of training it for `tokens`."""
    run = request.run
    sized = shapes.is_sized(run.model)
    model = run.model if sized or depth is None else shapes.at_depth(run.model, depth)
    shape = shapes.shape_of(model, request.data.vocab_size)
    optimizer = run.train.optimizer or "adamw"
    recipe = laws.recipe(shape, optimizer, tokens)
    batch = run.train.batch_tokens or recipe.batch_tokens
    if batch % shape.sequence_len:
        near = max(1, round(batch / shape.sequence_len)) * shape.sequence_len
        raise UserError(
            f"train.batch_tokens={batch} is not a multiple of model.sequence_len="
            f"{shape.sequence_len}; the nearest is {near}"
        )
    rate = run.train.learning_rate or recipe.learning_rate
    decay = recipe.weight_decay if run.train.weight_decay is None else run.train.weight_decay
    return Work(
        shape=shape,
        depth=shapes.laid_out(model).n_layer,
        train=replace(run.train, optimizer=optimizer),
        recipe=replace(recipe, batch_tokens=batch, learning_rate=rate, weight_decay=decay),
    )


# ---------------------------------------------------------------- one machine, one size


def _planned(request: Request, seller: Seller, depth: int | None) -> Option:
    """How the machine would run it, for how long, for what, to which loss."""
    assert seller.offer.gpu is not None
    gpu, nodes = find_gpu(seller.offer.gpu), request.run.machine.nodes or 1
    cards = seller.offer.gpu_count * nodes
    work = _work(request, depth, _tokens_guess(request, depth))
    if request.run.train.batch_tokens is None:
        work = _filling(work, cards)
    option = Option(seller=seller, gpu=gpu, nodes=nodes, work=work)
    try:
        layout = _layout(request, work, gpu, seller.offer.gpu_count, nodes)
    except UserError as error:
        return replace(option, why_not=str(error), contradicts=True)
    if layout.job is None:
        return replace(option, why_not=layout.why_not)
    option = _speed(
        replace(option, job=layout.job, peak_memory_gib=layout.peak_memory_gib), layout, request
    )
    return _priced(request, option)


def _tokens_guess(request: Request, depth: int | None) -> float:
    """Training tokens that the laws are read at: what is fixed, else compute-optimal."""
    limits = _token_limits(request.budget, request.run.train.batch_tokens)
    first = _work_shape(request, depth)
    optimizer = request.run.train.optimizer or "adamw"
    return min([*limits, laws.horizon_tokens(first, optimizer)])


def _work_shape(request: Request, depth: int | None) -> Shape:
    model = request.run.model
    if not shapes.is_sized(model) and depth is not None:
        model = shapes.at_depth(model, depth)
    return shapes.shape_of(model, request.data.vocab_size)


def _token_limits(budget: Budget, batch_tokens: int | None) -> list[float]:
    limits = [] if budget.tokens is None else [float(budget.tokens)]
    if budget.steps is not None and batch_tokens is not None:
        limits.append(float(budget.steps * batch_tokens))
    return limits


def _filling(work: Work, cards: int) -> Work:
    """A batch that nobody fixed has at least one sequence for each card, and divides over them."""
    length = work.shape.sequence_len
    sequences = max(1, work.recipe.batch_tokens // length)
    fitting = math.ceil(sequences / cards) * cards * length
    return replace(work, recipe=replace(work.recipe, batch_tokens=fitting))


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


def _speed(option: Option, layout: Layout, request: Request) -> Option:
    """Tokens a second and MFU, by the roofline or at the person's fixed MFU."""
    job, shape = layout.job, option.work.shape
    assert job is not None
    ceiling, source = ceiling_tflops(option.gpu, job.precision)
    flops = shape.flops_per_token
    fixed = request.run.machine.mfu
    if fixed is not None:
        ceiling, source = option.gpu.sheet_tflops[job.precision], f"data sheet, {job.precision}"
        rate = fixed * ceiling * 1e12 * job.gpu_count / flops
        seconds = Interval(*(3 * [job.tokens_per_step / rate]))
    else:
        assert layout.step_seconds is not None
        seconds = layout.step_seconds
    peak = ceiling * job.gpu_count
    rates = Interval(*(job.tokens_per_step / s for s in (seconds.high, seconds.mid, seconds.low)))
    return replace(
        option,
        step_seconds=seconds,
        tokens_per_second=rates,
        mfu=_scaled(rates, flops / (peak * 1e12)),
        peak_tflops=peak,
        peak_source=source,
    )


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(*(factor * v for v in (interval.low, interval.mid, interval.high)))


# ---------------------------------------------------------------- dollars


def _priced(request: Request, option: Option) -> Option:
    """Tokens, hours, dollars and loss at the middle speed, with both ends of the interval."""
    speeds, job = option.tokens_per_second, option.job
    assert job is not None
    assert speeds is not None
    ends = [_at_speed(request, option, rate) for rate in (speeds.low, speeds.mid, speeds.high)]
    slow, mid, fast = ends
    if mid.tokens < job.tokens_per_step:
        return replace(option, why_not=_too_little(request, option, mid))
    hours = sorted(end.bill.training_seconds / 3600 for end in ends)
    usd = sorted(end.bill.total_usd for end in ends)
    unique = float(request.data.train_tokens)
    written = _checkpoint(option.work)
    shards = request.data.train_tokens + request.data.val_tokens
    stored = 2.0 * min(shards, mid.tokens) + KEPT_CHECKPOINTS * written
    return replace(
        option,
        tokens=Interval(slow.tokens, mid.tokens, fast.tokens),
        train_hours=Interval(hours[0], mid.bill.training_seconds / 3600, hours[2]),
        stages=mid.bill,
        usd=Interval(usd[0], mid.bill.total_usd, usd[2]),
        epochs=mid.tokens / unique,
        loss=_loss(request, option.work.shape, mid.tokens),
        loss_why=_unknown(request, option.work, mid.tokens),
        disk_gb=stored / 1e9,
    )


@dataclass(frozen=True)
class _Outcome:
    tokens: float
    bill: Stages


def _at_speed(request: Request, option: Option, rate: float) -> _Outcome:
    """The run at `rate` tokens a second: what the limits leave for training, in whole steps."""
    assert option.job is not None
    budget, seller = request.budget, option.seller
    save = _checkpoint(option.work) / WRITE_BYTES_PER_SECOND
    limit = _dollar_limit(budget, seller, option.nodes)
    fixed = min([*_token_limits(budget, option.work.recipe.batch_tokens), math.inf])
    evaluation = _eval_seconds(request, rate, _seconds(limit, option))
    needed = _tokens_to_prepare(request, min(fixed, rate * _seconds(limit, option)))
    if math.isfinite(limit):
        train = affordable_train_seconds(
            seller.offer,
            spot=seller.spot,
            nodes=option.nodes,
            usd=limit,
            tokens_to_prepare=needed,
            vocab_size=option.work.shape.vocab_size,
            save_seconds_each=save,
            save_every_seconds=max(SAVE_EVERY_SECONDS, save / SAVE_SHARE),
            eval_seconds=evaluation,
        )
        fixed = min(fixed, train * rate)
    step = option.job.tokens_per_step
    tokens = math.floor(fixed / step) * step
    bill = stages(
        seller.offer,
        spot=seller.spot,
        nodes=option.nodes,
        book=request.book,
        train_seconds=tokens / rate,
        tokens_to_prepare=_tokens_to_prepare(request, tokens),
        vocab_size=option.work.shape.vocab_size,
        checkpoint_bytes=_checkpoint(option.work),
        kept_checkpoints=KEPT_CHECKPOINTS,
        save_seconds_each=save,
        save_every_seconds=max(SAVE_EVERY_SECONDS, save / SAVE_SHARE),
        eval_seconds=min(evaluation, EVAL_SHARE * tokens / rate),
    )
    return _Outcome(float(tokens), bill)


def _dollar_limit(budget: Budget, seller: Seller, nodes: int) -> float:
    """Dollars that the training machine may cost, hours at its price; infinite where no limit."""
    usd = math.inf if budget.usd is None else budget.usd
    if budget.hours is not None:
        usd = min(usd, budget.hours * seller.usd_per_hour * nodes)
    return usd


def _seconds(usd: float, option: Option) -> float:
    return usd / (option.seller.usd_per_hour * option.nodes) * 3600


def _eval_seconds(request: Request, rate: float, held_seconds: float) -> float:
    """Forward passes cost a third of a training token; at most their share of the run."""
    tokens = EVALUATIONS * min(request.data.val_tokens, EVAL_TOKENS)
    return min(tokens / (3 * rate), EVAL_SHARE * held_seconds)


def _tokens_to_prepare(request: Request, tokens: float) -> int:
    """No more of a corpus is prepared than the run reads."""
    whole = request.data.train_tokens + request.data.val_tokens
    return int(min(whole, tokens + request.data.val_tokens))


def _checkpoint(work: Work) -> int:
    moved = work.shape.params_body if work.train.optimizer == "muon" else 0
    return checkpoint_bytes(work.shape.params, muon_params=moved)


def _loss(request: Request, shape: Shape, tokens: float) -> Prediction | None:
    if request.group is None:
        return None
    return predict(
        request.group,
        params=float(request.group.params_of(shape)),
        tokens=tokens,
        unique_tokens=float(request.data.train_tokens),
    )


def _unknown(request: Request, work: Work, tokens: float) -> str:
    """Why no loss is promised; empty where one is."""
    if request.group is not None:
        return ""
    return unknown(
        source=request.data.source,
        tokenizer=request.data.tokenizer,
        params=work.shape.params_matmul,
        tokens=tokens,
    )


def _too_little(request: Request, option: Option, mid: _Outcome) -> str:
    """What the budget buys, and what would buy one step."""
    assert option.step_seconds is not None
    needed = mid.bill.training_seconds + option.step_seconds.mid
    usd = needed / 3600 * option.seller.usd_per_hour * option.nodes
    return f"the budget does not buy boot, set-up and one step: {needed:,.0f} s, ${usd:.2f}"

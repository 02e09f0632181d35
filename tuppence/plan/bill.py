"""One machine's run in dollars and tokens: what the budget leaves for training, and the whole bill.

    budget ── boot, set-up, evaluations, saves, preemptions ──▶ training seconds x rate = tokens

A dollar budget covers the training machine's whole bill; an hour of it is an hour held. Evaluations
and saves are kept to a small share of the run; tasks are evaluated as asked.
"""

import math
from dataclasses import dataclass

from tuppence.config import Budget, DataPlan, Run, TasksPlan
from tuppence.plan.cost import Shape
from tuppence.plan.market import Seller
from tuppence.plan.prices import Book
from tuppence.plan.stages import EVAL_SHARE, Stages, affordable_train_seconds, shard_bytes, stages
from tuppence.plan.tasks import evaluations, head_share, run_seconds, solve_tasks, step_seconds
from tuppence.plan.work import Work, fixed_tokens

EVALUATIONS = 10
EVAL_TOKENS = 10 * 2**20  # each at most, about what llm.c and nanochat evaluate on
KEPT_CHECKPOINTS = 2  # the last and the best
SAVE_EVERY_SECONDS = 600.0  # at least; longer where saves would take more than their share
SAVE_SHARE = 0.02
WRITE_BYTES_PER_SECOND = 1e9  # a cloud machine's own disk


@dataclass(frozen=True)
class Outcome:
    """A run at one speed: its tokens, and its bill by phase."""

    tokens: float
    bill: Stages


def outcome(
    run: Run,
    data: DataPlan,
    book: Book,
    seller: Seller,
    work: Work,
    *,
    nodes: int,
    tokens_per_second: float,
) -> Outcome:
    """The run on `nodes` of these machines: as far as the first limit lets it, in whole steps."""
    rate, batch = tokens_per_second, work.recipe.batch_tokens
    limit = dollar_limit(run.budget, seller, nodes)
    held = limit / (seller.usd_per_hour * nodes) * 3600
    tokens = fixed_tokens(run, batch)
    tasks = tasks_of(run, data, work.shape, rate)
    often = evaluations(tasks, min(tokens, rate * held) / batch)
    evaluation = _eval_seconds(data, rate, held, max(EVALUATIONS, often))
    save = work.checkpoint_bytes / WRITE_BYTES_PER_SECOND
    every = max(SAVE_EVERY_SECONDS, save / SAVE_SHARE)
    if math.isfinite(limit):
        train = affordable_train_seconds(
            seller.offer,
            spot=seller.spot,
            nodes=nodes,
            usd=limit,
            tokens_to_prepare=tokens_to_prepare(data, min(tokens, rate * held)),
            vocab_size=work.shape.vocab_size,
            save_seconds_each=save,
            save_every_seconds=every,
            eval_seconds=evaluation + run_seconds(tasks, 1),
        )
        beside = step_seconds(tasks) * rate / batch  # of a second of training
        tokens = min(tokens, train / (1 + beside) * rate)
    tokens = float(math.floor(tokens / batch) * batch)
    bill = stages(
        seller.offer,
        spot=seller.spot,
        nodes=nodes,
        book=book,
        train_seconds=tokens / rate,
        tokens_to_prepare=tokens_to_prepare(data, tokens),
        vocab_size=work.shape.vocab_size,
        checkpoint_bytes=work.checkpoint_bytes,
        kept_checkpoints=KEPT_CHECKPOINTS,
        save_seconds_each=save,
        save_every_seconds=every,
        eval_seconds=min(evaluation, EVAL_SHARE * tokens / rate)
        + run_seconds(tasks, tokens // batch),
    )
    return Outcome(tokens, bill)


def tasks_of(run: Run, data: DataPlan, shape: Shape, rate: float) -> TasksPlan | None:
    """The tasks that are asked for, at so many training tokens a second: of which a forward pass
    is a third."""
    return solve_tasks(
        run,
        data,
        context=shape.sequence_len,
        head=head_share(shape.n_embd, shape.vocab_size, shape.flops_per_token),
        token_seconds=1 / (3 * rate),
    )


def dollar_limit(budget: Budget, seller: Seller, nodes: int) -> float:
    """Dollars that the training machine may cost, hours at its price; infinite where no limit."""
    usd = math.inf if budget.usd is None else budget.usd
    if budget.hours is not None:
        usd = min(usd, budget.hours * seller.usd_per_hour * nodes)
    return usd


def tokens_to_prepare(data: DataPlan, tokens: float) -> int:
    """No more of a corpus is prepared than the run reads."""
    return int(min(data.train_tokens + data.val_tokens, tokens + data.val_tokens))


def disk_gb(data: DataPlan, work: Work, tokens: float) -> float:
    """Room for the shards and the checkpoints that are kept."""
    shards = shard_bytes(tokens_to_prepare(data, tokens), vocab_size=work.shape.vocab_size)
    return (shards + KEPT_CHECKPOINTS * work.checkpoint_bytes) / 1e9


def _eval_seconds(data: DataPlan, rate: float, held_seconds: float, often: float) -> float:
    """Forward passes cost a third of a training token; at most their share of the run."""
    tokens = often * min(data.val_tokens, EVAL_TOKENS)
    return min(tokens / (3 * rate), EVAL_SHARE * held_seconds)

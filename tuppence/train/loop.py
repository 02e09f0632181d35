"""Training: from a plan to a finished run folder, whatever interrupts it.

    turn = lead.next(step)           where the budget stands; which step is the last
    train_step(batch(step), lr(turn.progress))
    if due: evaluate, sample, save   best and last are kept
    ...
    save ▶ evaluate ▶ sample         inside the reserve, against a deadline

With a budget in steps or tokens nothing here depends on time: the run is a pure function of
(code, plan, data, seed), bit for bit on one machine.
"""

import gc
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tuppence import checkpoint, config, host
from tuppence.bucket import Relay
from tuppence.checkpoint import Fence
from tuppence.config import Plan
from tuppence.errors import DoesNotFit, Fault
from tuppence.files import file_sha256
from tuppence.folder import RunFolder
from tuppence.ledger import Meter
from tuppence.live import Live, duration
from tuppence.plan.looks import CALM_GROWTH
from tuppence.plan.shapes import expected_flops
from tuppence.ranks import ALONE, Ranks, is_cut_off
from tuppence.train import annealing
from tuppence.train.draws import keys_of, recurrence_of
from tuppence.train.feed import Batch
from tuppence.train.gauges import peak_gib
from tuppence.train.guard import BAD_STEPS, Window
from tuppence.train.interrupt import Interrupt
from tuppence.train.judging import evaluate, taste
from tuppence.train.pace import Turn, finish_seconds
from tuppence.train.place import Place
from tuppence.train.preflight import preflight
from tuppence.train.rewinding import rewind, rewinds_of
from tuppence.train.saving import ready_to_save, save, saved, stop_if_asked
from tuppence.train.setup import START_SECONDS, Trainer, set_up
from tuppence.train.step import MicroBatch, StepResult, micro_batches, train_step
from tuppence.train.suites import is_due
from tuppence.train.tracking import closing_seconds
from tuppence.train.turning import suspected
from tuppence.train.watchdog import Watchdog

TELLING_PROGRESS = 0.05  # before it the plan knows better than the run how long it takes
TASTE_STEPS = 5  # of an attempt, after which it is known what a step takes
PATIENCE_SECONDS = 1.0  # a batch may take before the wait for it is charged as one


@dataclass(frozen=True)
class Outcome:
    """Steps of the whole run; what one took in this attempt, if there were enough to say."""

    steps: int
    step_seconds: float | None
    peak_memory_gib: float | None


def train(
    plan: Plan,
    folder: RunFolder,
    data_folder: Path,
    *,
    meter: Meter,
    attempt: int,
    ranks: Ranks | None = None,
    fence: Fence | None = None,
    committed: Callable[[Path], None] = lambda path: None,
    alive: Callable[[], float] = lambda: 0.0,
    relay: Relay | None = None,
) -> Outcome:
    """Train `plan` in `folder` from its newest checkpoint, or from the start, to its end.

    The lead has claimed the run (`fence`), or does. `committed` is told of every checkpoint, and
    `alive`, called about every step, says how many seconds what is sent elsewhere lies behind. The
    lead and ranks that do not see its folder are given a `relay`.
    Raises Interrupted after a signal (saved), Fault for what cannot go on (nothing saved is lost).
    """
    ranks = ranks or ALONE
    place = Place(folder, data_folder, attempt, ranks, fence, committed, alive, relay)
    live = Live(silent=not ranks.lead)

    def stalled(message: str) -> None:
        teller = folder if folder.writes else RunFolder(folder.path)  # the lead may be the one
        teller.event("stalled", message, attempt=attempt)
        live.say(f"stalled: {message}")
        meter.close()

    watchdog = Watchdog(
        rank=ranks.rank,
        world=ranks.world,
        store=ranks.store,
        seconds=plan.cadence.stall_seconds,
        told=stalled,
    )
    with Interrupt() as interrupt, watchdog:
        watchdog.at("start", 0, seconds=START_SECONDS)
        try:
            _preflight(plan, place)
            trainer = set_up(plan, place, meter, live, interrupt, watchdog)
            meter.switch("train")
            gc.collect()
            gc.freeze()  # nothing that is alive now is garbage before the end
            try:
                _run(trainer)
            finally:
                trainer.close()
        except RuntimeError as error:
            if isinstance(error, Fault) or ranks.world == 1 or not is_cut_off(error):
                raise
            raise Fault(_cut_off(place, error)) from error
    peak = peak_gib(plan.machine.device)
    return Outcome(trainer.state.step, trainer.pace.seen_step_seconds(), peak)


def _preflight(plan: Plan, place: Place) -> None:
    """Every rank is there, and runs the same on the same."""
    as_read = config.from_json(Plan, config.to_json(plan))  # a recipe may write 3 where it is 3.0
    facts = {
        "code": host.code_sha256(),
        "torch": torch.__version__,
        "plan": hashlib.sha256(config.to_json(as_read).encode()).hexdigest(),
        "data": file_sha256(place.data / "manifest.json"),
    }
    speed = preflight(place.ranks, facts, device=plan.machine.device)
    if speed is not None:
        message = f"{place.ranks.world} ranks, all-reduce at {speed:.2f} GB/s"
        place.folder.event("preflight", message, ranks=place.ranks.world, gbs=speed)


def _cut_off(place: Place, error: RuntimeError) -> str:
    """What to say when a collective fails: the others, or the way to them, are gone."""
    first = str(error).strip().partition("\n")[0]
    there = None if place.beside else checkpoint.pointer(place.folder, "last")
    kept = f"step {there.step} is saved" if there else "nothing was saved yet"
    kept = "the lead says what is saved" if place.beside else kept
    return f"another rank is gone ({first}); {kept}, and the same command goes on from there"


def _run(trainer: Trainer) -> None:
    """Every step that is left, and the end."""
    if trainer.state.evaluation_due and not trainer.state.finished:  # a signal put it off
        _evaluate(trainer)
    ready, first, half = False, trainer.state.step, (1 + trainer.state.progress) / 2
    while not trainer.state.finished and (turn := _next(trainer)):
        before = trainer.state.progress
        _step(trainer, turn)
        if not ready:
            ready_to_save(trainer)
            ready = True
        if trainer.state.bad_steps >= BAD_STEPS:
            if trainer.state.anneal is not None:
                annealing.give_up(trainer)
                break
            rewind(trainer)
            continue
        stop_if_asked(trainer)
        if turn.last:
            break
        taken, crossed = trainer.state.step - first, before < half <= trainer.state.progress
        due = taken == TASTE_STEPS or (taken > TASTE_STEPS and crossed)
        if trainer.pace.timed and due:
            taste(trainer)
        if trainer.state.evaluation_due:
            _evaluate(trainer)
        elif trainer.state.bad_steps == 0 and trainer.lead.save_due(trainer.state.step):
            save(trainer)  # within bad steps it would push older weights, the way back, out
    _finish(trainer)


def _evaluate(trainer: Trainer) -> None:
    """In the middle of a run, which may be over with that."""
    evaluate(trainer, deadline=math.inf)
    annealing.stop_if_over(trainer)


def _next(trainer: Trainer) -> Turn | None:
    state = trainer.state
    return annealing.turn_of(state, trainer.lead.next(state.step))


# ---------------------------------------------------------------- a step


def _step(trainer: Trainer, turn: Turn) -> None:
    """One optimizer step, its row in metrics.jsonl, and the new state."""
    plan, state = trainer.plan, trainer.state
    started = time.monotonic()
    window, rewinds = Window(state.losses, state.norms), rewinds_of(state)
    trainer.at("data")
    tokens_sha, batch = _batch(trainer, rewinds.batch(state.step))
    waited = trainer.feed.waited
    rate_factor = annealing.rate_factor(state, turn, plan.schedule)
    result = train_step(
        trainer.workers,
        trainer.optimizers,
        batch,
        factor=rate_factor,
        grad_clip=plan.optimizer.grad_clip,
        parallel=trainer.parallel,
        judge=window.judged,
        at=trainer.at,
    )
    if result.updated:
        window = window.seen(result.loss, result.grad_norm)
    seconds = time.monotonic() - started
    trainer.pace.step_took(state.step, seconds)
    trainer.state = replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + plan.step.batch_tokens,
        tokens_sha=tokens_sha,
        progress=turn.progress,
        finished=turn.last,
        bad_steps=0 if result.updated else state.bad_steps + 1,
        losses=window.losses,
        norms=window.norms,
        loss_sum=state.loss_sum + (result.loss if result.updated else 0.0),
        loss_count=state.loss_count + result.updated,
    )
    mark = _at_a_mark(trainer, state.progress)
    due = _due_evaluation(trainer, mark)
    trainer.state = replace(trainer.state, evaluation_due=due, sample_due=mark)
    _log(trainer, result, plan.optimizer.learning_rate * rate_factor, seconds, waited)


def _batch(trainer: Trainer, number: int) -> tuple[str, list[MicroBatch]]:
    """The stream's hash after batch `number`, of which only the lead knows, and this rank's
    micro-batches of it."""
    plan, ranks = trainer.plan, trainer.ranks
    tokens_sha, batch = _taken(trainer, number)
    first, rows = ranks.rank * len(batch), len(batch)
    keys = keys_of(plan, number)
    return tokens_sha, micro_batches(
        batch,
        micro_batch=trainer.state.micro_batch,
        device=plan.machine.device,
        keys=None if keys is None else keys[first : first + rows],
        recurrence=recurrence_of(plan, number),
    )


def _taken(trainer: Trainer, number: int) -> Batch:
    """The batch, which was made meanwhile; a wait that is more than a hiccup is charged as such."""
    feed, meter = trainer.feed, trainer.meter
    feed.ask(number, trainer.state.tokens_sha)
    if not feed.there(within=PATIENCE_SECONDS):
        if feed.loader.remote and trainer.ranks.world == 1:  # others would call this rank hung
            trainer.at("data", long=True)
        with meter.phase("data_wait"):
            while not feed.there(within=PATIENCE_SECONDS):
                meter.beat()
    return feed.take()


def _due_evaluation(trainer: Trainer, mark: bool) -> bool:
    """Whether to evaluate after this step. The end of the run has an evaluation of its own."""
    state = trainer.state
    if state.anneal is not None or not trainer.lead.room_to_evaluate(state.step):
        return False
    if mark:
        return True
    growth, epoch = trainer.plan.cadence.eval_growth, trainer.plan.data.train_tokens
    if growth is None or state.tokens <= epoch:
        return False
    growth = growth if suspected(state.points) else max(growth, CALM_GROWTH)
    return state.tokens >= growth * state.evaluated_tokens


def _at_a_mark(trainer: Trainer, previous: float) -> bool:
    """Whether this step crossed one of the run's own marks, at which it also speaks."""
    cadence, state = trainer.plan.cadence, trainer.state
    if any(is_due(suite.plan, state.step) for suite in trainer.suites):
        return True  # tasks come with a val loss
    if cadence.eval_every_steps is not None:
        return state.step % cadence.eval_every_steps == 0
    assert cadence.eval_every_progress is not None
    marks_now = math.floor(state.progress / cadence.eval_every_progress + 1e-9)
    return marks_now > math.floor(previous / cadence.eval_every_progress + 1e-9)


def _log(
    trainer: Trainer, result: StepResult, learning_rate: float, seconds: float, waited: float
) -> None:
    plan, state, meter = trainer.plan, trainer.state, trainer.meter
    rate = plan.step.batch_tokens / seconds
    work = trainer.pace.work(state.step - 1)
    flops = expected_flops(plan.model) * work
    mfu = rate * flops / (plan.machine.peak_tflops * 1e12)
    usd = meter.usd()
    row = {
        "step": state.step,
        "attempt": state.attempt,
        "tokens": state.tokens,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "lr": learning_rate,
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
        "step_seconds": seconds,
        "data_wait": waited,
        "tokens_per_second": rate,
        "mfu": mfu,
        "memory_gib": trainer.gauges.memory_gib,
        "usd": usd,
        "hours": meter.seconds() / 3600,
        "progress": state.progress,
        "tokens_sha": state.tokens_sha,
    }
    trainer.record("metrics", row)
    trainer.gauges.seen(row, work=work)
    trainer.gauges.judged(state.points)
    budget = f"${usd:.4f}" + (f" of ${plan.budget.usd:g}" if plan.budget.usd else "")
    left = plan.predicted.hours.mid * 3600 - meter.seconds()
    if state.progress > TELLING_PROGRESS:
        left = (meter.seconds() - state.began_seconds) * (1 / state.progress - 1)
    peak = f"{plan.machine.peak_tflops:.2f} TFLOPS"
    trainer.live.show(
        f"{state.progress:4.0%}  step {state.step:,}  loss {result.loss:.4f}  {rate:,.0f} tok/s  "
        f"mfu {mfu:.0%} of {peak}  {budget}  {duration(max(0.0, left))} left"
    )
    if not result.updated:
        trainer.skipped = result.skipped or ""
        message = f"step {state.step} skipped: {result.skipped}"
        trainer.folder.event("step_skipped", message, step=state.step, reason=result.skipped)
        trainer.live.say(f"{message}; weights left as they were")


def _finish(trainer: Trainer) -> None:
    """The end: what was trained is saved first, then judged with the time that is left."""
    if trainer.state.step == 0:
        raise DoesNotFit(
            f"the budget was spent before the first step: start-up took "
            f"{trainer.meter.seconds():.1f} s of charged time; give a larger budget"
        )
    if trainer.state.progress < 1:
        message = f"time ran out at progress {trainer.state.progress:.3f}, before the last step"
        trainer.folder.event("late_end", message, step=trainer.state.step)
    trainer.state = replace(trainer.state, finished=True)
    save(trainer)
    saved(trainer)  # and then judged with the time that is left
    stop_if_asked(trainer, now=True)
    left = trainer.pace.seconds_left() - finish_seconds(trainer.plan, trainer.state.step)
    left -= closing_seconds(trainer.plan.track)
    left -= trainer.pace.step_seconds()  # a batch or a token more than the deadline allows
    evaluate(trainer, deadline=time.monotonic() + trainer.ranks.leads(left))
    saved(trainer)
    if trainer.state.best_step is None:  # never evaluated: what there is is the best
        trainer.saver.point("best", trainer.state.step)
        saved(trainer)

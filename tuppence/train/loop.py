"""Training: from a plan to a finished run folder, whatever interrupts it.

    turn = pace.next(step)           where the budget stands; which step is the last
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tuppence import checkpoint, evals, host
from tuppence.checkpoint import State
from tuppence.config import Plan
from tuppence.data.loader import Loader, rolling_sha, val_windows
from tuppence.data.tokenizer import Tokenizer, load_tokenizer
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.folder import RunFolder
from tuppence.hub.load import load_into
from tuppence.ledger import Meter
from tuppence.live import Live, duration
from tuppence.model import Family, build
from tuppence.plan.shapes import expected_flops
from tuppence.train.draws import keys_of, recurrence_of, work_of
from tuppence.train.interrupt import Interrupt, Interrupted
from tuppence.train.optim import optimizers_of
from tuppence.train.pace import Pace, Turn, finish_seconds
from tuppence.train.schedule import factor
from tuppence.train.step import StepResult, micro_batches, train_step
from tuppence.workers import Workers

BAD_STEPS = 5  # non-finite steps in a row after which going on only costs money
KEEP_LAST = 2
TELLING_PROGRESS = 0.05  # before it the plan knows better than the run how long it takes
FIRST_STATE = State(
    step=0,
    tokens=0,
    tokens_sha=hashlib.sha256(b"").hexdigest(),
    progress=0.0,
    finished=False,
    evaluation_due=False,
    began_seconds=0.0,
    bad_steps=0,
    best_step=None,
    best_val_loss=None,
    attempt=1,
    saved_at=0.0,
)


@dataclass
class Trainer:
    """What the loop holds: the plan's things built, and where the run is."""

    plan: Plan
    folder: RunFolder
    meter: Meter
    pace: Pace
    live: Live
    interrupt: Interrupt
    loader: Loader
    data_folder: Path
    tokenizer: Tokenizer
    workers: Workers
    prompt: list[int]
    optimizers: list[torch.optim.Optimizer]
    state: State
    saved_step: int = -1
    last_save: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Steps of the whole run; what one took in this attempt, if there were enough to say."""

    steps: int
    step_seconds: float | None
    peak_memory_gib: float | None


def train(
    plan: Plan, folder: RunFolder, data_folder: Path, *, meter: Meter, attempt: int
) -> Outcome:
    """Train `plan` in `folder` from its newest checkpoint, or from the start, to its end.

    Raises Interrupted after a signal (saved), Fault for what cannot go on (nothing saved is lost).
    """
    live = Live()
    with Interrupt() as interrupt:
        trainer = _set_up(plan, folder, data_folder, meter, attempt, live, interrupt)
        meter.switch("train")
        gc.collect()
        gc.freeze()  # nothing that is alive now is garbage before the end
        if trainer.state.evaluation_due and not trainer.state.finished:  # a signal put it off
            _evaluate(trainer, deadline=math.inf)
        while not trainer.state.finished and (turn := trainer.pace.next(trainer.state.step)):
            _step(trainer, turn)
            _stop_if_asked(trainer)
            if turn.last:
                break
            if trainer.state.evaluation_due:
                _evaluate(trainer, deadline=math.inf)
            elif _due_save(trainer):
                _save(trainer)
        _finish(trainer)
    return Outcome(trainer.state.step, trainer.pace.seen_step_seconds(), _peak_gib(plan))


def _set_up(
    plan: Plan,
    folder: RunFolder,
    data_folder: Path,
    meter: Meter,
    attempt: int,
    live: Live,
    interrupt: Interrupt,
) -> Trainer:
    device = plan.machine.device
    if device == "cuda" and not torch.cuda.is_available():
        raise DoesNotFit(f"this run was planned on {plan.machine.name}; no CUDA GPU is here now")
    torch.set_num_threads(plan.machine.threads if plan.step.workers == 1 else 1)
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    prompt = prompt_ids(plan, tokenizer, data_folder)
    model = build(plan.model, attention=plan.machine.attention, device=device)
    workers = Workers(
        torch.compile(model) if plan.machine.compile else model,  # type: ignore[arg-type]
        count=plan.step.workers,
        device=device,
        precision=plan.machine.precision,
    )
    optimizers = optimizers_of(model, plan.optimizer, workers)
    state = checkpoint.load_newest(folder, model, optimizers)
    if state is None:
        _first_weights(model, plan, folder, attempt)
        state = replace(FIRST_STATE, began_seconds=meter.seconds())
    else:
        live.say(f"resuming from step {state.step} (attempt {attempt})")
        message = f"from step {state.step}"
        folder.event("resume", message, attempt=attempt, step=state.step, saved_at=state.saved_at)
    trainer = Trainer(
        plan=plan,
        folder=folder,
        meter=meter,
        pace=Pace(plan, meter, began=state.began_seconds, work=work_of(plan)),
        live=live,
        interrupt=interrupt,
        loader=Loader(
            data_folder,
            sequence_len=plan.model.sequence_len,
            batch_size=plan.step.batch_sequences,
            seed=plan.step.seed,
        ),
        data_folder=data_folder,
        tokenizer=tokenizer,
        workers=workers,
        prompt=prompt,
        optimizers=optimizers,
        state=replace(state, attempt=attempt),
        saved_step=state.step if state.step else -1,
        last_save=time.monotonic(),
    )
    if not (folder.tokenizer / "tokenizer.json").exists():
        folder.tokenizer.mkdir(parents=True, exist_ok=True)
        trainer.tokenizer.save(folder.tokenizer)
    return trainer


def _first_weights(model: Family, plan: Plan, folder: RunFolder, attempt: int) -> None:
    """Drawn from the seed, or those that the plan starts from."""
    if plan.init is None:
        model.init_weights(plan.step.seed)
        folder.event("start", "from the beginning", attempt=attempt, step=0)
        return
    load_into(model, plan.init)
    message = f"from the weights in {plan.init.path}"
    details = {"init_from": plan.init.path, "init_sha256": plan.init.sha256}
    folder.event("start", message, attempt=attempt, step=0, **details)


def prompt_ids(plan: Plan, tokenizer: Tokenizer, data_folder: Path) -> list[int]:
    """The tokens that samples continue: of the prompt asked for, or of a newline.

    Where the tokenizer has no newline it is the first token of the val split. Raises UserError for
    a prompt that cannot be encoded, before any money is spent on training.
    """
    asked = plan.cadence.sample_prompt
    try:
        ids: list[int] = tokenizer.encode("\n" if asked is None else asked).tolist()
    except UserError as error:
        if asked is not None:
            raise UserError(f"train.sample_prompt={asked!r}: {error}") from None
        ids = []
    if asked is not None and not ids:
        raise UserError("train.sample_prompt is empty; give a character, or leave it out")
    if ids:
        return ids
    first = val_windows(data_folder, sequence_len=1, max_tokens=1)
    return [int(next(first.batches(1))[0][0, 0])]


# ---------------------------------------------------------------- a step


def _step(trainer: Trainer, turn: Turn) -> None:
    """One optimizer step, its row in metrics.jsonl, and the new state."""
    plan, state = trainer.plan, trainer.state
    started = time.monotonic()
    batch = trainer.loader.batch(state.step)
    tokens_sha = rolling_sha(state.tokens_sha, batch)
    rate_factor = factor(turn.progress, plan.schedule)
    result = train_step(
        trainer.workers,
        trainer.optimizers,
        micro_batches(
            batch,
            micro_batch=plan.step.micro_batch,
            device=plan.machine.device,
            keys=keys_of(plan, state.step),
            recurrence=recurrence_of(plan, state.step),
        ),
        factor=rate_factor,
        grad_clip=plan.optimizer.grad_clip,
    )
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
    )
    due = _due_evaluation(trainer, state.progress)
    trainer.state = replace(trainer.state, evaluation_due=due)
    _log(trainer, result, plan.optimizer.learning_rate * rate_factor, seconds)
    if not result.updated:
        _guard(trainer, result)


def _log(trainer: Trainer, result: StepResult, learning_rate: float, seconds: float) -> None:
    plan, state, meter = trainer.plan, trainer.state, trainer.meter
    rate = plan.step.batch_tokens / seconds
    flops = expected_flops(plan.model) * trainer.pace.work(state.step - 1)
    mfu = rate * flops / (plan.machine.peak_tflops * 1e12)
    usd = meter.usd()
    trainer.folder.append(
        "metrics",
        {
            "step": state.step,
            "attempt": state.attempt,
            "tokens": state.tokens,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "lr": learning_rate,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": mfu,
            "usd": usd,
            "progress": state.progress,
            "tokens_sha": state.tokens_sha,
        },
    )
    budget = f"${usd:.4f}" + (f" of ${plan.budget.usd:g}" if plan.budget.usd else "")
    left = plan.predicted.hours.mid * 3600 - meter.seconds()
    if state.progress > TELLING_PROGRESS:
        left = (meter.seconds() - state.began_seconds) * (1 / state.progress - 1)
    peak = f"{plan.machine.peak_tflops:.2f} TFLOPS"
    trainer.live.show(
        f"{state.progress:4.0%}  step {state.step:,}  loss {result.loss:.4f}  {rate:,.0f} tok/s  "
        f"mfu {mfu:.0%} of {peak}  {budget}  {duration(max(0.0, left))} left"
    )


def _guard(trainer: Trainer, result: StepResult) -> None:
    """A step that was not finite left no trace in the weights; too many of them end the run."""
    state = trainer.state
    what = f"loss {result.loss}, gradient norm {result.grad_norm}"
    trainer.folder.event("nonfinite_step", f"step {state.step} skipped: {what}", step=state.step)
    trainer.live.say(f"step {state.step} is not finite ({what}): weights left as they were")
    if state.bad_steps < BAD_STEPS:
        return
    there = checkpoint.complete(trainer.folder)
    kept = f"step {int(there[-1].name[5:])} is saved" if there else "nothing was saved yet"
    message = (
        f"{BAD_STEPS} steps in a row up to step {state.step} were not finite ({what}); {kept}. "
        f"Lower train.learning_rate={trainer.plan.optimizer.learning_rate:g} and start again"
    )
    trainer.folder.event("nonfinite_stop", message, step=state.step)
    raise Fault(message)


# ---------------------------------------------------------------- evaluate, sample, save


def _due_evaluation(trainer: Trainer, previous: float) -> bool:
    """Whether this step crossed a mark. The end of the run has an evaluation of its own."""
    cadence, state, pace = trainer.plan.cadence, trainer.state, trainer.pace
    if pace.timed and not pace.room_for(pace.eval_seconds + pace.save_seconds, state.step):
        return False
    if cadence.eval_every_steps is not None:
        return state.step % cadence.eval_every_steps == 0
    assert cadence.eval_every_progress is not None
    marks_now = math.floor(state.progress / cadence.eval_every_progress + 1e-9)
    return marks_now > math.floor(previous / cadence.eval_every_progress + 1e-9)


def _due_save(trainer: Trainer) -> bool:
    cadence, pace = trainer.plan.cadence, trainer.pace
    if pace.timed and not pace.room_for(pace.save_seconds, trainer.state.step):
        return False
    if cadence.save_every_steps is not None:
        return trainer.state.step % cadence.save_every_steps == 0
    assert cadence.save_every_seconds is not None
    return time.monotonic() - trainer.last_save >= cadence.save_every_seconds


def _evaluate(trainer: Trainer, *, deadline: float) -> None:
    """Evaluate and sample; a better loss than ever is saved as `best`."""
    started = time.monotonic()
    with trainer.meter.phase("evaluate"):
        result = _val_loss(trainer, deadline)
        if result is None:
            message = "the budget left no time for one batch of the evaluation"
            trainer.folder.event("eval_skipped", message, step=trainer.state.step)
            return
        trainer.state = state = replace(trainer.state, evaluation_due=False)
        row = {"step": state.step, "attempt": state.attempt, "split": "val", "loss": result.loss}
        row |= {"bpb": result.bpb, "tokens": result.tokens, "of_tokens": result.of_tokens}
        row |= {"progress": state.progress, "usd": trainer.meter.usd(), "seconds": result.seconds}
        trainer.folder.append("evals", row)
        bits = f" ({result.bpb:.4f} bits/byte)" if result.bpb is not None else ""
        trainer.live.say(f"step {state.step:,}: val loss {result.loss:.4f}{bits}")
        _sample(trainer, deadline)
    if math.isinf(deadline):  # one that was not cut short says what the last one will take
        trainer.pace.evaluation_took(time.monotonic() - started)
    whole = result.tokens == result.of_tokens  # a part is not compared with the whole
    if state.best_val_loss is None or (whole and result.loss < state.best_val_loss):
        trainer.state = replace(state, best_step=state.step, best_val_loss=result.loss)
        _save(trainer)
        pointer = checkpoint.pointer(trainer.folder, "last")
        assert pointer is not None
        checkpoint.point(trainer.folder, "best", pointer)


def _val_loss(trainer: Trainer, deadline: float) -> evals.Evaluation | None:
    plan = trainer.plan
    windows = val_windows(
        trainer.data_folder,
        sequence_len=plan.model.sequence_len,
        max_tokens=plan.cadence.eval_tokens,
    )
    return evals.evaluate(
        trainer.workers,
        windows.batches(plan.cadence.eval_batch),
        of_tokens=windows.tokens,
        token_bytes=trainer.tokenizer.token_bytes(),
        deadline=deadline,
        tick=lambda: _stop_if_asked(trainer),
    )


def _sample(trainer: Trainer, deadline: float) -> None:
    """Let the model speak, and keep what it says."""
    plan, tokenizer = trainer.plan, trainer.tokenizer
    if not plan.cadence.sample_tokens:
        return
    ids = evals.generate(
        trainer.workers,
        trainer.prompt,
        new_tokens=plan.cadence.sample_tokens,
        context=plan.model.sequence_len,
        seed=plan.step.seed,
        stop=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        deadline=deadline,
    )
    row: dict[str, Any] = {"step": trainer.state.step, "attempt": trainer.state.attempt}
    row |= {"prompt": tokenizer.decode(trainer.prompt), "text": tokenizer.decode(ids)}
    trainer.folder.append("samples", {**row, "temperature": 0.8, "seed": plan.step.seed})


def _save(trainer: Trainer) -> None:
    """Checkpoint the present state, unless this step is saved already."""
    if trainer.saved_step == trainer.state.step:
        return
    started = time.monotonic()
    with trainer.meter.phase("save"):
        trainer.state = replace(trainer.state, saved_at=time.time())
        pointer = checkpoint.save(
            trainer.folder, _bare(trainer.workers.model), trainer.optimizers, trainer.state
        )
        checkpoint.retain(trainer.folder, keep_last=KEEP_LAST)
    trainer.last_save = time.monotonic()
    trainer.pace.save_seconds = trainer.last_save - started
    trainer.saved_step = pointer.step
    message = f"step {pointer.step}"
    trainer.folder.event("save", message, step=pointer.step, sha256=pointer.sha256)


def _stop_if_asked(trainer: Trainer) -> None:
    """Between steps and evaluation batches: say we are alive; after a signal, save and stop."""
    trainer.meter.beat()
    if trainer.interrupt.signal:
        _save(trainer)
        raise Interrupted(trainer.interrupt.signal, trainer.state.step)


def _bare(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself where torch.compile wrapped it."""
    return getattr(model, "_orig_mod", model)


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
    _save(trainer)
    _stop_if_asked(trainer)
    left = trainer.pace.seconds_left() - finish_seconds(trainer.plan, trainer.state.step)
    left -= trainer.pace.step_seconds()  # a batch or a token more than the deadline allows
    _evaluate(trainer, deadline=time.monotonic() + left)
    last = checkpoint.pointer(trainer.folder, "last")
    if last is not None and checkpoint.pointer(trainer.folder, "best") is None:
        checkpoint.point(trainer.folder, "best", last)  # never evaluated: what there is is the best


def _peak_gib(plan: Plan) -> float | None:
    """The most memory the run has held: the card's on a GPU, else the process's."""
    if plan.machine.device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    return host.peak_rss_gib()

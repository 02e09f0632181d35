"""Evaluating and sampling during a run, and what follows from it.

    val loss ──▶ a row      tasks that are due ──▶ the row again, with "core": {...}      samples

In a budget of time the end keeps what each suite of tasks will take, so a small part of each is
timed early on, while all is cold, and once more half-way. Before the end a suite may take OVERRUN
times what is expected of it and no more, so that a guess that was far off costs items and not
training; what it took is then what is expected. In a budget of steps nothing is cut.

Answers of weights that are saved are kept in a journal: the next attempt asks what is missing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from tuppence import checkpoint
from tuppence.data.loader import val_windows
from tuppence.evals import running
from tuppence.evals.generate import generate
from tuppence.evals.items import Judged, Task
from tuppence.evals.loss import Evaluation, val_loss
from tuppence.evals.samples import samples
from tuppence.evals.score import NotFinite
from tuppence.evals.subject import Subject, identity_of, of_run
from tuppence.evals.told import line
from tuppence.ranks import ALONE, Ranks
from tuppence.train import turning
from tuppence.train.pace import OVERRUN
from tuppence.train.saving import save, stop_if_asked
from tuppence.train.setup import Trainer
from tuppence.train.suites import Document, Suite, is_due

TASTE = 20  # one item in so many is timed


def evaluate(trainer: Trainer, *, deadline: float) -> None:
    """Evaluate and sample; a better loss than ever is saved as `best`.

    Whatever a signal interrupts stays due.
    """
    started = time.monotonic()
    trainer.at("evaluate")
    with trainer.meter.phase("evaluate"):
        result = _val_loss(trainer, deadline)
        if result is None:
            message = "the budget left no time for one batch of the evaluation"
            trainer.folder.event("eval_skipped", message, step=trainer.state.step)
            return
        state = replace(trainer.state, evaluation_due=False, evaluated_tokens=trainer.state.tokens)
        whole = result.tokens == result.of_tokens  # a part is not compared with the whole
        if whole and math.isfinite(result.loss):
            state = turning.seen(state, result.loss, epoch_tokens=trainer.plan.data.train_tokens)
        if not math.isfinite(result.loss):  # the weights are broken: the guard's next steps tell
            _not_finite(trainer, f"val loss {result.loss}")
            trainer.state = state
            trainer.lead.forget()
            return
        row = _told(trainer, result)
        before = time.monotonic()
        if tasks := _tasks(trainer, deadline):
            trainer.record("evals", {**row, **tasks, "usd": trainer.meter.usd()})
        started += time.monotonic() - before  # tasks are reckoned apart
        trainer.state = state
        if state.sample_due or state.finished:
            _sample(trainer, deadline)
    if math.isinf(deadline) and state.sample_due:
        # one that was not cut short says what the last one will take
        trainer.pace.evaluation_took(time.monotonic() - started)
    trainer.lead.forget()
    if state.best_val_loss is None or (whole and result.loss < state.best_val_loss):
        trainer.state = replace(state, best_step=state.step, best_val_loss=result.loss)
        save(trainer)
        trainer.saver.point("best", state.step)


def _not_finite(trainer: Trainer, what: str) -> None:
    """An evaluation counts for nothing; the guard judges the weights."""
    message = f"{what} after step {trainer.state.step}: it is not counted"
    trainer.folder.event("eval_not_finite", message, step=trainer.state.step)
    trainer.live.say(message)


def _told(trainer: Trainer, result: Evaluation) -> Document:
    """The evaluation's row, written and said at once: tasks may take long."""
    state = trainer.state
    row = {"step": state.step, "attempt": state.attempt, "split": "val", "loss": result.loss}
    row |= {"error": result.error, "bpb": result.bpb}
    row |= {"tokens": result.tokens, "of_tokens": result.of_tokens}
    row |= {"progress": state.progress, "usd": trainer.meter.usd(), "seconds": result.seconds}
    row |= trainer.measure
    trainer.record("evals", row)
    bits = f" ({result.bpb:.4f} bits/byte)" if result.bpb is not None else ""
    trainer.live.say(f"step {state.step:,}: val loss {result.loss:.4f}{bits}")
    return row


def _val_loss(trainer: Trainer, deadline: float) -> Evaluation | None:
    plan = trainer.plan
    windows = val_windows(
        trainer.place.data,
        sequence_len=plan.model.sequence_len,
        max_tokens=plan.cadence.eval_tokens,
    )

    def between() -> None:
        trainer.at("evaluate")
        stop_if_asked(trainer, now=True)

    return val_loss(
        trainer.workers,
        windows.batches(plan.cadence.eval_batch),
        of_tokens=windows.tokens,
        token_bytes=trainer.tokenizer.token_bytes(),
        deadline=deadline,
        tick=between,
        ranks=trainer.ranks,
    )


# ---------------------------------------------------------------- tasks


def _tasks(trainer: Trainer, deadline: float) -> Document:
    """What the suites say that are due: at the end, for which `deadline` is, all of them."""
    end, step = trainer.state.finished, trainer.state.step
    found: Document = {}
    for suite in trainer.suites:
        name = suite.plan.name
        if not end and not is_due(suite.plan, step):
            continue
        until = deadline - _behind(trainer, name) if end else _until(trainer, name)
        try:
            told = None if until is None else _judged(trainer, suite, until)
        except NotFinite as error:
            _not_finite(trainer, f"{name}: {error}")
            continue
        if told is None:
            message = f"no time is left for {name} at step {step}"
            trainer.folder.event("tasks_skipped", message, step=step, suite=name)
            trainer.live.say(message)
        else:
            found[name] = told
    return found


def _behind(trainer: Trainer, name: str) -> float:
    """Seconds that what comes after a suite at the end may count on."""
    pace, names = trainer.pace, [suite.plan.name for suite in trainer.suites]
    later = names[names.index(name) + 1 :]
    return sum(pace.suite_seconds(one) for one in later) + pace.sample_seconds()


def _until(trainer: Trainer, name: str) -> float | None:
    """By when a suite must be done in the middle of a run; None where the end needs the time."""
    pace, ranks = trainer.pace, trainer.ranks
    if not pace.timed:
        return math.inf
    seconds = pace.suite_seconds(name)
    if not ranks.agree(pace.room_for(seconds, trainer.state.step)):
        return None
    return time.monotonic() + ranks.leads(OVERRUN * seconds)


def _judged(trainer: Trainer, suite: Suite, until: float) -> Document | None:
    """One suite's result; None where the time was too short for a single wave."""
    name, started = suite.plan.name, time.monotonic()
    weights = _saved_weights(trainer, name)
    judged = _answered(trainer, suite, suite.tasks, until, weights)
    seconds, count = time.monotonic() - started, sum(map(len, judged.values()))
    if weights is None:  # else some answers may have been there
        trainer.pace.suite_took(name, seconds * suite.count / count if count else math.inf)
    if not count:
        return None
    if count < suite.count:
        message = f"{name} was cut short at {count:,} of {suite.count:,} items: its time was up"
        trainer.folder.event("tasks_cut", message, step=trainer.state.step, suite=name)
    document = suite.summary(judged) | {
        "of_items": suite.count,
        "seconds": seconds,
        "precision": trainer.plan.machine.precision,
    }
    trainer.live.say(f"step {trainer.state.step:,}: {line(document)}")
    return document


def _saved_weights(trainer: Trainer, name: str) -> str | None:
    """The hash of the weights as they are now, told to all ranks; None where they are not saved."""
    state = trainer.state
    if trainer.saved_step != state.step:
        return None

    def sha256() -> str | None:
        last = checkpoint.pointer(trainer.folder, "last")  # behind a save that is being written
        return last.sha256 if last is not None and last.step == state.step else None

    asked = f"weights {name} {state.step} {state.rewound_steps}"  # a rewind may lead to others
    found: str | None = trainer.ranks.told(asked, sha256)
    return found


def _answered(
    trainer: Trainer,
    suite: Suite,
    tasks: Sequence[Task],
    until: float,
    weights: str | None = None,
) -> dict[str, list[Judged]]:
    """The items of tasks, as far as the time allows; of saved `weights` the answers are kept."""
    name, step = suite.plan.name, trainer.state.step
    place = trainer.folder.file("evaluations") / checkpoint.name_of(step)
    trainer.at("evaluate", long=True)  # every rank makes ids of the first items

    def between() -> None:
        trainer.at("evaluate")
        stop_if_asked(trainer, now=True)

    def told(done: int, of: int) -> None:
        trainer.live.show(f"{name}: {done:,} of {of:,} items")

    judged = running.run(
        _subject(trainer, weights),
        tasks,
        journal=None if weights is None else place / f"train_{name}.jsonl",
        suite=suite.told,
        ranks=trainer.ranks,
        deadline=until,
        tick=between,
        told=told,
        say=trainer.live.say,
    )
    trainer.at("evaluate")
    return judged


def taste(trainer: Trainer) -> None:
    """Time one item in TASTE of each suite, where the end has room for that."""
    pace = trainer.pace
    for suite in trainer.suites:
        name = suite.plan.name
        seconds = pace.suite_seconds(name)
        if not trainer.ranks.agree(pace.room_for(2 * seconds / TASTE, trainer.state.step)):
            continue
        part = [replace(task, count=max(1, task.count // TASTE)) for task in suite.tasks]
        with trainer.meter.phase("evaluate"):
            started = time.monotonic()
            try:
                judged = _answered(trainer, suite, part, started + seconds)
            except NotFinite as error:
                _not_finite(trainer, f"{name}: {error}")
                continue
            seconds, count = time.monotonic() - started, sum(map(len, judged.values()))
        pace.suite_tasted(name, seconds * suite.count / count if count else math.inf)
    trainer.lead.forget()


def _subject(trainer: Trainer, weights: str | None = None) -> Subject:
    """The model as it is now, with the hash of its weights if they are saved; on a card with as
    many places in a pass as training has."""
    plan = trainer.plan
    context, tokenizer = plan.model.sequence_len, trainer.tokenizer
    training = plan.cadence.eval_batch * context
    who = identity_of(
        weights or f"step {trainer.state.step}",
        tokenizer,
        context=context,
        precision=plan.machine.precision,
    )
    return of_run(
        trainer.workers,
        tokenizer,
        context=context,
        identity=who,
        places=None if plan.machine.device == "cpu" else training,
    )


# ---------------------------------------------------------------- samples


def _sample(trainer: Trainer, deadline: float) -> None:
    """Let the model speak, and keep what it says: at the end to the fixed prompts too."""
    cadence, ranks = trainer.plan.cadence, trainer.ranks
    together = trainer.parallel.how == "fsdp"  # nobody has the weights for himself
    if not cadence.sample_tokens and not cadence.fixed_tokens:
        return
    trainer.at("evaluate", long=True)  # on every rank: those that do not sample wait
    if not (ranks.lead or together):
        return
    speakers = ranks if together else ALONE
    if cadence.sample_tokens:
        _continue(trainer, deadline, speakers)
    if trainer.state.finished and cadence.fixed_tokens:
        said = samples(
            _subject(trainer), new_tokens=cadence.fixed_tokens, deadline=deadline, ranks=speakers
        )
        for row in said.rows:
            trainer.record("samples", {**_at(trainer), "fixed": True, **row})
    trainer.at("evaluate")


def _continue(trainer: Trainer, deadline: float, ranks: Ranks) -> None:
    """The run's own prompt."""
    plan, tokenizer = trainer.plan, trainer.tokenizer
    ids = generate(
        trainer.workers,
        trainer.prompt,
        new_tokens=plan.cadence.sample_tokens,
        context=plan.model.sequence_len,
        seed=plan.step.seed,
        stop=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        deadline=deadline,
        ranks=ranks,
    )
    row = {"prompt": tokenizer.decode(trainer.prompt), "text": tokenizer.decode(ids)}
    said = {**_at(trainer), **row, "temperature": 0.8, "seed": plan.step.seed}
    trainer.record("samples", said)


def _at(trainer: Trainer) -> Document:
    return {"step": trainer.state.step, "attempt": trainer.state.attempt}

"""The end of a run that should stop early: back to its best weights, and down with the rate.

    val loss       \\___   _/ turned             back to the best checkpoint, and from there
    learning rate  ‾‾‾‾‾‾‾‾‾                     straight down to the floor, then the usual end:
                        \\_ anneal               evaluate, sample, stop

The anneal takes ANNEAL_SHARE of what the budget has left, at most MOST_STEPS of the steps so far.
The better of before and after it is `best`. That it goes on is in the checkpoint, which is saved
again at once: whatever interrupts a run, it anneals as it would have.

A run that reaches `target_loss` ends the same way; there the best weights are the present ones.
"""

import math
import time
from dataclasses import asdict, replace
from typing import Any

from tuppence import checkpoint
from tuppence.checkpoint import Anneal, State
from tuppence.config import SchedulePlan
from tuppence.train.pace import Turn
from tuppence.train.rewinding import drop_later, go_back, is_sound, rewinds_of, went_back
from tuppence.train.saving import save, saved
from tuppence.train.schedule import factor
from tuppence.train.setup import Trainer
from tuppence.train.turning import turned

ANNEAL_SHARE = 0.05  # of the steps that are left
MOST_STEPS = 0.1  # of the steps so far
LEAST_STEPS = 5


# ---------------------------------------------------------------- the steps of an anneal


def turn_of(state: State, turn: Turn | None) -> Turn | None:
    """The next step's place in a run that ends with its anneal, where there is one.

    The budget may end it sooner.
    """
    if turn is None or state.anneal is None:
        return turn
    end, after = state.anneal.back_to + state.anneal.steps, state.step + 1
    last = turn.last or after >= end
    return Turn(1.0 if last else min(after / end, math.nextafter(1, 0)), last)


def rate_factor(state: State, turn: Turn, schedule: SchedulePlan) -> float:
    """What to multiply the peak learning rate by in the next step."""
    anneal = state.anneal
    if anneal is None or turn.last:
        return factor(turn.progress, schedule)
    done = (state.step + 1 - anneal.back_to) / anneal.steps
    return anneal.factor + (schedule.floor - anneal.factor) * done


def give_up(trainer: Trainer) -> None:
    """The guard refused step after step of an anneal: the run ends here, for its best stands."""
    step = trainer.state.step
    message = f"the anneal ends at step {step}: {trainer.skipped}"
    trainer.folder.event("anneal_given_up", message, step=step)
    trainer.live.say(message)
    trainer.state = replace(trainer.state, progress=1.0)


# ---------------------------------------------------------------- whether, and from where


def stop_if_over(trainer: Trainer) -> None:
    """After an evaluation: where validation has turned, or the loss is the one that was asked for,
    go back to the best weights and begin the anneal."""
    state = trainer.state
    if state.anneal is not None or state.stays:
        return
    why = _why(trainer)
    if why is None:
        return
    saved(trainer)  # the lead reads whole checkpoints
    trainer.at("save", long=True)
    told = f"early stop {state.step} {state.rewound_steps}"
    found = trainer.ranks.told(told, lambda: _decided(trainer))
    if found is None:
        _go_on(trainer, why)
        return
    if found["back_to"] != state.step:
        go_back(trainer, found["back_to"], rewinds_of(state), found["best"])
    elif not found["sound"]:
        trainer.state = replace(state, best_step=None, best_val_loss=None)
    _say(trainer, state, why, found)
    _begin(trainer, why, found["steps"])


def _why(trainer: Trainer) -> tuple[str, str] | None:
    """A word and a sentence; None where the run goes on."""
    state, cadence = trainer.state, trainer.plan.cadence
    target, best = cadence.target_loss, state.best_val_loss
    if target is not None and best is not None and best <= target:
        return "target", f"val loss {best:.4f} is at or below {target:g}, which was asked for"
    test = turned(state.points) if cadence.early_stop and state.best_step is not None else None
    return None if test is None else ("turned", test)


def _decided(trainer: Trainer) -> dict[str, Any] | None:
    """The lead's choice, and what is left of the budget before it; None where there is no time.

    Checkpoints newer than the one that is gone back to are none any more.
    """
    state, pace = trainer.state, trainer.pace
    left = pace.steps_left(state.step)
    steps = max(LEAST_STEPS, int(min(ANNEAL_SHARE * left, MOST_STEPS * state.step)))
    seconds = steps * pace.step_seconds() + 3 * pace.save_seconds  # read, checked, saved again
    if left < 1 or (pace.timed and not pace.room_for(seconds, state.step)):
        return None
    steps = min(steps, left)
    step = _sound_step(trainer)
    return {
        "back_to": state.step if step is None else step,
        "best": None if step is None else drop_later(trainer.folder, step),
        "sound": step is not None,
        "steps": steps,
        "share": steps / left,
        "remaining": _remaining(trainer),
    }


def _sound_step(trainer: Trainer) -> int | None:
    """The best step that is saved whole, else the newest one before it."""
    folder, best = trainer.folder, trainer.state.best_step
    steps = [checkpoint.step_of(path) for path in checkpoint.complete(folder)]
    older = sorted((s for s in steps if best is not None and s <= best), reverse=True)
    return next((step for step in older if is_sound(folder, step)), None)


def _remaining(trainer: Trainer) -> dict[str, Any]:
    """What is left of the limit of which most is spent."""
    state, meter = trainer.state, trainer.meter
    spent = {"usd": meter.usd(), "hours": meter.seconds() / 3600}
    spent |= {"tokens": state.tokens, "steps": state.step}
    limits = {k: v for k, v in asdict(trainer.plan.budget).items() if v is not None}
    kind = max(limits, key=lambda name: spent[name] / limits[name])
    return {"kind": kind, "left": limits[kind] - spent[kind]}


def _begin(trainer: Trainer, why: tuple[str, str], steps: int) -> None:
    """The checkpoint of this step is saved again, now with the anneal in it."""
    state = trainer.state
    down_from = factor(state.progress, trainer.plan.schedule)
    trainer.state = replace(state, anneal=Anneal(why[0], state.step, steps, down_from))
    trainer.saved_step = -1
    save(trainer)
    saved(trainer)


# ---------------------------------------------------------------- what is told


def _go_on(trainer: Trainer, why: tuple[str, str]) -> None:
    """Once, for what is left only becomes less."""
    message = f"{why[1]}; too little time is left to go back and anneal: the run goes on to its end"
    trainer.folder.event("no_early_stop", message, step=trainer.state.step, reason=why[0])
    trainer.live.say(message)
    trainer.state = replace(trainer.state, stays=True)


def _say(trainer: Trainer, before: State, why: tuple[str, str], found: dict[str, Any]) -> None:
    """The event `early_stop`, and a line. `before` is the state in which it was decided."""
    reason, test = why
    back, steps = found["back_to"], found["steps"]
    best = back if before.best_step is None else before.best_step
    of_step = trainer.plan.step.batch_tokens
    last = before.points[-1].val_loss if before.points else before.best_val_loss
    where = f"back to step {back:,} and" if back != before.step else "from here on"
    if not found["sound"]:
        where = "no whole checkpoint is as old as the best step; from here on"
    elif back != best:
        where = f"the best step's checkpoint is damaged; {where}"
    message = (
        f"{test}; {where} {steps:,} steps down to the lowest learning rate, "
        f"{found['share']:.1%} of what is left"
    )
    gone = went_back(trainer, back)
    if back == before.step:
        gone["saved_at"] = time.time()  # nothing is thrown away
    trainer.folder.event(
        "early_stop",
        message,
        reason=reason,
        step=before.step,
        tokens=before.tokens,
        **gone,
        turned_tokens=best * of_step,
        best_val_loss=before.best_val_loss,
        val_loss=before.best_val_loss if reason == "target" else last,
        test=test,
        anneal_steps=steps,
        anneal_share=found["share"],
        remaining=found["remaining"],
    )
    trainer.live.say(f"early stop at step {before.step:,}: {message}")

"""Going back to older weights, with other data, when skipping steps has not helped (guard.py)."""

from dataclasses import replace
from typing import Any

from tuppence import checkpoint
from tuppence.checkpoint import State
from tuppence.errors import Fault
from tuppence.folder import RunFolder
from tuppence.model import build
from tuppence.train.draws import work_of
from tuppence.train.guard import Rewinds, Trouble
from tuppence.train.place import first_weights, restore, whole_here
from tuppence.train.saving import saved
from tuppence.train.setup import FIRST_STATE, Trainer


def rewinds_of(state: State) -> Rewinds:
    """What the state remembers of rewinds."""
    return Rewinds(state.skipped_batches, state.rewound_steps, state.trouble_step, state.back_to)


def rewind(trainer: Trainer) -> None:
    """Take the newest older weights that are whole and finite, and leave out the batches since.

    Raises Fault where there are none, or none that the run can afford.
    """
    saved(trainer)
    state, before = trainer.state, rewinds_of(trainer.state)
    trainer.at("save", long=True)  # the lead reads whole checkpoints, the others wait
    trouble = Trouble(state.step, state.bad_steps, state.progress, trainer.skipped)
    told = f"rewind {before.rewound_steps} from {state.step}"
    target, best, refusal = trainer.ranks.told(told, lambda: _chosen(trainer, before, trouble))
    if target is None:
        trainer.folder.event("stopped_by_guard", refusal, step=state.step)
        raise Fault(refusal)
    after = before.after(trouble, target)
    go_back(trainer, target, after, best)
    trainer.pace.work = work_of(trainer.plan, after.skipped_batches)
    first, last = before.batch(target), before.batch(state.step) - 1
    message = (
        f"back from step {state.step} to step {target} ({trainer.skipped}); batches {first} to "
        f"{last} are left out"
    )
    there = went_back(trainer, target)
    trainer.folder.event("rewind", message, step=target, from_step=state.step, **there)
    trainer.live.say(message)


def go_back(trainer: Trainer, step: int, rewinds: Rewinds, best: int | None) -> None:
    """Weights, moments and state of a step, on every rank; `best` is the best step that is left.

    What does not go back: who trains, since when, and what is remembered of rewinds.
    """
    now, there = trainer.state, _load(trainer, step)
    trainer.state = replace(
        there,
        best_step=best,
        best_val_loss=there.best_val_loss if best == there.best_step else None,
        attempt=now.attempt,
        began_seconds=now.began_seconds,
        micro_batch=now.micro_batch,
        finished=False,
        evaluation_due=False,
        bad_steps=0,
        skipped_batches=rewinds.skipped_batches,
        rewound_steps=rewinds.rewound_steps,
        trouble_step=rewinds.trouble_step,
        back_to=rewinds.back_to,
    )
    trainer.saved_step = step or -1
    trainer.lead.forget()


def went_back(trainer: Trainer, step: int) -> dict[str, Any]:
    """What an event says of a run that went back to `step`: where in the lines of the folder, and
    since when what was trained is thrown away."""
    meter, attempt = trainer.meter, trainer.state.attempt
    until = {"back_to": step, "saved_at": trainer.state.saved_at}
    return {**until, "usd": meter.usd(), "attempt": attempt}


def drop_later(folder: RunFolder, step: int) -> int | None:
    """Nothing newer than `step` is a way back any more; the best step that is left. The lead's."""
    checkpoint.drop_later(folder, step)
    if step:
        path = folder.checkpoints / checkpoint.name_of(step)
        checkpoint.mend_pointers(folder, path, checkpoint.state_of(path))
    best = checkpoint.pointer(folder, "best")
    return best.step if best else None


def _chosen(
    trainer: Trainer, before: Rewinds, trouble: Trouble
) -> tuple[int | None, int | None, str]:
    """The lead's choice of a step, the best one that is left, and why there is none. What is newer
    than the choice is no way back and goes."""
    folder = trainer.folder
    steps = [checkpoint.step_of(path) for path in checkpoint.complete(folder)]
    there = [step for step in steps if _foreseen(trainer, step)]
    targets = before.targets(trouble, there)
    target = next((step for step in targets if step == 0 or is_sound(folder, step)), None)
    best = None if target is None else drop_later(folder, target)
    rate = trainer.plan.optimizer.learning_rate
    refusal = before.refusal(trouble, steps, learning_rate=rate)
    return target, best, refusal


def _foreseen(trainer: Trainer, step: int) -> bool:
    """Where steps are counted a run must go back to the same step whatever interrupted it: not to
    one that was saved at a signal."""
    every = trainer.plan.cadence.save_every_steps
    return trainer.pace.timed or (every is not None and step % every == 0)


def is_sound(folder: RunFolder, step: int) -> bool:
    """Whether a checkpoint is what was written, and every weight in it finite."""
    path = folder.checkpoints / checkpoint.name_of(step)
    try:
        checkpoint.verify(path)
    except Fault as error:
        folder.event("checkpoint_damaged", str(error), path=path.name)
        return False
    return all(bool(weight.isfinite().all()) for weight in checkpoint.consolidated(path).values())


def _load(trainer: Trainer, step: int) -> State:
    """Weights, moments and state of a checkpoint; of step 0 the first weights."""
    if step:
        when = f"{trainer.state.step} {trainer.state.rewound_steps}"
        path = whole_here(trainer.place, checkpoint.name_of(step), when)
        there = restore(path, trainer.parallel, trainer.optimizers)
        trainer.ranks.barrier()  # here it may take long, in the next step it may not
        return there
    model = build(trainer.plan.model)
    first_weights(model, trainer.plan, trainer.ranks)
    trainer.parallel.take(dict(model.named_parameters()))
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    return FIRST_STATE

"""Saving, and stopping where it is safe: what every long part of a run does in between."""

import time
from dataclasses import replace

from tuppence.errors import Fault
from tuppence.train.interrupt import Interrupted
from tuppence.train.setup import Trainer


def ready_to_save(trainer: Trainer) -> None:
    """After the first step: the moments are there, and memory for a copy of them can be made."""
    weights, moments = trainer.parallel.weights(), trainer.parallel.moments(trainer.optimizers)
    trainer.saver.prepare(weights, moments)


def save(trainer: Trainer) -> None:
    """Checkpoint the present state, unless this step is saved already. It is written beside
    training; only the copy is waited for, and a save before that is not done yet."""
    if trainer.saved_step == trainer.state.step:
        return
    trainer.at("save")
    with trainer.meter.phase("save"):
        trainer.at("save", long=True)  # the save before may still be written, on a slow disk
        trainer.state = replace(trainer.state, saved_at=time.time())
        weights, moments = trainer.parallel.weights(), trainer.parallel.moments(trainer.optimizers)
        trainer.saver.save(weights, moments, trainer.state)
        trainer.at("save")  # a beat that hangs is no slow save
    trainer.pace.last_save = time.monotonic()
    trainer.saved_step = trainer.state.step
    trainer.lead.forget()


def saved(trainer: Trainer) -> None:
    """Wait until what was saved is on disk. Raises Fault on every rank where one could not."""
    trainer.at("save")
    error = None
    with trainer.meter.phase("save"):
        trainer.at("save", long=True)
        try:
            trainer.saver.wait()
        except Fault as one:
            error = one
        if not trainer.ranks.all(error is None):
            raise error or Fault("another rank could not save; it says why")
        trainer.at("save")


def alive(trainer: Trainer) -> None:
    """Between steps and evaluation batches: charge on, and hear of a save that failed."""
    trainer.meter.beat()
    trainer.pace.upload_seconds = max(trainer.pace.upload_seconds, trainer.place.alive())
    trainer.saver.check()
    if trainer.saver.seconds:
        trainer.pace.save_seconds = trainer.saver.seconds


def stop_if_asked(trainer: Trainer, *, now: bool = False) -> None:
    """After a signal to any rank, save and stop. `now` asks all ranks, who must all ask."""
    alive(trainer)
    lead = trainer.lead
    signal = lead.asked_to_stop_now() if now else lead.asked_to_stop()
    if signal:
        save(trainer)
        saved(trainer)
        raise Interrupted(signal, trainer.state.step)

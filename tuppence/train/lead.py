"""Rank 0 decides, all follow: where the budget stands, which step is the last, what is due.

    step k:   lead decides step k + 1 ──▶ sum over ranks, beside the step's own work
    step k+1: everybody does what was decided

One step late, so that nobody waits for the lead's clock. What takes long between two steps (an
evaluation, a save) makes that decision stale: then it is decided anew, and waited for. So are an
attempt's first turns, before which nobody knows what a step takes. One process decides at once,
for itself.
"""

import signal
from typing import Any

import torch
import torch.distributed as dist

from tuppence.ranks import Ranks
from tuppence.train.interrupt import Interrupt
from tuppence.train.pace import Pace, Turn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 3  # of an attempt's turns: until then it is not known what a step takes


class Lead:
    """Turns, and what is due after them, that are the same on every rank."""

    def __init__(self, ranks: Ranks, pace: Pace, interrupt: Interrupt) -> None:
        self.ranks, self.pace, self.interrupt = ranks, pace, interrupt
        self._told: tuple[int, torch.Tensor, Any] | None = None
        self._turns = 0  # of this attempt
        self._save_due = self._room = False
        self._signal: signal.Signals | None = None

    def next(self, step: int) -> Turn | None:
        """The turn of step number `step` (from 0), or None when it cannot be afforded."""
        if self.ranks.world == 1:
            return self.pace.next(step)
        if self._told is None:
            self._tell(step, ahead=False)
        turn = self._heard(step)
        self._turns += 1
        if turn is not None and not turn.last and self._turns > AT_ONCE:
            self._tell(step + 1, ahead=True)
        return turn

    def forget(self) -> None:
        """After what took long: what was decided ahead is stale."""
        if self._told is not None:
            self._told[2].wait()  # what was begun on every rank is ended on every rank
            self._told = None

    def save_due(self, step: int) -> bool:
        """Whether to save when so many steps are done."""
        return self.pace.save_due(step) if self.ranks.world == 1 else self._save_due

    def room_to_evaluate(self, step: int) -> bool:
        """Whether an evaluation is affordable when so many steps are done."""
        return self.pace.room_to_evaluate(step) if self.ranks.world == 1 else self._room

    def asked_to_stop(self) -> signal.Signals | None:
        """A signal that some rank got, as of the last decision."""
        return self.interrupt.signal if self.ranks.world == 1 else self._signal

    def asked_to_stop_now(self) -> signal.Signals | None:
        """The same as of now: all ranks ask together."""
        if self.ranks.world == 1:
            return self.interrupt.signal
        return _signal(self.ranks.sum(*self._mine()))

    def _mine(self) -> list[float]:
        return [float(self.interrupt.signal == one) for one in SIGNALS]

    def _tell(self, step: int, *, ahead: bool) -> None:
        said = [0.0] * 5
        if self.ranks.lead and (turn := self.pace.next(step, ahead=ahead)) is not None:
            after = step + 1
            due = (self.pace.save_due(after), self.pace.room_to_evaluate(after))
            said = [1.0, turn.progress, *map(float, (turn.last, *due))]
        message = torch.tensor([*said, *self._mine()], dtype=torch.float64)
        self._told = (step, message, dist.all_reduce(message, async_op=True))

    def _heard(self, step: int) -> Turn | None:
        assert self._told is not None
        of, message, pending = self._told
        assert of == step, f"step {of} was decided, not {step}"
        pending.wait()
        self._told = None
        there, progress, last, save_due, room, *counts = message.tolist()
        self._save_due, self._room, self._signal = save_due > 0, room > 0, _signal(counts)
        return Turn(progress, last > 0) if there else None


def _signal(counts: list[float]) -> signal.Signals | None:
    """The first of the signals that any rank got."""
    return next((one for one, n in zip(SIGNALS, counts, strict=True) if n), None)

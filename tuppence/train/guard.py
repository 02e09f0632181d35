"""Steps that would harm are skipped; when that does not help the run goes back, with other data.

    loss or norm not finite                                        ┐
    loss > mean + 6 sigma  and  > 1.1 x mean   of the window       ├─▶ the step is skipped
    norm > mean + 6 sigma  and  > 10 x mean    of the window       ┘
    5 skipped in a row ─▶ back to older weights, leaving out the batches in between ─▶ or stop

Six standard deviations over a window of 128 steps is OLMo-core's rule (its SkipStepOptimizer,
github.com/allenai/OLMo-core). To go back and leave data out is PaLM's remedy (Chowdhery et al.
2022, arXiv:2204.02311, section 5.1: the same batches on other weights made no spike).

Everything here is plain numbers, a function of what all ranks know alike (loss and norm summed over
all), and round-trips through JSON: ranks agree without asking, and a resumed run decides as the
uninterrupted one. In the loop:

    window, rewinds = Window(state.losses, state.norms), Rewinds(...)       of the checkpoint
    batch = loader.batch(rewinds.batch(state.step))
    why = window.judged(loss, norm)         after the sum over ranks, before the update
    if why is None: update; window = window.seen(loss, norm); bad_steps = 0
    else:           no update, an event; bad_steps += 1
    if bad_steps >= BAD_STEPS:
        trouble = Trouble(state.step, bad_steps, state.progress, why)
        for step in rewinds.targets(trouble, saved):    newest first; 0 is the first weights
            load it; should it not verify or hold a weight that is not finite: the next
            delete the checkpoints of later steps, so that a resume does not take one
            state = the loaded one with the fields of rewinds.after(trouble, step) in it
        none left: raise Fault(rewinds.refusal(trouble, ...))

A kill before the next save undoes the rewind: the resumed run meets the same trouble and decides
the same again. For that, in a run that counts steps, `saved` must hold only steps at which the plan
says to save: one saved at a signal or by the clock is not there in the uninterrupted run.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WINDOW, SIGMAS = 128, 6.0
LEAST = 64  # steps in the window before anything finite is a spike; as in OLMo-core half of it
LOSS_MARGIN = 1.1  # of the mean; losses of healthy runs here stayed within 4 sigma
NORM_MARGIN = 10.0  # of the mean; norms reached 18 sigma and 6 x, harmless for they are clipped
BAD_STEPS = 5  # skipped in a row, after which going on with these weights only costs money
REWIND_SHARE = 0.1  # of the run's steps: no more may be thrown away in all


@dataclass(frozen=True)
class Window:
    """Losses and gradient norms of the last steps that moved the weights, oldest first.

    A skipped step is not among them, so that what is broken never becomes usual: a jump to a
    plateau stays a spike however long it lasts. A loss that climbs slower than 6 sigma of a
    window which climbs with it does pass.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    def judged(self, loss: float, grad_norm: float) -> str | None:
        """Why this step is to be skipped, or None. `grad_norm` is the one before clipping."""
        return _judged("loss", loss, self.losses, LOSS_MARGIN) or _judged(
            "gradient norm", grad_norm, self.norms, NORM_MARGIN
        )

    def seen(self, loss: float, grad_norm: float) -> "Window":
        """The window after a step that was taken."""
        assert math.isfinite(loss + grad_norm), (loss, grad_norm)
        return Window((*self.losses, loss)[-WINDOW:], (*self.norms, grad_norm)[-WINDOW:])


def _judged(name: str, value: float, window: Sequence[float], margin: float) -> str | None:
    if not math.isfinite(value):
        return f"{name} {value}"
    if len(window) < LEAST:
        return None
    mean = math.fsum(window) / len(window)
    if value <= margin * mean:  # nearly always: the rest is not computed
        return None
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / (len(window) - 1))
    if value - mean <= SIGMAS * sigma:
        return None
    far = f"{(value - mean) / sigma:.1f} sigma" if sigma else "far"
    return f"{name} {value:.4g} is {far} above {mean:.4g}, the mean of {len(window)} steps"


@dataclass(frozen=True)
class Trouble:
    """Where a run stands after too many skipped steps; `progress` in (0, 1] as the pace has it."""

    step: int
    bad_steps: int
    progress: float
    why: str

    @property
    def moved(self) -> int:
        """The step that moved the weights last: a checkpoint of it or a later one holds the weights
        that have just failed on batch after batch, so that only older ones are a way back."""
        return self.step - self.bad_steps

    @property
    def whole_steps(self) -> int:
        """Steps of the whole run if it goes on as it went: exact where the budget counts them."""
        return round(self.step / self.progress)


@dataclass(frozen=True)
class Rewinds:
    """What a rewind must not forget. All of it outlives the checkpoint that is gone back to.

    skipped_batches   left out so far: step s trains on batch s + skipped_batches
    rewound_steps     thrown away so far
    trouble_step      where the last trouble was, and
    back_to           the step that it was answered from
    """

    skipped_batches: int = 0
    rewound_steps: int = 0
    trouble_step: int = 0
    back_to: int = 0

    def batch(self, step: int) -> int:
        """The number of the batch that step number `step` trains on."""
        return step + self.skipped_batches

    def targets(self, trouble: Trouble, saved: Iterable[int]) -> list[int]:
        """Steps to go back to, best first, of those `saved` and 0, the first weights.

        The newest is best, being the least to do again. Before the run has passed the place of
        its last trouble, that answer was not old enough: older ones alone are left.
        """
        return [s for s in self._older(trouble, saved) if self._affordable(trouble, s)]

    def after(self, trouble: Trouble, target: int) -> "Rewinds":
        """With the run back at step `target`, the next batch one that it has not seen."""
        lost = trouble.step - target
        return Rewinds(
            skipped_batches=self.skipped_batches + lost,
            rewound_steps=self.rewound_steps + lost,
            trouble_step=trouble.step,
            back_to=target,
        )

    def refusal(self, trouble: Trouble, saved: Sequence[int], *, learning_rate: float) -> str:
        """The line with which the run ends when no target is left, or none could be loaded."""
        if not self._older(trouble, saved):
            reason = "there are no older weights to go back to"
        elif not self.targets(trouble, saved):
            reason = (
                f"going back would throw away more than {REWIND_SHARE:.0%} of the run "
                f"({self.rewound_steps} steps so far)"
            )
        else:
            reason = "none of the older weights could be loaded"
        before = [step for step in saved if step < trouble.moved]
        kept = f"step {max(before)} is saved from before" if before else "nothing older was saved"
        failed = [step for step in saved if step >= trouble.moved]
        or_delete = f", or delete the checkpoint of step {failed[-1]} and go on" if failed else ""
        return (
            f"{trouble.bad_steps} steps in a row up to step {trouble.step} were skipped "
            f"({trouble.why}), and {reason}; {kept}. "
            f"Lower train.learning_rate={learning_rate:g} and start again{or_delete}"
        )

    def _older(self, trouble: Trouble, saved: Iterable[int]) -> list[int]:
        again = trouble.step <= self.trouble_step
        before = min(trouble.moved, self.back_to) if again else trouble.moved
        return sorted({s for s in (0, *saved) if s < before}, reverse=True)

    def _affordable(self, trouble: Trouble, target: int) -> bool:
        lost = self.rewound_steps + trouble.step - target
        return lost <= REWIND_SHARE * trouble.whole_steps

"""Money is the clock: how far the budget is spent, and which step is the last one.

    progress = max over limits of spent / limit,  after the step that is about to be taken

For dollars and hours both are counted from the first step on: start-up and preparation are charged,
but must not eat the warm-up. The limit is what is left for training once the last evaluation, save,
sample and receipt are paid for. A step is the last one when another would not fit behind it, so
that the learning rate lands on its floor on a step that is really taken.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tuppence.config import Plan
from tuppence.ledger import Meter
from tuppence.plan.tasks import FIXED_ROWS
from tuppence.train.tracking import closing_seconds

RECENT_STEPS = 30
CAUTION = 1.3  # a following step is counted on only if it may take this much longer than usual
HELD_BACK = 0.002  # share of a time budget kept for what the reserve's estimates miss
MOST_UPLOAD_SECONDS = 60.0  # kept back for a bucket that is slow or away
GUESSED, MEASURED = 1.1, 1.05  # times what the end is expected to take is kept for it
OVERRUN = 2.0  # of what tasks are expected to take, that they may take
RECEIPT_STEP_SECONDS = 8e-6  # to read a step for the receipt, on a busy machine (bench/receipt.py)


def finish_seconds(plan: Plan, steps: int) -> float:
    """The allowance for receipt and exit after so many steps, charged in advance."""
    return plan.cadence.finish_seconds + steps * RECEIPT_STEP_SECONDS


@dataclass(frozen=True)
class Turn:
    """The next step's place in the run."""

    progress: float
    last: bool


class Pace:
    """Decides, before each step, where in the budget it stands. Estimates follow what is seen."""

    def __init__(
        self,
        plan: Plan,
        meter: Meter,
        *,
        began: float = 0.0,
        work: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        """`began` is what was charged, in seconds, when the run's first step was about to begin.

        `work` is how much a step has to do beside a usual one (looped models draw it).
        """
        self.plan, self.meter, self.began, self.work = plan, meter, began, work
        self.limit_usd, self.limit_hours = plan.budget.usd, plan.budget.hours
        self.timed = self.limit_usd is not None or self.limit_hours is not None
        self.warm = False
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.eval_seconds = plan.predicted.eval_seconds
        self.save_seconds = plan.predicted.save_seconds
        self.upload_seconds = 0.0
        self.eval_measured = False
        self.suites = {suite.name: suite for suite in plan.tasks.suites} if plan.tasks else {}
        self._suite_took: dict[str, float] = {}
        self.last_save = time.monotonic()

    def step_took(self, step: int, seconds: float) -> None:
        """An attempt's first step compiles and allocates, and says nothing about the others."""
        if self.warm:
            self._recent.append(seconds / self.work(step))
        self.warm = True

    def step_seconds(self) -> float:
        """What a usual step takes now: the recent median, before any the plan's guess."""
        if not self._recent:
            return self.plan.predicted.step_seconds.mid
        return statistics.median(self._recent)

    def seen_step_seconds(self) -> float | None:
        """The recent median, once there are enough steps to speak of one."""
        full = len(self._recent) == self._recent.maxlen
        return statistics.median(self._recent) if full else None

    def seconds_left(self) -> float:
        """Until the first time limit, everything included."""
        return self.meter.seconds_left(usd=self.limit_usd, hours=self.limit_hours)

    def reserve(self, step: int) -> float:
        """Seconds that the end of a run of `step` steps needs: save, evaluate, sample, finish."""
        held = HELD_BACK * (self.meter.seconds() + self.seconds_left()) if self.timed else 0.0
        evaluation = self.eval_seconds
        if not self.eval_measured:
            evaluation *= self._how_far_off()
        evaluation += self.plan.predicted.fixed_seconds * self._how_far_off()
        suites = sum(
            self.suite_seconds(name) * (MEASURED if name in self._suite_took else GUESSED)
            for name in self.suites
        )
        upload = min(MOST_UPLOAD_SECONDS, self.upload_seconds)
        end = 1.5 * (self.save_seconds + upload) + GUESSED * evaluation + suites
        end += closing_seconds(self.plan.track)
        return end + finish_seconds(self.plan, step) + held

    def _how_far_off(self) -> float:
        """What to multiply a guess by: it is as far off as that of a step was."""
        if not self._recent:
            return 1.0
        return min(self._recent) / self.plan.predicted.step_seconds.mid

    def evaluation_took(self, seconds: float) -> None:
        self.eval_seconds, self.eval_measured = seconds, True

    def sample_seconds(self) -> float:
        """What the end's samples take: the fixed prompts' and the run's own."""
        cadence, each = self.plan.cadence, FIXED_ROWS * self.plan.cadence.fixed_tokens
        fixed = self.plan.predicted.fixed_seconds * self._how_far_off()
        return fixed * (1 + cadence.sample_tokens / each) if each else 0.0

    def suite_took(self, name: str, seconds: float) -> None:
        """A whole evaluation of a suite of tasks, or what one that was cut short points to."""
        self._suite_took[name] = seconds

    def suite_tasted(self, name: str, seconds: float) -> None:
        """What a part of a suite points to: the least, for what is cold or disturbed is slower."""
        self._suite_took[name] = min(seconds, self._suite_took.get(name, math.inf))

    def suite_seconds(self, name: str) -> float:
        """What a suite of tasks takes now, and is given at the end."""
        guess = self.suites[name].seconds * self._how_far_off()
        return min(self._suite_took.get(name, guess), OVERRUN * guess)

    def room_for(self, seconds: float, step: int) -> bool:
        """Whether something that takes so long fits in before the last steps and the end."""
        left = self.seconds_left() - self.reserve(step)
        return left > 1.5 * seconds + 4 * self.step_seconds()

    def steps_left(self, step: int) -> int:
        """How many more steps fit in before the end, when so many are done."""
        limits = []
        if self.plan.step.max_steps is not None:
            limits.append(self.plan.step.max_steps - step)
        if self.timed:
            limits.append(int((self.seconds_left() - self.reserve(step)) / self.step_seconds()))
        return max(0, min(limits))

    def save_due(self, step: int) -> bool:
        """Whether to save when so many steps are done."""
        if self.timed and not self.room_for(self.save_seconds, step):
            return False
        cadence = self.plan.cadence
        if cadence.save_every_steps is not None:
            return step % cadence.save_every_steps == 0
        assert cadence.save_every_seconds is not None
        return time.monotonic() - self.last_save >= cadence.save_every_seconds

    def room_to_evaluate(self, step: int) -> bool:
        """Whether an evaluation, and a save if it is the best, fit in before the end."""
        return not self.timed or self.room_for(self.eval_seconds + self.save_seconds, step)

    def next(self, step: int, *, ahead: bool = False) -> Turn | None:
        """The turn of step number `step` (from 0), or None when it cannot be afforded.

        `ahead` says that the step before is still to be taken.
        """
        fraction, last = 0.0, False
        if self.plan.step.max_steps is not None:
            if step >= self.plan.step.max_steps:
                return None
            fraction = (step + 1) / self.plan.step.max_steps
            last = step + 1 == self.plan.step.max_steps
        if self.timed:
            one = self.step_seconds() * self.work(step)
            following = self.step_seconds() * self.work(step + 1)
            before = self.step_seconds() * self.work(step - 1) if ahead else 0.0
            left = self.seconds_left() - self.reserve(step) - before
            if left < one:
                return self._landing(step, before + one)
            spent = self.meter.seconds() - self.began + before
            fraction = max(fraction, (spent + one) / (spent + left))
            # behind the last step another one stays free: for this one, should it take that long
            last = last or left - one < following + CAUTION * one
        return Turn(1.0 if last else min(fraction, math.nextafter(1, 0)), last)

    def _landing(self, step: int, one: float) -> Turn | None:
        """A late last step: the steps before took far longer than usual, and the learning rate is
        still up. It is paid out of the evaluation, which its deadline will cut short."""
        must = 1.5 * self.save_seconds + finish_seconds(self.plan, step)
        late = step > 0 and self.seconds_left() - must > CAUTION * one
        return Turn(1.0, last=True) if late else None

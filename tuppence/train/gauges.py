"""Thresholds watched while a run trains. What is amiss is said once, with what to do about it.

    a step's row ──▶ a list ──about every 10 s──▶ a look over the stretch, a reading of each gauge
    beyond its limit, two looks in a row ──▶ an event, a line said       back, two ──▶ `recovered`

Of gauges that one cause explains the dearest is told, with what the others show; it is over when
all are. Nothing here touches what is trained or ends it, and of most steps it only keeps the row.
An attempt's first steps, in which loops compile and caches fill, say nothing.
"""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from tuppence import host
from tuppence.checkpoint import Point
from tuppence.config import Plan
from tuppence.folder import RunFolder
from tuppence.train.notes import Notes
from tuppence.train.readings import Look, Reading, cores_of, readings
from tuppence.train.trend import Trend
from tuppence.train.turning import turned

WINDOW_SECONDS = 10.0  # between two looks
WINDOW_PROGRESS, LEAST_SECONDS = 0.05, 1.0  # and on short runs
COLD_STEPS, COLD_SECONDS = 5, 5.0  # of an attempt
CARD_SECONDS = 30.0  # between two questions to nvidia-smi
CARD_ANSWERS = 3  # whose mean is a reading: each is of a moment
MEMORY_SECONDS = 5.0  # between two looks at the peak


@dataclass
class Lamp:
    """Lit while a gauge is amiss; `cause` is that of when it was lit."""

    lit: bool = False
    cause: str = ""
    _run: int = 0

    def change(self, reading: Reading) -> None:
        """Light it, or put it out, where this reading is the last that it takes."""
        value, limit = reading.value, reading.limit
        other = limit.back(value) if self.lit else limit.beyond(value)
        self._run = self._run + 1 if other else 0
        if self._run == limit.patience:
            self.lit, self.cause, self._run = not self.lit, reading.cause, 0


class Step(NamedTuple):
    """Wall and CPU seconds when a step was done, how much it did beside a usual one, its row."""

    wall: float
    cpu: float
    work: float
    row: dict[str, Any]


class Gauges:
    """The gauges of one attempt, on the rank that leads; elsewhere they are `silent`.

    `memory_gib` is the most memory the run has held, as of a few seconds ago.
    """

    def __init__(
        self, plan: Plan, folder: RunFolder, say: Callable[[str], None], *, silent: bool = False
    ) -> None:
        self.plan, self.folder, self.silent = plan, folder, silent
        self.notes = Notes(folder, say)
        self.memory_gib = None if silent else peak_gib(plan.machine.device)
        self.trend = Trend()
        self.lamps: dict[str, Lamp] = {}
        self._told: dict[str, Reading] = {}  # by cause, until nothing shows it any more
        self._steps: list[Step] = []  # since the last look, whose step is the first
        self._points: Sequence[Point] = ()
        self._turned = False
        self._ready: float | None = None  # seconds that threads had waited for cores by then
        self._due = 0.0
        self._peak_due = time.monotonic() + MEMORY_SECONDS
        self._cold_until: float | None = time.monotonic() + COLD_SECONDS
        gpus = min(plan.step.ranks, host.local_world())
        self._card = None if silent or plan.machine.device != "cuda" else Card(gpus)

    def seen(self, row: dict[str, Any], *, work: float) -> None:
        """A step, as its row in metrics.jsonl has it; `work` is how much it did beside a usual one.

        When it is time, what is amiss is told.
        """
        if not self.silent:
            self._safely(self._see, row, work)

    def judged(self, points: Sequence[Point]) -> None:
        """The evaluations so far. That validation has turned is told where nothing acts on it."""
        if not self.silent and not self.plan.cadence.early_stop and points is not self._points:
            self._safely(self._judge_points, points)

    def _safely(self, work: Callable[..., None], *given: Any) -> None:
        """Whatever breaks here is not the run's."""
        try:
            work(*given)
        except Exception as error:
            self.silent = True
            message = f"the gauges are dark from here on ({type(error).__name__}: {error})"
            self.notes.warn(
                "gauges_failed", message, "training goes on, and nothing of this is watched"
            )

    def _see(self, row: dict[str, Any], work: float) -> None:
        now = time.monotonic()
        self._steps.append(Step(now, time.process_time(), work, row))
        if now >= self._peak_due:
            self._peak_due = now + MEMORY_SECONDS
            self.memory_gib = peak_gib(self.plan.machine.device)
        if now < self._due or not self._is_time(now, row["progress"]):
            return
        for step in self._steps[1:]:
            if step.row["loss"] is not None:
                self.trend.add(step.row["step"], step.row["loss"])
        if self._cold_until is not None:
            self._cold_until = None  # this step is where the first stretch begins
        else:
            self._judge(self._look(), row["step"])
        self._steps, self._ready = self._steps[-1:], host.waited_for_cores()
        self._due = now + LEAST_SECONDS

    def _judge_points(self, points: Sequence[Point]) -> None:
        self._points = points
        found = turned(points)
        if found is None or self._turned:
            return
        self._turned = True
        best, last = min(points, key=lambda point: point.val_loss), points[-1]
        advice = (
            f"early stop is off in its plan, so it goes on; the best weights, of step "
            f"{best.step:,}, stay. More text, a smaller model or a shorter run would do better"
        )
        details = {"value": last.val_loss, "limit": best.val_loss}
        self.notes.warn("overfitting", found, advice, step=last.step, **details)

    def _is_time(self, now: float, progress: float) -> bool:
        if self._cold_until is not None:
            return len(self._steps) > COLD_STEPS and now > self._cold_until
        first = self._steps[0]
        grown = progress - first.row["progress"] >= WINDOW_PROGRESS
        return grown or now - first.wall >= WINDOW_SECONDS

    def _look(self) -> Look:
        plan, cores = self.plan, cores_of(self.plan)
        steps = self._steps[1:]
        seconds = sum(step.row["step_seconds"] for step in steps)
        ready, before = host.waited_for_cores(), self._ready
        lasted = (steps[-1].wall - self._steps[0].wall) * cores
        held, there = memory(plan.machine.device)
        return Look(
            utilisation=self._used(cores),
            held_gib=held,
            memory_gib=there,
            mfu=sum(s.row["mfu"] * s.row["step_seconds"] for s in steps) / seconds,
            tokens_per_second=plan.step.batch_tokens * sum(s.work for s in steps) / seconds,
            data=sum(s.row["data_wait"] for s in steps) / seconds,
            cores=None if ready is None or before is None else max(0.0, ready - before) / lasted,
            disk_free=host.free_bytes(self.folder.path),
            rise=self.trend.rise(),
        )

    def _used(self, cores: int) -> float | None:
        """The share of the time that the processor computes, in steps that came one after another:
        between others something was evaluated or saved."""
        if self._card is None:
            pairs = [
                (step.wall - before.wall, step.cpu - before.cpu)
                for before, step in pairwise(self._steps)
                if step.wall - before.wall < 1.5 * step.row["step_seconds"]
            ]
            wall = sum(wall for wall, _ in pairs)
            return sum(cpu for _, cpu in pairs) / wall / cores if wall else None
        if not self._card.ask():
            message = "nvidia-smi is missing or does not answer"
            advice = "the GPU's use is not watched; MFU and tokens/s are"
            self.notes.warn("no_nvidia_smi", message, advice)
        return self._card.used()

    def _judge(self, look: Look, step: int) -> None:
        found = readings(self.plan, look)
        alike: dict[str, list[Reading]] = {}
        for reading in found:
            lamp = self.lamps.setdefault(reading.code, Lamp())
            lamp.change(reading)
            if lamp.lit:
                alike.setdefault(lamp.cause, []).append(reading)
        for cause, amiss in alike.items():
            if cause not in self._told:
                self._told[cause] = amiss[0]
                self._tell(amiss[0], step, amiss[1:])
        shown = {lamp.cause for lamp in self.lamps.values() if lamp.lit}
        for cause in sorted(self._told.keys() - shown):
            told = self._told.pop(cause)
            self._tell_over(next((r for r in found if r.code == told.code), told), step)

    def _tell(self, reading: Reading, step: int, others: list[Reading]) -> None:
        also = {other.code: other.value for other in others}
        details = {"value": reading.value, "limit": reading.limit.amiss, "also": also}
        self.notes.warn(reading.code, reading.message, reading.advice, step=step, **details)

    def _tell_over(self, reading: Reading, step: int) -> None:
        code, details = reading.code, {"value": reading.value, "limit": reading.limit.over}
        line, message = f"recovered {code}", f"{code} is over"
        self.notes.tell(line, "recovered", message, of=code, step=step, **details)


# ---------------------------------------------------------------- the machine


def peak_gib(device: str) -> float | None:
    """The most memory the run has held: the card's on a GPU, else the process's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved() / 2**30
    return host.peak_rss_gib()


def memory(device: str) -> tuple[float | None, float | None]:
    """GiB held now, and GiB there are: of this rank's card, or of the machine for all its ranks."""
    if device == "cuda":
        import torch

        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return torch.cuda.memory_reserved() / 2**30, there / 2**30
    held = host.rss_gib()
    return None if held is None else held * host.local_world(), host.memory_gib()


class Card:
    """What nvidia-smi says of the first GPUs of this machine, asked in a thread: it takes a while,
    and may hang."""

    def __init__(self, gpus: int) -> None:
        self._gpus, self._asked = gpus, -math.inf
        self._answers: deque[float] = deque(maxlen=CARD_ANSWERS)
        self._thread: threading.Thread | None = None
        self._missing = self._said = False

    def ask(self) -> bool:
        """Ask again, if it is time; False, once, where there was no answer."""
        now, busy = time.monotonic(), self._thread is not None and self._thread.is_alive()
        if not busy and not self._missing and now - self._asked >= CARD_SECONDS:
            self._asked = now
            self._thread = threading.Thread(target=self._answer, name="nvidia-smi", daemon=True)
            self._thread.start()
        news = self._missing and not self._said
        self._said = self._missing
        return not news

    def used(self) -> float | None:
        """The mean of the last answers; None before there are enough."""
        full = len(self._answers) == CARD_ANSWERS
        return sum(self._answers) / CARD_ANSWERS if full else None

    def _answer(self) -> None:
        import torch

        share = None
        with contextlib.suppress(RuntimeError):  # the driver's
            found = [torch.cuda.get_device_properties(i) for i in range(self._gpus)]
            share = host.gpu_use([str(one.uuid) for one in found])
        if share is None:
            self._missing = True
        else:
            self._answers.append(share)

"""The run's figures to TensorBoard and W&B: the same that its own files hold, from a thread each.

    trainer.record(row) ──▶ queue ──▶ thread ──▶ RUN/tensorboard/      one event a step, whole
                        └─▶ queue ──▶ thread ──▶ RUN/wandb/            and online, where asked

Training never waits for them: a queue that is full drops rows, which is said once, and a tracker
that fails is said once and left out. Steps are the x axis. Where a step comes a second time (after
a kill, or a way back) TensorBoard forgets the first; W&B, which takes nothing back, shows both.
Rows that follow closely become one, of means: so `Sink.seconds` says, and in long runs `apart`.
"""

import functools
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tuppence.config import Plan, TrackPlan
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.train.notes import Notes

MOST_WAITING = 10_000  # rows
DENSE_HOURS, MOST_APART = 1.0, 10.0  # see `apart`
ELSEWHERE = "the run's own files have every figure"
DRAIN_SECONDS = 0.5  # between two looks into the queue
CLOSE_SECONDS = {"tensorboard": 0.2, "offline": 0.6, "online": 2.5}
STEP = {  # a step's figures, by the names that trackers show
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "data_wait": "speed/data_wait",
    "memory_gib": "speed/memory_gib",
    "usd": "budget/usd",
    "progress": "budget/progress",
    "tokens": "budget/tokens",
}
MEANS = ("loss", "grad_norm", "tokens_per_second", "mfu", "data_wait")  # of the others the last
VAL = {"loss": "val/loss", "bpb": "val/bpb"}
TASKS = {"core": "score", "hellaswag": "acc_norm"}
Row = dict[str, Any]
Figures = dict[str, float]


class Sink(Protocol):
    """Where figures go. `seconds` is the least between two rows of steps."""

    seconds: float

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step."""

    def sample(self, step: int, text: str) -> None:
        """What the model said."""

    def back(self, step: int) -> None:
        """What was told of this step and later ones did not happen."""

    def flush(self) -> None:
        """Keep what was told."""

    def close(self, summary: Figures) -> None:
        """The end; what the run came to."""


# ---------------------------------------------------------------- what is asked


def refuse_missing(track: TrackPlan) -> None:
    """Raises UserError for a tracker whose package is not here."""
    wanted = {"tensorboard": "on" if track.tensorboard else None, "wandb": track.wandb}
    for package, value in wanted.items():
        if value is not None and not _installed(package):
            key = f"train.{package}={value}"
            raise UserError(f"{key} needs a package: pip install 'tuppence[{package}]'")


def kinds(track: TrackPlan) -> list[str]:
    """Who is told: TensorBoard as asked, else where it is there to look; W&B on request."""
    look = track.tensorboard
    tensorboard = _installed("tensorboard") if look is None else look
    return [*(["tensorboard"] if tensorboard else []), *([track.wandb] if track.wandb else [])]


def closing_seconds(track: TrackPlan) -> float:
    """What the end of a run keeps for its trackers."""
    return sum(CLOSE_SECONDS[kind] for kind in kinds(track))


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def trackers(
    plan: Plan, folder: RunFolder, say: Callable[[str], None], *, step: int
) -> list["Tracker"]:
    """Those of an attempt that goes on from `step`."""
    from tuppence.train import sinks

    told = Notes(folder, say).warn
    make: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: sinks.TensorBoard(folder, plan, step=step),
        "offline": lambda: sinks.Wandb(folder, plan, told),
        "online": lambda: sinks.Wandb(folder, plan, told),
    }
    return [Tracker(kind, make[kind], told, step=step) for kind in kinds(plan.track)]


def apart(hours: float) -> float:
    """The least seconds between two rows of a run that has lasted so long, so that a month of quick
    steps is some 300,000 rows (120 MB of TensorBoard's)."""
    return min(hours, MOST_APART) if hours >= DENSE_HOURS else 0.0


# ---------------------------------------------------------------- the thread


class Tracker:
    """Tells one sink, which is made in its thread: what that imports costs training nothing."""

    def __init__(
        self,
        kind: str,
        make: Callable[[], Sink],
        told: Callable[[str, str, str], None],
        *,
        step: int,
    ) -> None:
        self.kind, self._make, self._told, self._step = kind, make, told, step
        self._queue: queue.SimpleQueue[tuple[float, str, Row]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._silent = self._left_out = False
        self._thread = threading.Thread(target=self._work, name=f"track {kind}", daemon=True)
        self._thread.start()

    def tell(self, name: str, row: Row) -> None:
        """A row of metrics, evals or samples. Never waits, never raises."""
        if self._silent:
            return
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put((time.monotonic(), name, row))
        elif not self._left_out:
            self._left_out = True
            self._told(
                "tracking_behind", f"{self.kind} does not keep up: steps are missing", ELSEWHERE
            )

    def close(self) -> None:
        """Let it write what it has, as long as the end of a run allows."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS[self.kind])
        self._silent = True
        if self._thread.is_alive():
            message = f"{self.kind} was not done at the end: the last steps may be missing"
            self._told("tracking_behind", message, ELSEWHERE)

    def _work(self) -> None:
        try:
            sink = self._make()
            pile = Pile(sink, step=self._step)
            while not (last := self._closing.wait(DRAIN_SECONDS)) or not self._queue.empty():
                while not self._queue.empty():
                    pile.take(*self._queue.get())
                if last:
                    break
                sink.flush()
            pile.close()
        except Exception as error:
            told, self._silent = self._silent, True
            if not told:
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                message = f"{self.kind} is left out from here on ({why})"
                self._told("tracking_failed", message, ELSEWHERE)


class Pile:
    """Rows on their way to a sink."""

    def __init__(self, sink: Sink, *, step: int) -> None:
        self._sink, self._last_step = sink, step
        self._rows: list[Row] = []
        self._written = -float("inf")
        self._judged: tuple[int, int] | None = None  # attempt and step of the last val loss
        self._summary: Figures = {}
        self._mfu = 0.0, 0  # sum, steps

    def take(self, at: float, name: str, row: Row) -> None:
        """A row that was told at this time."""
        step = row["step"]
        if name != "metrics":
            self._write()
            if step < self._last_step:
                self._back(step + 1)
            self._take_other(name, row)
            return
        if step <= self._last_step:
            self._write()
            self._back(step)
        self._last_step = step
        self._rows.append(row)
        if at - self._written >= max(self._sink.seconds, apart(row["hours"])):
            self._written = at
            self._write()

    def close(self) -> None:
        """Write what is left, and what the run came to (as nanoGPT's summary has it)."""
        self._write()
        total, steps = self._mfu
        if steps:
            self._summary["mfu"] = 100 * total / steps
        self._sink.close(self._summary)

    def _back(self, step: int) -> None:
        self._sink.back(step)
        self._last_step = step - 1

    def _write(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        last = rows[-1]
        found = {tag: last.get(key) for key, tag in STEP.items()}
        for key in MEANS if len(rows) > 1 else ():
            there = [row[key] for row in rows if row[key] is not None]
            found[STEP[key]] = sum(there) / len(there) if there else None
        figures = {tag: float(value) for tag, value in found.items() if value is not None}
        self._sink.scalars(last["step"], figures)
        self._mfu = self._mfu[0] + sum(row["mfu"] for row in rows), self._mfu[1] + len(rows)
        self._summary |= {"iter": last["step"], "lr": last["lr"]}
        if "train/loss" in figures:
            self._summary["train/loss"] = figures["train/loss"]

    def _take_other(self, name: str, row: Row) -> None:
        step, figures = row["step"], {}
        if name == "samples":
            self._sink.sample(step, row["text"])
            return
        if self._judged != (row["attempt"], step):  # with tasks it comes twice
            figures = {tag: row[key] for key, tag in VAL.items() if row.get(key) is not None}
            self._judged = row["attempt"], step
            self._summary["val/loss"] = row["loss"]
        for task, score in TASKS.items():
            if task in row and row[task].get(score) is not None:
                figures[f"tasks/{task}"] = row[task][score]
        self._sink.scalars(step, figures)

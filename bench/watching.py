"""What being watched costs a run: CPU time of each watcher beside the CPU time of a step.

    python bench/watching.py [--steps 300] [--screen 30]

In the run's own process, on the embedded default's model and on one whose steps take milliseconds:
the row in metrics.jsonl, the gauges, handing the row to TensorBoard's (and W&B's) thread, and what
the threads do with it. Beside the run, `tuppence watch` on a terminal, at its own rate: a share of
one core, its start-up left out. The promise is less than 0.5% of a step's CPU time; the row in
metrics.jsonl, which is the run's own memory, is shown beside it. Run it on a quiet machine: where
others need the cores, what is between two steps finds cold caches.
"""

import argparse
import contextlib
import io
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import environment, machine

MODELS: dict[str, list[str]] = {
    "the embedded default": [],
    "steps of milliseconds": [
        *("model.n_layer=2", "model.n_embd=64", "model.n_head=2"),
        *("model.sequence_len=64", "train.batch_tokens=1024"),
    ],
}
PARTS = {
    "record": "a row in metrics.jsonl",
    "gauges": "gauges, with the memory held",
    "tell": "handing rows over",
    "track tensorboard": "TensorBoard's thread",
    "track offline": "W&B's thread",
}


class Clock:
    """CPU seconds of the calling thread inside functions that are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.whole, self.steps = 0.0, 0

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return work(*given, **named)
            finally:
                self.seconds[name] += time.thread_time() - began

        return timed


@contextlib.contextmanager
def replaced(clock: Clock) -> Iterator[None]:
    """The watchers' entries timed, and the steps counted."""
    from tuppence.folder import RunFolder
    from tuppence.train import loop
    from tuppence.train.gauges import Gauges
    from tuppence.train.tracking import Pile, Tracker

    append, take, work, step = RunFolder.append, Pile.take, Tracker._work, loop._step
    rows = clock.timed("record", append)

    def appended(folder: Any, name: str, row: Any) -> None:
        (rows if name == "metrics" else append)(folder, name, row)

    def taken(pile: Any, *given: Any) -> None:
        clock.timed(threading.current_thread().name, take)(pile, *given)

    def worked(tracker: Any) -> None:
        clock.timed(f"whole {threading.current_thread().name}", work)(tracker)

    def stepped(trainer: Any, turn: Any) -> None:
        began = time.process_time()
        step(trainer, turn)
        clock.steps += 1
        clock.whole += time.process_time() - began

    new = {
        (RunFolder, "append"): appended,
        (Pile, "take"): taken,
        (Tracker, "_work"): worked,
        (Tracker, "tell"): clock.timed("tell", Tracker.tell),
        (Gauges, "seen"): clock.timed("gauges", Gauges.seen),
        (loop, "_step"): stepped,
    }
    kept = {(owner, name): getattr(owner, name) for owner, name in new}
    try:
        for (owner, name), value in new.items():
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in kept.items():
            setattr(owner, name, value)


def inside(words: list[str], steps: int, folder: Path) -> Clock:
    """A run in this process, timed."""
    from tuppence.cli import main

    clock = Clock()
    given = ["train", f"budget.steps={steps}", f"train.eval_every={10 * steps}"]
    given += ["train.sample_tokens=0", *words]
    with replaced(clock), contextlib.redirect_stdout(io.StringIO()):
        if code := main([*given, "--runs", str(folder / "runs"), "--data", str(folder / "data")]):
            raise SystemExit(code)
    return clock


def table(name: str, clock: Clock) -> None:
    each = clock.whole / clock.steps
    print(f"{name}: {clock.steps} steps of {each * 1e3:.2f} ms of CPU time")
    for part, what in PARTS.items():
        if part in clock.seconds:
            cost = clock.seconds[part] / clock.steps
            print(f"  {what:<28} {cost * 1e6:8.1f} us a step   {cost / each:8.3%}")
    totals = {
        "watching, W&B apart": ("record", "track offline"),
        "watching": ("record",),
        "with the row, W&B apart": ("track offline",),
    }
    for label, left_out in totals.items():
        if label != "watching" or "track offline" in clock.seconds:
            found = sum(clock.seconds[p] for p in PARTS if p not in left_out) / clock.steps
            print(f"  {label:<28} {found * 1e6:8.1f} us a step   {found / each:8.3%}")
    for part, seconds in list(clock.seconds.items()):
        if part.startswith("whole "):
            once = seconds - clock.seconds[part.removeprefix("whole ")]
            print(f"  once a run, start to end: {part.removeprefix('whole track ')} {once:.2f} s")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def screen(seconds: float, folder: Path) -> None:
    """`tuppence watch` on a terminal beside a run."""
    env = environment(folder / "cache", TERM="xterm-256color", COLUMNS="120", LINES="40")
    runs = ["--runs", str(folder / "runs")]
    words = ["train", "name=watched", f"budget.hours={(3 * seconds + 60) / 3600}"]
    python = [sys.executable, "-m", "tuppence"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}
    run = subprocess.Popen([*python, *words, *runs, "--data", str(folder / "data")], **quiet)
    while not (folder / "runs" / "watched" / "metrics.jsonl").exists():
        time.sleep(0.2)
    mine, theirs = pty.openpty()
    watch = subprocess.Popen([*python, "watch", "watched", *runs], stdin=theirs, stdout=theirs,
                             stderr=theirs, env=env)  # fmt: skip
    threading.Thread(target=drained, args=(mine,), daemon=True).start()
    time.sleep(8)  # its start-up
    before, run_before, began = cpu_seconds(watch.pid), cpu_seconds(run.pid), time.monotonic()
    time.sleep(seconds)
    lasted = time.monotonic() - began
    spent, run_spent = cpu_seconds(watch.pid) - before, cpu_seconds(run.pid) - run_before
    for process in (watch, run):
        process.kill()
        process.wait()
    print(f"tuppence watch, {lasted:.0f} s on a terminal of 120x40: {spent / lasted:.2%} of one "
          f"core, {spent / run_spent:.2%} of the run's CPU time")  # fmt: skip


def drained(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--steps", type=int, default=300)
    words.add_argument("--screen", type=float, default=30.0, help="seconds; 0 leaves it out")
    asked = words.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        for number, (name, model) in enumerate(MODELS.items()):
            for wandb in ([], ["train.wandb=offline"]):
                told = [f"name=run{number}{len(wandb)}", "train.tensorboard=on", *wandb, *model]
                steps = asked.steps if not model else 10 * asked.steps
                table(f"{name}{', W&B too' if wandb else ''}", inside(told, steps, Path(place)))
        if asked.screen:
            screen(asked.screen, Path(place))


if __name__ == "__main__":
    main()

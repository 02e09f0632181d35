"""Ranks as real processes that meet over gloo, with the environment that torchrun gives."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import command, fork

PATIENCE = 300.0  # seconds: the machine may be busy


@dataclass(frozen=True)
class Started:
    """Processes by rank, and the files that have what each of them said."""

    processes: list[BaseProcess]
    logs: list[Path]

    def codes(self, seconds: float = PATIENCE) -> list[int | None]:
        """The exit codes; those that have not ended by then are killed, and have None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        self.end()
        return found

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid or -1, number)

    def said(self, rank: int) -> str:
        """What it wrote to stdout and stderr."""
        return self.logs[rank].read_text(errors="replace")

    def lines(self) -> list[str]:
        """The lines for the person, of all ranks."""
        texts = [self.said(rank) for rank in range(len(self.logs))]
        return [ln for text in texts for ln in text.splitlines() if ln.startswith("tuppence: ")]


def start(
    world: int,
    work: Callable[..., object],
    *args: object,
    folder: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Started:
    """`work(*args)` in each of `world` processes, with the environment that torchrun gives."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    shared |= {"LOCAL_WORLD_SIZE": str(world)}
    processes: list[BaseProcess] = []
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    for rank, log in enumerate(logs):
        env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log.write_bytes(b"")
        processes.append(fork((str(log), str(log)), env, str(cwd or folder), work, *args))
    return Started(processes, logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def struck(words: Sequence[str], rank: int | None, step: int, number: int) -> int:
    """The same, but at the beginning of step `step` rank `rank` (None: each) gets a signal (a
    `kill -9` once something is saved)."""
    from tuppence import host
    from tuppence.train import loop

    train_step = loop._step

    def _step(trainer: Any, turn: Any) -> None:
        if trainer.state.step == step and rank in (None, host.rank()):
            saved = trainer.folder.checkpoints / "last.json"
            while number == signal.SIGKILL and not saved.exists():  # a thread's work
                time.sleep(0.005)
            os.kill(os.getpid(), number)
        train_step(trainer, turn)

    loop._step = _step
    return command(words)


def poisoned(words: Sequence[str], rank: int, first: int, last: int) -> int:
    """The same, but from batch `first` to `last` one rank's loss is not a number."""
    from tuppence import host
    from tuppence.train import loop, step

    backward, batch_of = step.backward, loop._batch
    now = [-1]

    def _batch(trainer: Any, number: int) -> Any:
        now[0] = number
        return batch_of(trainer, number)

    def poison(workers: Any, model: Any, micro: Any, *, of: int) -> Any:
        loss = backward(workers, model, micro, of=of)
        bad = host.rank() == rank and first <= now[0] <= last
        return loss * float("nan") if bad else loss

    loop._batch, step.backward = _batch, poison
    return command(words)

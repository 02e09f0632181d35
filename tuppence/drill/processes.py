"""Training processes that are watched, signalled and killed from outside.

Several ranks are started as torchrun starts them: one process each, told of the others by the
environment. Nothing here outlives its `with`.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuppence.errors import Fault

POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Ended:
    """How all of them ended: the first exit code that is not 0, and all that they said."""

    code: int
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines that were meant for a person."""
        return [line for line in self.text.splitlines() if line.startswith("tuppence: ")]

    def says(self, text: str) -> bool:
        return text in self.text


class Processes:
    """The ranks of one attempt. `file_bytes` is the largest file that they can write; those that
    have not ended after `patience` seconds are killed, and that is a Fault."""

    def __init__(
        self,
        words: list[str],
        *,
        ranks: int,
        environment: dict[str, str],
        log: Path,
        file_bytes: int | None = None,
        patience: float = 600.0,
    ) -> None:
        self._log, self._deadline = log, time.monotonic() + patience
        self._popen: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-m", "tuppence", *words]
        # before exec, as `ulimit -f` would: no file grows beyond it, as on a disk that is full
        limit = None if file_bytes is None else partial(_limit, file_bytes)
        with log.open("wb") as out:
            for extra in _environments(ranks):
                started = subprocess.Popen(
                    command,
                    env=environment | extra,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is ours, not theirs
                    preexec_fn=limit,
                )
                self._popen.append(started)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [one.pid for one in self._popen]

    def alive(self) -> bool:
        """Whether all are."""
        return all(one.poll() is None for one in self._popen)

    def send(self, number: signal.Signals, *, rank: int | None = None) -> None:
        """To one rank, or to all, at once."""
        for one in self._popen if rank is None else [self._popen[rank]]:
            if one.poll() is None:
                one.send_signal(number)

    def kill(self) -> None:
        """`kill -9` of all."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self) -> Ended:
        """Until all have ended."""
        while any(one.poll() is None for one in self._popen):
            self.rest()
        codes = [one.returncode for one in self._popen]
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return Ended(next((code for code in codes if code), 0), text)

    def rest(self) -> None:
        """Between two looks at them. Raises Fault when they are late."""
        time.sleep(POLL_SECONDS)
        if time.monotonic() > self._deadline:
            self._deadline = math.inf  # for the wait that follows the kill
            self.kill()
            raise Fault("it hung, and was killed")

    def reach(self, run: Path, step: int) -> bool:
        """Wait until so many steps are done; False where it ended before."""
        while (last_step(run) or 0) < step:
            if not self.alive():
                return False
            self.rest()
        return self.alive()


def _environments(ranks: int) -> Iterator[dict[str, str]]:
    """What torchrun would tell each rank."""
    if ranks == 1:
        yield {}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = str(ranks)
    for rank in map(str, range(ranks)):
        yield {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
        }


def _limit(file_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def last_step(run: Path) -> int | None:
    """The step of the last whole line of metrics.jsonl."""
    try:
        with (run / "metrics.jsonl").open("rb") as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - 4096))
            whole = lines.read().rpartition(b"\n")[0].splitlines()
        return int(json.loads(whole[-1])["step"]) if whole else None
    except (OSError, ValueError):  # not there yet, or the line before is longer than what was read
        return None


def phase_of(run: Path, pid: int) -> str:
    """What a process is charging for just now; empty before it charges anything."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((run / "heartbeat.json").read_text())
        return str(said["phase"]) if said["pid"] == pid else ""
    return ""

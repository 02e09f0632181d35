"""Real processes, forked from a server which has imported torch once.

A process that imports torch for itself costs seconds; one that is forked is there at once, and is
killed, signalled and waited for like any other.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])


def fork(*given: Any) -> BaseProcess:
    """`enter(*given)` in a process of its own, from the server, which the first call starts."""
    with pytest.MonkeyPatch.context() as patch:  # the server knows no other path
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    process: BaseProcess = CONTEXT.Process(target=enter, args=given, daemon=True)
    process.start()
    return process


def enter(
    outputs: tuple[str, str],
    env: Mapping[str, str],
    cwd: str,
    work: Callable[..., object],
    *args: Any,
) -> None:
    """In the child: files for stdout and stderr (both may be one), environment and folder of its
    own; then `work(*args)`, whose result is the exit code. It leaves at once when that is done."""
    for number, path in enumerate(outputs, 1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.current_process()._config["daemon"] = False  # it may start processes itself
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    assert "preloaded" in sys.modules, "the server could not import it"
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        code = int(work(*args) or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(words: Sequence[str]) -> int:
    """A command line, run in this process as `python -m tuppence` runs it."""
    from tuppence.__main__ import main

    sys.argv = ["tuppence", *words]
    return main()


def _begun(before: Callable[[], None] | None, work: Callable[..., object], *args: Any) -> object:
    if before is not None:
        before()
    return work(*args)


NUMBERS = itertools.count()


@functools.cache
def _logs() -> Path:
    """Where outputs are that nobody named a file for."""
    made = Path(tempfile.mkdtemp(prefix="forked-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


class Forked:
    """`work(*args)` in a process: what tests use of subprocess.Popen. What work returns is the exit
    code; `before` is called first. Without `out` and `err` both are kept for `communicate`."""

    def __init__(
        self,
        work: Callable[..., object],
        *args: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        out: Path | None = None,
        err: Path | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        number = next(NUMBERS)
        given = {"out": out, "err": err}
        self._files = [path or _logs() / f"{number}.{name}" for name, path in given.items()]
        for path in self._files:
            path.write_bytes(b"")
        outputs = tuple(map(str, self._files))
        where = (outputs, {**(env or os.environ)}, str(cwd or Path.cwd()))
        self._process = fork(*where, _begun, before, work, *args)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("tuppence", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") for path in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

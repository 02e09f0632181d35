"""SIGINT and SIGTERM ask the loop to save and stop; a second SIGINT stops the process at once."""

import os
import signal
import sys
import threading
from types import FrameType


class Interrupt:
    """Remembers the first signal; use as a context manager around the work that can be saved."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            # what is saved is complete (checkpoints are renamed into place): leave without ceremony
            sys.stderr.write("\ntuppence: stopped at once; the last checkpoint stands\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        name = self.signal.name
        sys.stderr.write(f"\ntuppence: {name}: saving after this step (Ctrl-C again: at once)\n")


class Interrupted(Exception):
    """The loop saved and stopped because a signal asked it to."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(f"{number.name}: saved at step {step}; the same command continues")
        self.exit_code = 128 + number

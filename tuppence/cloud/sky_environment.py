"""SkyPilot's environment, made once in the user's cache folder: it brings 130 packages."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuppence.errors import Fault
from tuppence.files import try_lock
from tuppence.plan.hardware import cache_folder

VERSION = "0.14.1"
# clouds of the price book and clusters of one's own; others: `pip install 'skypilot[NAME]'` there
EXTRAS = ("aws", "gcp", "lambda", "nebius", "runpod", "slurm")
DONE = "tuppence.json"  # written last: with it the environment is whole
MESSAGE_CHARS = 400


def environment(folder: Path | None = None, *, extras: Sequence[str] = EXTRAS) -> Path:
    """The Python of SkyPilot's environment, which is made where it is not there or not whole."""
    folder = folder or cache_folder() / f"sky-{VERSION}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if _lacks(folder, extras):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a+b") as lock:
            _wait_for(lock, folder)
            if wanted := _lacks(folder, extras):  # still: nobody made it meanwhile
                _make(folder, python, wanted)
    return python


def _lacks(folder: Path, extras: Sequence[str]) -> list[str]:
    """Extras that are not there yet; all where the environment is not whole."""
    try:
        there = json.loads((folder / DONE).read_text())["extras"]
    except (OSError, ValueError, KeyError):
        there = []
    return sorted({*extras, *there}) if set(extras) - set(there) else []


def _wait_for(lock: Any, folder: Path) -> None:
    """Two first uses at once: the second waits for what the first makes."""
    told = False
    while not try_lock(lock):
        if not told:
            _say(f"another process makes SkyPilot's environment in {folder}: waiting for it")
            told = True
        time.sleep(0.5)


def _make(folder: Path, python: Path, extras: list[str]) -> None:
    """A virtual environment with SkyPilot. A failure leaves no mark that it is whole."""
    package = f"skypilot[{','.join(extras)}]=={VERSION}"
    _say(f"SkyPilot {VERSION}: making its environment in {folder} (once; 2 minutes, 0.7 GB)")
    started = time.monotonic()
    _step([sys.executable, "-m", "venv", str(folder)], "python -m venv")
    _step([str(python), "-m", "pip", "install", "--disable-pip-version-check", package], "pip")
    (folder / DONE).write_text(json.dumps({"version": VERSION, "extras": extras}))
    _say(f"SkyPilot {VERSION}: there after {time.monotonic() - started:.0f} s")


def _step(command: list[str], what: str) -> None:
    """One command, its lines on stderr with its name before them."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        last = ""
        for line in child.stdout:
            last = line.strip() or last
            if not last.startswith("Requirement already"):
                _say(f"{what} | {last[:160]}")
    if child.returncode:
        raise Fault(
            f"SkyPilot's environment was not made: {what}: {last[-MESSAGE_CHARS:]}; "
            f"mend it and try again, or name a Python that has SkyPilot with --sky"
        )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()

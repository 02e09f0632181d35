"""What the benchmarks share: running tuppence as a person would, in a folder of its own."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def environment(cache: Path, **extra: str) -> dict[str, str]:
    """The person's environment with calibrations kept apart."""
    return {**os.environ, "XDG_CACHE_HOME": str(cache), **extra}


def tuppence(*words: str, folder: Path, env: dict[str, str] | None = None) -> tuple[float, Any]:
    """Run one command in `folder`; (wall seconds of the whole process, its --json document)."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tuppence", *words, "--json"],
        cwd=folder,
        env=env or environment(folder / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"tuppence {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return seconds, json.loads(done.stdout)


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run folder's file."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def middle(values: list[float], form: str = ",.2f") -> str:
    """`median (min to max)`."""
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:{form}} ({low:{form}} to {high:{form}})"


def machine() -> str:
    """What the figures were taken on, in a line."""
    from tuppence import host

    versions = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return f"{host.cpu_name()}, {host.usable_cores()} cores, torch {versions.stdout.strip()}"

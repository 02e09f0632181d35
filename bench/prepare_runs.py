"""Commands in processes of their own, and what all their processes together hold in memory."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.05

OURS = """
import sys, json
from pathlib import Path
from tuppence.data.prepare import Options, prepare
source, tokenizer, root, workers = sys.argv[1:]
options = Options(workers=int(workers) or None)
manifest = prepare(source=source, tokenizer=tokenizer, root=Path(root), options=options).manifest
print(json.dumps({"tokens": manifest.tokens, "bytes": manifest.bytes,
                  "shards": [[shard.file, shard.sha256] for shard in manifest.shards]}))
"""


@dataclass(frozen=True)
class Measured:
    """One run of one side. `largest_mib` is the peak RSS of its largest process; `together_mib` the
    peak of all its processes' PSS (a page that n of them share counts 1/n in each), where sampled;
    `core_seconds` a peer's tokenizing and writing alone."""

    seconds: float
    tokens: int
    largest_mib: float
    together_mib: float | None = None
    core_seconds: float | None = None


@dataclass(frozen=True)
class Ran:
    """The last line of stdout, wall seconds, and memory as in `Measured`."""

    line: str
    seconds: float
    largest_mib: float
    together_mib: float | None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ours_command(source: str, tokenizer: str, root: str, *, workers: int = 0) -> list[str]:
    """Our preparation, for a process of its own. No `workers` means what it chooses itself."""
    return [sys.executable, "-c", OURS, source, tokenizer, root, str(workers)]


def ours_environment() -> dict[str, str]:
    """The person's, with this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def ours(source: str, tokenizer: str, *, sampled: bool = False) -> tuple[Measured, int]:
    """Our preparation in a fresh process and a fresh folder; also the text's bytes."""
    with tempfile.TemporaryDirectory() as root:
        command = ours_command(source, tokenizer, root)
        ran = run(command, env=ours_environment(), sampled=sampled)
    made = json.loads(ran.line)
    return Measured(ran.seconds, made["tokens"], ran.largest_mib, ran.together_mib), made["bytes"]


def run(
    command: list[str],
    *,
    stdin: str = "",
    env: dict[str, str] | None = None,
    sampled: bool = False,
) -> Ran:
    """Run to its end. A sampler takes a little time of its own, so `sampled` runs are not timed
    beside others."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        began = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=given, stdout=out, stderr=subprocess.STDOUT, env=env or dict(os.environ)
        )
        sampler = Sampler(child.pid) if sampled else None
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        together = sampler.stop() if sampler else None
        out.seek(0)
        lines = out.read().strip().splitlines() or [""]
    if child.returncode:
        raise SystemExit("\n".join(lines[-20:]))
    scale = 1024 if sys.platform != "darwin" else 1024**2
    return Ran(lines[-1], seconds, usage.ru_maxrss / scale, together)


# ---------------------------------------------------------------- processes


class Sampler:
    """Looks at a process and all below it twenty times a second, until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._over = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """The most MiB there were at once."""
        self._over.set()
        self._thread.join()
        return self._peak

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, sum(pss_mib(pid) for pid in tree(self._pid)))


def tree(pid: int) -> list[int]:
    """The process and all that it started, and those started. Linux only."""
    parents = dict(_parents())
    found = [pid]
    for one in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _read(entry / "stat").rpartition(")")[2].split()
            if len(fields) > 1 and fields[0] != "Z":
                yield int(entry.name), int(fields[1])


def pss_mib(pid: int) -> float:
    """Its memory, with what it shares counted by halves, thirds, ..."""
    for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


# ---------------------------------------------------------------- corpora


def varied(corpus: Path, path: Path, *, copies: int) -> int:
    """Write the documents `copies` times over as plain JSONL, each copy with a first line of its
    own so that no two documents are equal; the bytes of the file."""
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for line in _lines(corpus):
                row = json.loads(line)
                text = f"Copy {copy + 1} of {copies}.\n{row['text']}"
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def _lines(corpus: Path) -> Iterator[str]:
    opened: IO[str]
    with (lzma.open if corpus.suffix == ".xz" else open)(corpus, "rt", encoding="utf-8") as opened:
        yield from opened

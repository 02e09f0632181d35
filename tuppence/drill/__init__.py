"""`tuppence drill RUN`: kill, tear, fill and poison copies of a run, and say what survived.

    processes   starting, signalling and killing      scene   the copy, and the evidence
    acts        what is done, and what is asked

The run itself is only read. The copies are its own model, data and settings with few steps.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from tuppence.drill import scene as scenes
from tuppence.drill.acts import Drill, Row
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.live import duration

__all__ = ["as_text", "drill", "workplace"]

KILLS = 3


def drill(
    run: RunFolder,
    *,
    work: Path,
    say: Callable[[str], None],
    steps: int | None = None,
    ranks: int | None = None,
    kills: int = KILLS,
    seed: int = 0,
) -> dict[str, Any]:
    """Do all of it in `work`, an empty folder; `survived` in the document says whether all did.

    Takes a few minutes for a small model; says how many before it begins. Raises UserError for a
    run that cannot be drilled here.
    """
    if sys.platform == "win32":
        raise UserError("tuppence drill needs signals and limits that Windows does not have")
    scene = scenes.staged(run, work=work, say=say, steps=steps, ranks=ranks)
    needed, free = scenes.needed_bytes(scene), shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"the drill's checkpoints take up to {needed / 2**30:.1f} GiB, {work} has "
            f"{free / 2**30:.1f} free; make room"
        )
    say(
        f"drill: copies of {run.path} in {work}, {scene.steps} steps each on {scene.ranks} "
        f"rank{'s' if scene.ranks > 1 else ''}; about {duration(scenes.expected_seconds(scene))}"
    )
    with _interruptible():
        rows = [_told(row, say) for row in Drill(scene, kills=kills, seed=seed).rows()]
    return {
        "run": str(run.path),
        "steps": scene.steps,
        "ranks": scene.ranks,
        "bitwise": scene.plan.machine.deterministic,
        "rows": [asdict(row) for row in rows],
        "survived": all(row.ok for row in rows),
    }


def _told(row: Row, say: Callable[[str], None]) -> Row:
    say(f"drill: {row.act}: {'survived' if row.ok else 'LOST'}: {row.survived}")
    return row


def as_text(told: dict[str, Any]) -> str:
    """The table."""
    rows = told["rows"]
    wide = max(len(row["act"]) for row in rows)
    lines = [
        f"{'ok  ' if row['ok'] else 'LOST'}  {row['act']:{wide}}  {row['done']}\n"
        f"      {'':{wide}}  {row['survived']}"
        for row in rows
    ]
    good = sum(row["ok"] for row in rows)
    how = "bit for bit" if told["bitwise"] else f"losses within {scenes.BOUND:.0%}"
    lines.append(f"{good} of {len(rows)} survived ({told['steps']} steps, compared {how})")
    return "\n".join(lines)


@contextlib.contextmanager
def workplace(run: RunFolder, *, keep: bool) -> Iterator[Path]:
    """A folder beside the run for the copies; it goes at the end unless it is kept."""
    made = Path(tempfile.mkdtemp(prefix=f".drill-{run.path.name}-", dir=run.path.parent)).resolve()
    try:
        yield made
    finally:
        if not keep:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A SIGTERM ends a drill as Ctrl-C does: no process stays behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

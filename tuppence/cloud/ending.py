"""The end of a launch: every job cancelled, every machine taken down, and asked again."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tuppence.cloud import record as records
from tuppence.cloud.record import Record
from tuppence.cloud.sky import Look, Sky

STOP_SECONDS = 900.0  # that a cloud may take to let go of machines
ASK_AGAIN_SECONDS = 5.0  # whether they are gone: a cancelled job's go after half a minute
GOING_SECONDS = 120.0  # that SkyPilot has for a machine whose job is over, before it is taken down


def end(folder: Path, sky: Sky, *, say: Callable[[str], None], within: float | None = None) -> Look:
    """Cancel every job of a launch, take down every machine, and ask again until none is there, or
    `within` (15 minutes) are over: `left` of what is given says what is. Of one that is half
    launched, or over, the same. Raises Unreachable where SkyPilot gives no answer.

    A job that is cancelled is CANCELLED only once its machines are gone; where SkyPilot watches
    jobs from a machine of its own that is all that can be seen of them from here.
    """
    record = _read(folder)
    names = [job.name for job in record.jobs]
    for name in names:
        found = sky.cancel(name)
        if found["requests"] or found["jobs"]:
            say(f"{record.name}: cancelled {name}: its machines are going down")
    seen, started, taken = Look((), (), (), ()), time.monotonic(), set[str]()
    while names:
        seen = sky.look(names)
        if not left(seen) and not left(seen := sky.look(names, refresh=True)):
            break  # as the clouds say, too
        waited = time.monotonic() - started
        if waited > (STOP_SECONDS if within is None else within):
            return seen
        _urge(record, sky, seen, taken, waited=waited, say=say)
        time.sleep(ASK_AGAIN_SECONDS)
    record = _read(folder)
    if record.state != "finished":
        records.write(folder, replace(record, state=_state(record, seen)))
    return seen


def _urge(
    record: Record,
    sky: Sky,
    seen: Look,
    taken: set[str],
    *,
    waited: float,
    say: Callable[[str], None],
) -> None:
    """Cancel what came after the first time; take down, once, what SkyPilot forgot to."""
    for name in {row.name for row in seen.jobs if not row.finished}:
        sky.cancel(name)
    for held in seen.clusters:
        if held.name not in taken and _is_left(seen, held.name, waited):
            say(f"{record.name}: taking down {held.name}")
            taken.add(held.name)
            sky.down(held.name)


def _state(record: Record, seen: Look) -> str:
    """Stopped, unless the last job had come to its end by itself."""
    last = [row.status for row in seen.jobs if row.name == record.jobs[-1].name]
    return "finished" if last and set(last) == {"SUCCEEDED"} else "stopped"


def _read(folder: Path) -> Record:
    found = records.read(folder)
    assert found is not None
    return found


def _is_left(seen: Look, cluster: str, waited: float) -> bool:
    """Whether nobody will take it down: its job is over, and was so for a while."""
    rows = [row for row in seen.jobs if row.cluster == cluster]
    if not all(row.finished for row in rows):
        return False
    ended = max((row.end_at or 0.0 for row in rows), default=0.0)
    return waited > GOING_SECONDS or time.time() - ended > GOING_SECONDS


def left(seen: Look) -> list[str]:
    """Machines that are there, and jobs that may still start one."""
    jobs = {f"job {row.name} ({row.status})" for row in seen.jobs if not row.finished}
    return sorted(jobs | {f"machine {held.name}" for held in seen.clusters})


def by_hand(sky: Sky, there: list[str]) -> str:
    """The command that ends what is left, or shows it."""
    names = [each.partition(" ")[2] for each in there if each.startswith("machine ")]
    return f"`{sky.tool} down {' '.join(names)}`" if names else f"`{sky.tool} jobs queue` shows it"

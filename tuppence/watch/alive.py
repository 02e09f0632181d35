"""Whether a process is still at a run: from the beat that it leaves once a second."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from tuppence.errors import Fault
from tuppence.folder import RunFolder
from tuppence.host import process_space


def is_at_it(folder: RunFolder) -> bool:
    """Whether a process of this machine is at the run now."""
    try:
        beat = folder.read_json("heartbeat.json")
        return beat is not None and is_here(beat) and bool(lives(beat["pid"], before=beat["end"]))
    except (Fault, FileNotFoundError, LookupError, TypeError, AttributeError):
        return False


def is_here(beat: dict[str, Any]) -> bool:
    """Whether its process's number is one of this machine: machines and containers may share a name
    and a folder. An older run's beat says the name alone."""
    here = process_space()
    return beat["node"] == platform.node() and beat.get("space", here) == here


def lives(pid: int, *, before: float) -> bool | None:
    """Whether the process of this number, begun before that time, is there; None where this system
    cannot say."""
    stat = Path(f"/proc/{pid}/stat")
    if sys.platform == "linux" and Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return False
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        begun = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return fields[0] not in "ZX" and begun < before + 5  # else another has its number now
    if sys.platform == "win32" or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

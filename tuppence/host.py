"""Facts about the process and the machine under it; the thread settings torch starts with."""

import os
import platform
import sys
import time
from pathlib import Path

SPIN_COUNT = "1000"  # OpenMP's busy-wait before a thread sleeps; see `settle_threads`


def process_start() -> float:
    """When this process was started (epoch seconds): from the system on Linux, else an estimate."""
    stat = Path("/proc/self/stat")
    if stat.exists():
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - time.process_time()


def peak_rss_gib() -> float | None:
    """The largest resident memory this process has had, in GiB; None where it cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def memory_gib() -> float | None:
    """The machine's memory in GiB; None where it cannot be told."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return None


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def usable_cores() -> int:
    """Cores this process may run on (affinity and containers narrow what the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settle_threads(threads: int) -> dict[str, str]:
    """Choose OpenMP's threads and wait policy. Call it before torch is first imported.

    Training runs each core as a worker of its own (workers.py); OpenMP is left with what cannot be
    divided so. Its idle threads spin for milliseconds by default, and on a core that something
    else needs too the spinner holds up the very thread that it waits for: throughput falls up to a
    hundredfold (docs/LOG.md). A short spin, then sleep, keeps the fall in proportion. What the
    person has set in the environment stays.
    """
    assert "torch" not in sys.modules, "torch reads its thread settings when it is imported"
    chosen = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN_COUNT, "KMP_BLOCKTIME": "0"}
    for key, value in chosen.items():
        os.environ.setdefault(key, value)
    return {key: os.environ[key] for key in chosen}

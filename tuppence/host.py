"""Facts about the process and the machine under it; the thread settings torch starts with."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tuppence

SMI_SECONDS = 10.0  # that nvidia-smi may take to answer
SPIN_COUNT = "1000"  # OpenMP's busy-wait before a thread sleeps; see `settle_threads`


@functools.cache
def process_space() -> str | None:
    """Where a process's number means what it means here: this start of this system, and this
    container of it. None where that cannot be told (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_start() -> float:
    """When this process was started (epoch seconds): from the system on Linux, else an estimate."""
    stat = Path("/proc/self/stat")
    if stat.exists():
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    return tuppence.STARTED


def peak_rss_gib() -> float | None:
    """The largest resident memory this process has had, in GiB; None where it cannot be told."""
    status = Path("/proc/self/status")
    if status.exists():
        peak_kib = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak_kib[1]) / 2**20 if peak_kib else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def rss_gib() -> float | None:
    """This process's resident memory now, in GiB; None where it cannot be told (not Linux)."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def waited_for_cores() -> float | None:
    """Seconds that this process's threads were ready and had no core, in all, so far (Linux)."""
    waited, there = 0, False
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # a thread that has just ended
            waited, there = waited + int(path.read_text().split()[1]), True
    return waited / 1e9 if there else None


def free_bytes(place: Path) -> float | None:
    """Free on the disk of this folder; None where it cannot be told."""
    try:
        return float(shutil.disk_usage(place).free)
    except OSError:
        return None


def gpu_use(uuids: list[str]) -> float | None:
    """What nvidia-smi says of these GPUs: the share of time in which the least used of them
    computes. None where it is missing or says nothing of them."""
    words = ["nvidia-smi", "--query-gpu=uuid,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    shares = []
    for line in done.stdout.splitlines():
        name, _, percent = line.partition(",")
        wanted = any(uuid in name for uuid in uuids)
        if wanted and percent.strip().isdigit():  # "[N/A]" on a slice of a GPU
            shares.append(int(percent) / 100)
    return min(shares, default=None)


def forget_peak_rss() -> None:
    """Begin the peak anew from here on, where the system can (Linux).

    What was freed before is given back first (glibc keeps it), or it would count as still in use.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
    with contextlib.suppress(OSError):  # a system that cannot keeps the peak since the start
        Path("/proc/self/clear_refs").write_text("5")


def memory_gib() -> float | None:
    """The memory this process may use in GiB; None where it cannot be told."""
    if limit := _cgroup("memory.max"):
        return limit[0] / 2**30
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
    """Cores this process may use: affinity and a container's quota narrow what the machine has."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if quota := _cgroup("cpu.max"):  # microseconds of CPU in each period
        cores = min(cores, max(1, round(quota[0] / quota[1])))
    return cores


def _cgroup(name: str) -> list[int] | None:
    """A container's limit, or None where there is none."""
    path = Path("/sys/fs/cgroup") / name
    words = path.read_text().split() if path.exists() else ["max"]
    return None if words[0] == "max" else [int(word) for word in words]


def settle_threads(threads: int) -> dict[str, str]:
    """Choose OpenMP's threads and wait policy. Call it before torch is first imported.

    Training runs each core as a worker of its own (workers.py); OpenMP is left with what cannot be
    divided so. Its idle threads spin for milliseconds by default, and on a core that something
    else needs too the spinner holds up the very thread that it waits for: throughput falls up to a
    hundredfold (docs/LOG.md). A short spin, then sleep, keeps the fall in proportion. What the
    person has set in the environment stays.
    """
    if "torch" in sys.modules:  # a recipe of the person's own imports it
        return {"unchanged": "torch was imported before its thread settings were chosen"}
    chosen = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN_COUNT, "KMP_BLOCKTIME": "0"}
    for key, value in chosen.items():
        os.environ.setdefault(key, value)
    return {key: os.environ[key] for key in chosen}


def rank() -> int:
    """This process's number among those that torchrun started together; 0 where it did not."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started together, on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many of the processes are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def code_sha256() -> str:
    """sha256 over the package's own source files, names and contents."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

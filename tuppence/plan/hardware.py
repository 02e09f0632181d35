"""What is known of this machine: measured ceilings and step times, kept in the user's cache folder.

`tuppence calibrate` measures (calibrate.py, which needs torch); this module only holds, keys, reads
and writes the numbers, so that planning stays arithmetic.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tuppence import config
from tuppence.errors import UserError
from tuppence.host import cpu_name

CALIBRATION_VERSION = 1
KEPT_TIMINGS = 5  # per shape: enough to see a spread, few enough to follow a change of drivers


@dataclass(frozen=True)
class Timing:
    """One way to run one model's step here, measured.

    A round is one micro-batch on each of `workers` at once: `round_seconds` forward and backward,
    `forward_seconds` forward alone. `update_seconds` is the optimizer's, once a step.
    """

    precision: str
    attention: str
    compile: bool
    micro_batch: int
    workers: int
    round_seconds: float
    update_seconds: float
    forward_seconds: float
    source: str


@dataclass(frozen=True)
class Calibration:
    """This machine's ceilings. `timings` go by `shape_key`, newest last."""

    version: int
    name: str
    device: str
    threads: int
    torch: str
    measured_at: str
    matmul_tflops: dict[str, float]
    memory_gbs: float
    memory_gib: float
    disk_write_mbs: float
    startup_seconds: float
    startup_rss_gib: float
    timings: dict[str, tuple[Timing, ...]]

    def with_timings(self, key: str, new: list[Timing]) -> "Calibration":
        """Add measurements of one shape, keeping the newest few of each way to run it."""
        kept: dict[tuple[str, str, bool], list[Timing]] = {}
        for timing in (*self.timings.get(key, ()), *new):
            kept.setdefault((timing.precision, timing.attention, timing.compile), []).append(timing)
        flat = [t for group in kept.values() for t in group[-KEPT_TIMINGS:]]
        return replace(self, timings={**self.timings, key: tuple(flat)})


def shape_key(model: config.ModelPlan, micro_batch: int, workers: int) -> str:
    """Names a step's shape; what has the same key takes the same time."""
    head = "tied" if model.tied_head else "untied"
    bias = "bias" if model.bias else "nobias"
    drop = f"-p{model.dropout:g}" if model.dropout else ""
    parts = f"-kv{model.n_kv_head}" if model.n_kv_head != model.n_head else ""
    parts += "".join(f"-w{w}" for w in model.windows if w != model.sequence_len)
    parts += "-values" if model.value_embeddings else ""
    parts += "-scalars" if model.residual_scalars else ""
    if model.loop is not None:
        parts += "-" + "-".join(str(value) for value in dataclasses.astuple(model.loop))
    return (
        f"{model.family}-{model.n_layer}x{model.n_embd}x{model.n_head}-T{model.sequence_len}"
        f"-V{model.vocab_size}-{head}-{bias}{drop}{parts}-b{micro_batch}x{workers}"
    )


def cache_folder() -> Path:
    """The user's cache folder for tuppence, by the platform's convention (XDG on Linux)."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "tuppence"


def calibration_file(device: str, threads: int) -> Path:
    """Where the numbers of this machine, used this way, are kept."""
    return cache_folder() / f"calibration-{device}-{threads}.json"


def load_calibration(device: str, threads: int) -> Calibration | None:
    """The kept numbers, or None where there are none or they are of another machine or format."""
    path = calibration_file(device, threads)
    if not path.exists():
        return None
    try:
        kept = config.from_json(Calibration, path.read_text())
    except UserError:  # written by another version: measure again
        return None
    same = kept.version == CALIBRATION_VERSION and (device != "cpu" or kept.name == cpu_name())
    return kept if same else None


def save_calibration(calibration: Calibration) -> Path:
    """Keep the numbers; replaces the file as a whole."""
    path = calibration_file(calibration.device, calibration.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(config.to_json(calibration))
    os.replace(aside, path)
    return path

"""Small runs of every family in folders of their own, and the processes that train them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import environment

from tuppence import bucket
from tuppence.folder import RunFolder

WORDS = [
    "name=run",
    "machine.usd_per_hour=0.4",
    "machine.threads=1",
    "model.n_head=2",
    "model.n_embd=64",
    "model.sequence_len=64",
    "train.batch_tokens=2048",
    "train.micro_batch=8",  # what is fastest is measured anew, and two plans may differ in it
    "train.precision=fp32",
    "train.eval_every=20",
    "train.eval_tokens=20000",
    "train.save_every=7",
    "train.sample_tokens=8",
]
FAMILIES = {  # between them every family, optimizer and way to spread over ranks
    "gpt2": [
        "shakespeare",
        "model.family=gpt2",
        "model.n_layer=2",
        "model.dropout=0.1",
        "model.exportable=none",
        "train.optimizer=adamw",
        "train.learning_rate=0.003",
        "train.attention=matmul",
    ],
    "depth": ["shakespeare", "model.n_layer=2", "train.attention=sdpa"],
    "looped": ["shakespeare_looped", "train.attention=sdpa"],
}
PARALLEL = {"gpt2": "ddp", "depth": "zero1", "looped": "fsdp"}
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Config:
    """One kind of run."""

    family: str
    ranks: int
    bucket: str

    def words(self, steps: int) -> list[str]:
        many = [f"train.parallel={PARALLEL[self.family]}"] if self.ranks > 1 else []
        return [*FAMILIES[self.family], *WORDS, *many, f"budget.steps={steps}"]


class Site:
    """A folder for one run: where it lives, how it is started."""

    def __init__(self, place: Path, config: Config, steps: int) -> None:
        self.place, self.config = place, config
        runs = {"file": f"file://{place}/bucket", "s3": f"s3://reliability/{place.name}"}
        self.runs = runs.get(config.bucket, str(place / "runs"))
        self.words = ["train", *config.words(steps), "--runs", self.runs]
        self.words += ["--data", str(place / "data")]
        on_bucket = bucket.is_url(self.runs)
        root = bucket.local_root(self.runs) if on_bucket else Path(self.runs)
        self.folder = RunFolder(root / "run")

    def clear(self) -> None:
        """Nothing was done here."""
        shutil.rmtree(self.folder.path, ignore_errors=True)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

    def start(self) -> "Tree":
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={self.config.ranks}"]
        many = [*torchrun, "--standalone"] if self.config.ranks > 1 else []
        return Tree([sys.executable, *many, "-m", "tuppence", *self.words], self.place / "log")

    def finish(self) -> float:
        """To its end; seconds of the whole process."""
        began = time.monotonic()
        with self.start() as started:
            code = started.wait()
        if code:
            raise SystemExit(
                f"{self.place}: exit {code}\n{(self.place / 'log').read_text()[-3000:]}"
            )
        return time.monotonic() - began

    def uploading(self) -> bool:
        """Whether a checkpoint on the bucket lacks its marker (seen on a folder alone)."""
        there = Path(f"{self.place}/bucket").glob("run/*/checkpoints/step_*")
        return any(not (path / "checkpoint.json").exists() for path in there)


class Tree:
    """A command and all the processes that it started: torchrun gives each rank its own group."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.began = time.monotonic()
        with log.open("ab") as out:
            self.root = subprocess.Popen(
                command,
                env=environment(Path(os.environ["XDG_CACHE_HOME"])),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def alive(self) -> bool:
        return self.root.poll() is None

    def wait(self) -> int:
        try:
            return self.root.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            return -1

    def ranks(self) -> list[int]:
        """Process ids of what trains, but the root."""
        return sorted(pid for pid in _below(self.root.pid) if b"tuppence" in _command(pid))

    def kill(self) -> None:
        """All of them, at once."""
        for pid in [self.root.pid, *_below(self.root.pid)]:
            kill(pid)
        self.root.wait()


def _below(pid: int) -> list[int]:
    """A process's descendants."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for one in found:
        found += parents.get(one, [])
    return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

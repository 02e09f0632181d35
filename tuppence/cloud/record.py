"""RUN/launch.json: what was decided, and how far it came, so that any of it can be ended and found.

It is written before anything is started, and again after each thing that was: whatever a kill
leaves, `tuppence stop` knows the names of all that may be there.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tuppence import config
from tuppence.cloud.launch import Launch
from tuppence.config import nearest
from tuppence.errors import UserError
from tuppence.folder import load, write_text

FILE = "launch.json"
VERSION = 1
STATES = ("planned", "started", "stopped", "finished")


@dataclass(frozen=True)
class Job:
    """One managed job. `job_id` None: SkyPilot was asked, or was about to be, and had not answered;
    the job, if there is one, has this `name`, which no other job has."""

    name: str
    job_id: int | None
    asked_at: float


@dataclass(frozen=True)
class Record:
    """One launch; `kind` is sky or ssh. `jobs` in the order of launching: the last is the one that
    may run. `sky` is the Python that has SkyPilot. `made` are URLs of what this launch made on the
    store, the bucket itself among them where it was not there; `ssh` is of cloud/ssh.py."""

    version: int
    kind: str
    state: str
    launch: Launch
    created_at: float
    sky: str | None = None
    jobs: tuple[Job, ...] = ()
    made: tuple[str, ...] = ()
    ssh: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.launch.name

    @property
    def run_url(self) -> str:
        """The run folder on the store, a URL or a path."""
        return f"{self.launch.store.rstrip('/')}/runs/{self.name}"


def write(folder: Path, record: Record) -> None:
    """Replace launch.json as a whole."""
    assert record.state in STATES, record.state
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, config.to_json(record))


def read(folder: Path) -> Record | None:
    """None where nothing was launched. Raises Fault where launch.json is damaged."""
    path = folder / FILE
    return load(Record, path) if path.exists() else None


def launches(runs: Path) -> list[Path]:
    """The folders below `runs` of what was launched, the oldest first."""
    found = sorted(runs.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found]


def find(name: str, runs: Path) -> tuple[Path, Record]:
    """The launch that a person means: a name below `runs`, or a folder. Raises UserError."""
    for folder in (runs / name, Path(name)):
        found = read(folder)
        if found is not None:
            return folder, found
    there = [folder.name for folder in launches(runs)]
    close = nearest(name, there) if there else f"; nothing was launched from {runs}/"
    raise UserError(f"no launch {name!r}{close}")

"""What is launched: decided once, frozen, written to RUN/launch.json.

    Launch ── stages in order ──▶ Stage ── the planner's choice, then runners-up ──▶ Rented

    STORE/kit/SHA/code.tar.gz env-x86_64.tar     the package, and its environment once it was built
    STORE/data/                                  shards, as --data names them
    STORE/runs/NAME/                             the run folder, as --runs names its parent

STORE is a bucket (s3://, gs://) or a folder that all machines and this one see.
"""

from dataclasses import dataclass

from tuppence.config import Budget, Interval

LAUNCH_VERSION = 1
STAGES = ("prepare", "train", "eval")


@dataclass(frozen=True)
class Rented:
    """One machine that can be rented, by SkyPilot's names, at the price it was planned at.

    `accelerator` None: a CPU machine; `instance_type` None: any with the accelerators (a cluster
    of one's own); `cloud` "any": wherever it is sold. `usd_per_hour` is of one machine.
    """

    cloud: str
    region: str | None
    instance_type: str | None
    accelerator: str | None
    gpu_count: int
    vcpus: float | None
    memory_gib: float | None
    spot: bool
    usd_per_hour: float
    price: str


@dataclass(frozen=True)
class Stage:
    """One task: what it `does` in order on `nodes` machines of one kind, which it is given in the
    order of `machines` (the planner's choice first). `usd` and `seconds` are from boot to end;
    `beside_usd` of it are for preparation and evaluation on the machine that trains."""

    name: str
    does: tuple[str, ...]
    machines: tuple[Rented, ...]
    nodes: int
    seconds: float
    usd: float
    disk_gb: float
    beside_usd: float = 0.0


@dataclass(frozen=True)
class Launch:
    """All that was decided. `words` are the recipe and overrides as the machines are told them;
    `kit` is the sha256 of the code on the store. `secrets` are names of environment variables,
    never their values. `usd` is the expected whole bill, storage and egress included."""

    version: int
    name: str
    words: tuple[str, ...]
    store: str
    stages: tuple[Stage, ...]
    budget: Budget
    kit: str
    python: str | None
    image: str | None
    tasks: str | None
    secrets: tuple[str, ...]
    usd: Interval
    phases: dict[str, float]
    prices_from: str

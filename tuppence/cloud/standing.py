"""Where a launch stands: what runs, what it has cost so far, what it will have cost at its end.

    SkyPilot's jobs, clusters, meter ──┐
    the run's own ledger, on the store ┼──▶ Standing          all plain data in, plain data out
    launch.json: plan, prices, budget ─┘

Two meters tell what the training stage costs. The ledger is exact, and stops when the trainer does;
SkyPilot's goes on for as long as a machine is there, and counts what it waits for one. What is told
is the larger. SkyPilot's price of a machine is 0 where it knows none: then the plan's is taken.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tuppence.cloud.launch import Launch, Rented, Stage
from tuppence.cloud.record import Record
from tuppence.cloud.sky import Cluster, Cost, Job, Look

BOOT_SECONDS = 300.0  # of a machine that SkyPilot's meter does not tell of, at most
NEW_SECONDS = 600.0  # until a job that has a number and is not in SkyPilot's queue is lost
ASKED_SECONDS = 4800.0  # the same without a number: a launch waits for the controller's machine
STARTING = ("PENDING", "SUBMITTED", "STARTING")
WAITING = (*STARTING, "RECOVERING")  # for a machine
STATES = {"RECOVERING": "recovering", "CANCELLING": "stopping", "SUCCEEDED": "finished"}
LOST = "SkyPilot does not know its job: another server or HOME had it; look at your cloud's console"
OVER = ("finished", "failed", "stopped", "lost")  # states in which nothing more comes
QUOTA = re.compile(r"quota|limit ?exceeded", re.I)
NO_MACHINE = "sky.exceptions.ResourcesUnavailableError"  # also where it asks before it tries
EXIT = re.compile(r"exit codes? \[?(\d+)")
EXITS = {  # of tuppence's own verbs and of node.sh
    "1": "a fault",
    "2": "its input was refused",
    "3": "it does not fit the machine or the budget",
    "4": "another attempt has the run",
    "124": "the dead-man timer stopped it: its time was spent and it did not end by itself",
    "137": "killed: most often the machine ran out of memory",
}


@dataclass(frozen=True)
class Inside:
    """What the run itself says, by its folder on the store: `usd` of its ledger up to `alive_at`,
    `usd_per_hour` of all its machines; `seconds_left` until its budget is spent."""

    state: str
    said: str
    step: int
    progress: float
    val_loss: float | None
    usd: float
    usd_per_hour: float | None
    alive_at: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class StageStanding:
    """One stage: `usd` is what it has cost so far, `metered_usd` by SkyPilot alone, `inside_usd` by
    the ledger and what has passed since; `incarnations` are machines that it has had in turn."""

    name: str
    state: str
    usd: float
    metered_usd: float
    inside_usd: float
    planned_usd: float
    seconds: float
    machine: str
    region: str | None
    spot: bool
    usd_per_hour: float
    incarnations: int
    recoveries: int
    failure: str


@dataclass(frozen=True)
class Standing:
    """A launch. `held`: machines that are paid now; `left`: those of them whose job is over.

    `forecast_usd` is of the whole launch at its end. `other_usd` is what earlier jobs of it cost
    in stages that it no longer has.
    """

    name: str
    state: str
    stage: str | None
    stages: tuple[StageStanding, ...]
    usd: float
    other_usd: float
    planned_usd: tuple[float, float, float]
    forecast_usd: float
    seconds_left: float | None
    recoveries: int
    held: tuple[Cluster, ...]
    left: tuple[Cluster, ...]
    jobs: tuple[Job, ...]
    controllers: tuple[Cluster, ...]
    failure: str
    inside: Inside | None
    seen_at: float

    @property
    def over(self) -> bool:
        """Nothing more comes of it, though a machine may be `left`."""
        return self.state in OVER

    def document(self) -> dict[str, object]:
        """For `--json`."""
        return dataclasses.asdict(self)


def standing(record: Record, look: Look, inside: Inside | None, *, now: float) -> Standing:
    """Where a launch stands by what was seen at `now`."""
    launch = record.launch
    latest = max((row.job_id for row in look.jobs), default=None)
    rows = [row for row in look.jobs if row.job_id == latest]
    stages = tuple(_stage(stage, launch, look, rows, inside, now=now) for stage in launch.stages)
    known = {row.cluster for row in look.jobs if any(is_of(row, s) for s in launch.stages)}
    other = sum(_paid(cost, None) for cost in look.costs if cost.name not in known)
    state = _state(record, rows, inside, now=now)
    current = _current(stages, state)
    over = {row.cluster for row in look.jobs if row.finished}
    left = _seconds_left(launch, stages, inside, state)
    return Standing(
        name=launch.name,
        state=state,
        stage=current.name if current else None,
        stages=stages,
        usd=sum(each.usd for each in stages) + other,
        other_usd=other,
        planned_usd=(launch.usd.low, launch.usd.mid, launch.usd.high),
        forecast_usd=_forecast(launch, stages, inside, state) + other,
        seconds_left=left,
        recoveries=sum(row.recoveries for row in look.jobs),
        held=look.clusters,
        left=tuple(each for each in look.clusters if each.name in over),
        jobs=look.jobs,
        controllers=look.controllers,
        failure=LOST if state == "lost" else next((e.failure for e in stages if e.failure), ""),
        inside=inside,
        seen_at=now,
    )


# ---------------------------------------------------------------- one stage


def _stage(
    stage: Stage,
    launch: Launch,
    look: Look,
    rows: Sequence[Job],
    inside: Inside | None,
    *,
    now: float,
) -> StageStanding:
    """Its state is the newest job's; its cost is of all that the launch ever started for it."""
    mine = [row for row in look.jobs if is_of(row, stage)]
    row = next((each for each in reversed(mine) if each in rows), None)
    costs = [cost for cost in look.costs if cost.name in {each.cluster for each in mine}]
    metered = sum(_paid(cost, stage) for cost in costs)
    seconds = sum(cost.seconds for cost in costs)
    for each in mine:
        if each.cluster not in {cost.name for cost in costs}:  # SkyPilot's meter is not to be seen
            ran = _ran(each, now=now)
            seconds += ran
            metered += ran / 3600 * _price(stage, each.machine, each.region) * stage.nodes
    spent = 0.0
    if "train" in stage.does and inside is not None:
        spent = inside.usd + _open_usd(inside, costs, row, now=now)
    machine, region = _where(stage, row, look)
    return StageStanding(
        name=stage.name,
        state=_stage_state(row),
        usd=max(metered, spent),
        metered_usd=metered,
        inside_usd=spent,
        planned_usd=stage.usd,
        seconds=seconds,
        machine=machine,
        region=region,
        spot=stage.machines[0].spot,
        usd_per_hour=_rate(stage, row, look),
        incarnations=max(1, len(costs)),
        recoveries=sum(each.recoveries for each in mine),
        failure=why_failed(row, launch.name, stage) if row else "",
    )


def is_of(row: Job, stage: Stage) -> bool:
    """Whether this task is that stage: tasks are named RUN-STAGE; SkyPilot gives the one task of a
    job the job's name, and a launch always trains."""
    if row.task == row.name:
        return "train" in stage.does
    return row.task == stage.name or row.task.endswith(f"-{stage.name}")


def _stage_state(row: Job | None) -> str:
    if row is None:
        return "waiting"
    if row.status in STARTING:
        return "waiting" if row.submitted_at is None else "starting"
    if row.status == "CANCELLED":
        return "stopped"
    return "failed" if "FAILED" in row.status else STATES.get(row.status, "running")


def _paid(cost: Cost, stage: Stage | None) -> float:
    """By SkyPilot's meter; at the planned price where SkyPilot knows none."""
    if cost.usd > 0 or stage is None:
        return cost.usd
    return cost.seconds / 3600 * cost.nodes * _price(stage, cost.resources, cost.region)


def _ran(row: Job, *, now: float) -> float:
    """Seconds that a task has held machines, by the queue alone: without what it waited for them
    in a recovery, and with a boot for each."""
    if row.start_at is None:
        return 0.0
    boot = min(BOOT_SECONDS, max(0.0, row.start_at - (row.submitted_at or row.start_at)))
    ran = (row.end_at or now) - row.start_at
    if row.recoveries and row.job_duration is not None:
        ran = row.job_duration
    return max(0.0, ran) + boot * (1 + row.recoveries)


def _open_usd(inside: Inside, costs: Sequence[Cost], row: Job | None, *, now: float) -> float:
    """What machines have cost since the ledger's last word, while the trainer had not ended.

    Of the machine that it ran on, and of the one that is up now. Another interval of SkyPilot's
    meter is an attempt to get a machine, which nobody is paid for.
    """
    spoke = inside.alive_at
    if spoke is None or not inside.usd_per_hour or inside.state not in ("running", "dead"):
        return 0.0
    waits = row is not None and row.status in WAITING
    since = 0.0
    for start, end, status in _spans(costs, row):
        is_last = start <= spoke
        if is_last or (end is None and status == "UP" and not waits):
            since += max(0.0, (end or now) - max(start, spoke))
    return since / 3600 * inside.usd_per_hour


def _spans(costs: Sequence[Cost], row: Job | None) -> list[tuple[float, float | None, str | None]]:
    """Start, end and state of machines; where SkyPilot's meter is not to be seen, of the last one
    by the queue."""
    if costs:
        return [(*span, cost.status) for cost in costs for span in cost.intervals]
    if row is None or row.start_at is None or row.status in WAITING:
        return []
    return [(row.recovered_at or row.start_at, row.end_at, "UP")]


def _price(stage: Stage, said: str | None, region: str | None) -> float:
    """Dollars per hour of the candidate that SkyPilot's words mean; of several the highest."""
    cards = [m for m in stage.machines if m.accelerator and said]
    named = [m for m in cards if f"{m.accelerator}:{m.gpu_count}" in str(said)]
    there = [m for m in named if m.region in (None, region)]
    return max(m.usd_per_hour for m in there or named or stage.machines)


def _rate(stage: Stage, row: Job | None, look: Look) -> float:
    """Dollars per hour now, all nodes: SkyPilot's of the machine that is held, else the plan's."""
    held = [each for each in look.clusters if row and each.name == row.cluster]
    if held and held[0].usd_per_hour:
        return held[0].usd_per_hour
    machine = row.machine if row else None
    chosen = _price(stage, machine, row.region) if row and machine else None
    return (stage.machines[0].usd_per_hour if chosen is None else chosen) * stage.nodes


def _where(stage: Stage, row: Job | None, look: Look) -> tuple[str, str | None]:
    """The machine and its region, of which it was last; the plan's first where there was none."""
    if row is not None and row.cloud:
        cards = re.search(r"gpus=([\w-]+:\d+)|\[([\w-]+:\d+)\]", row.machine or "")
        said = (cards[1] or cards[2]) if cards else "CPU"
        said = "CPU" if said.startswith("CPU:") else said
        cloud = row.cloud.lower()
        same = [m for m in stage.machines if m.cloud == cloud and said == _cards(m)]
        kind = f" {same[0].instance_type}" if same and same[0].instance_type else ""
        return f"{cloud}{kind} {said}", row.region
    first = stage.machines[0]
    kind = f" {first.instance_type}" if first.instance_type else ""
    return f"{first.cloud}{kind} {_cards(first)}", first.region


def _cards(machine: Rented) -> str:
    return f"{machine.accelerator}:{machine.gpu_count}" if machine.accelerator else "CPU"


# ---------------------------------------------------------------- the whole


def _state(record: Record, rows: Sequence[Job], inside: Inside | None, *, now: float) -> str:
    """One word for the launch, by its newest job; where SkyPilot shows none, since the machine that
    watched it stopped when all was over, the run's own."""
    if not rows:
        if record.state in ("stopped", "finished"):
            return record.state
        if not record.jobs:
            return "planned"
        asked = record.jobs[-1]
        if now - asked.asked_at < (ASKED_SECONDS if asked.job_id is None else NEW_SECONDS):
            return "starting"
        return inside.state if inside is not None and inside.state in OVER else "lost"
    if all(row.finished for row in rows):
        if any("FAILED" in row.status for row in rows):
            return "failed"
        return "stopped" if any(row.status == "CANCELLED" for row in rows) else "finished"
    if any(row.status == "CANCELLING" for row in rows):
        return "stopping"
    if any("FAILED" in row.status for row in rows):
        return "failed"  # the others are being taken back
    open_ = next(row for row in rows if not row.finished)
    return "starting" if open_.status in STARTING else STATES.get(open_.status, "running")


def _current(stages: Sequence[StageStanding], state: str) -> StageStanding | None:
    """The stage that runs, or the one that ended it."""
    if state == "finished":
        return stages[-1]
    ended = [each for each in stages if each.state in ("failed", "stopped")]
    if state in ("failed", "stopped"):
        return ended[0] if ended else None
    open_ = [each for each in stages if each.state not in OVER]
    return next((each for each in open_ if each.state != "waiting"), next(iter(open_), None))


def _forecast(
    launch: Launch, stages: Sequence[StageStanding], inside: Inside | None, state: str
) -> float:
    """Dollars at the end: what was paid, what the running stage will still take, and the plan's of
    the others; storage and egress as planned."""
    if state in OVER:
        return sum(each.usd for each in stages)
    total = max(0.0, launch.usd.mid - sum(stage.usd for stage in launch.stages))
    for stage, each in zip(launch.stages, stages, strict=True):
        if each.state in OVER:
            total += each.usd
        elif "train" in stage.does and inside is not None and inside.seconds_left is not None:
            more = inside.seconds_left / 3600 * (inside.usd_per_hour or each.usd_per_hour)
            total += each.usd + more
        else:
            total += max(each.usd, each.planned_usd)
    return total


def _seconds_left(
    launch: Launch, stages: Sequence[StageStanding], inside: Inside | None, state: str
) -> float | None:
    """Until all stages are done; None where it is over, or not known."""
    if state in OVER or state == "planned":
        return None
    total = 0.0
    for stage, each in zip(launch.stages, stages, strict=True):
        if each.state in OVER:
            continue
        if "train" in stage.does and inside is not None and inside.seconds_left is not None:
            total += inside.seconds_left
        else:
            total += max(0.0, stage.seconds - each.seconds)
    return total


# ---------------------------------------------------------------- why it failed


def why_failed(row: Job, name: str, stage: Stage) -> str:
    """One line with the remedy, or nothing where it did not fail."""
    if "FAILED" not in row.status:
        return ""
    said = row.failure or row.details or "SkyPilot gives no reason"
    tried = ", ".join(dict.fromkeys(f"{m.cloud} {_cards(m)}" for m in stage.machines))
    logs = f"`tuppence logs {name} --stage {stage.name}`"
    if row.status in ("FAILED_NO_RESOURCE", "FAILED_PRECHECKS") and QUOTA.search(said):
        return f"{stage.name}: quota refused for {tried}: {said}; ask the cloud for quota"
    if row.status == "FAILED_NO_RESOURCE" or NO_MACHINE in said:
        said = said.partition(" To fix:")[0].rstrip(".").removeprefix(f"[{NO_MACHINE}] ")
        return f"{stage.name}: no capacity for {tried}: {said}; try other machines, or later"
    if row.status == "FAILED_PRECHECKS":
        return f"{stage.name}: SkyPilot refused {tried}: {said}; `sky check` says what is missing"
    if row.status == "FAILED_SETUP":
        return f"{stage.name}: the machine's set-up failed: {logs}"
    if row.status == "FAILED_CONTROLLER":
        return f"{stage.name}: SkyPilot's controller failed: {said}"
    if found := EXIT.search(said):
        code = found[1]
        return f"{stage.name}: exit code {code}: {EXITS.get(code, 'see its logs')}; {logs}"
    return f"{stage.name}: failed: {said}; {logs}"

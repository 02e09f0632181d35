"""What the gauges show after a look at a run: values beside their limits, and what to do.

Pure: numbers in, words out. The limits are those that people who watch runs go by: a processor
below 80% use, memory at 79 of 80 GB, an MFU below 15%, 30,000 tokens/s where 50,000 were promised,
a loss that rises, a disk that fills.
"""

from dataclasses import dataclass

from tuppence.config import Plan
from tuppence.train.trend import Rise

UTILISATION, MEMORY, MFU, THROUGHPUT, DATA = 0.80, 0.97, 0.15, 0.60, 0.10
AS_PLANNED = 0.90  # share of the planned MFU that is no news
CHECKPOINTS = 2  # that a disk must have room for
CARRIES = 0.20  # share of the time from which something is the cause of what is amiss
LATE, TAKEN, SLOW = "late batches", "cores taken", "slow"  # causes
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1.0}


@dataclass(frozen=True)
class Limit:
    """A gauge is amiss beyond `amiss`, over when back at `over`; either way in `patience` looks in
    a row, so that a value at its limit does not say it again and again."""

    amiss: float
    over: float
    patience: int = 2

    def beyond(self, value: float) -> bool:
        """Whether it is amiss."""
        return value < self.amiss if self.over > self.amiss else value > self.amiss

    def back(self, value: float) -> bool:
        """Whether it is over."""
        return value >= self.over if self.over > self.amiss else value <= self.over


@dataclass(frozen=True)
class Look:
    """Numbers of a stretch of training; what cannot be told here is None.

    `utilisation` is of the cores or the GPU, `held_gib` what this process (or all on this machine)
    holds of `memory_gib`. `data` and `cores` are shares of the time: for how much of it steps
    waited for batches, and threads for a core. `tokens_per_second` is that of usual steps.
    """

    utilisation: float | None
    held_gib: float | None
    memory_gib: float | None
    mfu: float
    tokens_per_second: float
    data: float
    cores: float | None
    disk_free: float | None
    rise: Rise | None


@dataclass(frozen=True)
class Reading:
    """One gauge: its value, and what is said where that is amiss. Of gauges with one `cause` the
    first of a look is the dearest."""

    code: str
    value: float
    limit: Limit
    message: str
    advice: str
    cause: str


def readings(plan: Plan, look: Look) -> list[Reading]:
    """Every gauge that can be read, the dearest first."""
    found = [_throughput(plan, look)]
    if plan.predicted.mfu.mid > MFU:  # else the plan has said it
        found.append(_mfu(plan, look))
    if look.utilisation is not None:
        found.append(_utilisation(plan, look, look.utilisation))
    found.append(_data(look))
    if look.disk_free is not None:
        found.append(_disk(plan, look.disk_free))
    if look.held_gib is not None and look.memory_gib:
        found.append(_memory(plan, look.held_gib, look.memory_gib))
    if look.rise is not None:
        found.append(_loss(plan, look.rise))
    return found


def cores_of(plan: Plan) -> int:
    """The cores that steps use: a worker on each, or the threads of one."""
    return plan.step.workers if plan.step.workers > 1 else plan.machine.threads


def promised(plan: Plan) -> float:
    """Tokens per second of the plan, on this attempt's machine."""
    return plan.step.batch_tokens / plan.predicted.step_seconds.mid


# ---------------------------------------------------------------- each gauge


def _throughput(plan: Plan, look: Look) -> Reading:
    value, planned = look.tokens_per_second, promised(plan)
    cause, advice = _cause(look) or (SLOW, _slow(plan))
    return Reading(
        "low_throughput",
        value,
        Limit(THROUGHPUT * planned, (THROUGHPUT + 0.1) * planned),
        f"{value:,.0f} tokens/s, {value / planned:.0%} of the {planned:,.0f} planned; "
        f"evaluations are not counted",
        advice,
        cause,
    )


def _mfu(plan: Plan, look: Look) -> Reading:
    machine, planned = plan.machine, plan.predicted.mfu.mid
    limit = min(MFU, AS_PLANNED * planned)
    cause, advice = _cause(look) or (SLOW, _slow(plan))
    return Reading(
        "low_mfu",
        look.mfu,
        Limit(limit, limit + 0.01),
        f"MFU {look.mfu:.1%} of {machine.peak_tflops:.2f} TFLOPS ({machine.peak_source}), planned "
        f"{planned:.1%}",
        advice,
        cause,
    )


def _utilisation(plan: Plan, look: Look, value: float) -> Reading:
    gpu = plan.machine.device == "cuda"
    cores = cores_of(plan)
    where = "the GPU" if gpu else f"{cores} core" + ("s" if cores > 1 else "")
    cause, advice = _cause(look) or (SLOW, _too_small(plan))
    return Reading(
        "low_utilisation",
        value,
        Limit(UTILISATION, UTILISATION + 0.05),
        f"{where} used {value:.0%} of the time; below {UTILISATION:.0%} something holds it up",
        advice,
        cause,
    )


def _data(look: Look) -> Reading:
    return Reading(
        "data_wait",
        look.data,
        Limit(DATA, DATA / 2),
        f"training waits for batches {look.data:.0%} of the time",
        _late_batches(),
        LATE,
    )


def _memory(plan: Plan, held: float, there: float) -> Reading:
    micro = plan.step.micro_batch
    smaller = f"train.micro_batch={micro // 2} (it is {micro})"
    advice = f"another run may need {smaller}" if micro > 1 else "a smaller model or sequence_len"
    return Reading(
        "high_memory",
        held / there,
        Limit(MEMORY, MEMORY - 0.02, patience=1),
        f"{held:.1f} of {there:.1f} GiB of memory are held ({held / there:.0%})",
        f"a little more and the run is killed: {advice}, or stop what else needs memory",
        "memory",
    )


def _disk(plan: Plan, free: float) -> Reading:
    room = float(CHECKPOINTS * plan.predicted.checkpoint_bytes)
    message, advice = disk_words(free, room, f"the next {CHECKPOINTS} checkpoints take")
    limit = Limit(room, 1.25 * room, patience=1)
    return Reading("low_disk", free, limit, message, advice, "disk")


def disk_words(free: float, wanted: float, who: str) -> tuple[str, str]:
    """What is amiss, and what to do."""
    message = f"{_size(free)} are free on the disk, {who} {_size(wanted)}"
    return message, (
        "make room, or older checkpoints go sooner than asked, and a full disk ends the run; "
        "what is saved stays"
    )


def _size(count: float) -> str:
    unit = next((name for name, many in UNITS.items() if count >= many), "bytes")
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count / UNITS[unit]:,.1f} {unit}"


def _loss(plan: Plan, rise: Rise) -> Reading:
    rate = plan.optimizer.learning_rate
    return Reading(
        "loss_rising",
        rise.after,
        Limit(rise.before + rise.noise, rise.before, patience=1),
        f"training loss rises: {rise.before:.4f} to {rise.after:.4f} over the last "
        f"{rise.steps:,} steps, beyond its noise of {rise.noise:.4f}",
        f"train.learning_rate={rate:g} is likely too high: try {rate / 3:.2g} in a run of another "
        f"name; or the text has changed where it is read now",
        "loss",
    )


# ---------------------------------------------------------------- causes


def _cause(look: Look) -> tuple[str, str] | None:
    """What the numbers name, and what to do: batches that come late, or cores that others use. The
    time that threads wait for cores counts as far as the processor did not compute in it."""
    idle = 1.0 if look.utilisation is None else 1.0 - look.utilisation
    cores = min(1.0, look.cores or 0.0)
    taken = min(cores, idle)
    if max(look.data, taken) < CARRIES:
        return None
    if look.data >= taken:
        return LATE, f"{look.data:.0%} of the time no batch is there: {_late_batches()}"
    return TAKEN, (
        f"something else uses these cores: threads wait for one {cores:.0%} of the time. Stop it, "
        f"or give this run fewer with machine.threads"
    )


def _late_batches() -> str:
    return (
        "the disk or the bucket that holds the shards is slow, or shares its cores; keep them "
        "near (a local disk, or a larger data.cache_gb)"
    )


def _too_small(plan: Plan) -> str:
    micro, rows = plan.step.micro_batch, plan.step.batch_sequences // plan.step.ranks
    if micro < rows and plan.machine.device == "cuda":
        return f"a larger train.micro_batch (it is {micro}) gives it more to do at a time"
    if plan.machine.device == "cuda" and not plan.machine.compile:
        return "train.compile=on, or a larger batch or model, gives it more to do at a time"
    return (
        "nothing else shows, so its steps are small for this machine: a larger batch or model, or "
        "fewer cores or GPUs"
    )


def _slow(plan: Plan) -> str:
    if plan.machine.device == "cuda":
        return "nvidia-smi -q -d PERFORMANCE,CLOCK shows whether the GPU is throttled or shared"
    return "the machine is slower than it was when it was measured; tuppence calibrate repeats that"

"""Text to shards: how long a machine takes, and which machine does it for the least.

max(download, tokens / (rate x vCPUs)), for one goes on while the other does
"""

from dataclasses import dataclass

from tuppence.config import Interval
from tuppence.plan.offers import Offer
from tuppence.plan.prices import LOCAL, Book

HOUR = 3600.0

# Two cores (Zen 5) tokenise 5.5M GPT-2 tokens a second (docs/BENCHMARKS.md); a rented vCPU is half
# a core of an older kind: 1.5M on two, 27% of what was measured.
TOKENS_PER_SECOND_PER_VCPU = 0.75e6
MOST_VCPUS = 16  # nobody tried more workers than that
VCPUS_PER_GPU = 4  # of a GPU machine whose list does not say
DOWNLOAD_BYTES_PER_SECOND = 100e6  # from a public hub
# How far both may be off, an 80% interval of a guess: a core of this kind does 3 times as much, and
# a hub that is far or busy a fifth.
FASTER, SLOWER = 3.0, 5.0
DOWNLOADED_BYTES_PER_TOKEN = 3.0  # parquet: FineWeb's 10B-token sample is about 30 GB
CPU_BOOT_SECONDS = 120.0


@dataclass(frozen=True)
class Preparing:
    """One machine that prepares a corpus: seconds and dollars with its boot. `machine` None: the
    training machine itself, as no CPU machine of its cloud is priced."""

    machine: Offer | None
    seconds: float
    usd: float

    def note(self, beside: Offer) -> str:
        """What a bill says of it, where `beside` is the training machine."""
        if beside.cloud == LOCAL:
            return ""
        if self.machine is None:
            cloud = beside.cloud
            return f"prepare_on_gpu: no CPU machine of {cloud} is priced; the GPU machine does it"
        away = self.machine.region != beside.region
        where = f" in {self.machine.region}, as {beside.region} lists none" if away else ""
        return f"prepare_on: {self.machine.cloud} {self.machine.instance_type}{where}"


def preparation_seconds(tokens: int, *, vcpus: float, file_bytes: float | None = None) -> float:
    """max(download, tokens / (rate x vCPUs)), for one goes on while the other does. `file_bytes`
    where it is known what is downloaded."""
    size = tokens * DOWNLOADED_BYTES_PER_TOKEN if file_bytes is None else file_bytes
    download = size / DOWNLOAD_BYTES_PER_SECOND
    return max(download, tokens / (TOKENS_PER_SECOND_PER_VCPU * min(vcpus, MOST_VCPUS)))


def preparation_interval(tokens: int, *, vcpus: float, file_bytes: float | None = None) -> Interval:
    """`preparation_seconds` with how far it may be off."""
    mid = preparation_seconds(tokens, vcpus=vcpus, file_bytes=file_bytes)
    return Interval(mid / FASTER, mid, mid * SLOWER)


def vcpus_of(offer: Offer) -> float:
    """As its list says, else by its GPUs."""
    return offer.vcpus or VCPUS_PER_GPU * max(offer.gpu_count, 1)


def preparing(
    offer: Offer, tokens: int, *, book: Book, usd_per_hour: float
) -> tuple[Preparing, ...]:
    """The machines that could prepare for a training machine `offer`, the cheapest first: CPU
    machines of the same cloud, in its region where the book has one there; else the machine itself,
    which costs `usd_per_hour`."""
    machines = [] if offer.cloud == LOCAL else book.cpu_machines.get(offer.cloud, [])
    near = [m for m in machines if m.region == offer.region] or machines
    if near:
        found = [_on(m, tokens, m.vcpus or 1, m.usd_per_hour or 0.0) for m in near]
        return tuple(sorted(found, key=lambda p: (p.usd, p.seconds)))
    boot = 0.0 if offer.cloud == LOCAL else CPU_BOOT_SECONDS
    return (_on(None, tokens, vcpus_of(offer), usd_per_hour, boot),)


def _on(
    machine: Offer | None,
    tokens: int,
    vcpus: float,
    usd_per_hour: float,
    boot: float = CPU_BOOT_SECONDS,
) -> Preparing:
    seconds = boot + preparation_seconds(tokens, vcpus=vcpus)
    return Preparing(machine, seconds, seconds / HOUR * usd_per_hour)

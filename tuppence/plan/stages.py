"""What is charged beside training, by phase: preparation, storage, boot, saves, spot, egress.

    training machine   provision + install + compile + data_wait + train + evaluate + save
                       + lost (expected preemptions) + idle
    beside it          prepare (a CPU machine of the same cloud), store (by month), egress

A dollar budget of a cloud run covers the first line; the second is reported beside it. What nobody
measured is an assumption, stands here once with its reason, and docs/prices.md repeats it.
"""

import math
from dataclasses import dataclass

from tuppence.errors import UserError
from tuppence.plan.offers import Offer
from tuppence.plan.preparation import DOWNLOAD_BYTES_PER_SECOND, preparing
from tuppence.plan.preparation import DOWNLOADED_BYTES_PER_TOKEN as DOWNLOADED_BYTES_PER_TOKEN
from tuppence.plan.preparation import preparation_interval as preparation_interval
from tuppence.plan.preparation import preparation_seconds as preparation_seconds
from tuppence.plan.prices import LOCAL, Book, Rate, egress_usd_per_gb, storage_usd_per_gb_month

HOUR = 3600.0
MONTH = 730 * HOUR  # as clouds bill it
GB = 1e9  # clouds sell decimal gigabytes

TRAINING_PHASES = (
    "provision",
    "install",
    "compile",
    "data_wait",
    "train",
    "evaluate",
    "save",
    "lost",
    "idle",
)

# The training machine. Assumed: usual for a GPU image that has torch; receipts will tell.
PROVISION_SECONDS = 180.0  # from the start of the bill to a shell
INSTALL_SECONDS = 60.0  # our wheel and its few dependencies
COMPILE_SECONDS = 60.0  # one static graph
IDLE_SECONDS = 60.0  # between the receipt and the end of the bill
FETCH_BYTES_PER_SECOND = 500e6  # shards from a bucket of the same cloud: half of 10 Gbit/s

EVAL_SHARE = 0.04  # of a run that its evaluations may take together

# Storage: what is fetched on the day after must still be there.
KEPT_AT_LEAST_MONTHS = 0.25
BOOT_DISK_GB = 100.0  # where disks are billed apart: image, environment, shards of a small corpus

# Spot. One machine is taken away every 20 hours; the run then waits unbilled for another one.
PREEMPTIONS_PER_HOUR = 1 / 20
MOST_LOST = 0.95  # beyond it a run gets nowhere; bounded so that its price stays a number


@dataclass(frozen=True)
class Stages:
    """A run's whole bill by phase, in dollars and in seconds, and what had to be assumed.

    `seconds` are of one machine; `store` is how long things are kept, `egress` the way out.
    """

    usd: dict[str, float]
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def total_usd(self) -> float:
        return sum(self.usd.values())

    @property
    def training_usd(self) -> float:
        """The training machine's whole bill: what a dollar budget of a cloud run covers."""
        return sum(self.usd[phase] for phase in TRAINING_PHASES)

    @property
    def training_seconds(self) -> float:
        """How long the training machine is held."""
        return sum(self.seconds[phase] for phase in TRAINING_PHASES)


@dataclass(frozen=True)
class Charges:
    """What the training machine is held for beside `train`: seconds, saves, preemptions."""

    provision: float
    install: float
    compile: float
    data_wait: float
    evaluate: float
    idle: float
    save_each: float
    save_every: float
    preemptions_per_second: float

    @property
    def restart(self) -> float:
        """Billed on a new machine before the run is where the old one had saved."""
        return self.provision + self.install + self.compile + self.data_wait

    @property
    def once(self) -> float:
        """Seconds of work that happen whatever the length: the last save among them."""
        return self.compile + self.data_wait + self.evaluate + self.save_each


# ---------------------------------------------------------------- formulas


def machine_usd(seconds: float, *, usd_per_hour: float, machines: int = 1) -> float:
    """seconds / 3600 x usd_per_hour x machines."""
    return seconds / HOUR * usd_per_hour * machines


def storage_usd(gigabytes: float, *, months: float, usd_per_gb_month: float) -> float:
    """gigabytes x months x usd_per_gb_month."""
    return gigabytes * months * usd_per_gb_month


def disks_usd(cloud: str, held_seconds: float, nodes: int) -> float:
    """Boot disks while the machines are held; 0 where it is not known that they are billed."""
    disk = storage_usd_per_gb_month(cloud, "block")
    months = 0.0 if disk.assumed else held_seconds / MONTH
    return nodes * storage_usd(BOOT_DISK_GB, months=months, usd_per_gb_month=disk.usd)


def egress_usd(gigabytes: float, *, usd_per_gb: float) -> float:
    """gigabytes x usd_per_gb."""
    return gigabytes * usd_per_gb


def shard_bytes(tokens: int, *, vocab_size: int) -> int:
    """2 bytes a token; 4 where the vocabulary does not fit 16 bits."""
    return tokens * (2 if vocab_size <= 2**16 else 4)


def lost_share(train_seconds: float, charges: Charges) -> float:
    """Of the time held after boot, the share that preemptions throw away (expected).

    preemptions a second x (half a save interval + restart). A run that is shorter than the
    interval loses half of itself.
    """
    if not charges.preemptions_per_second:
        return 0.0
    each = min(charges.save_every, train_seconds) / 2 + charges.restart
    return min(charges.preemptions_per_second * each, MOST_LOST)


def charged_seconds(train_seconds: float, charges: Charges) -> dict[str, float]:
    """Seconds by phase for which one training machine is billed.

    saves = train / interval + the last one; lost = work x share / (1 - share), as time that makes
    up for lost time can be lost again.
    """
    saves = train_seconds / charges.save_every + 1
    share = lost_share(train_seconds, charges)
    save = saves * charges.save_each
    work = train_seconds + charges.compile + charges.data_wait + charges.evaluate + save
    return {
        "provision": charges.provision,
        "install": charges.install,
        "compile": charges.compile,
        "data_wait": charges.data_wait,
        "train": train_seconds,
        "evaluate": charges.evaluate,
        "save": save,
        "lost": work * share / (1 - share),
        "idle": charges.idle,
    }


def training_seconds(held_seconds: float, charges: Charges) -> float:
    """The inverse of `charged_seconds`: pure training in `held_seconds` of the machine; at least 0.

    After boot, held x (1 - share) = train x (1 + save / interval) + once. The share of a long run
    is constant; below its first save it grows with `train`, and that is linear too.
    """
    held = held_seconds - charges.provision - charges.install - charges.idle
    saving = 1 + charges.save_each / charges.save_every
    most = lost_share(math.inf, charges)
    train = max(((1 - most) * held - charges.once) / saving, 0.0)
    if lost_share(train, charges) < most:
        rate = charges.preemptions_per_second
        train = (1 - rate * charges.restart) * held - charges.once
        train /= saving + rate * held / 2
    return max(train, 0.0)


# ---------------------------------------------------------------- one offer


def run_charges(
    offer: Offer,
    *,
    spot: bool,
    nodes: int,
    tokens: int,
    vocab_size: int,
    save_seconds_each: float,
    save_every_seconds: float,
    eval_seconds: float,
) -> Charges:
    """What this machine is held for beside training. One's own has no boot and no way to fetch."""
    if save_every_seconds <= 0:
        raise UserError(f"a save every {save_every_seconds:g} s: give a positive interval")
    rented = 0.0 if offer.cloud == LOCAL else 1.0
    shards = shard_bytes(tokens, vocab_size=vocab_size)
    return Charges(
        provision=rented * PROVISION_SECONDS,
        install=rented * INSTALL_SECONDS,
        compile=COMPILE_SECONDS,
        data_wait=rented * shards / FETCH_BYTES_PER_SECOND,
        evaluate=eval_seconds,
        idle=rented * IDLE_SECONDS,
        save_each=save_seconds_each,
        save_every=save_every_seconds,
        preemptions_per_second=nodes * PREEMPTIONS_PER_HOUR / HOUR if spot else 0.0,
    )


def stages(
    offer: Offer,
    *,
    spot: bool,
    nodes: int,
    book: Book,
    train_seconds: float,
    tokens_to_prepare: int,
    vocab_size: int,
    checkpoint_bytes: int,
    kept_checkpoints: int,
    save_seconds_each: float,
    save_every_seconds: float,
    eval_seconds: float,
) -> Stages:
    """The whole bill of one run on `nodes` of these machines.

    What leaves the cloud is the final checkpoint. Raises UserError where there is no such price.
    """
    price = price_of(offer, spot=spot)
    charges = run_charges(
        offer,
        spot=spot,
        nodes=nodes,
        tokens=tokens_to_prepare,
        vocab_size=vocab_size,
        save_seconds_each=save_seconds_each,
        save_every_seconds=save_every_seconds,
        eval_seconds=eval_seconds,
    )
    seconds = charged_seconds(train_seconds, charges)
    held = sum(seconds.values())
    usd = {p: machine_usd(s, usd_per_hour=price, machines=nodes) for p, s in seconds.items()}
    notes = [_spot_note(train_seconds, charges)] if spot else []
    beside = (
        _prepare(offer, tokens_to_prepare, book=book, price=price),
        _store(
            offer,
            stored_bytes=shard_bytes(tokens_to_prepare, vocab_size=vocab_size)
            + checkpoint_bytes * kept_checkpoints,
            held_seconds=held,
            nodes=nodes,
        ),
        _egress(offer, checkpoint_bytes),
    )
    for phase, (phase_seconds, phase_usd, note) in zip(_BESIDE, beside, strict=True):
        seconds[phase], usd[phase] = phase_seconds, phase_usd
        notes += [note] if note else []
    return Stages(usd, seconds, tuple(notes))


def affordable_train_seconds(
    offer: Offer,
    *,
    spot: bool,
    nodes: int,
    usd: float,
    tokens_to_prepare: int,
    vocab_size: int,
    save_seconds_each: float,
    save_every_seconds: float,
    eval_seconds: float,
) -> float:
    """Seconds of pure training that `usd` for the training machine's whole bill leaves; 0 where it
    does not pay for boot and set-up, infinite where the machine costs nothing.

    The inverse of `stages(...).training_usd`.
    """
    price = price_of(offer, spot=spot) * nodes
    if price == 0:
        return math.inf
    charges = run_charges(
        offer,
        spot=spot,
        nodes=nodes,
        tokens=tokens_to_prepare,
        vocab_size=vocab_size,
        save_seconds_each=save_seconds_each,
        save_every_seconds=save_every_seconds,
        eval_seconds=eval_seconds,
    )
    return training_seconds(usd / price * HOUR, charges)


def price_of(offer: Offer, *, spot: bool) -> float:
    """Dollars an hour of one machine; raises UserError where the list has none."""
    price = offer.price(spot=spot)
    if price is None:
        kind, other = ("spot", "on-demand") if spot else ("on-demand", "spot")
        raise UserError(
            f"{offer.cloud} {offer.instance_type} has no {kind} price in {offer.source}: "
            f"give machine.usd_per_hour, or ask for {other}"
        )
    return price


# ---------------------------------------------------------------- beside the training machine

_BESIDE = ("prepare", "store", "egress")
Charged = tuple[float, float, str]  # seconds, dollars, note (or "")


def _prepare(offer: Offer, tokens: int, *, book: Book, price: float) -> Charged:
    """On the CPU machine of the same cloud that does it for the least, else on the GPU machine."""
    if not tokens:
        return 0.0, 0.0, ""
    best = preparing(offer, tokens, book=book, usd_per_hour=price)[0]
    return best.seconds, best.usd, best.note(offer)


def _store(offer: Offer, *, stored_bytes: int, held_seconds: float, nodes: int) -> Charged:
    """Shards and kept checkpoints for as long as the run, at least KEPT_AT_LEAST_MONTHS; the boot
    disks while the machines are held, where the cloud is known to bill them apart."""
    months = max(held_seconds / MONTH, KEPT_AT_LEAST_MONTHS)
    rate = storage_usd_per_gb_month(offer.cloud)
    usd = storage_usd(stored_bytes / GB, months=months, usd_per_gb_month=rate.usd)
    usd += disks_usd(offer.cloud, held_seconds, nodes)
    return months * MONTH, usd, _assumed_note(offer, rate, "store", "GB-month")


def _egress(offer: Offer, out_bytes: int) -> Charged:
    """The final checkpoint on its way home; no machine is held for it."""
    rate = egress_usd_per_gb(offer.cloud)
    seconds = 0.0 if offer.cloud == LOCAL else out_bytes / DOWNLOAD_BYTES_PER_SECOND
    usd = egress_usd(out_bytes / GB, usd_per_gb=rate.usd)
    return seconds, usd, _assumed_note(offer, rate, "egress", "GB")


def _assumed_note(offer: Offer, rate: Rate, phase: str, unit: str) -> str:
    if not rate.assumed:
        return ""
    return (
        f"{phase}_assumed: {offer.cloud}'s price is unknown; AWS's ${rate.usd:g} a {unit} is taken"
    )


def _spot_note(train_seconds: float, charges: Charges) -> str:
    share = lost_share(train_seconds, charges)
    hours = 1 / (charges.preemptions_per_second * HOUR)
    return (
        f"spot_expected: a preemption every {hours:.3g} h is assumed, {share:.1%} of time is lost"
    )

"""From the planner's options to machines that SkyPilot can rent, and how many tasks they make.

options ──what SkyPilot can do──▶ the best, then runners-up ──▶ training stage
text ──▶ a CPU machine of that cloud, or the training machine: whichever costs less
eval ──▶ the training machine, or one with one GPU: whichever costs less
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tuppence.cloud import clouds, scoring
from tuppence.cloud.clouds import ANY
from tuppence.cloud.launch import Rented, Stage
from tuppence.config import DataPlan, Machine, Run, override
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan import shapes
from tuppence.plan.bill import dollar_limit, tokens_to_prepare
from tuppence.plan.market import Seller, sellers
from tuppence.plan.offers import Offer
from tuppence.plan.options import Option, option_of
from tuppence.plan.preparation import (
    DOWNLOADED_BYTES_PER_TOKEN,
    Preparing,
    preparation_seconds,
    preparing,
    vcpus_of,
)
from tuppence.plan.prices import CLUSTERS, Book
from tuppence.plan.stages import BOOT_DISK_GB, GB, HOUR, shard_bytes

MOST = 3  # machines of a stage: the planner's choice and two more
WORSE = 1.5  # a runner-up may cost, and may train, so many times more and less than the choice
SLOWER = 4.0  # and so its hours: a run that was meant for an evening is not to take a month
APART_USD = 0.05  # a second machine must save so much: it is one more that can fail
ENVIRONMENT_SECONDS = 120.0  # torch and its libraries, 3 GB of wheels, installed anew: assumed
IMAGE_GB = 50.0  # of a disk: the system and the environment
CLUSTER_VCPUS, CLUSTER_GIB = 8.0, 16.0  # that preparation asks of a cluster of one's own


@dataclass(frozen=True)
class Asked:
    """What every decision looks at: the run, and on what terms machines may be had."""

    run: Run
    data: DataPlan
    book: Book
    nodes: int
    clouds: frozenset[str] | None
    built: bool  # the machines have the environment already

    def refuses(self, offer: Offer, *, nodes: int = 1) -> str | None:
        return clouds.why_not(offer, nodes=nodes, clouds=self.clouds)


def stages_of(
    run: Run,
    data: DataPlan,
    book: Book,
    options: Sequence[Option],
    *,
    wanted: Sequence[str] = ("prepare", "train"),
    tasks: str | None = None,
    prepared: bool = False,
    clouds: frozenset[str] | None = None,
    built: bool = False,
    apart: bool | None = None,
) -> tuple[Stage, ...]:
    """The tasks of a launch, in order, each with its machines, seconds and dollars.

    `options` are the planner's, the best first; `prepared`: the shards are on the store already;
    `built`: the machines have all that is needed installed; `apart`: preparation has a machine of
    its own (True), shares the training machine (False), or is where it is cheaper (None). `tasks`
    are of `eval`. Raises UserError or DoesNotFit where no machine can be rented.
    """
    chosen = candidates(run, data, book, options, clouds=clouds)
    asked = Asked(run, data, book, chosen[0].nodes, clouds, built)
    train = _train(asked, chosen, does=("train",), extra=0.0)
    found: list[Stage] = []
    if "prepare" in wanted and not prepared:
        own, shared = _prepare(asked, chosen[0])
        with_training = "train" in wanted and not _is_apart(asked, own, shared, apart)
        if with_training:
            train = _train(asked, chosen, does=("prepare", "train"), extra=shared.seconds)
            train = replace(train, beside_usd=shared.usd)
        else:
            found.append(own or _alone(asked, chosen, shared))
    if "train" in wanted:
        found.append(train)
    if "eval" in wanted or tasks:
        found = _judged(asked, chosen, found, tasks or "bpb")
    return tuple(found)


# ---------------------------------------------------------------- the training stage


def candidates(
    run: Run,
    data: DataPlan,
    book: Book,
    options: Sequence[Option],
    *,
    clouds: frozenset[str] | None = None,
    most: int = MOST,
) -> list[Option]:
    """The best machine that can be rented, and runners-up in order, all for the same work on the
    same terms. Another region of the same machine is none.

    A runner-up's bill is at most WORSE times the choice's, which bounds what fixed steps may cost;
    so are its dollars for a training FLOP, and it trains at least the WORSEth part, which bounds
    how much less fixed dollars or hours may buy. It is held at most SLOWER times as long.
    """
    able = _rentable(options, clouds)
    first = able[0]
    sized = override(run, list(words_of(run, first)))
    found, kinds = [first], {_kind(first)}
    for option in able[1:]:
        if len(found) == most:
            break
        if option.seller.spot != first.seller.spot or _kind(option) in kinds:
            continue
        same = option if sized == run else option_of(sized, data, book, option.seller)
        if same.fits and not _is_worse(same, first):
            found.append(same)
            kinds.add(_kind(same))
    return found


def words_of(run: Run, option: Option) -> tuple[str, ...]:
    """What the planner chose of size and batch, as words: what was priced is what is trained."""
    words = []
    if not shapes.is_sized(run.model):
        words.append(f"model.depth={option.work.depth}")
    if run.train.batch_tokens is None:
        words.append(f"train.batch_tokens={option.work.recipe.batch_tokens}")
    return tuple(words)


def _rentable(options: Sequence[Option], enabled: frozenset[str] | None) -> list[Option]:
    """Those that fit and can be rented. Raises DoesNotFit, or UserError with the first reason."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise DoesNotFit(options[0].why_not or "") if options else DoesNotFit("no machine is known")
    reasons = [clouds.why_not(o.seller.offer, nodes=o.nodes, clouds=enabled) for o in fitting]
    able = [option for option, why in zip(fitting, reasons, strict=True) if why is None]
    if able:
        return able
    if all(reason and reason.startswith("no credentials") for reason in reasons):
        names = sorted({clouds.place_of(option.seller.offer)[0] for option in fitting})
        raise UserError(
            f"no credentials for a cloud that could do it ({', '.join(names)}): set one up, "
            f"`sky check` says how, or ask for another with machine.cloud"
        )
    others = next((o.why_not for o in options if o.why_not), None)
    more = f" (of the others: {others})" if others else ""
    remedy = (
        "machine.cloud, machine.gpu or a larger budget"
        if others
        else "machine.cloud or machine.gpu"
    )
    raise UserError(f"{reasons[0]}; ask for another machine with {remedy}{more}")


def _kind(option: Option) -> tuple[str, str, int]:
    """What a machine is looked up by on a node, region aside."""
    offer = option.seller.offer
    return clouds.place_of(offer)[0], clouds.accelerator_of(offer), offer.gpu_count


def _is_worse(option: Option, first: Option) -> bool:
    assert option.usd is not None
    assert first.usd is not None
    assert option.train_hours is not None
    assert first.train_hours is not None
    assert option.tokens is not None
    assert first.tokens is not None
    dear = option.usd.mid > WORSE * first.usd.mid
    slow = option.train_hours.mid > SLOWER * first.train_hours.mid
    little = WORSE * option.tokens.mid < first.tokens.mid  # all are of one size
    return dear or slow or little or _usd_per_flop(option) > WORSE * _usd_per_flop(first)


def _usd_per_flop(option: Option) -> float:
    assert option.usd is not None
    assert option.tokens is not None
    return option.usd.mid / (option.tokens.mid * option.work.shape.flops_per_token)


def _train(asked: Asked, chosen: list[Option], *, does: tuple[str, ...], extra: float) -> Stage:
    """Training, and `extra` seconds of other work before it; a budget's dollars cover both."""
    first = chosen[0]
    assert first.stages is not None
    each = first.seller.usd_per_hour * first.nodes / HOUR
    seconds = first.stages.training_seconds + extra
    usd = first.stages.training_usd + extra * each
    limit = dollar_limit(asked.run.budget, first.seller, first.nodes)
    return Stage(
        name="train",
        does=does,
        machines=tuple(rented(option.seller) for option in chosen),
        nodes=first.nodes,
        seconds=min(seconds, limit / each),
        usd=min(usd, limit),
        disk_gb=_disk_gb(asked.run.machine.disk_gb or first.disk_gb),
    )


def _disk_gb(needed: float) -> float:
    return max(BOOT_DISK_GB, IMAGE_GB + needed)


# ---------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Shared:
    """Preparation on the training machine: seconds, and their dollars on all nodes."""

    seconds: float
    usd: float


def _prepare(asked: Asked, first: Option) -> tuple[Stage | None, Shared]:
    """On a machine of its own (None: no such machine is known), and on the training machine."""
    assert first.tokens is not None
    offer, price = first.seller.offer, first.seller.usd_per_hour
    tokens = tokens_to_prepare(asked.data, first.tokens.mid)
    build = 0.0 if asked.built else ENVIRONMENT_SECONDS
    seconds = preparation_seconds(tokens, vcpus=vcpus_of(offer)) + build
    shared = Shared(seconds, seconds / HOUR * price * first.nodes)
    machines = _preparing(asked, offer, tokens, price)
    if not machines:
        return None, shared
    best = machines[0]
    assert best.machine is not None
    hourly = best.machine.usd_per_hour or 0.0
    shards = shard_bytes(tokens, vocab_size=first.work.shape.vocab_size)
    own = Stage(
        name="prepare",
        does=("prepare",),
        machines=tuple(
            _cpu(each.machine)
            for each in machines[:MOST]
            if each.machine and each.usd <= WORSE * best.usd
        ),
        nodes=1,
        seconds=best.seconds + build,
        usd=best.usd + build / HOUR * hourly,
        disk_gb=_disk_gb((tokens * DOWNLOADED_BYTES_PER_TOKEN + shards) / GB),
    )
    return own, shared


def _preparing(asked: Asked, offer: Offer, tokens: int, price: float) -> list[Preparing]:
    """CPU machines, the cheapest first: those that the plan priced; for a machine of any cloud,
    of any; of a cluster, a part of its cores at their part of its price."""
    cloud = clouds.place_of(offer)[0]
    if cloud in CLUSTERS:
        machine = _part_of(offer, price)
        book = Book((machine,), ())
        return list(preparing(machine, tokens, book=book, usd_per_hour=price))
    places = [cloud] if cloud != ANY else sorted(asked.book.cpu_machines)
    found = []
    for place in places:
        near = replace(offer, cloud=place)
        each = preparing(near, tokens, book=asked.book, usd_per_hour=price)
        found += [p for p in each if p.machine and asked.refuses(p.machine) is None]
    return sorted(found, key=lambda p: (p.usd, p.seconds))


def _part_of(offer: Offer, price: float) -> Offer:
    """A few cores of a cluster's machine."""
    cloud, region = clouds.place_of(offer)
    return replace(
        offer,
        cloud=cloud,
        region=region or "",
        instance_type="",
        accelerator="",
        gpu=None,
        gpu_count=0,
        vcpus=CLUSTER_VCPUS,
        memory_gib=CLUSTER_GIB,
        usd_per_hour=min(1.0, CLUSTER_VCPUS / vcpus_of(offer)) * price,
    )


def _is_apart(asked: Asked, own: Stage | None, shared: Shared, wish: bool | None) -> bool:
    """Whether preparation gets a machine of its own: where it saves dollars. Where several train,
    all but one would wait for it."""
    if own is None:
        if wish:
            raise UserError("no CPU machine of that cloud is priced: preparation shares the GPUs'")
        return asked.nodes > 1
    return (shared.usd - own.usd > APART_USD or asked.nodes > 1) if wish is None else wish


def _alone(asked: Asked, chosen: list[Option], shared: Shared) -> Stage:
    """Preparation by itself where no CPU machine is known: one training machine does it."""
    stage = _train(asked, chosen, does=("prepare",), extra=0.0)
    usd = shared.usd / chosen[0].nodes
    return replace(stage, name="prepare", nodes=1, seconds=shared.seconds, usd=usd)


# ---------------------------------------------------------------- evaluation


def _judged(asked: Asked, chosen: list[Option], found: list[Stage], tasks: str) -> list[Stage]:
    """The stages with evaluation, on the machine that does it for less."""
    first = chosen[0]
    with_training = bool(found) and found[-1].name == "train"
    here = scoring.here(first, asked.data, tasks, alone=not with_training)
    cloud = clouds.place_of(first.seller.offer)[0]
    where = Machine(gpu_count=1, spot=False, cloud=None if cloud == ANY else cloud)
    market = [] if cloud in CLUSTERS else _market(asked, where)
    ways = scoring.on_one_gpu(first, asked.data, tasks, market)
    if ways and here.usd - ways[0].usd > APART_USD:
        machines = _kinds(ways)
        best = ways[0]
        disk = _disk_gb(first.work.checkpoint_bytes / GB)
        return [*found, Stage("eval", ("eval",), machines, 1, best.seconds, best.usd, disk)]
    if not with_training:
        disk = _disk_gb(first.work.checkpoint_bytes / GB)
        machines = tuple(rented(option.seller) for option in chosen)
        nodes = first.nodes
        return [*found, Stage("eval", ("eval",), machines, nodes, here.seconds, here.usd, disk)]
    last = found[-1]
    joined = replace(
        last,
        does=(*last.does, "eval"),
        seconds=last.seconds + here.seconds,
        usd=last.usd + here.usd,
        beside_usd=last.beside_usd + here.usd,
    )
    return [*found[:-1], joined]


def _market(asked: Asked, where: Machine) -> list[Seller]:
    """Sellers of one GPU that can be rented; none where the book has none there."""
    try:
        every = sellers(where, asked.book, in_dollars=False)
    except UserError:  # the cloud sells none
        return []
    return [seller for seller in every if asked.refuses(seller.offer) is None]


def _kinds(ways: Sequence[scoring.Judged]) -> tuple[Rented, ...]:
    """The cheapest of each kind, a few; none that costs WORSE times the cheapest."""
    found: dict[str, Rented] = {}
    for way in ways:
        if way.usd <= WORSE * ways[0].usd and len(found) < MOST:
            found.setdefault(clouds.accelerator_of(way.seller.offer), rented(way.seller))
    return tuple(found.values())


# ---------------------------------------------------------------- machines


def rented(seller: Seller) -> Rented:
    """A machine with GPUs by SkyPilot's names."""
    offer = seller.offer
    cloud, region = clouds.place_of(offer)
    return Rented(
        cloud=cloud,
        region=region,
        instance_type=clouds.instance_type_of(offer),
        accelerator=clouds.accelerator_of(offer),
        gpu_count=offer.gpu_count,
        vcpus=offer.vcpus,
        memory_gib=offer.memory_gib,
        spot=seller.spot,
        usd_per_hour=seller.usd_per_hour,
        price=seller.price,
    )


def _cpu(offer: Offer) -> Rented:
    cloud, region = clouds.place_of(offer)
    at = f"{offer.cloud} {offer.region} {offer.date or 'undated'}".replace("  ", " ")
    return Rented(
        cloud=cloud,
        region=region,
        instance_type=clouds.instance_type_of(offer),
        accelerator=None,
        gpu_count=0,
        vcpus=offer.vcpus,
        memory_gib=offer.memory_gib,
        spot=False,
        usd_per_hour=offer.usd_per_hour or 0.0,
        price="by its vCPUs, a part of your price" if cloud in CLUSTERS else f"on demand, {at}",
    )

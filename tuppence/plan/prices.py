"""The price book: what machines, storage and egress cost, where each number is from and its date.

    the package's rows  <  SkyPilot's catalog, refreshed  <  the person's own
    same machine and region: the person's own, else the newest; what gave way is reported (`drift`)

No row is fatal (offers.py): every doubt is in `Book.problems`, with file, line and a code.
"""

import csv
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from tuppence.errors import UserError
from tuppence.plan.gpus import find_gpu
from tuppence.plan.hardware import cache_folder
from tuppence.plan.offers import Offer as Offer
from tuppence.plan.offers import Problem, read_offer

FACTS = Path(__file__).parent / "facts"
ASSUMED_USD_PER_HOUR = 0.40  # of a machine whose price nobody said
LOCAL = "local"  # the cloud of a machine of one's own: no boot, no storage bill, no egress
CLUSTERS = ("slurm", "kubernetes", "ssh")  # SkyPilot's names of what one has: no storage bill


@dataclass(frozen=True)
class Book:
    """All offers, and all that was doubtful about them; `mine` in the person's own file."""

    offers: tuple[Offer, ...]
    problems: tuple[Problem, ...]
    mine: tuple[Problem, ...] = ()

    @cached_property
    def cpu_machines(self) -> dict[str, list[Offer]]:
        """By cloud, those that can prepare data: priced, of known size, whole cores."""
        machines: dict[str, list[Offer]] = {}
        for offer in self.offers:
            whole = offer.vcpus and "burstable" not in offer.notes
            if whole and not offer.gpu_count and offer.usd_per_hour is not None:
                machines.setdefault(offer.cloud, []).append(offer)
        return machines


def own_machine(
    usd_per_hour: float, *, gpu: str | None = None, gpu_count: int = 0, vcpus: float | None = None
) -> Offer:
    """A machine that is there already, at what an hour of it costs on any terms."""
    return Offer(
        cloud=LOCAL,
        instance_type="own",
        accelerator=gpu or "",
        gpu=find_gpu(gpu).name if gpu else None,
        gpu_count=gpu_count,
        vcpus=vcpus,
        memory_gib=None,
        usd_per_hour=usd_per_hour,
        spot_usd_per_hour=usd_per_hour,
        region="",
        date="",
        source="own",
    )


def at_own_price(offer: Offer, usd_per_hour: float) -> Offer:
    """The same machine at a price of the person's (`machine.usd_per_hour`), on any terms."""
    return replace(offer, usd_per_hour=usd_per_hour, spot_usd_per_hour=usd_per_hour, source="own")


# ---------------------------------------------------------------- the book


def config_folder() -> Path:
    """The user's configuration folder for tuppence, by the platform's convention."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    elif sys.platform == "win32":
        base = Path(os.environ.get("APPDATA", Path.home() / "AppData" / "Roaming"))
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    return base / "tuppence"


def own_file() -> Path:
    """Where a person's own prices are looked for."""
    return config_folder() / "prices.csv"


def refreshed_file() -> Path:
    """Where prices taken from SkyPilot's catalog are kept."""
    return cache_folder() / "skypilot_prices.csv"


def price_book(own: Path | None = None) -> Book:
    """The package's prices, under a refresh from SkyPilot, under the person's own (`own`, else
    `own_file()` where it exists). Raises UserError where a file given is missing or no price list.
    """
    problems: list[Problem] = []
    doubts: list[Problem] = []
    offers = _newest(_read(FACTS / "prices.csv", problems), problems)
    if refreshed_file().exists():
        offers = _over(offers, _read(refreshed_file(), problems), problems)
    if own is None and own_file().exists():
        own = own_file()
    if own is not None:
        listed = {(o.cloud, o.instance_type): o for _, o in offers}
        priced = [r for r in _read(own, doubts, own=True) if r[1].has_price]
        mine = [(at, _filled(offer, listed)) for at, offer in priced]
        offers = _over(offers, mine, problems)
    return Book(tuple(offer for _, offer in offers), (*problems, *doubts), tuple(doubts))


Located = tuple[str, Offer]  # "file:line" and what it says


def _newest(rows: list[Located], problems: list[Problem]) -> list[Located]:
    """One row for a machine and region: the newest. The others become problems."""
    kept: dict[tuple[str, str, str], Located] = {}
    for at, offer in rows:
        key = (offer.cloud, offer.instance_type, offer.region)
        old = kept.get(key)
        if old is None:
            kept[key] = (at, offer)
            continue
        newer, older = ((at, offer), old) if _age(offer) > _age(old[1]) else (old, (at, offer))
        kept[key] = newer
        _drift(older, newer[1], problems)
    return list(kept.values())


def _over(old: list[Located], new: list[Located], problems: list[Problem]) -> list[Located]:
    """`new` over `old`: the person's rows always, refreshed ones unless the list is newer.

    A row without a region stands for all of them; so does a refreshed one, which is the cheapest
    region of a whole catalog: a lower price elsewhere in an older list is no longer true.
    """
    newest: dict[tuple[str, str], str] = {}
    for _, offer in old:
        machine = (offer.cloud, offer.instance_type)
        newest[machine] = max(newest.get(machine, ""), _age(offer))
    by_type: dict[tuple[str, str], list[Offer]] = {}
    taken = []
    for at, offer in _newest(new, problems):
        machine = (offer.cloud, offer.instance_type)
        if offer.source == "own" or _age(offer) >= newest.get(machine, ""):
            taken.append((at, offer))
            by_type.setdefault(machine, []).append(offer)
    kept = []
    for at, offer in old:
        rivals = by_type.get((offer.cloud, offer.instance_type), [])
        over = [n for n in rivals if n.source != "own" or n.region in ("", offer.region)]
        if over:
            _drift((at, offer), over[0], problems)
        else:
            kept.append((at, offer))
    return kept + taken


def _age(offer: Offer) -> str:
    """Sorts by date; "~2025" is a year that the source implies but does not state."""
    return offer.date.lstrip("~")


def _drift(older: Located, newer: Offer, problems: list[Problem]) -> None:
    """Two lists, two prices: says which stands. The same price twice is no problem."""
    at, old = older
    was, now = old.usd_per_hour, newer.usd_per_hour
    if (was, old.spot_usd_per_hour) == (now, newer.spot_usd_per_hour):
        return
    what = f"{old.cloud} {old.instance_type} {old.region}".strip()
    by = "your own price" if newer.source == "own" else f"that of {newer.date or 'no date'}"
    change = f" ({now / was - 1:+.0%})" if was and now else ""
    text = f"{what}: {_both(old)} of {old.date or 'no date'} gives way to {by}, {_both(newer)}"
    problems.append(Problem(at, "drift", text + change))


def _filled(own: Offer, listed: dict[tuple[str, str], Offer]) -> Offer:
    """A person's row need not repeat what the book knows of that machine."""
    known = listed.get((own.cloud, own.instance_type))
    if known is None:
        return own
    if not own.accelerator:
        own = replace(own, accelerator=known.accelerator, gpu=known.gpu, gpu_count=known.gpu_count)
    return replace(
        own, vcpus=own.vcpus or known.vcpus, memory_gib=own.memory_gib or known.memory_gib
    )


def _both(offer: Offer) -> str:
    price, spot = offer.usd_per_hour, offer.spot_usd_per_hour
    said = "no price" if price is None else f"${price:g}/h"
    return said if spot is None else f"{said}, spot ${spot:g}/h"


# ---------------------------------------------------------------- files


def _read(path: Path, problems: list[Problem], *, own: bool = False) -> list[Located]:
    """Every row of a price list that names a machine."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            missing = {"cloud", "instance_type", "price_usd_h"} - set(table.fieldnames or ())
            if missing:
                need = ", ".join(sorted(missing))
                raise UserError(f"{path} is no price list: it lacks {need}; see docs/prices.md")
            lines = [(f"{path.name}:{table.line_num}", row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the prices in {path}: {error}") from error
    read = [(at, read_offer(row, at, problems, own=own)) for at, row in lines]
    return [(at, offer) for at, offer in read if offer is not None]


# ---------------------------------------------------------------- storage and egress


@dataclass(frozen=True)
class Rate:
    """A price by the GB (or GB-month). `assumed`: this cloud's is unknown and AWS's stands in."""

    usd: float
    item: str
    source: str
    assumed: bool = False


# Where a list has several: what one gets without asking for another, and the first tier of egress.
_USUAL = {
    ("aws", "block"): "ebs gp3",
    ("gcp", "block"): "pd-balanced",
    ("runpod", "block"): "network volume <1TB",
}
_UNITS = {"object": "usd/GB-month", "block": "usd/GB-month", "egress": "usd/GB"}


def storage_usd_per_gb_month(cloud: str, kind: str = "object") -> Rate:
    """Object storage (buckets) or block storage (disks and volumes), a GB and month.

    A cloud that sells no object storage keeps files on its block storage.
    """
    if kind not in ("object", "block"):
        raise UserError(f"storage kind {kind} is unknown: object or block")
    rates = _rates()
    own = rates.get((cloud, kind)) or (rates.get((cloud, "block")) if kind == "object" else None)
    return own or _assumed(cloud, kind)


def egress_usd_per_gb(cloud: str) -> Rate:
    """Traffic out of the cloud, first tier."""
    return _rates().get((cloud, "egress")) or _assumed(cloud, "egress")


def _assumed(cloud: str, kind: str) -> Rate:
    if cloud == LOCAL or cloud in CLUSTERS:
        return Rate(0.0, "own disk", "a machine of one's own")
    return replace(_rates()["aws", kind], assumed=True)


@lru_cache(maxsize=1)
def _rates() -> dict[tuple[str, str], Rate]:
    """By cloud and kind: the usual item, else the first."""
    rates: dict[tuple[str, str], Rate] = {}
    for row in _storage_rows():
        key = (row["cloud"], row["kind"])
        if key not in rates or row["item"] == _USUAL.get(key):
            source = f"{row['source']} ({row['date']})" if row["date"] else row["source"]
            rates[key] = Rate(float(row["price"]), row["item"], source)
    return rates


def _storage_rows() -> Iterable[dict[str, str]]:
    with (FACTS / "storage_prices.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["unit"] == _UNITS[row["kind"]]]

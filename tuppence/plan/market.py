"""Which machines a request may use: the price book's, its own at an asked price, or one assumed.

machine.usd_per_hour is the price of one machine. With machine.gpu it names a machine that need not
be in the book: rented like any, or machine.cloud=local, which neither boots nor bills for storage.
Alone it prices this machine, and the book keeps its own prices. A cloud that the book does not
know is planned at such a price where SkyPilot rents from it.
"""

import math
from dataclasses import dataclass, replace

from tuppence.config import Machine, nearest
from tuppence.errors import UserError
from tuppence.plan.gpus import cards_meant, find_gpu
from tuppence.plan.offers import Offer
from tuppence.plan.prices import (
    ASSUMED_USD_PER_HOUR,
    LOCAL,
    Book,
    at_own_price,
    own_machine,
)

# Whom SkyPilot 0.14.1 rents from, by its names (sky/clouds/__init__.py).
SKYPILOT = (
    *("aws", "azure", "cudo", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "kubernetes"),
    *("lambda", "mithril", "nebius", "oci", "paperspace", "primeintellect", "runpod", "scp"),
    *("seeweb", "shadeform", "slurm", "ssh", "vast", "verda", "vsphere", "yotta"),
)
NEARLY_FREE = 1e-6  # USD an hour: hours of a free machine still need a number to count by


@dataclass(frozen=True)
class Seller:
    """One machine on one kind of terms. `price` says whose price it is, and of when."""

    offer: Offer
    spot: bool
    usd_per_hour: float
    price: str
    assumed: bool = False


def sellers(machine: Machine, book: Book, *, in_dollars: bool) -> list[Seller]:
    """All machines with GPUs that answer to `machine`, on demand and spot.

    Raises UserError where a value names nothing in the book, and where dollars are the budget
    (`in_dollars`) of a card that nothing prices.
    """
    _check_names(machine, book)
    found = [offer for offer in book.offers if offer.gpu_count and _answers(offer, machine)]
    price = machine.usd_per_hour
    if price is not None and (machine.gpu is not None or machine.instance_type is not None):
        return [Seller(_meant(machine, price, found), bool(machine.spot), price, "your price")]
    priced = [s for offer in found for s in _terms(offer, machine.spot)]
    if priced:
        return priced
    if machine.gpu is None or machine.cloud or machine.instance_type:
        raise UserError(_nothing(machine))
    found_price = _assumed(machine, book)
    if in_dollars and found_price.usd_per_hour == ASSUMED_USD_PER_HOUR:
        raise UserError(
            f"machine.gpu={machine.gpu}: no row prices it, and a budget in dollars needs a price; "
            f"add machine.usd_per_hour=..., or give the budget in hours or tokens"
        )
    return [found_price]


def _answers(offer: Offer, machine: Machine) -> bool:
    if machine.cloud is not None and offer.cloud != machine.cloud.lower():
        return False
    if machine.instance_type is not None:
        same_type = offer.instance_type.lower() == machine.instance_type.lower()
        if not same_type:
            return False
    if machine.gpu_count is not None and offer.gpu_count != machine.gpu_count:
        return False
    return offer.gpu is not None and _same_card(offer, machine.gpu)


def _same_card(offer: Offer, gpu: str | None) -> bool:
    return gpu is None or offer.gpu in cards_meant(gpu)


def _terms(offer: Offer, spot: bool | None) -> list[Seller]:
    if offer.usd_per_hour == 0:  # a machine of one's own that is not charged for
        offer = replace(offer, usd_per_hour=NEARLY_FREE)
    terms = []
    if offer.usd_per_hour is not None and spot is not True:
        terms.append(Seller(offer, False, offer.usd_per_hour, _said(offer, "on demand")))
    if offer.spot_usd_per_hour is not None and spot is not False:
        terms.append(Seller(offer, True, offer.spot_usd_per_hour, _said(offer, "spot")))
    return terms


def _said(offer: Offer, terms: str) -> str:
    return f"{terms}, {offer.cloud} {offer.region} {offer.date or 'undated'}".replace("  ", " ")


# ---------------------------------------------------------------- not in the book


def _meant(machine: Machine, price: float, found: list[Offer]) -> Offer:
    """The machine that is meant, at the person's own price."""
    if machine.instance_type is not None and found:
        return at_own_price(min(found, key=lambda o: o.usd_per_hour or math.inf), price)
    if machine.gpu is None:
        raise UserError(
            f"machine.instance_type={machine.instance_type} with the other machine.* keys is not "
            f"in the price book; add machine.gpu=... to plan it at machine.usd_per_hour={price:g}"
        )
    return _quoted(machine, price)


def _quoted(machine: Machine, price: float) -> Offer:
    """A machine that need not be in the book."""
    offer = own_machine(price, gpu=machine.gpu, gpu_count=machine.gpu_count or 1)
    name = machine.instance_type or offer.gpu or ""
    cloud, slash, within = (machine.cloud or "quoted").partition("/")
    return replace(offer, cloud=cloud.lower() + slash + within, instance_type=name)


def _assumed(machine: Machine, book: Book) -> Seller:
    """By what others of that card cost for each GPU; where none has a price, $0.40 an hour."""
    count = machine.gpu_count or 1
    each = [
        seller.usd_per_hour / offer.gpu_count
        for offer in book.offers
        if offer.gpu_count and _same_card(offer, machine.gpu)
        for seller in _terms(offer, machine.spot)
    ]
    price = count * min(each) if each else ASSUMED_USD_PER_HOUR
    why = "the cheapest of that card, for each GPU" if each else "no row prices that card"
    offer = _quoted(machine, price)
    return Seller(offer, bool(machine.spot), price, f"assumed: {why}", assumed=True)


# ---------------------------------------------------------------- names


def _check_names(machine: Machine, book: Book) -> None:
    """Refuse a card, a cloud or an instance type that names nothing."""
    if machine.gpu is not None:
        find_gpu(machine.gpu)
    _check_cloud(machine, sorted({offer.cloud for offer in book.offers}))
    kept = {offer.instance_type.lower(): offer.instance_type for offer in book.offers}
    wanted = machine.instance_type
    own = machine.usd_per_hour is not None and machine.gpu is not None
    if wanted is not None and wanted.lower() not in kept and not own:
        near = nearest(wanted.lower(), list(kept)).split("; there are")[0]
        raise UserError(f"machine.instance_type={wanted} is not in the price book{near}")


def _check_cloud(machine: Machine, clouds: list[str]) -> None:
    """One of the book, or one of SkyPilot's at a price of the person's."""
    cloud = (machine.cloud or "").lower()
    cluster = cloud.partition("/")[0]  # slurm/mycluster
    if not cloud or cloud in (*clouds, LOCAL):
        return
    if cluster not in SKYPILOT:
        near = nearest(cluster, sorted({*clouds, *SKYPILOT}))
        raise UserError(f"machine.cloud={machine.cloud}{near}")
    if machine.usd_per_hour is None or machine.gpu is None:
        raise UserError(
            f"machine.cloud={cloud} is not in the price book: say what one machine is and costs "
            f"with machine.gpu=A100 machine.gpu_count=8 machine.usd_per_hour=..., or add it to "
            f"your prices (docs/prices.md)"
        )


def _nothing(machine: Machine) -> str:
    keys = ("cloud", "instance_type", "gpu", "gpu_count", "spot")
    asked = [(key, getattr(machine, key)) for key in keys]
    said = " ".join(f"machine.{k}={v}" for k, v in asked if v is not None)
    return f"{said}: no priced machine in the book answers to all of it; leave one out"

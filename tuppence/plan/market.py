"""Which machines a request may use: the price book's, its own at an asked price, or one assumed.

machine.usd_per_hour is the price of one machine. With machine.gpu it names a machine that need not
be in the book; a card that no row prices is assumed at $0.40 an hour, and said to be.
"""

import math
from dataclasses import dataclass, replace

from tuppence.config import Machine, nearest
from tuppence.errors import UserError
from tuppence.plan.gpus import find_gpu
from tuppence.plan.offers import Offer
from tuppence.plan.prices import Book, at_own_price, own_machine

ASSUMED_USD_PER_HOUR = 0.40  # of a machine whose price nobody said


@dataclass(frozen=True)
class Seller:
    """One machine on one kind of terms. `price` says whose price it is, and of when."""

    offer: Offer
    spot: bool
    usd_per_hour: float
    price: str
    assumed: bool = False


def sellers(machine: Machine, book: Book) -> list[Seller]:
    """All machines with GPUs that answer to `machine`, on demand and spot.

    Raises UserError where a value names nothing in the book.
    """
    found = [offer for offer in book.offers if offer.gpu_count and _answers(offer, machine)]
    if machine.usd_per_hour is not None:
        return _at_asked_price(machine, machine.usd_per_hour, found)
    priced = [s for offer in found for s in _terms(offer, machine.spot)]
    if priced:
        return priced
    if machine.gpu is not None and machine.cloud is None and machine.instance_type is None:
        offer = _quoted(machine, ASSUMED_USD_PER_HOUR)
        return [Seller(offer, False, ASSUMED_USD_PER_HOUR, "assumed: no row prices it", True)]
    raise UserError(_nothing(machine, book))


def _answers(offer: Offer, machine: Machine) -> bool:
    if machine.cloud is not None and offer.cloud != machine.cloud.lower():
        return False
    if machine.instance_type is not None and offer.instance_type != machine.instance_type:
        return False
    if machine.gpu_count is not None and offer.gpu_count != machine.gpu_count:
        return False
    if offer.gpu is None:
        return False
    return machine.gpu is None or find_gpu(offer.gpu).name == find_gpu(machine.gpu).name


def _terms(offer: Offer, spot: bool | None) -> list[Seller]:
    terms = []
    if offer.usd_per_hour is not None and spot is not True:
        terms.append(Seller(offer, False, offer.usd_per_hour, _said(offer, "on demand")))
    if offer.spot_usd_per_hour is not None and spot is not False:
        terms.append(Seller(offer, True, offer.spot_usd_per_hour, _said(offer, "spot")))
    return terms


def _said(offer: Offer, terms: str) -> str:
    return f"{terms}, {offer.cloud} {offer.region} {offer.date or 'undated'}".replace("  ", " ")


def _at_asked_price(machine: Machine, price: float, found: list[Offer]) -> list[Seller]:
    """The machine that is meant, at the person's own price."""
    if machine.instance_type is not None and found:
        offer = min(found, key=lambda o: o.usd_per_hour or math.inf)
        return [Seller(at_own_price(offer, price), bool(machine.spot), price, "your price")]
    if machine.gpu is None:
        raise UserError(
            f"machine.usd_per_hour={price:g}: of which machine? add machine.gpu=... and "
            f"machine.gpu_count=..., or machine.instance_type=..."
        )
    offer = _quoted(machine, price)
    return [Seller(offer, bool(machine.spot), price, "your price")]


def _quoted(machine: Machine, price: float) -> Offer:
    """A rented machine that need not be in the book: it boots and is fetched from like any."""
    offer = own_machine(price, gpu=machine.gpu, gpu_count=machine.gpu_count or 1)
    return replace(offer, cloud=machine.cloud or "quoted", instance_type=offer.gpu or "")


def _nothing(machine: Machine, book: Book) -> str:
    """Which value leaves nothing, and the nearest that would not."""
    clouds = sorted({o.cloud for o in book.offers})
    types = sorted({o.instance_type for o in book.offers})
    if machine.cloud is not None and machine.cloud.lower() not in clouds:
        return f"machine.cloud={machine.cloud}{nearest(machine.cloud.lower(), clouds)}"
    if machine.instance_type is not None and machine.instance_type not in types:
        near = nearest(machine.instance_type, types).split("; there are")[0]
        return f"machine.instance_type={machine.instance_type} is not in the price book{near}"
    keys = ("cloud", "instance_type", "gpu", "gpu_count", "spot")
    asked = [(key, getattr(machine, key)) for key in keys]
    said = " ".join(f"machine.{k}={v}" for k, v in asked if v is not None)
    return f"{said}: no priced machine in the book answers to all of it; leave one out"

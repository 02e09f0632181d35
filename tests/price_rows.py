"""Finding a machine in a price book by its name."""

from tuppence.plan.offers import Offer
from tuppence.plan.prices import Book


def find(book: Book, instance_type: str, *, region: str | None = None) -> Offer:
    """The machine of that name, in its cheapest region unless one is given."""
    named = [offer for offer in book.offers if offer.instance_type == instance_type]
    return min((o for o in named if region in (None, o.region)), key=lambda offer: offer.cost)

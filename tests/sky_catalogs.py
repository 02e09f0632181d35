"""Small catalogs in SkyPilot's own form, of the package's price list, so that nothing is fetched.

A CSV without a checksum beside it is never refreshed. Prices are facts/prices.csv's; where a list
has machines without a spot price, there is no spot market.
"""

from __future__ import annotations

import csv
from pathlib import Path

from tuppence.plan.offers import Offer
from tuppence.plan.prices import Book, price_book
from tuppence.plan.skypilot import refresh_from_skypilot

CLOUDS = ("aws", "lambda", "nebius")
NAMES = {"aws": "AWS", "lambda": "Lambda", "nebius": "nebius"}  # in common/accelerators.csv
COLUMNS = (
    *("InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB", "GpuInfo"),
    *("Price", "SpotPrice", "Region"),
)
ZONES = ("AvailabilityZone", "Arch")  # AWS's has them too


def write(home: Path) -> Path:
    """HOME/.sky/catalogs/v8; returns that folder."""
    folder = home / ".sky" / "catalogs" / "v8"
    offers = price_book().offers
    for cloud in CLOUDS:
        mine = [offer for offer in offers if offer.cloud == cloud and offer.has_price]
        _write(folder / cloud / "vms.csv", cloud, mine)
    sold = {(o.accelerator, NAMES[o.cloud]) for o in offers if o.cloud in CLOUDS and o.accelerator}
    cards = sorted({card for card, _ in sold})
    common = folder / "common" / "accelerators.csv"
    common.parent.mkdir(parents=True)
    with common.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["AcceleratorName", "Clouds"])
        table.writerows([card, str(sorted(c for a, c in sold if a == card))] for card in cards)
    return folder


def book(folder: Path) -> Book:
    """The price book of these catalogs alone. Writes the refreshed prices to the cache folder."""
    return Book(tuple(refresh_from_skypilot(folder, today="2026-08-01")), ())


def _write(path: Path, cloud: str, offers: list[Offer]) -> None:
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS + ZONES if cloud == "aws" else COLUMNS)
        for offer in offers:
            zone = (f"{offer.region}a", "x86_64") if cloud == "aws" else ()
            table.writerow([*_row(offer), *zone])


def _row(offer: Offer) -> list[object]:
    card = [offer.accelerator, float(offer.gpu_count), offer.vcpus, offer.memory_gib, _info(offer)]
    plain = ["", "", offer.vcpus, offer.memory_gib, ""]
    price = "" if offer.usd_per_hour is None else offer.usd_per_hour
    spot = "" if offer.spot_usd_per_hour is None else offer.spot_usd_per_hour
    return [
        offer.instance_type,
        *(card if offer.accelerator else plain),
        *(price, spot, offer.region),
    ]


def _info(offer: Offer) -> str:
    one = {"Name": offer.accelerator, "Manufacturer": "NVIDIA", "Count": offer.gpu_count}
    return str({"Gpus": [one | {"MemoryInfo": {"SizeInMiB": 81920}}], "TotalGpuMemoryInMiB": 81920})

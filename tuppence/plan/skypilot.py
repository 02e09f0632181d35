"""Prices of today from SkyPilot's catalog, where SkyPilot is: its CSV files, not its code.

    ~/.sky/catalogs/v8/<cloud>/vms.csv ──cheapest region of each machine──▶ skypilot_prices.csv

The catalogs are refreshed by SkyPilot itself (`sky check`, `sky show-gpus`). They are read as
published rows are: with doubt (offers.py). On Google's cloud the list prices a machine and its GPUs
in two rows, and the machine alone looks like a cheap CPU machine: the two are added.
"""

import csv
import datetime
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tuppence.errors import UserError
from tuppence.plan.offers import COLUMNS, Offer, read_offer
from tuppence.plan.prices import own_file, refreshed_file

CPU_VCPUS = (4, 64)  # CPU machines worth keeping, for preparation
GIB_PER_VCPU = 2
NO_PRICE = 700.0  # what the catalog writes for "not sold here" in a few regions

# Google's machines that are sold with GPUs only, and what their GPU rows are called.
_GCP_HOSTS = {
    "a2-highgpu": "A100",
    "a2-megagpu": "A100",
    "a2-ultragpu": "A100-80GB",
    "a3-highgpu": "H100",
    "a3-megagpu": "H100-MEGA",
    "a3-ultragpu": "H200",
    "a4-highgpu": "B200",
    "g2-standard": "L4",
}
_GCP_L4_BY_VCPUS = {24: 2, 48: 4, 96: 8}  # all other g2 machines have one
_GCP_GPU_HOST = re.compile(r"(a\d+x?|g\d)-[a-z]+")

Row = dict[str, str]


def refresh_from_skypilot(
    catalog_folder: Path | None = None, *, today: str | None = None
) -> list[Offer]:
    """Reads the newest catalog and keeps its prices for `price_book`; returns them.

    Raises UserError where there is no catalog.
    """
    folder = catalog_folder or _newest_catalog(Path.home() / ".sky" / "catalogs")
    files = sorted(folder.glob("*/vms.csv")) if folder else []
    if not folder or not files:
        raise UserError(
            f"no SkyPilot catalog in {folder or '~/.sky/catalogs'}: run `sky check` where SkyPilot "
            f"is installed, or put your own prices in {own_file()}"
        )
    date = today or datetime.date.today().isoformat()
    rows: list[Row] = []
    for file in files:
        source = f"SkyPilot catalog {folder.name}/{file.parent.name}/vms.csv, cheapest region"
        listed = (_columns(row, file.parent.name, date, source) for row in _rows(file))
        rows += _cheapest(listed)
    _write(rows, refreshed_file())
    return [offer for row in rows if (offer := read_offer(row, "", []))]


def _newest_catalog(catalogs: Path) -> Path | None:
    """The folder of the highest version: v8 before v7."""
    versions = [p for p in catalogs.glob("v*") if p.name[1:].isdigit()]
    return max(versions, key=lambda p: int(p.name[1:]), default=None)


def _rows(file: Path) -> list[Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows: list[Row] = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read SkyPilot's prices in {file}: {error}") from error
    return list(_with_gpus(rows)) if file.parent.name == "gcp" else rows


def _with_gpus(rows: list[Row]) -> Iterator[Row]:
    """Google's rows, each machine that is sold with GPUs as one row with both prices."""
    parts = {_part(row): row for row in rows if not row.get("InstanceType")}
    for row in rows:
        host = _GCP_GPU_HOST.match(row.get("InstanceType") or "")
        if not host or row.get("AcceleratorName"):
            yield row
            continue
        gpu, count = _GCP_HOSTS.get(host[0], ""), _gcp_count(row)
        part = parts.get((gpu, count, row.get("AvailabilityZone")))
        if part:  # a host whose GPUs have no price here cannot be bought at the host's
            sums = {c: _sum(row.get(c), part.get(c)) for c in ("Price", "SpotPrice")}
            yield {**row, **sums, "AcceleratorName": gpu, "AcceleratorCount": str(count)}


def _part(row: Row) -> tuple[str | None, float, str | None]:
    """What a row of GPUs alone is found by."""
    count = _float(row.get("AcceleratorCount")) or 0.0
    return row.get("AcceleratorName"), count, row.get("AvailabilityZone")


def _gcp_count(row: Row) -> int:
    named = re.search(r"-(\d+)g\b", row["InstanceType"])
    return int(named[1]) if named else _GCP_L4_BY_VCPUS.get(int(_float(row.get("vCPUs")) or 0), 1)


def _sum(one: str | None, other: str | None) -> str:
    a, b = _float(one), _float(other)
    return "" if a is None or b is None else f"{a + b:.6f}"


def _float(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _cheapest(rows: Iterable[Row]) -> list[Row]:
    """One row for a machine: its cheapest region; of CPU machines the cheapest of each size."""
    best: dict[str, tuple[Offer, Row]] = {}
    for row in rows:
        offer = read_offer(row, "", [])
        if offer is None or not offer.has_price or offer.usd_per_hour == NO_PRICE:
            continue
        known = best.get(offer.instance_type)
        if known is None or offer.cost < known[0].cost:
            best[offer.instance_type] = offer, row
    cpu: dict[float, tuple[Offer, Row]] = {}
    for offer, row in best.values():
        size = offer.vcpus or 0.0
        if _prepares(offer) and (size not in cpu or offer.cost < cpu[size][0].cost):
            cpu[size] = offer, row
    return [r for o, r in best.values() if o.accelerator] + [r for _, r in cpu.values()]


def _prepares(offer: Offer) -> bool:
    vcpus, memory_gib = offer.vcpus or 0, offer.memory_gib or 0
    few, many = CPU_VCPUS
    whole = "burstable" not in offer.notes and offer.usd_per_hour is not None
    return (
        not offer.accelerator
        and whole
        and few <= vcpus <= many
        and memory_gib >= GIB_PER_VCPU * vcpus
    )


def _columns(row: Row, cloud: str, date: str, source: str) -> Row:
    return {
        "cloud": cloud,
        "instance_type": row.get("InstanceType") or "",
        "accelerator": row.get("AcceleratorName") or "",
        "accelerator_count": row.get("AcceleratorCount") or "",
        "vcpus": row.get("vCPUs") or "",
        "memory_gib": row.get("MemoryGiB") or "",
        "price_usd_h": row.get("Price") or "",
        "spot_price_usd_h": row.get("SpotPrice") or "",
        "region": row.get("Region") or "",
        "date": date,
        "source": source,
    }


def _write(rows: list[Row], path: Path) -> None:
    """The person's dated price file, replaced as a whole; its doubts are read with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    os.replace(aside, path)

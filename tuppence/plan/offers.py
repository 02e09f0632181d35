"""One row of a price list: which machine it means, and what of it can be believed.

Published lists are wrong in known ways: blank prices, spot prices that are a placeholder, machines
counted as 12 GPUs, "A100" for four different cards. No row is fatal: it stays as far as it can be
used, and every doubt is a `Problem` with the row and a code (docs/prices.md lists the codes).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tuppence.errors import UserError
from tuppence.plan.gpus import find_gpu

COLUMNS = (
    "cloud",
    "instance_type",
    "accelerator",
    "accelerator_count",
    "vcpus",
    "memory_gib",
    "price_usd_h",
    "spot_price_usd_h",
    "region",
    "date",
    "source",
)
NUMBERS = ("accelerator_count", "vcpus", "memory_gib", "price_usd_h", "spot_price_usd_h")

# Spot prices that are exactly this share of on-demand were made up by whoever wrote the list.
PLACEHOLDER_SHARES = (0.10, 0.11)
MOST_GIB_PER_VCPU = 128  # beyond it the column is MiB: the largest real machines have 54

# What "A100" and "H100" are on which machine: (cloud, part of the instance type, card).
# Sources: the clouds' machine pages; SkyPilot's names for RunPod's cards (A100-80GB and H100 are
# PCIe there, the SXM ones are named so); Lambda's API (2x and 4x A100 are PCIe, 8x is SXM4).
CARDS = (
    ("aws", "p4d.", "A100-40GB-SXM4"),
    ("aws", "p4de.", "A100-80GB-SXM4"),
    ("aws", "p5.", "H100-80GB-SXM5"),
    ("gcp", "a2-ultragpu", "A100-80GB-SXM4"),
    ("gcp", "a2-", "A100-40GB-SXM4"),
    ("gcp", "a3-", "H100-80GB-SXM5"),
    ("azure", "ads_A100", "A100-80GB-PCIe"),
    ("azure", "ND96asr", "A100-40GB-SXM4"),
    ("azure", "ND96amsr", "A100-80GB-SXM4"),
    ("azure", "ads_H100", "H100-NVL-94GB"),
    ("azure", "adis_H100", "H100-NVL-94GB"),
    ("azure", "ND96isr_H100", "H100-80GB-SXM5"),
    ("lambda", "a100_80gb", "A100-80GB-SXM4"),
    ("lambda", "a100_sxm4", "A100-40GB-SXM4"),
    ("lambda", "gpu_8x_a100", "A100-40GB-SXM4"),
    ("lambda", "a100", "A100-40GB-PCIe"),
    ("lambda", "h100_sxm5", "H100-80GB-SXM5"),
    ("lambda", "h100_pcie", "H100-80GB-PCIe"),
    ("lambda", "rtx6000", "Quadro-RTX-6000-24GB"),  # Turing; not the RTX 6000 Ada
    ("runpod", "A100-80GB_", "A100-80GB-PCIe"),
    ("runpod", "H100 PCIe", "H100-80GB-PCIe"),
    ("runpod", "x_H100_", "H100-80GB-PCIe"),
    ("nebius", "h100-sxm", "H100-80GB-SXM5"),
    ("verda", "A100", "A100-80GB-SXM4"),
    ("verda", "H100.80S", "H100-80GB-SXM5"),
    ("fluidstack", "A100_PCIE_80GB", "A100-80GB-PCIe"),
    ("fluidstack", "A100_NVLINK_80GB", "A100-80GB-SXM4"),
    ("fluidstack", "H100_PCIE", "H100-80GB-PCIe"),
    ("fluidstack", "H100_NVLINK", "H100-80GB-SXM5"),  # CoreWeave's name for its HGX machines
)
AMBIGUOUS = ("A100", "A100-80GB", "H100", "H100-MEGA", "RTX6000")

# Instance types that say how many cards they have, as gpu_8x_h100_sxm5 or a2-highgpu-8g does.
_NAMED_COUNT = re.compile(
    r"^gpu_(\d+)x_|_(\d+)gpu-|::(\d+)$|gpu-(\d+)g\b|^(\d+)x[_-]|^(\d+)[A-Z]+\d+\."
)
_EIGHT = re.compile(
    r"^Standard_ND(40|96)|^p3(dn)?\.(16|24)x|^p4de?\.|^p5(e|en)?\.48|^p6-b[23]00\.48"
)
_BURSTABLE = re.compile(r"^t\d\w*\.|^Standard_B|^e2-(micro|small|medium)")  # a share of a core


Doubt = Callable[[str, str], None]  # (code, message)


class Problem(NamedTuple):
    """One doubt about one row: `row` is "file:line"."""

    row: str
    code: str
    message: str


@dataclass(frozen=True)
class Offer:
    """One machine at one price list. Prices are per machine; None where the list has none.

    `gpu` is the card by the name of `find_gpu`, None on a CPU machine or where the card that the
    list calls `accelerator` is unknown. `notes` are the codes of the row's problems.
    """

    cloud: str
    instance_type: str
    accelerator: str
    gpu: str | None
    gpu_count: int
    vcpus: float | None
    memory_gib: float | None
    usd_per_hour: float | None
    spot_usd_per_hour: float | None
    region: str
    date: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def has_price(self) -> bool:
        """Whether it can be bought at all, as far as the list says."""
        return self.usd_per_hour is not None or self.spot_usd_per_hour is not None

    @property
    def cost(self) -> tuple[float, float]:
        """Sorts by on-demand, then by spot; what has no price comes last."""
        price, spot = self.usd_per_hour, self.spot_usd_per_hour
        return math.inf if price is None else price, math.inf if spot is None else spot

    def price(self, *, spot: bool) -> float | None:
        """Dollars an hour of one machine."""
        return self.spot_usd_per_hour if spot else self.usd_per_hour


def read_offer(
    row: dict[str, str], at: str, problems: list[Problem], *, own: bool = False
) -> Offer | None:
    """A row as an offer, its doubts added to `problems`; None where it names no machine.

    The person's own rows are taken at their word: no guess at placeholders and counts.
    """
    codes: list[str] = []

    def doubt(code: str, message: str) -> None:
        codes.append(code)
        problems.append(Problem(at, code, message))

    text = {column: (row.get(column) or "").strip() for column in COLUMNS}
    cloud, name = text["cloud"].lower(), text["instance_type"]
    if not cloud or not name:
        doubt("bad_row", "no cloud or no instance_type: the row is left out")
        return None
    number = {c: _number(text[c], c, doubt) for c in NUMBERS}
    price, spot = number["price_usd_h"], number["spot_price_usd_h"]
    count, memory_gib = int(number["accelerator_count"] or 0), number["memory_gib"]
    if not own:
        price, spot = _believable(price, spot, text["source"], doubt)
        count = _counted(count, text, doubt)
    if memory_gib and memory_gib > MOST_GIB_PER_VCPU * (number["vcpus"] or 512):
        doubt("memory_unit", f"memory_gib={memory_gib:g} can only be MiB: divided by 1024")
        memory_gib /= 1024
    if price is None:
        doubt(
            "blank_price", f"no on-demand price{'; spot alone' if spot else ' and no spot price'}"
        )
    if _BURSTABLE.match(name):
        doubt("burstable", f"{name} sells a share of its cores: not used to prepare data")
    return Offer(
        cloud=cloud,
        instance_type=name,
        accelerator=text["accelerator"],
        gpu=_card(cloud, name, text["accelerator"], doubt) if text["accelerator"] else None,
        gpu_count=max(count, 1) if text["accelerator"] else 0,
        vcpus=number["vcpus"],
        memory_gib=memory_gib,
        usd_per_hour=price,
        spot_usd_per_hour=spot,
        region=text["region"],
        date=text["date"],
        source="own" if own else text["source"],
        notes=tuple(dict.fromkeys(codes)),
    )


def _number(text: str, column: str, doubt: Doubt) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is None or (math.isfinite(value) and value >= 0):
        return value
    doubt("bad_number", f"{column}={text} is not a number of zero or more: read as blank")
    return None


def _believable(
    price: float | None, spot: float | None, source: str, doubt: Doubt
) -> tuple[float | None, float | None]:
    """A published row's prices without those that nobody would honour."""
    if re.search(r"low confidence|not verified", source):
        doubt("low_confidence", f"the source is weak: {source}")
    if re.search(r"spot ?== ?on-demand", source) or (price and spot == price):
        doubt("no_spot_market", "spot costs what on-demand costs: there is no spot market")
        spot = None
    for share in PLACEHOLDER_SHARES:
        if price and spot and math.isclose(spot / price, share, rel_tol=1e-6):
            message = f"spot ${spot:g} is exactly {share:.0%} of on-demand: a placeholder, not used"
            doubt("placeholder", message)
            spot = None
    return price or None, spot or None  # a published price of zero is a blank


def _counted(count: int, text: dict[str, str], doubt: Doubt) -> int:
    """How many cards the machine really has, by its name where the list says otherwise."""
    if not text["accelerator"]:
        return 0
    named = _NAMED_COUNT.search(text["instance_type"])
    real = int(next(filter(None, named.groups()))) if named else count
    real = 8 if _EIGHT.search(text["instance_type"]) else real
    claimed = re.search(r"says (\d+) GPUs", text["source"])
    listed = int(claimed[1]) if claimed else count
    if listed != real:
        doubt("miscounted", f"the list says {listed} GPUs, {text['instance_type']} has {real}")
    return real


def _card(cloud: str, instance_type: str, accelerator: str, doubt: Doubt) -> str | None:
    """The card that a list's name means on this machine; None where it is not in the table."""
    rule = next((c for where, part, c in CARDS if where == cloud and part in instance_type), None)
    ambiguous = accelerator.upper() in AMBIGUOUS
    try:
        card = find_gpu(rule if rule and ambiguous else accelerator).name
    except UserError:
        doubt("unknown_gpu", f"{rule or accelerator} is not in the table of cards")
        return None
    if ambiguous and rule:
        doubt("gpu_by_instance", f"{accelerator} is read as {card} by the instance type")
    elif ambiguous:
        doubt("gpu_unclear", f"{accelerator} may be SXM or PCIe here: read as {card}")
    return card

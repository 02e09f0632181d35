"""What SkyPilot calls the cards, and what it cannot do on some clouds.

SkyPilot takes any card's name and then finds no machine, so names are checked here. The facts are
of SkyPilot 0.14.1: sky/clouds/*.py (features), common/accelerators.csv of its catalog v8 (names);
tests/test_cloud_optimizer.py holds the first against the library.
"""

import difflib

from tuppence.errors import UserError
from tuppence.plan.offers import Offer
from tuppence.plan.prices import CLUSTERS, LOCAL

ANY = "any"  # the cloud of a machine that is asked for by its card alone

# Its managed jobs ask every machine to end itself when the job's controller is gone.
NO_AUTODOWN = ("hyperbolic", "primeintellect", "verda", "yotta")
ONE_NODE = (
    *("hyperbolic", "primeintellect", "runpod", "seeweb", "shadeform", "vast", "verda"),
    *("vsphere", "yotta"),
)

NAMES = (
    *("A10", "A100", "A100-80GB", "A100-80GB-SXM", "A10G", "A30", "A40", "A4000", "A6000", "A800"),
    *("B200", "B300", "GB200", "GH200", "H100", "H100-MEGA", "H100-NVL", "H100-NVLINK"),
    *("H100-SXM", "H200", "H200-SXM", "L4", "L40", "L40S", "MI300X", "RTX3060", "RTX3080"),
    *("RTX3090", "RTX4090", "RTX5090", "RTX6000", "RTX6000-Ada", "RTXA5000", "RTXA6000"),
    *("RTXPRO6000S", "RTXPRO6000WS", "T4", "V100", "V100-32GB"),
)
# The cards of plan/gpus.py where no list names them; SXM and PCIe go by one name on most clouds.
_CARDS = {
    "V100-16GB-SXM2": "V100",
    "V100-32GB-SXM2": "V100-32GB",
    "V100-PCIe": "V100",
    "T4": "T4",
    "Quadro-RTX-6000-24GB": "RTX6000",
    "A10G-24GB": "A10G",
    "A10-24GB": "A10",
    "A100-40GB-SXM4": "A100",
    "A100-40GB-PCIe": "A100",
    "A100-80GB-SXM4": "A100-80GB",
    "A100-80GB-PCIe": "A100-80GB",
    "A800-80GB-SXM": "A800",
    "A800-80GB-PCIe": "A800",
    "A40-48GB": "A40",
    "A30-24GB": "A30",
    "RTX-A6000-48GB": "RTXA6000",
    "RTX-A5000-24GB": "RTXA5000",
    "RTX-3060-12GB": "RTX3060",
    "RTX-3080-10GB": "RTX3080",
    "RTX-3090-24GB": "RTX3090",
    "RTX-4090-24GB": "RTX4090",
    "RTX-5090-32GB": "RTX5090",
    "RTX-PRO-6000-Blackwell-96GB": "RTXPRO6000WS",
    "RTX-6000-Ada-48GB": "RTX6000-Ada",
    "L4-24GB": "L4",
    "L40-48GB": "L40",
    "L40S-48GB": "L40S",
    "H100-80GB-PCIe": "H100",
    "H100-80GB-SXM5": "H100",
    "H100-NVL-94GB": "H100-NVL",
    "H200-SXM-141GB": "H200",
    "GH200-96GB": "GH200",
    "B200-180GB": "B200",
    "GB200-186GB": "GB200",
    "B300-288GB": "B300",
    "MI300X-192GB": "MI300X",
}
_CARDS_ON = {
    ("runpod", "A100-80GB-SXM4"): "A100-80GB-SXM",
    ("runpod", "H100-80GB-SXM5"): "H100-SXM",
    ("runpod", "H200-SXM-141GB"): "H200-SXM",
    ("cudo", "H100-80GB-SXM5"): "H100-SXM",
    ("fluidstack", "H100-80GB-SXM5"): "H100-NVLINK",
    ("lambda", "RTX-A6000-48GB"): "A6000",
}


def place_of(offer: Offer) -> tuple[str, str | None]:
    """Cloud and region by SkyPilot's names. A machine of no cloud is sought on all of them; a
    cluster may be named with the cloud: slurm/mycluster."""
    if offer.cloud == "quoted":
        return ANY, None
    cloud, _, within = offer.cloud.partition("/")
    return cloud, within or offer.region or None


def accelerator_of(offer: Offer) -> str:
    """The card by the name that SkyPilot finds it by. Raises UserError where it has none."""
    cloud, card = place_of(offer)[0], offer.gpu or ""
    named = {name.lower(): name for name in NAMES}.get(offer.accelerator.lower())
    if cloud in CLUSTERS or "skypilot" in offer.source.lower():
        return offer.accelerator  # a cluster's own name, or the catalog's
    found = _CARDS_ON.get((cloud, card)) or named or _CARDS.get(card)
    if found is None:
        asked = offer.accelerator or card
        raise UserError(f"machine.gpu={asked}: SkyPilot rents no such card{_near(asked)}")
    return found


def instance_type_of(offer: Offer) -> str | None:
    """As the cloud knows it; None where the row only describes a machine by its card."""
    described = offer.instance_type in (offer.gpu, offer.accelerator, "own", "")
    return None if described or " " in offer.instance_type else offer.instance_type


def why_not(offer: Offer, *, nodes: int, clouds: frozenset[str] | None = None) -> str | None:
    """Why such a machine cannot be rented for a managed job. `clouds` are those that there are
    credentials for, None where that was not asked."""
    cloud = place_of(offer)[0]
    if cloud == LOCAL:
        return "machine.cloud=local is a machine that is there: tuppence run there, or --ssh HOST"
    if (offer.gpu or "").startswith("MI"):
        return f"{offer.gpu}: machines are set up for NVIDIA cards, not AMD's"
    if cloud in NO_AUTODOWN:
        return f"SkyPilot runs no managed job on {cloud}: a machine there cannot end itself"
    if nodes > 1 and cloud in ONE_NODE:
        return f"SkyPilot starts no {nodes} machines that work together on {cloud}"
    if clouds is not None and cloud != ANY and cloud not in clouds:
        return f"no credentials for {cloud}"
    return None


def _near(name: str) -> str:
    by_lower = {known.lower(): known for known in NAMES}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    near = ", ".join(by_lower[each] for each in found)
    return f"; the nearest are {near}" if near else f"; there are: {', '.join(NAMES)}"

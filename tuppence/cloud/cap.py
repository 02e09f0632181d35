"""The cap from outside: when a launch has spent its money, or holds a machine that nobody needs.

The trainer ends by its own clock inside the budget, and a timer on its machine ends it where it
hangs; this is for what neither can: a machine that does not go away, a store that nobody can reach,
a price that is not the planned one.

    spent      the ledger, and what passed since its last word  >  budget + 2 minutes a machine
    outlived   SkyPilot's meter                                 >  budget + 15 minutes a machine
    runaway    a stage without a budget in money or hours       >  3 times what it was planned at
    left       a machine whose task ended more than 2 minutes ago

Preparation and evaluation on the machine that trains may cost 3 times their plan beside the budget.
The allowances are at the machine's price: SkyPilot's meter counts what it waits for a machine, and
the last two minutes are the trainer's own, whose bill was charged in advance.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tuppence.cloud.launch import Launch, Stage
from tuppence.cloud.standing import StageStanding, Standing

GRACE_SECONDS = 120.0  # a machine's way down
BOOT_SECONDS = 900.0  # of waiting for a machine, which SkyPilot's meter counts
RUNAWAY = 3.0
NEAR = 0.9
DEARER = 1.1  # a machine whose price a person should hear of


@dataclass(frozen=True)
class Act:
    """Something to tell once for each `key`, and what is to be done about it."""

    code: str
    key: str
    message: str
    cancel: bool = False
    down: str | None = None


def cap_usd(launch: Launch, stage: Stage, each: StageStanding) -> float:
    """Dollars that a stage may cost, allowances aside."""
    if "train" not in stage.does:
        return RUNAWAY * stage.usd
    limits = []
    if launch.budget.usd is not None:
        limits.append(launch.budget.usd)
    if launch.budget.hours is not None:
        limits.append(launch.budget.hours * each.usd_per_hour)
    return min(limits) + RUNAWAY * stage.beside_usd if limits else RUNAWAY * stage.usd


def acts(
    launch: Launch, seen: Standing, *, told: Collection[str], ended_at: dict[str, float], now: float
) -> list[Act]:
    """What there is to tell, less what was told; and what must be done, told or not.

    `ended_at`: when each task ended, by its cluster's name.
    """
    found: list[Act] = []
    for stage, each in zip(launch.stages, seen.stages, strict=True):
        if each.state in ("starting", "running", "recovering"):
            found += _of_stage(launch, stage, each)
    if seen.state in ("failed", "lost", "stopped", "finished"):
        why = f": {seen.failure}" if seen.failure else ""
        found.append(Act(seen.state, f"{seen.state} {seen.usd:.4f}", f"{seen.state}{why}"))
    for held in seen.left:
        if now - ended_at.get(held.name, now) > GRACE_SECONDS:
            what = f"{held.name} is still there, and its task is over: taken down"
            found.append(Act("left", f"left {held.name}", what, down=held.name))
    return [act for act in found if act.cancel or act.down or act.key not in told]


def _of_stage(launch: Launch, stage: Stage, each: StageStanding) -> list[Act]:
    """Of a stage that is going on."""
    cap = cap_usd(launch, stage, each)
    rate = each.usd_per_hour / 3600
    money = "train" in stage.does and (launch.budget.usd or launch.budget.hours)
    name = stage.name
    found = []
    if each.recoveries:
        what = f"{name}: recovered, for the {_nth(each.recoveries)} time, on {each.machine}"
        found.append(Act("recovery", f"recovery {name} {each.recoveries}", what))
    planned = stage.machines[0].usd_per_hour * stage.nodes
    if planned and each.usd_per_hour > DEARER * planned:
        what = (
            f"{name}: {each.machine} costs ${each.usd_per_hour:.2f}/h; ${planned:.2f} was planned"
        )
        found.append(Act("dearer", f"dearer {name} {each.usd_per_hour:.4f}", what))
    if each.usd >= NEAR * cap and not _spent(each, cap):
        what = f"{name}: ${each.usd:.2f} of ${cap:.2f} is spent ({each.usd / cap:.0%})"
        found.append(Act("near", f"near {name} {cap:.4f}", what))
    over = None
    if money and each.inside_usd > cap + GRACE_SECONDS * (1 + each.recoveries) * rate:
        over = ("spent", f"the ledger stands at ${each.inside_usd:.4f} of ${cap:.4f}")
    elif each.metered_usd > cap + (BOOT_SECONDS * each.incarnations + GRACE_SECONDS) * rate:
        code = "outlived" if money else "runaway"
        over = (code, f"SkyPilot's meter stands at ${each.metered_usd:.4f} of ${cap:.4f}")
    if over:
        found.append(
            Act(over[0], f"{over[0]} {name}", f"{name}: {over[1]}: cancelled", cancel=True)
        )
    return found


def _spent(each: StageStanding, cap: float) -> bool:
    """A trainer that has come to its end: its money is spent as it should be."""
    return each.usd >= cap and each.inside_usd <= cap


def _nth(count: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(count, f"{count}th")

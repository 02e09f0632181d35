"""How much of a budget is spent, and amounts in words: the same for all who tell of a run."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from tuppence.config import Plan, Run
from tuppence.live import duration

Document = dict[str, Any]


def spent_of(
    plan: Plan,
    *,
    usd: float,
    hours: float,
    tokens: float,
    steps: float,
    events: Iterable[Document] = (),
) -> Document:
    """The limit of which most is spent: `{"kind", "limit", "spent", "fraction"}`."""
    every = limits_of(plan, usd=usd, hours=hours, tokens=tokens, steps=steps, events=events)
    return every[0]


def limits_of(
    plan: Plan | Run,
    *,
    usd: float,
    hours: float,
    tokens: float,
    steps: float,
    events: Iterable[Document] = (),
) -> list[Document]:
    """Each limit of the budget and what is spent of it, that of which most is spent first.

    `plan` may be a run's request, before there is a plan. `steps` and `tokens` are where the run
    stands. Steps that an early stop went back from are spent
    as well: nobody takes them again.
    """
    gone = _gone_back(events)
    paid = {"usd": usd, "hours": hours, "steps": steps + gone}
    paid["tokens"] = tokens + (gone * plan.step.batch_tokens if isinstance(plan, Plan) else 0)
    limits = {k: v for k, v in dataclasses.asdict(plan.budget).items() if v is not None}
    found = [
        {"kind": kind, "limit": limit, "spent": paid[kind], "fraction": paid[kind] / limit}
        for kind, limit in limits.items()
    ]
    return sorted(found, key=lambda each: -each["fraction"])


def _gone_back(events: Iterable[Document]) -> int:
    """Steps between an early stop and the weights that it went back to."""
    stops = [event for event in events if event.get("code") == "early_stop"]
    if not stops or stops[-1].get("back_to") is None:
        return 0
    return max(0, int(stops[-1]["step"]) - int(stops[-1]["back_to"]))


def amount(kind: str, value: float) -> str:
    """So much of a budget, in words: $0.0123, 43s, 1,536 steps."""
    if kind == "hours":
        return duration(3600 * value)
    return f"${value:,.4f}" if kind == "usd" else f"{value:,.0f} {kind}"


def share(budget: Document) -> str:
    """What is spent of a limit, in words: 1,536 of 3,000 steps."""
    spent, limit = (amount(budget["kind"], budget[key]) for key in ("spent", "limit"))
    return f"{spent.removesuffix(' ' + budget['kind'])} of {limit}"

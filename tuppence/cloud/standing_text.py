"""A launch's standing in words: a line of a list, or a page."""

from collections.abc import Sequence
from typing import Any

from tuppence.cloud.sky import Cluster
from tuppence.cloud.standing import OVER, Standing
from tuppence.live import duration

Document = dict[str, Any]


def line(seen: Standing) -> str:
    """One line of a launch."""
    return row(seen.document())


def row(seen: Document) -> str:
    if seen.get("kind") == "ssh":
        usd = f"${seen['usd']:.4f}" if seen.get("usd") is not None else ""
        return f"{seen['name']}  {seen['state']}  on {seen['host']}  {usd}".rstrip()
    if "stages" not in seen:
        return f"{seen['name']}  {seen['state']}  {seen.get('note', '')}".rstrip()
    parts = [f"{seen['name']}  {seen['state']}"]
    now = _stage_now(seen)
    if now:
        where = f" in {now['region']}" if now["region"] else ""
        parts.append(f"{now['name']} on {now['machine']}{where}{', spot' if now['spot'] else ''}")
    if seen["recoveries"]:
        parts.append(f"{seen['recoveries']} recovered")
    parts.append(_money(seen))
    if seen["seconds_left"]:
        parts.append(f"{duration(seen['seconds_left'])} left")
    if seen["left"]:
        parts.append(f"{', '.join(each['name'] for each in seen['left'])} not down yet")
    if seen.get("note"):
        parts.append(seen["note"])
    return ", ".join(parts)


def _money(seen: Document) -> str:
    _, mid, _ = seen["planned_usd"]
    if seen["state"] in OVER:
        return f"${seen['usd']:.2f} in all (${mid:.2f} planned)"
    return f"${seen['usd']:.2f} so far, ${seen['forecast_usd']:.2f} at its end (${mid:.2f} planned)"


def _stage_now(seen: Document) -> Document | None:
    return next((each for each in seen["stages"] if each["name"] == seen["stage"]), None)


def page(seen: Document) -> list[str]:
    """A launch in full."""
    if seen.get("kind") == "ssh" or "stages" not in seen:
        return [row(seen)]
    lines = [row(seen)]
    for each in seen["stages"]:
        rate = f"${each['usd_per_hour']:.2f}/h{', spot' if each['spot'] else ''}"
        more = f", {each['recoveries']} recovered" if each["recoveries"] else ""
        lines.append(
            f"  {each['name']:<9} {each['state']:<10} ${each['usd']:.4f} "
            f"(${each['planned_usd']:.4f} planned), {duration(each['seconds'])}, "
            f"{each['machine']}, {rate}{more}"
        )
    budget = {key: value for key, value in seen["budget"].items() if value is not None}
    lines.append("budget    " + ", ".join(f"{key} {value:g}" for key, value in budget.items()))
    inside = seen["inside"]
    if inside:
        val = "" if inside["val_loss"] is None else f", val {inside['val_loss']:.4f}"
        lines.append(
            f"run       {inside['state']}, step {inside['step']:,}, {inside['progress']:.1%}{val}, "
            f"ledger ${inside['usd']:.4f}"
        )
    storage = seen["storage"]
    if storage["usd_per_month"] is not None:
        lines.append(
            f"storage   {storage['bytes'] / 1e9:.2f} GB on {seen['store']}, "
            f"${storage['usd_per_month']:.2f} a month"
        )
    if seen["failure"]:
        lines.append(f"failed    {seen['failure']}")
    return lines


def controllers(held: Sequence[Cluster]) -> list[str]:
    """Machines of SkyPilot's own that are up, and how they end."""
    found = []
    for each in held:
        price = f" at ${each.usd_per_hour:.3f}/h" if each.usd_per_hour else ""
        ends = (
            f"stops after {each.autostop} idle minutes" if each.autostop else "`sky down` ends it"
        )
        if each.status != "STOPPED":
            found.append(
                f"SkyPilot's own machine {each.name} watches your managed jobs{price}; {ends}"
            )
    return found


def stays(name: str, store: str, storage: Document) -> str:
    """What a store still costs, and how that ends; nothing where it is empty."""
    if storage["note"]:
        return f"{store}: {storage['note']}"
    if not storage["bytes"]:
        return ""
    return (
        f"{store}: {storage['bytes'] / 1e9:.2f} GB of it stay, at "
        f"${storage['usd_per_month']:.2f} a month; tuppence stop {name} --bucket deletes what the "
        f"launch made"
    )

"""Which of the planner's machines can be had now, and at today's price.

    options ──credentials──▶ options ──machines.py──▶ stages ──today's price──▶ stages

A machine that is not for rent gives way to the next best, and that is said. One that has become
dearer than planned is refused: the plan was of another price.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuppence.cloud import clouds
from tuppence.cloud.launch import Rented, Stage
from tuppence.cloud.shown import machine_text
from tuppence.cloud.sky import Quote, Sky
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan.market import SKYPILOT
from tuppence.plan.options import Option
from tuppence.plan.prices import CLUSTERS

Clouds = frozenset[str] | None  # None: nobody was asked
TRIED = 5  # machines that are not for rent, before the person is told to choose


@dataclass(frozen=True)
class Decided:
    """The stages, and the option that the training stage is of."""

    stages: tuple[Stage, ...]
    option: Option


def decide(
    options: Sequence[Option],
    stages_of: Callable[[Sequence[Option], Clouds], tuple[Stage, ...]],
    sky: Sky | None,
    *,
    most_rise: float,
    say: Callable[[str], None],
) -> Decided:
    """The best machine that can be had, with its runners-up, as `stages_of` makes stages of
    options. Without `sky` nobody is asked.

    Raises UserError without credentials, DoesNotFit where it costs more than planned.
    """
    if sky is None:
        return Decided(stages_of(options, None), _chosen(options, None))
    there = enabled(options, sky)
    left = list(options)
    for _ in range(TRIED):
        stages = stages_of(left, there)
        chosen = _chosen(left, there)
        why, stages = quoted(stages, sky, most_rise=most_rise)
        if why is None:
            return Decided(stages, chosen)
        say(f"not for rent now: {why}")
        left = [option for option in left if _machine(option) != _machine(chosen)]
        if not any(_is_able(option, there) for option in left):
            break
    raise DoesNotFit(f"not for rent now: {why}; choose with machine.cloud=... machine.gpu=...")


def _chosen(options: Sequence[Option], enabled: Clouds) -> Option:
    """The one that the first machine of the training stage is of."""
    return next(option for option in options if _is_able(option, enabled))


def offered(options: Sequence[Option], region: str | None) -> list[Option]:
    """Those of the region, at its price. Raises UserError where the price book has none."""
    places = [clouds.place_of(option.seller.offer) for option in options]
    if region is None or places[0][0] in CLUSTERS:
        return list(options)
    found = [o for o, (_, there) in zip(options, places, strict=True) if there == region]
    if not found:
        known = ", ".join(sorted({there for _, there in places if there})) or "none"
        raise UserError(
            f"--infra {places[0][0]}/{region}: the price book has no such machine there; regions "
            f"with one: {known}"
        )
    return found


def in_region(stage: Stage, region: str) -> Stage:
    """Only machines of the region; a cluster's are all there. Raises UserError where none is."""
    cloud = stage.machines[0].cloud
    if cloud in CLUSTERS:
        return replace(stage, machines=tuple(replace(m, region=region) for m in stage.machines))
    found = tuple(machine for machine in stage.machines if machine.region == region)
    if not found:
        raise UserError(
            f"--infra {cloud}/{region}: the price book has no machine there for {stage.name}; "
            f"leave the region out, or --no-apart prepares on the training machine"
        )
    return replace(stage, machines=found)


def from_chosen(
    options: Sequence[Option], machines: Sequence[Rented]
) -> tuple[list[Option], dict[str, int]]:
    """The options that can be rented: those that were taken, `machines`, ahead of the others; and
    why ones better than the choice are left out, with how many."""
    at = next(i for i, option in enumerate(options) if _is_of(option, machines[0]))
    reasons = [
        clouds.why_not(o.seller.offer, nodes=o.nodes) or "not for rent now, or no credentials"
        for o in options[:at]
    ]
    able = [o for o in options[at:] if not o.fits or _is_able(o, None)]
    able.sort(key=lambda option: not any(_is_of(option, machine) for machine in machines))
    return able, {why: reasons.count(why) for why in reasons}


def _is_of(option: Option, machine: Rented) -> bool:
    offer = option.seller.offer
    place = (machine.cloud, machine.region)
    kind = (machine.instance_type, machine.gpu_count, machine.spot)
    own = (clouds.instance_type_of(offer), offer.gpu_count, option.seller.spot)
    return (
        kind == own
        and place[0] == _cloud(option)
        and (place[0] in CLUSTERS or place == clouds.place_of(offer))
    )


def _is_able(option: Option, enabled: Clouds) -> bool:
    offer = option.seller.offer
    return option.fits and clouds.why_not(offer, nodes=option.nodes, clouds=enabled) is None


def _machine(option: Option) -> tuple[str, str, int, bool]:
    offer = option.seller.offer
    return _cloud(option), offer.instance_type, offer.gpu_count, option.seller.spot


def _cloud(option: Option) -> str:
    return clouds.place_of(option.seller.offer)[0]


def enabled(options: Sequence[Option], sky: Sky) -> Clouds:
    """Of the clouds that could do it those whose credentials work. Raises UserError where none."""
    wanted = {_cloud(option) for option in options if _is_able(option, None)}
    asked = wanted if clouds.ANY not in wanted else set(SKYPILOT)
    found, why_not = sky.enabled(asked) if asked else (frozenset(), {})
    there = frozenset(found)
    if asked and not there & asked:
        told = "; ".join(
            f"{cloud}: {why_not.get(cloud, 'not enabled')}" for cloud in sorted(wanted)
        )
        raise UserError(
            f"no credentials for a cloud that could do it ({told}); `{sky.tool} check` says more"
        )
    return there


def quoted(
    stages: Sequence[Stage], sky: Sky, *, most_rise: float
) -> tuple[str | None, tuple[Stage, ...]]:
    """The stages with those machines that are for rent at no more than `most_rise` above the plan;
    or why the first of the training stage is not for rent. Raises DoesNotFit where it is dearer, or
    where another stage has no machine."""
    kept = []
    for stage in stages:
        if stage.machines[0].cloud in (*CLUSTERS, clouds.ANY):  # at the person's own price
            kept.append(stage)
            continue
        pairs = list(zip(stage.machines, sky.quote(stage.machines), strict=True))
        trains = "train" in stage.does
        if trains and pairs[0][1].usd_per_hour is None:
            return _not_there(*pairs[0]), tuple(stages)
        there = [(machine, quote) for machine, quote in pairs if quote.usd_per_hour is not None]
        if not there:
            raise DoesNotFit(
                f"not for rent now, to {stage.name} on: {_not_there(*pairs[0])}; --stages train "
                f"does it on the training machine"
            )
        fair = tuple(m for m, quote in there if not _too_dear(m, quote, most_rise))
        if there[0][0] not in fair:
            raise DoesNotFit(_dearer(*there[0], most_rise))
        kept.append(_at_todays_price(stage, fair, there))
    return None, tuple(kept)


def _at_todays_price(
    stage: Stage, fair: Sequence[Rented], quotes: Sequence[tuple[Rented, Quote]]
) -> Stage:
    """So that machines charge what they cost. The dollars of the stage are as planned: of a budget
    in dollars they stay, and of other work launching.py says them anew."""
    now = {machine: quote.usd_per_hour or machine.usd_per_hour for machine, quote in quotes}
    return replace(stage, machines=tuple(replace(m, usd_per_hour=now[m]) for m in fair))


def _not_there(machine: Rented, quote: Quote) -> str:
    return f"{machine_text(machine)} ({quote.why or 'SkyPilot lists no price'})"


def _too_dear(machine: Rented, now: Quote, most_rise: float) -> bool:
    most = machine.usd_per_hour * (1 + most_rise) * (1 + 1e-9)
    return now.usd_per_hour is not None and now.usd_per_hour > most


def _dearer(machine: Rented, quote: Quote, most_rise: float) -> str:
    now = quote.usd_per_hour or 0.0
    rise = now / machine.usd_per_hour - 1
    return (
        f"{machine_text(machine)} costs ${now:.2f} an hour now and was planned at "
        f"${machine.usd_per_hour:.2f} ({machine.price}): {rise:+.0%}, more than {most_rise:.0%}; "
        f"take it with --max-price-rise {rise + 0.005:.2f}, or plan with today's prices "
        f"(tuppence prices --refresh)"
    )

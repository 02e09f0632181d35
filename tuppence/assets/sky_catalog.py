"""What SkyPilot's catalog and optimizer say: clouds, prices, tasks. Beside sky_driver.py."""

import contextlib
import io
import os
import re

from sky_errors import ANSI, MESSAGE_CHARS, code_of, message_of

NO_QUOTE = {"usd_per_hour": None, "regions": {}, "instance_type": None}


def version(asked):
    """SkyPilot's version, and what answers for it. Starts nothing."""
    import sky
    from sky.server import common

    endpoint = common.get_server_url()
    local = common.is_api_server_local(endpoint)
    try:
        info = common.get_api_server_status(endpoint)
        status, server = info.status.value, info.version
    except Exception as error:
        status, server = f"unreachable: {message_of(error)}", None
    return {
        "version": sky.__version__,
        "server": {"endpoint": endpoint, "local": local, "status": status, "version": server},
        "consolidated": _consolidated(local, running=status == "healthy"),
        "state": os.path.expanduser("~/.sky"),
    }


def _consolidated(local, *, running):
    """Whether managed jobs need no controller machine of their own; None where only a server far
    away knows."""
    if not local:
        return None
    from sky import skypilot_config
    from sky.utils import controller_utils

    if running:
        return controller_utils._read_jobs_consolidation_signal()
    wanted = skypilot_config.get_nested(("jobs", "controller", "consolidation_mode"), False)
    return bool(wanted)


def enabled(asked):
    """Clouds whose credentials work; of the others the reason, where `check` is asked for."""
    from sky.client import sdk

    why = {}
    if asked.get("check", True):
        text = io.StringIO()
        clouds = tuple(asked["clouds"]) if asked.get("clouds") else None
        sdk.stream_and_get(sdk.check(infra_list=clouds, verbose=False), output_stream=text)
        why = _reasons(ANSI.sub("", text.getvalue()))
    found = sorted(name.lower() for name in sdk.get(sdk.enabled_clouds()))
    return {
        "clouds": found,
        "why_not": {k: v[:MESSAGE_CHARS] for k, v in why.items() if k not in found},
    }


def _reasons(text):
    """Of the table that `sky check` prints: `  AWS: disabled`, then `    Reason [compute]: ...`."""
    found, name = {}, None
    for line in text.partition("Enabled infra")[0].splitlines():
        if head := re.match(r" {0,2}(\S[^:]*): (enabled|disabled)", line):
            name = head[1].strip().lower() if head[2] == "disabled" else None
        elif name and line.strip():
            reason = re.sub(r"^\s*Reason( \[[^]]*\])?:\s*", "", line).strip()
            found[name] = f"{found[name]} {reason}" if name in found else reason
    return found


def quote(asked):
    """What each machine costs by the catalog now: the cheapest dollars per hour, and by region."""
    return {"machines": [_quoted(machine) for machine in asked["machines"]]}


def _quoted(machine):
    """`cloud` any: the cheapest of the clouds that are enabled."""
    if machine["cloud"] != "any":
        return _quoted_there(machine)
    from sky.client import sdk

    clouds = [name.lower() for name in sdk.get(sdk.enabled_clouds())]
    found = [_quoted_there({**machine, "cloud": name}) for name in clouds]
    there = [each for each in found if each["usd_per_hour"] is not None]
    if not there:
        why = "; ".join(f"{cloud}: {each['why']}" for cloud, each in zip(clouds, found))  # noqa: B905
        return {**NO_QUOTE, "why": why[:MESSAGE_CHARS]}
    return min(there, key=lambda each: each["usd_per_hour"])


def _quoted_there(machine):
    from sky import Resources

    cloud, region = machine["cloud"], machine.get("region")
    wanted = {"infra": f"{cloud}/{region}" if region else cloud, "use_spot": machine["spot"]}
    if machine.get("instance_type"):
        wanted["instance_type"] = machine["instance_type"]
    if machine.get("accelerator"):
        wanted["accelerators"] = {machine["accelerator"]: machine["gpu_count"]}
    if not machine.get("instance_type"):
        wanted["cpus"] = f"{machine['vcpus']:g}+" if machine.get("vcpus") else None
        wanted["memory"] = f"{machine['memory_gib']:g}+" if machine.get("memory_gib") else None
    try:
        return _by_region(Resources(**wanted))
    except Exception as error:
        why = f"{code_of(error)}: {message_of(error)}"
        return {**NO_QUOTE, "why": why}


def _by_region(resources):
    """The cheapest machine of the catalog that is as asked."""
    found = resources.cloud.get_feasible_launchable_resources(resources)
    regions, instance = {}, None
    for launchable in found.resources_list:
        prices = {}
        for region in launchable.get_valid_regions_for_launchable():
            with contextlib.suppress(ValueError):  # no price there, or none for spot
                price = launchable.copy(region=region.name).get_cost(3600)
                if price == price:  # an empty cell is not a number
                    prices[region.name] = price
        if prices and (not regions or min(prices.values()) < min(regions.values())):
            regions, instance = prices, launchable.instance_type
    why = None
    if not regions:
        near = ", ".join(found.fuzzy_candidate_list[:5])
        why = f"not in the catalog; near: {near}" if near else "not in the catalog"
        why = " ".join(found.hint.split()) if found.hint else why
    cheapest = min(regions.values(), default=None)
    return {"usd_per_hour": cheapest, "regions": regions, "instance_type": instance, "why": why}


def controller(asked):
    """What the machine costs that SkyPilot rents to watch managed jobs, on the first of `clouds`
    that has one; nothing where its server watches them itself."""
    if version(asked)["consolidated"]:
        return {"consolidated": True, "usd_per_hour": 0.0, "idle_minutes": 0}
    from sky import Resources
    from sky.skylet import constants

    found = []
    for cloud in asked["clouds"]:
        with contextlib.suppress(Exception):  # a cloud that cannot hold it
            found.append(_by_region(Resources(infra=cloud, cpus="4+", memory="4x", disk_size=50)))
    prices = [each["usd_per_hour"] for each in found if each["usd_per_hour"] is not None]
    idle = constants.CONTROLLER_IDLE_MINUTES_TO_AUTOSTOP
    return {"consolidated": False, "usd_per_hour": min(prices, default=None), "idle_minutes": idle}


# ---------------------------------------------------------------- tasks


def chain(asked):
    """The tasks of a YAML text. Secrets come from this process's environment: they stand in no
    file, and in no argument."""
    from sky.utils import dag_utils

    values = [(name, os.environ[name]) for name in asked.get("secrets") or ()]
    return dag_utils.load_chain_dag_from_yaml_str(asked["yaml"], secrets_overrides=values)

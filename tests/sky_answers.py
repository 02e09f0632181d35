"""Run by SkyPilot's Python: HOME/questions.json to HOME/answers.json, by sky_driver's own verbs."""

import json
import sys
import traceback
from pathlib import Path

HOME = Path(sys.argv[1])
sys.path.insert(0, str(Path(__file__).parents[1] / "tuppence" / "assets"))

import sky_driver  # noqa: E402


def features(asked):
    """{feature: clouds that lack it}, of all that SkyPilot rents from."""
    from sky import clouds
    from sky.utils import registry

    lacking = {
        name: getattr(cloud, "_CLOUD_UNSUPPORTED_FEATURES", {})
        for name, cloud in registry.CLOUD_REGISTRY.items()
    }
    wanted = [clouds.CloudImplementationFeatures(value) for value in asked["features"]]
    return {
        each.value: sorted(n for n, found in lacking.items() if each in found) for each in wanted
    }


def tasks(asked):
    """What SkyPilot read of each task: names, resources in order, mounts, secrets' names."""
    found = []
    for task in sky_driver.chain(asked).tasks:
        machines = list(task.resources)
        one = machines[0]
        found.append(
            {
                "name": task.name,
                "nodes": task.num_nodes,
                "ordered": isinstance(task.resources, list),
                "machines": [
                    {
                        "cloud": str(r.cloud).lower() if r.cloud else None,
                        "region": r.region,
                        "instance_type": r.instance_type,
                        "accelerators": r._accelerators,  # the property asks a catalog
                        "spot": r.use_spot,
                        "cap": r.max_hourly_cost,
                        "disk": r.disk_size,
                    }
                    for r in machines
                ],
                "recovery": one.job_recovery,
                "autostop": one.autostop_config.to_yaml_config(),
                "envs": task.envs,
                "secrets": sorted(task.secrets),
                "mounts": task.file_mounts,
                "storage": sorted(task.storage_mounts),
                "setup": task.setup,
                "run": task.run,
            }
        )
    return {"tasks": found}


def resolve(asked):
    """What SkyPilot's optimizer takes for each task, told how long each machine would need.

    `seconds`: {task: {"cloud/instance_type/accelerator:count/spot": seconds}}; a machine that is
    not named is taken for hopeless, or an hour where the task is not named. `enabled`: clouds that
    are taken as having credentials (else those that have).
    """
    from sky import OptimizeTarget, check, optimizer
    from sky.utils import registry

    if asked.get("enabled"):
        clouds = [registry.CLOUD_REGISTRY.from_str(name) for name in asked["enabled"]]
        check.get_cached_enabled_clouds_or_refresh = lambda *a, **k: clouds
        check.check_capability = lambda *a, **k: None
    dag = sky_driver.chain(asked)
    for task in dag.tasks:
        if times := asked.get("seconds", {}).get(task.name):
            task.set_time_estimator(lambda chosen, times=times: times.get(_key(chosen), 1e9))
    optimizer.Optimizer.optimize(dag, minimize=OptimizeTarget.COST, quiet=True)
    return {"tasks": {task.name: _chosen(task.best_resources) for task in dag.tasks}}


def _key(chosen):
    """A machine as `seconds` names it."""
    cards = "+".join(f"{name}:{count:g}" for name, count in (chosen.accelerators or {}).items())
    spot = "spot" if chosen.use_spot else "on_demand"
    return f"{str(chosen.cloud).lower()}/{chosen.instance_type}/{cards or 'cpu'}/{spot}"


def _chosen(best):
    return {
        "cloud": str(best.cloud).lower(),
        "region": best.region,
        "instance_type": best.instance_type,
        "accelerators": best.accelerators,
        "spot": best.use_spot,
        "usd_per_hour": best.get_cost(3600),
        "key": _key(best),
    }


VERBS = {**sky_driver.VERBS, "features": features, "tasks": tasks, "resolve": resolve}


def answer(asked):
    try:
        return VERBS[asked["verb"]](asked)
    except BaseException as error:
        traceback.print_exc()
        return {"error": {"type": type(error).__name__, "message": str(error)}}


answers = [answer(asked) for asked in json.loads((HOME / "questions.json").read_text())]
(HOME / "answers.json").write_text(json.dumps(answers, default=str))

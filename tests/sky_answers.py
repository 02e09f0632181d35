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


VERBS = {**sky_driver.VERBS, "features": features, "tasks": tasks}


def answer(asked):
    try:
        return VERBS[asked["verb"]](asked)
    except BaseException as error:
        traceback.print_exc()
        return {"error": {"type": type(error).__name__, "message": str(error)}}


answers = [answer(asked) for asked in json.loads((HOME / "questions.json").read_text())]
(HOME / "answers.json").write_text(json.dumps(answers, default=str))

"""A launch as SkyPilot's tasks, and as YAML that a person can read and run with `sky` alone.

    Stage ──▶ resources: ordered machines · envs · file_mounts: the kit · setup, run: node.sh

Each task is what SkyPilot 0.14.1 takes (tests/test_cloud_tasks.py asks it). Where its help ends:

    file_mounts        a plain URL is copied, and makes no bucket
    max_hourly_cost    it heeds where it picks the machine, and not for an instance_type that is
                       named: there the launch's own quote of today holds the price
    job_recovery       codes of recover_on_exit_codes restart without limit, and the other way,
                       max_restarts_on_errors, would also restart what is wrong or out of money
    autostop           managed jobs end their machines by themselves; this is for `sky launch`
"""

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from tuppence.cloud.clouds import ANY
from tuppence.cloud.launch import Launch, Rented, Stage
from tuppence.plan.preparation import SLOWER
from tuppence.plan.prices import CLUSTERS
from tuppence.plan.stages import HOUR, IDLE_SECONDS
from tuppence.store import is_url

Document = dict[str, Any]

KIT = "/tmp/tuppence/kit"  # where the kit lies on a machine that gets it from a bucket
PRICE_RISE = 0.1  # of an hour's price, that SkyPilot may take without asking
IDLE_MINUTES = 10  # what its managed jobs say themselves
CLUSTER_TAIL_SECONDS = 30.0  # from a job's end until SkyPilot has given the allocation back
LEAST_LIMIT_SECONDS = 1800.0  # of a stage without a budget
# Stopped by a signal after saving: the machine was about to go, and another one goes on.
# 75 (EX_TEMPFAIL) is node.sh's word for it.
RECOVERED = (75, 143)
# What torch is built for where a machine without a GPU builds the environment: drivers of 12.x and
# later take cu128, but its wheels have no code for Volta (PyTorch's release notes, 2.8).
TORCH, TORCH_OLD, OLD_CARDS = "cu128", "cu126", ("V100", "V100-32GB")
PREFIX = "set -euo pipefail\n"
LINE = 88  # of a script in YAML


def documents(launch: Launch) -> list[Document]:
    """One task a stage, in order."""
    return [_task(launch, stage, first=i == 0) for i, stage in enumerate(launch.stages)]


def yaml_text(docs: Sequence[Document], launch: Launch) -> str:
    """Tasks as one file: the chain with its name, or a single task; the plan's numbers on top."""
    parts: Sequence[Document] = docs if len(docs) == 1 else [{"name": launch.name}, *docs]
    texts = [
        yaml.dump(part, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        for part in parts
    ]
    return head(launch) + "---\n".join(texts)


def head(launch: Launch) -> str:
    """What was decided, as comments: stages with hours and dollars, prices with their dates."""
    budget = ", ".join(f"{k}={v:g}" for k, v in vars(launch.budget).items() if v is not None)
    lines = [
        f"{launch.name}: planned by tuppence at ${launch.usd.mid:.2f} in all "
        f"(${launch.usd.low:.2f} to ${launch.usd.high:.2f}, 80%); budget {budget}",
    ]
    for stage in launch.stages:
        lines.append(
            f"{' + '.join(stage.does)}: {stage.seconds / HOUR:.2f} h, ${stage.usd:.2f} with boot, "
            f"{_machines_text(stage.nodes)} of the first that can be had of"
        )
        lines += [f"    {_machine_text(machine)}" for machine in stage.machines]
    lines.append(f"prices: {launch.prices_from}")
    return "".join(f"# {line}\n" for line in lines)


def _machines_text(nodes: int) -> str:
    return "one" if nodes == 1 else f"{nodes} together"


def _machine_text(machine: Rented) -> str:
    where = "/".join(part for part in (machine.cloud, machine.region) if part)
    cards = f"{machine.gpu_count} {machine.accelerator}" if machine.accelerator else "no GPU"
    name = f" {machine.instance_type}" if machine.instance_type else ""
    return f"{where}{name}, {cards}: ${machine.usd_per_hour:g} an hour ({machine.price})"


# ---------------------------------------------------------------- one task


def _task(launch: Launch, stage: Stage, *, first: bool) -> Document:
    task: Document = {
        "name": f"{launch.name}-{stage.name}",
        "num_nodes": stage.nodes,
        "resources": _resources(launch, stage),
        "envs": {"TUPPENCE_PRICES": json.dumps([_price(m) for m in stage.machines])},
    }
    if launch.secrets:
        task["secrets"] = dict.fromkeys(launch.secrets)  # their values are given at the launch
    if is_url(launch.store):
        task["file_mounts"] = {KIT: _kit_place(launch)}
    builds = first and len(launch.stages) > 1 and launch.python is None
    task["setup"] = PREFIX + _node(launch, stage, "setup", pack=builds)
    task["run"] = PREFIX + _node(launch, stage, *stage.does, words=launch.words)
    return task


def _kit_place(launch: Launch) -> str:
    return f"{launch.store.rstrip('/')}/kit/{launch.kit}"


def _price(machine: Rented) -> Document:
    """What the machine looks its own price up by; null is any."""
    keys = ("instance_type", "accelerator", "gpu_count", "spot", "usd_per_hour")
    region = machine.region.partition("/")[0] if machine.region else None  # a Slurm partition off
    cloud = None if machine.cloud == ANY else machine.cloud
    return {"cloud": cloud, "region": region} | {key: getattr(machine, key) for key in keys}


# ---------------------------------------------------------------- resources


def _resources(launch: Launch, stage: Stage) -> Document:
    """The machines in order, and what holds for all of them. One that SkyPilot may find anywhere
    has no `infra`."""
    machines = [_machine(machine) for machine in stage.machines]
    own = all(machine.cloud in CLUSTERS for machine in stage.machines)
    shared: Document = {} if own else {"disk_size": math.ceil(stage.disk_gb)}
    if launch.image:
        shared["image_id"] = launch.image
    shared["autostop"] = {"idle_minutes": IDLE_MINUTES, "down": True}
    shared["job_recovery"] = {
        # The other strategy begins again on the machine that has just failed, while it is up.
        "strategy": "EAGER_NEXT_REGION",
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": list(RECOVERED),
    }
    return ({"ordered": machines} if len(machines) > 1 else machines[0]) | shared


def _machine(machine: Rented) -> Document:
    found: Document = {}
    if machine.cloud != ANY:
        found["infra"] = "/".join(part for part in (machine.cloud, machine.region) if part)
    if machine.instance_type:
        found["instance_type"] = machine.instance_type
    if machine.accelerator:
        found["accelerators"] = f"{machine.accelerator}:{machine.gpu_count}"
    elif not machine.instance_type:
        found["cpus"] = f"{machine.vcpus or 4:g}+"
        found["memory"] = f"{machine.memory_gib or 16:g}+"
    if machine.cloud not in CLUSTERS:
        found["use_spot"] = machine.spot
        found["max_hourly_cost"] = _cap(machine.usd_per_hour)
    return found


def _cap(usd_per_hour: float) -> float:
    """The price and its allowed rise, in whole tenths of a cent."""
    tenths = round(usd_per_hour * (1 + PRICE_RISE) * 1000, 6)  # 374.0000000001 is 374
    return max(math.ceil(tenths) / 1000, 0.001)


# ---------------------------------------------------------------- scripts


def _node(
    launch: Launch,
    stage: Stage,
    *does: str,
    pack: bool = False,
    words: Sequence[str] | None = None,
) -> str:
    """The call of node.sh, an option a line."""
    kit = KIT if is_url(launch.store) else _kit_place(launch)
    call = shlex.join(["bash", f"{kit}/node.sh", *does])
    lines = [["--store", launch.store], ["--name", launch.name]]
    if launch.python:
        lines.append(["--python", launch.python])
    else:
        lines.append(["--extras", ",".join(_extras(launch))])
        lines += _torch(launch, stage)
    lines += [["--pack"]] if pack else []
    lines += _limits(launch, stage, does)
    if "eval" in does:
        lines.append(["--tasks", launch.tasks or "bpb"])
    if words is not None:
        lines.append(["--", *words])
    rows = [call, *(row for line in lines for row in _folded(line))]
    return " \\\n  ".join(rows) + "\n"


def _folded(line: Sequence[str]) -> list[str]:
    """A line's words, quoted for bash, on as many lines as they need."""
    rows, row = [], ""
    for word in map(shlex.quote, line):
        if row and len(row) + len(word) >= LINE:
            rows.append(row)
            row = f"  {word}"
        else:
            row = f"{row} {word}" if row else word
    return [*rows, row]


def _limits(launch: Launch, stage: Stage, does: Sequence[str]) -> list[list[str]]:
    """What bounds the stages: the budget for training, some times the estimate for the others."""
    rows = []
    if "train" in does:
        budget = launch.budget
        rows += [] if budget.usd is None else [["--budget-usd", f"{budget.usd:g}"]]
        rows += [] if budget.hours is None else [["--budget-hours", f"{budget.hours:g}"]]
        own = all(machine.cloud in CLUSTERS for machine in stage.machines)
        rows.append(["--tail", f"{CLUSTER_TAIL_SECONDS if own else IDLE_SECONDS:g}"])
    seconds = stage.seconds
    if "train" in stage.does:  # prepare is inside the budget there, and its clock bounds it
        seconds = stage.beside_usd / (stage.machines[0].usd_per_hour * stage.nodes) * HOUR
    most = math.ceil(LEAST_LIMIT_SECONDS + SLOWER * seconds)
    if "prepare" in does and "train" not in stage.does:
        rows.append(["--limit", f"prepare={most}"])
    if "eval" in does:
        rows.append(["--limit", f"eval={most}"])
    return rows


def _torch(launch: Launch, stage: Stage) -> list[list[str]]:
    """Where no driver is here to ask, what those of the later machines take."""
    if any(machine.accelerator for machine in stage.machines):
        return []
    cards = {m.accelerator for each in launch.stages for m in each.machines if m.accelerator}
    if not cards:
        return [["--torch", "cpu"]]
    return [["--torch", TORCH_OLD if cards & set(OLD_CARDS) else TORCH]]


def _extras(launch: Launch) -> list[str]:
    """Of the package, what this run needs on a machine."""
    words = dict(word.partition("=")[::2] for word in launch.words if "=" in word)
    extras = ["bucket"] if is_url(launch.store) else []
    extras += ["hub"]  # named corpora and the suites' texts lie there
    extras += ["wandb"] if "WANDB_API_KEY" in launch.secrets or words.get("train.wandb") else []
    extras += ["tensorboard"] if words.get("train.tensorboard") in ("on", "true", "1") else []
    extras += ["harness"] if "lm_eval:" in (launch.tasks or "") else []
    return extras


# ---------------------------------------------------------------- YAML


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Scripts as blocks, and lists set in."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)

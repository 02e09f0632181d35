"""A launch as a person decides from it: stages, dollars, what is made and where things go."""

from typing import Any

from tuppence.cloud.launch import Launch, Rented, Stage
from tuppence.cloud.store_made import Stored, cloud_of
from tuppence.plan.prices import CLUSTERS, LOCAL
from tuppence.plan.stages import GB, HOUR

Document = dict[str, Any]
CENT = 0.005


def machine_text(machine: Rented, nodes: int = 1) -> str:
    """`aws us-east-1 p4d.24xlarge, 8 A100, spot`."""
    place = [machine.cloud, machine.region or "", machine.instance_type or ""]
    parts = [" ".join(word for word in place if word)]
    if machine.accelerator:
        parts.append(f"{machine.gpu_count} {machine.accelerator}")
    elif machine.instance_type is None and machine.vcpus:
        parts.append(f"{machine.vcpus:g} vCPUs, by their part of its price")
    parts += ["spot"] if machine.spot else []
    return (f"{nodes} x " if nodes > 1 else "") + ", ".join(parts)


def stages_text(launch: Launch) -> str:
    """A row a stage, with the machines that are taken where its first cannot be had below it."""
    rows = [("stage", "machine", "$/h", "hours", "$")]
    for stage in launch.stages:
        first, *others = stage.machines
        rows.append((*_named(stage, first), f"{stage.seconds / HOUR:.2f}", f"{stage.usd:.2f}"))
        rows += [
            ("", f"else {machine_text(m, stage.nodes)}", _price(m, stage), "", "") for m in others
        ]
    beside = (
        ("storage", "during the run, disks included", launch.phases.get("store", 0.0)),
        ("egress", "between the store's cloud and others", launch.phases.get("egress", 0.0)),
    )
    rows += [(name, what, "", "", f"{usd:.2f}") for name, what, usd in beside if usd >= CENT]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _named(stage: Stage, machine: Rented) -> tuple[str, str, str]:
    what = " + ".join(stage.does)
    return what, machine_text(machine, stage.nodes), _price(machine, stage)


def _price(machine: Rented, stage: Stage) -> str:
    return f"{machine.usd_per_hour * stage.nodes:.2f}"


def bill_text(launch: Launch, *, kept: Stored, controller: str) -> str:
    """What it is expected to cost, and what bounds that."""
    train = next(stage for stage in launch.stages if "train" in stage.does)
    hours = sum(stage.seconds for stage in launch.stages) / HOUR
    rows = [
        ("expected", f"{expected(launch)}, {hours:.2f} hours"),
        ("budget", limits_text(launch)),
        ("shared", shared_text(launch, train)),
        ("price", f"{train.machines[0].price}; {launch.prices_from}"),
        ("storage", storage_text(launch, kept)),
        ("jobs", controller),
        (
            "data",
            f"{launch.store}/data; run and checkpoints {launch.store}/runs/{launch.name}",
        ),
        ("code", f"{launch.store}/kit/{launch.kit[:12]}"),
        ("secrets", ", ".join(launch.secrets) or ""),
    ]
    return "\n".join(f"{name:9s} {value}" for name, value in rows if value)


def expected(launch: Launch) -> str:
    """`$21.02 (17.89 to 24.90, 80%)`."""
    usd = launch.usd
    spread = usd.high - usd.low >= CENT
    return f"${usd.mid:.2f}" + (f" ({usd.low:.2f} to {usd.high:.2f}, 80%)" if spread else "")


def shared_text(launch: Launch, train: Stage) -> str:
    """What other work on the training machine does to a budget in dollars or hours."""
    budget = launch.budget
    if budget.usd is None and budget.hours is None:
        return ""
    said = []
    if "prepare" in train.does and train.usd:
        took = launch.phases.get("prepare", 0.0)
        said.append(
            f"preparation takes about ${took:.2f} of the budget, so about {took / train.usd:.0%} "
            f"fewer tokens than the table says are trained"
        )
    if "eval" in train.does:
        said.append("evaluation after training is beside the budget, on the same machine")
    return "; ".join(said)


def would_make(launch: Launch, *, texts: str | None) -> list[str]:
    """What a launch makes, in order; a dry run makes none of it."""
    store = launch.store
    bucket = f"{store.partition('://')[0]}://{store.partition('://')[2].partition('/')[0]}"
    place = f"{bucket} (where it is not there)" if "://" in store else f"{store}/"
    machines = [
        f"{machine_text(s.machines[0], s.nodes)}, for {' and '.join(s.does)}: "
        f"{s.seconds / HOUR:.2f} hours, ${s.usd:.2f}"
        for s in launch.stages
    ]
    return [
        place,
        f"{store}/kit/{launch.kit[:12]}...",
        *([f"{store}/{texts}/"] if texts else []),
        f"{store}/data/",
        f"{store}/runs/{launch.name}/",
        *machines,
    ]


def limits_text(launch: Launch) -> str:
    """The budget, and what holds where it says nothing of money."""
    budget = launch.budget
    limits = {
        "dollars": None if budget.usd is None else f"${budget.usd:g}",
        "hours": None if budget.hours is None else f"{budget.hours:g} hours",
        "tokens": None if budget.tokens is None else f"{budget.tokens:,} tokens",
        "steps": None if budget.steps is None else f"{budget.steps:,} steps",
    }
    said = " and ".join(text for text in limits.values() if text)
    if budget.usd is None and budget.hours is None:
        return f"{said}; no clock stops it: add budget.usd or budget.hours to bound the bill"
    text = f"{said} for the training machine, its boot and end included; it is stopped there"
    if budget.usd is None:
        return text
    train = next(stage for stage in launch.stages if "train" in stage.does)
    return f"{text}; ${launch.usd.mid - min(train.usd, budget.usd):.2f} is expected beside it"


def storage_text(launch: Launch, kept: Stored) -> str:
    """What will lie on the store, and for how much a month."""
    if cloud_of(launch.store) == LOCAL:
        return f"{launch.store}: {kept.total / GB:.3g} GB on a disk of your own"
    assumed = " (assumed)" if kept.rate.assumed else ""
    return (
        f"{launch.store}: {kept.total / GB:.3g} GB, ${kept.usd_per_month:.2f} a month{assumed} "
        f"until it is deleted (tuppence stop {launch.name} --bucket)"
    )


def controller_text(launch: Launch, told: Document | None) -> str:
    """What SkyPilot's own machine costs, that looks after the job; None: nobody was asked."""
    if told is None:
        clouds = {stage.machines[0].cloud for stage in launch.stages}
        rented = clouds - set(CLUSTERS)
        return (
            "SkyPilot looks after the job from a machine of its own (4 vCPUs, 16 GiB; its price is "
            "asked at a launch), billed beside this, until 10 minutes after the last job; then it "
            "is stopped and its disk of 50 GB stays (jobs.controller.consolidation_mode in "
            "~/.sky/config.yaml spares it)"
            if rented
            else ""
        )
    if told.get("consolidated"):
        return "SkyPilot looks after the job from its API server: no machine of its own"
    price = told.get("usd_per_hour")
    each = "" if price is None else f" at about ${price:.2f} an hour"
    idle = told.get("idle_minutes")
    until = "" if idle is None else f", until {idle:g} minutes after the last job"
    stays = "; then it is stopped and its disk stays" if until else ""
    return (
        f"SkyPilot looks after the job from a machine of its own, billed beside this{each}{until}"
        f"{stays}"
    )


def readme(launch: Launch, *, texts: str | None) -> str:
    """How to run the written tasks with `sky` itself."""
    name, store = launch.name, launch.store
    copy = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}.get(
        store.partition("://")[0], "cp -r"
    )
    bucket = store.partition("://")[2].partition("/")[0]
    make = {"s3": f"aws s3 mb s3://{bucket}", "gs": f"gcloud storage buckets create gs://{bucket}"}
    first = make.get(store.partition("://")[0], f"mkdir -p {store}")
    secrets = "".join(f" --secret {each}" for each in launch.secrets)
    end = "" if copy.startswith(("aws", "gcloud")) else "/."
    into = "" if copy.startswith(("aws", "gcloud")) else f"mkdir -p {store}/kit && "
    lines = [
        f"# {name}",
        "",
        "Written by `tuppence launch --to-yaml`; nothing was made or started. To run it:",
        "",
        f"    {first}        # where it is not there yet",
        f"    {into}{copy} kit{end} {store}/kit",
        *(
            [f"    {into.replace('kit', texts)}{copy} {texts}{end} {store}/{texts}"]
            if texts
            else []
        ),
        f"    sky jobs launch{secrets} {name}.yaml",
        "",
        f"`{name}.yaml` is the whole chain; the other files are its tasks, one each, for",
        "`sky launch` one after the other. On each machine the trainer's clock and a dead-man",
        "timer hold the budget. Nothing outside does: `tuppence guard` looks after what was",
        "started by `tuppence launch` alone. Afterwards:",
        "",
        f"    tuppence fetch {store}/runs/{name}",
        "",
    ]
    return "\n".join(lines)

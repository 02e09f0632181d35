"""The same job on a machine that a person has: sent, started so that a lost connection does not
matter, followed, ended, brought home. Nothing is rented, and no SkyPilot is needed.

    here                              there: ~/tuppence/NAME
    RUNS/NAME/launch.json             kit/  job.sh  log.txt  job  ended
    assets/ssh.sh ── ssh ──▶          systemd unit | tmux session | session of its own
                                        └─ ssh.sh job ── node.sh prepare train ── trainer

What is charged is the trainer's own time at the machine's price; node.sh's dead-man timer holds.
"""

import dataclasses
import os
import shlex
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuppence.cloud import record as records
from tuppence.cloud.kit import Kit, make_kit
from tuppence.cloud.launch import LAUNCH_VERSION, STAGES, Launch, Rented, Stage
from tuppence.cloud.record import Record
from tuppence.cloud.ssh_after import followed, ssh_fetch, ssh_logs, ssh_status, ssh_stop
from tuppence.cloud.ssh_files import Sent, own_text, send_job, send_secrets, send_text
from tuppence.cloud.ssh_host import Host
from tuppence.cloud.ssh_there import There, over, probed, refuse_small
from tuppence.config import Interval, Run
from tuppence.errors import Fault, UserError

__all__ = ["launch_ssh", "ssh_fetch", "ssh_logs", "ssh_status", "ssh_stop"]

USD_PER_HOUR = 0.40  # assumed where nothing is said, as everywhere
STAYS = {  # what keeps it alive, and how to look at it there
    "systemd-system": "as systemd unit tuppence-{job} (systemctl status tuppence-{job})",
    "systemd-user": "as systemd unit tuppence-{job} (systemctl --user status tuppence-{job})",
    "tmux": "in tmux (there: tmux -L tuppence attach -t {job})",
    "setsid": "in a session of its own (setsid; there is no tmux and no lingering systemd)",
}
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
MAKERS = {"given": "as given", "torch": "its torch, what lacks beside it", "node": "made by uv"}


@dataclass(frozen=True)
class Wanted:
    """What is asked, ready to be sent. `does` are node.sh's stages, `words` the trainer's."""

    args: Namespace
    run: Run
    does: tuple[str, ...]
    words: tuple[str, ...]
    kit: Kit
    own: Sent | None
    secrets: dict[str, str]

    @property
    def name(self) -> str:
        return str(self.run.name)

    @property
    def usd_per_hour(self) -> float:
        return self.run.machine.usd_per_hour or USD_PER_HOUR


# ---------------------------------------------------------------- launch


def launch_ssh(
    args: Namespace, wanted: Run, *, say: Callable[[str], None], confirm: Callable[[str], None]
) -> dict[str, Any]:
    """Start the run on `args.ssh`, and follow it unless `args.detach`. `confirm` shows a text and
    raises UserError where the person does not agree. Returns the document that --json prints."""
    _refuse(args, wanted)
    here, host = Path(args.runs) / str(wanted.name), Host(args.ssh, args.ssh_config)
    before = _before(here, host)
    there = probed(host, args, wanted)
    job = _wanted(args, wanted, there)
    ended = over(there, job.name, shlex.join(job.words))
    if ended is not None:
        say(ended)
        return {"run": job.name, "kind": "ssh", "host": host.name, "state": "finished"}
    refuse_small(there, wanted, job.own.bytes if job.own else 0)
    record = _record(job, there, before)
    text = _told(job, record, there)
    if args.dry_run:
        say(text)
        return {"dry_run": True, "run": job.name, "job": _job_text(job, record, there)}
    confirm(text)
    records.write(here, record)
    _send(job, record, there, say)
    begun = host.ask("start", there.folder, record.ssh["job"], there.how)
    if begun.get("begun") != ["yes"]:
        raise Fault(f"{host.name}: {job.name} did not begin; see {there.folder}/log.txt there")
    record = dataclasses.replace(record, state="started")
    records.write(here, record)
    say(f"{job.name} runs on {host.name}, {STAYS[there.how].format(job=record.ssh['job'])}")
    if args.detach:
        say(
            f"look: tuppence status {job.name}, tuppence logs {job.name} --follow; "
            f"end: tuppence stop {job.name}"
        )
        return ssh_status(record)
    log = sys.stderr.buffer
    return followed(here, record, there.status.get("log_bytes", 0), log, say)


def _refuse(args: Namespace, wanted: Run) -> None:
    machine = wanted.machine
    for key in ("cloud", "instance_type", "spot"):
        if getattr(machine, key) is not None:
            raise UserError(
                f"machine.{key}={getattr(machine, key)}: --ssh rents nothing; leave the key out"
            )
    if (machine.nodes or 1) > 1:
        raise UserError(
            f"machine.nodes={machine.nodes}: --ssh starts one machine; torchrun on each of several "
            f"is in docs/ranks.md"
        )
    if machine.usd_per_hour is not None and machine.usd_per_hour <= 0:
        raise UserError(f"machine.usd_per_hour={machine.usd_per_hour}: a price is above zero")


def _before(here: Path, host: Host) -> Record | None:
    """The launch that this one goes on from. A run of this machine, or a launch elsewhere, keeps
    its name."""
    found = records.read(here)
    if found is None and (here / "run.json").exists():
        raise UserError(f"{here} is a run of this machine; give the launch another name=...")
    if found is not None and (found.kind != "ssh" or found.ssh["host"] != host.name):
        where = found.ssh.get("host", "rented machines")
        raise UserError(f"{here} was launched on {where}; give this launch another name=...")
    return found


# ---------------------------------------------------------------- what is started


def _wanted(args: Namespace, run: Run, there: There) -> Wanted:
    own = own_text(run.data.source or "", there.folder)
    kit = make_kit(_recipe_file(args.words))
    does = tuple(args.stages.split(",")) if args.stages else ("prepare", "train")
    if any(each not in STAGES for each in does):
        raise UserError(f"--stages {args.stages}: of {','.join(STAGES)}")
    if args.tasks and not args.stages:
        does = STAGES
    wanted = [*SECRETS[:1], *(SECRETS[1:] if run.train.wandb == "online" else ())]
    secrets = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    return Wanted(args, run, does, _words(args.words, run, kit, own), kit, own, secrets)


def _recipe_file(given: list[str]) -> Path | None:
    spec = given[0] if given and "=" not in given[0] else ""
    path, colon, _ = spec.rpartition(":")
    return Path(path) if colon and path.endswith(".py") else None


def _words(given: list[str], run: Run, kit: Kit, own: Sent | None) -> tuple[str, ...]:
    """The recipe and overrides as the machine is told them: what is said of machines stays here."""
    kept = [w for w in given if not w.startswith(("machine.", "name="))]
    if kit.recipe is not None:
        kept[0] = f"{kit.recipe}:{kept[0].rpartition(':')[2]}"
    sizes = {"machine.disk_gb": run.machine.disk_gb, "machine.threads": run.machine.threads}
    kept += [f"{key}={value:g}" for key, value in sizes.items() if value is not None]
    text = [] if own is None else [f"data.source={own.source}"]
    return (*kept, *text, f"name={run.name}")


def _record(job: Wanted, there: There, before: Record | None) -> Record:
    """The launch as launch.json keeps it. What it will cost is known of a budget in dollars or
    hours; of another it stands as zero."""
    run, price = job.run, job.usd_per_hour
    source = "given" if run.machine.usd_per_hour else "assumed"
    usd = min(
        run.budget.usd if run.budget.usd is not None else float("inf"),
        run.budget.hours * price if run.budget.hours is not None else float("inf"),
    )
    usd = 0.0 if usd == float("inf") else usd
    machine = Rented(
        cloud="ssh",
        region=None,
        instance_type=None,
        accelerator=there.gpus[0] if there.gpus else None,
        gpu_count=run.machine.gpu_count or len(there.gpus),
        vcpus=None,
        memory_gib=None,
        spot=False,
        usd_per_hour=price,
        price=source,
    )
    disk = run.machine.disk_gb or 0.0
    launch = Launch(
        version=LAUNCH_VERSION,
        name=job.name,
        words=job.words,
        store=job.args.store or there.folder,
        stages=(Stage(job.name, job.does, (machine,), 1, usd / price * 3600, usd, disk),),
        budget=run.budget,
        kit=job.kit.sha,
        python=job.args.python,
        image=None,
        tasks=job.args.tasks,
        secrets=tuple(job.secrets),
        usd=Interval(usd, usd, usd),
        phases={},
        prices_from=source,
    )
    safe = "".join(c if c.isalnum() else "-" for c in job.name)
    ssh = {
        "host": there.host.name,
        "config": there.host.config or "",
        "folder": there.folder,
        "job": f"{safe}-{uuid.uuid4().hex[:6]}",
        "how": there.how,
        "usd_per_hour": f"{price:g}",
    }
    made = before.created_at if before else time.time()
    return Record(LAUNCH_VERSION, "ssh", "planned", launch, made, ssh=ssh)


def _job_text(job: Wanted, record: Record, there: There) -> str:
    """job.sh: what is started, and what a person can start again by hand."""
    launch, count = record.launch, job.run.machine.gpu_count
    options = {
        "--store": launch.store,
        "--name": launch.name,
        "--since": "now",
        "--usd-per-hour": record.ssh["usd_per_hour"],
        "--budget-usd": launch.budget.usd,
        "--budget-hours": launch.budget.hours,
        "--tasks": launch.tasks,
        "--gpus": count,
    }
    told = [str(word) for key, v in options.items() if v is not None for word in (key, v)]
    name, how, folder = record.ssh["job"], there.how, there.folder
    script = f"{folder}/kit/tuppence/assets/ssh.sh"
    begin = ["exec", "bash", script, "job", folder, name, how, job.name, there.maker, there.python]
    words = [*begin, _extras(job.run, launch.store), *job.does, *told, "--", *job.words]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# What `tuppence launch --ssh` started. By hand: bash job.sh >>log.txt 2>&1",
            f"export TUPPENCE_JOB={name}",
            shlex.join(words),
        ]
    )


def _extras(run: Run, store: str) -> str:
    """What must be installed there besides the base."""
    source = run.data.source or ""
    needs = {
        "hub": True,
        "bucket": "://" in store or source.startswith(("s3://", "gs://")),
        "corpus": run.data.dedup is not None,
        "wandb": run.train.wandb not in (None, "off"),
        "tensorboard": bool(run.train.tensorboard),
    }
    return ",".join(extra for extra, needed in needs.items() if needed)


def _told(job: Wanted, record: Record, there: There) -> str:
    """What the person agrees to."""
    budget, price = job.run.budget, job.usd_per_hour
    cards = f"{len(there.gpus)} x {there.gpus[0]}" if there.gpus else "no GPU"
    assumed = "" if job.run.machine.usd_per_hour else " (assumed; machine.usd_per_hour=... says)"
    spend = [f"${budget.usd:g} ({budget.usd / price:.2g} h there)"] if budget.usd else []
    spend += [f"{budget.hours:g} h (${budget.hours * price:.2f})"] if budget.hours else []
    spend += [f"{budget.steps} steps"] if budget.steps else []
    spend += [f"{budget.tokens} tokens"] if budget.tokens else []
    lines = [
        f"machine   {there.host.name}: {cards}, {there.free_gib:.0f} GiB free at {there.folder}",
        f"price     ${price:g}/h{assumed}",
        f"budget    {', '.join(spend)}",
        f"python    {MAKERS[there.maker]} ({there.python})",
        f"stays     {STAYS[there.how].format(job=record.ssh['job'])}",
        f"words     {shlex.join(job.words)}",
    ]
    if job.own is not None:
        size = f"{job.own.bytes / 1e6:.1f} MB"
        lines.append(f"text      {len(job.own.files)} file(s), {size}, sent there")
    return "\n".join(lines)


def _send(job: Wanted, record: Record, there: There, say: Callable[[str], None]) -> None:
    """Code, text, secrets, and what is to be started."""
    if job.own is not None:
        say(f"sending {job.own.bytes / 1e6:.1f} MB of text to {there.host.name}")
        send_text(there.host, job.own)
    text = _job_text(job, record, there)
    send_job(there.host, there.folder, code=job.kit.path, job=text, words=shlex.join(job.words))
    if job.secrets:
        send_secrets(there.host, there.folder, job.secrets)

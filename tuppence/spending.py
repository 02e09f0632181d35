"""The second half of the main job: spent. A run is taken to its end from wherever it stands.

What is not planned is planned, what is not prepared is prepared, what was begun is resumed, and
every second of it is charged. Of many ranks the lead does this, and tells the others what it came
to; a run that lives on a bucket is brought here first, and sent there as it goes.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tuppence import bucket, config, environment, held, host, origin
from tuppence.bucket import Mirror, Relay
from tuppence.config import Budget, Plan, Run
from tuppence.corpus import prepared, shards_at, surveyed
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.evals import bundle
from tuppence.folder import RunFolder, RunLock
from tuppence.held import Held
from tuppence.ledger import Meter
from tuppence.pipeline import (
    asked,
    device_of,
    on_this_machine,
    refuse_warnings,
    runs_root,
    say,
    solved,
    threads_of,
)
from tuppence.plan import hardware
from tuppence.plan.asked import solve_track
from tuppence.plan.describe import plan_text
from tuppence.plan.estimate import rounds
from tuppence.store import Store
from tuppence.train.notes import Notes
from tuppence.train.pace import finish_seconds
from tuppence.train.readings import disk_words
from tuppence.train.tracking import refuse_missing

STOP_SECONDS = 0.3  # charged in advance for the exit after an interruption
UPLOAD_SECONDS = 600.0  # for what is left to send when a run is over
NO_MATTER = (  # what another attempt may be told otherwise: no token and no weight depends on it
    *("data.on_bad", "data.workers", "data.cache_gb"),
    *("train.core_data", "train.hellaswag_data"),
    *("train.tensorboard", "train.wandb", "train.wandb_project"),
)
GRACE_SECONDS = 20.0  # for the same after a signal: clouds give 30 s and more


@dataclass(frozen=True)
class Job:
    """What is to be done, where. `ranks` is None for a process alone, `url` for a run that lives
    here; `finish` is called when the run has ended, before its folder is sent to a bucket. `held`
    tells since when a rented machine is paid."""

    args: Namespace
    wanted: Run
    folder: RunFolder
    thread_settings: dict[str, str]
    ranks: Any
    url: str | None
    finish: Callable[[RunFolder], object]
    held: Held | None


def spend(
    args: Namespace, finish: Callable[[RunFolder], object] = lambda folder: None
) -> tuple[RunFolder, bool]:
    """Take the run to its end, from wherever it is; True where it was there already.

    `finish` is called once it has ended.
    """
    wanted = asked(args)
    refuse_missing(solve_track(wanted.train))
    settings = host.settle_threads(threads_of(wanted))
    folder = RunFolder(runs_root(args) / str(wanted.name))
    url = f"{args.runs.rstrip('/')}/{wanted.name}" if bucket.is_url(args.runs) else None
    script = getattr(args, "held", None)
    rented = held.read(Path(script)) if script else None
    job = Job(args, wanted, folder, settings, None, url, finish, rented)
    if host.world_size() == 1:
        return folder, _spend(job)
    from tuppence.ranks import join

    ranks = join(device_of(wanted))
    if not ranks.lead:
        _follow(args, wanted, ranks)
    code = Fault.exit_code
    try:
        there = _spend(dataclasses.replace(job, ranks=ranks))
        code = 0
    except (UserError, DoesNotFit) as error:
        code = error.exit_code
        raise
    finally:
        if ranks.tell("attempt", {"exit": code}):  # the others have not begun
            ranks.let_leave()
    ranks.part()
    return folder, there


def _spend(job: Job) -> bool:
    """Whether there was nothing to do."""
    args, wanted, folder = job.args, job.wanted, job.folder
    if job.url is not None:
        bucket.restore(folder, job.url)
    begun = _attempts(folder)
    if folder.exists() and not args.fresh:
        _check_same_run(folder, wanted)
        if any(event["code"] == "end" for event in folder.rows("events")):
            return True
    draft = None
    if args.fresh or not folder.file("plan.json").exists():
        draft = solved(wanted, surveyed(wanted), held=job.held)  # may refuse; nothing is touched
        refuse_warnings(draft.warnings, args)
    if args.fresh and folder.path.exists():
        with RunLock(folder):
            kept = _set_aside(folder.path)
        say(f"--fresh: {folder.path} is kept as {kept}")
        begun = begun if job.url is not None else 0
    was_there = folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with RunLock(folder):
            _attempt(job, draft, begun + 1)
    except (UserError, DoesNotFit):
        if not was_there and not folder.file("metrics.jsonl").exists():
            shutil.rmtree(folder.path)  # nothing was trained: leave the name free
        raise
    return False


def _attempts(folder: RunFolder) -> int:
    """The highest number of an attempt that was begun, here or as a bucket told."""
    starts = [e for e in folder.rows("events") if e["code"] in ("start", "resume")]
    claimed = folder.read_json("attempt.json")
    there = bucket.attempts_begun(folder)
    return max(len(starts), claimed["attempt"] if claimed else 0, there)


def _attempt(job: Job, draft: Plan | None, attempt: int) -> None:
    """One attempt, charged from the process's start to its end."""
    folder = job.folder
    frozen = folder.plan() if draft is None else draft
    meter = Meter(
        folder,
        usd_per_hour=on_this_machine(frozen, job.wanted).machine.usd_per_hour,
        attempt=attempt,
        start=host.process_start(),
        held=job.held,
    )
    allowance, mirror, relay, ended = STOP_SECONDS, None, None, False
    try:
        _tell_of_machine(job, meter)
        made, frozen = _prepare_and_plan(job, draft, meter)
        say(plan_text(frozen))
        here = on_this_machine(frozen, job.wanted)
        if (here.machine, here.step) != (frozen.machine, frozen.step):
            _say_moved(folder, frozen, here)
        _warn_of_disk(folder, frozen)
        _warn_of_idle_gpus(folder, frozen)
        _warn_of_no_stop(folder, job.wanted)
        environment.record(folder, attempt, made, job.thread_settings)

        from tuppence import checkpoint
        from tuppence.train.loop import train as train_loop

        host.forget_peak_rss()  # measuring the machine is not the run's
        fence = checkpoint.claim(folder, attempt)
        if job.url is not None:
            mirror = _mirror(folder, job.url, frozen)
        if job.ranks is not None:
            job.ranks.tell("attempt", _told(folder, here, made, attempt))
            relay = _relay(job)
        done = train_loop(
            here,
            folder,
            made,
            meter=meter,
            attempt=attempt,
            ranks=job.ranks,
            fence=fence,
            committed=lambda path: mirror.checkpoint(path) if mirror else None,
            alive=lambda: _lag(mirror) if mirror else 0.0,
            relay=relay,
        )
        if mirror is not None:
            _wait_for(mirror, meter, frozen)
        folder.event("end", "finished", attempt=attempt, peak_memory_gib=done.peak_memory_gib)
        left = meter.seconds_left(usd=frozen.budget.usd, hours=frozen.budget.hours)
        allowance = min(finish_seconds(frozen, done.steps), max(left, STOP_SECONDS))
        ended = True
    except BaseException as error:
        _say_why(folder, attempt, error)
        raise
    finally:
        meter.close(allowance=allowance, ended=ended)
        folder.close()
        if mirror is not None and not ended:
            mirror.close(GRACE_SECONDS)
    job.finish(folder)
    if mirror is not None:
        mirror.close(UPLOAD_SECONDS)
    if done.step_seconds is not None and not frozen.machine.compile and here == frozen:
        _learn(frozen, done.step_seconds)


def _tell_of_machine(job: Job, meter: Meter) -> None:
    """Of a rented machine: until when there is money, and what is doubtful about its price."""
    if job.held is None:
        return
    budget = job.wanted.budget
    at = meter.spent_at(usd=budget.usd, hours=budget.hours)
    folder = Path(job.args.held).parent
    held.tell_deadline(folder, spent_at=at, tail_seconds=meter.tail_seconds)
    if job.held.price_note is not None:
        Notes(job.folder, say).warn(
            "price_unknown", job.held.price_note, "compare the receipt with the provider's bill"
        )


def _say_why(folder: RunFolder, attempt: int, error: BaseException) -> None:
    """What ended this attempt early, for whoever watches: a signal (`stopped`), or a fault."""
    signalled = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 1) > 128
    first = str(error).partition("\n")[0] or type(error).__name__
    with contextlib.suppress(OSError, Fault):  # a full disk has no room for it
        holder = folder.read_json("attempt.json")
        if holder is None or holder["attempt"] <= attempt:  # else a newer one has the run
            folder.event("stopped" if signalled else "failed", first, attempt=attempt)


def _prepare_and_plan(job: Job, draft: Plan | None, meter: Meter) -> tuple[Path, Plan]:
    """The shards, and the plan that this run keeps from its first attempt on."""
    wanted, folder = job.wanted, job.folder
    if not folder.exists():
        folder.write_json("run.json", dataclasses.asdict(wanted))
    if draft is not None and not draft.data.exact:
        say(plan_text(draft))  # preparing may take long: here is what it is for
    with meter.phase("prepare"):
        within = _Within(meter, wanted.budget)
        begun = on_this_machine(folder.plan(), wanted) if draft is None else draft
        bundle.fetch(begun.tasks, say=say)
        known = None if draft is not None else folder.plan().data.inputs_sha256
        place = shards_at(job.args, wanted.data)
        made, data = prepared(wanted, place, known=known, tick=within.check)
    if draft is None:
        frozen = folder.plan()
        if data.inputs_sha256 != frozen.data.inputs_sha256:
            raise UserError(
                f"data.source={data.source} has changed since {folder.path} was planned; restore "
                f"it, or train another run (name=... or --fresh)"
            )
        return made.folder, frozen
    if dataclasses.replace(draft.data, inputs_sha256=data.inputs_sha256) == data:
        frozen = dataclasses.replace(draft, data=data)
    else:
        frozen = solved(wanted, data, spent_seconds=meter.seconds(), held=job.held)
        refuse_warnings(frozen.warnings, job.args)
    _check_tasks(frozen, made.folder / "tokenizer")
    _freeze(folder, frozen, shlex.join(["tuppence", *job.args.argv]))
    _warn_of_tokens(folder, frozen, made.folder / "tokenizer")
    return made.folder, frozen


# ---------------------------------------------------------------- another machine


def _say_moved(folder: RunFolder, planned: Plan, here: Plan) -> None:
    """An attempt on other ranks, cores or at another price than were planned."""

    def told(plan: Plan) -> str:
        price = f"${plan.machine.usd_per_hour:g}/h"
        return f"{plan.step.ranks} rank(s) of {plan.machine.threads} thread(s) at {price}"

    message = f"on {told(here)}; planned on {told(planned)}"
    folder.event("other_machine", message)
    say(f"machine   {message}")


# ---------------------------------------------------------------- many ranks


def _told(folder: RunFolder, plan: Plan, data: Path, attempt: int) -> dict[str, Any]:
    """What the other ranks need to know."""
    return {
        "plan": dataclasses.asdict(plan),
        "run": str(folder.path.resolve()),
        "data": str(data.resolve()),
        "attempt": attempt,
        "claim": folder.read_json("attempt.json"),
    }


def _relay(job: Job) -> Relay | None:
    """The lead's end of the way to ranks on other nodes, of a run that lives on a bucket."""
    if job.url is None or host.local_world() == host.world_size():
        return None
    claim = bucket.identity_of(job.folder.read_json("attempt.json"))
    return None if claim is None else Relay(Store(job.url), claim)


def _beside(args: Namespace, wanted: Run, ranks: Any, told: Any) -> tuple[RunFolder, Relay | None]:
    """The lead's folder, where this node sees it. Of a run on a bucket that is told by the claim
    that lies in it: where another is, or none, a folder of this node's own, and the way over the
    bucket."""
    folder = RunFolder(Path(told["run"]), writes=False)
    claim = bucket.identity_of(told["claim"])
    here = RunFolder(runs_root(args) / str(wanted.name)).read_json("attempt.json")
    if bucket.is_url(args.runs) and claim is not None and bucket.identity_of(here) != claim:
        return bucket.beside(f"{args.runs.rstrip('/')}/{wanted.name}", claim, rank=ranks.rank)
    if not folder.exists():
        raise Fault(
            f"rank {ranks.rank} on {platform.node()} does not see {folder.path}; ranks on several "
            f"nodes share one run folder: give --runs a folder that all nodes mount, or a bucket"
        )
    return folder, None


def _follow(args: Namespace, wanted: Run, ranks: Any) -> NoReturn:
    """Train beside the lead, as it says; then this process has nothing to say for itself."""
    told = ranks.told("attempt", dict)
    if "exit" in told:
        ranks.leave()
        if not told["exit"]:  # there was nothing to do: the lead leaves with the others
            ranks.part()
        raise SystemExit(told["exit"])
    from tuppence.train.loop import train as train_loop

    folder, relay = _beside(args, wanted, ranks, told)
    data = Path(told["data"])
    if not (data / "manifest.json").exists():
        data = _prepared_here(wanted, args, ranks)
    plan = config.from_json(Plan, json.dumps(told["plan"]))
    _tasks_here(plan, ranks)
    meter = Meter(
        folder,
        usd_per_hour=plan.machine.usd_per_hour,
        attempt=told["attempt"],
        start=host.process_start(),
    )
    attempt = told["attempt"]
    train_loop(plan, folder, data, meter=meter, attempt=attempt, ranks=ranks, relay=relay)
    ranks.part()
    raise SystemExit(0)


def _prepared_here(wanted: Run, args: Namespace, ranks: Any) -> Path:
    """The shards, on a node that does not see the lead's: made by the first of its ranks."""
    node = ranks.rank // ranks.local_world

    def made() -> str:
        return str(prepared(wanted, shards_at(args, wanted.data))[0].folder.resolve())

    return Path(ranks.told(f"data of node {node}", made, by=node * ranks.local_world))


def _tasks_here(plan: Plan, ranks: Any) -> None:
    """The tasks, on a node that is not the lead's: fetched by the first of its ranks."""
    node = ranks.rank // ranks.local_world
    if node:
        first = node * ranks.local_world
        ranks.told(f"tasks of node {node}", lambda: bundle.fetch(plan.tasks, say=say), by=first)


def _check_tasks(plan: Plan, tokenizer: Path) -> None:
    """Refuse a tokenizer that cannot read them, before anything is trained."""
    if plan.tasks is not None:
        from tuppence.tokenizer.spec import load_tokenizer
        from tuppence.train.suites import load

        load(plan, load_tokenizer(tokenizer), say=say)


# ---------------------------------------------------------------- a bucket


def _mirror(folder: RunFolder, url: str, plan: Plan) -> Mirror:
    from tuppence.checkpoint import Retention

    keep = Retention(plan.cadence.keep_last, plan.cadence.keep_every_steps)
    return Mirror(folder, url, is_milestone=keep.is_milestone)


def _lag(mirror: Mirror) -> float:
    """Between steps: send what changed, hear of a newer attempt; how far the bucket lies behind."""
    mirror.check()
    mirror.beat()
    return mirror.lag()


def _wait_for(mirror: Mirror, meter: Meter, plan: Plan) -> None:
    """Let what was saved arrive on the bucket, as long as the budget lasts, and no longer than
    UPLOAD_SECONDS where the bucket is away."""
    reserve = 2 * plan.cadence.finish_seconds
    until = time.monotonic() + UPLOAD_SECONDS
    with meter.phase("save"):
        while mirror.lag() and time.monotonic() < until:
            if meter.seconds_left(usd=plan.budget.usd, hours=plan.budget.hours) < reserve:
                return
            time.sleep(0.02)
            meter.beat()


# ---------------------------------------------------------------- around an attempt


class _Within:
    """Keeps a preparation alive in the ledger, and inside the budget."""

    def __init__(self, meter: Meter, budget: Budget) -> None:
        self.meter, self.budget = meter, budget

    def check(self) -> None:
        self.meter.beat()
        if self.meter.seconds_left(usd=self.budget.usd, hours=self.budget.hours) < STOP_SECONDS:
            raise DoesNotFit(
                f"the budget was spent after {self.meter.seconds():.0f} s, before the data was "
                f"prepared; prepare it first (tuppence prepare with the same words), or give more"
            )


def _warn_of_tokens(folder: RunFolder, plan: Plan, tokenizer: Path) -> None:
    """Say it where the weights that the run starts from know other tokens."""
    found = None if plan.init is None else origin.other_tokenizer(plan.init.path, tokenizer)
    if found is not None:
        folder.event(found.code, found.message)
        say(f"warning   {found.message} [{found.code}]")


def _warn_of_disk(folder: RunFolder, plan: Plan) -> None:
    """Say it where the disk has less room than checkpoints will take; they then go sooner."""
    taken = sum(p.stat().st_size for p in folder.checkpoints.rglob("*") if p.is_file())
    free = host.free_bytes(folder.path)
    if free is not None and taken + free < plan.predicted.disk_bytes:
        wanted = plan.predicted.disk_bytes
        message, advice = disk_words(free, wanted - taken, "checkpoints will take")
        Notes(folder, say).warn("low_disk", message, advice, value=free, limit=wanted - taken)


def _warn_of_no_stop(folder: RunFolder, wanted: Run) -> None:
    """Say it, once, where a run was planned by a version that could not stop early."""
    said = any(event["code"] == "no_early_stop" for event in folder.rows("events"))
    planned = "early_stop" in folder.read_json("plan.json")["cadence"]
    if wanted.train.early_stop is not False and not planned and not said:
        message = "this run was planned before runs could stop early"
        advice = "it goes on to the end of its budget, whatever its validation loss does"
        Notes(folder, say).warn("no_early_stop", message, advice, reason="planned before")


def _warn_of_idle_gpus(folder: RunFolder, plan: Plan) -> None:
    """Say it where one process leaves the machine's other GPUs idle, and paid for."""
    if plan.machine.device != "cuda" or host.world_size() > 1:
        return
    import torch

    there = torch.cuda.device_count()
    if there > 1:
        message = (
            f"{there - 1} of {there} GPUs are idle: torchrun --nproc_per_node={there} -m tuppence "
            f"train ... uses them all"
        )
        folder.event("idle_gpus", message)
        say(f"warning   {message} [idle_gpus]")


def _freeze(folder: RunFolder, found: Plan, words: str) -> None:
    folder.write_json("plan.json", dataclasses.asdict(found))
    folder.file("argv.txt").write_text(words + "\n", encoding="utf-8")


def _check_same_run(folder: RunFolder, wanted: Run) -> None:
    """A folder holds one run: other overrides are another run, but for those of the machine, and
    those that do not matter to what is learned."""
    there, now = config.asked(folder.run()), config.asked(wanted)
    odd = [k for k in {**there, **now} if there.get(k) != now.get(k)]
    odd = [k for k in odd if not k.startswith("machine.") and k not in NO_MATTER]
    if odd:
        raise UserError(
            f"{folder.path} holds a run with {odd[0]}={there.get(odd[0])}, not "
            f"{now.get(odd[0])}; give this one a name (name=...), or --fresh to start over"
        )


def _set_aside(path: Path) -> Path:
    """Rename a folder to the first free NAME.1, NAME.2, ..."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.replace(path, kept)
    return kept


def _learn(done: Plan, step_seconds: float) -> None:
    """Keep the step time that a run really had, for the next plan of the same shape."""
    kept = hardware.load_calibration(done.machine.device, done.machine.threads)
    if kept is None:
        return
    key = hardware.shape_key(done.model, done.step.micro_batch, done.step.workers)
    way = (done.machine.precision, done.machine.attention)
    same = [t for t in kept.timings.get(key, ()) if (t.precision, t.attention) == way]
    if not same or step_seconds <= same[-1].update_seconds:
        return
    one_round = (step_seconds - same[-1].update_seconds) / rounds(done.step)
    learned = dataclasses.replace(same[-1], round_seconds=one_round, source="seen in a run")
    hardware.save_calibration(kept.with_timings(key, [learned]))

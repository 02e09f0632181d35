"""The main job, part by part: asked, solved, spent. What `run`, `train` and `plan` are made of.

    words ──asked──▶ Run ──solved──▶ Plan ──spend──▶ run folder

`spend` takes a run to its end from wherever it stands: it plans what is not planned, prepares what
is not prepared, resumes what was begun, and charges every second of it.
"""

import dataclasses
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuppence import config, host, origin, recipes
from tuppence.config import Budget, DataPlan, Plan, Run, Warning
from tuppence.errors import DoesNotFit, UserError
from tuppence.folder import RunFolder, RunLock
from tuppence.ledger import Meter
from tuppence.live import Live
from tuppence.plan import hardware
from tuppence.plan.asked import check_budget, check_trainable, check_values
from tuppence.plan.describe import plan_text
from tuppence.plan.estimate import rounds
from tuppence.plan.solve import solve
from tuppence.train.pace import finish_seconds

NOTES = ("data_estimated", "plan_only", "not_exportable")
STOP_SECONDS = 0.3  # charged in advance for the exit after an interruption


def say(text: str) -> None:
    """To the person; stdout belongs to --json."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---------------------------------------------------------------- asked


def asked(args: Namespace) -> Run:
    """The run that the words ask for: a recipe (the first word without `=`), then overrides."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains in one process; start it "
            f"without torchrun, or with --nproc_per_node=1"
        )
    words = list(args.words)
    spec = words.pop(0) if words and "=" not in words[0] else recipes.DEFAULT
    run = named(config.override(recipes.get(spec), words), spec)
    run = origin.started(run, _begun(args, run))
    refuse_unprepared(run.data.source or "")
    check_values(run)
    check_trainable(run)
    check_budget(run.budget)
    return run


def refuse_unprepared(source: str) -> None:
    """A corpus that only plans know is refused before anything is measured."""
    from tuppence.data.corpora import CORPORA
    from tuppence.data.sources import find_files

    if source in CORPORA:
        find_files(source)


def named(run: Run, spec: str) -> Run:
    """The run with its name: as asked, else its recipe's. It names a folder, and has text."""
    name = run.name or spec.rpartition(":")[2]
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"name={name}: a name is one word that can name a folder")
    if run.data.source is None:
        raise UserError("data.source is not set; say data.source='texts/*.txt' or a corpus's name")
    return dataclasses.replace(run, name=name)


def _begun(args: Namespace, run: Run) -> Run | None:
    """What was asked of the run's folder before, where that is to go on from other weights."""
    folder = RunFolder(Path(args.runs) / str(run.name))
    goes_on = run.train.init_from is not None and folder.exists() and not args.fresh
    return folder.run() if goes_on else None


def threads_of(run: Run) -> int:
    """CPU threads to use: as asked, or one for each core this process may run on."""
    threads = run.machine.threads if run.machine.threads is not None else host.usable_cores()
    if threads < 1:
        raise UserError(f"machine.threads={threads}: at least 1")
    return threads


# ---------------------------------------------------------------- solved


def surveyed(run: Run) -> DataPlan:
    """The corpus as a cheap look at it tells."""
    from tuppence.data.split import default_val_tokens, wanted_tokens
    from tuppence.data.survey import survey

    data = run.data
    seen = survey(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        text_field=data.text_field or "text",
    )
    wanted = wanted_tokens(max_tokens=data.max_tokens, val_tokens=data.val_tokens)
    tokens = seen.tokens if wanted is None else min(seen.tokens, wanted)
    val = data.val_tokens if data.val_tokens is not None else default_val_tokens(tokens)
    return DataPlan(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        text_field=data.text_field or "text",
        max_tokens=data.max_tokens,
        val_tokens_asked=data.val_tokens,
        vocab_size=seen.vocab_size,
        train_tokens=max(0, tokens - val),
        val_tokens=val,
        bytes_per_token=seen.bytes / max(1, seen.tokens),
        inputs_sha256=None,
        exact=seen.exact,
    )


def prepared(run: Run, root: Path, *, fresh: bool, tick: Any = None) -> tuple[Any, DataPlan]:
    """Shards on disk (made now or found), and the corpus as their manifest tells."""
    from tuppence.data.prepare import Progress, prepare

    live = Live()

    def progress(p: Progress) -> None:
        share = f" {p.done_bytes / p.total_bytes:4.0%}" if p.done_bytes and p.total_bytes else ""
        rate = f"  {p.tokens / p.seconds:,.0f} tok/s" if p.tokens and p.seconds > 0.5 else ""
        live.show(f"preparing: {p.phase}{share}  {p.tokens:,} tokens{rate}")
        if tick:
            tick()

    data = run.data
    made = prepare(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        root=root,
        text_field=data.text_field or "text",
        max_tokens=data.max_tokens,
        val_tokens=data.val_tokens,
        fresh=fresh,
        on_progress=progress,
    )
    live.clear()
    manifest = made.manifest
    return made, DataPlan(
        source=manifest.source,
        tokenizer=data.tokenizer or "gpt2",
        text_field=manifest.text_field,
        max_tokens=manifest.max_tokens,
        val_tokens_asked=data.val_tokens,
        vocab_size=manifest.vocab_size,
        train_tokens=manifest.train_tokens,
        val_tokens=manifest.val_tokens,
        bytes_per_token=manifest.bytes_per_token,
        inputs_sha256=manifest.inputs_sha256,
        exact=True,
    )


def solved(
    run: Run, data: DataPlan, *, spent_seconds: float | None = None, quick: float | None = None
) -> Plan:
    """The plan on this machine, measuring what was not measured before (a few seconds, once).

    `spent_seconds` is what was charged already, in place of the start-up a run usually takes. A
    step that is expected to take longer than `quick` seconds is not measured.
    """
    device, threads = device_of(run), threads_of(run)
    known = hardware.load_calibration(device, threads)
    if known is not None and device == "cuda":
        from tuppence.train import calibrate

        known = known if known.name == calibrate.device_name(device) else None
    if known is None:
        from tuppence.train import calibrate

        say("measuring this machine (once; tuppence calibrate repeats it)")
        known = calibrate.measure_machine(device, threads)
        hardware.save_calibration(known)
    plan = _solved(run, data, known, spent_seconds)
    slow = quick is not None and plan.predicted.step_seconds.mid > quick
    if plan.predicted.basis == "roofline" and not slow:
        from tuppence.train import calibrate

        say("measuring this plan's step in each precision and attention (once per shape)")
        known = calibrate.measure_step(plan, known)
        hardware.save_calibration(known)
        plan = _solved(run, data, known, spent_seconds)
    return plan


def _solved(run: Run, data: DataPlan, known: hardware.Calibration, spent: float | None) -> Plan:
    if spent is not None:
        known = dataclasses.replace(known, startup_seconds=max(known.startup_seconds, spent))
    plan = solve(run, data, known)
    where = run.train.init_from
    return plan if where is None else dataclasses.replace(plan, init=origin.pinned(where))


def device_of(run: Run) -> str:
    """Which device torch has here; without a GPU's driver, known before torch is imported."""
    drivers = ("/proc/driver/nvidia", "/dev/dxg", "/dev/kfd", "/dev/nvhost-gpu")
    may_have_gpu = sys.platform == "win32" or any(Path(path).exists() for path in drivers)
    if not may_have_gpu or run.machine.gpu == "cpu" or run.machine.gpu_count == 0:
        return "cpu"
    from tuppence.train import calibrate

    return calibrate.pick_device()


def refuse_warnings(warnings: Sequence[Warning], args: Namespace) -> None:
    """`--strict` turns warnings into a refusal, but for what is only said of every such plan."""
    serious = [w for w in warnings if w.code not in NOTES]
    if args.strict and serious:
        raise DoesNotFit("--strict: " + "; ".join(f"{w.code}: {w.message}" for w in serious))


# ---------------------------------------------------------------- spent


def spend(args: Namespace) -> tuple[RunFolder, bool]:
    """Take the run to its end, from wherever it is; True where it was there already."""
    wanted = asked(args)
    settings = host.settle_threads(threads_of(wanted))
    folder = RunFolder(Path(args.runs) / str(wanted.name))
    if folder.exists() and not args.fresh:
        _check_same_run(folder, wanted)
        if any(event["code"] == "end" for event in folder.rows("events")):
            return folder, True
    draft = None
    if args.fresh or not folder.file("plan.json").exists():
        draft = solved(wanted, surveyed(wanted))  # may refuse; nothing is touched before
        refuse_warnings(draft.warnings, args)
    if args.fresh and folder.path.exists():
        with RunLock(folder):
            kept = _set_aside(folder.path)
        say(f"--fresh: {folder.path} is kept as {kept}")
    begun = folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with RunLock(folder):
            _attempt(args, wanted, folder, draft, settings)
    except (UserError, DoesNotFit):
        if not begun and not folder.file("metrics.jsonl").exists():
            shutil.rmtree(folder.path)  # nothing was trained: leave the name free
        raise
    return folder, False


def _attempt(
    args: Namespace, wanted: Run, folder: RunFolder, draft: Plan | None, settings: dict[str, str]
) -> None:
    """One attempt, charged from the process's start to its end."""
    starts = [e for e in folder.rows("events") if e["code"] in ("start", "resume")]
    attempt = len(starts) + 1
    frozen = folder.plan() if draft is None else draft
    meter = Meter(
        folder,
        usd_per_hour=frozen.machine.usd_per_hour,
        attempt=attempt,
        start=host.process_start(),
    )
    allowance = STOP_SECONDS
    words = shlex.join(["tuppence", *args.argv])
    try:
        if not folder.exists():
            folder.write_json("run.json", dataclasses.asdict(wanted))
        if draft is not None and not draft.data.exact:
            say(plan_text(draft))  # preparing may take long: here is what it is for
        with meter.phase("prepare"):
            within = _Within(meter, wanted.budget)
            made, data = prepared(wanted, Path(args.data), fresh=False, tick=within.check)
        if draft is not None:
            same = dataclasses.replace(draft.data, inputs_sha256=data.inputs_sha256) == data
            if same:
                frozen = dataclasses.replace(draft, data=data)
            else:
                frozen = solved(wanted, data, spent_seconds=meter.seconds())
                refuse_warnings(frozen.warnings, args)
            _freeze(folder, frozen, words)
            _warn_of_tokens(folder, frozen, made.folder / "tokenizer")
        elif data.inputs_sha256 != frozen.data.inputs_sha256:
            raise UserError(
                f"data.source={data.source} has changed since {folder.path} was planned; restore "
                f"it, or train another run (name=... or --fresh)"
            )
        say(plan_text(frozen))
        _record_environment(folder, attempt, made.folder, settings)

        from tuppence.train.loop import train as train_loop

        host.forget_peak_rss()  # measuring the machine is not the run's
        done = train_loop(frozen, folder, made.folder, meter=meter, attempt=attempt)
        folder.event("end", "finished", attempt=attempt, peak_memory_gib=done.peak_memory_gib)
        left = meter.seconds_left(usd=frozen.budget.usd, hours=frozen.budget.hours)
        allowance = min(finish_seconds(frozen, done.steps), max(left, STOP_SECONDS))
    finally:
        meter.close(allowance=allowance)
        folder.close()
    if done.step_seconds is not None and not frozen.machine.compile:
        _learn(frozen, done.step_seconds)


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


def _freeze(folder: RunFolder, found: Plan, words: str) -> None:
    folder.write_json("plan.json", dataclasses.asdict(found))
    folder.file("argv.txt").write_text(words + "\n", encoding="utf-8")


def _check_same_run(folder: RunFolder, wanted: Run) -> None:
    """A folder holds one run: other overrides are another run."""
    there, now = config.asked(folder.run()), config.asked(wanted)
    odd = [k for k in {**there, **now} if there.get(k) != now.get(k)]
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


def _record_environment(
    folder: RunFolder, attempt: int, data_folder: Path, settings: dict[str, str]
) -> None:
    """env.json: what the run ran on; the newest attempt's, with the earlier ones below."""
    import numpy
    import safetensors
    import torch

    before = folder.read_json("env.json")
    folder.write_json(
        "env.json",
        {
            "attempt": attempt,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "safetensors": safetensors.__version__,
            },
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": host.cpu_name(),
            "usable_cores": host.usable_cores(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "thread_settings": settings,
            "process_start": host.process_start(),
            "code_sha256": code_sha256(),
            "git": _git_commit(),
            "data_folder": str(data_folder.resolve()),
            "earlier_attempts": [] if before is None else [*before.pop("earlier_attempts"), before],
        },
    )


def code_sha256() -> str:
    """sha256 over the package's own source files, names and contents."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git_commit() -> str | None:
    """The commit of the source, where it runs from a checkout and git is there."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


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

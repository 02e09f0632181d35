"""The first half of the main job: asked, solved. What `plan`, `run` and `train` are made of.

words ──asked──▶ Run ──solved──▶ Plan ──spending.py──▶ run folder
"""

import dataclasses
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tuppence import bucket, config, corpus, host, origin, recipes
from tuppence.config import DataPlan, Interval, Plan, Run, TasksPlan, Train, Warning
from tuppence.errors import DoesNotFit, UserError
from tuppence.folder import RunFolder, find
from tuppence.held import Held
from tuppence.plan import hardware
from tuppence.plan.asked import check_budget, check_trainable, check_values, solve_track
from tuppence.plan.solve import solve

NOTES = ("data_estimated", "plan_only", "not_exportable")


def say(text: str) -> None:
    """To the person; stdout belongs to --json."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---------------------------------------------------------------- asked


def asked(args: Namespace) -> Run:
    """The run that the words ask for: a recipe (the first word without `=`), then overrides."""
    words = list(args.words)
    spec = words.pop(0) if words and "=" not in words[0] else recipes.DEFAULT
    run = named(config.override(recipes.get(spec), words), spec)
    where = run.train.init_from
    if where is None or not host.rank() or origin.is_here(where):
        run = origin.started(run, _begun(args, run))  # another node has them from the lead
    corpus.refuse_unprepared(run.data.source or "")
    check_values(run)
    check_trainable(run)
    check_budget(run.budget)
    return run


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
    folder = RunFolder(runs_root(args) / str(run.name))
    goes_on = run.train.init_from is not None and folder.exists() and not args.fresh
    return folder.run() if goes_on else None


def runs_root(args: Namespace) -> Path:
    """The folder that holds the runs here: as given, or the local side of a bucket's."""
    if re.match(r"[A-Za-z]\w+:/", args.runs) and not bucket.is_url(args.runs):
        raise UserError(f"--runs {args.runs}: neither a folder nor a URL such as s3://bucket/runs")
    return bucket.local_root(args.runs) if bucket.is_url(args.runs) else Path(args.runs)


def run_of(args: Namespace, which: str | None = None) -> RunFolder:
    """The run that a person means, here or on a bucket, whose documents and checkpoint `which` are
    brought here to be looked at. Raises UserError, listing what is there."""
    if bucket.is_url(args.run):
        return bucket.fetched(args.run, which)
    if bucket.is_url(args.runs):
        return bucket.fetched(f"{args.runs.rstrip('/')}/{args.run}", which)
    return find(args.run, Path(args.runs))


def threads_of(run: Run) -> int:
    """CPU threads to use: as asked, or one for each core this process may run on, shared with the
    other ranks of this machine."""
    cores = max(1, host.usable_cores() // host.local_world())
    threads = run.machine.threads if run.machine.threads is not None else cores
    if threads < 1:
        raise UserError(f"machine.threads={threads}: at least 1")
    return threads


# ---------------------------------------------------------------- solved


def solved(
    run: Run,
    data: DataPlan,
    *,
    spent_seconds: float | None = None,
    quick: float | None = None,
    held: Held | None = None,
) -> Plan:
    """The plan on this machine, measuring what was not measured before (a few seconds, once).

    `spent_seconds` is what was charged already, in place of the start-up a run usually takes. A
    step that is expected to take longer than `quick` seconds is not measured. A rented machine is
    `held` before the process began, and after its end.
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
    plan = _solved(run, data, known, spent_seconds, held)
    slow = quick is not None and plan.predicted.step_seconds.mid > quick
    if plan.predicted.basis == "roofline" and not slow:
        from tuppence.train import calibrate

        say("measuring this plan's step in each precision and attention (once per shape)")
        known = calibrate.measure_step(plan, known)
        hardware.save_calibration(known)
        plan = _solved(run, data, known, spent_seconds, held)
    return plan


def _solved(
    run: Run,
    data: DataPlan,
    known: hardware.Calibration,
    spent: float | None,
    held: Held | None,
) -> Plan:
    around = {} if held is None else _around(held)
    started = known.startup_seconds + sum(around.values())
    if spent is not None:
        started = max(started, spent + around.get("idle", 0.0))
    known = dataclasses.replace(known, startup_seconds=started)
    ranks, here = host.world_size(), host.local_world()
    plan = _beside_start(solve(run, data, known, ranks=ranks, nodes=-(-ranks // here)), around)
    where = run.train.init_from
    return plan if where is None else dataclasses.replace(plan, init=origin.pinned(where))


def _around(held: Held) -> dict[str, float]:
    """Seconds by phase that a rented machine is paid before this process and after it."""
    start = host.process_start()
    before = {phase: end - begun for phase, begun, end in held.phases(start)}
    return before | {"idle": held.tail_seconds}


def _beside_start(plan: Plan, around: dict[str, float]) -> Plan:
    """The plan with its start-up told by phase: what the machine did around the process."""
    phases = dict(plan.predicted.phase_seconds)
    for phase, seconds in around.items():
        if phase != "provision" and seconds:
            phases["provision"] -= seconds
            phases[phase] = phases.get(phase, 0.0) + seconds
    predicted = dataclasses.replace(plan.predicted, phase_seconds=phases)
    return dataclasses.replace(plan, predicted=predicted)


def on_this_machine(plan: Plan, wanted: Run) -> Plan:
    """The frozen plan with the ranks, cores and price of this attempt, the places of its tasks, and
    who else is told its figures.

    What a run learns depends on none of them; how fast, and for what money, does.
    """
    tasks, track = _found_here(plan.tasks, wanted.train), solve_track(wanted.train)
    plan = dataclasses.replace(plan, tasks=tasks, track=track)
    world, machine, step = host.world_size(), plan.machine, plan.step
    nodes = -(-world // host.local_world())
    price = wanted.machine.usd_per_hour
    if price is not None:
        machine = dataclasses.replace(machine, usd_per_hour=price * nodes)
    elif nodes != machine.nodes:
        each = machine.usd_per_hour / machine.nodes
        machine = dataclasses.replace(machine, usd_per_hour=each * nodes)
    machine = dataclasses.replace(machine, nodes=nodes)
    threads = threads_of(wanted) if machine.device == "cpu" else machine.threads
    if world == step.ranks and threads == machine.threads:
        return dataclasses.replace(plan, machine=machine)
    times = world * threads / (step.ranks * machine.threads)
    rows = step.batch_sequences // world // step.micro_batch
    alone = machine.device != "cpu" or machine.compile or machine.parallel == "fsdp"
    workers = 1 if alone else max(1, min(threads, rows))
    seconds = plan.predicted.step_seconds
    return dataclasses.replace(
        plan,
        machine=dataclasses.replace(
            machine,
            threads=threads,
            peak_tflops=machine.peak_tflops * times,
            peak_source=f"{machine.peak_source}, times {times:g} as many cores or GPUs",
        ),
        step=dataclasses.replace(step, ranks=world, workers=workers),
        predicted=dataclasses.replace(
            plan.predicted,
            step_seconds=Interval(seconds.low / times, seconds.mid / times, seconds.high / times),
            eval_seconds=plan.predicted.eval_seconds / times,
        ),
        tasks=None if plan.tasks is None else plan.tasks.times_as_fast(times),
    )


def _found_here(tasks: TasksPlan | None, wanted: Train) -> TasksPlan | None:
    """The tasks of a run where this attempt was told that they lie."""
    if tasks is None:
        return None
    places = {"core": wanted.core_data, "hellaswag": wanted.hellaswag_data}
    return TasksPlan(
        tuple(dataclasses.replace(suite, data=places[suite.name]) for suite in tasks.suites)
    )


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

"""What each verb does: the parts, put together. Every verb returns its `--json` document.

`run` is the main job from top to bottom: asked, solved, spent, told.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tuppence import config, host, recipes, report
from tuppence.config import DataPlan, Plan, Run
from tuppence.errors import DoesNotFit, UserError
from tuppence.folder import RunFolder, RunLock, find
from tuppence.plan import hardware
from tuppence.plan.describe import options_document, plan_text
from tuppence.plan.solve import check_budget, check_supported, solve

Document = dict[str, Any]
STOP_SECONDS = 0.3  # charged in advance for the exit after an interruption


def say(text: str) -> None:
    """To the person; stdout belongs to --json."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---------------------------------------------------------------- asked


def asked(args: Namespace) -> Run:
    """The run that the words ask for: a recipe (the first word without `=`), then overrides."""
    words = list(args.words)
    spec = words.pop(0) if words and "=" not in words[0] else recipes.DEFAULT
    run = config.override(recipes.get(spec), words)
    name = run.name or spec.rpartition(":")[2]
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"name={name}: a name is one word that can name a folder")
    if run.data.source is None:
        raise UserError("data.source is not set; say data.source='texts/*.txt' or a corpus's name")
    run = dataclasses.replace(run, name=name)
    check_supported(run)
    check_budget(run.budget)
    return run


def threads_of(run: Run) -> int:
    """CPU threads to use: as asked, or one for each core this process may run on."""
    threads = run.machine.threads if run.machine.threads is not None else host.usable_cores()
    if threads < 1:
        raise UserError(f"machine.threads={threads}: at least 1")
    return threads


# ---------------------------------------------------------------- solved


def surveyed(run: Run) -> DataPlan:
    """The corpus as a cheap look at it tells."""
    from tuppence.data.split import default_val_tokens
    from tuppence.data.survey import survey

    data = run.data
    seen = survey(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        text_field=data.text_field or "text",
    )
    val = data.val_tokens if data.val_tokens is not None else default_val_tokens(seen.tokens)
    train = max(0, seen.tokens - val)
    return DataPlan(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        text_field=data.text_field or "text",
        max_tokens=data.max_tokens,
        val_tokens_asked=data.val_tokens,
        vocab_size=seen.vocab_size,
        train_tokens=min(train, data.max_tokens) if data.max_tokens else train,
        val_tokens=val,
        bytes_per_token=seen.bytes / max(1, seen.tokens),
        inputs_sha256=None,
        exact=seen.exact,
    )


def prepared(run: Run, root: Path, *, fresh: bool, tick: Any = None) -> tuple[Any, DataPlan]:
    """Shards on disk (made now or found), and the corpus as their manifest tells."""
    from tuppence.data.prepare import Progress, prepare
    from tuppence.live import Live

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


def solved(run: Run, data: DataPlan) -> Plan:
    """The plan on this machine, measuring what was not measured before (a few seconds, once)."""
    device = "cpu" if run.machine.gpu == "cpu" else None
    threads = threads_of(run)
    known = hardware.load_calibration(device or "cpu", threads) if device == "cpu" else None
    if known is None:
        device = device or _device(run)
        known = hardware.load_calibration(device, threads)
    assert device is not None
    if known is None:
        from tuppence.train import calibrate

        say("measuring this machine (once; tuppence calibrate repeats it)")
        known = calibrate.measure_machine(device, threads)
        hardware.save_calibration(known)
    plan = solve(run, data, known)
    if plan.predicted.basis == "roofline":
        from tuppence.train import calibrate

        say("measuring this plan's step in each precision and attention (once per shape)")
        known = calibrate.measure_step(plan, known)
        hardware.save_calibration(known)
        plan = solve(run, data, known)
    return plan


def _device(run: Run) -> str:
    """Which device torch has here. Looks for an NVIDIA driver first: importing torch takes seconds."""
    if not (Path("/proc/driver/nvidia").exists() or sys.platform == "win32"):
        return "cpu"
    from tuppence.train import calibrate

    return calibrate.pick_device(run.machine.gpu)


def refuse_warnings(plan: Plan, args: Namespace) -> None:
    """`--strict` turns warnings into a refusal."""
    if args.strict and plan.warnings:
        raise DoesNotFit("--strict: " + "; ".join(f"{w.code}: {w.message}" for w in plan.warnings))


def plan(args: Namespace) -> Document:
    """The plan of a run, before anything is spent."""
    run = asked(args)
    host.settle_threads(threads_of(run))
    found = solved(run, surveyed(run))
    refuse_warnings(found, args)
    if not args.json:
        print(plan_text(found))
    return options_document(run, found)


# ---------------------------------------------------------------- spent


def prepare(args: Namespace) -> Document:
    """Text to token shards."""
    run = asked(args)
    made, _ = prepared(run, Path(args.data), fresh=args.fresh)
    manifest = made.manifest
    if not args.json:
        done = "already there" if made.reused else "done"
        print(
            f"{made.folder}: {done}; {manifest.documents:,} documents, {manifest.tokens:,} tokens "
            f"({manifest.train_tokens:,} train, {manifest.val_tokens:,} val), "
            f"{manifest.bytes_per_token:.2f} bytes a token, vocabulary {manifest.vocab_size:,}"
        )
    document = dataclasses.asdict(manifest)
    return {"folder": str(made.folder), "reused": made.reused, "manifest": document}


def train(args: Namespace) -> Document:
    """Training alone; the receipt is a verb of its own."""
    folder, done = spend(args)
    if done:
        say(f"{folder.path} is finished; nothing to do (--fresh starts over)")
    rows = folder.latest("evals")
    return {"run": str(folder.path), "finished": True, "evals": rows[-1:]}


def run(args: Namespace) -> Document:
    """The main job: plan, prepare, train, evaluate, sample, receipt."""
    folder, done = spend(args)
    if done:
        say(f"{folder.path} is finished; this is its receipt (--fresh starts over)")
        told = report.build(folder)
    else:
        told = report.write(folder)
    if not args.json:
        print(report.as_text(told))
    return told


def spend(args: Namespace) -> tuple[RunFolder, bool]:
    """Take the run to its end, from wherever it is; True where it was there already."""
    wanted = asked(args)
    settings = host.settle_threads(threads_of(wanted))
    folder = RunFolder(Path(args.runs) / str(wanted.name))
    if args.fresh and folder.path.exists():
        say(f"--fresh: {folder.path} is kept as {_set_aside(folder.path)}")
    if folder.exists():
        _check_same_run(folder, wanted)
        if any(event["code"] == "end" for event in folder.rows("events")):
            return folder, True
    draft = None
    if not folder.file("plan.json").exists():
        draft = solved(wanted, surveyed(wanted))  # may refuse; nothing is written before
        refuse_warnings(draft, args)
    folder.path.mkdir(parents=True, exist_ok=True)
    with RunLock(folder):
        _attempt(args, wanted, folder, draft, settings)
    return folder, False


def _attempt(
    args: Namespace, wanted: Run, folder: RunFolder, draft: Plan | None, settings: dict[str, str]
) -> None:
    """One attempt, charged from the process's start to its end."""
    from tuppence.ledger import Meter

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
    try:
        if not folder.exists():
            folder.write_json("run.json", dataclasses.asdict(wanted))
        with meter.phase("prepare"):
            made, data = prepared(wanted, Path(args.data), fresh=False, tick=meter.beat)
        if draft is not None:
            frozen = draft if data == draft.data else solved(wanted, data)
            _freeze(folder, frozen)
        elif data.inputs_sha256 != frozen.data.inputs_sha256:
            raise UserError(
                f"data.source={data.source} has changed since {folder.path} was planned; restore "
                f"it, or train another run (name=... or --fresh)"
            )
        say(plan_text(frozen))
        _record_environment(folder, attempt, made.folder, settings)

        from tuppence.train.loop import train as train_loop

        train_loop(frozen, folder, made.folder, meter=meter, attempt=attempt)
        folder.event("end", "finished", attempt=attempt, peak_memory_gib=host.peak_rss_gib())
        allowance = frozen.cadence.finish_seconds
    finally:
        meter.close(allowance=allowance)
        folder.close()
    _learn(frozen, folder)


def _freeze(folder: RunFolder, found: Plan) -> None:
    folder.write_json("plan.json", dataclasses.asdict(found))
    words = shlex.join(["tuppence", *sys.argv[1:]])
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
            "data_folder": str(data_folder),
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


def _learn(done: Plan, folder: RunFolder) -> None:
    """Keep the step time that this run really had, for the next plan of the same shape."""
    kept = hardware.load_calibration(done.machine.device, done.machine.threads)
    rows = folder.latest("metrics")
    if kept is None or len(rows) < 20:
        return
    seconds = sorted(row["step_seconds"] for row in rows)[len(rows) // 2]
    key = hardware.shape_key(done.model, done.step.micro_batch)
    same = [
        t
        for t in kept.timings.get(key, ())
        if (t.precision, t.attention) == (done.machine.precision, done.machine.attention)
    ]
    if not same:
        return
    micro = (seconds - same[-1].update_seconds) / done.step.accumulation
    if micro <= 0:
        return
    learned = dataclasses.replace(same[-1], micro_seconds=micro, source="seen in a run")
    hardware.save_calibration(kept.with_timings(key, [learned]))


# ---------------------------------------------------------------- told


def receipt(args: Namespace) -> Document:
    """Render the receipt of a run folder; reads nothing else."""
    folder = find(args.run, Path(args.runs))
    told = report.write(folder)
    if not args.json:
        print(report.as_text(told))
    return told


def evaluate(args: Namespace) -> Document:
    """Loss and bits per byte of a checkpoint on the whole val split."""
    if args.tasks != "bpb":
        raise UserError(f"--tasks {args.tasks}: this version has bpb")
    folder, found, model, tokenizer = _load(args)
    from tuppence import evals
    from tuppence.checkpoint import choose
    from tuppence.data.loader import val_windows
    from tuppence.train.step import autocast_for

    recorded = folder.read_json("env.json")
    data_folder = Path(recorded["data_folder"]) if recorded else Path("?")
    if not (data_folder / "manifest.json").exists():
        raise UserError(
            f"the shards of this run are not at {data_folder}; tuppence prepare makes them"
        )
    windows = val_windows(data_folder, sequence_len=found.model.sequence_len)
    result = evals.evaluate(
        model,
        windows.batches(found.cadence.eval_batch),
        of_tokens=windows.tokens,
        token_bytes=tokenizer.token_bytes(),
        device=found.machine.device,
        autocast=autocast_for(found.machine.device, found.machine.precision),
    )
    assert result is not None
    path = choose(folder, args.checkpoint)
    document = {"run": str(folder.path), "checkpoint": path.name, "split": "val"}
    document |= dataclasses.asdict(result)
    if not args.json:
        bits = f", {result.bpb:.4f} bits per byte" if result.bpb is not None else ""
        print(
            f"{path.name}: val loss {result.loss:.4f} nats per token{bits} ({result.tokens:,} tokens)"
        )
    return document


def sample(args: Namespace) -> Document:
    """Continue a prompt."""
    if args.tokens < 1 or args.temperature < 0 or args.top_k < 1:
        raise UserError("--tokens and --top-k are at least 1, --temperature at least 0")
    _, found, model, tokenizer = _load(args)
    from tuppence import evals
    from tuppence.train.step import autocast_for

    prompt = tokenizer.encode(args.prompt).tolist()
    if not prompt:
        raise UserError("the prompt has no tokens; give at least one character")
    ids = evals.generate(
        model,
        prompt,
        new_tokens=args.tokens,
        context=found.model.sequence_len,
        device=found.machine.device,
        autocast=autocast_for(found.machine.device, found.machine.precision),
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        stop=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
    )
    text = tokenizer.decode(ids)
    if not args.json:
        print(text)
    return {
        "prompt": args.prompt,
        "text": text,
        "tokens": len(ids) - len(prompt),
        "seed": args.seed,
    }


def _load(args: Namespace) -> tuple[RunFolder, Plan, Any, Any]:
    """A run's folder, plan, model with a checkpoint's weights, and tokenizer."""
    folder = find(args.run, Path(args.runs))
    found = folder.plan()
    host.settle_threads(found.machine.threads)
    import torch

    from tuppence import checkpoint
    from tuppence.data.tokenizer import load_tokenizer
    from tuppence.model import build

    torch.set_num_threads(found.machine.threads)
    model = build(found.model, attention=found.machine.attention)
    checkpoint.load(checkpoint.choose(folder, args.checkpoint), model)
    model.to(found.machine.device).eval()
    return folder, found, model, load_tokenizer(folder.tokenizer)


# ---------------------------------------------------------------- the rest


def list_recipes(args: Namespace) -> Document:
    """The shipped recipes and what they ask."""
    known = recipes.all_recipes()
    if not args.json:
        for name, recipe in known.items():
            print(f"{name:12s} {(recipe.__doc__ or '').strip().splitlines()[0]}")
            print("             " + " ".join(f"{k}={v}" for k, v in config.asked(recipe()).items()))
    return {name: config.asked(recipe()) for name, recipe in known.items()}


def list_runs(args: Namespace) -> Document:
    """The runs of the runs folder, newest last."""
    rows = []
    for path in sorted(Path(args.runs).glob("*/run.json"), key=lambda p: p.stat().st_mtime):
        folder = RunFolder(path.parent)
        from tuppence.ledger import spent

        last = folder.latest("evals")[-1:]
        ended = any(e["code"] == "end" for e in folder.rows("events"))
        rows.append(
            {
                "name": path.parent.name,
                "finished": ended,
                "usd": spent(folder).usd,
                "val_loss": last[0]["loss"] if last else None,
            }
        )
    if not args.json:
        for row in rows:
            loss = f"val loss {row['val_loss']:.4f}" if row["val_loss"] is not None else ""
            state = "finished" if row["finished"] else "unfinished"
            print(f"{row['name']:24s} {state:10s} ${row['usd']:.4f}  {loss}")
        if not rows:
            print(f"no runs in {args.runs}/; tuppence run makes one")
    return {"runs": rows}


def calibrate(args: Namespace) -> Document:
    """Measure this machine anew and keep the numbers."""
    threads = args.threads or host.usable_cores()
    if threads < 1:
        raise UserError(f"--threads {threads}: at least 1")
    host.settle_threads(threads)
    from tuppence.train import calibrate as measure

    device = args.device or measure.pick_device(None)
    started = time.monotonic()
    found = measure.measure_machine(device, threads)
    path = hardware.save_calibration(found)
    if not args.json:
        rates = ", ".join(f"{name} {rate:.3f}" for name, rate in found.matmul_tflops.items())
        print(
            f"{found.name}, {found.threads} threads\n"
            f"  matmul ceiling  {rates} TFLOPS\n"
            f"  memory          {found.memory_gbs:.1f} GB/s, {found.memory_gib:.1f} GiB\n"
            f"  disk            {found.disk_write_mbs:.0f} MB/s written and flushed\n"
            f"  start-up        {found.startup_seconds:.1f} s\n"
            f"measured in {time.monotonic() - started:.1f} s, kept in {path}"
        )
    return json.loads(config.to_json(found))  # type: ignore[no-any-return]


VERBS = {
    "run": run,
    "plan": plan,
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "receipt": receipt,
    "recipes": list_recipes,
    "runs": list_runs,
    "calibrate": calibrate,
}

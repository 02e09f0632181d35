"""What each verb does. Every one returns the document that `--json` prints."""

import dataclasses
import json
import shlex
import textwrap
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tuppence import bucket, config, host, planning, recipes, subjects
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.live import printable
from tuppence.pipeline import (
    refuse_warnings,
    run_of,
    say,
)
from tuppence.plan import hardware
from tuppence.plan.prices import price_book
from tuppence.plan.table import book_text, guide_text
from tuppence.spending import spend

Document = dict[str, Any]


def plan(args: Namespace) -> Document:
    """The plan of a run, before anything is spent: here, and on every machine in the price book."""
    if args.as_published:
        return _as_published(args)
    target = _writable(args.plot)
    found = planning.planned(args)
    for each in found:
        refuse_warnings(each.warnings, args)
    if len(found) > 1:
        if target is not None:
            raise UserError(f"--plot {target}: a picture is of one run; name one recipe")
        if not args.json:
            print(planning.compared(found))
        return {
            "compared": [planning.as_document(each) for each in found],
            "warnings": [dataclasses.asdict(w) for w in planning.incomparable(found)],
        }
    if target is not None:
        target.write_text(planning.drawn(found[0]), encoding="utf-8")
        say(f"--plot: {target}")
    if not args.json:
        print(planning.text(found[0], every=args.all))
    return planning.as_document(found[0])


def _writable(plot: str | None) -> Path | None:
    """Where a picture goes; checked before the work that it is of."""
    if plot is None:
        return None
    target = Path(plot)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--plot {plot}: name a file in a folder that is there, such as plan.svg")
    return target


def _as_published(args: Namespace) -> Document:
    """A guide's figures from its own premises, beside what arithmetic says."""
    from tuppence.plan.guides import RECIPES, guide

    told = guide(args.words[0]) if len(args.words) == 1 else None
    if told is None:
        raise UserError(
            f"--as-published {' '.join(args.words)}: name one recipe that stands for a published "
            f"guide, and nothing more: {', '.join(RECIPES)}"
        )
    if not args.json:
        print(guide_text(told))
    return dataclasses.asdict(told)


def prepare(args: Namespace) -> Document:
    """Text to token shards."""
    from tuppence import preparing

    return preparing.prepare(args)


def train(args: Namespace) -> Document:
    """Training alone; the receipt is a verb of its own."""
    folder, done = spend(args)
    if done:
        say(f"{folder.path} is finished; nothing to do (--fresh starts over)")
    rows = folder.latest("evals")
    return {"run": str(folder.path), "finished": True, "evals": rows[-1:]}


def run(args: Namespace) -> Document:
    """The main job: plan, prepare, train, evaluate, sample, receipt."""

    def finish(folder: RunFolder) -> None:
        from tuppence import report  # numpy and pyarrow, which the start of a run need not wait for

        report.kept(folder)  # what hinders it is said where it is shown

    folder, done = spend(args, finish=finish)
    if done:
        say(f"{folder.path} is finished; this is its receipt (--fresh starts over)")
    return _told(args, folder)


def receipt(args: Namespace) -> Document:
    """Render the receipt of a run folder; reads nothing else."""
    return _told(args, run_of(args))


def _told(args: Namespace, folder: RunFolder) -> Document:
    """Write the receipt and show it."""
    from tuppence import report

    told, why = report.kept(folder)
    if why:
        say(f"{folder.file('receipt.html')} and the files beside it are not renewed: {why}")
    if not args.json:
        print(report.as_text(told))
        name = told["name"]
        if bucket.is_url(args.runs):
            name = f"{args.runs.rstrip('/')}/{name}"
        elif bucket.is_url(getattr(args, "run", "")):
            name = args.run
        speak = f'tuppence sample {shlex.quote(name)} "a prompt"'
        print(f"more      {folder.file('receipt.html')}; {speak}")
    return told


def evaluate(args: Namespace) -> Document:
    """A run's checkpoint or a model of transformers, asked by the suites of the field."""
    from tuppence import evaluating

    return evaluating.evaluate(args)


def compare(args: Namespace) -> Document:
    """Runs side by side."""
    from tuppence import comparing

    return comparing.compare(args)


def sample(args: Namespace) -> Document:
    """Continue a prompt."""
    if args.tokens < 1 or args.temperature < 0 or args.top_k < 1:
        raise UserError("--tokens and --top-k are at least 1, --temperature at least 0")
    folder = run_of(args, args.checkpoint)
    found = folder.plan()
    host.settle_threads(host.usable_cores())
    from tuppence import checkpoint
    from tuppence.evals.generate import generate

    path = checkpoint.choose(folder, args.checkpoint)
    model, tokenizer, device = subjects.loaded(folder, found, path, args)
    workers = subjects.workers_of(model, device, found.machine.precision, cores=1)
    prompt = tokenizer.encode(args.prompt).tolist()
    if not prompt:
        raise UserError("the prompt has no tokens; give at least one character")
    ids = generate(
        workers,
        prompt,
        new_tokens=args.tokens,
        context=found.model.sequence_len,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        stop=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
    )
    text = tokenizer.decode(ids)
    if not args.json:
        print(printable(text))
    return {
        "prompt": args.prompt,
        "text": text,
        "tokens": len(ids) - len(prompt),
        "seed": args.seed,
    }


# ---------------------------------------------------------------- in and out


def export(args: Namespace) -> Document:
    """A run's weights for transformers, and what reads its format."""
    from tuppence.hub.export import export as write

    folder = run_of(args, args.checkpoint)
    made = write(folder, which=args.checkpoint, out=Path(args.out) if args.out else None)
    if not args.json:
        code = ", trust_remote_code=True" if made.code else ""
        print(f"{made.folder}: {made.architecture}, {', '.join(made.files)}")
        print(f'loads     AutoModelForCausalLM.from_pretrained("{made.folder}"{code})')
    return {
        "folder": str(made.folder),
        "architecture": made.architecture,
        "needs_trust_remote_code": made.code,
        "files": made.files,
    }


def import_weights(args: Namespace) -> Document:
    """Weights of others as a folder that train.init_from takes."""
    from tuppence.hub.load import import_weights as read

    made = read(args.source, name=args.name, parent=Path(args.out))
    if not args.json:
        keys = ", ".join(f"{k} {v}" for k, v in made.origin.document()["model"].items())
        done = "already there" if made.reused else "done"
        print(f"{made.folder}: {done}; {made.origin.architecture}: {keys}")
        print(f"to train  tuppence run train.init_from={made.folder}")
    return {"folder": str(made.folder), "reused": made.reused} | made.origin.document()


# ---------------------------------------------------------------- the rest


def drill(args: Namespace) -> Document:
    """Kill, tear, fill and poison copies of a run; the run itself is only read."""
    from tuppence import drill as drills

    for key, least in (("ranks", 1), ("kills", 1)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key} {value}: at least {least}")
    folder = run_of(args)
    with drills.workplace(folder, keep=args.keep) as work:
        told = drills.drill(
            folder,
            work=work,
            say=say,
            steps=args.steps,
            ranks=args.ranks,
            kills=args.kills,
            seed=args.seed,
        )
    if not args.json:
        print(drills.as_text(told))
        if args.keep:
            print(f"kept      {work}")
    return told


def list_recipes(args: Namespace) -> Document:
    """The shipped recipes and what they ask."""
    known = recipes.all_recipes()
    if not args.json:
        for name, recipe in known.items():
            print(f"{name:20s} {(recipe.__doc__ or '').strip().splitlines()[0]}")
            words = " ".join(f"{k}={v}" for k, v in config.asked(recipe()).items())
            print(textwrap.indent(textwrap.fill(words, 96), "    "))
    return {name: config.asked(recipe()) for name, recipe in known.items()}


def watch(args: Namespace) -> Document:
    """A live view of a run."""
    from tuppence import watching

    return watching.watch(args)


def list_runs(args: Namespace) -> Document:
    """The runs of the runs folder, newest last."""
    from tuppence import watching

    return watching.runs(args)


# ---------------------------------------------------------------- rented machines


def launch(args: Namespace) -> Document:
    """The main job on rented machines, or on one that a person has (--ssh)."""
    from tuppence import launching

    return launching.launch(args)


def fetch(args: Namespace) -> Document:
    """A run's folder, back from its store."""
    from tuppence import fetching

    return fetching.fetch(args)


def status(args: Namespace) -> Document:
    """What launches do, have cost and will cost."""
    from tuppence import guarding

    return guarding.status(args)


def logs(args: Namespace) -> Document:
    """What the machines of a launch say."""
    from tuppence import guarding

    return guarding.logs(args)


def stop(args: Namespace) -> Document:
    """End a launch and every machine of it."""
    from tuppence import guarding

    return guarding.stop(args)


def guard(args: Namespace) -> Document:
    """Stop what has spent its money; take down what was left."""
    from tuppence import guarding

    return guarding.guard(args)


# ---------------------------------------------------------------- machines and prices


def calibrate(args: Namespace) -> Document:
    """Measure this machine anew and keep the numbers."""
    threads = args.threads or host.usable_cores()
    if threads < 1:
        raise UserError(f"--threads {threads}: at least 1")
    host.settle_threads(threads)
    from tuppence.train import calibrate as measure

    device = args.device or measure.pick_device()
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


def prices(args: Namespace) -> Document:
    """The price book, and what is doubtful about it."""
    if args.refresh:
        from tuppence.plan.skypilot import refresh_from_skypilot

        say(f"{len(refresh_from_skypilot())} machines taken from SkyPilot's catalog")
    book = price_book(Path(args.prices) if args.prices else None)
    if not args.json:
        print(book_text(book))
    return {
        "offers": [dataclasses.asdict(offer) for offer in book.offers],
        "problems": [problem._asdict() for problem in book.problems],
    }


VERBS = {
    "run": run,
    "plan": plan,
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "receipt": receipt,
    "compare": compare,
    "export": export,
    "drill": drill,
    "launch": launch,
    "status": status,
    "logs": logs,
    "stop": stop,
    "fetch": fetch,
    "guard": guard,
    "import": import_weights,
    "recipes": list_recipes,
    "watch": watch,
    "runs": list_runs,
    "calibrate": calibrate,
    "prices": prices,
}

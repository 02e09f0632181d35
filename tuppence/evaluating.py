"""The verb eval: a checkpoint of a run, or a model of transformers, asked by the field's suites.

    bpb         loss and bits per byte on a val split         RUN/evaluations/CHECKPOINT/bpb.json
    core        CORE's 22 tasks                               core.json       core.jsonl (journal)
    hellaswag   HellaSwag as llm.c scores it                  hellaswag.json  hellaswag.jsonl
    sample      fixed prompts continued                       samples.json
    lm_eval:T   task T of lm-evaluation-harness               lm_eval.json

What was answered before an interruption is not asked again. Suites are asked in fp32, where equal
choices are promised whatever the batch and the ranks; a run's loss on its own val split is taken in
its own precision, as in training.
"""

import dataclasses
import functools
import json
from argparse import Namespace
from pathlib import Path

from tuppence import config, host, subjects
from tuppence.asking import SUITES, Asked, Document, Scene, val_of
from tuppence.errors import UserError
from tuppence.files import write_whole
from tuppence.folder import find
from tuppence.live import Live, duration, printable

TASKS = ("bpb", "core", "hellaswag", "sample")
HARNESS = "lm_eval:"
FILES = {"sample": "samples"}  # what is not named as its task
COMPARED = ("bpb", "core", "hellaswag")
KIND = (  # of other values it is another result, and kept beside the one that is there
    *("metric", "version", "metric_version", "n", "max_per_task", "limit", "own_prompt", "loop"),
    *("weights_sha256", "tokenizer_sha256", "val_sha256", "bundle_sha256", "sha256"),
    *("precision", "context"),
)


class Stopped(Exception):
    """The person stopped it; what was answered stays."""

    exit_code = 130


def evaluate(args: Namespace) -> Document:
    """Ask what `--tasks` names; each result is kept as soon as it is there."""
    _check_who(args)
    asked = tasks_of(args)
    _check(args, asked)
    host.settle_threads(max(1, host.usable_cores() // host.local_world()))
    others = _others(args, asked)
    from tuppence.evals.running import led

    results: dict[str, Document] = {}
    try:
        who = subjects.of_transformers(args) if args.hf else subjects.of_run(args)
        out = Path(args.out) if args.out else who.home / who.name
        scene = Scene(args, asked, who, Live(silent=not who.ranks.lead), out)
        for name in asked.suites:
            found = SUITES[name](scene)
            scene.live.clear()
            keep = functools.partial(_kept, scene, name, found)
            results[name] = led(who.ranks, f"result {name}", keep)
    except KeyboardInterrupt:
        raise Stopped("interrupted; the same command goes on with what is not answered") from None
    document = {**who.told, **results.get("bpb", {}), "results": results}
    if others:
        compare = functools.partial(_compared, scene, results, others)
        document["against"] = led(who.ranks, "against", compare)
    who.ranks.part()
    if not who.ranks.lead:
        raise SystemExit(0)
    return document


# ---------------------------------------------------------------- asked


def tasks_of(args: Namespace) -> Asked:
    """Raises UserError for a task that is none, with what may have been meant."""
    by_itself = "bpb" if args.run or args.val else ""
    if args.tasks is None and not by_itself:
        raise UserError(f"--hf {args.hf}: say what to ask with --tasks; {_there()}")
    asked = by_itself if args.tasks is None else args.tasks
    words = [word.strip() for word in asked.split(",")]
    if "all" in words:
        words += [name for name in TASKS if name != "bpb" or by_itself]
        words = [word for word in words if word != "all"]
    for word in words:
        if word == HARNESS or (word not in TASKS and not word.startswith(HARNESS)):
            raise UserError(f"--tasks {asked}: {_no_task(word)}")
    harness = (word.removeprefix(HARNESS) for word in words if word.startswith(HARNESS))
    return Asked(tuple(t for t in TASKS if t in words), tuple(dict.fromkeys(harness)))


def _there() -> str:
    return f"there are {', '.join(TASKS)}, all and {HARNESS}TASK of lm-evaluation-harness"


def _no_task(word: str) -> str:
    if word in ("", HARNESS):
        return f"no such task; {_there()}"
    near = config.nearest(word, [*TASKS, "all"])
    if "did you mean" in near:
        return f"no task {word!r}{near}"
    return f"no task {word!r}; perhaps {HARNESS}{word}? ({_there()})"


def _check_who(args: Namespace) -> None:
    if bool(args.run) == bool(args.hf):
        fault = "name one of the two" if args.run else "see tuppence eval --help"
        raise UserError(f"eval asks a RUN, or with --hf a model of transformers; {fault}")


def _check(args: Namespace, asked: Asked) -> None:
    """What is wrong with the options, before anything is loaded."""
    for option in ("batch", "max_per_task"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: at least 1")
    if args.val:
        val_of(args)
    elif args.hf and "bpb" in asked.own:
        raise UserError("bpb of a model of transformers: on which text? --val RUN, or a folder")
    for option in subjects.LOOP:
        if args.hf and getattr(args, option) not in (None, False):
            key = option.replace("_", "-")
            raise UserError(f"--{key}: only a looped model of ours has iterations; leave it out")


# ---------------------------------------------------------------- kept and told


def _kept(scene: Scene, name: str, found: Document) -> Document:
    """The result as it is kept and told: one there that differs in kind is set aside."""
    from tuppence.evals.journal import set_aside

    document = scene.who.told | found
    scene.out.mkdir(parents=True, exist_ok=True)
    path = scene.out / f"{FILES.get(name, name)}.json"
    before = _read(path) if path.exists() else None
    if before is not None and any(before.get(key) != document.get(key) for key in KIND):
        set_aside(path)
        before = None
    if before is not None and document.get("asked") == 0:
        document |= {key: before[key] for key in ("asked", "seconds") if key in before}
    if before is not None and name == "lm_eval":
        new = {row["task"] for row in document["tasks"]}
        kept = [row for row in before["tasks"] if row["task"] not in new]
        document["tasks"] = kept + document["tasks"]
    write_whole(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")
    if not scene.args.json:
        print(_text(scene, name, document), flush=True)
    return document


def _read(path: Path) -> Document:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or "metric" not in found:
        raise UserError(f"{path}: not a result of tuppence eval; move it away")
    return found


def _text(scene: Scene, name: str, found: Document) -> str:
    """A result for people."""
    who = found["checkpoint"]
    if name == "bpb":
        bits = f", {found['bpb']:.4f} bits per byte" if found["bpb"] is not None else ""
        return (
            f"{who}: val loss {found['loss']:.4f} nats per token{bits} ({found['tokens']:,} tokens)"
        )
    where = f"{who}, {found['precision']}, {duration(found['seconds'])}: {scene.out}"
    if name == "core":
        from tuppence.evals import core

        return f"{core.table(found)}\n{where}"
    if name == "hellaswag":
        from tuppence.evals import hellaswag

        return f"{hellaswag.table(found)}\n{where}"
    if name == "sample":
        return "\n".join([*map(_said, found["rows"]), where])
    return "\n".join([*_harness_lines(found), where])


def _said(row: Document) -> str:
    return f"--- temperature {row['temperature']:g}\n{printable(row['text'])}"


def _harness_lines(found: Document) -> list[str]:
    return [
        f"{row['task']:32}{row['n'] or '':>8}  {metric} {value['value']}"
        + (f" +- {value['error']:.4f}" if value["error"] is not None else "")
        for row in found["tasks"]
        for metric, value in row["metrics"].items()
    ]


# ---------------------------------------------------------------- against another


def _others(args: Namespace, asked: Asked) -> dict[str, Path]:
    """The results that `--against` names, by suite: one file, a folder of them, or a run's."""
    if args.against is None:
        return {}
    place = Path(args.against)
    if place.is_file():
        metric = _read(place)["metric"]
        if metric not in asked.suites:
            raise UserError(f"--against {args.against} is of {metric}; say --tasks {metric}")
        return {metric: place}
    wanted = [name for name in asked.own if name in COMPARED]
    if not wanted:
        raise UserError(f"--against compares {', '.join(COMPARED)}; name one with --tasks")
    folder, run = place, args.against
    if not any((place / f"{name}.json").exists() for name in wanted):
        other = find(args.against, Path(args.runs))
        from tuppence import checkpoint

        which = args.checkpoint if args.checkpoint in ("best", "last") else "best"
        folder = other.file("evaluations") / checkpoint.choose(other, which).name
    found = {name: folder / f"{name}.json" for name in wanted}
    for name, path in found.items():
        if not path.exists():
            raise UserError(f"--against {run}: no {path}; tuppence eval {run} --tasks {name}")
    return found


def _compared(scene: Scene, results: dict[str, Document], others: dict[str, Path]) -> Document:
    return {name: _against(scene, name, results[name], path) for name, path in others.items()}


def _against(scene: Scene, name: str, mine: Document, path: Path) -> Document:
    """The differences. Raises UserError where the two may not be compared."""
    from tuppence.evals import against

    other = _read(path)
    if why := against.refusal(name, mine, other):
        raise UserError(f"{name} against {path}: {why}")
    found = against.differences(
        name,
        against.Result(mine, scene.out / f"{name}.jsonl"),
        against.Result(other, path.with_suffix(".jsonl")),
    )
    for each in found if not scene.args.json else ():
        error = "" if each.error is None else f" +- {each.error:.4f}"
        print(
            f"{each.score:9} {each.mine:.4f} against {each.other:.4f}: {each.difference:+.4f}"
            f"{error} ({each.how}, n={each.n:,})",
            flush=True,
        )
    return {"result": str(path), "differences": [dataclasses.asdict(each) for each in found]}

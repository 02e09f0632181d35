"""The verb eval: a checkpoint of a run, or a model of transformers, asked by the field's suites.

    bpb         loss and bits per byte on a val split         RUN/evaluations/CHECKPOINT/bpb.json
    core        CORE's 22 tasks                               core.json       core.HASH.jsonl
    hellaswag   HellaSwag as llm.c scores it                  hellaswag.json  hellaswag.HASH.jsonl
    sample      fixed prompts continued                       samples.json
    lm_eval:T   task T of lm-evaluation-harness               lm_eval.json

A journal is of all that its answers depend on, which is what HASH is of: what was answered before
an interruption is not asked again, whatever else was asked in between. All that can be refused is
refused before anything is asked. Suites are asked in fp32, where equal choices are promised
whatever the batch and the ranks; a run's loss on its own val split is taken in its own precision,
as in training.
"""

import dataclasses
import functools
import json
from argparse import Namespace
from pathlib import Path

from tuppence import config, host, subjects
from tuppence.asking import SUITES, Asked, Document, Ready, Scene, bpb_file, val_of
from tuppence.errors import UserError
from tuppence.files import write_whole
from tuppence.folder import find
from tuppence.live import Live, duration, printable

TASKS = ("bpb", "core", "hellaswag", "sample")
HARNESS = "lm_eval:"
USED_BY = {  # options, and the suite that alone reads them
    **{"val": "bpb", "core_data": "core", "hellaswag_data": "hellaswag"},
    **{"lm_eval_include": "lm_eval"},
}
COMPARED = ("bpb", "core", "hellaswag")
KIND = (  # of other values it is another result, and kept beside the one that is there
    *("metric", "version", "metric_version", "n", "max_per_task", "limit", "own_prompt", "loop"),
    *("weights_sha256", "tokenizer_sha256", "val_sha256", "bundle_sha256", "sha256"),
    *("precision", "context", "harness"),
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
    place = _place(args, asked)
    from tuppence.evals.running import led

    results: dict[str, Document] = {}
    try:
        who = subjects.of_transformers(args) if args.hf else subjects.of_run(args)
        out = Path(args.out) if args.out else who.home / who.name
        scene = Scene(args, asked, who, Live(silent=not who.ranks.lead), out)
        ready = {name: SUITES[name](scene) for name in asked.suites}
        others = led(who.ranks, "start", functools.partial(_begun, scene, ready, place))
        for name, suite in ready.items():
            found = suite.ask()
            scene.live.clear()
            keep = functools.partial(_kept, scene, name, suite.file, found)
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
    if args.exit_whole and (args.val or set(asked.suites) - {"bpb", "sample"}):
        raise UserError(
            "--exit-whole: answers would depend on what shares a pass; leave it out, and --exit-kl "
            "stops each token by itself"
        )
    for option, suite in USED_BY.items():
        if getattr(args, option) is not None and suite not in asked.suites:
            word = f"{HARNESS}TASK" if suite == "lm_eval" else suite
            raise UserError(
                f"--{option.replace('_', '-')} is for {word}, which --tasks does not name"
            )
    if args.val:
        val_of(args)
    elif args.hf and "bpb" in asked.own:
        raise UserError("bpb of a model of transformers: on which text? --val RUN, or a folder")
    for option in subjects.LOOP:
        if args.hf and getattr(args, option) not in (None, False):
            key = option.replace("_", "-")
            raise UserError(f"--{key}: only a looped model of ours has iterations; leave it out")


# ---------------------------------------------------------------- kept and told


def _begun(scene: Scene, ready: dict[str, Ready], place: Path | None) -> Document:
    """The results to compare with, by suite. Raises UserError for all that would come too late."""
    try:
        scene.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"results cannot go to {scene.out} ({error.strerror}); name a folder with --out"
        ) from None
    for suite in ready.values():
        path = scene.out / f"{suite.file}.json"
        if path.exists():
            _read(path)
    return {} if place is None else _others(scene, ready, place)


def _kept(scene: Scene, name: str, file: str, found: Document) -> Document:
    """The result as it is kept and told: one there that differs in kind is set aside."""
    from tuppence.evals.journal import set_aside

    document = scene.who.told | found
    path = scene.out / f"{file}.json"
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
    except (ValueError, IsADirectoryError):
        found = None
    if not isinstance(found, dict) or "metric" not in found:
        raise UserError(f"{path}: not a result of tuppence eval; move it away")
    return found


def _text(scene: Scene, name: str, found: Document) -> str:
    """A result for people."""
    who = found["checkpoint"]
    if name == "bpb":
        bits = f", {found['bpb']:.4f} bits per byte" if found["bpb"] is not None else ""
        on = f" on {found['val']}'s val split" if "val" in found else ""
        loss = f"val loss {found['loss']:.4f} nats per token{bits}{on}"
        return f"{who}: {loss} ({found['tokens']:,} tokens)"
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
        f"{row['task']:32}{row['n'] or '':>8}  {metric} {_digits(value['value'])}"
        + (f" +- {_digits(value['error'])}" if value["error"] is not None else "")
        for row in found["tasks"]
        for metric, value in row["metrics"].items()
    ]


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


# ---------------------------------------------------------------- against another


def _place(args: Namespace, asked: Asked) -> Path | None:
    """Where the results are that `--against` names: one file, a folder of them, or a run's."""
    if args.against is None:
        return None
    place, compared = Path(args.against), ", ".join(COMPARED)
    if place.is_file():
        metric = _read(place)["metric"]
        if metric not in COMPARED:
            raise UserError(f"--against {place} is of {metric}; what is compared is {compared}")
        if metric not in asked.own:
            raise UserError(f"--against {place} is of {metric}; say --tasks {metric}")
        return place
    if not any(name in COMPARED for name in asked.own):
        raise UserError(f"--against compares {compared}; name one with --tasks")
    if any(path.name.startswith(COMPARED) for path in place.glob("*.json")):
        return place
    other = find(args.against, Path(args.runs))
    from tuppence import checkpoint

    which = args.checkpoint if args.checkpoint in ("best", "last") else "best"
    return other.file("evaluations") / checkpoint.choose(other, which).name


def _others(scene: Scene, ready: dict[str, Ready], place: Path) -> Document:
    """The other's results as they are now, by suite, and where they are.

    Raises UserError for what is missing or of another kind.
    """
    if place.is_file():
        found = {_read(place)["metric"]: place}
    else:
        wanted = [name for name in ready if name in COMPARED]
        found = {name: _other(scene, place, name, ready[name]) for name in wanted}
    others: Document = {
        name: {"result": str(path), "document": _read(path)} for name, path in found.items()
    }
    for name, other in others.items():
        _check_alike(scene, name, other["document"] | ready[name].known, other)
    return others


def _other(scene: Scene, folder: Path, name: str, ready: Ready) -> Path:
    """A result of the folder; of bits per byte the one on the same text, if it has that."""
    files = [bpb_file(ready.known["val_sha256"])] if name == "bpb" else []
    paths = [folder / f"{file}.json" for file in (*files, name)]
    if path := next(filter(Path.exists, paths), None):
        return path
    against = scene.args.against
    if folder == Path(against):
        raise UserError(f"--against {against}: it has no {name}.json")
    raise UserError(f"--against {against}: no {paths[-1]}; tuppence eval {against} --tasks {name}")


def _check_alike(scene: Scene, name: str, mine: Document, place: Document) -> None:
    """Raises UserError where the two may not be compared; of other texts with what helps."""
    from tuppence.evals import against

    other = place["document"]
    if (why := against.refusal(name, mine, other)) is None:
        return
    remedy = ""
    if name == "bpb" and mine["val_sha256"] != other.get("val_sha256"):
        who = f"--hf {other['model']}" if "model" in other else _called(scene, other["run"])
        text = scene.args.val or _called(scene, scene.args.run)
        remedy = f"; tuppence eval {who} --val {text} first"
    raise UserError(f"{name} against {place['result']}: {why}{remedy}")


def _called(scene: Scene, run: str) -> str:
    """A run as a person names it."""
    path = Path(run)
    return path.name if path.parent == Path(scene.args.runs) else run


def _compared(scene: Scene, results: dict[str, Document], others: Document) -> Document:
    return {name: _against(scene, name, results[name], place) for name, place in others.items()}


def _against(scene: Scene, name: str, mine: Document, place: Document) -> Document:
    """The differences. Raises UserError where the two may not be compared."""
    from tuppence.evals import against

    _check_alike(scene, name, mine, place)
    other = against.Result(place["document"], Path(place["result"]).parent)
    found = against.differences(name, against.Result(mine, scene.out), other)
    for each in found if not scene.args.json else ():
        error = "" if each.error is None else f" +- {each.error:.4f}"
        print(
            f"{each.score:9} {each.mine:.4f} against {each.other:.4f}: {each.difference:+.4f}"
            f"{error} ({each.how}, n={each.n:,})",
            flush=True,
        )
    return {"result": place["result"], "differences": [dataclasses.asdict(each) for each in found]}

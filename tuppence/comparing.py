"""`tuppence compare`: which runs are meant, what may be compared of them, one document of it.

RUN RUN ... ──▶ Side, Side ... ──alike──▶ in what unit, or why not ──beside──▶ document
                                                                                ├─▶ terminal
                                                                                └─▶ page
"""

import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuppence import bucket
from tuppence.compare import alike, beside
from tuppence.compare import tasks as suites
from tuppence.compare.beside import Curve, Side
from tuppence.compare.page import as_html
from tuppence.compare.text import WIDTH, as_text
from tuppence.errors import UserError
from tuppence.folder import RunFolder, write_text
from tuppence.pipeline import run_of, say

Document = dict[str, Any]

MOST = 8  # runs that a table and a picture still hold
PAGE = "compare.html"


def compare(args: Namespace) -> Document:
    """Runs side by side, in the terminal and as a page."""
    words = args.names
    if not 2 <= len(words) <= MOST:
        raise UserError(f"compare {' '.join(words)}: name two to {MOST} runs")
    out = _writable(args.out)
    folders = _folders(args, words)
    page = out or _beside(words[0], folders[0], args.runs)
    sides = [
        beside.side(folder, label, away=_away(word, args.runs))
        for folder, label, word in zip(folders, labels(words), words, strict=True)
    ]
    found = document(sides)
    found["page"] = str(page)
    try:
        write_text(page, as_html(found, sides))
    except OSError as error:  # a full disk, a folder to read only
        if out is not None:
            raise
        found["page"] = None
        say(f"no page: cannot write {page}: {error.strerror}; --out FILE puts it elsewhere")
    if not args.json:
        print(as_text(found, width=shutil.get_terminal_size((WIDTH, 24)).columns))
        print(f"more      {page}" if found["page"] else "")
    return found


def _writable(out: str | None) -> Path | None:
    """Where the page goes; checked before the work that it is of."""
    if out is None:
        return None
    target = Path(out)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that is there, such as {PAGE}")
    return target


def _beside(word: str, first: RunFolder, runs: str) -> Path:
    """Beside the first run's folder; of a run on a bucket here."""
    return Path(PAGE) if _away(word, runs) else first.path.parent / PAGE


def _away(word: str, runs: str) -> bool:
    return bucket.is_url(word) or bucket.is_url(runs)


def _folders(args: Namespace, words: Sequence[str]) -> list[RunFolder]:
    """Each run once, each with something to compare."""
    folders: list[RunFolder] = []
    for word in words:
        folder = run_of(Namespace(run=word, runs=args.runs))
        there = [each.path.resolve() for each in folders]
        if (path := folder.path.resolve()) in there:
            raise UserError(f"{word}: the same run as {words[there.index(path)]}; name two")
        metrics = folder.file("metrics.jsonl")
        if not metrics.exists() or not metrics.stat().st_size:
            raise UserError(f"{word}: no step was taken yet, so there is nothing to compare")
        folders.append(folder)
    return folders


def labels(words: Sequence[str]) -> list[str]:
    """The folders' names; where two have one name, what was typed."""
    names = [Path(word.rstrip("/")).name or word for word in words]
    same = len(set(names)) < len(names)
    return [word if same else name for word, name in zip(words, names, strict=True)]


# ---------------------------------------------------------------- the document


def document(sides: Sequence[Side]) -> Document:
    """All that is compared, as `--json` prints it."""
    names = [one.label for one in sides]
    heads = [one.head for one in sides]
    unit, refused = alike.losses(names, heads)
    curves = [beside.curve(one, unit) for one in sides] if unit else []
    if unit and not all(len(each.value) for each in curves):
        unit, curves, refused = None, [], "an evaluation has no loss, or does not say its dollars"
    same_text = len({one.plan.data.inputs_sha256 for one in sides}) == 1
    noise = beside.final_noise(sides, curves) if unit else None
    tasks, task_warnings = suites.tasks(sides)
    found: Document = {
        "runs": [beside.figures(one) for one in sides],
        "differs": beside.differs(sides),
        "losses": {"unit": unit, "refused": refused, "noise": noise},
        "at_equal": [
            beside.at_equal(sides, curves, axis, train=same_text and unit == "loss")
            for axis in beside.AXES
            if unit
        ],
        "to_reach": beside.to_reach(sides, curves) if unit else None,
        "tasks": tasks,
        "warnings": [],
    }
    found["warnings"] = [
        *_losses_refused(found),
        *_of_curves(sides, curves, found),
        *_of_runs(sides, found),
        *task_warnings,
    ]
    found["said"] = said(found)
    return found


def _losses_refused(found: Document) -> list[Document]:
    """Why no curves are compared."""
    unit, why = found["losses"]["unit"], found["losses"]["refused"]
    if unit == "loss":
        return []
    if unit == "bpb":
        message = "their tokenizers differ, so losses are compared in bits per byte of one text"
        return [alike.warning("losses_in_bits", message)]
    return [alike.warning("losses_not_comparable", f"losses are not compared: {why}")]


def _of_curves(sides: Sequence[Side], curves: Sequence[Curve], found: Document) -> list[Document]:
    """What to keep in mind when losses are read at equal places."""
    why = beside.mid_schedule(found["at_equal"], sides)
    out = [] if why is None else [alike.warning("mid_schedule", why)]
    for each in found["at_equal"]:
        none = [one.label for one, v in zip(sides, each["val"], strict=True) if v is None]
        if none:
            message = f"at equal {beside.NAMES[each['axis']]} no loss is known of "
            message += f"{', '.join(none)}: first evaluated beyond"
            out.append(alike.warning("evaluated_later", message))
    if len({one.plan.data.inputs_sha256 for one in sides}) > 1 and curves:
        message = "training losses are not compared: the runs were trained on other text"
        out.append(alike.warning("other_text", message))
    return out


def _of_runs(sides: Sequence[Side], found: Document) -> list[Document]:
    """Runs that are not finished, evaluations left out; other peaks, prices, machines, code."""
    names, told = [one.label for one in sides], [one.told for one in sides]
    boxes = [each["machine"] for each in told]
    out: list[Document | None] = []
    for one in sides:
        if not one.told["finished"]:
            message = f"{one.label} is not finished ({one.state}): compared as far as it is"
            out.append(alike.warning("unfinished", message))
        if one.left_out:
            message = f"{one.label}: {one.left_out} of its evaluations were cut short or are of "
            out.append(alike.warning("evaluations_left_out", f"{message}another kind: left out"))
    out += [
        alike.peaks(names, boxes),
        alike.prices(names, [each["prices"] for each in told]),
        alike.machines(names, [run["place"] for run in found["runs"]]),
        alike.code(names, [each["hashes"]["code"] for each in told]),
        alike.bytes_a_token(names, [one.plan.data for one in sides]),
    ]
    return [each for each in out if each is not None]


def said(found: Document) -> list[str]:
    """What it comes to, a sentence for each run but the one whose best is the worst."""
    reach = found["to_reach"]
    if reach is None:
        return []
    names, of = [run["label"] for run in found["runs"]], reach["of"]
    worst = names.index(of)
    return [
        f"{name} was down at {of}'s best loss ({reach['loss']:.4f}) with {shares} that {of} took"
        for i, name in enumerate(names)
        if i != worst and (shares := _shares(reach["takes"], i, worst))
    ]


def _shares(takes: Document, i: int, worst: int) -> str:
    """What one took of what the worst did, on each axis."""
    told = [
        f"{each[i] / each[worst]:.0%} of the {beside.NAMES[axis]}"
        for axis, each in takes.items()
        if each[i] is not None and each[worst]
    ]
    return " and ".join(part for part in (", ".join(told[:-1]), told[-1]) if part) if told else ""

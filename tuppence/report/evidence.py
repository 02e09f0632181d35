"""What else a run folder has to say: samples, later results, the machine, hashes, commands."""

import json
import mmap
import shlex
from typing import Any

from tuppence.config import Plan
from tuppence.evals import told as telling
from tuppence.folder import RunFolder
from tuppence.plan.solve import SAMPLE_SHARE
from tuppence.plan.tasks import FIXED_SHARE
from tuppence.report.history import History

Document = dict[str, Any]

_SAMPLE = ("step", "prompt", "text", "temperature", "seed", "fixed")


def samples(folder: RunFolder) -> list[Document]:
    """What was said after the last step that was sampled."""
    last = folder.latest("samples")[-1:]
    rows = [
        row
        for row in folder.rows("samples")
        if last and all(row[key] == last[0][key] for key in ("step", "attempt"))
    ]
    keyed = {(row["prompt"], row.get("temperature"), row.get("fixed")): row for row in rows}
    # by these keys, since a step that was gone back to spoke twice
    return [{key: row.get(key) for key in _SAMPLE} for row in keyed.values()]


def silent(plan: Plan, *, own: bool, fixed: bool) -> list[str]:
    """Why there is no sample, a sentence for each kind."""
    cadence = plan.cadence
    kinds = (
        ("No sample was taken", own, cadence.sample_tokens, SAMPLE_SHARE),
        ("The fixed prompts were not continued", fixed, cadence.fixed_tokens, FIXED_SHARE),
    )
    none = "train.sample_tokens=0, or one token each would take more than {:.0%} of the run"
    late = "the run has not come to it, or its time was up"
    return [
        f"{what}: {late if tokens else none.format(share)}."
        for what, there, tokens, share in kinds
        if not there
    ]


def later(folder: RunFolder) -> tuple[list[Document], list[Document]]:
    """What `tuppence eval` has found since, by checkpoint; and warnings of files that are none."""
    found, others = [], []
    for path in sorted(folder.file("evaluations").glob("*/*.json")):
        where = str(path.relative_to(folder.path))
        try:
            result = {"checkpoint": path.parent.name, **json.loads(path.read_bytes())}
            if result["metric"] != "samples":
                telling.line(result)
                found.append(result)
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            message = f"{where} is no result of tuppence eval: it is left out"
            others.append({"code": "no_result", "message": message})
    return found, others


def tokens_sha(folder: RunFolder, steps: History) -> str | None:
    """The hash of all tokens that were trained on, as the last row that counts has it."""
    step, attempt = int(steps["step"][-1]), int(steps["attempt"][-1])
    row = steps.last
    if (row.get("step"), row.get("attempt")) != (step, attempt):  # what came after was lost
        row = _row(folder, step, attempt)
    return row.get("tokens_sha")


def _row(folder: RunFolder, step: int, attempt: int) -> Document:
    """The last line that an attempt wrote of a step, or nothing; the file may be large."""
    start = json.dumps({"step": step, "attempt": attempt})[:-1].encode() + b","
    with (
        folder.file("metrics.jsonl").open("rb") as lines,
        mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
        at = text.rfind(start)
        return json.loads(text[at : text.find(b"\n", at)]) if at >= 0 else {}


def environment(env: Document) -> Document | None:
    """What the run ran on: the newest attempt's, and what of it differed before. Where data lay on
    that machine is nobody's business."""
    if not env:
        return None
    told = _told(env)
    earlier = [_told(before) for before in env.get("earlier_attempts", ())]
    fields = {key for before in earlier for key in before if before[key] != told.get(key)}
    return {
        **told,
        "thread_settings": env.get("thread_settings"),
        "differed": [
            {key: before[key] for key in before if key in fields | {"attempt"}}
            for before in earlier
            if any(before[key] != told.get(key) for key in before if key != "attempt")
        ],
    }


def _told(env: Document) -> Document:
    keys = ("attempt", "versions", "system", "cpu", "gpu", "usable_cores", "git", "code_sha256")
    return {key: env[key] for key in keys if key in env}


def commands(folder: RunFolder, plan: Plan, *, finished: bool) -> dict[str, str | None]:
    """What to type to have the run again, to go on with it, and to use what it made.

    `resume` is None where nothing is left to do, and both are where the words were not kept.
    """
    typed = _typed(folder)
    words = ["tuppence"] if typed is None else typed
    runs = " ".join(shlex.quote(word) for word in _option(words, "--runs"))
    name = shlex.quote(plan.name)
    after = f" {runs}" if runs else ""
    resume = None if typed is None else _launched(plan) + shlex.join(typed)
    return {
        "reproduce": None if resume is None else f"{resume} --fresh",
        "resume": None if finished else resume,
        "sample": f'tuppence sample {name} "a prompt"{after}',
        "evaluate": f"tuppence eval {name}{after}",
        "export": f"tuppence export {name} --to hf{after}",
        "receipt": f"tuppence receipt {name}{after}",
    }


def _typed(folder: RunFolder) -> list[str] | None:
    """The words that began the run."""
    path = folder.file("argv.txt")
    if not path.exists():
        return None
    try:
        words = shlex.split(path.read_text(encoding="utf-8"))
    except ValueError:  # torn: half a command is worse than none
        return None
    return [word for word in words if word not in ("--fresh", "--json")]


def _option(words: list[str], flag: str) -> list[str]:
    """An option and its value, as they were typed."""
    for place, word in enumerate(words):
        if word == flag:
            return words[place : place + 2]
        if word.startswith(f"{flag}="):
            return [word]
    return []


def _launched(plan: Plan) -> str:
    """What goes before the words where several ranks were planned."""
    ranks, nodes = plan.step.ranks, plan.machine.nodes
    if ranks == 1:
        return ""
    several = f" --nnodes={nodes}" if nodes > 1 else ""
    return f"torchrun{several} --nproc_per_node={ranks // nodes} -m "

"""The receipt as one document: promised, paid, and what it bought."""

import dataclasses
import json
import math
import shlex
from typing import Any

from tuppence.config import Plan
from tuppence.errors import UserError
from tuppence.evals import told as telling
from tuppence.folder import RunFolder
from tuppence.ledger import by_phase, spent
from tuppence.plan.solve import SAMPLE_SHARE
from tuppence.plan.tasks import FIXED_SHARE

SUITES = ("core", "hellaswag")

Document = dict[str, Any]


def build(folder: RunFolder, metrics: list[Document], evals: list[Document]) -> Document:
    """The receipt as one document. Raises UserError where nothing was trained yet."""
    plan = folder.plan()
    if not metrics:
        raise UserError(f"{folder.path}: no step was taken yet, so there is nothing to account for")
    charged = spent(folder)
    tokens, steps = metrics[-1]["tokens"], metrics[-1]["step"]
    events = list(folder.rows("events"))
    last_eval = evals[-1] if evals else None
    best = folder.read_json("checkpoints/best.json")
    best_loss = next((r["loss"] for r in evals if best and r["step"] == best["step"]), None)
    env = folder.read_json("env.json") or {}
    samples = _samples(folder)
    later, others = _later(folder)
    own = [row for row in samples if not row.get("fixed")]
    return {
        "name": plan.name,
        "finished": any(event["code"] == "end" for event in events),
        "attempts": metrics[-1]["attempt"],
        "budget": _budget(
            plan, usd=charged.usd, hours=charged.seconds / 3600, tokens=tokens, steps=steps
        ),
        "usd": charged.usd,
        "predicted": _predicted(plan),
        "intervals": _intervals(plan),
        "actual": _actual(plan, charged.usd, charged.seconds, tokens, metrics, last_eval, events),
        "evaluated": None if last_eval is None else [last_eval["tokens"], plan.data.val_tokens - 1],
        "best": {"step": best["step"] if best else None, "val_loss": best_loss},
        "phases": [
            {"phase": name, "seconds": part.seconds, "usd": part.usd}
            for name, part in by_phase(folder).items()
        ],
        "machine": {
            "name": plan.machine.name,
            "threads": plan.machine.threads,
            "precision": plan.machine.precision,
            "peak_tflops": plan.machine.peak_tflops,
            "peak_source": plan.machine.peak_source,
            "usd_per_hour": plan.machine.usd_per_hour,
            "price_source": plan.machine.price_source,
        },
        "hashes": {
            "code": env.get("code_sha256"),
            "data": plan.data.inputs_sha256,
            "weights": best["sha256"] if best else None,
            "tokens": metrics[-1]["tokens_sha"],
        },
        "tasks": {name: found[-1] for name, found in _by_suite(evals).items()},
        "scores": _by_suite(evals, *_POINT),
        "later": later,
        "sample": own[-1]["text"] if own else None,
        "samples": [{key: row.get(key) for key in _SAMPLE} for row in samples],
        "silent": _silent(plan, own=bool(own), fixed=len(own) < len(samples)),
        "warnings": [dataclasses.asdict(w) for w in plan.warnings] + others,
        "events": [e for e in events if e["code"] not in ("save", "start", "end")],
        "reproduce": _argv(folder),
    }


_POINT = ("step", "score", "acc", "acc_norm", "error", "error_norm", "n")
_SAMPLE = ("prompt", "text", "temperature", "seed", "fixed")


def _by_suite(evals: list[Document], *keys: str) -> dict[str, list[Document]]:
    """Each suite's results in the order of steps: whole, or these keys of them."""
    found = {
        name: [{"step": row["step"], **row[name]} for row in evals if name in row]
        for name in SUITES
    }
    return {
        name: [{key: each[key] for key in keys or each if key in each} for each in results]
        for name, results in found.items()
        if results
    }


def _samples(folder: RunFolder) -> list[Document]:
    """What was said after the last step that was sampled."""
    last = folder.latest("samples")[-1:]
    rows = [
        row
        for row in folder.rows("samples")
        if last and all(row[key] == last[0][key] for key in ("step", "attempt"))
    ]
    keyed = {(row["prompt"], row.get("temperature"), row.get("fixed")): row for row in rows}
    return list(keyed.values())  # a step that was gone back to spoke twice


def _silent(plan: Plan, *, own: bool, fixed: bool) -> list[str]:
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


def _later(folder: RunFolder) -> tuple[list[Document], list[Document]]:
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


def _argv(folder: RunFolder) -> str | None:
    path = folder.file("argv.txt")
    if not path.exists():
        return None
    words = shlex.split(path.read_text(encoding="utf-8"))
    return shlex.join(word for word in words if word not in ("--fresh", "--json"))


def _budget(plan: Plan, **paid: float) -> Document:
    """The limit that ended the run: the one of which most is spent."""
    limits = {k: v for k, v in dataclasses.asdict(plan.budget).items() if v is not None}
    kind = max(limits, key=lambda k: paid[k] / limits[k])
    fraction = paid[kind] / limits[kind]
    return {"kind": kind, "limit": limits[kind], "spent": paid[kind], "fraction": fraction}


def _predicted(plan: Plan) -> Document:
    told = plan.predicted
    bits = None
    if told.val_loss is not None:
        bits = told.val_loss.mid / math.log(2) / plan.data.bytes_per_token
    return {
        "usd": told.usd.mid,
        "hours": told.hours.mid,
        "tokens": told.tokens.mid,
        "step_seconds": told.step_seconds.mid,
        "tokens_per_second": told.tokens_per_second.mid,
        "mfu": told.mfu.mid,
        "peak_memory_gib": told.peak_memory_gib.mid,
        "val_loss": dataclasses.asdict(told.val_loss) if told.val_loss else None,
        "val_bpb": bits,
    }


def _intervals(plan: Plan) -> dict[str, list[float]]:
    """The 80% intervals of what was promised: `[low, high]`."""
    names = ("usd", "tokens", "step_seconds", "tokens_per_second", "mfu", "peak_memory_gib")
    found = {name: getattr(plan.predicted, name) for name in names}
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _actual(
    plan: Plan,
    usd: float,
    seconds: float,
    tokens: int,
    metrics: list[Document],
    last_eval: Document | None,
    events: list[Document],
) -> Document:
    step_seconds = sum(row["step_seconds"] for row in metrics) / len(metrics)
    rate = plan.step.batch_tokens / step_seconds
    peaks = [e["peak_memory_gib"] for e in events if e["code"] == "end"]
    return {
        "usd": usd,
        "hours": seconds / 3600,
        "tokens": tokens,
        "step_seconds": step_seconds,
        "tokens_per_second": rate,
        "mfu": rate * plan.model.flops_per_token / (plan.machine.peak_tflops * 1e12),
        "peak_memory_gib": peaks[-1] if peaks else None,
        "val_loss": last_eval["loss"] if last_eval else None,
        "val_bpb": last_eval["bpb"] if last_eval else None,
    }

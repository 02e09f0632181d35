"""The receipt as one document: promised, paid, and what it bought."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from tuppence.config import Plan
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.ledger import by_phase, charged, worked
from tuppence.report.evidence import commands, environment, later, samples, silent, tokens_sha
from tuppence.report.history import History
from tuppence.report.money import spent_of

SUITES = ("core", "hellaswag")
ORDINARY = ("save", "start", "end")  # events that are counted, and not told one by one
LAST_LOSSES = 20  # steps, of which the summary's training loss is the mean

Document = dict[str, Any]


def build(folder: RunFolder, steps: History) -> Document:
    """The receipt as one document. Raises UserError where nothing was trained yet."""
    plan = folder.plan()
    if not len(steps):
        raise UserError(f"{folder.path}: no step was taken yet, so there is nothing to account for")
    bill, events = charged(folder), _events(folder)
    usd, seconds = sum(r["usd"] for r in bill), sum(r["end"] - r["start"] for r in bill)
    step, tokens = int(steps["step"][-1]), int(steps["tokens"][-1])
    evals = folder.latest("evals")
    last_eval = evals[-1] if evals else None
    best = folder.read_json("checkpoints/best.json")
    best_loss = next((r["loss"] for r in evals if best and r["step"] == best["step"]), None)
    env = folder.read_json("env.json") or {}
    said = samples(folder)
    own = [row for row in said if not row.get("fixed")]
    found, others = later(folder)
    finished = any(event["code"] == "end" for event in events)
    paid = {"usd": usd, "hours": seconds / 3600, "tokens": tokens, "steps": step}
    budget = spent_of(plan, **paid, events=events)
    unspent = _unspent(plan, budget, bill) if finished else None
    typed = commands(folder, plan, finished=finished)
    actual = _actual(plan, usd, seconds, steps, last_eval, events)
    return {
        "name": plan.name,
        "finished": finished,
        "attempts": _attempts(events, steps),
        "budget": budget,
        "usd": usd,
        "predicted": _predicted(plan),
        "intervals": _intervals(plan),
        "actual": actual,
        "summary": _summary(steps, actual),
        "evaluated": None if last_eval is None else [last_eval["tokens"], plan.data.val_tokens - 1],
        "best": {"step": best["step"] if best else None, "val_loss": best_loss},
        "early_stop": _early_stop(events, bill, unspent),
        "unspent": unspent,
        "steps": step,
        "progress": _number(steps["progress"][-1]),
        "period": _period(bill),
        "predicted_phases": _promised_phases(plan),
        "phases": [
            {"phase": name, "seconds": part.seconds, "usd": part.usd}
            for name, part in by_phase(folder, bill).items()
        ],
        "prices": _prices(plan, bill),
        "machine": {
            "name": plan.machine.name,
            "threads": plan.machine.threads,
            "precision": plan.machine.precision,
            "peak_tflops": plan.machine.peak_tflops,
            "peak_source": plan.machine.peak_source,
            "usd_per_hour": plan.machine.usd_per_hour,
            "price_source": plan.machine.price_source,
        },
        "model": _model(plan),
        "env": environment(env),
        "hashes": {
            "code": env.get("code_sha256"),
            "data": plan.data.inputs_sha256,
            "weights": best["sha256"] if best else None,
            "tokens": tokens_sha(folder, steps),
        },
        "evaluations": _evaluations(evals, steps),
        "thrown_away": _thrown_away(folder, evals, steps),
        "tasks": {name: found[-1] for name, found in _by_suite(evals).items()},
        "scores": _by_suite(evals, *_POINT),
        "later": found,
        "sample": own[-1]["text"] if own else None,
        "samples": said,
        "silent": silent(plan, own=bool(own), fixed=len(own) < len(said)),
        "warnings": _warnings(plan, bill) + others,
        "events": [event for event in events if event["code"] not in ORDINARY],
        "event_counts": _counts(events),
        "commands": typed,
        "reproduce": typed["reproduce"],
    }


def _number(value: Any) -> float | None:
    """A column's value; None where its row did not say it."""
    return float(value) if math.isfinite(value) else None


def _events(folder: RunFolder) -> list[Document]:
    """What happened, each with some words."""
    return [{"message": event["code"], **event} for event in folder.rows("events")]


def _warnings(plan: Plan, bill: list[Document]) -> list[Document]:
    """The plan's, and that nothing can be said of what was paid."""
    found = [dataclasses.asdict(warning) for warning in plan.warnings]
    if not bill:
        message = "ledger.jsonl has no line, so what was paid is not known: $0 stands for it"
        found.append({"code": "no_ledger", "message": message})
    return found


# ---------------------------------------------------------------- what was asked and promised


def _model(plan: Plan) -> Document:
    """What was trained, on what."""
    model, data = plan.model, plan.data
    return {
        **{"family": model.family, "params": model.params, "n_layer": model.n_layer},
        **{"n_embd": model.n_embd, "n_head": model.n_head, "sequence_len": model.sequence_len},
        **{"flops_per_token": model.flops_per_token, "source": data.source},
        **{"tokenizer": data.tokenizer, "vocab_size": data.vocab_size},
        **{"train_tokens": data.train_tokens, "val_tokens": data.val_tokens},
        **{"batch_tokens": plan.step.batch_tokens, "optimizer": plan.optimizer.name},
        **{"learning_rate": plan.optimizer.learning_rate, "schedule": plan.schedule.shape},
        "seed": plan.step.seed,
    }


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
    rates = ("step_seconds", "tokens_per_second", "mfu", "peak_memory_gib")
    names = ("usd", "hours", "tokens", *rates)
    found = {name: getattr(plan.predicted, name) for name in names}
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _promised_phases(plan: Plan) -> list[Document]:
    price = plan.machine.usd_per_hour
    return [
        {"phase": name, "seconds": seconds, "usd": seconds / 3600 * price}
        for name, seconds in plan.predicted.phase_seconds.items()
        if seconds > 0
    ]


# ---------------------------------------------------------------- paid


def _unspent(plan: Plan, budget: Document, bill: list[Document]) -> Document:
    """What is left of the budget, and about how many dollars that is: of steps and tokens at what
    training one was promised to cost, at the present price."""
    left = max(0.0, budget["limit"] - budget["spent"])
    price = bill[-1]["usd_per_hour"] if bill else plan.machine.usd_per_hour
    of_step = plan.predicted.step_seconds.mid / 3600 * price
    each = {"usd": 1.0, "hours": price, "steps": of_step}
    each["tokens"] = of_step / plan.step.batch_tokens
    return {"kind": budget["kind"], "amount": left, "usd": left * each[budget["kind"]]}


def _early_stop(
    events: list[Document], bill: list[Document], unspent: Document | None
) -> Document | None:
    """What the event says, what the steps cost that it went back from, and what it has saved."""
    told = [event for event in events if event["code"] == "early_stop"]
    if not told:
        return None
    lost = None
    if "saved_at" in told[-1]:
        lost = worked(bill, told[-1]["saved_at"], told[-1]["time"]).usd
    return {**told[-1], "thrown_away_usd": lost, "unspent": unspent}


def _actual(
    plan: Plan,
    usd: float,
    seconds: float,
    steps: History,
    last_eval: Document | None,
    events: list[Document],
) -> Document:
    step_seconds = float(np.nanmean(steps["step_seconds"]))
    rate = plan.step.batch_tokens / step_seconds
    return {
        "usd": usd,
        "hours": seconds / 3600,
        "tokens": int(steps["tokens"][-1]),
        "step_seconds": step_seconds,
        "tokens_per_second": rate,
        "mfu": rate * plan.model.flops_per_token / (plan.machine.peak_tflops * 1e12),
        "peak_memory_gib": _peak_memory(steps, events),
        "val_loss": last_eval["loss"] if last_eval else None,
        "val_bpb": last_eval["bpb"] if last_eval else None,
    }


def _peak_memory(steps: History, events: list[Document]) -> float | None:
    """As the end told it, else the most that a step did."""
    peaks = [event["peak_memory_gib"] for event in events if event["code"] == "end"]
    if peaks:
        return peaks[-1]  # type: ignore[no-any-return]
    seen = steps["memory_gib"][np.isfinite(steps["memory_gib"])]
    return float(seen.max()) if len(seen) else None


def _summary(steps: History, actual: Document) -> Document:
    """A run in five numbers. The training loss is the mean of the last steps'."""
    losses = steps["loss"][-LAST_LOSSES:]
    losses = losses[np.isfinite(losses)]
    return {
        "iter": int(steps["step"][-1]),
        "lr": _number(steps["lr"][-1]),
        "mfu": actual["mfu"],
        "train_loss": float(losses.mean()) if len(losses) else None,
        "val_loss": actual["val_loss"],
    }


def _attempts(events: list[Document], steps: History) -> int:
    begun = (event["attempt"] for event in events if event["code"] in ("start", "resume"))
    return max(begun, default=int(steps["attempt"][-1]))


def _period(bill: list[Document]) -> Document | None:
    """From the first charged moment to the last, as seconds since the epoch."""
    if not bill:
        return None
    return {"began": min(r["start"] for r in bill), "ended": max(r["end"] for r in bill)}


def _prices(plan: Plan, bill: list[Document]) -> list[Document]:
    """Every price that was charged, since when and by which attempts, and what it came to.

    Where it is from is known of the planned one; another was asked for by a later attempt."""
    out = []
    for price, rows in itertools.groupby(bill, key=lambda row: row["usd_per_hour"]):
        these = list(rows)
        planned = price == plan.machine.usd_per_hour
        out.append(
            {
                "usd_per_hour": price,
                "source": plan.machine.price_source if planned else "asked",
                "since": these[0]["start"],
                "attempts": sorted({row["attempt"] for row in these}),
                "seconds": sum(row["end"] - row["start"] for row in these),
                "usd": sum(row["usd"] for row in these),
            }
        )
    return out


# ---------------------------------------------------------------- bought


_POINT = ("step", "score", "acc", "acc_norm", "error", "error_norm", "n")


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


def _evaluations(evals: list[Document], steps: History) -> list[Document]:
    """Each evaluation that counts: after how much, and of how much."""
    at = [row["step"] for row in evals]
    where = zip(evals, steps.at(at, "tokens"), steps.at(at, "hours"), strict=True)
    return [_evaluation(row, tokens, hours) for row, tokens, hours in where]


def _evaluation(row: Document, tokens: float, hours: float) -> Document:
    return {
        "step": row["step"],
        "attempt": row["attempt"],
        "tokens": int(tokens) if math.isfinite(tokens) else None,
        "usd": row.get("usd"),
        "hours": row.get("hours", _number(hours)),
        "loss": row["loss"],
        "bpb": row.get("bpb"),
        "error": row.get("error"),
        "split": row.get("split", "val"),
        "of": [row["tokens"], row.get("of_tokens", row["tokens"])],
    }


def _thrown_away(folder: RunFolder, evals: list[Document], steps: History) -> Document:
    """Steps and evaluations that do not count: repeated after a kill, or gone back from."""
    kept = {(row["step"], row["attempt"], row["loss"]) for row in evals}
    rows = [r for r in folder.rows("evals") if (r["step"], r["attempt"], r["loss"]) not in kept]
    dropped = steps.dropped
    out = []
    for row in rows:
        same = (dropped["step"] == row["step"]) & (dropped["attempt"] == row["attempt"])
        place = np.flatnonzero(same)[-1:]
        tokens, hours = (
            float(dropped[name][place[0]]) if len(place) else math.nan
            for name in ("tokens", "hours")
        )
        out.append(_evaluation(row, tokens, hours))
    return {"steps": len(dropped.get("step", ())), "evaluations": out}


def _counts(events: list[Document]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in events:
        counts[event["code"]] = counts.get(event["code"], 0) + 1
    return counts

"""The receipt: what was promised against what was paid. A pure reader of the run folder.

plan.json (promised)  +  ledger, metrics, evals, events (paid)  ──▶  receipt.{json,md,html}
"""

import dataclasses
import html
import json
import math
import re
import shlex
from importlib import resources
from typing import Any

from tuppence.config import Interval, Plan
from tuppence.errors import UserError
from tuppence.evals import told as telling
from tuppence.folder import RunFolder, write_text
from tuppence.ledger import by_phase, spent
from tuppence.live import duration, printable
from tuppence.plan.solve import SAMPLE_SHARE
from tuppence.plan.tasks import FIXED_SHARE
from tuppence.plot import loss_plot, score_plot

SUITES = ("core", "hellaswag")

Document = dict[str, Any]


def write(folder: RunFolder) -> Document:
    """Build the receipt and write it as JSON, Markdown and HTML into the run folder."""
    metrics, evals = folder.latest("metrics"), folder.latest("evals")
    told = build(folder, metrics, evals)
    folder.write_json("receipt.json", told)
    write_text(folder.file("receipt.md"), as_markdown(told))
    write_text(folder.file("receipt.html"), as_html(told, metrics, evals))
    return told


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


# ---------------------------------------------------------------- rendering


def rows(told: Document) -> list[tuple[str, str, str]]:
    """(what, promised, paid) for reading."""
    promised, paid = told["predicted"], told["actual"]
    loss = Interval(**promised["val_loss"]) if promised["val_loss"] else None
    loss_text = f"{loss.mid:.3f} ({loss.low:.3f} to {loss.high:.3f})" if loss else "not promised"

    def both(what: str, key: str, form: str) -> tuple[str, str, str]:
        ends = [form.format(end) for end in told["intervals"].get(key, [])]
        spread = f" ({ends[0]} to {ends[1]})" if ends else ""
        return what, _form(promised[key], form) + spread, _form(paid[key], form)

    return [
        both("dollars", "usd", "${:.4f}"),
        ("time", duration(promised["hours"] * 3600), duration(paid["hours"] * 3600)),
        both("tokens", "tokens", "{:,.0f}"),
        both("step", "step_seconds", "{:.4f} s"),
        both("tokens/s", "tokens_per_second", "{:,.0f}"),
        both("MFU", "mfu", "{:.0%}"),
        both("memory", "peak_memory_gib", "{:.2f} GiB"),
        ("val loss", loss_text, _form(paid["val_loss"], "{:.4f} nats/token")),
        ("val tokens", "", _evaluated(told["evaluated"])),
        both("bits/byte", "val_bpb", "{:.3f}"),
        *_task_rows(told["tasks"]),
    ]


def _task_rows(tasks: Document) -> list[tuple[str, str, str]]:
    """A suite's numbers with their errors, and of how many items they are."""
    found = []
    for result in tasks.values():
        name, (first, *more) = telling.name(result), telling.scores(result)
        found += [(name, "", first), *(("", "", score) for score in more)]
        found.append(("", "", f"{result['n']:,} of {result['of_items']:,} items"))
        found.append(("", "", f"{result['precision']}, step {result['step']:,}"))
    return found


def _evaluated(tokens: list[int] | None) -> str:
    """How much of the val split the loss is of."""
    return "-" if tokens is None else "{:,} of {:,}".format(*tokens)


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def headline(told: Document) -> str:
    """One sentence: how much of the budget was spent, and what it bought."""
    budget, unit = told["budget"], {"usd": "${:,.4f}", "hours": "{:,.4f} h"}
    form = unit.get(budget["kind"], "{:,.0f} " + budget["kind"])
    loss = told["actual"]["val_loss"]
    bought = f"; val loss {loss:.4f}" if loss is not None else ""
    state = "" if told["finished"] else " (not finished)"
    return (
        f"{told['name']}{state}: spent {form.format(budget['spent'])} of "
        f"{form.format(budget['limit'])} ({budget['fraction']:.1%}){bought}"
    )


def as_text(told: Document) -> str:
    """The receipt for a terminal."""
    lines = [
        f"receipt   {headline(told)}",
        f"{'':12s}{'promised (80% interval)':>36s}{'paid':>22s}",
    ]
    lines += [f"  {what:10s}{promised:>36s}{paid:>22s}" for what, promised, paid in rows(told)]
    where = ", ".join(
        f"{p['phase']} ${p['usd']:.4f} ({p['seconds']:.1f} s)" for p in told["phases"]
    )
    lines += [f"where     {where}"]
    machine = told["machine"]
    lines += [f"peak      MFU is of {machine['peak_tflops']:.2f} TFLOPS, {machine['peak_source']}"]
    lines += [f"later     {_later_line(result)}" for result in told["later"]]
    if told["sample"]:
        said = printable(told["sample"].strip())
        lines += ["sample    " + said.replace("\n", "\n          ")]
    fixed = [row for row in told["samples"] if row["fixed"] and row["text"]]
    greedy = [row for row in fixed if row["temperature"] == 0]
    lines += [f"prompt    {_in_a_line(row)}" for row in greedy]
    return "\n".join(lines)


def _later_line(result: Document) -> str:
    """What the verb found of a checkpoint."""
    return f"{result['checkpoint']}: {telling.line(result)}"


def _in_a_line(row: Document, *, most: int = 90) -> str:
    """A prompt and what followed it, the line breaks told."""
    said = json.dumps(printable(row["text"]), ensure_ascii=False)
    return said if len(said) <= most else said[: most - 1] + "…"


def _whose(told: Document, result: Document) -> str:
    """Which weights a table is of, and that the verb's are others."""
    best = told["best"]["step"]
    return (
        f"Asked during the run, in {result['precision']}, of step {result['step']:,}; "
        f"tuppence eval asks the best checkpoint{'' if best is None else f' (step {best:,})'} "
        f"in fp32."
    )


def _tables(told: Document) -> list[tuple[str, str]]:
    """Of each suite what was asked, and its table beside what is published, for a fixed-width
    font."""
    if not told["tasks"]:
        return []
    from tuppence.evals import core, hellaswag

    table = {"core": core.table, "hellaswag": hellaswag.table}
    results = told["tasks"].items()
    return [(_whose(told, result), table[name](result)) for name, result in results]


def as_markdown(told: Document) -> str:
    """The receipt as a page of Markdown."""
    table = [f"| {what} | {promised} | {paid} |" for what, promised, paid in rows(told)]
    phases = [f"| {p['phase']} | {p['seconds']:.1f} | {p['usd']:.5f} |" for p in told["phases"]]
    machine, hashes = told["machine"], told["hashes"]
    parts = [
        f"# Receipt: {told['name']}",
        headline(told) + ".",
        "| | promised (80% interval) | paid |\n|---|---:|---:|\n" + "\n".join(table),
        f"MFU is of {machine['peak_tflops']:.2f} TFLOPS, {machine['peak_source']}.",
        "## Where every cent went",
        "| phase | seconds | usd |\n|---|---:|---:|\n" + "\n".join(phases),
        f"{machine['name']}, {machine['threads']} threads, {machine['precision']}, "
        f"${machine['usd_per_hour']:.2f}/h ({machine['price_source']}); "
        f"attempts: {told['attempts']}.",
        "## Best checkpoint",
        f"step {told['best']['step']}, val loss {_form(told['best']['val_loss'], '{:.4f}')}.",
    ]
    if told["tasks"]:
        parts += ["## Tasks", *(f"{whose}\n\n{_fenced(table)}" for whose, table in _tables(told))]
    if told["later"]:
        lines = "\n".join(f"- {_later_line(result)}" for result in told["later"])
        parts += ["## Evaluated later", lines]
    parts += ["## Sample", *told["silent"]]
    parts += [_fenced(told["sample"])] if told["sample"] else []
    for row in (row for row in told["samples"] if row["fixed"]):
        parts += [f"Temperature {row['temperature']:g}:", _fenced(row["text"])]
    notes = [f"- {w['message']} [{w['code']}]" for w in [*told["warnings"], *told["events"]]]
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    parts += ["## Hashes", "\n".join(f"- {k}: `{v}`" for k, v in hashes.items())]
    parts += ["## Again", f"```sh\n{told['reproduce']}\n```"]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    return "```text\n" + text.replace("```", "'''") + "\n```"


def as_html(told: Document, metrics: list[Document], evals: list[Document]) -> str:
    """The receipt as one page: no network, light and dark."""
    train = [(row["tokens"], row["loss"]) for row in metrics if row["loss"] is not None]
    at = {row["step"]: row["tokens"] for row in metrics}
    val = [(at[row["step"]], row["loss"]) for row in evals if row["step"] in at]
    promised = told["predicted"]["val_loss"]
    end = metrics[-1]["tokens"]
    band = ((end, promised["low"]), (end, promised["high"])) if promised else ()
    page = resources.files("tuppence").joinpath("assets/receipt.html").read_text(encoding="utf-8")
    filled = {
        "TITLE": f"Receipt: {told['name']}",
        "HEADLINE": headline(told),
        "MACHINE": "{name}, {threads} threads, {precision}; MFU is of {peak_tflops:.2f} TFLOPS, "
        "{peak_source}; ${usd_per_hour:.2f}/h ({price_source})".format(**told["machine"]),
        "REPRODUCE": told["reproduce"] or "",
        "HASHES": json.dumps(told["hashes"], indent=1),
    }
    tables = {
        "ROWS": _table_rows(rows(told)),
        "PHASES": _table_rows(
            [(p["phase"], f"{p['seconds']:.1f}", f"{p['usd']:.5f}") for p in told["phases"]]
        ),
        "NOTES": "".join(
            f"<li>{html.escape(note['message'])} <code>{note['code']}</code></li>"
            for note in [*told["warnings"], *told["events"]]
        ),
        "PLOT": loss_plot(train, val, x_label="training tokens", band=band),
        "TASKS": _tasks_html(told, at),
        "SAMPLES": _samples_html(told),
    }
    parts = {**{key: html.escape(value) for key, value in filled.items()}, **tables}
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], page)


def _tasks_html(told: Document, tokens_at: dict[int, int]) -> str:
    """Tables, curves where there are several points, and what was evaluated later; or nothing."""
    parts = [
        f'<p class="key">{html.escape(whose)}</p>\n<pre class="table">{html.escape(table)}</pre>'
        for whose, table in _tables(told)
    ]
    for name, points in told["scores"].items():
        key = "score" if name == "core" else "acc_norm"
        error = "error" if name == "core" else "error_norm"
        shown = [
            (float(tokens_at[p["step"]]), p[key], p[error])
            for p in points
            if p["step"] in tokens_at and p[key] is not None
        ]
        if len(shown) > 1:
            label = "CORE" if name == "core" else "HellaSwag acc_norm"
            parts.append(f'<p class="key">{label} with its standard error.</p>')
            parts.append(score_plot(shown, label=label, x_label="training tokens"))
    later = "".join(f"<li>{html.escape(_later_line(each))}</li>" for each in told["later"])
    parts += [f"<p>Evaluated later:</p><ul>{later}</ul>"] if later else []
    return "<h2>Tasks</h2>\n" + "\n".join(parts) if parts else ""


def _samples_html(told: Document) -> str:
    """The run's own, then the fixed prompts greedy and drawn; of the own ones the last."""
    own = [row for row in told["samples"] if not row["fixed"]]
    parts = [f'<p class="key">{html.escape(why)}</p>' for why in told["silent"]]
    parts += [_said(row) for row in own[-1:]]
    for row in (row for row in told["samples"] if row["fixed"]):
        parts.append(f'<p class="key">Temperature {row["temperature"]:g}</p>')
        parts.append(_said(row))
    return "\n".join(parts)


def _said(row: Document) -> str:
    """A text, its prompt told apart from what follows."""
    prompt = row["prompt"] if row["text"].startswith(row["prompt"]) else ""
    rest = html.escape(row["text"][len(prompt) :])
    return f"<pre><strong>{html.escape(prompt)}</strong>{rest}</pre>"


def _table_rows(cells: list[tuple[str, str, str]]) -> str:
    return "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )

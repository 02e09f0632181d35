"""The receipt as one HTML page, with its plots."""

import html
import json
import re
from importlib import resources
from typing import Any

from tuppence.plot import loss_plot, score_plot
from tuppence.report.text import headline, later_line, rows, tables

Document = dict[str, Any]


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
        for whose, table in tables(told)
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
    later = "".join(f"<li>{html.escape(later_line(each))}</li>" for each in told["later"])
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

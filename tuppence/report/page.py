"""The receipt as one HTML page, with its pictures. Cells that hold a figure of receipt.json name
it in `data-key`."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tuppence.live import duration
from tuppence.report import figures
from tuppence.report.figures import escaped, phase_name
from tuppence.report.history import History
from tuppence.report.paper import page, tabs
from tuppence.report.text import (
    Row,
    best,
    better,
    headline,
    later_line,
    moment,
    notes,
    phase_rows,
    price_lines,
    ran_on,
    rows,
    spent,
    state,
    stopped_early,
    tables,
)

Document = dict[str, Any]

MOST_EVALUATIONS = 12  # that are told in the table, the last ones; the best stands among them


def as_html(told: Document, steps: History) -> str:
    """The receipt as one page: no network, light and dark."""
    machine = told["machine"]
    peak = f"MFU is of {machine['peak_tflops']:.2f} TFLOPS, {machine['peak_source']}."
    parts = {
        "TITLE": escaped(f"Receipt: {told['name']}"),
        "NAME": escaped(told["name"]),
        "HEADLINE": _lead(told),
        "BUDGET": _budget(told),
        "STATE": escaped(f"{state(told)} Best checkpoint: {best(told)}."),
        "STOPPED": _stopped(told),
        "ROWS": "".join(_row(told, row) for row in rows(told)),
        "PEAK": escaped(peak),
        "LOSS": tabs("loss", figures.losses(told, steps)),
        "BARS": figures.bars(told),
        "PHASES": _phases(told),
        "RATES": "".join(f"<figure>{picture}</figure>" for _, picture in figures.rates(steps)),
        "EVALUATIONS": _evaluations(told),
        "SUMMARY": _summary(told),
        "MODEL": _model(told),
        "TASKS": _tasks(told),
        "SAMPLES": _samples(told),
        "NOTES": _notes(told),
        "ENV": _list(ran_on(told)),
        "PRICES": _list(price_lines(told)),
        "HASHES": _pairs((name, value or "not known") for name, value in told["hashes"].items()),
        "COMMANDS": _commands(told),
    }
    return page("receipt.html", parts)


# ---------------------------------------------------------------- the head


def _lead(told: Document) -> str:
    """The headline's figures, the money first."""
    paid, _, limit = spent(told).rpartition(" of ")
    loss, best = told["actual"]["val_loss"], better(told)
    said = f'<b data-key="budget.spent">{paid}</b> of {limit}'
    if best is not None:
        said += " <span>bought a validation loss of</span>"
        said += f' <b data-key="best.val_loss">{best["val_loss"]:.4f}</b>'
        said += f" at its best (step {best['step']:,})"
    elif loss is not None:
        said += " <span>bought a validation loss of</span>"
        said += f' <b data-key="actual.val_loss">{loss:.4f}</b>'
    return said


def _budget(told: Document) -> str:
    """How much of the budget is spent, as a bar."""
    share = min(1.0, told["budget"]["fraction"])
    label = escaped(headline(told))
    return (
        f'<svg class="stack spent" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><rect class="rest" width="1000" height="10"/>'
        f'<rect class="part-train" width="{1000 * share:.1f}" height="10"/></svg>'
    )


def _stopped(told: Document) -> str:
    lines = stopped_early(told)
    if lines:
        return f'<div class="stopped"><h2>Stopped early</h2>{_list(lines)}</div>'
    return ""


def _row(told: Document, row: Row) -> str:
    key = f' data-key="actual.{row.key}"' if row.key else ""
    mid, _, ends = row.promised.partition(" (")
    low, _, high = re.sub(r" (s|GiB)\b", "", ends.rstrip(")")).partition(" to ")
    spread = f" <small>{escaped(low)}–{escaped(high)}</small>" if low != high else ""
    figure = _with_unit(row.paid) if row.key else escaped(row.paid)
    cells = f"<td>{escaped(mid)}{spread}</td><td{key}>{figure}</td>"
    if not row.promised:
        cells = f'<td colspan="2">{figure}</td>'
    return (
        f"<tr><th>{escaped(row.what)}</th>{cells}"
        f'<td class="marks">{figures.promise_mark(told, row.key)}</td></tr>'
    )


def _with_unit(text: str) -> str:
    """A figure, and smaller what it counts."""
    figure, _, unit = text.partition(" ")
    return escaped(figure) + (f" <small>{escaped(unit)}</small>" if unit else "")


# ---------------------------------------------------------------- money


def _phases(told: Document) -> str:
    every = sum(p["usd"] for p in told["phases"]) or 1.0
    return "".join(_phase(*row, every) for row in phase_rows(told))


def _phase(name: str, promised: Document | None, paid: Document | None, every: float) -> str:
    known = re.sub(r"[^a-z]", "-", name)
    share = f"{paid['usd'] / every:.1%}" if paid else ""
    cells = [
        f'<td>{_dollars(promised)}</td><td class="wide">{_time(promised)}</td>',
        f'<td data-key="phases.{known}">{_dollars(paid)}</td><td class="wide">{_time(paid)}</td>',
        f'<td class="wide">{share}</td>',
    ]
    key = f'<i class="key part-{known}"></i>' if name != "all" else ""
    how = ' class="sum"' if name == "all" else ""
    return f"<tr{how}><th>{key}{escaped(phase_name(name))}</th>{''.join(cells)}</tr>"


def _dollars(part: Document | None) -> str:
    return f"${part['usd']:,.5f}" if part else ""


def _time(part: Document | None) -> str:
    if not part:
        return ""
    return f"{part['seconds']:.1f}s" if part["seconds"] < 60 else duration(part["seconds"])


# ---------------------------------------------------------------- what it bought


def _evaluations(told: Document) -> str:
    """The last ones and the best, with what it took to come there."""
    every, at = told["evaluations"], told["best"]["step"]
    if not every:
        return '<p class="key">None was made yet.</p>'
    shown = [row for row in every[:-MOST_EVALUATIONS] if row["step"] == at]
    shown += every[-MOST_EVALUATIONS:]
    heads = ("step", "tokens", "dollars", "loss", "bits/byte")
    body = "".join(_evaluation(row, best=row["step"] == at) for row in shown)
    rest = len(every) - len(shown)
    more = f" In evals.jsonl: {rest:,} more." if rest else ""
    gone = len(told["thrown_away"]["evaluations"])
    more += f" Left out: {gone:,} of thrown-away steps." if gone else ""
    return (
        f'<table class="evaluations"><thead><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr>'
        f'</thead><tbody>{body}</tbody></table><p class="key">Best in bold.{more}</p>'
    )


def _evaluation(row: Document, *, best: bool) -> str:
    tokens, usd, bits, error = (row[key] for key in ("tokens", "usd", "bpb", "error"))
    part, meant = row["of"]
    asked = f" <small>{part / meant:.0%} of the split</small>" if meant and part < meant else ""
    spread = f" <small>± {error:.4f}</small>" if error is not None else ""
    cells = (
        f"{row['step']:,}",
        "" if tokens is None else f"{tokens:,}",
        "" if usd is None else f"${usd:,.4f}",
        f"<span>{row['loss']:.4f}{spread}</span>{asked}",
        "" if bits is None else f"{bits:.4f}",
    )
    how = ' class="best"' if best else ""
    return f"<tr{how}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _summary(told: Document) -> str:
    """The run in five numbers."""
    found = told["summary"]
    forms = {"iter": "{:,}", "lr": "{:.3g}", "mfu": "{:.2%}"}
    return (
        '<dl class="summary">'
        + "".join(
            f"<div><dt>{name.replace('_', ' ')}</dt>"
            f'<dd data-key="summary.{name}">'
            f"{'-' if value is None else forms.get(name, '{:.4f}').format(value)}</dd></div>"
            for name, value in found.items()
        )
        + "</dl>"
    )


def _model(told: Document) -> str:
    model = told["model"]
    return _list(
        [
            f"{model['family']}, {model['n_layer']} layers of {model['n_embd']}, "
            f"{model['n_head']} heads, {model['sequence_len']:,} positions: "
            f"{model['params']:,} parameters",
            f"{model['source']}, {model['tokenizer']} ({model['vocab_size']:,}): "
            f"{model['train_tokens']:,} tokens to train on, {model['val_tokens']:,} to judge by",
            f"{model['optimizer']} at {model['learning_rate']:.3g}, {model['schedule']}, "
            f"{model['batch_tokens']:,} tokens a step, seed {model['seed']}",
        ]
    )


def _tasks(told: Document) -> str:
    """Tables, curves where there are several points, and what was evaluated later; or nothing."""
    at = {row["step"]: row["tokens"] for row in told["evaluations"] if row["tokens"] is not None}
    parts = [
        f'<p class="key">{escaped(whose)}</p>\n<pre class="table">{escaped(table)}</pre>'
        for whose, table in tables(told)
    ]
    drawn = "".join(f"<figure>{picture}</figure>" for _, picture in figures.scores(told, at))
    parts += [f'<div class="many">{drawn}</div>'] if drawn else []
    if told["later"]:
        parts.append("<p>Evaluated later:</p>" + _list(map(later_line, told["later"])))
    return "<section>\n<h2>Tasks</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""


def _samples(told: Document) -> str:
    """The run's own, then the fixed prompts greedy and drawn; of the own ones the last."""
    own = [row for row in told["samples"] if not row["fixed"]]
    parts = [f'<p class="key">{escaped(why)}</p>' for why in told["silent"]]
    parts += [_said(row) for row in own[-1:]]
    drawn = "".join(_said(row) for row in told["samples"] if row["fixed"])
    return "\n".join(parts) + (f'<div class="said">{drawn}</div>' if drawn else "")


def _said(row: Document) -> str:
    """A text, its prompt told apart from what follows."""
    prompt = row["prompt"] if row["text"].startswith(row["prompt"]) else ""
    rest = escaped(row["text"][len(prompt) :])
    warm = row["temperature"]
    how = "" if warm is None else f"temperature {warm:g}" if warm else "greedy"
    return (
        f'<figure class="sample"><pre><strong>{escaped(prompt)}</strong>{rest}</pre>'
        f"<figcaption>{how}</figcaption></figure>"
    )


# ---------------------------------------------------------------- the rest


def _notes(told: Document) -> str:
    """The plan's warnings, then events."""
    shown, rest = notes(told)
    lines = [f"<li>{_note(each)}</li>" for each in [*told["warnings"], *shown]]
    lines += [f"<li class='key'>not listed: {escaped(', '.join(rest))}</li>"] if rest else []
    return f'<ul class="notes">{"".join(lines)}</ul>' if lines else "<p>Nothing to tell.</p>"


def _note(told: Document) -> str:
    when = f"<time>{moment(told['time'])}</time> " if "time" in told else ""
    advice = f" <em>{escaped(told['advice'])}</em>" if told.get("advice") else ""
    return f"{when}{escaped(told['message'])}{advice} <code>{escaped(told['code'])}</code>"


def _commands(told: Document) -> str:
    said = {
        "resume": "go on",
        "reproduce": "the same again",
        "sample": "let it speak",
        "evaluate": "judge it",
        "export": "for transformers",
        "receipt": "this receipt anew",
    }
    typed = told["commands"]
    return _pairs((words, typed[name]) for name, words in said.items() if typed[name])


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>"


def _pairs(pairs: Iterable[Sequence[str]]) -> str:
    found = (f"<dt>{escaped(a)}</dt><dd><code>{escaped(b)}</code></dd>" for a, b in pairs)
    return f'<dl class="pairs">{"".join(found)}</dl>'

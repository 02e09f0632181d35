"""The receipt to read: for a terminal, and as a page of Markdown."""

import json
from typing import Any

from tuppence.config import Interval
from tuppence.evals import told as telling
from tuppence.live import duration, printable

Document = dict[str, Any]


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
    lines += [f"later     {later_line(result)}" for result in told["later"]]
    if told["sample"]:
        said = printable(told["sample"].strip())
        lines += ["sample    " + said.replace("\n", "\n          ")]
    fixed = [row for row in told["samples"] if row["fixed"] and row["text"]]
    greedy = [row for row in fixed if row["temperature"] == 0]
    lines += [f"prompt    {_in_a_line(row)}" for row in greedy]
    return "\n".join(lines)


def later_line(result: Document) -> str:
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


def tables(told: Document) -> list[tuple[str, str]]:
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
        parts += ["## Tasks", *(f"{whose}\n\n{_fenced(table)}" for whose, table in tables(told))]
    if told["later"]:
        lines = "\n".join(f"- {later_line(result)}" for result in told["later"])
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

"""The receipt to read: for a terminal, and as a page of Markdown."""

import datetime
import html
import json
from collections import Counter
from typing import Any, NamedTuple

from tuppence.config import Interval
from tuppence.evals import told as telling
from tuppence.live import duration, printable, threads
from tuppence.report.figures import in_order, phase_name
from tuppence.report.money import amount, share

Document = dict[str, Any]

MOST_NOTES = 30  # events that are told one by one; the rest is counted
MOST_OF_ONE = 5  # of them of one code
CALM_CODES = (  # of events that are no warnings
    *("resume", "preflight", "other_machine", "stopped", "recovered", "upload", "upload_recovered"),
    *("data", "packing", "micro_batch", "milestone_deleted", "early_stop", "no_early_stop"),
)


class Row(NamedTuple):
    """A line of the account; `key` is its name in the document, of some."""

    what: str
    promised: str
    paid: str
    key: str = ""


def rows(told: Document) -> list[Row]:
    """What was promised and paid, for reading."""
    promised, paid = told["predicted"], told["actual"]
    loss = Interval(**promised["val_loss"]) if promised["val_loss"] else None
    loss_text = f"{loss.mid:.3f} ({loss.low:.3f} to {loss.high:.3f})" if loss else "not promised"

    def both(what: str, key: str, form: str) -> Row:
        ends = [form.format(end) for end in told["intervals"].get(key, [])]
        spread = f" ({ends[0]} to {ends[1]})" if ends else ""
        return Row(what, _form(promised[key], form) + spread, _form(paid[key], form), key)

    def time(of: Document) -> str:
        return duration(of["hours"] * 3600)

    return [
        both("dollars", "usd", "${:.4f}"),
        Row("time", time(promised), time(paid), "hours"),
        both("tokens", "tokens", "{:,.0f}"),
        both("step", "step_seconds", "{:.4f} s"),
        both("tokens/s", "tokens_per_second", "{:,.0f}"),
        both("MFU", "mfu", "{:.0%}"),
        both("memory", "peak_memory_gib", "{:.2f} GiB"),
        Row("val loss", loss_text, _form(paid["val_loss"], "{:.4f} nats/token"), "val_loss"),
        *_at_best(told),
        Row("val tokens", "", _evaluated(told["evaluated"])),
        both("bits/byte", "val_bpb", "{:.3f}"),
        *_task_rows(told["tasks"]),
    ]


def _at_best(told: Document) -> list[Row]:
    """The best loss, where it is not the last."""
    best = better(told)
    return [Row("at best", "", f"{best['val_loss']:.4f} at step {best['step']:,}")] if best else []


def better(told: Document) -> Document | None:
    """The best checkpoint's step and loss, where a later one was evaluated."""
    best, every = told["best"], told["evaluations"]
    if best["val_loss"] is None or best["step"] == every[-1]["step"]:
        return None
    return best  # type: ignore[no-any-return]


def _task_rows(tasks: Document) -> list[Row]:
    """A suite's numbers with their errors, and of how many items they are."""
    found = []
    for result in tasks.values():
        name, (first, *more) = telling.name(result), telling.scores(result)
        found += [Row(name, "", first), *(Row("", "", score) for score in more)]
        found.append(Row("", "", f"{result['n']:,} of {result['of_items']:,} items"))
        found.append(Row("", "", f"{result['precision']}, step {result['step']:,}"))
    return found


def _evaluated(tokens: list[int] | None) -> str:
    """How much of the val split the loss is of."""
    return "-" if tokens is None else "{:,} of {:,}".format(*tokens)


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _form_if(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# ---------------------------------------------------------------- sentences


def headline(told: Document) -> str:
    """One sentence: how much of the budget was spent, and what it bought."""
    loss, best = told["actual"]["val_loss"], better(told)
    bought = f"; val loss {loss:.4f}" if loss is not None else ""
    if best is not None:
        bought = f"; val loss {best['val_loss']:.4f} at its best (step {best['step']:,})"
    state = "" if told["finished"] else " (not finished)"
    return f"{told['name']}{state}: spent {spent(told)} ({told['budget']['fraction']:.1%}){bought}"


def spent(told: Document) -> str:
    """How much of the budget, as far as that is known."""
    budget = told["budget"]
    if told["period"] is None and budget["kind"] in ("usd", "hours"):
        return f"an unknown part of {amount(budget['kind'], budget['limit'])}"
    return share(budget)


def moment(seconds: float) -> str:
    """Seconds since the epoch as a date and time of day."""
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{at:%Y-%m-%d %H:%M} UTC"


def state(told: Document) -> str:
    """How far the run has come, and when."""
    period, attempts = told["period"], told["attempts"]
    tries = "one attempt" if attempts == 1 else f"{attempts} attempts"
    when = moment(period["ended"]) if period else "an unknown moment"
    if told["finished"]:
        return f"Finished {when}, {tries}."
    share = "" if told["progress"] is None else f", {told['progress']:.1%} of the way"
    return f"Not finished: last sign of life {when} at step {told['steps']:,}{share}; {tries}."


def best(told: Document) -> str:
    """Which checkpoint is the best, and how good."""
    step, loss = told["best"]["step"], told["best"]["val_loss"]
    return "none yet" if step is None else f"step {step:,}" + _form_if(loss, ", val loss {:.4f}")


def stopped_early(told: Document) -> list[str]:
    """What was tested, when it turned, what was done then and what was not spent; or nothing."""
    stop = told["early_stop"]
    if stop is None:
        return []
    test = str(stop.get("test") or stop["message"]).rstrip(".")
    lines = [test[:1].upper() + test[1:] + "."]
    at = f"{stop['tokens']:,} tokens, step {stop['step']:,}"
    if stop.get("reason") == "turned":
        low = _form_if(stop.get("best_val_loss"), " (val loss {:.4f})")
        lines.append(
            f"Validation turned at {stop['turned_tokens']:,} tokens{low}; that was clear at {at}."
        )
    else:
        lines.append(f"Decided at {at}.")
    if gone := _gone(stop):
        lines.append(f"The run went back to step {stop['back_to']:,}: {gone} thrown away.")
    if stop.get("anneal_steps"):
        share = _form_if(stop.get("anneal_share"), ", {:.1%} of what was left of the budget")
        lines.append(f"It annealed over {stop['anneal_steps']:,} steps{share}.")
    return lines + left_over(told)


def _in_short(told: Document) -> str:
    """An early stop in a line."""
    stop = told["early_stop"]
    turned = f"validation turned at {stop.get('turned_tokens') or 0:,} tokens"
    why = turned if stop.get("reason") == "turned" else "the loss that was asked for is reached"
    gone, rest = _gone(stop), left_over(told)
    gone = f", back to step {stop['back_to']:,} ({gone} thrown away)" if gone else ""
    return f"{why}, step {stop['step']:,}{gone}. {' '.join(rest)}".strip()


def _gone(stop: Document) -> str:
    """How many steps an early stop went back from, and what these had cost."""
    steps = stop["step"] - (stop.get("back_to") or stop["step"])
    return f"{steps:,} steps{_form_if(stop['thrown_away_usd'], ', ${:.4f},')}" if steps else ""


def left_over(told: Document) -> list[str]:
    """What was not spent, in the budget's unit and in dollars."""
    rest = told["unspent"]
    if rest is None:
        return []
    also = "" if rest["kind"] == "usd" else f", about ${rest['usd']:,.4f}"
    return [f"Not spent: {amount(rest['kind'], rest['amount'])}{also}."]


def price_lines(told: Document) -> list[str]:
    """Each price, where it is from, since when it was charged, and what it came to."""
    lines = []
    for price in told["prices"]:
        source = {"assumed": "assumed, for none is known", "asked": "as the person said"}
        from_whom = source.get(price["source"], price["source"])
        tries = price["attempts"]
        attempts = f"attempt{'s' * (len(tries) > 1)} {', '.join(map(str, tries))}"
        lines.append(
            f"${price['usd_per_hour']:.4g} an hour, {from_whom}, since {moment(price['since'])}: "
            f"{duration(price['seconds'])}, ${price['usd']:.4f} ({attempts})"
        )
    return lines


def ran_on(told: Document) -> list[str]:
    """The machine and what ran on it."""
    machine, env = told["machine"], told["env"] or {}
    lines = [f"{machine['name']}, {threads(machine['threads'])}, {machine['precision']}"]
    if env.get("gpu"):
        lines.append(f"GPU {env['gpu']}")
    if env.get("cpu"):
        lines.append(f"{env['cpu']}, {env.get('usable_cores')} cores; {env.get('system')}")
    versions = env.get("versions") or {}
    if versions:
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    if env.get("git"):
        lines.append(f"commit {env['git']}")
    for before in env.get("differed", ()):
        said = ", ".join(f"{k} {_short(v)}" for k, v in before.items() if k != "attempt")
        lines.append(f"attempt {before.get('attempt')} was on: {said}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {each}" for key, each in value.items())
    return str(value)[:60]


def warned(told: Document) -> str:
    """How many warnings there are, and of which kinds."""
    every = [note["code"] for note in [*told["warnings"], *told["events"]]]
    counts = Counter(code for code in every if code not in CALM_CODES)
    kinds = [code if n == 1 else f"{code} ({n:,})" for code, n in counts.items()]
    return f"{counts.total():,}: {', '.join(kinds)}" if counts else ""


def notes(told: Document) -> tuple[list[Document], list[str]]:
    """The events that are told, the serious and the newest first; and what was only counted. An
    early stop has a place of its own."""
    shown: list[Document] = []
    of_code: dict[str, int] = {}
    newest = [event for event in told["events"][::-1] if event["code"] != "early_stop"]
    for event in sorted(newest, key=lambda e: e["code"] in CALM_CODES):
        code = event["code"]
        if of_code.get(code, 0) < MOST_OF_ONE and len(shown) < MOST_NOTES:
            of_code[code] = of_code.get(code, 0) + 1
            shown.append(event)
    rest = [
        f"{count - of_code.get(code, 0):,} {'more ' if code in of_code else ''}{code}"
        for code, count in told["event_counts"].items()
        if count > of_code.get(code, 0) and code not in ("start", "end", "early_stop")
    ]
    return shown, rest


# ---------------------------------------------------------------- terminal


def as_text(told: Document) -> str:
    """The receipt for a terminal."""
    lines = [
        f"receipt   {headline(told)}",
        f"{'':12s}{'promised (80% interval)':>36s}{'paid':>22s}",
    ]
    lines += [f"  {row.what:10s}{row.promised:>36s}{row.paid:>22s}" for row in rows(told)]
    where = ", ".join(
        f"{p['phase'].replace('lost', 'thrown away')} ${p['usd']:.4f} ({p['seconds']:.1f} s)"
        for p in told["phases"]
    )
    lines += [f"where     {where}"]
    if told["early_stop"]:
        lines += [f"stopped   early: {_in_short(told)}"]
    machine = told["machine"]
    lines += [f"peak      MFU is of {machine['peak_tflops']:.2f} TFLOPS, {machine['peak_source']}"]
    lines += [f"warnings  {warned(told)}"] if warned(told) else []
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


# ---------------------------------------------------------------- Markdown


def as_markdown(told: Document) -> str:
    """The receipt as a page of Markdown, for a pull request or a model card."""
    table = [f"| {row.what} | {row.promised} | {row.paid} |" for row in rows(told)]
    machine = told["machine"]
    parts = [
        f"# Receipt: {_plain(told['name'])}",
        _plain(headline(told)) + ".",
        state(told),
        *([_plain(" ".join(stopped_early(told)))] if told["early_stop"] else []),
        "| | promised (80% interval) | paid |\n|---|---:|---:|\n" + "\n".join(table),
        f"MFU is of {machine['peak_tflops']:.2f} TFLOPS, {machine['peak_source']}.",
        "## Where every cent went",
        "| phase | promised | | paid | |\n|---|---:|---:|---:|---:|\n" + "\n".join(_phases(told)),
        f"Best checkpoint: {best(told)}.",
    ]
    if told["tasks"]:
        parts += ["## Tasks", *(f"{whose}\n\n{_fenced(table)}" for whose, table in tables(told))]
    if told["later"]:
        lines = "\n".join(f"- {later_line(result)}" for result in told["later"])
        parts += ["## Evaluated later", lines]
    parts += ["## Sample", *told["silent"]]
    parts += [_fenced(told["sample"])] if told["sample"] else []
    fixed = [row["text"] for row in told["samples"] if row["fixed"] and row["temperature"] == 0]
    parts += ["Fixed prompts, continued greedily:", _fenced("\n\n".join(fixed))] if fixed else []
    parts += _notes(told)
    parts += ["## Ran on", "\n".join(f"- {_plain(x)}" for x in [*ran_on(told), *price_lines(told)])]
    parts += ["## Hashes", "\n".join(f"- {k}: `{v}`" for k, v in told["hashes"].items())]
    typed = [command for command in told["commands"].values() if command]
    parts += ["## Again", _fenced("\n".join(dict.fromkeys(typed)), "sh")]
    return "\n\n".join(parts) + "\n"


def _phases(told: Document) -> list[str]:
    """A line for each phase that was promised or paid, and their sums."""

    def cells(part: Document | None) -> str:
        return f"{part['seconds']:,.1f} s | ${part['usd']:.5f}" if part else "|"

    return [
        f"| {phase_name(name)} | {cells(promised)} | {cells(paid)} |"
        for name, promised, paid in phase_rows(told)
    ]


def phase_rows(told: Document) -> list[tuple[str, Document | None, Document | None]]:
    """(phase, promised, paid), the work first and all together last."""
    promised, paid = (
        {p["phase"]: p for p in told[name]} for name in ("predicted_phases", "phases")
    )
    names = [p["phase"] for p in in_order([{"phase": name} for name in {**promised, **paid}])]

    def every(phases: Document) -> Document:
        return {key: sum(p[key] for p in phases.values()) for key in ("seconds", "usd")}

    rows = [(name, promised.get(name), paid.get(name)) for name in names]
    return [*rows, ("all", every(promised), every(paid))]


def _notes(told: Document) -> list[str]:
    shown, rest = notes(told)
    lines = [f"- {_plain(_said(note))} [{note['code']}]" for note in [*told["warnings"], *shown]]
    lines += [f"- not listed: {', '.join(rest)}"] if rest else []
    return ["## Notes", "\n".join(lines)] if lines else []


def _said(note: Document) -> str:
    """A warning or an event, and what to do about it."""
    return f"{note['message']}; {note['advice']}" if note.get("advice") else note["message"]


def _plain(text: str) -> str:
    """A line of Markdown that stays one, with no HTML in it."""
    return html.escape(printable(text).replace("\n", " "), quote=False)


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n" + printable(text).replace("```", "'''") + "\n```"

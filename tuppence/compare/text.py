"""Runs side by side, to read: tables, which the page has as well, and the text for a terminal.

A cell's mark says who is best in its row (`*`), and who is within the noise of that (`~`).
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuppence.compare.alike import price
from tuppence.compare.beside import EQUAL, NAMES, TRAIN_SHARE, verdict
from tuppence.compare.tasks import NAMES as SUITES
from tuppence.live import printable
from tuppence.plot import short
from tuppence.report.money import amount

Document = dict[str, Any]

MARKS = {"best": "*", "near": "~", "": " "}
WIDTH = 110  # where no terminal says its own
NAME, LONGEST = 15, 24  # columns for what a row is of: at least, at most
NARROWEST, WIDEST = 14, 26  # columns for a run


@dataclass(frozen=True)
class Row:
    """A line of a table: a cell for each run, and how each stands: best, near or neither."""

    name: str
    cells: list[str]
    stand: list[str]


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[Row]
    note: str = ""


def _row(name: str, cells: Sequence[str | None], found: Document | None = None) -> Row:
    best, near = (found["best"], found["near"]) if found else (None, [])
    if best is not None and cells.count(cells[best]) > 1:  # a tie, to the digits that are shown
        best, near = None, []
    stand = ["best" if i == best else "near" if i in near else "" for i in range(len(cells))]
    return Row(name, ["-" if cell is None else cell for cell in cells], stand)


def _each(values: Sequence[Any], form: Callable[[Any], str]) -> list[str | None]:
    return [None if value is None else form(value) for value in values]


# ---------------------------------------------------------------- tables


def tables(told: Document) -> list[Table]:
    """All that is compared, in the order in which it is read."""
    return [asked(told), runs(told), *levels(told)]


def asked(told: Document) -> Table:
    """The keys that were not asked alike."""
    rows = [_row(key, _each(values, _said)) for key, values in told["differs"].items()]
    return Table("What was asked that differs", rows, "" if rows else "Nothing.")


def runs(told: Document) -> Table:
    """What each is, cost and came to."""
    return Table("The runs", [*_made(told), *_paid(told), *_came_to(told)])


def levels(told: Document) -> list[Table]:
    """How they stand at equal places, and what it takes them to the same loss."""
    return [
        *(_at_equal(told, each) for each in told["at_equal"]),
        *([_to_reach(told)] if told["to_reach"] else []),
    ]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def _made(told: Document) -> list[Row]:
    runs = told["runs"]
    return [
        _row("state", [run["state"] for run in runs]),
        _row("model", [run["model"]["family"] for run in runs]),
        _row("parameters", [f"{run['model']['params']:,}" for run in runs]),
        _row("data", [_data(run["data"]) for run in runs]),
        _row("machine", [f"{run['place']}, {run['machine']['precision']}" for run in runs]),
        _row("price", [_price(run["prices"]) for run in runs]),
    ]


def _data(data: Document) -> str:
    source = printable(data["source"])
    return f"{source}, {data['tokenizer']}, {short(data['train_tokens'])} tokens"


def _price(prices: Sequence[Document]) -> str:
    sources = ", ".join(dict.fromkeys(each["source"] for each in prices))
    return f"{price(prices)} ({sources})" if prices else "-"


def _paid(told: Document) -> list[Row]:
    runs = told["runs"]
    peaks = {warning["code"] for warning in told["warnings"]}
    fastest = _highest([run["tokens_per_second"] for run in runs], "other_machine" not in peaks)
    fullest = _highest([run["mfu"] for run in runs], "other_peak" not in peaks)
    return [
        _row("budget", [_budget(run["budget"]) for run in runs]),
        _row("dollars", [amount("usd", run["usd"]) for run in runs]),
        _row("time", [amount("hours", run["hours"]) for run in runs]),
        _row("tokens", [f"{run['tokens']:,}" for run in runs]),
        _row("steps", [f"{run['steps']:,}" for run in runs]),
        _row("tokens/s", [f"{run['tokens_per_second']:,.0f}" for run in runs], fastest),
        _row("MFU", [_mfu(run) for run in runs], fullest),
        _row("memory", _each([r["peak_memory_gib"] for r in runs], "{:.2f} GiB".format)),
        _row("attempts", [f"{run['attempts']}" for run in runs]),
    ]


def _highest(values: Sequence[float], comparable: bool) -> Document | None:
    return verdict([-value for value in values]) if comparable else None


def _budget(budget: Document) -> str:
    return f"{budget['fraction']:.1%} of {amount(budget['kind'], budget['limit'])}"


def _mfu(run: Document) -> str:
    return f"{run['mfu']:.0%} of {run['machine']['peak_tflops']:.4g} TFLOPS"


def _came_to(told: Document) -> list[Row]:
    runs = told["runs"]
    stands = {which: _stands(told, which) for which in ("last", "best")}
    rows = [
        _row(
            f"{name}, {which}",
            _each([run[key][which] for run in runs], "{:.4f}".format),
            stands[which] if told["losses"]["unit"] in units else None,
        )
        for name, key, units in (
            ("val loss", "val_loss", ("loss",)),
            ("bits/byte", "val_bpb", ("loss", "bpb")),
        )
        for which in ("last", "best")
    ]
    errors = [run["val_error"]["last"] for run in runs]
    if any(error is not None for error in errors):
        rows.append(_row("± of val loss", _each(errors, "{:.4f}".format)))
    rows.append(_row("best at step", _each([run["best_step"] for run in runs], "{:,}".format)))
    for suite, scores in told["tasks"].items():
        for score, found in scores.items():
            name = SUITES[suite] if score == "score" else f"{SUITES[suite]} {score}"
            pairs = zip(found["values"], found["errors"], strict=True)
            rows.append(_row(name, [_score(*pair) for pair in pairs], found))
    return rows


def _stands(told: Document, which: str) -> Document:
    """Who is best by the loss that can be compared; of one tokenizer bits per byte say the same."""
    key = "val_loss" if told["losses"]["unit"] == "loss" else "val_bpb"
    return verdict([run[key][which] for run in told["runs"]], told["losses"]["noise"])


def _score(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _place(axis: str, x: float) -> str:
    return amount(axis, x).removesuffix(" tokens")


def loss_name(told: Document) -> str:
    return "val loss" if told["losses"]["unit"] == "loss" else "bits/byte"


def _at_equal(told: Document, found: Document) -> Table:
    """The val loss at one place, and what to keep in mind beside it."""
    axis = found["axis"]
    title = f"At equal {NAMES[axis]}: {_place(axis, found['at'])}, where {found['end_of']} ends"
    rows = [_row(loss_name(told), _each(found["val"], "{:.4f}".format), found)]
    if any(value is not None for value in found["train"]):
        rows.append(_row("train loss", _each(found["train"], "{:.4f}".format)))
    rows.append(_row("of its length", _each(found["share_of_end"], "{:.0%}".format)))
    rows.append(_row("rate, of peak", _each(found["rate_share"], "{:.0%}".format)))
    apart = found["noise"]
    note = "" if apart is None else f"Runs that differ by their seed alone: {apart:.4f} apart here."
    return Table(title, rows, note)


def _to_reach(told: Document) -> Table:
    found = told["to_reach"]
    worst = [run["label"] for run in told["runs"]].index(found["of"])
    rows = []
    for axis, takes in found["takes"].items():
        cells = [
            None if take is None else f"{_place(axis, take)} ({take / takes[worst]:.0%})"
            for take in takes
        ]
        rows.append(_row(NAMES[axis], cells, {"best": found["best"][axis], "near": []}))
    name = loss_name(told)
    return Table(f"To come down to {name} {found['loss']:.4f}, the best of {found['of']}", rows)


def marks(told: Document) -> str:
    """What the marks mean."""
    near = "within its error"
    if any(each["noise"] is not None for each in told["at_equal"]):
        near += ", or of losses no further from it than runs are that differ by their seed alone"
    elif told["at_equal"]:
        near += "; what another seed would make of a val loss only a twin tells (train.seed)"
    return f"* best in its row; ~ {near}"


def read_how(told: Document) -> str:
    """How losses are read between evaluations; nothing where none are."""
    if not told["at_equal"]:
        return ""
    return (
        "losses between two evaluations are read from the straight line that joins them, within "
        f"{EQUAL:.0%} of a run's end at its end; a train loss is the mean of the last "
        f"{TRAIN_SHARE:.0%} of the way there"
    )


# ---------------------------------------------------------------- for a terminal


def as_text(told: Document, *, width: int | None = None) -> str:
    """The tables, in blocks of as many runs as the screen holds; then what it comes to."""
    screen = max(LONGEST + NARROWEST + 2, width or WIDTH)
    names = [run["label"] for run in told["runs"]]
    lines = [_noted("compare", ", ".join(names), screen)]
    for table in tables(told):
        lines += ["", table.title]
        lines += [f"  {table.note}"] if table.note else []
        lines += _blocks(table, names, screen) if table.rows else []
    notes = [("comes to", text) for text in told["said"]]
    notes += [("reading", text) for text in (marks(told), read_how(told)) if text]
    notes += [("warning", f"{w['message']} [{w['code']}]") for w in told["warnings"]]
    return "\n".join([*lines, "", *(_noted(name, text, screen) for name, text in notes)])


def _noted(name: str, text: str, width: int) -> str:
    return textwrap.fill(
        f"{name:10}{text}", width, subsequent_indent=" " * 10, break_long_words=False
    )


def _blocks(table: Table, names: Sequence[str], screen: int) -> list[str]:
    """As many runs as the screen holds, then the same rows of the next ones."""
    left = min(LONGEST, max(NAME, *(len(row.name) for row in table.rows)))
    fit = (screen - left - 2) // NARROWEST
    blocks = [range(i, min(i + fit, len(names))) for i in range(0, len(names), fit)]
    return [line for block in blocks for line in _block(table, names, block, left, screen)]


def _block(table: Table, names: Sequence[str], block: range, left: int, screen: int) -> list[str]:
    """The rows of some of the runs; what is long and the same in all of them is said once."""
    column = max(NARROWEST, min((screen - left - 2) // len(block), WIDEST))
    empty = [""] * len(block)
    lines = _lines("", left, [names[i] for i in block], empty, column)
    for row in table.rows:
        cells = [row.cells[i] for i in block]
        if len(set(cells)) == 1 and len(cells[0]) > column - 2:
            lines += _lines(row.name, left, [f"{cells[0]} (all)"], [""], column * len(block))
        else:
            lines += _lines(row.name, left, cells, [row.stand[i] for i in block], column)
    return lines


def _lines(
    name: str, left: int, cells: Sequence[str], stand: Sequence[str], column: int
) -> list[str]:
    """A row, whose name and cells may go on below; the mark stands behind a cell's last line."""
    parts = [textwrap.wrap(cell, column - 2) or [""] for cell in cells]
    names = textwrap.wrap(name, left) or [""]
    lines = []
    for i in range(max(map(len, [*parts, names]))):
        marked = (
            _at(part, i).rjust(column - 1) + (MARKS[how] if i == len(part) - 1 else " ")
            for part, how in zip(parts, stand, strict=True)
        )
        lines.append(f"  {_at(names, i):{left}}{''.join(marked)}".rstrip())
    return lines


def _at(lines: Sequence[str], i: int) -> str:
    return lines[i] if i < len(lines) else ""

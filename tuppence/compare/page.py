"""Runs side by side as one HTML page: no network, light and dark, the curves and the tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuppence.compare.beside import AXES, NAMES, Column, Curve, Side, curve
from tuppence.compare.text import (
    MARKS,
    Table,
    asked,
    levels,
    loss_name,
    marks,
    read_how,
    runs,
)
from tuppence.plot import COLOURS_OF_PAGE, MOST_POINTS, Series, chart, legend
from tuppence.report.figures import escaped
from tuppence.report.paper import page, tabs

Document = dict[str, Any]


def as_html(told: Document, sides: Sequence[Side]) -> str:
    """The page. What others wrote is escaped."""
    names = [run["label"] for run in told["runs"]]
    parts = {
        "TITLE": escaped(f"Compared: {', '.join(names)}"),
        "NAMES": escaped(", ".join(names[:-1]) + f" and {names[-1]}"),
        "SAID": "".join(f'<p class="lead">{escaped(text)}.</p>' for text in told["said"]),
        "LOSSES": _losses(told, sides),
        "LEVELS": _levels(told, names),
        "RUNS": _table(runs(told), names),
        "ASKED": _table(asked(told), names),
        "RATES": _rates(sides),
        "HOW": _paragraphs([marks(told), read_how(told)]),
        "WARNINGS": _warnings(told["warnings"]),
    }
    return page("compare.html", parts)


def _warnings(told: Sequence[Document]) -> str:
    lines = [f"<li>{escaped(w['message'])} <code>{w['code']}</code></li>" for w in told]
    notes = f'<ul class="notes">{"".join(lines)}</ul>'
    return f"<section><h2>To keep in mind</h2>{notes}</section>" if lines else ""


def _levels(told: Document, names: Sequence[str]) -> str:
    found = "".join(_table(table, names, "h3") for table in levels(told))
    return f"<div><h2>How they stand</h2>{found}</div>" if found else ""


def _paragraphs(texts: Sequence[str]) -> str:
    """Of sentences that begin small."""
    return "".join(
        f'<p class="key">{escaped(text[:1].upper() + text[1:])}.</p>' for text in texts if text
    )


def _table(table: Table, names: Sequence[str], title: str = "h2") -> str:
    """A table that scrolls by itself where the screen is narrow."""
    note = f'<p class="key">{escaped(table.note)}</p>' if table.note else ""
    above = f"<{title}>{escaped(table.title)}</{title}>{note}"
    if not table.rows:
        return above
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{escaped(row.name)}</th>'
        + "".join(map(_cell, row.cells, row.stand))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'{above}<div class="side"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str, stand: str) -> str:
    how = f' class="{stand}"' if stand else ""
    return f"<td{how}>{escaped(text)}{MARKS[stand].rstrip()}</td>"


# ---------------------------------------------------------------- curves


def _losses(told: Document, sides: Sequence[Side]) -> str:
    """Losses against each axis, or why there are none."""
    unit = told["losses"]["unit"]
    if unit is None:
        return f"<p>They are not compared: {escaped(told['losses']['refused'])}.</p>"
    curves = [curve(one, unit) for one in sides]
    train = any(value is not None for value in told["at_equal"][0]["train"])
    high = max(float(each.value[0]) for each in curves)  # what lies above is the first few steps
    panels = []
    for axis in AXES:
        series = [
            part
            for i, (one, each) in enumerate(zip(sides, curves, strict=True))
            for part in _of_run(i, one, each, axis, train=train)
        ]
        picture = chart(series, x_label=NAMES[axis], y_label=loss_name(told), y_high=high)
        panels.append((NAMES[axis], picture))
    keys = legend([_key(i, one) for i, one in enumerate(sides)])
    lines = "Lines and dots: evaluations." + (" Thin lines: training." if train else "")
    return f'{tabs("loss", panels)}{keys}<p class="key">{lines}</p>'


def _of_run(i: int, one: Side, found: Curve, axis: str, *, train: bool) -> list[Series]:
    points = list(zip(found.at[axis].tolist(), found.value.tolist(), strict=True))
    steps = _few(one.places[axis], one.history["loss"]) if train else []
    return [
        *([Series(one.label, steps, "faint", colour=i)] if steps else []),
        Series(one.label, points, colour=i),
        Series(one.label, points, _dots(i), colour=i),
    ]


def _dots(i: int) -> str:
    """Where the colours come round again the dots are hollow."""
    return "dots" if i < COLOURS_OF_PAGE else "hollow"


def _key(i: int, one: Side) -> Series:
    return Series(one.label, (), _dots(i), colour=i)


def _rates(sides: Sequence[Side]) -> str:
    series = [
        Series(one.label, _few(one.places["tokens"], one.history["lr"]), colour=i)
        for i, one in enumerate(sides)
    ]
    return f"<figure>{chart(series, x_label='tokens', y_label='learning rate')}</figure>" + legend(
        series
    )


def _few(x: Column, y: Column) -> list[tuple[float, float]]:
    """At most as many points as a picture shows, each the mean of its neighbours."""
    good = np.isfinite(x) & np.isfinite(y)
    parts = min(MOST_POINTS, int(good.sum()))
    if not parts:
        return []
    pairs = zip(*(np.array_split(column[good], parts) for column in (x, y)), strict=True)
    return [(float(a.mean()), float(b.mean())) for a, b in pairs]

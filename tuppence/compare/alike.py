"""What may be held against what: the reasons for which figures of two runs say nothing together.

    losses     evals/identity decides: nats per token, else bits per byte of one text, else neither
    tasks      evals/against decides
    the rest   is shown with a warning: other peaks, prices, machines, an unfinished run

Every warning is {"code", "message"}; the codes are stable.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from tuppence.config import DataPlan
from tuppence.evals.identity import refuse

Document = dict[str, Any]

PEAKS_ALIKE = 0.01  # of each other: two measurements of one ceiling may be so far apart


def warning(code: str, message: str) -> Document:
    return {"code": code, "message": message}


# ---------------------------------------------------------------- losses


def losses(labels: Sequence[str], rows: Sequence[Document | None]) -> tuple[str | None, str | None]:
    """What curves may be compared in, loss or bpb; else None and the reason in one line.

    `rows` are one evaluation of each run; None: it has none.
    """
    if None in rows:
        return None, f"{labels[rows.index(None)]} was not evaluated yet"
    why = ""
    for unit in ("loss", "bpb"):
        refused = _refused(labels, rows, unit)  # type: ignore[arg-type]
        if not refused:
            return unit, None
        why = why or _said(labels, refused)
    return None, why


def _refused(
    labels: Sequence[str], rows: Sequence[Document], unit: str
) -> dict[tuple[int, int], str]:
    """Of each pair that may not be compared, why."""
    if unit == "bpb" and any(row.get("bpb") is None for row in rows):
        return {(0, 1): "one of them has no bits per byte"}
    return {
        (a, b): f"{labels[a]} and {labels[b]}: {why}"
        for a, b in itertools.combinations(range(len(rows)), 2)
        if (why := refuse(rows[a], rows[b], unit=unit)) is not None
    }


def _said(labels: Sequence[str], refused: dict[tuple[int, int], str]) -> str:
    """The first reason, what helps, and which run to leave out where one alone is in the way."""
    (a, b), why = next(iter(refused.items()))
    why += f"; tuppence eval {labels[a]} --against {labels[b]} compares the bits per byte of a text"
    alone = [i for i in range(len(labels)) if all(i in pair for pair in refused)]
    if len(labels) > 2 and len(alone) == 1:
        why += f"; without {labels[alone[0]]} the others can be compared"
    return why


# ---------------------------------------------------------------- the rest


def peaks(labels: Sequence[str], machines: Sequence[Document]) -> Document | None:
    """MFU is a share of a peak: of another peak it is another figure."""
    first = machines[0]
    for each in machines[1:]:
        apart = abs(each["peak_tflops"] - first["peak_tflops"]) / first["peak_tflops"]
        if apart > PEAKS_ALIKE or each["peak_source"] != first["peak_source"]:
            said = ", ".join(
                f"{label} of {m['peak_tflops']:.4g} TFLOPS ({m['peak_source']})"
                for label, m in zip(labels, machines, strict=True)
            )
            return warning("other_peak", f"MFU is of different peaks: {said}")
    return None


def prices(labels: Sequence[str], charged: Sequence[Sequence[Document]]) -> Document | None:
    """Dollars at a price that nobody said are no dollars beside those that were paid."""
    assumed = [any(each["source"] == "assumed" for each in run) for run in charged]
    told = [price(run) for run in charged]
    if not any(assumed):
        return None
    if all(assumed) and len(set(told)) == 1:
        return warning("assumed_price", f"dollars are at an assumed price, {told[0]}, in all runs")
    said = ", ".join(
        f"{label} at {'an assumed ' if is_assumed else ''}{each}"
        for label, is_assumed, each in zip(labels, assumed, told, strict=True)
    )
    return warning("assumed_price", f"dollars are not all at a known price: {said}")


def price(charged: Sequence[Document]) -> str:
    """What an hour was charged with, from the lowest to the highest."""
    told = sorted({f"${each['usd_per_hour']:.2f}" for each in charged})
    return " to ".join(dict.fromkeys([told[0], told[-1]])) + "/h" if told else "-"


def machines(labels: Sequence[str], places: Sequence[str]) -> Document | None:
    """Hours and tokens/s are of the machine as well as of the run."""
    if len(set(places)) == 1:
        return None
    said = ", ".join(f"{label} on {place}" for label, place in zip(labels, places, strict=True))
    return warning("other_machine", f"hours and tokens/s are of different machines: {said}")


def code(labels: Sequence[str], hashes: Sequence[str | None]) -> Document | None:
    """What was trained may differ though the same was asked."""
    if len(set(hashes)) == 1:
        return None
    said = ", ".join(
        f"{label} {each[:12] if each else 'does not say'}"
        for label, each in zip(labels, hashes, strict=True)
    )
    return warning("other_code", f"the runs were made by different code: {said}")


def bytes_a_token(labels: Sequence[str], data: Sequence[DataPlan]) -> Document | None:
    """Equal tokens of two tokenizers are not equal text."""
    if len({each.tokenizer for each in data}) == 1:
        return None
    said = ", ".join(
        f"{label} {each.bytes_per_token:.2f}" for label, each in zip(labels, data, strict=True)
    )
    return warning("other_tokenizer", f"a token is not the same text; bytes a token: {said}")

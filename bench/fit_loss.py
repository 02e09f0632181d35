"""Fits the loss laws of tuppence/plan/loss.py from published points, and writes them.

    python bench/fit_loss.py                     refit, write facts/loss_fits.json, print residuals
    python bench/fit_loss.py --leave-out point   refit without each point: what the spreads rest on
    python bench/fit_loss.py --leave-out size    the same without each model size

The families are in loss_families.py, what the groups are in loss_groups.py. A group's spread is the
80% quantile of its left-out errors. The same points give the same file.
"""

import argparse
import csv
import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from loss_families import Point, fit_chinchilla, fit_gpt2, fit_nanochat, fit_openlm
from loss_groups import GROUPS, key_of, scaling_params

from tuppence.plan.loss import (
    FACTS,
    Group,
    Law,
    effective_tokens,
    predict,
)

PUBLISHED = Path(__file__).parent / "published" / "loss_points.csv"
COVERED = 0.8
FEW = 5  # with fewer left-out points (or sizes) a group takes the pool's spread
MANY_SIZES = 20  # sizes this many lie close enough together that none is new
OWN = ("family", "tokens_known")  # columns of loss_groups.Known that are not Group's


def fit_all(points: list[Point], only: str | None = None) -> dict[str, Law]:
    """Every group's law; `only` one family's (its groups are all that leaving out needs)."""
    family: dict[str, list[Point]] = {}
    for p in points:
        family.setdefault(GROUPS[p.group].family, []).append(p)
    laws: dict[str, Law] = {}
    if only in (None, "chinchilla"):
        laws |= fit_chinchilla(family["chinchilla"])
    if only in (None, "nanochat"):
        laws |= fit_nanochat(family["nanochat"])
    openlm: dict[str, Law] = {}
    if only in (None, "openlm"):
        openlm = fit_openlm(family["openlm"])
        laws |= openlm
    if only == "gpt2":
        openlm = _openlm(tuple(family["openlm"]))
    if only in (None, "gpt2"):
        laws |= fit_gpt2(family["gpt2"], openlm)
    return laws


@cache
def _openlm(points: tuple[Point, ...]) -> dict[str, Law]:
    return fit_openlm(list(points))


def as_groups(
    points: list[Point],
    laws: dict[str, Law],
    widths: dict[str, tuple[float, float]] | None = None,
) -> dict[str, Group]:
    """The laws as plan/loss.py knows them: with their points' sizes and ranges, and spreads."""
    found = {}
    for name, law in laws.items():
        mine = [p for p in points if p.group == name] or [
            p for p in points if GROUPS[p.group].family == GROUPS[name].family
        ]
        sizes = sorted({p.params for p in mine})
        tokens = [p.tokens for p in mine] if GROUPS[name].tokens_known else [0.0]
        told = {k: v for k, v in dataclasses.asdict(GROUPS[name]).items() if k not in OWN}
        spread, unseen = (widths or {}).get(name, (0.0, 0.0))
        found[name] = Group(
            name=name,
            law=law,
            spread=spread,
            unseen_spread=unseen,
            points=len(mine),
            sizes=tuple(sizes) if len(sizes) <= MANY_SIZES else (),
            params_range=(sizes[0], sizes[-1]),
            tokens_range=(min(tokens), max(tokens)),
            **told,
        )
    return found


def left_out(points: list[Point], by: str) -> list[tuple[Point, Group]]:
    """Each point with its group as fitted without it, or without the points of its size."""
    found = []
    batches: dict[object, list[Point]] = {}
    for p in points:
        family = GROUPS[p.group].family
        size = (family, round(math.log(p.params) / 0.3) if family == "chinchilla" else p.params)
        batches.setdefault(size if by == "size" else p, []).append(p)
    for batch in batches.values():
        rest = [p for p in points if p not in batch]
        groups = as_groups(rest, fit_all(rest, only=GROUPS[batch[0].group].family))
        found += [(p, groups[p.group]) for p in batch if p.group in groups]
    return found


def spreads(points: list[Point]) -> dict[str, tuple[float, float]]:
    """(at the points' sizes, between them): half-widths that cover COVERED of left-out points.

    A group with few points takes the pool of such groups; one of one or two sizes takes that of
    its family's groups with few (gpt2's shape is openlm's, and so is what is known of its sizes).
    """
    seen, unseen = (_by_group(left_out(points, by)) for by in ("point", "size"))
    sizes = {name: len({p.params for p in points if p.group == name}) for name in GROUPS}
    few = float(np.quantile([r for rs in seen.values() for r in rs if len(rs) <= FEW], COVERED))
    family: dict[str, list[float]] = {}
    for name, rs in unseen.items():
        if sizes[name] <= FEW:
            family.setdefault(GROUPS[name].family, []).extend(rs)
    family.setdefault("gpt2", []).extend(family.get("openlm", []))
    found = {}
    for name, known in GROUPS.items():
        own, other = seen.get(name, []), unseen.get(name, [])
        spread = float(np.quantile(own, COVERED)) if own else few
        spread = spread if len(own) >= FEW else max(few, spread)
        wide = np.quantile(other if sizes[name] > 2 else family[known.family], COVERED)
        found[name] = (round(spread, 5), round(max(spread, float(wide)), 5))
    return found


def _by_group(errors: list[tuple[Point, Group]]) -> dict[str, list[float]]:
    """What is left of each error when the start-up's and the distance's shares are taken off."""
    found: dict[str, list[float]] = {}
    for point, group in errors:
        at_hand = predict(group, params=point.params, tokens=point.tokens).interval
        known = at_hand.high / at_hand.mid - 1
        error = point.loss / at_hand.mid - 1
        found.setdefault(point.group, []).append(math.sqrt(max(0.0, error**2 - known**2)))
    return found


def read_points(path: Path = PUBLISHED) -> list[Point]:
    """The rows that a law can be fitted to: those with a size, tokens (or a ratio) and a loss."""
    points = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key, params = key_of(row), scaling_params(row)
            if key is None or params is None or not row["loss"]:
                continue
            tokens = float(row["tokens"] or 0) or params * (GROUPS[key].tokens_per_param or 0)
            if not tokens:
                continue
            epochs = float(row["epochs"] or 1)
            worth = effective_tokens(tokens, tokens / max(1.0, epochs))
            points.append(Point(row["id"], key, params, worth, float(row["loss"])))
    return points


def document(groups: dict[str, Group]) -> dict[str, Any]:
    rows = {}
    for name in GROUPS:
        row = dataclasses.asdict(groups[name])
        row["law"] = {k: round(v, 6) if isinstance(v, float) else v for k, v in row["law"].items()}
        row["law"]["startup"] = [[n, round(s, 6)] for n, s in row["law"]["startup"]]
        rows[row.pop("name")] = row
    return {"made_by": "python bench/fit_loss.py", "groups": rows}


def table(
    title: str, errors: list[tuple[Point, Group]], widths: dict[str, tuple[float, float]]
) -> None:
    print(f"{title:32} points  median     p90     max  covered")
    judged: dict[str, list[tuple[float, bool]]] = {}
    for point, group in errors:
        spread, unseen = widths[point.group]
        group = dataclasses.replace(group, spread=spread, unseen_spread=unseen)
        found = predict(group, params=point.params, tokens=point.tokens).interval
        hit = found.low <= point.loss <= found.high
        judged.setdefault(point.group, []).append((abs(found.mid / point.loss - 1), hit))
    for name in GROUPS:
        if name in judged:
            _line(name, judged[name])
    _line("all", [pair for pairs in judged.values() for pair in pairs])


def _line(name: str, pairs: list[tuple[float, bool]]) -> None:
    e = np.array([error for error, _ in pairs])
    inside = sum(hit for _, hit in pairs) / len(pairs)
    shown = [f"{100 * x:6.2f}%" for x in (np.median(e), np.quantile(e, 0.9), e.max())]
    print(f"{name:32} {len(e):6d} {' '.join(shown)}  {100 * inside:6.0f}%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leave-out", choices=("point", "size"))
    parser.add_argument("--points", type=Path, default=PUBLISHED)
    parser.add_argument("--out", type=Path, default=FACTS)
    args = parser.parse_args()
    points = read_points(args.points)
    widths = spreads(points)
    if args.leave_out:
        table(f"left out by {args.leave_out}", left_out(points, args.leave_out), widths)
        return
    groups = as_groups(points, fit_all(points), widths)
    args.out.write_text(json.dumps(document(groups), indent=1) + "\n", "utf-8")
    table("residuals", [(p, groups[p.group]) for p in points], widths)
    print(f"wrote {args.out.name}: {len(groups)} groups")


if __name__ == "__main__":
    main()

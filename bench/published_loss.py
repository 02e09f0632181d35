"""Judges the loss laws by published rows: any CSV with the columns of published/loss_points.csv.

    python bench/published_loss.py [CSV] [--json] [--rows]

A row's group says which law predicts it. Rows of groups without one are predicted by the likest
law, flagged and kept out of the totals. A row without tokens takes them from its FLOPs, or from its
group's ratio; one without a size, from the best split of its FLOPs, or from that ratio. A row is
skipped only where it gives neither size, tokens nor FLOPs, or no loss, and is counted.
"""

import argparse
import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from loss_groups import GROUPS, Row, key_of, number, scaling_params, shape_of
from scores import HEADER, Scored, by_group, shown

from tuppence.config import Interval
from tuppence.plan.loss import Group, groups, predict

PUBLISHED = Path(__file__).parent / "published" / "loss_points.csv"
UNCALIBRATED_SPREAD = (
    0.08  # C4, RedPajama, OpenWebText and FineWeb lie within so much of each other
)
NANOCHAT_FLOPS = 7.1  # of a token and parameter at its best sizes: 6 and attention


def score(csv_path: Path, *, known: dict[str, Group] | None = None) -> dict[str, Any]:
    """{"rows", "skipped", "median_error", "p90_error", "coverage", "groups", "uncalibrated"}.

    By the shipped laws, or by `known` ones. The totals are those of calibrated groups.
    """
    laws = groups() if known is None else known
    with csv_path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    judged = [judge(row, laws) or Scored(row["id"], row["group"]) for row in rows]
    fitted = [found for found in judged if calibrated(found.group)]
    others = [found for found in judged if not calibrated(found.group)]
    return {**by_group(fitted), "uncalibrated": by_group(others)}


def calibrated(name: str) -> bool:
    """Whether any law was fitted to this group of the CSV."""
    return any(key.split("/")[0] == name for key in GROUPS)


def judge(row: Row, laws: dict[str, Group]) -> Scored | None:
    """The row's prediction; None where it gives no loss, or nothing that a law can be asked."""
    actual = number(row, "loss")
    if actual is None:
        return None
    key = key_of(row)
    group = laws[key] if key in laws else likest(row, laws)
    found = _predicted(row, group)
    if found is None:
        return None
    return Scored(row["id"], row["group"], actual, found)


def likest(row: Row, laws: dict[str, Group]) -> Group:
    """The law of the nearest family, its interval opened as wide as corpora differ."""
    if "byte" in row["metric"]:
        family = "nanochat"
    elif row["model_family"] == "Chinchilla":
        family = "chinchilla"
    else:
        family = "openlm" if "NeoX" in row["metric"] else "gpt2"
    name = next(name for name in laws if GROUPS[name].family == family)
    wide = {"spread": UNCALIBRATED_SPREAD, "unseen_spread": UNCALIBRATED_SPREAD}
    return dataclasses.replace(laws[name], **wide)  # type: ignore[arg-type]


def _predicted(row: Row, group: Group) -> Interval | None:
    params, tokens, flops = scaling_params(row), number(row, "tokens"), number(row, "train_flops")
    if params is None and flops:
        params = _best_params(group, flops)
    elif params is None and tokens:
        params = tokens / _ratio(group)
    if params is None:
        return None
    if tokens is None:
        tokens = _tokens(row, group, params, flops)
    epochs = max(1.0, number(row, "epochs") or 1.0)
    unique = tokens / epochs if epochs > 1 else None
    return predict(group, params=params, tokens=tokens, unique_tokens=unique).interval


def _tokens(row: Row, group: Group, params: float, flops: float | None) -> float:
    """From FLOPs where the row gives them, else by the group's ratio."""
    if flops and number(row, "layers") and number(row, "dim"):
        return flops / shape_of(row).flops_per_token
    if flops:
        each = NANOCHAT_FLOPS if group.metric == "bits/byte" else 6.0
        return flops / (each * params)
    return params * _ratio(group)


def _ratio(group: Group) -> float:
    """Tokens per parameter of the group's runs: stated, or at the middle of their ranges."""
    middle = math.sqrt(math.prod(group.tokens_range) / math.prod(group.params_range))
    return group.tokens_per_param or middle


def _best_params(group: Group, flops: float) -> float:
    """The size whose loss is least at so many FLOPs: the frontier of the isoFLOP curves."""
    each = NANOCHAT_FLOPS if group.metric == "bits/byte" else 6.0
    sizes = [10 ** (6 + i / 100) for i in range(600)]
    return min(sizes, key=lambda n: group.law.at(params=n, tokens=flops / each / n)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="?", default=PUBLISHED)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", action="store_true", help="every row beside its prediction")
    args = parser.parse_args()
    if args.rows:
        with args.csv.open(encoding="utf-8", newline="") as file:
            judged = [judge(row, groups()) for row in csv.DictReader(file)]
            for found in filter(None, judged):
                low, mid, high = dataclasses.astuple(found.predicted)
                print(f"{found.name:44} {found.actual:8.4f} {low:8.4f} {mid:8.4f} {high:8.4f}")
    document = score(args.csv)
    if args.json:
        print(json.dumps(document, indent=1))
        return
    for title, part in (("calibrated", document), ("uncalibrated", document["uncalibrated"])):
        print(f"{title:28}{HEADER}")
        for name, figures in [*part["groups"].items(), ("all", part)]:
            print(f"{name:28}{shown(figures)}")


if __name__ == "__main__":
    main()

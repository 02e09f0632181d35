"""How a list of predictions is scored: median and 90th percentile of errors, coverage."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from tuppence.config import Interval


@dataclass(frozen=True)
class Scored:
    """One row beside its prediction; `predicted` is None where it is skipped."""

    name: str
    group: str
    actual: float | None = None
    predicted: Interval | None = None

    @property
    def error(self) -> float:
        """|predicted / actual - 1|."""
        assert self.predicted is not None
        assert self.actual is not None
        return abs(self.predicted.mid / self.actual - 1)

    @property
    def covered(self) -> bool:
        """Whether the actual lies inside the 80% interval."""
        assert self.predicted is not None
        assert self.actual is not None
        return self.predicted.low <= self.actual <= self.predicted.high


def quantile(values: Iterable[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def summary(rows: Iterable[Scored]) -> dict[str, Any]:
    """{"rows", "skipped", "median_error", "p90_error", "coverage"}; None where no row is left."""
    every = list(rows)
    used = [row for row in every if row.predicted is not None]
    errors = [row.error for row in used]
    return {
        "rows": len(used),
        "skipped": len(every) - len(used),
        "median_error": median(errors) if errors else None,
        "p90_error": quantile(errors, 0.9) if errors else None,
        "coverage": fmean(row.covered for row in used) if used else None,
    }


def by_group(rows: Iterable[Scored]) -> dict[str, Any]:
    """The summary, and under "groups" one of each group."""
    every = list(rows)
    names = sorted({row.group for row in every})
    groups = {name: summary(row for row in every if row.group == name) for name in names}
    return {**summary(every), "groups": groups}


def shown(figures: dict[str, Any]) -> str:
    """The figures as columns: rows, skipped, median, 90th percentile, coverage."""
    counts = f"{figures['rows']:5d} {figures['skipped']:7d}"
    if not figures["rows"]:
        return f"{counts}       -       -        -"
    errors = f"{figures['median_error']:7.1%} {figures['p90_error']:7.1%}"
    return f"{counts} {errors} {figures['coverage']:8.0%}"


HEADER = " rows skipped  median     p90  covered"

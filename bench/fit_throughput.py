"""Fit the throughput model's constants to published runs; say honestly how well it predicts.

    python bench/fit_throughput.py                         refit, print, write the facts file
    python bench/fit_throughput.py --leave-out shape       predict each shape without having seen it
    python bench/fit_throughput.py --leave-out framework   predict each framework likewise

Every constant is a physical quantity with a prior: what hardware manuals and kernels' source lead
one to expect, and how sure that is. The fit is the minimum of

    sum over rows weight Huber(log(predicted / actual) / noise) + sum over constants (z / sd)^2 / 2

in logarithms, by Gauss-Newton. A framework's rows weigh 1/sqrt of their number, copies of one
configuration likewise, so that the 145 rows of one table do not drown what the others know.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from published_rows import PUBLISHED
from scores import quantile
from throughput_evidence import PRIORS, Sample, load

from tuppence.plan.job import Job
from tuppence.plan.throughput import (
    FACTS,
    Fit,
    deviation_keys,
    family,
    framework_key,
    knowledge,
    tokens_per_second,
)

NOISE = 0.05  # relative scatter of a published figure
HUBER = 1.5  # residuals beyond this many noises pull no harder
DEVIATION_SD = {"all": 0.03, "framework": 0.2, "family": 0.1, "precision": 0.08}
SHRINK_SHAPES = 4  # a framework's own spread counts as its shapes against this many of all


# ---------------------------------------------------------------- the fit


def fit(samples: list[Sample], *, start: Fit | None = None, rounds: int = 12) -> Fit:
    """The constants and deviations that explain the samples best. Deterministic."""
    keys = sorted({k for s in samples for k in _keys(s)})
    names = list(PRIORS)
    prior = np.array([math.log(PRIORS[n][0]) for n in names] + [0.0] * (1 + len(keys)))
    sd = [PRIORS[n][1] for n in names] + [DEVIATION_SD[k[0]] for k in [("all",), *keys]]
    precision = 1 / np.array(sd) ** 2
    x = prior.copy()
    if start:
        x[: len(names)] = [math.log(start.constants[n]) for n in names]
        x[len(names) :] = [start.deviations.get(k, 0.0) for k in [("all",), *keys]]

    def unpack(x: np.ndarray) -> Fit:
        constants = {n: math.exp(v) for n, v in zip(names, x, strict=False)}
        return Fit(
            constants, dict(zip([("all",), *keys], map(float, x[len(names) :]), strict=True))
        )

    touching = {k: [i for i, s in enumerate(samples) if k in _keys(s)] for k in keys}
    weights = np.array([s.weight for s in samples]) / NOISE**2
    everyone = list(range(len(samples)))
    for _ in range(rounds):
        base = _log_errors(samples, unpack(x), everyone)
        slope = np.zeros((len(samples), len(x)))
        for column in range(len(x)):
            key = keys[column - len(names) - 1] if column > len(names) else None
            moved = touching[key] if key else everyone
            y = x.copy()
            y[column] += 1e-4
            slope[moved, column] = (_log_errors(samples, unpack(y), moved) - base[moved]) / 1e-4
        size = np.maximum(np.abs(base) / NOISE / HUBER, 1)
        pull = weights / size
        curvature = slope.T @ (slope * pull[:, None]) + np.diag(precision)
        gradient = slope.T @ (pull * base) + (x - prior) * precision
        step = np.clip(-np.linalg.solve(curvature, gradient), -0.5, 0.5)
        x = x + step
        if np.abs(step).max() < 1e-3:
            break
    return unpack(x)


def _keys(sample: Sample) -> tuple[tuple[str, ...], ...]:
    return deviation_keys(sample.job, sample.framework)


def predict(sample: Sample, model: Fit) -> float:
    """Tokens a second and GPU."""
    flat = replace(
        model, half_widths={("known",): 0, ("other cards",): 0, ("unknown framework",): 0}
    )
    return tokens_per_second(sample.job, flat).mid / sample.job.gpu_count


def _log_errors(samples: list[Sample], model: Fit, which: list[int]) -> np.ndarray:
    return np.array([math.log(predict(samples[i], model) / samples[i].actual) for i in which])


# ---------------------------------------------------------------- leaving out


@dataclass(frozen=True)
class Unseen:
    """A sample's prediction by a fit that had not seen its group, and what that fit knew."""

    sample: Sample
    predicted: float
    kind: str

    @property
    def error(self) -> float:
        return abs(self.predicted / self.sample.actual - 1)

    @property
    def log_error(self) -> float:
        return math.log(self.predicted / self.sample.actual)


def group_of(sample: Sample, by: str) -> tuple[object, ...]:
    """What is left out together with a sample."""
    if by == "shape":
        return sample.shape
    if by == "cards":
        return (sample.framework, family(sample.job.gpu))
    return (sample.framework,)


def unseen(samples: list[Sample], by: str) -> list[Unseen]:
    """Every published sample, predicted by a fit without its group."""
    full = fit(samples)
    out = []
    for group in sorted({group_of(s, by) for s in samples if s.published}, key=str):
        rest = [s for s in samples if group_of(s, by) != group]
        model = fit(rest, start=full, rounds=5)
        for s in samples:
            if s.published and group_of(s, by) == group:
                out.append(Unseen(s, predict(s, model), knowledge(s.job, model.deviations)))
    return out


def table_baseline(samples: list[Sample], by: str) -> dict[str, float]:
    """The model to beat: median MFU of (card, framework, precision), else of fewer of them."""
    published = [s for s in samples if s.published]
    levels: list[Callable[[Job], tuple[str, ...]]] = [
        lambda j: (j.gpu.name, framework_key(j.framework), j.precision),
        lambda j: (j.gpu.name, j.precision),
        lambda j: (j.gpu.name,),
        lambda j: (),
    ]
    out = {}
    for s in published:
        rest = [o for o in published if group_of(o, by) != group_of(s, by)]
        for level in levels:
            alike = [_mfu(o) for o in rest if level(o.job) == level(s.job)]
            if alike:
                break
        out[s.name] = median(alike) / _mfu(s) * s.actual
    return out


def _mfu(s: Sample) -> float:
    sheet = s.job.gpu.sheet_tflops
    return s.actual * s.job.shape.flops_per_token / (sheet.get("bf16") or sheet["fp16"])


def leave_out(csv_path: Path = PUBLISHED, by: str = "shape") -> dict[str, dict[str, float]]:
    """Errors on groups that the fit had not seen, ours and the table's, by subset of rows. A row's
    interval is as wide as the errors on the other groups say, none of its own counted."""
    samples = load(Path(csv_path))
    table = table_baseline(samples, by)
    tried = {each: unseen(samples, each) for each in ("shape", "cards", "framework")}
    results = tried[by]
    inside: dict[str, bool] = {}
    for group in {group_of(u.sample, by) for u in results}:
        others = [u for us in tried.values() for u in us if group_of(u.sample, by) != group]
        widths = half_widths(others, [])
        for u in results:
            if group_of(u.sample, by) == group:
                width = widths.get((u.kind, u.sample.framework), widths[(u.kind,)])
                inside[u.sample.name] = abs(u.log_error) <= width
    subsets = {name: [u for u in results if test(u)] for name, test in _subsets(results).items()}
    return {name: _row(chosen, table, inside) for name, chosen in subsets.items() if chosen}


def _row(
    chosen: list[Unseen], table: dict[str, float], inside: dict[str, bool]
) -> dict[str, float]:
    ours = [u.error for u in chosen]
    theirs = [abs(table[u.sample.name] / u.sample.actual - 1) for u in chosen]
    return {
        "rows": len(chosen),
        "median_error": median(ours),
        "p90_error": quantile(ours, 0.9),
        "coverage": sum(inside[u.sample.name] for u in chosen) / len(chosen),
        "table_median_error": median(theirs),
        "table_p90_error": quantile(theirs, 0.9),
    }


def _subsets(results: list[Unseen]) -> dict[str, Callable[[Unseen], bool]]:
    tests: dict[str, Callable[[Unseen], bool]] = {
        "all": lambda u: True,
        "all but llm-foundry": lambda u: u.sample.framework != "llm-foundry",
        "small shapes (dim <= 768)": lambda u: u.sample.job.shape.n_embd <= 768,
        "sharded, more than 64 GPUs": lambda u: (
            u.sample.job.gpu_count > 64 and u.sample.job.parallel == "fsdp"
        ),
        "PCIe and consumer cards": lambda u: u.sample.job.gpu.link != "nvlink",
        "fp8": lambda u: u.sample.job.precision == "fp8",
    }
    for name in sorted({u.sample.framework for u in results}):
        tests[f"  {name}"] = partial(_is_of, name)
    return tests


def _is_of(name: str, u: Unseen) -> bool:
    return u.sample.framework == name


# ---------------------------------------------------------------- intervals


def half_widths(left_out: list[Unseen], in_sample: list[Unseen]) -> dict[tuple[str, ...], float]:
    """80% half-widths (logarithms): what fits that had not seen a group got wrong, by how much they
    knew. A framework keeps its own spread, shrunk to that of all; one that was only ever measured
    on one shape has its rows' scatter instead, counted for less."""
    out: dict[tuple[str, ...], float] = {}
    for kind in ("known", "other cards", "unknown framework"):
        out[(kind,)] = _width([u for u in left_out if u.kind == kind])
    for name in sorted({u.sample.framework for u in in_sample}):
        own = [u for u in left_out if u.kind == "known" and u.sample.framework == name]
        n = float(len({(u.sample.shape, u.sample.job.shape.sequence_len) for u in own}))
        if not own:
            own = [u for u in in_sample if u.sample.framework == name]
            n = math.sqrt(len(own)) if len(own) > 1 else 0.0
        logs = n * math.log(_width(own)) + SHRINK_SHAPES * math.log(out[("known",)])
        out[("known", name)] = math.exp(logs / (n + SHRINK_SHAPES))
    return out


def _width(chosen: list[Unseen]) -> float:
    """The 80% quantile of |error|, rows weighing as in the fit; at least 2%."""
    ranked = sorted((abs(u.log_error), u.sample.weight) for u in chosen)
    total, seen = sum(w for _, w in ranked), 0.0
    for size, weight in ranked:
        seen += weight
        if seen >= 0.8 * total:
            return max(0.02, size)
    return 0.3


def shipped_widths(samples: list[Sample], model: Fit) -> dict[tuple[str, ...], float]:
    """The widths of the facts file: shapes, cards and frameworks left out in turn."""
    left_out = [u for by in ("shape", "cards", "framework") for u in unseen(samples, by)]
    seen = [Unseen(s, predict(s, model), "known") for s in samples if s.published]
    return half_widths(left_out, seen)


# ---------------------------------------------------------------- the facts file


def facts_of(
    model: Fit, samples: list[Sample], widths: dict[tuple[str, ...], float]
) -> dict[str, Any]:
    """What facts/throughput_fit.json holds."""
    errors = [abs(predict(s, model) / s.actual - 1) for s in samples if s.published]

    def named(numbers: dict[tuple[str, ...], float]) -> dict[str, float]:
        return {" | ".join(k): round(v, 4) for k, v in sorted(numbers.items())}

    return {
        "about": "written by bench/fit_throughput.py from bench/published/throughput.csv; "
        "plan/throughput.py says how it is used",
        "rows": len(errors),
        "in_sample_median_error": round(median(errors), 4),
        "in_sample_p90_error": round(quantile(errors, 0.9), 4),
        "constants": {
            name: {
                "value": float(f"{model.constants[name]:.5g}"),
                "prior": prior,
                "prior_log_sd": sd,
                "meaning": meaning,
            }
            for name, (prior, sd, meaning) in PRIORS.items()
        },
        "log_time_deviations": named(model.deviations),
        "log_half_widths": named(widths),
    }


def print_leave_out(table: dict[str, dict[str, float]], by: str) -> None:
    """Ours beside the table of median MFU, by subset."""
    print(f"each {by} predicted by a fit that had not seen it; the table of median MFU likewise")
    print(f"{'rows left out':<28}{'rows':>5}{'median':>9}{'p90':>8}{'80% has':>9}", end="")
    print(f"{'table median':>14}{'table p90':>11}")
    for name, r in table.items():
        print(f"{name:<28}{r['rows']:>5}{r['median_error']:>9.1%}{r['p90_error']:>8.1%}", end="")
        print(f"{r['coverage']:>9.0%}{r['table_median_error']:>14.1%}{r['table_p90_error']:>11.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--leave-out", choices=("shape", "framework", "cards"))
    parser.add_argument("--csv", type=Path, default=PUBLISHED)
    asked = parser.parse_args()
    if asked.leave_out:
        print_leave_out(leave_out(asked.csv, asked.leave_out), asked.leave_out)
        return
    samples = load(asked.csv)
    model = fit(samples)
    facts = facts_of(model, samples, shipped_widths(samples, model))
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name, entry in facts["constants"].items():
        print(f"{name:<30}{entry['value']:>10.4g}  prior {entry['prior']:<8g} {entry['meaning']}")
    for name, value in {**facts["log_time_deviations"], **facts["log_half_widths"]}.items():
        print(f"{name:<50}{value:>+8.3f}")
    print(f"{facts['rows']} rows: median error {facts['in_sample_median_error']:.1%}, ", end="")
    print(f"p90 {facts['in_sample_p90_error']:.1%} in sample; wrote {FACTS.name}")


if __name__ == "__main__":
    main()

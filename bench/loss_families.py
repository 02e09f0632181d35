"""The four families of loss laws and how each is fitted to its points; bench/fit_loss.py runs them.

    openlm      C4, RedPajama, RefinedWeb: one shape, a floor for each corpus
    chinchilla  MassiveText, digitised, on its own
    nanochat    FineWeb-Edu: isoFLOP curves with the runs on the same tokens; others scale the whole
    gpt2        openlm's shape through GPT-2's points; recipes are multiples of AdamW's tokens

Huber's loss on log residuals as Besiroglu et al. 2024 (arXiv:2404.10102), minimised by
Levenberg-Marquardt from one start: the same points give the same laws.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from loss_groups import WARMUP_TOKENS

from tuppence.plan.loss import PER_PARAMS, PER_TOKENS, Law

HUBER = 0.005  # log residuals beyond it count linearly: outliers of digitising do not steer
STARTED = 0.67  # warm-ups that OpenLM's start-up term is long: exp(p[5]) of fit_openlm
WARMUP_TOKENS_LLMC = 700 * 524_288  # its train script: 700 steps of 2^19 tokens

Array = Any  # numpy's, whose types mypy does not follow here


@dataclasses.dataclass(frozen=True)
class Point:
    """One published loss: N, D (repeats discounted) and the group's key."""

    name: str
    group: str
    params: float
    tokens: float
    loss: float


# ---------------------------------------------------------------- the minimiser


def minimise(predict: Callable[[Array], Array], start: Array, losses: Array) -> Array:
    """Parameters whose predicted losses are nearest, by Huber's loss of the log residuals."""
    p, damping = np.array(start, float), 1e-2
    cost, residual = _huber(predict, p, losses)
    for _ in range(400):
        steps = 1e-5 * np.eye(len(p))
        slopes = [(np.log(predict(p + h)) - np.log(predict(p - h))) / 2e-5 for h in steps]
        j, w = np.array(slopes).T, np.minimum(1, HUBER / np.maximum(abs(residual), 1e-12))
        hessian, gradient = j.T @ (w[:, None] * j), j.T @ (w * residual)
        for _ in range(12):
            diagonal = damping * np.diag(np.diag(hessian) + 1e-12)
            trial = p - np.linalg.solve(hessian + diagonal, gradient)
            found, left = _huber(predict, trial, losses)
            if found < cost:
                break
            damping *= 4
        else:
            return p
        gained, p, cost, residual = cost - found, trial, found, left
        damping = max(damping / 8, 1e-9)
        if gained < 1e-12:
            return p
    return p


def _huber(predict: Callable[[Array], Array], p: Array, losses: Array) -> tuple[float, Array]:
    with np.errstate(all="ignore"):
        r = np.log(predict(p)) - np.log(losses)
    if not np.isfinite(r).all():
        return math.inf, r
    a = abs(r)
    return float(np.where(a < HUBER, r * r / 2, HUBER * (a - HUBER / 2)).sum()), r


def curve(p: Array, n: Array, d: Array, *, mu: float = 0.0, late: Array | float = 0.0) -> Array:
    """The law of plan/loss.py: p = log E, log A, alpha, log B, beta; logs of N and D."""
    data = np.exp(p[3] - p[4] * d + mu * n) * (1 + late)
    return np.exp(p[0]) + np.exp(p[1] - p[2] * n + mu * d) + data


def _begun(exponent: float, log_ratio: Array) -> Array:
    """min(1, s N / D)^gamma of the start-up term."""
    return np.exp(exponent * np.minimum(0.0, log_ratio))


def logs(points: list[Point]) -> tuple[Array, Array, Array]:
    """(log N, log D, loss) in the law's units."""
    n = np.log([p.params / PER_PARAMS for p in points])
    return n, np.log([p.tokens / PER_TOKENS for p in points]), np.array([p.loss for p in points])


# ---------------------------------------------------------------- the families


def fit_chinchilla(points: list[Point]) -> dict[str, Law]:
    n, d, losses = logs(points)
    per_param = math.log(PER_PARAMS / PER_TOKENS) + n - d  # of log s + log(N / D)

    def predict(p: Array) -> Array:
        return curve(p, n, d, late=_begun(p[6], p[5] + per_param))

    p = minimise(predict, [0.57, -0.2, 0.34, 0.05, 0.34, -1.7, 1.6], losses)
    return {"chinchilla-epoch-svg": _law(p, startup=((PER_PARAMS, _e(p[5])),), exponent=p[6])}


def fit_openlm(points: list[Point]) -> dict[str, Law]:
    """One shape and a floor for each corpus; the start-up term is k warm-ups long."""
    names = sorted({p.group for p in points})
    which = np.array([names.index(p.group) for p in points])
    n, d, losses = logs(points)
    warmup = np.log([_warmup(p.params) * p.params / p.tokens for p in points])

    def predict(p: Array) -> Array:
        shift = np.concatenate([[0.0], p[7 : 6 + len(names)]])[which]
        return shift + curve(p, n, d, late=_begun(p[6], p[5] + warmup))

    start = [0.33, 0.37, 0.18, -0.12, 0.29, -0.4, 2.1, *[0.1] * (len(names) - 1)]
    p = minimise(predict, start, losses)
    laws = {}
    for i, name in enumerate(names):
        startup = tuple((size, _e(p[5]) * _warmup(size)) for size in sorted(WARMUP_TOKENS))
        law = _law(p, startup=startup, exponent=p[6])
        laws[name] = dataclasses.replace(law, floor=law.floor + (float(p[6 + i]) if i else 0.0))
    return laws


def fit_nanochat(points: list[Point]) -> dict[str, Law]:
    """The isoFLOP curves and the runs on the same corpus and tokens; others scale the whole law."""
    same = ("nanochat-isoflop-jan26", "nanochat-2026-fwe-32k")
    n, d, losses = logs([p for p in points if p.group in same])
    p = minimise(lambda p: curve(p, n, d, mu=p[5]), [-0.65, -1.6, 0.3, -1.6, 0.33, 0.06], losses)
    shape = _law(p, coupling=float(p[5]))
    laws = dict.fromkeys(same, shape)
    for name in {p.group for p in points} - set(same):
        ratios = [p.loss / at(shape, p) for p in points if p.group == name]
        scale = math.exp(sum(map(math.log, ratios)) / len(ratios))
        laws[name] = dataclasses.replace(
            shape, floor=shape.floor * scale, size=shape.size * scale, data=shape.data * scale
        )
    return laws


def fit_gpt2(points: list[Point], openlm: dict[str, Law]) -> dict[str, Law]:
    """openlm's shape; a floor through each corpus, and each recipe's tokens against AdamW's.

    The undecayed losses of one run are a curve of their own: floor, data term and its exponent.
    """
    shape = dataclasses.replace(next(iter(openlm.values())), startup=())
    groups: dict[str, list[Point]] = {}
    for p in points:
        groups.setdefault(p.group, []).append(p)
    laws: dict[str, Law] = {}
    for name in ("gpt2-fineweb", "gpt2-owt", "gpt2-webtext-on-owt"):
        if name in groups:
            through = _sizes_only if name == "gpt2-webtext-on-owt" else _floor_through
            laws[name] = through(shape, groups[name])
    if "gpt2-fineweb-undecayed" in groups:
        laws["gpt2-fineweb-undecayed"] = _undecayed(shape, groups["gpt2-fineweb-undecayed"])
    for name in groups:
        if name not in laws and "gpt2-fineweb" in laws:
            laws[name] = _efficiency_through(laws["gpt2-fineweb"], groups[name])
    return laws


def _floor_through(law: Law, points: list[Point]) -> Law:
    off = [p.loss - at(law, p) for p in points]
    return dataclasses.replace(law, floor=law.floor + sum(off) / len(off))


def _efficiency_through(law: Law, points: list[Point]) -> Law:
    """The multiple of AdamW's tokens at which the points are met on average (bisection)."""
    low, high = 0.1, 100.0
    for _ in range(60):
        e = math.sqrt(low * high)
        trial = dataclasses.replace(law, efficiency=e)
        if sum(math.log(at(trial, p) / p.loss) for p in points) > 0:
            low = e
        else:
            high = e
    return dataclasses.replace(law, efficiency=math.sqrt(low * high))


def _sizes_only(shape: Law, points: list[Point]) -> Law:
    """Nothing is known of the tokens: a floor and a size term through the points."""
    law = dataclasses.replace(shape, data=0.0)
    slope, off = np.polyfit([at(law, p) - law.floor for p in points], [p.loss for p in points], 1)
    return dataclasses.replace(law, floor=float(off), size=law.size * float(slope))


def _undecayed(shape: Law, points: list[Point]) -> Law:
    """One run seen while its rate was high; at one size, so that the size term is the shape's."""
    _, d, losses = logs(points)
    s = shape.startup_exponent
    warmup = STARTED * WARMUP_TOKENS_LLMC
    late = _begun(s, np.log([warmup / p.tokens for p in points]))
    p = minimise(
        lambda p: np.exp(p[0]) + np.exp(p[1] - p[2] * d) * (1 + late), [1.04, 0.05, 0.38], losses
    )
    size = points[0].params
    floor = _e(p[0]) - dataclasses.replace(shape, floor=0.0, data=0.0).at(params=size, tokens=1)[0]
    startup = ((size, warmup / size),)
    seen = {"floor": floor, "data": _e(p[1]), "data_exponent": float(p[2])}
    return dataclasses.replace(shape, **seen, startup=startup)


def _law(
    p: Array,
    *,
    coupling: float = 0.0,
    startup: tuple[tuple[float, float], ...] = (),
    exponent: float = 1.0,
) -> Law:
    shape = (_e(p[0]), _e(p[1]), float(p[2]), _e(p[3]), float(p[4]))
    return Law(*shape, coupling=coupling, startup=startup, startup_exponent=float(exponent))


def _e(x: float) -> float:
    return float(math.exp(x))


def _warmup(params: float) -> float:
    """Warm-up tokens per parameter of the published size that is nearest."""
    nearest = min(WARMUP_TOKENS, key=lambda size: abs(math.log(size / params)))
    return WARMUP_TOKENS[nearest] / nearest


def at(law: Law, point: Point) -> float:
    return law.at(params=point.params, tokens=point.tokens)[0]

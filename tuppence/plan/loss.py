"""Which validation loss to expect, where anything is known, with its 80% interval.

    L(N, D) = E + A N^-alpha D^mu + B (e D)^-beta N^mu (1 + min(1, s N / D)^gamma)    a group's Law
    D       = U + U R (1 - exp(-(epochs - 1) / R))                           repeats of U tokens

A group is one corpus, tokenizer, recipe and validation set: losses of two groups are not
comparable. Floor, size and data terms are Hoffmann et al. 2022 (arXiv:2203.15556); `mu` lets runs
far from the best ratio of tokens to parameters lose more than that law grants (nanochat's isoFLOP
curves ask for it); `e` is a recipe's token efficiency beside its group's plainest; `s` tokens per
parameter pass before training is under way (warm-up), which raises the loss of very short runs.
Repeats are Muennighoff et al. 2023 (arXiv:2305.16264). Coefficients and spreads come from `python
bench/fit_loss.py`, refitted from published points; nothing known is said to be unknown.

The shipped default recipe has a Fit of its own, L(D) = E + A D^-alpha, from `python
bench/loss_fit.py`, which trains the points; it is not extrapolated further than a factor of two.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tuppence.config import DataPlan, Interval, ModelPlan, OptimizerPlan, SchedulePlan
from tuppence.plan.cost import Shape

FACTS = Path(__file__).parent / "facts" / "loss_fits.json"
PER_PARAMS, PER_TOKENS = 1e8, 1e9  # a Law's A is the size term at so many, its B the data term
REPEAT_DECAY = 15.39  # R: Muennighoff et al. 2023, section 6
FEW_EPOCHS = 4.0  # worth nearly as much as new text
MANY_EPOCHS = 16.0  # their points support the penalty this far
STARTED = "the run starts from trained weights, and no law tells what those know"

# How the interval widens, as shares of the loss; each is held to left-out points by bench/fit_loss.
PER_EFOLD = 0.008  # for every factor of e outside the points' range of N or of D
STARTUP_SHARE = 0.4  # of what the start-up term adds
REPEAT_SHARE = 0.25  # of what repeating adds; twice that beyond MANY_EPOCHS
SAME_SIZE = 0.05  # in log N
FAR = 10.0  # times outside the points: said in words
REFIT_RATIO = 10.0  # tokens per parameter: shorter runs are still in the start-up term
SAMPLE = re.compile(r"_\d+bt$")  # of a corpus: a name's end
REFIT_PART = 10.0  # a run's tokens over those of the run it may be predicted from


# ---------------------------------------------------------------- any published group


@dataclass(frozen=True)
class Law:
    """The formula above. `startup` lists (parameters, s); the nearest size's s holds."""

    floor: float
    size: float
    size_exponent: float
    data: float
    data_exponent: float
    coupling: float = 0.0
    efficiency: float = 1.0
    startup: tuple[tuple[float, float], ...] = ()
    startup_exponent: float = 1.0

    def at(self, *, params: float, tokens: float) -> tuple[float, float]:
        """(loss, the part of it that the start-up term adds)."""
        n, d = math.log(params / PER_PARAMS), math.log(tokens * self.efficiency / PER_TOKENS)
        if self.coupling:
            n, d = min(n, self._turn_n(d)), min(d, self._turn_d(n))
        size = self.size * math.exp(self.coupling * d - self.size_exponent * n)
        data = self.data * math.exp(self.coupling * n - self.data_exponent * d)
        late = 0.0
        if self.startup:
            begun = min(1.0, self._startup(params) * params / tokens)
            late = data * begun**self.startup_exponent
        return self.floor + size + data + late, late

    def _turn_d(self, n: float) -> float:
        """log D from which `mu` would have more tokens hurt: the loss stays flat there instead."""
        ratio = self.data_exponent * self.data / (self.coupling * self.size)
        both = self.coupling + self.data_exponent
        return (math.log(ratio) + (self.coupling + self.size_exponent) * n) / both

    def _turn_n(self, d: float) -> float:
        """log N from which `mu` would have more parameters hurt."""
        ratio = self.size_exponent * self.size / (self.coupling * self.data)
        both = self.coupling + self.size_exponent
        return (math.log(ratio) + (self.coupling + self.data_exponent) * d) / both

    def _startup(self, params: float) -> float:
        if len(self.startup) == 1:
            return self.startup[0][1]
        return min(self.startup, key=lambda known: abs(math.log(known[0] / params)))[1]


@dataclass(frozen=True)
class Group:
    """One corpus, tokenizer, recipe and validation set, and its law.

    `counts` says which parameters N counts: "body+head" (matmul weights) or "total". The 80%
    interval's half-width inside the points' ranges is a share of the loss: `spread` at the points'
    own `sizes` (none listed: there are many), `unseen_spread` between them. `tokens_per_param`
    stands where the source gives no tokens. `families` and `optimizers` are the runs of tuppence
    that it answers for; none where it only tells of others' runs.
    """

    name: str
    source: str
    tokenizer: str
    families: tuple[str, ...]
    optimizers: tuple[str, ...]
    recipe: str
    evaluated_on: str
    metric: str
    counts: str
    law: Law
    spread: float
    unseen_spread: float
    points: int
    sizes: tuple[float, ...]
    params_range: tuple[float, float]
    tokens_range: tuple[float, float]
    bytes_per_token: float | None = None
    tokens_per_param: float | None = None

    def params_of(self, shape: Shape) -> int:
        """A shape's parameters as this group counts N."""
        return shape.params if self.counts == "total" else shape.params_matmul


@dataclass(frozen=True)
class Prediction:
    """A loss in `metric`. `extrapolation` is 1 inside the points' range, else times outside it."""

    interval: Interval
    metric: str
    why: str
    extrapolation: float
    effective_tokens: float
    epochs: float


@cache
def groups() -> dict[str, Group]:
    """Every group with a law, by name."""
    found = {}
    for name, row in json.loads(FACTS.read_text(encoding="utf-8"))["groups"].items():
        law = dict(row.pop("law"))
        law["startup"] = tuple((n, s) for n, s in law.get("startup", ()))
        row |= {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
        found[name] = Group(name=name, law=Law(**law), **row)
    return found


def find_group(*, source: str, tokenizer: str, family: str, optimizer: str) -> Group | None:
    """The group that such a run belongs to; None where its loss is unknown (see `unknown`).

    A sample of a corpus (fineweb_10bt) has the loss of all of it.
    """
    source = SAMPLE.sub("", source)
    for group in groups().values():
        if (group.source, group.tokenizer) != (source, tokenizer):
            continue
        if family in group.families and optimizer in group.optimizers:
            return group
    return None


def predict(
    group: Group, *, params: float, tokens: float, unique_tokens: float | None = None
) -> Prediction:
    """The loss of `params` (as `group.counts` counts them) after `tokens` of training.

    `unique_tokens` is the corpus where it is smaller than the run; more than MANY_EPOCHS of it
    widen the interval further, and the caller warns.
    """
    worth = effective_tokens(tokens, unique_tokens)
    mid, late = group.law.at(params=params, tokens=worth)
    repeated = 0.0
    epochs = tokens / unique_tokens if unique_tokens else 1.0
    if epochs > 1:
        often = 2 if epochs > MANY_EPOCHS else 1
        repeated = often * REPEAT_SHARE * (mid - group.law.at(params=params, tokens=tokens)[0])
    outside = max(_outside(params, group.params_range), _outside(worth, group.tokens_range))
    seen = not group.sizes or any(abs(math.log(params / n)) < SAME_SIZE for n in group.sizes)
    spread = group.spread if seen else group.unseen_spread
    far = PER_EFOLD * math.log(outside)
    width = math.hypot(spread * mid, far * mid, STARTUP_SHARE * late, repeated)
    return Prediction(
        interval=Interval(mid - width, mid, mid + width),
        metric=group.metric,
        why=_why(group, outside, epochs),
        extrapolation=outside,
        effective_tokens=worth,
        epochs=epochs,
    )


def effective_tokens(tokens: float, unique: float | None) -> float:
    """What `tokens` drawn from a corpus of `unique` are worth: 4 epochs 3.7 of it, 16 10.6."""
    if not unique or tokens <= unique:
        return tokens
    again = tokens / unique - 1
    return unique + unique * REPEAT_DECAY * -math.expm1(-again / REPEAT_DECAY)


def refit_tokens(*, params: float, tokens: float) -> float:
    """How many tokens an own run must have before it tells of one of `tokens` by `params`.

    Past the start-up term, and no less than a tenth: beyond 10x a law is a guess (FAR).
    """
    return max(REFIT_RATIO * params, tokens / REFIT_PART)


def unknown(*, source: str, tokenizer: str, params: float, tokens: float) -> str:
    """Why there is no loss, and what would give one."""
    n = refit_tokens(params=params, tokens=tokens)
    return (
        f"unknown data: no published runs of {source} in {tokenizer} tokens with this family and "
        f"optimizer; refit after {n:,.0f} tokens (a tenth of the run, and {REFIT_RATIO:g} a "
        f"parameter, as shorter runs are still starting up)"
    )


def comparable(a: Group, b: Group) -> str | None:
    """Why losses of two groups cannot be compared; None where they can."""
    if a.evaluated_on != b.evaluated_on:
        return f"not comparable: {a.evaluated_on} and {b.evaluated_on} are other validation sets"
    if a.metric != b.metric:
        return f"not comparable: {a.metric} and {b.metric}; convert by bytes per token first"
    if a.tokenizer != b.tokenizer and a.metric != "bits/byte":
        return f"not comparable: a token of {a.tokenizer} is not a token of {b.tokenizer}"
    return None


def _outside(value: float, known: tuple[float, float]) -> float:
    """Times that `value` lies outside a range; 1 inside it, and where the range is unknown (0)."""
    low, high = known
    if not high:
        return 1.0
    return max(1.0, low / value, value / high)


def _why(group: Group, outside: float, epochs: float) -> str:
    words = f"fit of {group.points} published {'run' if group.points == 1 else 'runs'}"
    words += f": {group.recipe} on {group.source}, loss on {group.evaluated_on}"
    if outside > FAR:
        words += f"; {outside:.0f}x outside their range: a guess"
    elif outside > 1 + SAME_SIZE:
        words += f"; {outside:.1f}x outside their range"
    if epochs > 1:
        words += f"; {epochs:.1f} epochs"
    return words


# ---------------------------------------------------------------- the shipped default recipe


Recipe = tuple[object, ...]


@dataclass(frozen=True)
class Fit:
    """One fitted curve and where it holds. `spread` is the 80% interval's half-width in nats."""

    source: str
    tokenizer: str
    recipe: Recipe
    floor: float
    scale: float
    alpha: float
    min_tokens: float
    max_tokens: float
    spread: float
    points: int


FITS: tuple[Fit, ...] = (
    Fit(
        source="shakespeare",
        tokenizer="char",
        recipe=(
            ("depth", 4, 3, 192, 256),
            (3, True, False, False, 0.0),
            ("muon", 0.01, 0.0375, 0.001, 0.1, 2048),
            ("wsd", 0.02, 0.5, 0.0),
        ),
        floor=1.3714,
        scale=129_530,
        alpha=0.950,
        min_tokens=512_000,
        max_tokens=4_096_000,
        spread=0.020,  # residuals 0.005, seeds 0.003; what runs on the clock were off by before
        points=4,
    ),
)


@dataclass(frozen=True)
class Expectation:
    """What is known of a run's val loss: a fit, a group's law at one size, or why there is none."""

    fit: Fit | None
    why: str
    law: Callable[[float], Prediction] | None = None

    def at(self, tokens: float) -> tuple[Interval | None, str]:
        """The loss after so many training tokens, and what it rests on or why there is none."""
        fit = self.fit
        if tokens <= 0:
            return None, "nothing is trained"
        if self.law is not None:
            predicted = self.law(tokens)
            return predicted.interval, predicted.why
        if fit is None:
            return None, self.why
        if not fit.min_tokens / 2 <= tokens <= fit.max_tokens * 2:
            measured = f"{fit.min_tokens:,.0f} to {fit.max_tokens:,.0f} tokens"
            return None, f"{tokens:,.0f} tokens is outside what was measured ({measured})"
        mid = fit.floor + fit.scale * tokens**-fit.alpha
        return Interval(mid - fit.spread, mid, mid + fit.spread), self.why


def expectation(
    data: DataPlan,
    model: ModelPlan,
    batch_tokens: int,
    optimizer: OptimizerPlan,
    schedule: SchedulePlan,
) -> Expectation:
    """The fit that was made of just this corpus, model and recipe, whatever its budget and seed."""
    known = [f for f in FITS if (f.source, f.tokenizer) == (data.source, data.tokenizer)]
    if not known:
        return _published(data, model, optimizer)
    recipe = recipe_of(model, batch_tokens, optimizer, schedule)
    fit = next((f for f in known if f.recipe == recipe), None)
    if fit is None:
        return Expectation(None, "this shape and training were not measured on this data")
    return Expectation(fit, f"fit of {fit.points} runs of this recipe (python bench/loss_fit.py)")


def _published(data: DataPlan, model: ModelPlan, optimizer: OptimizerPlan) -> Expectation:
    """The law of published runs of this corpus, where it tells of nats a token as receipts do."""
    group = find_group(
        source=data.source,
        tokenizer=data.tokenizer,
        family=model.family,
        optimizer=optimizer.name,
    )
    if group is None or group.metric != "nats/token":
        return Expectation(
            None, f"unknown data: no runs of {data.source} in {data.tokenizer} tokens"
        )
    params = float(model.params_matmul if group.counts == "body+head" else model.params)
    unique = float(data.train_tokens)
    return Expectation(
        None,
        "",
        lambda tokens: predict(group, params=params, tokens=tokens, unique_tokens=unique),
    )


def recipe_of(
    model: ModelPlan, batch_tokens: int, optimizer: OptimizerPlan, schedule: SchedulePlan
) -> Recipe:
    """What a loss depends on besides data and length, but for the looped family's own numbers,
    which no fit is of."""
    whole = all(window == model.sequence_len for window in model.windows)
    shape = (model.family, model.n_layer, model.n_head, model.n_embd, model.sequence_len)
    parts = (model.n_kv_head, whole, model.value_embeddings, model.residual_scalars, model.dropout)
    kinds = ("matrix", "embedding", "head")
    rates = tuple(round(optimizer.groups[kind].learning_rate, 6) for kind in kinds)
    rule = (optimizer.name, *rates, optimizer.weight_decay, batch_tokens)
    return (shape, parts, rule, (schedule.shape, schedule.warmup, schedule.decay, schedule.floor))

"""Which validation loss to expect, where anything is known, with its interval.

    L(D) = E + A D^-alpha        nats per token after D training tokens, one fit per recipe family

A fit holds for one corpus, tokenizer and model shape and nowhere else: losses over other data or
tokens are not comparable. Coefficients come from `python bench/loss_fit.py`, which trains the
points and prints them with their residuals (docs/BENCHMARKS.md); outside the range of its points
a fit is not extrapolated further than a factor of two.
"""

from dataclasses import dataclass

from tuppence.config import DataPlan, Interval, ModelPlan, OptimizerPlan, SchedulePlan

Recipe = tuple[str | int | float, ...]


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
        recipe=("gpt2", 4, 4, 192, 128, 0.0, 2048, 3e-3, 0.5, "cosine", 0.1),
        floor=1.2596,
        scale=3002,
        alpha=0.600,
        min_tokens=614_400,
        max_tokens=7_168_000,
        spread=0.020,  # residuals 0.006, seeds 0.003; runs on the clock were 0.001 and 0.011 off
        points=5,
    ),
)


@dataclass(frozen=True)
class Expectation:
    """What is known of a run's val loss: a fit, or why there is none."""

    fit: Fit | None
    why: str

    def at(self, tokens: float) -> tuple[Interval | None, str]:
        """The loss after so many training tokens, and what it rests on or why there is none."""
        fit = self.fit
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
        return Expectation(
            None, f"unknown data: no runs of {data.source} in {data.tokenizer} tokens"
        )
    recipe = recipe_of(model, batch_tokens, optimizer, schedule)
    fit = next((f for f in known if f.recipe == recipe), None)
    if fit is None:
        return Expectation(None, "this shape and training were not measured on this data")
    return Expectation(fit, f"fit of {fit.points} runs of this recipe (python bench/loss_fit.py)")


def recipe_of(
    model: ModelPlan, batch_tokens: int, optimizer: OptimizerPlan, schedule: SchedulePlan
) -> Recipe:
    """What a loss depends on besides data and length."""
    shape = (model.family, model.n_layer, model.n_head, model.n_embd, model.sequence_len)
    steps = (model.dropout, batch_tokens, optimizer.learning_rate, optimizer.weight_decay)
    return (*shape, *steps, schedule.shape, schedule.warmup)

"""Which validation loss to expect, where anything is known, with its interval.

    L(D) = E + A D^-alpha        nats per token after D training tokens, one fit per recipe family

A fit holds for one corpus, tokenizer and model shape and nowhere else: losses over other data or
tokens are not comparable. Coefficients come from `python bench/loss_fit.py`, which trains the
points and prints them (docs/LOG.md has the residuals); outside the range of its points a fit is
not extrapolated further than a factor of two.
"""

from dataclasses import dataclass

from tuppence.config import DataPlan, Interval, ModelPlan


@dataclass(frozen=True)
class Fit:
    """One fitted curve and where it holds. `spread` is the 80% interval's half-width in nats."""

    source: str
    tokenizer: str
    shape: tuple[str, int, int, int]
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
        shape=("gpt2", 4, 192, 128),
        floor=1.2596,
        scale=3002,
        alpha=0.600,
        min_tokens=614_400,
        max_tokens=7_168_000,
        spread=0.015,
        points=5,
    ),
)


def predict(data: DataPlan, model: ModelPlan, tokens: float) -> tuple[Interval | None, str]:
    """The expected val loss after `tokens`, and what it rests on or why there is none."""
    known = [f for f in FITS if (f.source, f.tokenizer) == (data.source, data.tokenizer)]
    if not known:
        return None, f"unknown data: no runs of {data.source} with {data.tokenizer} tokens yet"
    shape = (model.family, model.n_layer, model.n_embd, model.sequence_len)
    fit = next((f for f in known if f.shape == shape), None)
    if fit is None:
        return None, "unknown shape: measured on this data only for " + ", ".join(
            f"{f.shape[1]} layers x {f.shape[2]}, T={f.shape[3]}" for f in known
        )
    if not fit.min_tokens / 2 <= tokens <= fit.max_tokens * 2:
        return None, (
            f"outside what was measured: {fit.min_tokens:,.0f} to {fit.max_tokens:,.0f} tokens"
        )
    mid = fit.floor + fit.scale * tokens**-fit.alpha
    interval = Interval(mid - fit.spread, mid, mid + fit.spread)
    return interval, f"fit of {fit.points} runs of this recipe (python bench/loss_fit.py)"

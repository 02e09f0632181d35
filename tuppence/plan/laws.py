"""What follows from a model's size: how long to train it, in which batches, at which rates.

    tokens = ratio x (matmul weights)        compute-optimal horizon
    batch  = 2^19 (tokens / tokens of depth 12)^0.383, the nearest power of two
    rate   = rate of depth 12 x sqrt(batch / 2^19), x (width / 768)^-0.5 for the Adam groups;
             Muon's in batches below 2^19 x (batch / 2^19)^(1/8)
    decay  = decay of depth 12 x (batch / 2^19) (rate of depth 12 / rate) (its tokens / tokens),
             at most a tenth of a weight a step

Sources: the horizon ratio and the references at depth 12 are nanochat's measured ones (dev/LOG.md,
January 2026: 10.5 tokens for each matrix and head weight, with Muon); 20 for AdamW, Hoffmann et
al. 2022 (arXiv:2203.15556); batch ~ D^0.383, Bergsma et al. 2025 (arXiv:2505.13738); rates ~
sqrt(batch), Malladi et al. 2022 (arXiv:2205.10287); the decay keeps AdamW's averaging time in
epochs, Wang and Aitchison 2024 (arXiv:2405.13698); the eighth is our own, of batches of 2^11 and
2^13 tokens (docs/LOG.md); AdamW's rate by size, Kaplan et al. 2020
(arXiv:2001.08361, eq. D.1). All are starting points that a person may override.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from tuppence.config import Train
from tuppence.plan import cost
from tuppence.plan.cost import Shape

RATIO = {"muon": 10.5, "adamw": 20.0}
BATCH_REFERENCE = 2**19
BATCH_EXPONENT = 0.383
DEPTH_REFERENCE = 12
MATRIX_RATE, DECAY = 0.02, 0.28  # nanochat's at depth 12: Muon's, and its decay
EMBEDDING_RATE, HEAD_RATE, SCALAR_RATE = 0.3, 0.008, 0.05  # AdamW's beside it
ADAMW_DECAY = 0.1
MOST_FORGOTTEN = 0.1  # of a weight, by the decay of one step of a very short run
SMALL_BATCH_EXPONENT = 1 / 8  # of Muon's rate
FEWEST_STEPS = 100  # a shorter run takes smaller batches instead


@dataclass(frozen=True)
class Recipe:
    """What the laws give: tokens a step, peak rates by kind of parameter, weight decay.

    GPT-2 under AdamW has one rate for everything, as published; elsewhere each kind has its own,
    which the first weights of the family are made for.
    """

    batch_tokens: int
    learning_rate: float
    embedding_rate: float
    head_rate: float
    scalar_rate: float
    weight_decay: float

    @property
    def one_rate(self) -> bool:
        """Whether everything moves alike."""
        return self.embedding_rate == self.learning_rate


def horizon_tokens(shape: Shape, optimizer: str) -> float:
    """Compute-optimal training tokens of a shape."""
    return RATIO[optimizer] * shape.params_matmul


def recipe(
    shape: Shape, optimizer: str, tokens: float, *, batch_tokens: int | None = None
) -> Recipe:
    """The laws at this size and this many training tokens, for a batch that is given or theirs."""
    reference = _reference_tokens(shape, optimizer)
    batch = batch_tokens or _batch(tokens, reference, shape.sequence_len)
    root = math.sqrt(batch / BATCH_REFERENCE)
    adamw = max(1e-4, 0.003239 - 0.0001395 * math.log(max(shape.params_matmul, 1000)))
    adamw *= math.sqrt(min(1.0, batch / _batch(tokens, reference, shape.sequence_len)))
    if shape.family == "gpt2" and optimizer == "adamw":
        return Recipe(batch, adamw, adamw, adamw, adamw, ADAMW_DECAY)
    narrow = (shape.n_embd / 768) ** -0.5
    beside = (batch / BATCH_REFERENCE) ** (SMALL_BATCH_EXPONENT if root < 1 else 0.5)
    rate = MATRIX_RATE * beside
    decay = DECAY * root * root / beside * reference / max(tokens, 1.0)
    decay = min(decay, MOST_FORGOTTEN / rate)
    muon = optimizer == "muon"
    return Recipe(
        batch_tokens=batch,
        learning_rate=rate if muon else adamw,
        embedding_rate=EMBEDDING_RATE * root * narrow,
        head_rate=HEAD_RATE * root * narrow,
        scalar_rate=SCALAR_RATE * root,
        weight_decay=decay if muon else ADAMW_DECAY,
    )


def overridden(recipe: Recipe, train: Train) -> Recipe:
    """The laws' rates and decay where the person did not say others.

    Where one rate is everything's, or the weights are trained already and the laws' rates are not
    meant for them, the others keep their proportion to the one that is said.
    """
    said: dict[str, Any] = {
        "learning_rate": train.learning_rate,
        "embedding_rate": train.embedding_rate,
        "head_rate": train.head_rate,
        "scalar_rate": train.scalar_rate,
        "weight_decay": train.weight_decay,
    }
    if train.learning_rate is not None and (recipe.one_rate or train.init_from is not None):
        for key in ("embedding_rate", "head_rate", "scalar_rate"):
            beside = getattr(recipe, key) / recipe.learning_rate * train.learning_rate
            said[key] = beside if said[key] is None else said[key]
    return replace(recipe, **{key: value for key, value in said.items() if value is not None})


def _reference_tokens(shape: Shape, optimizer: str) -> float:
    """The horizon of depth 12 over the same vocabulary."""
    width = 64 * DEPTH_REFERENCE
    twelve = cost.depth(
        n_layer=DEPTH_REFERENCE,
        n_head=6,
        n_embd=width,
        vocab_size=shape.vocab_size,
        sequence_len=shape.sequence_len,
    )
    return RATIO[optimizer] * twelve.params_matmul


def _batch(tokens: float, reference: float, sequence_len: int) -> int:
    """Tokens a step: a power of two sequences, at most one hundredth of the run."""
    wanted = BATCH_REFERENCE * (max(tokens, 1.0) / reference) ** BATCH_EXPONENT
    wanted = min(wanted, tokens / FEWEST_STEPS)
    sequences = 2 ** round(math.log2(max(1.0, wanted / sequence_len)))
    while sequences > 1 and sequences * sequence_len > tokens / FEWEST_STEPS:
        sequences //= 2
    return int(sequences * sequence_len)

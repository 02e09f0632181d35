"""What follows from a model's size: how long to train it, in which batches, at which rates.

    tokens = ratio x (matmul weights)        compute-optimal horizon
    batch  = 2^19 (tokens / tokens of depth 12)^0.383, the nearest power of two
    rate   = rate of depth 12 x sqrt(batch / 2^19), x (width / 768)^-0.5 for the Adam groups
    decay  = decay of depth 12 x sqrt(batch / 2^19) x (tokens of depth 12 / tokens)

Sources: the horizon ratio and the references at depth 12 are nanochat's measured ones (dev/LOG.md,
January 2026: 10.5 tokens for each matrix and head weight, with Muon); 20 for AdamW, Hoffmann et
al. 2022 (arXiv:2203.15556); batch ~ D^0.383, Bergsma et al. 2025 (arXiv:2505.13738); rates ~
sqrt(batch), Malladi et al. 2022 (arXiv:2205.10287); the decay keeps AdamW's averaging time in
epochs, Wang and Aitchison 2024 (arXiv:2405.13698); AdamW's rate by size, Kaplan et al. 2020
(arXiv:2001.08361, eq. D.1). All are starting points that a person may override.
"""

import math
from dataclasses import dataclass

from tuppence.plan import cost
from tuppence.plan.cost import Shape

RATIO = {"muon": 10.5, "adamw": 20.0}
BATCH_REFERENCE = 2**19
BATCH_EXPONENT = 0.383
DEPTH_REFERENCE = 12
MATRIX_RATE, EMBEDDING_RATE, DECAY = 0.02, 0.3, 0.28  # nanochat's at depth 12, Muon and AdamW
FEWEST_STEPS = 100  # a shorter run takes smaller batches instead


@dataclass(frozen=True)
class Recipe:
    """What the laws give: tokens a step, peak rates, weight decay."""

    batch_tokens: int
    learning_rate: float
    embedding_rate: float
    weight_decay: float


def horizon_tokens(shape: Shape, optimizer: str) -> float:
    """Compute-optimal training tokens of a shape."""
    return RATIO[optimizer] * shape.params_matmul


def recipe(shape: Shape, optimizer: str, tokens: float) -> Recipe:
    """The laws at this size and this many training tokens."""
    reference = _reference_tokens(shape, optimizer)
    batch = _batch(tokens, reference, shape.sequence_len)
    root = math.sqrt(batch / BATCH_REFERENCE)
    if optimizer == "adamw":
        rate = max(1e-4, 0.003239 - 0.0001395 * math.log(max(shape.params_matmul, 1000)))
        return Recipe(batch, rate * min(1.0, root), rate * min(1.0, root), 0.1)
    return Recipe(
        batch_tokens=batch,
        learning_rate=MATRIX_RATE * root,
        embedding_rate=EMBEDDING_RATE * root * (shape.n_embd / 768) ** -0.5,
        weight_decay=DECAY * root * reference / max(tokens, 1.0),
    )


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

"""What is trained, whatever the machine: a shape, its batch, its rates.

    words + corpus ──shapes──▶ shape ──laws (size, tokens)──▶ batch, rates, decay

What the person said stands; the laws fill in the rest for the tokens that the run will see.
"""

import math
from dataclasses import dataclass, replace

from tuppence.config import DataPlan, Run, Train
from tuppence.errors import UserError
from tuppence.plan import laws, shapes
from tuppence.plan.asked import check_batch, check_corpus, optimizer_of
from tuppence.plan.cost import Shape, checkpoint_bytes
from tuppence.plan.loss import effective_tokens

STEPS_AN_EPOCH = 50  # a batch that nobody fixed is at most this part of the corpus
DEPTHS: tuple[int, ...] = (
    *range(2, 32, 2),
    *range(32, 65, 4),
)  # the dial's settings that are tried


@dataclass(frozen=True)
class Work:
    """A shape and how it is trained. `depth` is its number of layers where it has a dial."""

    shape: Shape
    depth: int | None
    train: Train
    recipe: laws.Recipe

    @property
    def checkpoint_bytes(self) -> int:
        """On disk: fp32 weights and the optimizer's moments."""
        moved = self.shape.params_muon if self.train.optimizer == "muon" else 0
        return checkpoint_bytes(self.shape.params, muon_params=moved)


def shape_at(run: Run, data: DataPlan, depth: int | None) -> Shape:
    """The shape as asked, or at a setting of the dial where the size is free."""
    model = run.model
    if not shapes.is_sized(model) and depth is not None:
        model = shapes.at_depth(model, depth)
    return shapes.shape_of(model, data.vocab_size)


def fixed_tokens(run: Run, batch_tokens: int | None) -> float:
    """Training tokens that budget.tokens or budget.steps allow; infinite where neither does."""
    limits = [math.inf] if run.budget.tokens is None else [float(run.budget.tokens)]
    if run.budget.steps is not None and batch_tokens is not None:
        limits.append(float(run.budget.steps * batch_tokens))
    return min(limits)


def work_of(
    run: Run, data: DataPlan, *, depth: int | None, tokens: float | None, cards: int
) -> Work:
    """What `cards` GPUs train for `tokens` (None: as many as fixed, else compute-optimal).

    Raises UserError where the batch does not divide, or the corpus does not fill it.
    """
    shape = shape_at(run, data, depth)
    optimizer, train = optimizer_of(run), run.train
    if tokens is None:
        fixed = fixed_tokens(run, train.batch_tokens)
        tokens = fixed if math.isfinite(fixed) else laws.horizon_tokens(shape, optimizer)
    recipe = laws.recipe(shape, optimizer, tokens)
    batch = train.batch_tokens
    if batch is None:
        most = data.train_tokens // STEPS_AN_EPOCH
        at_once = cards * (train.micro_batch or 1)
        batch = _filling(min(recipe.batch_tokens, most), shape.sequence_len, at_once)
    check_batch(batch, shape.sequence_len)
    check_corpus(data, length=shape.sequence_len, batch_tokens=batch)
    tokens = min(tokens, fixed_tokens(run, batch))
    recipe = laws.recipe(shape, optimizer, tokens, batch_tokens=batch)
    return Work(
        shape=shape,
        depth=shapes.laid_out(run.model).n_layer or depth,
        train=replace(train, optimizer=optimizer),
        recipe=laws.overridden(recipe, train),
    )


def _filling(batch_tokens: int, length: int, sequences_at_once: int) -> int:
    """A batch that nobody fixed divides over the cards and their micro-batches."""
    sequences = max(1, batch_tokens // length)
    return math.ceil(sequences / sequences_at_once) * sequences_at_once * length


def off_optimal(run: Run, data: DataPlan, shape: Shape, tokens: float) -> float:
    """How far new text is from compute-optimal for the shape, as |log(tokens / horizon)|."""
    worth = effective_tokens(tokens, float(data.train_tokens))
    return abs(math.log(max(worth, 1.0) / laws.horizon_tokens(shape, optimizer_of(run))))


def depth_for(run: Run, data: DataPlan, tokens: float) -> int:
    """The dial's setting for which so many tokens are nearest to compute-optimal."""
    return min(DEPTHS, key=lambda d: off_optimal(run, data, shape_at(run, data, d), tokens))


def check_sized(run: Run) -> None:
    """Refuse a size that is missing where there is no dial to turn."""
    model = shapes.laid_out(run.model)
    if model.family == "looped" and model.n_embd is None:
        raise UserError("model.n_embd is not set: a looped model is sized by it")

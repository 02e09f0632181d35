"""What a step draws, each a function of (seed, step): keys of its sequences, iterations of a loop.

Nothing depends on the process, so that ranks agree and a resumed run draws what it would have.
"""

from collections.abc import Callable

import numpy as np

from tuppence.config import Plan
from tuppence.model.looped import draw_recurrence
from tuppence.plan.shapes import expected_flops, planned_shape


def keys_of(plan: Plan, step: int) -> np.ndarray | None:
    """A key for each sequence of a step, for dropout and noise; None where nothing is drawn."""
    if plan.model.dropout == 0 and plan.model.loop is None:
        return None
    return sequence_keys(seed=plan.step.seed, step=step, batch_sequences=plan.step.batch_sequences)


def sequence_keys(*, seed: int, step: int, batch_sequences: int) -> np.ndarray:
    """One key per sequence of the global batch, int64 [B]: a function of (seed, step, place)."""
    stream = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return stream.integers(0, 2**32, size=batch_sequences, dtype=np.int64)


def recurrence_of(plan: Plan, step: int) -> int | None:
    """A looped model's iterations in this step."""
    if plan.model.loop is None:
        return None
    return draw_recurrence(plan.model.loop, seed=plan.step.seed, step=step)


def work_of(plan: Plan, skipped_batches: int = 0) -> Callable[[int], float]:
    """How much each step has to do beside a usual one, with so many batches left out before it."""
    if plan.model.loop is None:
        return lambda step: 1.0
    usual = expected_flops(plan.model)
    drawn = range(1, plan.model.loop.max_recurrence + 1)
    of = {r: planned_shape(plan.model, recurrence=r).flops_per_token / usual for r in drawn}
    return lambda step: of[recurrence_of(plan, step + skipped_batches) or 1]

"""Loss and bits per byte on the pinned val split.

    bits per byte = sum of nats / (ln 2 x UTF-8 bytes of the tokens predicted)

Loss is per token and depends on the tokenizer; bits per byte do not.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tuppence.ranks import ALONE, Ranks
from tuppence.workers import Workers


@dataclass(frozen=True)
class Evaluation:
    """`tokens` were predicted of `of_tokens` that were meant to be."""

    loss: float
    bpb: float | None
    tokens: int
    of_tokens: int
    seconds: float


def val_loss(
    workers: Workers,
    windows: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    of_tokens: int,
    token_bytes: np.ndarray,
    deadline: float = math.inf,
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """Mean loss in nats per token over (inputs, targets) windows, targets of -1 not counted.

    Windows come in a fixed pseudo-random order, so that an evaluation which `deadline` (the lead's
    time.monotonic seconds) cuts short is an unbiased sample. `ranks` take batches in turn. `tick`
    is called between batches. None where not even one batch was affordable.
    """

    @torch.no_grad()
    def score(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, np.ndarray]:
        """Summed nats of one batch, and the tokens that were predicted."""
        inputs, targets = batch
        with workers.autocast():
            total = model(inputs, targets, reduction="sum").item()
        return total, targets[targets >= 0].cpu().numpy()

    started = time.monotonic()
    nats, tokens, text_bytes, longest = 0.0, 0, 0, 0.0
    workers.train(False)
    batches = iter(windows)
    while group := list(itertools.islice(batches, len(workers) * ranks.world)):
        before = time.monotonic()
        if not ranks.agree(before + longest <= deadline):
            break
        mine = group[ranks.rank :: ranks.world]
        # a rank that none is left for computes one all the same: others may need its weights
        scored = workers.map(score, [_tensors(b, workers.device) for b in mine or group[:1]])
        for total, predicted in scored[: len(mine)]:
            nats += total
            tokens += predicted.size
            text_bytes += int(token_bytes[predicted].sum())
        longest = max(longest, time.monotonic() - before)
        tick()
    workers.train()
    if ranks.world > 1:
        nats, *counts = ranks.sum(nats, tokens, text_bytes)
        tokens, text_bytes = map(round, counts)
    if not tokens:
        return None
    bpb = nats / math.log(2) / text_bytes if text_bytes else None
    return Evaluation(nats / tokens, bpb, tokens, of_tokens, time.monotonic() - started)


def _tensors(batch: tuple[np.ndarray, np.ndarray], device: str) -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in batch)
    return inputs, targets

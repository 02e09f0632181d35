"""Loss and bits per byte on the pinned val split.

    bits per byte = sum of nats / (ln 2 x UTF-8 bytes of the tokens predicted)

Loss is per token and depends on the tokenizer; bits per byte do not.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tuppence.ranks import ALONE, Ranks
from tuppence.workers import Workers


@dataclass(frozen=True)
class Evaluation:
    """`tokens` were predicted of `of_tokens` that were meant to be. `error` is the standard error
    of the loss as an estimate for such text, by batches of windows; None of a single batch."""

    loss: float
    error: float | None
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
    nats, tokens, text_bytes, longest, each = 0.0, 0, 0, 0.0, Squares()
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
            each = each.seen(total, predicted.size)
        longest = max(longest, time.monotonic() - before)
        tick()
    workers.train()
    if ranks.world > 1:
        nats, tokens_now, bytes_now, *squares = ranks.sum(nats, tokens, text_bytes, *each)
        tokens, text_bytes, each = round(tokens_now), round(bytes_now), Squares(*squares)
    if not tokens:
        return None
    bpb = nats / math.log(2) / text_bytes if text_bytes else None
    loss, seconds = nats / tokens, time.monotonic() - started
    return Evaluation(loss, each.error(loss, tokens), bpb, tokens, of_tokens, seconds)


class Squares(NamedTuple):
    """Sums over batches from which the error of a ratio follows."""

    batches: float = 0.0
    nats: float = 0.0  # squared
    both: float = 0.0  # nats x tokens
    tokens: float = 0.0  # squared

    def seen(self, nats: float, tokens: int) -> "Squares":
        """With one batch more."""
        squares = (1.0, nats * nats, nats * tokens, float(tokens) ** 2)
        return Squares(*(a + b for a, b in zip(self, squares, strict=True)))

    def error(self, loss: float, tokens: int) -> float | None:
        """The standard error of nats / tokens over batches of unequal size (Cochran, Sampling
        Techniques, 3rd ed. 1977, section 2.11: estimation of a ratio)."""
        if self.batches < 2:
            return None
        off = self.nats - 2 * loss * self.both + loss * loss * self.tokens
        off = max(0.0, off)  # of equal batches rounding leaves less than nothing
        return math.sqrt(off * self.batches / (self.batches - 1)) / tokens


def _tensors(batch: tuple[np.ndarray, np.ndarray], device: str) -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in batch)
    return inputs, targets

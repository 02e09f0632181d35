"""What a model is worth: loss and bits per byte on the pinned val split, and samples to read.

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

from tuppence.model.cache import Cache
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


def evaluate(
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


@torch.no_grad()
def generate(
    workers: Workers,
    prompt: list[int],
    *,
    new_tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
    deadline: float = math.inf,
    cached: bool = True,
    ranks: Ranks = ALONE,
) -> list[int]:
    """Continue a prompt token by token. Temperature 0 is greedy.

    Ends early at the token `stop` or at the deadline. `vocab_size` keeps padded vocabulary out.
    Keys and values are cached; where the context is full, the model starts over on the window that
    `window_start` gives. Without `cached` the whole window is computed for each token: the naive
    generator that faster ones are tested against. Where a model is spread over `ranks`, all of
    them generate the same, and the lead's clock ends it.
    """
    assert prompt, "a prompt has at least one token"
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    workers.train(False)
    cache, begun = Cache(context), 0
    for _ in range(new_tokens):
        if not ranks.agree(time.monotonic() <= deadline):
            break
        start = window_start(len(ids), context)
        if start != begun:
            cache, begun = Cache(context), start
        seen = cache.length if cached else 0
        new = torch.tensor([ids[start + seen :]], device=workers.device)
        with workers.autocast():
            logits_1TV = workers.model(new, cache=cache if cached else None)
        logits = logits_1TV[0, -1, :vocab_size].float().cpu()
        token = sample_token(logits, temperature=temperature, top_k=top_k, generator=generator)
        if token == stop:
            break
        ids.append(token)
    workers.train()
    return ids


def window_start(length: int, context: int) -> int:
    """Where the window of a text of so many tokens begins: it slides by quarters of the context."""
    stride = max(1, context // 4)
    return max(0, math.ceil((length - context) / stride)) * stride


def sample_token(
    logits_V: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Draw from softmax(logits / temperature) over the top_k tokens."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if top_k is not None and top_k < logits_V.numel():
        logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -math.inf
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def _tensors(batch: tuple[np.ndarray, np.ndarray], device: str) -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in batch)
    return inputs, targets

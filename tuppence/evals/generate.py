"""A text continued token by token: the generator that faster ones are tested against."""

import math
import time

import torch
from torch import Tensor

from tuppence.model.cache import Cache
from tuppence.ranks import ALONE, Ranks
from tuppence.workers import Workers


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

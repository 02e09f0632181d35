"""What a model says: the same prompts for all, greedy and drawn, always with the same seed."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuppence.errors import UserError
from tuppence.evals.generate import generate, sample_token, window_start
from tuppence.evals.subject import RunText, Subject
from tuppence.ranks import ALONE, Ranks

VERSION = 1  # of what follows
PROMPTS = (
    "",  # whatever a text begins with
    "The largest planet that goes round our sun is",
    "The old lighthouse keeper heard a knock at the door. She",
    "What to pack for a week by the sea:\n- a towel\n-",
    "7 + 5 = 12\n9 + 4 = 13\n8 + 6 =",
    'def is_even(number):\n    """Whether a number is even."""\n',
)
TEMPERATURES = (0.0, 0.8)
NEW_TOKENS, TOP_K, SEED = 48, 200, 1337


@dataclass(frozen=True)
class Samples:
    """Rows of prompt, text, temperature, seed and new_tokens; prompts that could not be encoded."""

    rows: list[dict[str, Any]]
    left_out: list[str]


def samples(
    subject: Subject,
    *,
    own: str | None = None,
    new_tokens: int = NEW_TOKENS,
    deadline: float = math.inf,
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Samples:
    """The fixed prompts continued, and before them a run's `own`, as far as the deadline allows.

    Of many ranks one may do this, or where a model is spread over them all together.
    """
    rows: list[dict[str, Any]] = []
    left_out = []
    for prompt in [own, *PROMPTS] if own else PROMPTS:
        ids = _ids(subject, prompt)
        if ids is None:
            left_out.append(prompt)
            continue
        for temperature in TEMPERATURES:
            if not ranks.agree(time.monotonic() <= deadline):
                return Samples(rows, left_out)
            said = _continued(subject, ids, new_tokens, temperature, deadline, ranks)
            row = {"prompt": prompt, "text": subject.text.decode(said), "temperature": temperature}
            rows.append(row | {"seed": SEED, "new_tokens": len(said) - len(ids)})
            tick()
    return Samples(rows, left_out)


def _ids(subject: Subject, prompt: str) -> list[int] | None:
    """A prompt as the beginning of a text; None where the tokenizer has no such text."""
    start = [] if subject.text.start is None else [subject.text.start]
    try:
        ids = start + subject.text.encode_batch([prompt])[0]
    except UserError:
        return None
    return ids or None


def _continued(
    subject: Subject,
    prompt: Sequence[int],
    new_tokens: int,
    temperature: float,
    deadline: float,
    ranks: Ranks,
) -> list[int]:
    """The prompt and what follows it, up to an end-of-text."""
    workers, stops = subject.workers, subject.text.ends
    if isinstance(subject.text, RunText):
        return generate(
            workers,
            [*prompt],
            new_tokens=new_tokens,
            context=subject.context,
            temperature=temperature,
            top_k=TOP_K,
            seed=SEED,
            stop=subject.text.start,
            vocab_size=subject.vocab_size,
            deadline=deadline,
            ranks=ranks,
        )
    generator = torch.Generator().manual_seed(SEED)
    ids = [*prompt]
    workers.train(False)
    for _ in range(new_tokens):
        if not ranks.agree(time.monotonic() <= deadline):
            break
        logits = _next_logits(subject, ids[window_start(len(ids), subject.context) :])
        token = sample_token(logits, temperature=temperature, top_k=TOP_K, generator=generator)
        if token in stops:
            break
        ids.append(token)
    workers.train()
    return ids


@torch.no_grad()
def _next_logits(subject: Subject, ids: Sequence[int]) -> torch.Tensor:
    """[V] logits of what follows these ids, all of which are read anew."""
    workers = subject.workers
    idx_1T = torch.tensor([list(ids)], device=workers.device)
    last_1 = torch.tensor([len(ids) - 1], device=workers.device)
    with workers.autocast():
        return subject.logits(workers.model, idx_1T, last_1, None)[0].float().cpu()

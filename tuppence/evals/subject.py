"""Who is asked: a model, how it turns text into ids, and what makes its answers its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuppence.evals.items import Text
from tuppence.model.branches import Branches
from tuppence.tokenizer.spec import Tokenizer
from tuppence.workers import Workers

PLACES = {"cpu": 2**9, "cuda": 2**15}  # of a pass: more gain nothing on a core (docs/LOG.md)


@dataclass(frozen=True)
class Subject:
    """A model of a run, or of transformers.

    `logits(model, idx_BT, read_N, branches)` gives fp32 logits [N, V] at the flat places `read_N`
    of B x T, padded vocabulary left out. `branching` says whether several continuations may share
    one text's beginning; `context` is the most ids it reads; a pass has at most `batch` rows and
    about `places` places. `identity` is what an answer depends on: weights, tokenizer, precision.
    """

    workers: Workers
    text: Text
    context: int
    vocab_size: int
    branching: bool
    logits: Callable[[nn.Module, Tensor, Tensor, Branches | None], Tensor]
    identity: dict[str, Any]
    batch: int = 64
    places: int = PLACES["cpu"]


@dataclass(frozen=True)
class RunText:
    """A run's own tokenizer."""

    tokenizer: Tokenizer

    @property
    def start(self) -> int | None:
        """End-of-text, which stands between documents."""
        return self.tokenizer.end_of_text

    @property
    def ends(self) -> frozenset[int]:
        """The same."""
        return frozenset() if self.start is None else frozenset({self.start})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [ids.tolist() for ids in self.tokenizer.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for."""
        return self.tokenizer.decode(ids)


def identity_of(
    weights_sha256: str, tokenizer: Tokenizer, *, context: int, precision: str
) -> dict[str, Any]:
    """What an answer of a run's checkpoint depends on, whoever asks it."""
    return {
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "context": context,
        "precision": precision,
    }


def of_run(
    workers: Workers,
    tokenizer: Tokenizer,
    *,
    context: int,
    identity: dict[str, Any],
    places: int | None = None,
) -> Subject:
    """One of our own families. `places` is what a pass may have (by the device)."""
    vocab_size = tokenizer.vocab_size

    def logits(
        model: nn.Module, idx_BT: Tensor, read_N: Tensor, branches: Branches | None
    ) -> Tensor:
        found: Tensor = model(idx_BT, branches=branches, read_N=read_N)
        return found[:, :vocab_size]

    return Subject(
        workers=workers,
        text=RunText(tokenizer),
        context=context,
        vocab_size=vocab_size,
        branching=True,
        logits=logits,
        identity=identity,
        places=places or PLACES[torch.device(workers.device).type],
    )

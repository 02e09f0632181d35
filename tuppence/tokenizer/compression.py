"""How many bytes of a text a token covers, tokenizer beside tokenizer.

    bytes per token = UTF-8 bytes / tokens     used = different ids seen / ids there are

A larger vocabulary makes fewer tokens and a larger model; ids that a corpus does not use are
parameters that learn nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tuppence.tokenizer.pieces import PIECE_CHARS, Piece, recut
from tuppence.tokenizer.ranked import RankedTokenizer
from tuppence.tokenizer.ranks import PUBLISHED
from tuppence.tokenizer.spec import Tokenizer

SAMPLE_BYTES = 8_000_000


@dataclass(frozen=True)
class Compressed:
    """What one tokenizer makes of the sample; `used` is the share of its ids that occur."""

    name: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    used: float


def beside_published(texts: Iterable[str], tokenizer: Tokenizer) -> list[Compressed]:
    """`tokenizer`, then the published vocabularies, on the same sample."""
    others = [RankedTokenizer(name) for name in PUBLISHED if name != tokenizer.name]
    return compression(texts, [tokenizer, *others])


def compression(texts: Iterable[str], tokenizers: Sequence[Tokenizer]) -> list[Compressed]:
    """Each tokenizer on the first SAMPLE_BYTES of the texts. Raises UnknownCharacter or
    UnbrokenText for a text that one of them cannot take."""
    counts = [np.zeros(tokenizer.vocab_size, dtype=np.int64) for tokenizer in tokenizers]
    sample_bytes = 0
    for text in _sample(texts):
        sample_bytes += len(text.encode("utf-8"))
        for tokenizer, count in zip(tokenizers, counts, strict=True):
            count += np.bincount(tokenizer.encode(text), minlength=len(count))
    return [
        Compressed(
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            tokens=int(count.sum()),
            bytes_per_token=sample_bytes / max(1, int(count.sum())),
            used=float((count > 0).mean()),
        )
        for tokenizer, count in zip(tokenizers, counts, strict=True)
    ]


def table(rows: Sequence[Compressed]) -> str:
    """The rows as text, a line each."""
    lines = [f"{'tokenizer':12} {'vocabulary':>10} {'tokens':>12} {'bytes/token':>11} {'used':>5}"]
    lines += [
        f"{row.name[:12]:12} {row.vocab_size:>10,} {row.tokens:>12,} {row.bytes_per_token:>11.3f} "
        f"{row.used:>5.0%}"
        for row in rows
    ]
    return "\n".join(lines)


def _sample(texts: Iterable[str]) -> Iterable[str]:
    """Pieces of the texts until there are SAMPLE_BYTES of them, cut between words."""
    left = SAMPLE_BYTES
    whole = (Piece(text, number, 0, True) for number, text in enumerate(texts))
    for piece in recut(whole, cut="before_space", piece_chars=min(PIECE_CHARS, SAMPLE_BYTES // 8)):
        yield piece.text
        left -= len(piece.text.encode("utf-8"))
        if left <= 0:
            return

"""A look at a corpus without preparing it: how much text there is and how many tokens it will make.

At most about 8 MB of text is read; where that is not all of it, the rest is taken to be alike:

    total = sampled * (bytes of the files) / (bytes of the files read for the sample)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuppence.data.corpora import CORPORA, Corpus
from tuppence.data.formats import Meter
from tuppence.data.pieces import Piece, recut
from tuppence.data.sources import find_files, read_pieces, source_bytes
from tuppence.data.tokenizer import Tokenizer, build_tokenizer, parse_spec

SAMPLE_CHARS = 8_000_000
# Bytes per token grow with the logarithm of a learned vocabulary's size: 4.2 for GPT-2's.
_BYTES_PER_TOKEN_PER_LOG = 0.39
GPT2_VOCAB = 50257
CHAR_VOCAB = 17
WEB_BYTES_PER_TOKEN = 4.5  # GPT-2's tokens on English web text, within a few percent


@dataclass(frozen=True)
class Survey:
    """`exact` says whether all text was read; else all counts are estimates from a sample."""

    bytes: int
    documents: int
    tokens: int
    vocab_size: int
    exact: bool


def survey(*, source: str, tokenizer: str, text_field: str = "text") -> Survey:
    """Bytes, documents and tokens (end-of-text included) of `source`. Raises UserError."""
    if source in CORPORA and not Path(source).exists():
        return _named(CORPORA[source], tokenizer)
    found = find_files(source)
    meter = Meter()
    reading = read_pieces(found, text_field=text_field, meter=meter)
    sample = list(_sampled(reading))
    exact = next(reading, None) is None
    total_bytes = source_bytes(found)
    scale = 1.0 if exact else max(1.0, total_bytes / max(1, meter.done_bytes))
    sample_bytes = sum(len(piece.text.encode("utf-8")) for piece in sample)
    documents = max(1, sum(piece.last for piece in sample))
    kind, argument = parse_spec(tokenizer)
    if kind == "bpe":
        vocab_size = int(argument)
        tokens = sample_bytes / (_BYTES_PER_TOKEN_PER_LOG * math.log(vocab_size)) + documents
    else:
        made = build_tokenizer(
            tokenizer,
            texts=lambda: (piece.text for piece in sample),
            single_document=(exact and documents == 1) or [f.kind for f in found] == ["txt"],
        )
        vocab_size = made.vocab_size
        tokens = _count(made, sample, documents=documents)
    return Survey(
        bytes=round(sample_bytes * scale),
        documents=round(documents * scale) if documents > 1 else documents,
        tokens=round(tokens * scale),
        vocab_size=vocab_size,
        exact=exact and kind != "bpe",
    )


def _named(corpus: Corpus, tokenizer: str) -> Survey:
    """A corpus that is known by its name alone."""
    vocab_size = _vocab_of(tokenizer)
    if vocab_size is None:
        with_file = build_tokenizer(tokenizer, texts=lambda: iter(()))
        vocab_size = with_file.vocab_size
    tokens = _tokens_of(corpus, tokenizer)
    return Survey(
        bytes=round(tokens * _bytes_per_token(tokenizer)),
        documents=1,
        tokens=tokens,
        vocab_size=vocab_size,
        exact=False,
    )


def _sampled(pieces: Iterator[Piece]) -> Iterator[Piece]:
    read_chars = 0
    for piece in pieces:
        yield piece
        read_chars += len(piece.text)
        if read_chars >= SAMPLE_CHARS:
            return


def _count(tokenizer: Tokenizer, sample: list[Piece], *, documents: int) -> int:
    ends = documents if tokenizer.end_of_text is not None else 0
    return ends + sum(
        len(tokenizer.encode(piece.text)) for piece in recut(sample, cut=tokenizer.cut)
    )


def _vocab_of(tokenizer: str) -> int | None:
    """The vocabulary of a tokenizer by its kind and argument; None where that does not tell it."""
    kind, argument = parse_spec(tokenizer)
    known = {"gpt2": GPT2_VOCAB, "char": len(argument) or CHAR_VOCAB, "byte": 257}
    return int(argument) if kind == "bpe" else known.get(kind)


def _bytes_per_token(tokenizer: str) -> float:
    """Bytes of English web text that a token covers; grows with the logarithm of a vocabulary."""
    vocab_size = _vocab_of(tokenizer)
    if vocab_size is None:
        return WEB_BYTES_PER_TOKEN
    if tokenizer != "gpt2" and not tokenizer.startswith("bpe"):
        return 1.0
    return WEB_BYTES_PER_TOKEN * math.log(vocab_size) / math.log(GPT2_VOCAB)


def _tokens_of(corpus: Corpus, tokenizer: str) -> int:
    """How many tokens of `tokenizer` the whole corpus has."""
    return int(corpus.tokens * _bytes_per_token(corpus.tokenizer) / _bytes_per_token(tokenizer))

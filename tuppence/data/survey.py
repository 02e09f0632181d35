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
    """A corpus that is known by its name alone; its bytes follow from its tokens."""
    kind, argument = parse_spec(tokenizer)
    known = {"gpt2": GPT2_VOCAB, "char": len(argument) or corpus.alphabet, "byte": 257}
    if kind == "bpe":
        vocab_size = int(argument)
    elif kind in known:
        vocab_size = known[kind]
    else:
        vocab_size = build_tokenizer(tokenizer, texts=lambda: iter(())).vocab_size
    text_bytes = corpus.tokens * _bytes_per_token(corpus.tokenizer, GPT2_VOCAB)
    tokens = int(text_bytes / _bytes_per_token(tokenizer, vocab_size))
    return Survey(round(text_bytes), 1, tokens, vocab_size, exact=False)


def _bytes_per_token(tokenizer: str, vocab_size: int) -> float:
    """One for characters and bytes; of a learned vocabulary by its logarithm."""
    if tokenizer.partition(":")[0] in ("char", "byte"):
        return 1.0
    return _BYTES_PER_TOKEN_PER_LOG * math.log(vocab_size)


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

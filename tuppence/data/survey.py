"""A look at a corpus without preparing it: how much text there is and how many tokens it will make.

At most about 8 MB of text is read, and nothing of a corpus that is known by its name. Where that
is not all of it, the rest is taken to be alike:

    total = sampled * (bytes of the files) / (bytes of the files read for the sample)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuppence.errors import UserError
from tuppence.text.corpora import CORPORA, Corpus
from tuppence.text.documents import Bad, Document, documents_of
from tuppence.text.formats import Meter, read_items
from tuppence.text.inputs import InputFile
from tuppence.text.slices import slices_of
from tuppence.text.sources import find_files, source_bytes
from tuppence.tokenizer.pieces import Piece, recut
from tuppence.tokenizer.spec import Tokenizer, build_tokenizer, parse_spec

SAMPLE_CHARS = 8_000_000  # of a larger corpus on this disk
FAR_CHARS = 2_000_000  # of one elsewhere: with what is read ahead, some 8 MB are fetched
# Bytes per token grow with the logarithm of a learned vocabulary's size: 4.2 for GPT-2's.
_BYTES_PER_TOKEN_PER_LOG = 0.39
GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Survey:
    """`exact` says whether all text was read; else all counts are estimates from a sample.
    `source_bytes` is what the files have as they lie; `single` whether they are one document."""

    bytes: int
    documents: int
    tokens: int
    vocab_size: int
    exact: bool
    source_bytes: int
    single: bool


def survey(*, source: str, tokenizer: str, text_field: str = "text") -> Survey:
    """Bytes, documents and tokens (end-of-text included) of `source`. Raises UserError."""
    if source in CORPORA and not Path(source).exists():
        return _named(CORPORA[source], tokenizer)
    found = find_files(source)
    sample, exact, done_bytes = _sample(found, text_field=text_field)
    total_bytes = source_bytes(found)
    scale = 1.0 if exact else max(1.0, total_bytes / max(1, done_bytes))
    sample_bytes = sum(len(piece.text.encode("utf-8")) for piece in sample)
    count = max(1, sum(document.last for document in sample))
    single = (exact and count == 1) or [file.kind for file in found] == ["txt"]
    kind, argument = parse_spec(tokenizer)
    if kind == "bpe":
        vocab_size = int(argument)
        tokens = sample_bytes / (_BYTES_PER_TOKEN_PER_LOG * math.log(vocab_size)) + count
    else:
        made = build_tokenizer(
            tokenizer,
            texts=lambda: (document.text for document in sample),
            single_document=single,
        )
        vocab_size = made.vocab_size
        tokens = _count(made, sample, documents=count)
    return Survey(
        bytes=round(sample_bytes * scale),
        documents=round(count * scale) if count > 1 else count,
        tokens=round(tokens * scale),
        vocab_size=vocab_size,
        exact=exact and kind != "bpe",
        source_bytes=total_bytes,
        single=single,
    )


def _named(corpus: Corpus, tokenizer: str) -> Survey:
    """A corpus that is known by its name alone; its bytes follow from its tokens."""
    kind, argument = parse_spec(tokenizer)
    known = {
        "gpt2": GPT2_VOCAB,
        "cl100k": 100_277,
        "char": len(argument) or corpus.alphabet,
        "byte": 257,
    }
    if kind == "bpe":
        vocab_size = int(argument)
    elif kind in known:
        vocab_size = known[kind]
    else:
        vocab_size = build_tokenizer(tokenizer, texts=lambda: iter(())).vocab_size
    text_bytes = corpus.tokens * _bytes_per_token(corpus.tokenizer, GPT2_VOCAB)
    tokens = int(text_bytes / _bytes_per_token(tokenizer, vocab_size))
    return Survey(
        bytes=round(corpus.text_bytes or text_bytes),
        documents=corpus.documents or 1,
        tokens=tokens,
        vocab_size=vocab_size,
        exact=False,
        source_bytes=round(corpus.file_bytes or text_bytes),
        single=False,
    )


def _bytes_per_token(tokenizer: str, vocab_size: int) -> float:
    """One for characters and bytes; of a learned vocabulary by its logarithm."""
    if tokenizer.partition(":")[0] in ("char", "byte"):
        return 1.0
    return _BYTES_PER_TOKEN_PER_LOG * math.log(vocab_size)


def _sample(found: list[InputFile], *, text_field: str) -> tuple[list[Document], bool, int]:
    """The first documents, whether they are all there is, and what they have as bytes of the files.

    Of a large input there are SAMPLE_CHARS, or FAR_CHARS where it has to be fetched. Raises
    UserError where every document is broken.
    """
    meter = Meter()
    items = (
        item
        for parts in slices_of(found)
        for part in parts
        for item in read_items(found[part.file], part, text_field=text_field, meter=meter)
    )
    far = any(file.remote for file in found) and source_bytes(found) > SAMPLE_CHARS
    left = FAR_CHARS if far else SAMPLE_CHARS
    sample: list[Document] = []
    bad: list[Bad] = []
    with contextlib.closing(items):
        for item in items:
            for document in documents_of([item], found, text_field=text_field):
                if isinstance(document, Bad):
                    bad.append(document)
                else:
                    sample.append(document)
                    left -= len(document.text)
            if left <= 0:
                done_bytes = meter.done_bytes
                return sample, next(items, None) is None, done_bytes
    if bad and not sample:
        raise UserError(bad[0].message)
    return sample, True, source_bytes(found)


def _count(tokenizer: Tokenizer, sample: list[Document], *, documents: int) -> int:
    ends = documents if tokenizer.end_of_text is not None else 0
    return ends + sum(
        len(tokenizer.encode(piece.text)) for piece in recut(_whole(sample), cut=tokenizer.cut)
    )


def _whole(sample: list[Document]) -> Iterator[Piece]:
    return (Piece(document.text, i, 0, True) for i, document in enumerate(sample))

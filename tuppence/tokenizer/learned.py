"""A vocabulary of N tokens learned from text: all bytes, N - 257 merges, end-of-text.

    text ─split like GPT-4─▶ words with counts ─the commonest pair, again and again─▶ merges

The bytes are there whatever was seen, so that any text of any language has tokens. The same texts
give the same merges, on any number of threads. Memory goes with the different words: 200 million
characters stay below a gigabyte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tuppence.errors import UserError
from tuppence.tokenizer.json_file import byte_letters, byte_level, json_bytes
from tuppence.tokenizer.pieces import Piece, recut
from tuppence.tokenizer.ranked import RankedTokenizer, pairs_of
from tuppence.tokenizer.ranks import GPT4_SPLIT

# More text changes few merges and costs minutes.
BPE_TRAIN_CHARS = 200_000_000
# A stretch of more characters without a place to cut is no word, and each merge walks all of it.
LONGEST_WORD = 4096
SMALLEST = 257


def learn(vocab_size: int, texts: Iterable[str]) -> RankedTokenizer:
    """`bpe:N` from the first BPE_TRAIN_CHARS characters. Raises UserError if they are too few."""
    import tokenizers
    from tokenizers import trainers

    library = tokenizers.Tokenizer.from_str(_empty().decode())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=list(byte_letters())
    )
    library.train_from_iterator(_words(_up_to(texts, BPE_TRAIN_CHARS)), trainer=trainer)
    pairs = pairs_of(json.loads(library.to_str())["model"])
    most = SMALLEST + len(pairs)
    if most != vocab_size:
        raise UserError(
            f"data.tokenizer bpe:{vocab_size}: the corpus has merges for {most} only; "
            f"ask for bpe:{most} or fewer, or give more text"
        )
    return RankedTokenizer(f"bpe:{vocab_size}", pairs=pairs)


def identity(vocab_size: str) -> str:
    """What the tokens depend on beside the corpus."""
    split = json.dumps(GPT4_SPLIT.pre_tokenizer)
    return f"bpe:{vocab_size}:{BPE_TRAIN_CHARS}:{LONGEST_WORD}:{split}"


def _empty() -> bytes:
    """A tokenizer.json that knows how to split and has no tokens yet."""
    split, decoder = GPT4_SPLIT.pre_tokenizer, byte_level(use_regex=True)
    return json_bytes({}, merges=[], special={}, pre_tokenizer=split, decoder=decoder)


def _up_to(texts: Iterable[str], chars: int) -> Iterator[str]:
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def _words(texts: Iterable[str]) -> Iterator[str]:
    """The texts in small pieces, cut where the split cuts as well; what is no word left out."""
    whole = (Piece(text, number, 0, True) for number, text in enumerate(texts))
    for piece in recut(whole, cut="before_space", piece_chars=LONGEST_WORD, longest=None):
        if len(piece.text) <= LONGEST_WORD:
            yield piece.text

"""Byte-pair vocabularies by rank, encoded by tiktoken: GPT-2's, cl100k's, and those learned here.

    rank of a token = its id;   of all neighbours that make a token, the lowest rank merges first

For merges learned from text this gives the ids that `tokenizers` gives, in a quarter of its time:
were the parts (a, b) of a token not those that it was learned from, then a lower rank within it
would have merged before.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tuppence.tokenizer.json_file import (
    END_OF_TEXT,
    byte_letters,
    byte_level,
    json_bytes,
    spelled,
)
from tuppence.tokenizer.kinds import Ids, known, write_tokenizer
from tuppence.tokenizer.pieces import PIECE_CHARS, Cut, Piece, recut
from tuppence.tokenizer.ranks import GPT4_SPLIT, PUBLISHED, published_merges, published_ranks

if TYPE_CHECKING:
    import tiktoken

Pairs = npt.NDArray[np.uint32]


class RankedTokenizer:
    """Tokens by rank, special ones behind them.

    `pairs` [merges, 2] are the ids that each merge joins, in order: token 256 + i is merge i. None
    for a published vocabulary, whose ranks lie in the package. All else is made when first needed,
    and stays behind when the tokenizer goes to another process.
    """

    cut: Cut = "before_space"

    def __init__(self, name: str, *, pairs: Pairs | None = None) -> None:
        self.name = name
        self.pairs = pairs
        published = PUBLISHED[name] if pairs is None else None
        self._split = published.split if published else GPT4_SPLIT
        learned = {END_OF_TEXT: 256 + len(pairs)} if pairs is not None else {}
        self._special = published.special if published else learned
        self.vocab_size = max(self._special.values()) + 1
        self.end_of_text = self._special[END_OF_TEXT]

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(RankedTokenizer, pairs=self.pairs), (self.name,)

    def encode(self, text: str) -> Ids:
        """Raises UnbrokenText (see `pieces`) for what is too much for tiktoken."""
        if len(text) <= PIECE_CHARS:
            return self._encode(text)
        pieces = recut([Piece(text, 0, 0, True)], cut=self.cut)
        return np.concatenate([self._encode(piece.text) for piece in pieces])

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        kept = known(ids, vocab_size=len(self._ranks))
        return self._tiktoken.decode(kept.tolist())

    def token_bytes(self) -> npt.NDArray[np.int32]:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self._ranks.items():
            sizes[rank] = len(token)
        return sizes

    def save(self, folder: Path) -> None:
        kind = self.name if self.pairs is None else "bpe"
        write_tokenizer(folder, self._json, {"kind": kind, "name": self.name})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._json).hexdigest()

    def _encode(self, text: str) -> Ids:
        return self._tiktoken.encode_to_numpy(text, disallowed_special=())

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        if self.pairs is None:
            return published_ranks(self.name)
        return {token: rank for rank, token in enumerate(tokens_of(self.pairs))}

    @functools.cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            self.name,
            pat_str=self._split.regex,
            mergeable_ranks=self._ranks,
            special_tokens=self._special,
        )

    @functools.cached_property
    def _json(self) -> bytes:
        if self.pairs is None:
            return _published_json(self.name)
        return self._json_of(_named(self.pairs))

    def _json_of(self, merges: list[tuple[bytes, bytes]]) -> bytes:
        return json_bytes(
            {spelled(token): rank for token, rank in self._ranks.items()} | self._special,
            merges=[(spelled(a), spelled(b)) for a, b in merges],
            special=self._special,
            pre_tokenizer=self._split.pre_tokenizer,
            decoder=byte_level(use_regex=True),
        )


@functools.cache
def _published_json(name: str) -> bytes:
    return RankedTokenizer(name)._json_of(published_merges(name))


def tokens_of(pairs: Pairs) -> list[bytes]:
    """All tokens by id: the bytes in GPT-2's order of them, then what each pair joins."""
    letters = byte_letters()
    tokens = [bytes([byte]) for byte in sorted(range(256), key=letters.__getitem__)]
    for first, second in pairs.tolist():
        tokens.append(tokens[first] + tokens[second])
    return tokens


def _named(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    tokens = tokens_of(pairs)
    return [(tokens[first], tokens[second]) for first, second in pairs.tolist()]


def pairs_of(model: dict[str, Any]) -> Pairs:
    """The pairs of a byte-level vocabulary as a tokenizer.json has it, where ids are ranks."""
    vocab = model["vocab"]
    pairs = [[vocab[first], vocab[second]] for first, second in model["merges"]]
    found = np.array(pairs, dtype=np.uint32).reshape(-1, 2)
    ours = enumerate(tokens_of(found))
    assert all(vocab[spelled(token)] == rank for rank, token in ours), "ids are not ranks"
    return found

"""Write a vocabulary as the `tokenizer.json` that Hugging Face's `tokenizers` reads.

Every tokenizer here is byte-pair encoding to that library: `char` and `byte` have no merges,
GPT-2's merges are recovered from its ranks, for a token of rank r is what the ranks below r leave
in two parts:

    merge(r) = the two parts that remain of bytes(r) after merging with ranks < r
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

END_OF_TEXT = "<|endoftext|>"


@functools.cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's printable letter for each byte: itself where it prints, else the next from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = []
    for byte in range(256):
        hidden_before = sum(b not in printable for b in range(byte))
        letters.append(chr(byte if byte in printable else 256 + hidden_before))
    return tuple(letters)


def spelled(token: bytes) -> str:
    """A token's bytes in the letters of `byte_letters`."""
    return token.decode("latin-1").translate(_letter_table())


@functools.cache
def _letter_table() -> dict[int, str]:
    return dict(enumerate(byte_letters()))


def unspelled(letters: str) -> bytes | None:
    """The inverse of `spelled`; None for a string with other letters in it."""
    values = _letter_bytes()
    found = [values.get(letter) for letter in letters]
    return None if None in found else bytes(value for value in found if value is not None)


@functools.cache
def _letter_bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges, in order, of byte-pair ranks (equal to GPT-2's vocab.bpe for its ranks)."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    return [_last_merge(token, ranks) for token in tokens if len(token) > 1]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    never = len(ranks)
    while len(parts) > 2:
        pairs = [ranks.get(a + b, never) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def json_bytes(
    vocab: dict[str, int],
    *,
    merges: list[tuple[str, str]],
    special: dict[str, int],
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> bytes:
    """The file's content, the same bytes for the same vocabulary.

    A special token that is not in `vocab` must be the next after its last: the library numbers it
    so, whatever its id here.
    """
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, number in special.items()
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode("utf-8")


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The setting of GPT-2's byte-level pre-tokenizer and decoder."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }

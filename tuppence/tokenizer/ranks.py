r"""Published byte-pair vocabularies, and how text is split before pairs are merged.

A split is a regular expression, twice: as tiktoken takes it, with possessive runs, which match the
same and do not go back; and as the setting of `tokenizers`, whose engine reads `{1,3}+` otherwise.

    GPT-2   words and numbers with a space before them, contractions, the rest, white space
    GPT-4   the same, but contractions in capitals too, numbers by three digits, line ends behind
            what comes before them
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from tuppence.errors import Fault
from tuppence.files import asset
from tuppence.tokenizer.json_file import END_OF_TEXT, byte_level


@dataclass(frozen=True)
class Split:
    """The regular expression for tiktoken, and the pre-tokenizer of a tokenizer.json."""

    regex: str
    pre_tokenizer: dict[str, Any]


GPT2_SPLIT = Split(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    byte_level(use_regex=True),
)
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4_SPLIT = Split(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]++|\s++$|\s+(?!\S)|\s",
    {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": _GPT4},
                "behavior": "Isolated",
                "invert": False,
            },
            byte_level(use_regex=False),
        ],
    },
)


@dataclass(frozen=True)
class Published:
    """A vocabulary of OpenAI's: its ranks as a file in the package, its special tokens."""

    name: str
    file: str
    sha256: str
    split: Split
    special: dict[str, int]


GPT2 = Published(
    name="gpt2",
    file="r50k_base.tiktoken",
    sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    split=GPT2_SPLIT,
    special={END_OF_TEXT: 50_256},
)
CL100K = Published(
    name="cl100k",
    file="cl100k_base.tiktoken",
    sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    split=GPT4_SPLIT,
    special={
        END_OF_TEXT: 100_257,
        "<|fim_prefix|>": 100_258,
        "<|fim_middle|>": 100_259,
        "<|fim_suffix|>": 100_260,
        "<|endofprompt|>": 100_276,
    },
)
PUBLISHED = {published.name: published for published in (GPT2, CL100K)}


@functools.cache
def published_ranks(name: str) -> dict[bytes, int]:
    """Ranks as they ship in the package. Raises Fault if the file was altered."""
    published = PUBLISHED[name]
    content = asset(published.file).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != published.sha256:
        raise Fault(
            f"{published.file}: sha256 {found[:12]} instead of {published.sha256[:12]}; "
            "the package is damaged: install it again"
        )
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def published_merges(name: str) -> list[tuple[bytes, bytes]]:
    """The merges, in order. Recovering them from ranks (`merges_of`) takes a second, so a file in
    the package has where each token longer than a byte is joined: a byte for each, by rank."""
    ranks = published_ranks(name)
    joined = asset(PUBLISHED[name].file.replace(".tiktoken", ".splits")).read_bytes()
    tokens = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    return [(token[:at], token[at:]) for token, at in zip(tokens, joined, strict=True)]

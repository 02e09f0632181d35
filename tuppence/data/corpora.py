"""Named corpora: what is known of a text before a byte of it is downloaded.

Counts are in GPT-2 tokens (characters where `tokenizer` is char) and come from the named source;
other vocabularies follow from the bytes that a token covers. This version plans with them;
preparing one needs its files.
"""

from __future__ import annotations

from dataclasses import dataclass

WEB_ALPHABET = 10_000  # characters of web text: a guess, for plans in characters


@dataclass(frozen=True)
class Corpus:
    """A corpus by name, with where its count is from. `alphabet` counts its characters."""

    name: str
    tokens: float
    tokenizer: str
    alphabet: int
    licence: str
    source: str


CORPORA = {
    c.name: c
    for c in (
        Corpus(
            name="openwebtext",
            tokens=9.04e9,
            tokenizer="gpt2",
            alphabet=WEB_ALPHABET,
            licence="CC0 for the collection",
            source="nanoGPT, data/openwebtext/readme.md",
        ),
        Corpus(
            name="fineweb",
            tokens=15e12,
            tokenizer="gpt2",
            alphabet=WEB_ALPHABET,
            licence="ODC-By 1.0",
            source="dataset card of HuggingFaceFW/fineweb: more than 15T",
        ),
        Corpus(
            name="fineweb_edu",
            tokens=1.3e12,
            tokenizer="gpt2",
            alphabet=WEB_ALPHABET,
            licence="ODC-By 1.0",
            source="dataset card of HuggingFaceFW/fineweb-edu: 1.3T",
        ),
        Corpus(
            name="climbmix",
            tokens=400e9,
            tokenizer="gpt2",
            alphabet=WEB_ALPHABET,
            licence="CC BY-NC 4.0",
            source="dataset card of nvidia/ClimbMix: 400B",
        ),
        Corpus(
            name="arithmetic",
            tokens=350e6,
            tokenizer="char",
            alphabet=17,
            licence="generated",
            source="sums in 17 characters; as much as the $1,000 guide had",
        ),
    )
}

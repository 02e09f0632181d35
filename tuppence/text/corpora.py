"""Named corpora: where they are, and what is known of them before a byte is downloaded.

    tuppence run data.source=fineweb_edu_10bt        is data.source=hf://HuggingFaceFW/... there

Counts are in GPT-2 tokens without end-of-text (characters where `tokenizer` is char); `evidence`
says who counted, and what is only in proportion. Other vocabularies follow from the bytes that a
token covers. A commit is pinned where public records agree on one; else the first preparation
finds the newest, and its manifest records it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuppence.errors import UserError

WEB_ALPHABET = 10_000  # characters of web text: a guess, for plans in characters


@dataclass(frozen=True)
class Corpus:
    """A corpus by name. What is None nobody counted; `alphabet` counts its characters.

    `place` is a dataset of the Hub, or a folder of one, and "" where there is nothing to download.
    `text_bytes` is its UTF-8 text, `file_bytes` the files it comes in. `shuffle` is off where a
    row is a line of a longer text; `on_bad` says what the broken rows of this corpus deserve.
    """

    name: str
    place: str
    tokens: float
    licence: str
    evidence: str
    revision: str | None = None
    documents: int | None = None
    text_bytes: float | None = None
    file_bytes: float | None = None
    tokenizer: str = "gpt2"
    alphabet: int = WEB_ALPHABET
    text_field: str = "text"
    on_bad: str | None = None
    shuffle: bool = True

    @property
    def source(self) -> str:
        """Its place as `data.source` would name it, at its commit."""
        owner, name, *inside = self.place.split("/")
        at = f"@{self.revision}" if self.revision else ""
        return "/".join(["hf:/", owner, name + at, *inside])


def defaults_of(source: str) -> dict[str, Any]:
    """How this corpus is prepared where the person does not say: options by name."""
    corpus = CORPORA.get(source)
    if corpus is None:
        return {}
    unshuffled = {} if corpus.shuffle else {"seed": None}
    lenient = {} if corpus.on_bad is None else {"on_bad": corpus.on_bad}
    return {"text_field": corpus.text_field} | lenient | unshuffled


def check_preparable(source: str) -> None:
    """Raises UserError for a corpus that only plans know. Asks no network."""
    if source in CORPORA and not CORPORA[source].place:
        raise UserError(
            f"data.source={source}: plans know it by its name, but it is generated, so there is "
            f"nothing to download; give its files, for example data.source='{source}/*.txt'"
        )


ODC_BY = "ODC-By 1.0"
FINEWEB = "9bb295ddab0e05d785b879661af7260fed5140fc"  # its tag v1.4.0
FINEWEB_EDU = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
TINYSTORIES = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"

CORPORA = {
    c.name: c
    for c in (
        Corpus(
            name="openwebtext",
            place="Skylion007/openwebtext",
            tokens=9.04e9,
            documents=8_013_769,
            text_bytes=39.7e9,
            file_bytes=24_193_092_408,
            licence="CC0 for the collection",
            evidence="tokens: nanoGPT, data/openwebtext/readme.md; the rest: dataset card",
        ),
        Corpus(
            name="fineweb",
            place="HuggingFaceFW/fineweb/data",
            tokens=15e12,
            evidence="dataset card: more than 15T",
            licence=ODC_BY,
            revision=FINEWEB,
        ),
        Corpus(
            name="fineweb_10bt",
            place="HuggingFaceFW/fineweb/sample/10BT",
            tokens=10_371_489_838,
            documents=14_868_862,
            file_bytes=30_639_384_917,
            evidence="tokens: sum of its token_count; the rest: the Hub, of this commit",
            licence=ODC_BY,
            revision=FINEWEB,
        ),
        Corpus(
            name="fineweb_100bt",
            place="HuggingFaceFW/fineweb/sample/100BT",
            tokens=100e9,
            file_bytes=277.4e9,
            evidence="dataset card: around 100B, 277.4 GB",
            licence=ODC_BY,
            revision=FINEWEB,
        ),
        Corpus(
            name="fineweb_350bt",
            place="HuggingFaceFW/fineweb/sample/350BT",
            tokens=350e9,
            evidence="dataset card: around 350B; its 388 GB do not go with the smaller samples'",
            licence=ODC_BY,
            revision=FINEWEB,
        ),
        Corpus(
            name="fineweb_edu",
            place="HuggingFaceFW/fineweb-edu/data",
            tokens=1.3e12,
            evidence="dataset card: 1.3T",
            licence=ODC_BY,
            revision=FINEWEB_EDU,
        ),
        Corpus(
            name="fineweb_edu_10bt",
            place="HuggingFaceFW/fineweb-edu/sample/10BT",
            tokens=9_972_918_177,
            documents=9_672_101,
            file_bytes=28_518_193_415,
            evidence="tokens: sum of its token_count; the rest: 14 files as others counted",
            licence=ODC_BY,
            revision=FINEWEB_EDU,
        ),
        Corpus(
            name="fineweb_edu_100bt",
            place="HuggingFaceFW/fineweb-edu/sample/100BT",
            tokens=100e9,
            evidence="dataset card: around 100B",
            licence=ODC_BY,
            revision=FINEWEB_EDU,
        ),
        Corpus(
            name="fineweb_edu_350bt",
            place="HuggingFaceFW/fineweb-edu/sample/350BT",
            tokens=350e9,
            evidence="dataset card: around 350B",
            licence=ODC_BY,
            revision=FINEWEB_EDU,
        ),
        Corpus(
            name="climbmix",
            place="karpathy/climbmix-400b-shuffle",
            tokens=400e9,
            documents=553_240_576,
            licence="CC BY-NC 4.0",
            evidence="dataset card of nvidia/ClimbMix, of which this is nanochat's shuffled text",
        ),
        Corpus(
            name="tinystories",
            place="roneneldan/TinyStories/data",
            revision=TINYSTORIES,
            tokens=471_872_517,
            documents=2_119_719,
            licence="CDLA-Sharing 1.0",
            evidence="train split, as others counted it at this commit",
        ),
        Corpus(
            name="wikitext_103",
            place="Salesforce/wikitext/wikitext-103-raw-v1",
            tokens=117_920_140,
            documents=1_801_350,
            text_bytes=539.3e6,
            file_bytes=314_076_578,
            evidence="tokens: as others counted them at this commit; the rest: dataset card",
            licence="CC BY-SA 3.0, GFDL",
            revision=WIKITEXT,
            on_bad="skip",  # a third of its rows are empty lines
            shuffle=False,
        ),
        Corpus(
            name="wikitext_2",
            place="Salesforce/wikitext/wikitext-2-raw-v1",
            tokens=2_391_884,
            documents=36_718,
            text_bytes=10.9e6,
            file_bytes=6_357_543,
            evidence="tokens: as others counted them at this commit; the rest: dataset card",
            licence="CC BY-SA 3.0, GFDL",
            revision=WIKITEXT,
            on_bad="skip",  # a third of its rows are empty lines
            shuffle=False,
        ),
        Corpus(
            name="arithmetic",
            place="",
            tokens=350e6,
            tokenizer="char",
            alphabet=17,
            licence="generated",
            evidence="sums in 17 characters; as much as the $1,000 guide had",
        ),
    )
}

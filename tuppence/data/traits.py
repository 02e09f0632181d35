"""What is worth knowing of documents besides their tokens: which are alike, and their language.

Documents are alike where a key is equal in any band. `exact` has one band, a hash of the text.
`near` has 14, each over 8 of 112 MinHashes of the text's runs of five words, as FineWeb was
deduplicated (Penedo et al. 2024, arXiv:2406.17557): two documents that share a part s of their
runs are found alike with probability 1 - (1 - s^8)^14, a half at s = 0.68. In scripts that put no
spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer, Tibetan) a character is a word.

MinHash is the library rensa's, the language that of pycld2, Chrome's detector; both come with the
extra `corpus`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tuppence.errors import UserError
from tuppence.text.documents import Bad, Document

BANDS, ROWS, RUN_WORDS = 14, 8, 5
LANGUAGE_SAMPLE, LANGUAGE_CHARS = 16, 1_000  # documents of a window, characters of each
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_OF_CONTENT = ("sha256:", "git:")  # a server's tags are of its own making
_INSTALL = "pip install 'tuppence[corpus]'"

Keys = npt.NDArray[np.uint64]


def bands_of(dedup: str) -> int:
    """How many keys a document has. Raises UserError for what is no kind of it, and where a library
    is missing."""
    kinds = {"none": 0, "exact": 1, "near": BANDS}
    if dedup not in kinds:
        raise UserError(f"data.dedup={dedup}: one of {', '.join(kinds)}")
    if dedup == "near" and importlib.util.find_spec("rensa") is None:
        raise UserError(f"data.dedup=near needs a library that is not installed: {_INSTALL}")
    return kinds[dedup]


def can_tell_languages() -> bool:
    """Whether the library is here; where it is not, languages are not measured."""
    return importlib.util.find_spec("pycld2") is not None


def keys(documents: Sequence[Document], *, dedup: str, identity: str = "") -> Keys:
    """[len(documents), bands]. A text that comes in pieces is a file: it is like those of the same
    `identity`, where that is a hash of the content, and else like no other."""
    found = np.empty((len(documents), bands_of(dedup)), dtype=np.uint64)
    for row, document in zip(found, documents, strict=True):
        if not document.last:
            row[:] = _hash(identity if identity.startswith(_OF_CONTENT) else document.shown)
        elif dedup == "exact":
            row[:] = _hash(document.text)
        elif dedup == "near":
            row[:] = _bands(document.text)
    return found


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def words_of(text: str) -> list[str]:
    """What stands between spaces, in lower case; of a script without them each character."""
    text = text.lower()
    return (text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split()


def _bands(text: str) -> Keys:
    import rensa

    words = words_of(text)
    count = max(1, len(words) - RUN_WORDS + 1)
    hashes = rensa.RMinHash(num_perm=BANDS * ROWS, seed=1)
    hashes.update([" ".join(words[i : i + RUN_WORDS]) for i in range(count)])
    rows = np.array(hashes.digest(), dtype="<u4").reshape(BANDS, ROWS)
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def languages(found: Sequence[Document | Bad]) -> Counter[str]:
    """The languages of the first few documents, mostly by ISO 639-1 code; `un` is unknown."""
    import pycld2

    documents = [each for each in found if isinstance(each, Document)][:LANGUAGE_SAMPLE]
    counted: Counter[str] = Counter()
    for document in documents:
        start = "".join(c if c.isprintable() else " " for c in document.text[:LANGUAGE_CHARS])
        try:
            _, _, details = pycld2.detect(start, isPlainText=True)
        except pycld2.error:  # it is strict about rare code points
            details = (("Unknown", "un"),)
        counted[details[0][1]] += 1
    return counted

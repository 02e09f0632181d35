"""Tokenizers: an id per character or byte, and any tokenizer.json (`ranked` has byte pairs).

All turn text into uint32 ids and back, never match a special token inside text (what a document
says is never a command), and know how many UTF-8 bytes each id stands for: bits per byte = nats /
ln 2 / bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tuppence.errors import UserError
from tuppence.files import write_whole
from tuppence.tokenizer.json_file import (
    END_OF_TEXT,
    byte_letters,
    byte_level,
    json_bytes,
    unspelled,
)
from tuppence.tokenizer.pieces import Cut
from tuppence.tokenizer.ranks import GPT2_SPLIT, GPT4_SPLIT

if TYPE_CHECKING:
    import tokenizers

Ids: TypeAlias = npt.NDArray[np.uint32]

_NO_CHARACTER = 2**32 - 1
_NO_BYTE = 255


class UnknownCharacter(UserError):
    """A character that a `char` tokenizer has no id for; `text` counts within the batch."""

    def __init__(self, character: str, *, text: int, offset: int, alphabet: str) -> None:
        self.character, self.text, self.offset = character, text, offset
        super().__init__(unknown_character(character, f"offset {offset:,}", alphabet=alphabet))
        self.alphabet = alphabet

    def __reduce__(self) -> tuple[Callable[..., UnknownCharacter], tuple[Any, ...]]:
        again = functools.partial(
            UnknownCharacter, text=self.text, offset=self.offset, alphabet=self.alphabet
        )
        return again, (self.character,)


def unknown_character(character: str, place: str, *, alphabet: str) -> str:
    return (
        f"character {character!r} at {place} is not among the tokenizer's {len(alphabet)} "
        f"({alphabet[:40]!r}); add it to char:ALPHABET, or drop it from the text"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_tokenizer(folder: Path, content: bytes, meta: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer.meta.json, which says how to load it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(content)
    meta = meta | {"sha256": _sha256(content)}
    write_whole(folder / "tokenizer.meta.json", json.dumps(meta, indent=1).encode())


def known(
    ids: Iterable[int] | Ids, *, vocab_size: int, end_of_text: int | None = None
) -> npt.NDArray[np.uint32]:
    """Ids that stand for text: a padded model may emit ids behind the vocabulary."""
    array = np.asarray(ids, dtype=np.int64)
    if end_of_text is not None:
        array = array[array != end_of_text]
    return array[(array >= 0) & (array < vocab_size)].astype(np.uint32)


def codes_of(text: str) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint32]:
    """The code points of a string, as narrow as they come."""
    try:
        return np.frombuffer(text.encode("latin-1"), dtype=np.uint8)
    except UnicodeEncodeError:
        return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


class CharTokenizer:
    """One id per character of a given alphabet; end-of-text, where there is one, comes last."""

    cut: Cut = "anywhere"

    def __init__(self, alphabet: str, *, end_of_text: bool) -> None:
        self.name = "char"
        self.alphabet = alphabet
        self.end_of_text = len(alphabet) if end_of_text else None
        self.vocab_size = len(alphabet) + end_of_text
        self._codes = np.array([ord(c) for c in alphabet], dtype="<u4")
        # one entry behind the highest code catches all above it; 256 serve every uint8 unchecked
        self._id_of = np.full(max(256, int(self._codes.max()) + 2), _NO_CHARACTER, dtype=np.uint32)
        self._id_of[self._codes] = np.arange(len(alphabet), dtype=np.uint32)
        # bytes.translate is ten times faster than an index array, where ids fit a byte
        narrow = np.minimum(self._id_of[:256], _NO_BYTE).astype(np.uint8).tobytes()
        self._byte_ids = narrow if len(alphabet) <= _NO_BYTE else None

    def __reduce__(self) -> tuple[Any, ...]:
        has_end = self.end_of_text is not None
        return functools.partial(CharTokenizer, end_of_text=has_end), (self.alphabet,)

    def encode(self, text: str) -> Ids:
        """Raises UnknownCharacter."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """All texts in one lookup. Raises UnknownCharacter."""
        codes = codes_of("".join(texts))
        if codes.dtype == np.uint8 and self._byte_ids is not None:
            narrow = codes.tobytes().translate(self._byte_ids)
            if _NO_BYTE in narrow:
                raise self._unknown(texts, at=narrow.index(_NO_BYTE))
            ids = np.frombuffer(narrow, dtype=np.uint8).astype(np.uint32)
            return _split(ids, [len(text) for text in texts])
        if codes.dtype != np.uint8:
            codes = np.minimum(codes, np.uint32(len(self._id_of) - 1))
        ids = self._id_of[codes]
        if ids.size and ids.max() == _NO_CHARACTER:
            raise self._unknown(texts, at=int(np.argmax(ids == _NO_CHARACTER)))
        return _split(ids, [len(text) for text in texts])

    def decode(self, ids: Iterable[int] | Ids) -> str:
        kept = known(ids, vocab_size=self.vocab_size, end_of_text=self.end_of_text)
        return self._codes[kept].tobytes().decode("utf-32-le")

    def token_bytes(self) -> npt.NDArray[np.int32]:
        sizes = [len(c.encode("utf-8")) for c in self.alphabet]
        return np.array(sizes + [0] * (self.vocab_size - len(sizes)), dtype=np.int32)

    def save(self, folder: Path) -> None:
        write_tokenizer(folder, self._json, {"kind": "char", "name": self.name})

    @property
    def sha256(self) -> str:
        return _sha256(self._json)

    @functools.cached_property
    def _json(self) -> bytes:
        return json_bytes(
            {c: i for i, c in enumerate(self.alphabet)},
            merges=[],
            special={} if self.end_of_text is None else {END_OF_TEXT: self.end_of_text},
            pre_tokenizer=None,
            decoder={"type": "Fuse"},
        )

    def _unknown(self, texts: Sequence[str], *, at: int) -> UnknownCharacter:
        index = 0
        while at >= len(texts[index]):
            at -= len(texts[index])
            index += 1
        return UnknownCharacter(texts[index][at], text=index, offset=at, alphabet=self.alphabet)


def _split(ids: Ids, sizes: list[int]) -> list[Ids]:
    arrays = []
    start = 0
    for size in sizes:
        arrays.append(ids[start : start + size])
        start += size
    return arrays


class ByteTokenizer:
    """One id per UTF-8 byte, and 256 for end-of-text."""

    name = "byte"
    cut: Cut = "anywhere"
    vocab_size = 257
    end_of_text = 256

    def __reduce__(self) -> tuple[Any, ...]:
        return ByteTokenizer, ()

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        kept = known(ids, vocab_size=self.vocab_size, end_of_text=self.end_of_text)
        return kept.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int32]:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def save(self, folder: Path) -> None:
        write_tokenizer(folder, self._json, {"kind": "byte", "name": self.name})

    @property
    def sha256(self) -> str:
        return _sha256(self._json)

    @functools.cached_property
    def _json(self) -> bytes:
        return json_bytes(
            {letter: byte for byte, letter in enumerate(byte_letters())},
            merges=[],
            special={END_OF_TEXT: self.end_of_text},
            pre_tokenizer=byte_level(use_regex=False),
            decoder=byte_level(use_regex=False),
        )


class JsonTokenizer:
    """Any `tokenizer.json`, encoded by the `tokenizers` library (its batches use all cores)."""

    def __init__(self, content: bytes, *, name: str) -> None:
        self.name = name
        self._json = content
        self._rules: dict[str, Any] = json.loads(content)
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text = _end_of_text(self._rules["added_tokens"])
        self.cut: Cut = "before_space" if _is_cuttable(self._rules) else "nowhere"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(JsonTokenizer, name=self.name), (self._json,)

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def decode(self, ids: Iterable[int] | Ids) -> str:
        kept = known(ids, vocab_size=self.vocab_size, end_of_text=self.end_of_text)
        return self._library.decode(kept.tolist(), skip_special_tokens=True)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Exact for byte-level vocabularies; else the bytes of each token's own spelling."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        bytewise = (self._rules["decoder"] or {}).get("type") == "ByteLevel"
        for token, i in self._library.get_vocab(with_added_tokens=False).items():
            sizes[i] = _spelled_bytes(token, bytewise=bytewise)
        for added in self._rules["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes

    def save(self, folder: Path) -> None:
        write_tokenizer(folder, self._json, {"kind": "json", "name": self.name})

    @property
    def sha256(self) -> str:
        return _sha256(self._json)

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        import tokenizers

        library = tokenizers.Tokenizer.from_str(self._json.decode("utf-8"))
        library.encode_special_tokens = True  # what looks like a special token in text is text
        library.no_truncation()
        library.no_padding()
        return library


def _end_of_text(added_tokens: list[dict[str, Any]]) -> int | None:
    ids = {token["content"]: int(token["id"]) for token in added_tokens}
    names = (END_OF_TEXT, "<|end_of_text|>", "<|bos|>", "</s>", "<eos>")
    return next((ids[name] for name in names if name in ids), None)


def _is_cuttable(rules: dict[str, Any]) -> bool:
    """Whether the proof in `pieces` holds: GPT-2's or GPT-4's split, and nothing before it."""
    splits = (GPT2_SPLIT.pre_tokenizer, GPT4_SPLIT.pre_tokenizer)
    return (
        _settled(rules["pre_tokenizer"]) in [_settled(split) for split in splits]
        and rules["normalizer"] is None
        and all(token["special"] for token in rules["added_tokens"])
    )


def _settled(rules: Any) -> Any:
    """A pre-tokenizer's setting with what is not said in it, without what splits nothing."""
    if isinstance(rules, list):
        return [_settled(rule) for rule in rules]
    if not isinstance(rules, dict):
        return rules
    if rules.get("type") == "ByteLevel":
        rules = {"use_regex": True} | rules
    return {key: _settled(value) for key, value in rules.items() if key != "trim_offsets"}


def _spelled_bytes(token: str, *, bytewise: bool) -> int:
    raw = unspelled(token) if bytewise else None
    if raw is not None:
        return len(raw)
    if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's spelling of one byte
        return 1
    return len(token.replace("\u2581", " ").removeprefix("##").encode("utf-8"))

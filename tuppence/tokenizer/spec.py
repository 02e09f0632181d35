r"""Text to ids and back: which tokenizers there are, how one is asked for, made and loaded.

char            one id per character that the corpus has
char:ALPHABET   one id per character given (`\n`, `\t`, `\\` are escapes)
byte            one id per byte
gpt2            GPT-2's 50,257 tokens
cl100k          the 100,277 tokens of GPT-4
bpe:N           N tokens learned from the corpus, the last of them end-of-text
FOLDER or FILE  a tokenizer.json of the `tokenizers` library
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tuppence.errors import Fault, UserError
from tuppence.tokenizer import learned
from tuppence.tokenizer.kinds import ByteTokenizer, CharTokenizer, Ids, JsonTokenizer, codes_of
from tuppence.tokenizer.pieces import Cut
from tuppence.tokenizer.ranked import RankedTokenizer, pairs_of
from tuppence.tokenizer.ranks import PUBLISHED

MOST_LOST = 0.01  # of a text's letters: accents and rare signs may be normalised away

Texts = Callable[[], Iterator[str]]

_PLAIN = ("char", "byte", *PUBLISHED)
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer. Ids are uint32."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def cut(self) -> Cut:
        """Where a document may be cut without changing its ids (see `pieces`)."""
        ...

    @property
    def sha256(self) -> str:
        """Of the bytes of tokenizer.json as `save` writes it."""
        ...

    def encode(self, text: str) -> Ids:
        """Special tokens in the text are text. No end-of-text is added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def decode(self, ids: Iterable[int] | Ids) -> str:
        """End-of-text and ids outside the vocabulary are left out."""
        ...

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """[vocab_size] UTF-8 bytes that each id stands for; 0 for end-of-text."""
        ...

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer.meta.json."""
        ...


def build_tokenizer(spec: str, *, texts: Texts, single_document: bool | None = None) -> Tokenizer:
    """The tokenizer that `spec` asks for. Raises UserError for a spec that makes none.

    `texts` gives the corpus anew at every call, and is called only by kinds that learn from it.
    Each text counts as a document, unless `single_document` says whether there is but one (`char`
    has an end-of-text only where something could follow it).
    """
    kind, argument = parse_spec(spec)
    if kind == "char":
        if single_document is None:
            single_document = len(list(itertools.islice(texts(), 2))) == 1
        alphabet = argument or _alphabet(texts())
        return CharTokenizer(alphabet, end_of_text=not single_document)
    if kind == "byte":
        return ByteTokenizer()
    if kind in PUBLISHED:
        return RankedTokenizer(kind)
    if kind == "bpe":
        return learned.learn(int(argument), texts())
    return _from_json(Path(argument), name=spec)


def check_keeps(sample: str, tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer that loses letters of this text, for want of tokens."""
    before = Counter(c for c in sample.casefold() if c.isalnum())
    after = Counter(tokenizer.decode(tokenizer.encode(sample)).casefold())
    lost = (before - after).total()
    if lost > MOST_LOST * before.total():
        raise UserError(
            f"data.tokenizer {tokenizer.name}: of {before.total():,} letters and digits of this "
            f"text {lost:,} do not come back from its tokens; use one that has bytes, such as gpt2"
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote there, or any tokenizer.json. Raises UserError or Fault."""
    meta_path = folder / "tokenizer.meta.json"
    path = folder / "tokenizer.json"
    if not meta_path.exists():
        return _from_json(folder, name=folder.name)
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != meta["sha256"]:
        raise Fault(f"{path}: missing or altered since it was written; prepare the data again")
    if meta["kind"] == "char":
        return _char_from(json.loads(content))
    if meta["kind"] == "byte":
        return ByteTokenizer()
    if meta["kind"] in PUBLISHED:
        return RankedTokenizer(meta["kind"])
    if meta["kind"] == "bpe":
        return RankedTokenizer(meta["name"], pairs=pairs_of(json.loads(content)["model"]))
    return JsonTokenizer(content, name=meta["name"])


def parse_spec(spec: str) -> tuple[str, str]:
    """(kind, argument) of a spec. Raises UserError for what is none."""
    kind, colon, argument = spec.partition(":")
    if spec in _PLAIN:
        return spec, ""
    if kind == "char" and colon:
        return kind, _given_alphabet(argument)
    if kind == "bpe":
        return kind, str(_bpe_size(spec, argument))
    path = Path(spec).expanduser()
    if path.exists() or "/" in spec or spec.endswith(".json"):
        return "json", str(path)
    near = difflib.get_close_matches(spec.lower(), (*_PLAIN, "bpe:8192"), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"data.tokenizer {spec!r} is not known; {hint}There are char, char:ALPHABET, byte, gpt2, "
        "cl100k, bpe:N and the path of a tokenizer.json"
    )


def spec_identity(spec: str) -> str:
    """What `spec` stands for, for a cache's key: a path by its content, ranks by theirs."""
    kind, argument = parse_spec(spec)
    if kind == "json":
        return f"json:{hashlib.sha256(_read_json(Path(argument))).hexdigest()}"
    if kind in PUBLISHED:
        return f"{kind}:{PUBLISHED[kind].sha256}"
    return learned.identity(argument) if kind == "bpe" else f"{kind}:{argument}"


def _given_alphabet(argument: str) -> str:
    argument = re.sub(r"\\[ntr\\]", lambda escape: _ESCAPES[escape[0]], argument)
    twice = next((c for c in argument if argument.count(c) > 1), None)
    if not argument or twice is not None:
        fault = f"has {twice!r} twice" if twice is not None else "is empty"
        raise UserError(
            f"data.tokenizer char:ALPHABET: the alphabet {fault}; give each symbol once"
        )
    return argument


def _bpe_size(spec: str, argument: str) -> int:
    size = int(argument) if argument.isascii() and argument.isdigit() else 0
    if size < learned.SMALLEST:
        raise UserError(
            f"data.tokenizer {spec!r}: bpe:N needs a whole number N of at least {learned.SMALLEST} "
            "(256 bytes and end-of-text), such as bpe:8192"
        )
    return size


def _alphabet(texts: Iterator[str]) -> str:
    """The characters of all texts, sorted by code point."""
    seen = np.zeros(0x110000, dtype=bool)
    seen_bytes = b""
    for text in texts:
        codes = codes_of(text)
        if codes.dtype == np.uint8:  # drop what is known: the rest is empty but for the first texts
            seen_bytes += bytes(set(codes.tobytes().translate(None, seen_bytes)))
        else:
            seen[codes] = True
    seen[list(seen_bytes)] = True
    if not seen.any():
        raise UserError("data.source is empty: the corpus is empty of characters; give it text")
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def _char_from(rules: dict[str, dict[str, dict[str, int]]]) -> CharTokenizer:
    vocab = rules["model"]["vocab"]
    alphabet = "".join(sorted(vocab, key=vocab.__getitem__))
    return CharTokenizer(alphabet, end_of_text=bool(rules["added_tokens"]))


def _read_json(path: Path) -> bytes:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"data.tokenizer {str(path)!r}: no tokenizer.json there; check the path")
    return file.read_bytes()


def _from_json(path: Path, *, name: str) -> JsonTokenizer:
    content = _read_json(path)
    try:
        return JsonTokenizer(content, name=name)
    except Exception as error:  # the library raises it bare for what it cannot read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.tokenizer {str(path)!r}: not a tokenizer.json of `tokenizers` ({reason})"
        ) from None

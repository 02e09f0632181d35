r"""Cut documents into pieces that can be tokenised apart, and pieces into batches.

One book of five megabytes must keep every core busy and no core's memory full, and the ids must not
depend on where it was cut. Three rules, one per kind of tokenizer:

- "anywhere": one id per character or byte.
- "nowhere": a tokenizer we know nothing about sees whole documents.
- "before_space": byte-level BPE behind GPT-2's or GPT-4's split. Cut between two characters c and w
  where c is no white space and w a plain space, or c a letter and w none (of those that Unicode
  has long settled). Proof that ids(whole) = ids(left) + ids(right), with

      GPT-2   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
      GPT-4   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
              | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

  (a) In the whole text a match ends between c and w. A letter lies in a contraction or in a run of
  letters, and both go on with letters only. Another c that is no white space lies in a run of
  numbers, or of other characters with line ends behind it, or is the one character that GPT-4
  takes before letters: none of these goes on with a space. (b) The matches of the left part are the
  same alone: what stops at w stops at the end as well, a contraction that w breaks off ("'l" of
  "'ll") is one that the end breaks off, and white space left of c ends before c, so that its greed
  and its look-ahead see only characters up to c. (c) The right part starts at a match of the whole
  text and no pattern looks back. Merges act inside one match, so ids follow. ∎

  Before a line end there is no cut behind "." in GPT-4's split: it takes both in one match.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from tuppence.errors import UserError

Cut = Literal["anywhere", "before_space", "nowhere"]

PIECE_CHARS = 1 << 18
BATCH_PIECES = 4096
# Text without a place to cut goes into a tokenizer as one match. At a million characters of white
# space tiktoken's regular expressions run out of stack and end the process; a match of 30 MB
# takes a minute and 1.5 GB.
LONGEST_UNBROKEN = 1 << 19

# \S here is \S there: Python calls more characters white space than Unicode does, never fewer.
# Letters and signs of Latin, kana and Chinese: scripts without spaces, base64, minified code.
_LETTER = r"[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5]"
_NO_LETTER = r"[\x00-@\[-`{-\x7f\u3001-\u3003\u3008-\u3011\uff01-\uff20]"
_PLACE = re.compile(rf"\S(?= )|{_LETTER}(?={_NO_LETTER})")


class UnbrokenText(UserError):
    """More than LONGEST_UNBROKEN characters without a place to cut, from character `offset` on."""

    def __init__(self, document: int, *, offset: int) -> None:
        self.document, self.offset = document, offset
        super().__init__(unbroken_text(f"document {document + 1:,}, character {offset + 1:,}"))

    def __reduce__(self) -> tuple[Callable[..., UnbrokenText], tuple[Any, ...]]:
        return functools.partial(UnbrokenText, offset=self.offset), (self.document,)


def unbroken_text(place: str) -> str:
    return (
        f"{place}: no space and no end of a word in {LONGEST_UNBROKEN:,} characters, which is no "
        "text that a tokenizer is for"
    )


class Piece(NamedTuple):
    """A stretch of one document: where it starts there (in characters), whether it ends it."""

    text: str
    document: int
    offset: int
    last: bool


def recut(
    pieces: Iterable[Piece],
    *,
    cut: Cut,
    piece_chars: int = PIECE_CHARS,
    longest: int | None = LONGEST_UNBROKEN,
) -> Iterator[Piece]:
    """The same text in pieces of about `piece_chars`, cut only where `cut` allows.

    The results do not depend on how the pieces came in. No piece is empty but a document's last.
    Raises UnbrokenText where "before_space" makes a piece of more than `longest` characters.
    """
    held = ""
    offset = 0
    for piece in pieces:
        if held:
            held += piece.text
        else:
            held = piece.text
        start = 0
        for end in _cuts(held, cut=cut, piece_chars=piece_chars):
            if longest is not None and end - start > longest:
                raise UnbrokenText(piece.document, offset=offset + start)
            yield Piece(held[start:end], piece.document, offset + start, False)
            start = end
        held, offset = held[start:] if start else held, offset + start
        if cut == "before_space" and longest is not None and len(held) > longest:
            raise UnbrokenText(piece.document, offset=offset)
        if piece.last:
            yield Piece(held, piece.document, offset, True)
            held, offset = "", 0


def batches(
    pieces: Iterable[Piece], *, batch_chars: int = PIECE_CHARS // 2
) -> Iterator[list[Piece]]:
    """Pieces in groups of at least `batch_chars` (or 4,096 pieces), each a unit of work."""
    batch: list[Piece] = []
    held_chars = 0
    for piece in pieces:
        batch.append(piece)
        held_chars += len(piece.text)
        if held_chars >= batch_chars or len(batch) >= BATCH_PIECES:
            yield batch
            batch, held_chars = [], 0
    if batch:
        yield batch


def _cuts(text: str, *, cut: Cut, piece_chars: int) -> Iterator[int]:
    start = 0
    while cut != "nowhere" and len(text) - start > piece_chars:
        end = start + piece_chars
        if cut == "before_space":
            end = _place(text, start, end)
        if end < 0:
            return
        yield end
        start = end


def _place(text: str, start: int, wanted: int) -> int:
    """The last safe cut in (start, wanted], else the first behind it, else -1."""
    width = 256
    while True:
        low = max(start, wanted - width)
        ends = [match.end() for match in _PLACE.finditer(text, low, wanted + 1)]
        if ends:
            return ends[-1]
        if low == start:
            break
        width *= 8
    behind = _PLACE.search(text, wanted)
    return behind.end() if behind else -1

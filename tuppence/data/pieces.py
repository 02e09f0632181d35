r"""Cut documents into pieces that can be tokenised apart, and pieces into batches.

One book of five megabytes must keep every core busy and no core's memory full, and the ids must not
depend on where it was cut. Three rules, one per kind of tokenizer:

- "anywhere": one id per character or byte.
- "nowhere": a tokenizer we know nothing about sees whole documents.
- "before_space": byte-level BPE with GPT-2's pre-tokenizer. Cut before a space or newline (w) that
  follows a character c which is not white space. Proof that ids(whole) = ids(left) + ids(right),
  with

      's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

  (a) In the whole text a match ends between c and w: c is no white space, so its match is a
  contraction or a run, and neither has white space after its first character. (b) The matches of
  the left part are the same alone: runs stop at w as they stop at the end; a run of white space
  left of c ends before c, so both its greed and its look-ahead see only characters up to c. (c)
  The right part starts at a match of the whole text and the pattern never looks back. Merges act
  inside one match, so ids follow. ∎
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Cut = Literal["anywhere", "before_space", "nowhere"]

PIECE_CHARS = 1 << 18
BATCH_PIECES = 4096

# Python calls more characters white space than Unicode does, never fewer: \S here is \S there.
_BEFORE_SPACE = re.compile(r"\S(?=[ \n])")


class Piece(NamedTuple):
    """A stretch of one document: where it starts there (in characters), whether it ends it."""

    text: str
    document: int
    offset: int
    last: bool


def recut(pieces: Iterable[Piece], *, cut: Cut, piece_chars: int = PIECE_CHARS) -> Iterator[Piece]:
    """The same text in pieces of about `piece_chars`, cut only where `cut` allows.

    The results do not depend on how the pieces came in. No piece is empty but a document's last.
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
            yield Piece(held[start:end], piece.document, offset + start, False)
            start = end
        held, offset = held[start:] if start else held, offset + start
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
            end = _space_cut(text, start, end)
        if end < 0:
            return
        yield end
        start = end


def _space_cut(text: str, start: int, wanted: int) -> int:
    """The last safe cut in (start, wanted], else the first behind it, else -1."""
    width = 256
    while True:
        low = max(start, wanted - width)
        ends = [match.end() for match in _BEFORE_SPACE.finditer(text, low, wanted + 1)]
        if ends:
            return ends[-1]
        if low == start:
            break
        width *= 8
    behind = _BEFORE_SPACE.search(text, wanted)
    return behind.end() if behind else -1

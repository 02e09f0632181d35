"""Encode batches of pieces on all cores and hand them back in order.

Threads suffice: tiktoken, `tokenizers` and numpy let go of the interpreter while they work. A few
batches are in flight at a time, so memory does not grow with the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.data.encoders import UnknownCharacter, unknown_character
from tuppence.data.pieces import Piece
from tuppence.data.tokenizer import Tokenizer
from tuppence.errors import UserError
from tuppence.host import usable_cores


@dataclass(frozen=True)
class Encoded:
    """One batch as ids, end-of-text included; `starts` says at which of them documents begin."""

    ids: npt.NDArray[Any]
    starts: list[int]
    text_bytes: int

    def until(self, count: int | None, *, token_bytes: npt.NDArray[np.int32]) -> Encoded:
        """The first `count` ids, or all of them; the bytes of a part are its tokens' own."""
        if count is None or count >= len(self.ids):
            return self
        starts = [start for start in self.starts if start < count]
        ids = self.ids[:count]
        return Encoded(ids, starts, int(token_bytes[ids].sum(dtype=np.int64)))


def encode_all(
    work: Iterable[list[Piece]], tokenizer: Tokenizer, *, dtype: np.dtype[Any]
) -> Iterator[Encoded]:
    """Batches encoded on all cores, in order; a few are in flight, so memory stays flat."""
    workers = usable_cores()
    flying: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in work:
                flying.append(pool.submit(_encode, batch, tokenizer, dtype=dtype))
                if len(flying) > 2 * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _encode(
    batch: list[Piece],
    tokenizer: Tokenizer,
    *,
    dtype: np.dtype[Any],
) -> Encoded:
    try:
        arrays = tokenizer.encode_batch([piece.text for piece in batch])
    except UnknownCharacter as error:
        raise _placed(error, batch[error.text]) from None
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    end_of_text = np.array(end, dtype=dtype)
    text_bytes = sum(_utf8_bytes(piece.text) for piece in batch)
    parts: list[npt.NDArray[Any]] = []
    starts = []
    count = 0
    for piece, ids in zip(batch, arrays, strict=True):
        if piece.offset == 0:
            starts.append(count)
        parts.append(ids)
        count += len(ids)
        if piece.last:
            parts.append(end_of_text)
            count += len(end_of_text)
    return Encoded(np.concatenate(parts, dtype=dtype, casting="same_kind"), starts, text_bytes)


def _placed(error: UnknownCharacter, piece: Piece) -> UserError:
    place = f"document {piece.document + 1:,}, character {piece.offset + error.offset + 1:,}"
    return UserError(unknown_character(error.character, place, alphabet=error.alphabet))


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))

"""Which tokens of the stream are for validation, and which for training.

    many documents     | val | train ...                     |      (beyond the cap: not read)
    one                | train ...        | (beyond the cap) | val |

Many documents come shuffled, so the first of them are a fair sample; they are the same ones however
much of the corpus is read after them: neither a cap nor files added at the end change what a run is
judged by. Of a single text the last tenth is set apart (nanoGPT's split of Shakespeare).

    val = min(10,485,760, bytes of the files / 50)      a tenth of plain English, less of most else
"""

from __future__ import annotations

from dataclasses import dataclass

from tuppence.errors import UserError

VAL_MOST = 10_485_760
_BYTES_PER_VAL_TOKEN = 50


@dataclass(frozen=True)
class Asked:
    """What the split depends on besides the tokens there are. `source_bytes` counts the files as
    they lie; `single` is whether they hold one document."""

    max_tokens: int | None
    val_tokens: int | None
    source_bytes: int
    single: bool

    def wanted_tokens(self) -> int | None:
        """How many tokens of the stream are needed; None for all of them."""
        if self.max_tokens is None or self.single:
            return None
        return self.max_tokens + self._first()

    def split(self, tokens: int) -> Split:
        """The split of a stream that ends after `tokens`. Raises UserError where the validation
        split would be more than half of it."""
        val = self.val_tokens if self.val_tokens is not None else self._default(tokens)
        if 2 * val > tokens and self.val_tokens is not None:
            raise UserError(
                f"data.val_tokens {val:,} is more than half of the {tokens:,} tokens there are; "
                f"give at most {tokens // 2:,}"
            )
        most = tokens - val if self.max_tokens is None else self.max_tokens
        if self.single:
            return Split((0, min(most, tokens - val)), (tokens - val, tokens))
        return Split((val, min(val + most, tokens)), (0, val))

    def rule(self, val: int) -> str:
        """One sentence for the manifest, where `val` tokens came out."""
        tenth = self.single and self.val_tokens is None
        size = f"tenth (at most {VAL_MOST:,})" if tenth else f"{val:,}"
        where = "last" if self.single else "first"
        rest = "all the others" if self.max_tokens is None else f"the next {self.max_tokens:,}"
        if self.single and self.max_tokens is not None:
            rest = f"the first {self.max_tokens:,}"
        return f"val is the {where} {size} of the stream's tokens, train is {rest}"

    def _first(self) -> int:
        if self.val_tokens is not None:
            return self.val_tokens
        return min(VAL_MOST, self.source_bytes // _BYTES_PER_VAL_TOKEN)

    def _default(self, tokens: int) -> int:
        tenth = min(VAL_MOST, tokens - tokens * 9 // 10)
        if self.single:
            return tenth
        wanted = self.wanted_tokens()
        full = wanted is not None and tokens >= wanted  # there may be more text behind them
        return self._first() if full else min(self._first(), tenth)


@dataclass(frozen=True)
class Split:
    """Ranges [first, stop) of the stream's tokens."""

    train: tuple[int, int]
    val: tuple[int, int]

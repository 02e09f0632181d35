"""Which tokens of the stream are for validation, and which for training.

    many documents     | val | train ...                     |      (beyond the cap: not read)
    one                | train ...        | (beyond the cap) | val |

Many documents come shuffled, so the first of them are a fair sample; they are the same ones however
much of the corpus is read after them: no cap changes what a run is judged by, nor do files added at
the end once val is full (10,485,760, or as asked). Of a single text the last tenth is set apart
(nanoGPT's split of Shakespeare).

    val = min(10,485,760, bytes of the files / 50)      a tenth of plain English, less of most else

Where that is more than half of all tokens (the files hold little text, or much the same) val is a
tenth of them. So that a cap does not change this, at least twice val is read under any.
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
        first = self._first()
        return first + max(self.max_tokens, first if self.val_tokens is None else 0)

    def split(self, tokens: int, *, estimated: bool = False) -> Split:
        """The split of a stream of which `tokens` were read. Raises UserError where these are all
        there are and `val_tokens` is more than half of them; where that is only `estimated`, val is
        half."""
        val = self._default(tokens) if self.val_tokens is None else self.val_tokens
        if self._refused(tokens):
            if not estimated:
                raise UserError(self._too_many(tokens, "tokens there are"))
            val = tokens // 2
        most = tokens - val if self.max_tokens is None else self.max_tokens
        if self.single:
            return Split((0, min(most, tokens - val)), (tokens - val, tokens))
        return Split((val, min(val + most, tokens)), (0, val))

    def refuse_beyond(self, most: int) -> None:
        """Raises UserError where even `most` tokens would be too few for the val split that is
        asked for, before any of them is made."""
        if self._refused(most):
            raise UserError(self._too_many(most, "tokens that so many bytes can be"))

    def rule(self, split: Split) -> str:
        """One sentence for the manifest on what came out."""
        val, train = (stop - first for first, stop in (split.val, split.train))
        tenth = self.single and self.val_tokens is None
        size = f"tenth (at most {VAL_MOST:,})" if tenth else f"{val:,}"
        where, behind = ("last", "first") if self.single else ("first", "next")
        rest = "all the others"
        if self.max_tokens is not None:
            short = f"{rest}, {train:,}, fewer than data.max_tokens={self.max_tokens:,}"
            rest = short if train < self.max_tokens else f"the {behind} {train:,}"
        return f"val is the {where} {size} of the stream's tokens, train is {rest}"

    def _first(self) -> int:
        if self.val_tokens is not None:
            return self.val_tokens
        return min(VAL_MOST, self.source_bytes // _BYTES_PER_VAL_TOKEN)

    def _default(self, tokens: int) -> int:
        if self.single or 2 * self._first() > tokens:
            return min(VAL_MOST, tokens - tokens * 9 // 10)
        return self._first()

    def _refused(self, tokens: int) -> bool:
        """Whether a stream that has no more than `tokens` is too short for `val_tokens`."""
        wanted = self.wanted_tokens()
        ends = wanted is None or tokens < wanted
        return ends and self.val_tokens is not None and 2 * self.val_tokens > tokens

    def _too_many(self, tokens: int, there: str) -> str:
        asked = f"data.val_tokens {self.val_tokens:,} is more than half of the {tokens:,} {there}"
        return f"{asked}; give at most {tokens // 2:,}"


@dataclass(frozen=True)
class Split:
    """Ranges [first, stop) of the stream's tokens."""

    train: tuple[int, int]
    val: tuple[int, int]

"""How a token stream is split: the validation tokens are its last ones.

    train = floor(9 n / 10), val = n - train (nanoGPT's own split of Shakespeare), val at most
    10,485,760

With a cap M on the train split the stream ends where both are full: M + val tokens, val a tenth
of that.
"""

from __future__ import annotations

DEFAULT_VAL_TOKENS_MOST = 10_485_760


def default_val_tokens(tokens: int) -> int:
    """The validation tokens of a stream of `tokens`, where nobody asked for a number."""
    return min(tokens - tokens * 9 // 10, DEFAULT_VAL_TOKENS_MOST)


def wanted_tokens(*, max_tokens: int | None, val_tokens: int | None) -> int | None:
    """How many tokens of the stream are needed; None for all of them."""
    if max_tokens is None:
        return None
    if val_tokens is None:
        # the smallest n whose nine tenths, rounded down, are max_tokens
        val_tokens = default_val_tokens(-(-10 * max_tokens // 9))
    return max_tokens + val_tokens


def split_rule(*, max_tokens: int | None, val_tokens: int | None) -> str:
    """One sentence for the manifest."""
    size = f"{val_tokens:,}" if val_tokens is not None else "tenth (at most 10,485,760)"
    read = f", read until train has {max_tokens:,}" if max_tokens is not None else ""
    return f"val is the last {size} of the stream's tokens{read}, train is all before it"

"""Attention within documents, where a window of tokens holds parts of several.

A document ends with the end-of-text id, which belongs to it; a window may begin and end inside one.
Which document a token is of follows from the ids alone:

    docs_BT = number of end-of-text ids before the position

Positions are not reset: rotary ones are relative, GPT-2's learned ones are the window's. There are
three ways, equal to rounding:

    mask    zero or minus infinity [B, T, T], once for all layers: on a CPU, and wherever
            probabilities are written out
    flex    FlexAttention (arXiv:2412.05496) on a card: blocks of 128 x 128 in which nobody sees
            anybody are skipped, and no T x T matrix is kept
    split   on a card that flex does not run on: the fused kernel, a document at a time

Shapes as in model/layers.py; N blocks of positions.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuppence.config import DataPlan
from tuppence.errors import UserError
from tuppence.model.branches import Branches

if TYPE_CHECKING:  # it brings torch's compiler: seconds
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # positions of FlexAttention's blocks
FLEX_CAPABILITY = (7, 0)  # the least that Triton compiles for
FLEX_HEAD_DIM = 16  # the least that its matmuls take
KERNELS = 32  # FlexAttention may be compiled so often; torch's default is 8


def document_end(data: DataPlan, end_of_text: int | None) -> int | None:
    """The id at which attention ends, or None where packing is plain.

    Raises UserError where documents are asked for and the tokenizer marks no end.
    """
    if data.packing == "plain":
        return None
    if end_of_text is None:
        raise UserError(
            f"data.packing={data.packing}: tokenizer {data.tokenizer} has no end-of-text, so "
            "documents cannot be told apart; use data.packing=plain"
        )
    return end_of_text


@dataclass(frozen=True)
class Blocks:
    """What FlexAttention needs to know of a pass; heads are dimension `heads` of a query."""

    mask: BlockMask
    heads: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of equally many queries, keys and values."""
        if self.heads == 0:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        y: Tensor = flex_kernel()(q, k, v, block_mask=self.mask)
        return y.transpose(0, 1) if self.heads == 0 else y


@dataclass(frozen=True)
class Spans:
    """The lengths of each sequence's documents, in order, and how far back a position looks."""

    lengths: list[list[int]]
    causal_TT: Tensor
    window: int
    heads: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of equally many queries, keys and values."""
        rows, each = 1 - self.heads, []
        for b, lengths in enumerate(self.lengths):
            parts = [torch.split(t.narrow(rows, b, 1), lengths, 2) for t in (q, k, v)]
            each.append(torch.cat([self._one(*part) for part in zip(*parts, strict=True)], 2))
        return torch.cat(each, rows)

    def _one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        if length <= self.window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask_LL = self.causal_TT[:length, :length].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL)


Mask = Tensor | Blocks | Spans | None


@dataclass(frozen=True)
class Documents:
    """What a model knows of documents: the id that ends one; heads are dimension `heads` of its
    queries. `dense` asks for full masks everywhere, and `refusal` says why flex does not run."""

    end: int
    heads: int
    dense: bool
    refusal: str | None

    def of(self, idx_BT: Tensor, branches: Branches | None = None) -> Tensor:
        """The number of each token's document in its window, or in its own branch of it."""
        ends_BT = idx_BT == self.end
        if branches is not None:
            return branches.count_before(ends_BT)
        return ends_BT.int().cumsum(1, dtype=torch.int32) - ends_BT.int()

    def mask(
        self,
        docs_BT: Tensor,
        causal_TT: Tensor,
        dtype: torch.dtype,
        *,
        window: int | None = None,
        dense: bool = False,
    ) -> Mask:
        """Who may look at whom, for all layers with this window; `causal_TT` is its own mask."""
        T = docs_BT.shape[1]
        window = window or T
        if T == 1:
            return None
        way = "mask" if dense else self.way(docs_BT.device.type)
        if way == "flex":
            return Blocks(block_mask(docs_BT, window), self.heads)
        if way == "split":
            return Spans(lengths_of(docs_BT), causal_TT, window, self.heads)
        return dense_mask(docs_BT, causal_TT, dtype).unsqueeze(self.heads)

    def way(self, device: str) -> str:
        """mask, flex or split."""
        if self.dense or device != "cuda":
            return "mask"
        return "split" if self.refusal else "flex"

    def note(self, device: str) -> str | None:
        """What the person should know of the way that is taken there, if anything."""
        if self.way(device) != "split":
            return None
        return (
            f"data.packing=documents: FlexAttention does not run here ({self.refusal}); "
            "documents are attended to one at a time, which is slow where they are short"
        )


def documents(end: int | None, *, head_dim: int, heads: int, how: str) -> Documents | None:
    """For a model that attends as `how` says; None where packing is plain."""
    if end is None:
        return None
    return Documents(end, heads, how == "matmul", flex_refusal(head_dim))


def flex_refusal(head_dim: int) -> str | None:
    """Why this machine's card cannot run FlexAttention; None where it can, or there is no card."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if capability < FLEX_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}"
    return f"heads of {head_dim} channels" if head_dim < FLEX_HEAD_DIM else None


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch._dynamo import config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # A kernel for each of: gradients or none, one sequence or more, one block or more, lengths that
    # vary. What torch gives up on it would compute with all scores, in silence: fullgraph forbids.
    dynamo.recompile_limit = max(dynamo.recompile_limit, KERNELS)
    return torch.compile(flex_attention, fullgraph=True)


def flex_kernel() -> Callable[..., Any]:
    """FlexAttention, compiled: as it is, it would write all scores out."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return kernel if torch.compiler.is_compiling() else _compiled()


# ---------------------------------------------------------------- who sees whom


def dense_mask(docs_BT: Tensor, causal_TT: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, T, T]: the causal one, and minus infinity between documents."""
    T = docs_BT.shape[1]
    same_BTT = docs_BT[:, :, None] == docs_BT[:, None, :]
    return torch.where(same_BTT, causal_TT[:T, :T].to(dtype), float("-inf"))


def lengths_of(docs_BT: Tensor) -> list[list[int]]:
    """Of each run of one number, in each sequence."""
    return [row.unique_consecutive(return_counts=True)[1].tolist() for row in docs_BT.cpu()]


def block_mask(docs_BT: Tensor, window: int) -> BlockMask:
    """The pairs of blocks in which anybody sees anybody, and those in which all see all.

    Told from the least and the largest number in each block: torch's own way looks at every pair of
    positions. Numbers need not rise (where tokens were picked, what fills up does not).
    """
    from torch.nn.attention.flex_attention import BlockMask

    (B, T), device = docs_BT.shape, docs_BT.device
    N = -(-T // BLOCK)
    place = torch.arange(N * BLOCK, device=device).clamp(max=T - 1)
    docs_BN = docs_BT[:, place].view(B, N, BLOCK)
    low, high = docs_BN.amin(2), docs_BN.amax(2)
    meet_BNN = (low[:, :, None] <= high[:, None]) & (high[:, :, None] >= low[:, None])
    one_BNN = (low[:, :, None] == high[:, None]) & (high[:, :, None] == low[:, None])
    block = torch.arange(N, device=device)
    back_NN = block[:, None] - block[None]
    near_NN = (back_NN >= 0) & (back_NN * BLOCK - (BLOCK - 1) < window)
    whole_NN = (back_NN > 0) & (back_NN * BLOCK + (BLOCK - 1) < window)
    filled_N = (block + 1) * BLOCK <= T
    full_BNN = one_BNN & whole_NN & filled_N[:, None]

    reach = torch.full((), window, device=device)  # a tensor: a number would be compiled in

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (docs_BT[b, q] == docs_BT[b, k]) & (q >= k) & (q - k < reach)

    return BlockMask.from_kv_blocks(
        *_listed(meet_BNN & near_NN & ~full_BNN),
        *_listed(full_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(T, T),
    )


def _listed(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row are chosen, [B, 1, N], and their numbers first, [B, 1, N, N]."""
    chosen_B1NN = blocks_BNN[:, None].int()
    order = chosen_B1NN.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1NN.sum(-1, dtype=torch.int32), order.int()

"""What the families share: norms, the head's loss, rotary positions, causal attention.

Shapes: B sequences, T new positions, S positions so far (S = T where nothing is cached), H heads,
G key-value heads, K channels of a head, D channels of the model, V tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuppence.model.documents import Blocks, Mask, Spans
from tuppence.model.replay import Dropout

NORM_EPS = 1e-6
ROPE_BASE = 100_000.0
SOFTCAP = 15.0
HEAD_CHUNK = {False: 2**21, True: 2**27}  # logits at once: a CPU's cache; a part of a GPU's memory


# ---------------------------------------------------------------- elementwise


class _Norm(torch.autograd.Function):
    """y = r x with r = 1 / rms(x); dx = r (dy - y mean(dy y)).

    Torch's own backward takes four times as long on a CPU (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = (size.square() / x.shape[-1] + NORM_EPS).rsqrt().to(x.dtype)
        y: Tensor = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        along = (dy * y).mean(-1, keepdim=True)
        dx: Tensor = torch.addcmul(dy, y, along, value=-1).mul_(r)
        return dx


def norm(x_D: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without parameters (arXiv:1910.07467)."""
    y_D: Tensor = _Norm.apply(x_D)  # type: ignore[no-untyped-call]
    return y_D


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        dx: Tensor = (dy * r).mul_(2)
        return dx


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    y: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return y


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matmuls run in: the precision of the autocast around the model, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def embedding(rows: int, channels: int) -> nn.Embedding:
    """A table that is not filled: to draw it on the meta device torch would import its compiler."""
    return nn.Embedding(rows, channels, _weight=torch.empty(rows, channels))


def softcapped(logits_V: Tensor) -> Tensor:
    """Logits in fp32, smoothly kept within -15 to 15 (Gemma 2, arXiv:2408.00118).

    Without gradients fp32 logits are changed in place, so many at once as a cache holds.
    """
    if torch.is_grad_enabled():
        return SOFTCAP * torch.tanh(logits_V.float() / SOFTCAP)
    capped_V = logits_V.float()
    for part in torch.split(capped_V.view(-1), HEAD_CHUNK[capped_V.is_cuda]):
        part.div_(SOFTCAP).tanh_().mul_(SOFTCAP)
    return capped_V


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of softly capped logits, in chunks of rows.

    With s = sigmoid(2 l / 15) the capped logit is 30 s - 15, whose constant the softmax does not
    see, and which is bounded, so that the exponentials need no maximum; and
    dl = (softmax - onehot) 4 s (1 - s). A chunk's gradients are taken while its logits are there,
    so that all of them never are.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, with_gradient: bool
    ) -> Tensor:
        w_VD = weight_VD.to(x_ND.dtype)
        dx_ND = torch.empty_like(x_ND) if with_gradient else None
        dw_VD = torch.zeros_like(weight_VD) if with_gradient else None
        total = torch.zeros((), device=x_ND.device)
        rows = max(1, HEAD_CHUNK[x_ND.is_cuda] // len(weight_VD))
        for start in range(0, len(x_ND), rows):
            here = slice(start, start + rows)
            counted_N1 = (targets_N[here] >= 0)[:, None]
            target_N1 = targets_N[here].clamp(min=0)[:, None]
            s_NV = (x_ND[here] @ w_VD.T).float().mul_(2 / SOFTCAP).sigmoid_()
            e_NV = (s_NV * (2 * SOFTCAP)).exp_()
            sum_N1 = e_NV.sum(-1, keepdim=True)
            nats_N1 = sum_N1.log() - 2 * SOFTCAP * s_NV.gather(1, target_N1)
            total += (nats_N1 * counted_N1).sum()
            if dx_ND is not None and dw_VD is not None:
                dl_NV = e_NV.div_(sum_N1)
                dl_NV.scatter_add_(1, target_N1, dl_NV.new_full(target_N1.shape, -1.0))
                dl_NV.mul_(s_NV).addcmul_(dl_NV, s_NV, value=-1).mul_(4 * counted_N1)
                dl_NV = dl_NV.to(x_ND.dtype)
                torch.mm(dl_NV, w_VD, out=dx_ND[here])
                dw_VD += dl_NV.T @ x_ND[here]
        ctx.save_for_backward(dx_ND, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_ND, dw_VD = ctx.saved_tensors
        return dx_ND * d_total.to(dx_ND.dtype), dw_VD * d_total, None, None


def head_loss(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in nats of softly capped logits of a head, over the targets that are not -1:
    their "mean" or their "sum". Equal to cross_entropy(softcapped(x W')), without full logits."""
    total: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), torch.is_grad_enabled()
    )
    if reduction == "sum":
        return total
    return total / (targets_BT >= 0).sum()


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
    """Nats, over the targets that are not -1: their "mean" or their "sum"."""
    return F.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction=reduction
    )


# ---------------------------------------------------------------- positions


def rotary_table(positions: int, head_dim: int) -> Tensor:
    """Cosines and signed sines [2, positions, K] of rotary embeddings (arXiv:2104.09864), fp32."""
    channel = torch.arange(0, head_dim, 2, device="cpu") / head_dim
    angle = torch.outer(torch.arange(positions, device="cpu"), ROPE_BASE**-channel)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)])


def rotate(x_TK: Tensor, rotary_2TK: Tensor) -> Tensor:
    """Turn each pair (channel, channel + K/2) by its position's angle."""
    return x_TK * rotary_2TK[0] + x_TK.roll(x_TK.shape[-1] // 2, -1) * rotary_2TK[1]


# ---------------------------------------------------------------- attention


def causal_mask(sequence_len: int, window: int | None = None) -> Tensor:
    """Additive mask [T, T]: zero where a position may look, minus infinity elsewhere.

    It may look at itself and before, with a `window` at that many positions in all.
    """
    ones = torch.ones(sequence_len, sequence_len, dtype=torch.bool, device="cpu")
    hidden = ones.triu(1)
    if window is not None:
        hidden |= ones.tril(-window)
    allowed = torch.zeros(sequence_len, sequence_len, device="cpu")
    return allowed.masked_fill(hidden, float("-inf"))


def attend(how: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Causal attention of the last T of S positions: q [H, B, T, K], k and v [G, B, S, K].

    `how` is "sdpa", torch's fused kernels without a T x S matrix in memory, or "matmul", two
    batched products and a softmax: on a CPU with bf16 units it beats the fused kernel, whose
    backward pass does not use them (docs/LOG.md). A single query is always "sdpa": products would
    be prepared anew for every S. `mask` is [T, S] or has the dimensions of the scores; None means
    plain causal, and what is no tensor attends in a way of its own (model/documents.py).
    """
    if q.shape[0] != k.shape[0]:
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    if isinstance(mask, Blocks | Spans):
        return mask.attend(q, k, v)
    T, S = q.shape[2], k.shape[2]
    if how == "sdpa" or T == 1:
        if mask is None and T == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert mask is not None
    return matmul_attention(q, k, v, mask, Dropout(0.0, None))


def matmul_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor, dropout: Dropout
) -> Tensor:
    """Causal attention by two batched products and a softmax.

    Also the only form in which the probabilities can be dropped out, as GPT-2 does.
    """
    B, H, T, K = q_BHTK.shape
    S = k_BHSK.shape[2]
    q, k, v = (t.reshape(B * H, -1, K) for t in (q_BHTK, k_BHSK, v_BHSK))
    first = mask.to(q.dtype)
    if mask.dim() == 4:  # of each sequence its own
        first = first.expand(B, H, T, S).reshape(B * H, T, S)
    scores = torch.baddbmm(first, q, k.transpose(1, 2), alpha=1 / math.sqrt(K))
    weights = dropout(scores.softmax(-1).view(B, H, T, S)).view(B * H, T, S)
    return torch.bmm(weights, v).view(B, H, T, K)

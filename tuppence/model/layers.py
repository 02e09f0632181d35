"""What the families share: causal attention in two forms, and dropout that can be replayed.

Shapes: B sequences, T positions, H heads, K channels of a head, D channels of the model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(sequence_len: int) -> Tensor:
    """Additive mask [T, T]: zero where a position may look, minus infinity after it."""
    future = torch.ones(sequence_len, sequence_len, dtype=torch.bool).triu(1)
    return torch.zeros(sequence_len, sequence_len).masked_fill(future, float("-inf"))


def sdpa(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Causal attention by torch's fused kernel: no T x T matrix in memory."""
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)


def matmul_attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_TT: Tensor, dropout: "Dropout"
) -> Tensor:
    """Causal attention by two batched products and a softmax.

    On a CPU with bf16 units this beats the fused kernel, whose backward pass does not use them:
    4x to 9x at T = 64 to 128, even at T = 1024 (docs/LOG.md). It is also the only form in which
    the probabilities can be dropped out, as GPT-2 does.
    """
    B, H, T, K = q_BHTK.shape
    q, k, v = (t.reshape(B * H, T, K) for t in (q_BHTK, k_BHTK, v_BHTK))
    scores = torch.baddbmm(mask_TT.to(q.dtype), q, k.transpose(1, 2), alpha=1 / math.sqrt(K))
    weights = dropout(scores.softmax(-1).view(B, H, T, T)).view(B * H, T, T)
    return torch.bmm(weights, v).view(B, H, T, K)


class Dropout:
    """Dropout whose mask is a pure function of a key per sequence, a counter of sites and a place.

    A generator's mask depends on everything drawn before it: a resumed run, another micro-batch or
    another number of processes would drop other channels. Here key_B holds one integer for each
    sequence of the batch, drawn from (seed, step, place in the global batch) by the caller; each
    call is the next site of the network. Without keys, or with rate 0, it does nothing.
    """

    def __init__(self, rate: float, key_B: Tensor | None) -> None:
        self.rate, self.key_B, self.site = rate, key_B, 0

    def __call__(self, x_B: Tensor) -> Tensor:
        if self.key_B is None or self.rate == 0:
            return x_B
        self.site += 1
        key_B1 = hash32(self.key_B + 0x9E3779B1 * self.site)[:, None]
        place_N = torch.arange(x_B[0].numel(), device=x_B.device, dtype=torch.int64)
        kept = hash32(key_B1 ^ place_N[None]) >= int(self.rate * 2**32)
        return x_B * kept.view(x_B.shape).to(x_B.dtype) / (1 - self.rate)


def hash32(x: Tensor) -> Tensor:
    """A bijective mix of the low 32 bits of an int64 tensor (two multiply-xorshift rounds).

    Constants: "lowbias32", Wellons, Prospecting for Hash Functions (2018).
    """
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)

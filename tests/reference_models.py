"""Compact modules of the two families that plan/cost.py counts ahead of tuppence/model.

`Depth` and `Looped` are written from their descriptions alone (docs of the families, and Geiping et
al. 2025, arXiv:2502.05171, for the looped one), so that a test can hold every parameter and FLOP
of `cost.depth` and `cost.looped` to something that was built. They are for counting, not training.

Shapes: B sequences, T positions, D channels, H heads, G key-value heads, K channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BHTK: Tensor) -> Tensor:
    """Rotary positions."""
    T, half = x_BHTK.shape[2], x_BHTK.shape[3] // 2
    frequency = 1e4 ** -(torch.arange(half, device=x_BHTK.device) / half)
    angle = torch.arange(T, device=x_BHTK.device)[:, None] * frequency
    cos, sin = angle.cos().to(x_BHTK.dtype), angle.sin().to(x_BHTK.dtype)
    a, b = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Block(nn.Module):
    """Rotary, QK-norm, ReLU^2, no biases, norms without parameters; a sandwich norms twice."""

    def __init__(self, d: int, n_head: int, n_kv_head: int, *, sandwich: bool) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.sandwich = n_head, n_kv_head, sandwich
        self.head_dim = d // n_head
        self.qkv = nn.Linear(d, (n_head + 2 * n_kv_head) * self.head_dim, bias=False)
        self.attn_proj = nn.Linear(d, d, bias=False)
        self.mlp_up = nn.Linear(d, 4 * d, bias=False)
        self.mlp_down = nn.Linear(4 * d, d, bias=False)

    def attention(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        sizes = [n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = (
            t.view(B, T, -1, self.head_dim).transpose(1, 2)
            for t in self.qkv(x_BTD).split(sizes, dim=-1)
        )
        q, k = norm(rotate(q)), norm(rotate(k))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.n_kv_head != self.n_head
        )
        return self.attn_proj(y.transpose(1, 2).reshape(B, T, D))

    def forward(self, x_BTD: Tensor) -> Tensor:
        after = norm if self.sandwich else nn.Identity()
        x_BTD = x_BTD + after(self.attention(norm(x_BTD)))
        return x_BTD + after(self.mlp_down(F.relu(self.mlp_up(norm(x_BTD))).square()))


class Depth(nn.Module):
    """Embedding, blocks, untied head."""

    def __init__(
        self, *, n_layer: int, n_head: int, n_kv_head: int, n_embd: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.h = nn.ModuleList(
            Block(n_embd, n_head, n_kv_head, sandwich=False) for _ in range(n_layer)
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx_BT: Tensor, *, checkpointing: bool = False) -> Tensor:
        x = norm(self.wte(idx_BT))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return capped_loss(self.lm_head(norm(x)), idx_BT)


class Looped(nn.Module):
    """Prelude, a core repeated r times from a random state, coda; a low-rank adapter each time."""

    def __init__(
        self,
        *,
        n_prelude: int,
        n_recurrent: int,
        n_coda: int,
        max_recurrence: int,
        lora_rank: int,
        n_head: int,
        n_embd: int,
        vocab_size: int,
        mixture_of_depths: bool = False,
    ) -> None:
        super().__init__()
        d = n_embd

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(Block(d, n_head, n_head, sandwich=True) for _ in range(n))

        self.prelude, self.core, self.coda = blocks(n_prelude), blocks(n_recurrent), blocks(n_coda)
        self.wte = nn.Embedding(vocab_size, d)
        self.inject = nn.Linear(2 * d, d, bias=False)
        adapters = max_recurrence if lora_rank else 0
        self.lora_a = nn.ModuleList(nn.Linear(d, lora_rank, bias=False) for _ in range(adapters))
        self.lora_b = nn.ModuleList(nn.Linear(lora_rank, d, bias=False) for _ in range(adapters))
        self.router = nn.Linear(d, 1, bias=False) if mixture_of_depths else None
        self.state_norm = nn.RMSNorm(d)
        self.lm_head = nn.Linear(d, vocab_size, bias=False)

    def iterate(self, state: Tensor, given: Tensor, depth: int) -> Tensor:
        x = self.inject(torch.cat([state, given], dim=-1))
        for block in self.core:
            x = block(x)
        if self.lora_a:
            x = x + 0.1 * self.lora_b[depth](self.lora_a[depth](x))
        if self.router is not None:
            x = x * self.router(state).sigmoid()
        return self.state_norm(x)

    def forward(
        self,
        idx_BT: Tensor,
        *,
        recurrence: int,
        backprop_depth: int | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        def run(step, *args):
            if not checkpointing:
                return step(*args)
            return checkpoint(step, *args, use_reentrant=False)

        x = norm(self.wte(idx_BT))
        for block in self.prelude:
            x = run(block, x)
        given, state = x, torch.randn_like(x) * 0.02
        kept = recurrence if backprop_depth is None else min(recurrence, backprop_depth)
        for depth in range(recurrence):
            if depth < recurrence - kept:
                with torch.no_grad():
                    state = self.iterate(state, given, depth)
            else:
                state = run(self.iterate, state, given, depth)
        x = state
        for block in self.coda:
            x = run(block, x)
        return capped_loss(self.lm_head(norm(x)), idx_BT)


def capped_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of logits softly capped to 15."""
    logits_BTV = 15 * torch.tanh(logits_BTV.float() / 15)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

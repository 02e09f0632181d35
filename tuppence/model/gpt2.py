"""GPT-2 as published (Radford et al. 2019): a decoder in one sitting.

- learned positions, added to the token embedding
- pre-norm blocks: x + attn(norm(x)), x + mlp(norm(x)); LayerNorm with or without bias
- tanh-approximated GELU, hidden width 4 x n_embd
- head tied to the token embedding, or its own
- dropout after the embedding, on the attention's probabilities, and on both residual branches
- normal(0, 0.02) weights, residual projections divided by sqrt(2 n_layer)

Names are those of the published checkpoint. Shapes: B sequences, T positions, D = n_embd,
H heads, K = D / H, V tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuppence.config import ModelPlan
from tuppence.model.branches import Branches
from tuppence.model.cache import Cache
from tuppence.model.documents import Mask, documents
from tuppence.model.layers import (
    attend,
    causal_mask,
    compute_dtype,
    cross_entropy,
    embedding,
    matmul_attention,
)
from tuppence.model.replay import Draws, Dropout

BLOCK_SITES = 3  # of dropout: attention weights, its output, the MLP's


class Attention(nn.Module):
    """Causal self-attention with packed query, key and value."""

    def __init__(self, plan: ModelPlan, how: str) -> None:
        super().__init__()
        self.n_head, self.how = plan.n_head, how
        self.c_attn = nn.Linear(plan.n_embd, 3 * plan.n_embd, bias=plan.bias)
        self.c_proj = nn.Linear(plan.n_embd, plan.n_embd, bias=plan.bias)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        dropout: Dropout,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        B, T, D = x_BTD.shape
        packed = self.c_attn(x_BTD).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = packed.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if dropout.rate > 0:
            assert isinstance(mask, Tensor)
            y_BHTK = matmul_attention(q, k, v, mask, dropout)
        else:
            y_BHTK = attend(self.how, q, k, v, mask)
        y_BTD: Tensor = self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return dropout(y_BTD)


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        self.c_fc = nn.Linear(plan.n_embd, 4 * plan.n_embd, bias=plan.bias)
        self.c_proj = nn.Linear(4 * plan.n_embd, plan.n_embd, bias=plan.bias)

    def forward(self, x_BTD: Tensor, dropout: Dropout) -> Tensor:
        return dropout(self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh")))


class Block(nn.Module):
    """One layer."""

    def __init__(self, plan: ModelPlan, how: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(plan.n_embd, bias=plan.bias)
        self.attn = Attention(plan, how)
        self.ln_2 = nn.LayerNorm(plan.n_embd, bias=plan.bias)
        self.mlp = MLP(plan)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        dropout: Dropout,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        dropout = dropout.at(1 + BLOCK_SITES * layer)
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), mask, dropout, cache, layer)
        x_BTD = x_BTD + self.mlp(self.ln_2(x_BTD), dropout)
        return x_BTD


class GPT2(nn.Module):
    """The whole model. `attention` is "sdpa" or "matmul" (model/layers.py says when)."""

    mask: Tensor

    def __init__(
        self, plan: ModelPlan, *, attention: str = "sdpa", document_end: int | None = None
    ) -> None:
        super().__init__()
        self.plan, self.how = plan, attention
        head_dim = plan.n_embd // plan.n_head
        self.documents = documents(document_end, head_dim=head_dim, heads=1, how=attention)
        self.wte = embedding(plan.vocab_size, plan.n_embd)
        self.wpe = embedding(plan.sequence_len, plan.n_embd)
        self.h = nn.ModuleList(Block(plan, attention) for _ in range(plan.n_layer))
        self.ln_f = nn.LayerNorm(plan.n_embd, bias=plan.bias)
        self.lm_head = nn.Linear(plan.n_embd, plan.vocab_size, bias=False)
        if plan.tied_head:
            self.lm_head.weight = self.wte.weight
        self.register_buffer("mask", causal_mask(plan.sequence_len), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, as a function of the seed alone (drawn on the CPU, in order)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 / math.sqrt(2 * self.plan.n_layer) if "c_proj" in name else 0.02
            p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once."""
        groups: dict[str, list[nn.Parameter]] = {
            "matrix": [p for p in self.h.parameters() if p.dim() >= 2],
            "embedding": [*self.wte.parameters(), *self.wpe.parameters()],
            "norm": [p for p in self.parameters() if p.dim() < 2],
        }
        return groups if self.plan.tied_head else groups | {"head": [*self.lm_head.parameters()]}

    def blocks(self) -> list[nn.Module]:
        """What is gathered, recomputed or compiled one by one."""
        return [*self.h]

    def packed_rows(self) -> dict[nn.Parameter, tuple[int, ...]]:
        """The matrices that are several below one another, and the rows of each."""
        return {block.attn.c_attn.weight: (self.plan.n_embd,) * 3 for block in self.h}  # type: ignore[union-attr, misc]

    def forward(
        self,
        idx_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        draws: Draws | None = None,
        cache: Cache | None = None,
        branches: Branches | None = None,
        read_N: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits [B, T, V], or with targets the cross-entropy in nats (targets of -1 ignored).

        `draws` (training) has the keys of dropout; with a `cache` the positions follow those it has
        seen. `reduction` is "mean" or "sum" over the targets.

        Rows may hold `branches`; `read_N` are the flat places of B x T at which logits are wanted:
        [N, V] then.
        """
        start = cache.length if cache else 0
        stop = start + idx_BT.shape[1]
        key_B = draws.key_B if draws else None
        dropout = Dropout(self.plan.dropout if key_B is not None else 0.0, key_B)
        if branches is None:
            assert self.plan.sequence_len >= stop, f"{stop} positions, the model has fewer"
            place_TD = self.wpe.weight[start:stop]
        else:
            place_TD = self.wpe(branches.position_BT)
        x_BTD = dropout(self.wte(idx_BT) + place_TD)
        mask: Mask = None
        if branches is not None:
            docs_BT = self.documents.of(idx_BT, branches) if self.documents else None
            mask = branches.mask(compute_dtype(x_BTD), docs_BT=docs_BT).unsqueeze(1)
        elif self.documents is not None and cache is None:
            docs_BT, kind = self.documents.of(idx_BT), compute_dtype(x_BTD)
            mask = self.documents.mask(docs_BT, self.mask, kind, dense=dropout.rate > 0)
        else:
            mask = self._mask(start, stop, dropping=dropout.rate > 0)
        for i, block in enumerate(self.h):
            x_BTD = block(x_BTD, mask, dropout, cache, i)
        if cache:
            cache.length = stop
        if read_N is not None:
            x_BTD = x_BTD.flatten(0, 1)[read_N]
        logits_BTV: Tensor = self.lm_head(self.ln_f(x_BTD)).float()
        if targets_BT is None:
            return logits_BTV
        return cross_entropy(logits_BTV, targets_BT, reduction)

    def _mask(self, start: int, stop: int, *, dropping: bool) -> Tensor | None:
        """Rows of the new positions; None where the fused kernel needs none."""
        fused = stop - start == 1 or (self.how == "sdpa" and start == 0)
        return None if fused and not dropping else self.mask[start:stop, :stop]

"""The modern decoder with one dial: width 64 x depth, heads of 128.

- rotary positions, queries and keys normed (after rotation)
- RMSNorm without parameters: of the embedding, before each branch, before the head
- ReLU^2, hidden width 4 x n_embd; no biases; untied head; logits softly capped at 15
- grouped-query attention (n_kv_head), windows by layer (plan.windows)
- optional: value embeddings in every second layer, the last included: a looked-up value for each
  token and head, gated by the first channels of the layer's input (arXiv:2410.17897)
- optional: each layer scales the stream and mixes the embedding back in, by learned scalars

Without the optional parts and windows it is transformers' NanoChat architecture. What each part
gave is in docs/LOG.md. Names: c_attn packs query, key and value. Shapes as in model/layers.py.
"""

import torch
from torch import Tensor, nn

from tuppence.config import ModelPlan
from tuppence.model.branches import Branches
from tuppence.model.cache import Cache
from tuppence.model.documents import Mask, documents
from tuppence.model.layers import (
    attend,
    causal_mask,
    compute_dtype,
    embedding,
    head_loss,
    norm,
    relu_squared,
    rotary_table,
    rotate,
    softcapped,
)
from tuppence.model.replay import Draws

GATE_CHANNELS = 12  # of a layer's input, that say how much of its value embedding enters
GATE_RANGE = 3.0


class Attention(nn.Module):
    """Causal self-attention, rotary and QK-normed; in [H, B, T, K] so that each head is a slice."""

    def __init__(self, plan: ModelPlan, how: str, *, value_embedding: bool) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.how = plan.n_head, plan.n_kv_head, how
        self.head_dim = plan.n_embd // plan.n_head
        heads = plan.n_head + 2 * plan.n_kv_head
        self.c_attn = nn.Linear(plan.n_embd, heads * self.head_dim, bias=False)
        self.c_proj = nn.Linear(plan.n_embd, plan.n_embd, bias=False)
        self.value_gate = (
            nn.Linear(GATE_CHANNELS, plan.n_kv_head, bias=False) if value_embedding else None
        )

    def forward(
        self,
        x_BTD: Tensor,
        rotary_2TK: Tensor,
        mask: Mask,
        value_BTE: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        B, T, D = x_BTD.shape
        packed = self.c_attn(x_BTD).view(B, T, -1, self.head_dim)
        packed = packed.permute(2, 0, 1, 3).contiguous()
        qk = norm(rotate(packed[: self.n_head + self.n_kv_head], rotary_2TK))
        v = packed[self.n_head + self.n_kv_head :]
        if value_BTE is not None:
            assert self.value_gate is not None
            gate_BTG = GATE_RANGE * self.value_gate(x_BTD[..., :GATE_CHANNELS]).sigmoid()
            value = value_BTE.view(B, T, self.n_kv_head, self.head_dim) * gate_BTG[..., None]
            v = v + value.permute(2, 0, 1, 3)
        q, k = qk[: self.n_head], qk[self.n_head :]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attend(self.how, q, k, v, mask)
        y_BTD: Tensor = self.c_proj(y.permute(1, 2, 0, 3).reshape(B, T, D))
        return y_BTD


class MLP(nn.Module):
    """Two layers with ReLU^2 between."""

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        self.c_fc = nn.Linear(plan.n_embd, 4 * plan.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * plan.n_embd, plan.n_embd, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.c_proj(relu_squared(self.c_fc(x_BTD)))
        return y_BTD


class Block(nn.Module):
    """One layer."""

    def __init__(self, plan: ModelPlan, how: str, *, value_embedding: bool = False) -> None:
        super().__init__()
        self.attn = Attention(plan, how, value_embedding=value_embedding)
        self.mlp = MLP(plan)

    def forward(
        self,
        x_BTD: Tensor,
        rotary_2TK: Tensor,
        mask: Mask,
        value_BTE: Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(norm(x_BTD), rotary_2TK, mask, value_BTE, cache, layer)
        y_BTD: Tensor = x_BTD + self.mlp(norm(x_BTD))
        return y_BTD


class Depth(nn.Module):
    """The whole model. `attention` is "sdpa" or "matmul" (model/layers.py says when)."""

    rotary: Tensor

    def __init__(
        self, plan: ModelPlan, *, attention: str = "sdpa", document_end: int | None = None
    ) -> None:
        super().__init__()
        self.plan, self.how = plan, attention
        head_dim = plan.n_embd // plan.n_head
        self.documents = documents(document_end, head_dim=head_dim, heads=0, how=attention)
        self.wte = embedding(plan.vocab_size, plan.n_embd)
        with_value = [i for i in range(plan.n_layer) if self._has_value(i)]
        self.h = nn.ModuleList(
            Block(plan, attention, value_embedding=i in with_value) for i in range(plan.n_layer)
        )
        wide = plan.n_kv_head * head_dim
        self.value_embeddings = nn.ModuleDict(
            {str(i): embedding(plan.vocab_size, wide) for i in with_value}
        )
        self.lm_head = nn.Linear(plan.n_embd, plan.vocab_size, bias=False)
        if plan.residual_scalars:
            self.stream_scale = nn.Parameter(torch.empty(plan.n_layer))
            self.embedding_scale = nn.Parameter(torch.empty(plan.n_layer))
        table = rotary_table(plan.sequence_len, head_dim)
        self.register_buffer("rotary", table, persistent=False)
        for window in set(plan.windows):
            mask = causal_mask(plan.sequence_len, window)
            self.register_buffer(f"mask_{window}", mask, persistent=False)

    def _has_value(self, layer: int) -> bool:
        return self.plan.value_embeddings and (self.plan.n_layer - 1 - layer) % 2 == 0

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, as a function of the seed alone (drawn on the CPU, in order).

        What writes into the stream starts at zero and the head near it, so that the first loss is
        ln V; the rest keeps the variance of what it reads. Values follow nanochat's measured ones.
        """
        generator = torch.Generator().manual_seed(seed)
        width = (3 / self.plan.n_embd) ** 0.5  # uniform within it: standard deviation D^-1/2
        for name, p in self.named_parameters():
            drawn = torch.empty(p.shape)
            if name == "wte.weight":
                drawn.normal_(0, 0.8, generator=generator)
            elif name == "lm_head.weight":
                drawn.normal_(0, 0.001, generator=generator)
            elif name.endswith("c_proj.weight"):
                drawn.zero_()
            elif name.endswith("c_fc.weight"):
                drawn.uniform_(-0.4 * width, 0.4 * width, generator=generator)
            elif name.endswith("value_gate.weight"):
                drawn.uniform_(0, 0.02, generator=generator)
            elif name == "stream_scale":
                drawn = torch.linspace(1.15, 1.05, self.plan.n_layer)
            elif name == "embedding_scale":
                drawn = torch.linspace(0.2, 0.05, self.plan.n_layer)
            else:
                drawn.uniform_(-width, width, generator=generator)
            p.copy_(drawn)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once."""
        groups: dict[str, list[nn.Parameter]] = {
            "matrix": [p for n, p in self.h.named_parameters() if "gate" not in n],
            "embedding": [*self.wte.parameters(), *self.value_embeddings.parameters()],
            "head": [*self.lm_head.parameters()],
        }
        small = [p for n, p in self.h.named_parameters() if "gate" in n]
        if self.plan.residual_scalars:
            small += [self.stream_scale, self.embedding_scale]
        return groups | ({"scalar": small} if small else {})

    def blocks(self) -> list[nn.Module]:
        """What is gathered, recomputed or compiled one by one."""
        return [*self.h]

    def packed_rows(self) -> dict[nn.Parameter, tuple[int, ...]]:
        """The matrices that are several below one another, and the rows of each."""
        heads = (self.plan.n_head, self.plan.n_kv_head, self.plan.n_kv_head)
        rows = tuple(n * self.plan.n_embd // self.plan.n_head for n in heads)
        return {block.attn.c_attn.weight: rows for block in self.h}  # type: ignore[union-attr, misc]

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

        With a `cache` the positions follow those it has seen. `reduction` is "mean" or "sum" over
        the targets. Nothing is drawn at random: `draws` is for the other families.

        Rows may hold `branches`; `read_N` are the flat places of B x T at which logits are wanted:
        [N, V] then.
        """
        start = cache.length if cache else 0
        stop = start + idx_BT.shape[1]
        x_BTD = norm(self.wte(idx_BT))
        x_BTD = x_BTD.to(compute_dtype(x_BTD))
        kind, windows = x_BTD.dtype, set(self.plan.windows)
        masks: dict[int, Mask]
        if branches is not None:
            rotary_2TK = self.rotary[:, branches.position_BT].to(kind)
            docs_BT = self.documents.of(idx_BT, branches) if self.documents else None
            masks = {w: branches.mask(kind, window=w, docs_BT=docs_BT)[None] for w in windows}
        else:
            assert self.plan.sequence_len >= stop, f"{stop} positions, the model has fewer"
            rotary_2TK = self.rotary[:, start:stop].to(kind)
            masks = {w: self._mask(w, start, stop) for w in windows}
        if self.documents is not None and cache is None and branches is None:
            docs_BT = self.documents.of(idx_BT)
            for w in masks:
                causal_TT = getattr(self, f"mask_{w}")
                masks[w] = self.documents.mask(docs_BT, causal_TT, kind, window=w)
        first_BTD = x_BTD
        for i, (block, window) in enumerate(zip(self.h, self.plan.windows, strict=True)):
            if self.plan.residual_scalars:
                x_BTD = self.stream_scale[i] * x_BTD + self.embedding_scale[i] * first_BTD
                x_BTD = x_BTD.to(first_BTD.dtype)
            value = None
            if self._has_value(i):
                value = self.value_embeddings[str(i)](idx_BT).to(x_BTD.dtype)
            x_BTD = block(x_BTD, rotary_2TK, masks[window], value, cache, i)
        if cache:
            cache.length = stop
        x_BTD = norm(x_BTD if read_N is None else x_BTD.flatten(0, 1)[read_N])
        if targets_BT is None:
            return softcapped(self.lm_head(x_BTD))
        return head_loss(x_BTD, self.lm_head.weight, targets_BT, reduction)

    def _mask(self, window: int, start: int, stop: int) -> Tensor | None:
        """Rows of the new positions; None where the fused kernel needs none."""
        one = stop - start == 1
        if window >= stop and (one or (self.how == "sdpa" and start == 0)):
            return None
        mask: Tensor = getattr(self, f"mask_{window}")
        return mask[start:stop, :stop]

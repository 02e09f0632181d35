"""A looped decoder: depth by repeating a core (Geiping et al. 2025, arXiv:2502.05171).

    embedding ─▶ prelude ─┬▶ inject ─▶ core ─▶ + adapter ─▶ norm ─┬─▶ coda ─▶ head
                  noise ──┴▶ state ◀────────── r times ───────────┘

- sandwich-normed blocks, x + norm(attn(norm(x))) and x + norm(mlp(norm(x))); otherwise those of
  model/depth.py: rotary, QK-norm, ReLU^2, no biases, untied head with logits softly capped
- the state starts as noise (std 0.02), a function of (key of the sequence, position, channel)
- each iteration has a low-rank adapter of its own (the last one's for those beyond max_recurrence)
- in training r is drawn for the step by the caller, and gradients flow through the last
  `backprop_depth` iterations only; elsewhere `recurrence` is the number, or the loop stops when
  successive outputs agree (`exit_kl`)
- mixture of depths (Raposo et al. 2024, arXiv:2404.02258): a router picks each iteration's tokens,
  all of them at first and 30% from iteration `mean_recurrence` on; the rest cost nothing

Shapes as in model/layers.py; R iterations, P tokens that an iteration takes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuppence.config import LoopPlan, ModelPlan
from tuppence.model.branches import Branches
from tuppence.model.cache import Cache
from tuppence.model.depth import MLP, Attention
from tuppence.model.documents import Mask, documents
from tuppence.model.layers import (
    causal_mask,
    compute_dtype,
    embedding,
    head_loss,
    norm,
    rotary_table,
    softcapped,
)
from tuppence.model.replay import Draws, keyed_normal

STATE_STD = 0.02
ADAPTER_SCALE = 0.1
LEAST_CAPACITY = 0.3
ROUTER_LOSS = 0.3  # weight of teaching the router its threshold; at 0.01 it learns none
SIGMA = 0.5  # of the log-normal r


class Block(nn.Module):
    """One sandwich-normed layer."""

    def __init__(self, plan: ModelPlan, how: str) -> None:
        super().__init__()
        self.attn = Attention(plan, how, value_embedding=False)
        self.mlp = MLP(plan)

    def forward(
        self,
        x_BTD: Tensor,
        rotary_2TK: Tensor,
        mask: Mask,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        x_BTD = x_BTD + norm(self.attn(norm(x_BTD), rotary_2TK, mask, None, cache, layer))
        return x_BTD + norm(self.mlp(norm(x_BTD)))


class _Place(NamedTuple):
    """Where the tokens of a pass stand, and whether it is for training."""

    rotary_2TK: Tensor
    docs_BT: Tensor | None
    branches: Branches | None
    mask: Mask
    cache: Cache | None
    training: bool


class Looped(nn.Module):
    """The whole model. `attention` is "sdpa" or "matmul" (model/layers.py says when).

    `recurrence`, `exit_kl` (nats) and `exit_whole` say how long to loop outside training: so many
    iterations, or fewer once successive outputs differ by less than that. Each token keeps its
    state from then on, and the loop ends with the last of them; with `exit_whole` it ends for all
    when the mean does. In the cache the iterations that were not run repeat the last one that was.
    """

    rotary: Tensor
    mask: Tensor

    def __init__(
        self, plan: ModelPlan, *, attention: str = "sdpa", document_end: int | None = None
    ) -> None:
        super().__init__()
        assert plan.loop is not None
        self.plan, self.loop, self.how = plan, plan.loop, attention
        self.recurrence = max(1, round(plan.loop.mean_recurrence))
        self.exit_kl: float | None = None
        self.exit_whole = False
        head_dim = plan.n_embd // plan.n_head
        self.documents = documents(document_end, head_dim=head_dim, heads=0, how=attention)
        D, R, rank = plan.n_embd, plan.loop.max_recurrence, plan.loop.lora_rank

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(Block(plan, attention) for _ in range(number))

        self.wte = embedding(plan.vocab_size, D)
        self.prelude = blocks(plan.loop.n_prelude)
        self.inject = nn.Linear(2 * D, D, bias=False)
        self.core = blocks(plan.loop.n_recurrent)
        if rank:
            self.adapter_down = nn.Parameter(torch.empty(R, D, rank))
            self.adapter_up = nn.Parameter(torch.empty(R, rank, D))
        self.state_gain = nn.Parameter(torch.empty(D))
        if plan.loop.mixture_of_depths:
            self.router = nn.Linear(D, 1, bias=False)
            self.router_bias = nn.Parameter(torch.empty(R))
        self.coda = blocks(plan.loop.n_coda)
        self.lm_head = nn.Linear(D, plan.vocab_size, bias=False)
        rotary = rotary_table(plan.sequence_len, head_dim)
        self.register_buffer("rotary", rotary, persistent=False)
        self.register_buffer("mask", causal_mask(plan.sequence_len), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, as a function of the seed alone (drawn on the CPU, in order).

        Matrices keep the variance of what they read; adapters and router start as nothing. What
        writes into the stream is normed after, so it must not start at zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            drawn = torch.zeros(p.shape)
            if name == "wte.weight":
                drawn.normal_(0, 1.0, generator=generator)
            elif name == "lm_head.weight":
                drawn.normal_(0, 0.001, generator=generator)
            elif name == "state_gain":
                drawn.fill_(1.0)
            elif name not in ("adapter_up", "router.weight", "router_bias"):
                reads = p.shape[-2] if name == "adapter_down" else p.shape[-1]
                width = (3 / reads) ** 0.5
                drawn.uniform_(-width, width, generator=generator)
            p.copy_(drawn)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once."""
        parts = (self.prelude, self.inject, self.core, self.coda)
        scalar: list[nn.Parameter] = [self.state_gain]
        if self.loop.lora_rank:
            scalar += [self.adapter_down, self.adapter_up]
        if self.loop.mixture_of_depths:
            scalar += [*self.router.parameters(), self.router_bias]
        return {
            "matrix": [p for part in parts for p in part.parameters()],
            "embedding": [*self.wte.parameters()],
            "head": [*self.lm_head.parameters()],
            "scalar": scalar,
        }

    def blocks(self) -> list[nn.Module]:
        """What is gathered, recomputed or compiled one by one."""
        return [*self.prelude, *self.core, *self.coda]

    def packed_rows(self) -> dict[nn.Parameter, tuple[int, ...]]:
        """The matrices that are several below one another, and the rows of each."""
        return {block.attn.c_attn.weight: (self.plan.n_embd,) * 3 for block in self.blocks()}  # type: ignore[union-attr, misc]

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

        `draws` (training) says how many iterations and which noise; with a `cache` the positions
        follow those it has seen. `reduction` is "mean" or "sum" over the targets.

        Rows may hold `branches`; `read_N` are the flat places of B x T at which logits are wanted:
        [N, V] then.
        """
        start = cache.length if cache else 0
        stop = start + idx_BT.shape[1]
        x_BTD = norm(self.wte(idx_BT))
        x_BTD = x_BTD.to(compute_dtype(x_BTD))
        docs_BT = None
        if self.documents is not None and cache is None:
            docs_BT = self.documents.of(idx_BT, branches)
        if branches is None:
            assert self.plan.sequence_len >= stop, f"{stop} positions, the model has fewer"
            rotary_2TK = self.rotary[:, start:stop].to(x_BTD.dtype)
        else:
            rotary_2TK = self.rotary[:, branches.position_BT].to(x_BTD.dtype)
        mask = self._mask(stop - start, stop, docs_BT, branches, x_BTD.dtype)
        place = _Place(rotary_2TK, docs_BT, branches, mask, cache, draws is not None)
        for i, block in enumerate(self.prelude):
            x_BTD = block(x_BTD, place.rotary_2TK, place.mask, cache, i)
        key_B = torch.zeros_like(idx_BT[:, 0]) if draws is None else draws.key_B
        assert key_B is not None
        noise = keyed_normal(key_B, start, stop - start, self.plan.n_embd)
        if branches is not None:  # each position's own, in whichever place it stands
            noise = noise.take_along_dim(branches.position_BT[..., None], 1)
        state = (STATE_STD * noise).to(x_BTD.dtype)
        if draws is not None:
            assert draws.recurrence is not None
            state, router_loss = self._train_loop(state, x_BTD, place, draws.recurrence)
            state = self._read(state, place)
        elif self.exit_kl is None:
            for i in range(self.recurrence):
                state, _ = self._iterate(state, x_BTD, place, i)
            state = self._read(state, place)
        else:
            state = self._loop_until_agreed(state, x_BTD, place)
        if cache:
            cache.length = stop
        if read_N is not None:
            state = state.flatten(0, 1)[read_N]
        if targets_BT is None:
            return softcapped(self.lm_head(state))
        loss = head_loss(state, self.lm_head.weight, targets_BT, reduction)
        if draws is not None and self.loop.mixture_of_depths:
            loss = loss + (router_loss - router_loss.detach())  # its gradient, not its value
        return loss

    # ------------------------------------------------------------ the loop

    def _train_loop(
        self, state_BTD: Tensor, given_BTD: Tensor, place: _Place, recurrence: int
    ) -> tuple[Tensor, Tensor]:
        """The state after `recurrence` iterations, and the router's own loss (mean over them)."""
        kept = min(recurrence, self.loop.backprop_depth or recurrence)
        with torch.no_grad():
            for i in range(recurrence - kept):
                state_BTD, _ = self._iterate(state_BTD, given_BTD, place, i)
        losses = []
        for i in range(recurrence - kept, recurrence):
            state_BTD, loss = self._iterate(state_BTD, given_BTD, place, i)
            losses.append(loss)
        return state_BTD, torch.stack(losses).mean()

    def _loop_until_agreed(self, state_BTD: Tensor, given_BTD: Tensor, place: _Place) -> Tensor:
        """What the head reads once successive outputs agree, or after `recurrence` iterations."""
        assert self.exit_kl is not None
        assert not self.loop.mixture_of_depths, "early exit is for models without routers"
        T = state_BTD.shape[1]
        done_BT = torch.zeros(state_BTD.shape[:2], dtype=torch.bool, device=state_BTD.device)
        before, ran = None, 0
        while True:
            new_BTD, _ = self._iterate(state_BTD, given_BTD, place, ran)
            state_BTD = torch.where(done_BT[..., None], state_BTD, new_BTD)
            ran += 1
            read_BTD = self._read(state_BTD, place)
            now = softcapped(self.lm_head(read_BTD)).log_softmax(-1)
            if before is not None:
                kl_BT = (now.exp() * (now - before)).sum(-1)
                done_BT = done_BT | ((kl_BT.mean() if self.exit_whole else kl_BT) < self.exit_kl)
            before = now
            if ran == self.recurrence or bool(done_BT.all()):
                break
            self._forget_coda(place.cache, T)
        if place.cache:
            for i in range(ran, self.recurrence):
                for j in range(self.loop.n_recurrent):
                    place.cache.repeat(self._layer(i, j), self._layer(ran - 1, j), T)
        return read_BTD

    def _iterate(
        self, state_BTD: Tensor, given_BTD: Tensor, place: _Place, i: int
    ) -> tuple[Tensor, Tensor]:
        """Iteration i of the core: the new state, and the router's own loss."""
        capacity = capacity_of(self.loop, i)
        if capacity == 1:
            return self._core(state_BTD, given_BTD, place, i), state_BTD.new_zeros(())
        bias = self.router_bias[min(i, self.loop.max_recurrence - 1)]
        score_BT = (self.router(state_BTD).squeeze(-1) + bias).float()
        if place.training:
            index_BP, valid_BP = most_wanted(score_BT, capacity)
            taken_BT = torch.zeros_like(score_BT).scatter(1, index_BP, 1.0)
            alone_BT = (self.router(state_BTD.detach()).squeeze(-1) + bias).float()
            loss = ROUTER_LOSS * F.binary_cross_entropy_with_logits(alone_BT, taken_BT)
        else:
            index_BP, valid_BP = above_zero(score_BT)
            loss = state_BTD.new_zeros(())
        if index_BP.shape[1] == 0:
            return state_BTD, loss
        index_BPD = index_BP[..., None].expand(-1, -1, state_BTD.shape[2])
        old_BPD = state_BTD.gather(1, index_BPD)
        new_BPD = self._core(
            old_BPD, given_BTD.gather(1, index_BPD), self._placed(place, index_BP, i), i
        )
        gate_BP1 = score_BT.gather(1, index_BP).sigmoid()[..., None].to(old_BPD.dtype)
        gate_BP1 = torch.where(valid_BP[..., None], gate_BP1, 0)
        return state_BTD.scatter(1, index_BPD, old_BPD + gate_BP1 * (new_BPD - old_BPD)), loss

    def _core(self, state_BPD: Tensor, given_BPD: Tensor, place: _Place, i: int) -> Tensor:
        """The core's blocks over the tokens that are given."""
        x_BPD = self.inject(torch.cat([state_BPD, given_BPD], -1))
        for j, block in enumerate(self.core):
            layer = self._layer(i, j)
            x_BPD = block(x_BPD, place.rotary_2TK, place.mask, place.cache, layer)
        if self.loop.lora_rank:
            own = min(i, self.loop.max_recurrence - 1)
            adapted = x_BPD @ self.adapter_down[own] @ self.adapter_up[own]
            x_BPD = x_BPD + ADAPTER_SCALE * adapted
        return (norm(x_BPD) * self.state_gain).to(state_BPD.dtype)

    def _read(self, state_BTD: Tensor, place: _Place) -> Tensor:
        """Coda and last norm: what the head reads."""
        for i, block in enumerate(self.coda):
            layer = self.loop.n_prelude + i
            state_BTD = block(state_BTD, place.rotary_2TK, place.mask, place.cache, layer)
        return norm(state_BTD)

    # ------------------------------------------------------------ places and layers

    def _layer(self, iteration: int, block: int) -> int:
        """The number, among all executed layers, of a core block; prelude and coda come first."""
        ends = self.loop.n_prelude + self.loop.n_coda
        return ends + iteration * self.loop.n_recurrent + block

    def _forget_coda(self, cache: Cache | None, positions: int) -> None:
        for i in range(self.loop.n_coda):
            if cache:
                cache.rewind(self.loop.n_prelude + i, positions)

    def _placed(self, place: _Place, index_BP: Tensor, i: int) -> _Place:
        """The places of an iteration's picked tokens: they look at one another only."""
        P, cache = index_BP.shape[1], place.cache
        assert cache is None or len(index_BP) == 1, "one sequence a cache with mixture of depths"
        seen = cache.seen(self._layer(i, 0)) if cache else 0
        rotary, branches = place.rotary_2TK, None
        if place.branches is None:
            rotary = rotary[:, index_BP]
        else:
            branches = place.branches.picked(index_BP)
            rotary = self.rotary[:, branches.position_BT].to(rotary.dtype)
        docs_BP = None if place.docs_BT is None else place.docs_BT.gather(1, index_BP)
        mask = self._mask(P, seen + P, docs_BP, branches, rotary.dtype)
        return _Place(rotary, docs_BP, branches, mask, cache, place.training)

    def _mask(
        self,
        T: int,
        S: int,
        docs_BT: Tensor | None,
        branches: Branches | None,
        kind: torch.dtype,
    ) -> Mask:
        """Rows of the last T of S positions; None where the fused kernel needs none."""
        if branches is not None:
            return branches.mask(kind, docs_BT=docs_BT)[None]
        if self.documents is not None and docs_BT is not None:
            return self.documents.mask(docs_BT, self.mask, kind)
        if T == 1 or (self.how == "sdpa" and T == S):
            return None
        return self.mask[S - T : S, :S]


def capacity_of(loop: LoopPlan, iteration: int) -> float:
    """The part of the tokens that an iteration (from 0) takes."""
    if not loop.mixture_of_depths:
        return 1.0
    done = iteration / max(1.0, loop.mean_recurrence - 1)
    return max(LEAST_CAPACITY, 1 - (1 - LEAST_CAPACITY) * done)


def most_wanted(score_BT: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    """In training: each sequence's best scored tokens [B, P], in order, exactly the capacity.

    Whether a token is among them depends on later ones, so a running model cannot do this.
    """
    count = math.ceil(capacity * score_BT.shape[1])
    index_BP = score_BT.topk(count, dim=1).indices.sort(dim=1).values
    return index_BP, torch.ones_like(index_BP, dtype=torch.bool)


def above_zero(score_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Elsewhere: the tokens whose own score is above zero, which the router's loss has taught to be
    about as many. Sequences with fewer are filled up behind, where nothing looks at them."""
    taken_BT = score_BT > 0
    count = int(taken_BT.sum(1).max())
    index_BP = taken_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return index_BP, taken_BT.gather(1, index_BP)


def draw_recurrence(loop: LoopPlan, *, seed: int, step: int) -> int:
    """Iterations of one training step: log-normal around `mean_recurrence` as its median, a
    function of (seed, step) alone, so that ranks and resumed runs agree."""
    stream = np.random.Generator(np.random.Philox(key=seed, counter=[1, 0, 0, step]))
    drawn = loop.mean_recurrence * math.exp(SIGMA * stream.standard_normal())
    return min(loop.max_recurrence, max(1, round(drawn)))

"""The modern families written out from their descriptions, a position at a time, in any precision.

Slow, and without any of the package's model code: what the models are held to. `w` are a model's
weights by name; T or P positions, D channels, G key-value heads, K channels of a head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tuppence.config import LoopPlan, ModelPlan

Weights = dict[str, Tensor]


def rms(x: Tensor) -> Tensor:
    """Divided by the root of the mean square."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x_K: Tensor, place: int) -> Tensor:
    """Channels j and j + K/2 as one complex number, turned by place x 100,000^(-2j/K)."""
    half = len(x_K) // 2
    angle = place * 100_000.0 ** -(torch.arange(half) * 2 / len(x_K)).to(x_K.dtype)
    z = torch.complex(x_K[:half], x_K[half:]) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([z.real, z.imag])


def one_head(q_PK: list[Tensor], k_PK: list[Tensor], v_PK: list[Tensor], window: int) -> Tensor:
    """Attention of each token over itself and the window - 1 before it."""
    out = []
    for t, q in enumerate(q_PK):
        seen = range(max(0, t - window + 1), t + 1)
        score = torch.stack([q @ k_PK[s] for s in seen]) / math.sqrt(len(q))
        weight = score.exp() / score.exp().sum()
        out.append(sum(w * v_PK[s] for w, s in zip(weight, seen, strict=True)))
    return torch.stack(out)


def attention(
    w: Weights,
    name: str,
    plan: ModelPlan,
    x_PD: Tensor,
    *,
    places: Sequence[int],
    window: int,
    value_PGK: Tensor | None = None,
) -> Tensor:
    """Rotary, QK-normed, heads in groups that share a key and a value."""
    H, G, K = plan.n_head, plan.n_kv_head, plan.n_embd // plan.n_head
    heads = (x_PD @ w[f"{name}.c_attn.weight"].T).unflatten(-1, (H + 2 * G, K))
    out = []
    for head in range(H):
        shared = head // (H // G)  # neighbours share
        q_PK = [rms(turned(x, t)) for x, t in zip(heads[:, head], places, strict=True)]
        k_PK = [rms(turned(x, t)) for x, t in zip(heads[:, H + shared], places, strict=True)]
        v_PK = heads[:, H + G + shared]
        if value_PGK is not None:
            gate_P = 3 / (1 + (-(x_PD[:, :12] @ w[f"{name}.value_gate.weight"][shared])).exp())
            v_PK = v_PK + gate_P[:, None] * value_PGK[:, shared]
        out.append(one_head(q_PK, k_PK, list(v_PK), window))
    return torch.cat(out, -1) @ w[f"{name}.c_proj.weight"].T


def mlp(w: Weights, name: str, x_PD: Tensor) -> Tensor:
    hidden = (x_PD @ w[f"{name}.c_fc.weight"].T).clamp(min=0) ** 2
    return hidden @ w[f"{name}.c_proj.weight"].T


def head(w: Weights, x_PD: Tensor) -> Tensor:
    """Logits, kept within -15 to 15."""
    return 15 * torch.tanh(rms(x_PD) @ w["lm_head.weight"].T / 15)


def depth(w: Weights, plan: ModelPlan, idx_T: Tensor) -> Tensor:
    """Logits of one sequence by model/depth.py's description."""
    x = first = rms(w["wte.weight"][idx_T])
    for i, window in enumerate(plan.windows):
        value = None
        if plan.value_embeddings and i in range(plan.n_layer - 1, -1, -2):
            looked_up = w[f"value_embeddings.{i}.weight"][idx_T]
            value = looked_up.unflatten(-1, (plan.n_kv_head, -1))
        if plan.residual_scalars:
            x = w["stream_scale"][i] * x + w["embedding_scale"][i] * first
        x = x + attention(
            w,
            f"h.{i}.attn",
            plan,
            rms(x),
            places=range(len(idx_T)),
            window=window,
            value_PGK=value,
        )
        x = x + mlp(w, f"h.{i}.mlp", rms(x))
    return head(w, x)


def sandwich(w: Weights, name: str, plan: ModelPlan, x: Tensor, places: Sequence[int]) -> Tensor:
    """A block of the looped family, over the tokens that stand at `places`."""
    window = plan.sequence_len
    x = x + rms(attention(w, f"{name}.attn", plan, rms(x), places=places, window=window))
    return x + rms(mlp(w, f"{name}.mlp", rms(x)))


def looped(
    w: Weights,
    plan: ModelPlan,
    idx_T: Tensor,
    noise_TD: Tensor,
    *,
    recurrence: int,
    capacities: Sequence[float],
) -> Tensor:
    """Logits of one sequence by model/looped.py's description: as in training, where iteration i
    takes the best scored `capacities[i]` of the tokens."""
    loop = plan.loop
    assert loop is not None
    everywhere = list(range(len(idx_T)))
    x = rms(w["wte.weight"][idx_T])
    for i in range(loop.n_prelude):
        x = sandwich(w, f"prelude.{i}", plan, x, everywhere)
    state = 0.02 * noise_TD
    for i in range(recurrence):
        if capacities[i] == 1:
            state = iteration(w, plan, state, x, everywhere, i)
            continue
        score = state @ w["router.weight"][0] + w["router_bias"][min(i, loop.max_recurrence - 1)]
        count = math.ceil(capacities[i] * len(idx_T))
        taken = sorted(score.argsort(descending=True)[:count].tolist())
        new = iteration(w, plan, state[taken], x[taken], taken, i)
        state = torch.stack(
            [
                s + score[t].sigmoid() * (new[taken.index(t)] - s) if t in taken else s
                for t, s in enumerate(state)
            ]
        )
    for i in range(loop.n_coda):
        state = sandwich(w, f"coda.{i}", plan, state, everywhere)
    return head(w, state)


def iteration(
    w: Weights, plan: ModelPlan, state: Tensor, given: Tensor, places: Sequence[int], i: int
) -> Tensor:
    """One pass through the core, of the tokens that stand at `places`."""
    loop: LoopPlan | None = plan.loop
    assert loop is not None
    y = torch.cat([state, given], -1) @ w["inject.weight"].T
    for j in range(loop.n_recurrent):
        y = sandwich(w, f"core.{j}", plan, y, places)
    if loop.lora_rank:
        own = min(i, loop.max_recurrence - 1)
        y = y + 0.1 * (y @ w["adapter_down"][own] @ w["adapter_up"][own])
    return rms(y) * w["state_gain"]

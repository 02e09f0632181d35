"""Who moves what: AdamW for embeddings, head, norms and scalars; AdamW or Muon for matrices.

    AdamW   torch's, fused
    Muon    momentum, then the nearest orthogonal matrix (Jordan et al. 2024,
            https://kellerjordan.github.io/posts/muon), scaled by sqrt(max(1, rows / columns))

torch.optim.Muon does the same one matrix at a time; here those of one shape go through the
iteration together, on every core, and packed ones (query, key, value) are taken apart first. Tests
hold the two to each other.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tuppence.config import GroupPlan, OptimizerPlan
from tuppence.model import Family
from tuppence.workers import Workers

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic, steepest at zero (Jordan et al. 2024)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised. `rows` says which parameters are several matrices in one.

    Parameters of a group have `lr`, `momentum` (Nesterov's) and `weight_decay` (decoupled). The
    matrices of a shape are moved in as many parts as there are `workers`.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        rows: Mapping[nn.Parameter, tuple[int, ...]],
        workers: Workers | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": list(params)}], defaults)
        self.rows, self.workers = rows, workers

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "no closure: gradients are there already"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            move = partial(_move, lr=group["lr"])
            parts = self._parts(params, ahead)
            if self.workers is None:
                for part in parts:
                    move(part)
            else:
                self.workers.spread(move, parts)

    def _parts(
        self, params: Sequence[nn.Parameter], updates: Sequence[Tensor]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Single matrices (views of their parameters) with their updates, of one shape each."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, update in zip(params, updates, strict=True):
            rows = list(self.rows.get(p, (p.shape[0],)))
            for one in zip(torch.split(p, rows), torch.split(update, rows), strict=True):
                by_shape.setdefault(one[0].shape, []).append(one)
        ways = len(self.workers) if self.workers else 1
        parts = [same[i::ways] for same in by_shape.values() for i in range(ways)]
        return [part for part in parts if part]


@torch.no_grad()
def _move(part: list[tuple[Tensor, Tensor]], *, lr: float) -> None:
    """Move matrices of one shape against their orthogonalised updates."""
    targets, updates = zip(*part, strict=True)
    rows, columns = targets[0].shape
    stacked = orthogonalised(torch.stack(updates))
    scale = math.sqrt(max(1.0, rows / columns))
    torch._foreach_add_(targets, stacked.unbind(), alpha=-lr * scale)


def orthogonalised(stack_NRC: Tensor) -> Tensor:
    """Each of N matrices with its singular values brought near one (0.7 to 1.2), in bf16.

    Five steps of X <- a X + (b X X' + c (X X')^2) X, on the shorter side.
    """
    a, b, c = NEWTON_SCHULZ
    X = stack_NRC.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(stack_NRC.dtype)


def optimizers_of(
    model: Family, plan: OptimizerPlan, workers: Workers | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizers over every parameter of `model` exactly once (asserted).

    Each of their groups has its peak learning rate as "peak".
    """
    named = {name: params for name, params in model.parameter_groups().items() if params}
    owned = [id(p) for params in named.values() for p in params]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()}), "owned twice or never"
    by_kind: dict[str, list[tuple[GroupPlan, list[nn.Parameter]]]] = {"adamw": [], "muon": []}
    for name, params in named.items():
        by_kind[plan.groups[name].optimizer].append((plan.groups[name], params))
    made: list[torch.optim.Optimizer] = []
    if by_kind["adamw"]:
        made.append(_adamw(by_kind["adamw"], plan.eps))
    for group, params in by_kind["muon"]:
        made.append(
            Muon(
                params,
                lr=group.learning_rate,
                momentum=group.beta1,
                weight_decay=group.weight_decay,
                rows=model.packed_rows(),
                workers=workers,
            )
        )
    for optimizer in made:
        for settings in optimizer.param_groups:
            settings["peak"] = settings["lr"]
    return made


def _adamw(groups: list[tuple[GroupPlan, list[nn.Parameter]]], eps: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
                "betas": (group.beta1, group.beta2),
            }
            for group, params in groups
        ],
        eps=eps,
        fused=True,
    )

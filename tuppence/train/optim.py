"""Who moves what: AdamW for embeddings, head, norms and scalars; AdamW or Muon for matrices.

AdamW is torch's, fused; Muon is muon.py's. Each moves what this rank owns (parallel.py): all of it,
or its rows.
"""

import torch

from tuppence.config import GroupPlan, OptimizerPlan
from tuppence.model import Family
from tuppence.ranks import ALONE
from tuppence.train.muon import Exchange, Muon
from tuppence.train.parallel import Parallel, Share
from tuppence.workers import Workers


def optimizers_of(
    model: Family,
    plan: OptimizerPlan,
    workers: Workers | None = None,
    parallel: Parallel | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimizers over every parameter of `model` exactly once (asserted).

    Each of their groups has its peak learning rate as "peak". With `parallel` they move this rank's
    share.
    """
    parallel = parallel or Parallel(model, how="none", ranks=ALONE)
    named = {name: params for name, params in model.parameter_groups().items() if params}
    owned = [id(p) for params in named.values() for p in params]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()}), "owned twice or never"
    by_kind: dict[str, list[tuple[GroupPlan, list[Share]]]] = {"adamw": [], "muon": []}
    for name, params in named.items():
        by_kind[plan.groups[name].optimizer].append((plan.groups[name], parallel.of(params)))
    made: list[torch.optim.Optimizer] = []
    if any(share.has_rows for _, shares in by_kind["adamw"] for share in shares):
        made.append(_adamw(by_kind["adamw"], plan.eps))
    for group, shares in by_kind["muon"]:
        made.append(_muon(group, shares, model, workers, parallel))
    for optimizer in made:
        for settings in optimizer.param_groups:
            settings["peak"] = settings["lr"]
    return made


def _muon(
    group: GroupPlan,
    shares: list[Share],
    model: Family,
    workers: Workers | None,
    parallel: Parallel,
) -> Muon:
    ranks = parallel.ranks
    return Muon(
        [share.owned for share in shares],
        lr=group.learning_rate,
        momentum=group.beta1,
        weight_decay=group.weight_decay,
        rows=model.packed_rows(),
        workers=workers,
        exchange=Exchange(shares, rank=ranks.rank, world=ranks.world) if parallel.sharded else None,
    )


def _adamw(groups: list[tuple[GroupPlan, list[Share]]], eps: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {
                "params": [share.owned for share in shares if share.has_rows],
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
                "betas": (group.beta1, group.beta2),
            }
            for group, shares in groups
            if any(share.has_rows for share in shares)
        ],
        eps=eps,
        fused=True,
    )

"""AdamW as nanoGPT sets it up: decay on matrices and embeddings only, one fused update."""

import torch
from torch import nn

from tuppence.config import OptimizerPlan


def adamw(model: nn.Module, plan: OptimizerPlan) -> torch.optim.AdamW:
    """The optimizer over every parameter of `model` exactly once (asserted)."""
    groups: dict[str, list[nn.Parameter]] = model.parameter_groups()  # type: ignore[operator]
    owned = [id(p) for group in groups.values() for p in group]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()}), "owned twice or never"
    decay = {"decay": plan.weight_decay, "no_decay": 0.0}
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay[name]} for name, params in groups.items()],
        lr=plan.learning_rate,
        betas=(plan.beta1, plan.beta2),
        eps=plan.eps,
        fused=True,
    )

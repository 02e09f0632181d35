"""The model families. They share a signature, not a base class.

`build(plan.model)` gives a module with

    forward(idx_BT)                logits [B, T, V]; with targets_BT the loss; with a cache the rest
                                   of what the cache has seen
    init_weights(seed)             every parameter, a function of the seed alone
    parameter_groups()             every parameter once: matrix, embedding, head, norm, scalar
    packed_rows()                  the matrices that are several below one another
    blocks()                       the modules that are gathered or recomputed one by one
"""

import torch
from torch import nn

from tuppence.config import ModelPlan
from tuppence.model.depth import Depth
from tuppence.model.gpt2 import GPT2
from tuppence.model.looped import Looped

Family = GPT2 | Depth | Looped
FAMILIES: dict[str, type[Family]] = {"gpt2": GPT2, "depth": Depth, "looped": Looped}


def build(
    plan: ModelPlan,
    *,
    attention: str = "sdpa",
    device: str = "cpu",
    document_end: int | None = None,
) -> Family:
    """The planned model on a device, weights allocated but not yet filled.

    With a `document_end`, attention stays within the documents that this id ends, but where there
    is a cache: all that has been generated is one (documents.py). The model is laid out on the meta
    device first: no parameter is ever filled twice.
    """
    with torch.device("meta"):
        model: Family = FAMILIES[plan.family](plan, attention=attention, document_end=document_end)
    _allocate(model, device)
    return model


def _allocate(model: nn.Module, device: str) -> None:
    """Give every meta parameter memory, one for each even where two modules share it."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in made:
                    made[p] = nn.Parameter(torch.empty_like(p, device=device))
                module._parameters[name] = made[p]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)

"""The model families. They share a signature, not a base class.

`build(plan.model)` gives a module whose `forward(idx_BT, targets_BT)` is the loss and whose
`forward(idx_BT)` is the logits, with `init_weights(seed)` and `parameter_groups()`.
"""

from tuppence.config import ModelPlan
from tuppence.model.gpt2 import GPT2


def build(plan: ModelPlan, *, attention: str = "sdpa") -> GPT2:
    """The planned model, weights not yet initialised."""
    assert plan.family == "gpt2", plan.family
    return GPT2(plan, attention=attention)

"""Plans of small models and their optimizers, for tests."""

from collections.abc import Iterator

import torch

from tuppence.config import DataPlan, Model, ModelPlan, OptimizerPlan, Run, Train
from tuppence.model import Family, build
from tuppence.plan import laws
from tuppence.plan.asked import optimizer_of, solve_model, solve_optimizer
from tuppence.plan.shapes import shape_of

LOOP = {"n_prelude": 1, "n_recurrent": 2, "n_coda": 1, "mean_recurrence": 3, "max_recurrence": 5}
SMALL = {  # the least of each family, all of its parts present
    "gpt2": {"family": "gpt2", "n_layer": 2, "bias": True},
    "depth": {"family": "depth", "n_layer": 3, "n_kv_head": 2, "window_pattern": "SL"},
    "looped": {"family": "looped", "lora_rank": 4, **LOOP},
}


def model_plan(*, vocab_size: int = 50, **keys: object) -> ModelPlan:
    """The plan of a model with these `model.*` keys, 16 positions and 32 channels unless said."""
    sizes = {"n_head": 4, "n_embd": 32, "sequence_len": 16, "vocab_size": vocab_size, **keys}
    return solve_model(Run(model=Model(**sizes)), data_plan(vocab_size))


def data_plan(vocab_size: int) -> DataPlan:
    return DataPlan(
        "x", "char", "text", None, None, vocab_size, 10**6, 10**5, 1.0, None, True, "plain"
    )


def built(plan: ModelPlan, *, attention: str = "sdpa", seed: int = 0) -> Family:
    """The model with its first weights."""
    model = build(plan, attention=attention)
    model.init_weights(seed)
    return model


def shaken(plan: ModelPlan, *, attention: str = "sdpa", seed: int = 0) -> Family:
    """A model in which every parameter counts: none is zero or near it, logits reach the cap."""
    model = built(plan, attention=attention, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = 2.0 if name == "lm_head.weight" else 0.2
            p.add_(wide * torch.randn(p.shape, generator=generator))
    return model


def optimizer_plan(family: str = "gpt2", **train: object) -> OptimizerPlan:
    """Of a small model of the family, with these `train.*` keys."""
    run = Run(model=Model(n_head=4, n_embd=32, **SMALL[family]), train=Train(**train))
    shape = shape_of(run.model, 50)
    recipe = laws.recipe(shape, optimizer_of(run), 1e6, batch_tokens=1024)
    return solve_optimizer(run, solve_model(run, data_plan(50)), laws.overridden(recipe, run.train))


def on_one_thread() -> Iterator[None]:
    """A fixture: what is small is slow on many threads, and on one the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

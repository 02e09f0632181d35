"""Golden losses of the first steps of every family and optimizer, on tiny Shakespeare.

Equal bit for bit on one machine, and to 1e-4 across machines. A change of a number says why.
"""

from pathlib import Path

import pytest
from families import SMALL, built, model_plan, on_one_thread, optimizer_plan

from tuppence.data.loader import Loader
from tuppence.data.prepare import prepare
from tuppence.model.looped import draw_recurrence
from tuppence.train.draws import sequence_keys
from tuppence.train.optim import optimizers_of
from tuppence.train.step import StepResult, micro_batches, train_step
from tuppence.workers import Workers

STEPS, SEED = 8, 1
RATES = {
    "learning_rate": 0.01,
    "embedding_rate": 0.03,
    "head_rate": 0.003,
    "scalar_rate": 0.01,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "momentum": 0.95,
}
ROUTED = {**SMALL["looped"], "mixture_of_depths": True, "backprop_depth": 2}
MODELS = {**SMALL, "gpt2 dropout": {**SMALL["gpt2"], "dropout": 0.1}, "looped routed": ROUTED}

# nats; `python -m pytest tests/test_golden.py -vv` prints what it finds on a mismatch
GOLDEN: dict[tuple[str, str], list[float]] = {
    ("gpt2", "adamw"): [
        4.185515,
        4.015626,
        3.999353,
        3.882335,
        3.80243,
        3.777271,
        3.714208,
        3.745659,
    ],
    ("gpt2", "muon"): [
        4.185515,
        4.054398,
        3.99387,
        3.86295,
        3.795406,
        3.769709,
        3.701829,
        3.734402,
    ],
    ("depth", "adamw"): [
        4.17448,
        4.150248,
        4.111729,
        4.021941,
        3.94017,
        3.893915,
        3.830733,
        3.838615,
    ],
    ("depth", "muon"): [
        4.17448,
        4.150922,
        4.128709,
        4.08335,
        4.04598,
        4.022977,
        3.998563,
        3.955037,
    ],
    ("looped", "adamw"): [
        4.174069,
        4.147726,
        4.066335,
        3.971652,
        3.88848,
        3.849916,
        3.794043,
        3.812161,
    ],
    ("looped", "muon"): [
        4.174069,
        4.122152,
        4.067004,
        3.978243,
        3.885871,
        3.848668,
        3.790624,
        3.795551,
    ],
    ("gpt2 dropout", "muon"): [
        4.187428,
        4.056529,
        3.998996,
        3.868895,
        3.802956,
        3.775877,
        3.712363,
        3.743234,
    ],
    ("looped routed", "muon"): [
        4.174376,
        4.12297,
        4.067565,
        3.976501,
        3.883389,
        3.847581,
        3.786368,
        3.796184,
    ],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return prepare(source="shakespeare", tokenizer="char", root=root).folder


one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


def run(name: str, optimizer: str, shards: Path) -> list[StepResult]:
    """The first steps in fp32, two micro-batches each, drawn as the loop draws them."""
    family = name.split()[0]
    plan = model_plan(**MODELS[name], vocab_size=65, sequence_len=32)
    workers = Workers(built(plan, seed=SEED), count=1, device="cpu", precision="fp32")
    rates = {k: v for k, v in RATES.items() if family != "gpt2" or k != "embedding_rate"}
    chosen = optimizer_plan(family, optimizer=optimizer, **rates)  # a tied table has the head's
    optimizers = optimizers_of(workers.model, chosen, workers)
    loader = Loader(shards, sequence_len=32, batch_size=8, seed=SEED)
    results = []
    for step in range(STEPS):
        batch = micro_batches(
            loader.batch(step),
            micro_batch=4,
            device="cpu",
            keys=sequence_keys(seed=SEED, step=step, batch_sequences=8),
            recurrence=draw_recurrence(plan.loop, seed=SEED, step=step) if plan.loop else None,
        )
        results.append(train_step(workers, optimizers, batch, factor=1.0, grad_clip=1.0))
    return results


@pytest.mark.parametrize(("name", "optimizer"), GOLDEN, ids=lambda x: x)
def test_golden_losses(name: str, optimizer: str, shards: Path) -> None:
    found = run(name, optimizer, shards)
    losses = [result.loss for result in found]
    assert losses == pytest.approx(GOLDEN[name, optimizer], abs=1e-4), [round(x, 6) for x in losses]
    assert run(name, optimizer, shards) == found


def test_every_family_and_optimizer_has_golden_losses() -> None:
    assert set(GOLDEN) >= {(family, o) for family in SMALL for o in ("adamw", "muon")}
    first = {name: losses[0] for (name, _), losses in GOLDEN.items()}
    for (name, optimizer), losses in GOLDEN.items():
        assert losses[0] == first[name], "before the first update there is no optimizer"
        assert losses[-1] < losses[0], (name, optimizer)
    assert len({tuple(losses) for losses in GOLDEN.values()}) == len(GOLDEN)

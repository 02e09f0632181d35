"""A looped model's step: what routing saves in time, and truncated gradients in time and memory.

    python bench/looped.py [--rounds 7]

One prelude block, a core of two, one coda block, width 256, T = 256, four sequences, bf16, one
thread. Times are of a forward and backward pass, interleaved; memory is what autograd keeps for the
backward pass, weights not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine

from tuppence.config import DataPlan, Model, Run
from tuppence.model import Family, build
from tuppence.model.looped import capacity_of
from tuppence.model.replay import Draws
from tuppence.plan.asked import solve_model
from tuppence.plan.shapes import planned_shape

SIZES: dict[str, Any] = {
    "family": "looped",
    "n_prelude": 1,
    "n_recurrent": 2,
    "n_coda": 1,
    "mean_recurrence": 4,
    "max_recurrence": 8,
    "n_embd": 256,
    "n_head": 2,
    "sequence_len": 256,
}
B, V = 4, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    plain, routed = model_of(), model_of(mixture_of_depths=True)
    for r in (2, 4, 8):
        whole, part = in_turn([step_of(plain, r), step_of(routed, r)], args.rounds)
        taken = [capacity_of(routed.loop, i) for i in range(r)]  # type: ignore[union-attr, arg-type]
        work = planned_shape(routed.plan, recurrence=r).flops_per_token
        work /= planned_shape(plain.plan, recurrence=r).flops_per_token
        print(
            f"r = {r}: all tokens {whole * 1e3:.0f} ms, routed {part * 1e3:.0f} ms: "
            f"{part / whole:.2f} of the time for {work:.2f} of the FLOPs (the core takes "
            f"{statistics.fmean(taken):.2f} of the tokens)"
        )
    depths: list[int | None] = [None, 4, 2, 1]
    models = [model_of(backprop_depth=depth) for depth in depths]
    seconds = in_turn([step_of(model, 8) for model in models], args.rounds)
    for depth, model, taken_s in zip(depths, models, seconds, strict=True):
        print(
            f"r = 8, gradients through {'all' if depth is None else f'the last {depth}'}: "
            f"{kept_mib(model, 8):.1f} MiB kept, {taken_s * 1e3:.0f} ms"
        )


def model_of(**keys: Any) -> Family:
    """The model with its first weights."""
    data = DataPlan("", "char", "text", None, None, V, 0, 0, 1.0, None, True, "plain")
    model = build(solve_model(Run(model=Model(**SIZES, **keys)), data), attention="matmul")
    model.init_weights(0)
    return model


def step_of(model: Family, r: int) -> Callable[[], None]:
    """A forward and backward pass at r iterations."""
    tokens = torch.randint(V, (B, SIZES["sequence_len"]), generator=torch.Generator())
    draws = Draws(torch.arange(B), r)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, tokens, draws=draws)
        loss.backward()
        model.zero_grad()

    return step


def in_turn(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each, interleaved; the first two rounds warm up."""
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 2):
        for step, found in zip(steps, taken, strict=True):
            started = time.perf_counter()
            step()
            found.append(time.perf_counter() - started)
    return [statistics.median(found[2:]) for found in taken]


def kept_mib(model: Family, r: int) -> float:
    """What autograd keeps of one pass, each storage once, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step_of(model, r)()
    return sum(kept.values()) / 2**20


if __name__ == "__main__":
    main()

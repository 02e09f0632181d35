"""What it takes to spread a run of this machine over ranks: bytes on each, seconds on the wire.

    ddp     weights, gradients, moments whole                2 x fp32 gradients cross the wire
    zero1   moments by rows                                  gradients there, weights back
    fsdp    all by rows                                      weights twice and gradients once

per step; fsdp's for every micro-batch.
"""

from dataclasses import dataclass

from tuppence.config import ModelPlan, Run
from tuppence.errors import UserError
from tuppence.plan.cost import GIB
from tuppence.plan.memory import state_bytes
from tuppence.plan.shapes import planned_shape

WIRE_GBS = {  # one way, what a ring of ranks moves a second
    "cpu": 0.7,  # gloo over loopback between two busy cores, as the preflight event says it
    "cuda": 50.0,  # between PCIe's 20 and NVLink's 200; not measured
}
NODE_GBS = 10.0  # between nodes, where nothing better is known: 100 Gbit/s at 80%
BUCKET = 2**24  # elements, train/parallel.py's; a larger parameter is a bucket of its own
RECOMPUTED = 4 / 3  # of a pass: the forward half runs twice


@dataclass(frozen=True)
class Spread:
    """`ranks` processes on `nodes`, and how the model lies on them."""

    ranks: int = 1
    nodes: int = 1
    parallel: str = "none"
    recompute: bool = False


def spread_of(run: Run, *, ranks: int, nodes: int) -> Spread:
    """As asked; else one process alone, or the optimizer sharded. Raises UserError."""
    asked, again = run.train.parallel, bool(run.train.activation_checkpointing)
    if asked is not None and (asked == "none") != (ranks == 1):
        rest = "ddp, zero1 or fsdp" if ranks > 1 else "none (torchrun starts more than one)"
        raise UserError(f"train.parallel={asked}: with {ranks} process(es) it is {rest}")
    gpus = (run.machine.gpu_count or 0) * (run.machine.nodes or 1)
    if gpus > 1 and gpus != ranks:
        raise UserError(
            f"machine.gpu_count={run.machine.gpu_count}: {gpus} GPUs take one process each, and "
            f"here is {ranks}; start it with torchrun --nproc_per_node={run.machine.gpu_count} "
            f"-m tuppence train ..."
        )
    return Spread(ranks, nodes, asked or ("none" if ranks == 1 else "zero1"), again)


def held_bytes(model: ModelPlan, spread: Spread, *, muon: bool) -> float:
    """Weights, gradients and moments on one rank, and what crosses the wire beside them."""
    moved = planned_shape(model).params_muon if muon else 0
    moments = state_bytes(model.params, muon_params=moved) - 8 * model.params
    largest = max(BUCKET, model.vocab_size * model.n_embd)
    crossing = 8 * min(largest, model.params)  # what is sent, and what comes
    if spread.parallel == "none":
        return 8 * model.params + moments
    if spread.parallel == "ddp":
        return 8 * model.params + moments + crossing
    if spread.parallel == "zero1":
        own = (moments + 4 * model.params) / spread.ranks
        return 8 * model.params + own + crossing
    block = planned_shape(model).params_body / max(1, model.n_layer)
    gathered = 8 * (2 * block + model.params - planned_shape(model).params_body)
    return (8 * model.params + moments) / spread.ranks + gathered


def wire_seconds(model: ModelPlan, spread: Spread, *, device: str, accumulation: int) -> float:
    """Of a step, were nothing hidden behind computing. `accumulation` is one rank's."""
    if spread.ranks == 1:
        return 0.0
    sent = 8 * model.params
    if spread.parallel == "fsdp":  # a looped model gathers its core again in each iteration
        shape = planned_shape(model)
        runs = shape.layers_run / max(1, model.n_layer)
        sent = round((8 * runs + 4) * model.params * accumulation)
    speed = WIRE_GBS[device] if spread.nodes == 1 else min(NODE_GBS, WIRE_GBS[device])
    return sent * (spread.ranks - 1) / spread.ranks / (speed * 1e9)


def per_machine_gib(each_gib: float, spread: Spread, *, device: str) -> float:
    """What must fit together: a GPU's one rank, or all the ranks that share a machine's memory."""
    return each_gib if device == "cuda" else each_gib * spread.ranks / spread.nodes


def staged_gib(checkpoint_bytes: int, spread: Spread) -> float:
    """Host memory that holds this rank's part of a checkpoint while it is written."""
    return checkpoint_bytes / spread.ranks / GIB

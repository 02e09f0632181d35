"""Where an attempt trains, and the weights that it begins with, the same on every rank.

The lead chooses. A machine that does not see the lead's folder brings what was chosen from the
bucket (bucket/relay.py); where one lacks the folder of `train.init_from`, the lead's are copied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tuppence import checkpoint, origin
from tuppence.bucket import Relay
from tuppence.checkpoint import Fence, State
from tuppence.config import Plan
from tuppence.files import file_sha256
from tuppence.folder import RunFolder
from tuppence.hub.load import load_into
from tuppence.model import Family
from tuppence.ranks import Ranks
from tuppence.train.parallel import Parallel


@dataclass(frozen=True)
class Place:
    """Where an attempt trains, as train() was told. On ranks other than the lead the folder keeps
    nothing. With a `relay` ranks may be on machines that do not see the lead's folder: it is the
    lead's, and that of each such rank."""

    folder: RunFolder
    data: Path
    attempt: int
    ranks: Ranks
    fence: Fence | None
    committed: Callable[[Path], None]
    alive: Callable[[], float]
    relay: Relay | None = None

    @property
    def beside(self) -> bool:
        """Whether this rank does not see the lead's folder."""
        return self.relay is not None and not self.ranks.lead


def found_on(place: Place) -> tuple[Fence, Path | None]:
    """The attempt's hold on the run, and the checkpoint to go on from: the lead's choice."""
    folder, fence = place.folder, place.fence
    if fence is None and place.ranks.lead:
        fence = checkpoint.claim(folder, place.attempt)

    def chosen() -> str | None:
        found = checkpoint.newest(folder).path
        if found is not None:
            checkpoint.mend_pointers(folder, found, checkpoint.state_of(found))
        return None if found is None else found.name

    name = place.ranks.told("checkpoint", chosen)
    fence = fence or Fence(folder, place.attempt)  # the lead's, which has claimed by now
    return fence, None if name is None else whole_here(place, name, "start")


def whole_here(place: Place, name: str, when: str) -> Path:
    """A checkpoint that the lead has verified, on this machine, which may have to bring it.

    `when` tells one time from another. All ranks ask.
    """
    path, ranks, relay = place.folder.checkpoints / name, place.ranks, place.relay
    if relay is None:
        return path

    def bring() -> None:
        relay.fetch(place.folder, name, sha256)

    sha256 = ranks.told(f"{name} at {when}", lambda: file_sha256(path / checkpoint.MANIFEST))
    if place.beside:
        first = ranks.rank - ranks.rank % ranks.local_world
        ranks.told(f"{name} at {when} on rank {first}", bring, by=first)
    return path


def restore(path: Path, parallel: Parallel, optimizers: list[torch.optim.Optimizer]) -> State:
    """Weights and moments of a checkpoint, whoever wrote it, into what this rank holds."""
    checkpoint.read(path, parallel.wanted(), "model")
    for optimizer in optimizers:
        optimizer.state.clear()  # of what had no moments yet when it was saved, too
    there = checkpoint.index(path, "optimizer")
    moments = parallel.wanted_moments(optimizers, there)
    checkpoint.read(path, moments, "optimizer", partial=parallel.sharded)
    return checkpoint.state_of(path)


def first_weights(model: Family, plan: Plan, ranks: Ranks) -> None:
    """Drawn from the seed, or those that the plan starts from. Where a machine has not the folder
    of these, the lead's are copied to every rank."""
    if plan.init is None:
        model.init_weights(plan.step.seed)
        return
    all_have = ranks.all(origin.is_here(plan.init.path))
    if all_have or ranks.lead:
        load_into(model, plan.init)
    if not all_have:
        ranks.copy(parameter.data for parameter in model.parameters())

"""This process among its peers: who leads, sums over all, and what one tells the others.

    torchrun --nproc_per_node=8 -m tuppence train ...      starts one process (rank) for each GPU

Nodes, ports and restarts are torchrun's; the collectives are NCCL's on GPUs and gloo's on CPUs.
What ranks must agree on is decided by rank 0, the lead, and told: the same clock read on two ranks
gives two answers, and a rank that goes another way leaves the others waiting for ever.
"""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from tuppence import host
from tuppence.errors import Fault

LEAVE_SECONDS = 10.0  # for the others to hear that there is nothing to do
MEET_SECONDS = 1800.0  # for all ranks to arrive: a node may still be booting
WAIT_SECONDS = 7 * 86400.0  # for the lead, who may be preparing a corpus
POLL_SECONDS = 0.02
STUCK_SECONDS = 3600.0  # after which a collective gives up, should the watchdog not have

CUT_OFF = (  # in the libraries' words
    r"gloo|nccl(RemoteError|SystemError)|connection (closed|reset|refused)|socket|broken pipe"
    r"|timed out|process group"
)

# torch 2.13 renamed them
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """Rank number `rank` of `world`, `local_rank` of `local_world` on its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: Any = None

    @property
    def lead(self) -> bool:
        """The rank that decides and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all ranks, in fp64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, flag: bool) -> bool:
        """What the lead says."""
        return flag if self.world == 1 else self.sum(float(flag and self.lead))[0] > 0

    def all(self, flag: bool) -> bool:
        """Whether it is so on every rank."""
        return self.sum(float(flag))[0] == self.world

    def leads(self, value: float) -> float:
        """The lead's value."""
        return self.sum(value if self.lead else 0.0)[0] if self.world > 1 else value

    def copy(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the lead's content of each."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def told(self, name: str, say: Callable[[], Any], *, by: int = 0) -> Any:
        """What rank `by` says, to all who ask: JSON through the store. Each name once; the others
        wait for it as long as it takes."""
        if self.world == 1:
            return say()
        if self.rank == by:
            self.tell(name, say())
        self.store.wait([name], timedelta(seconds=WAIT_SECONDS))
        return json.loads(self.store.get(name))

    def tell(self, name: str, value: Any) -> bool:
        """Say it to whoever asks; only the first time counts. Whether this was it."""
        text = json.dumps(value)
        return self.world > 1 and self.store.compare_set(name, "", text).decode() == text

    def leave(self) -> None:
        """Say that nothing more will be asked."""
        self.store.set(f"left {self.rank}", "")

    def let_leave(self) -> None:
        """Wait a while until the others have left: the store may go with this process."""
        others = [f"left {rank}" for rank in range(1, self.world)]
        with contextlib.suppress(RuntimeError):
            self.store.wait(others, timedelta(seconds=LEAVE_SECONDS))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(0.0)

    def part(self) -> None:
        """Leave the others, at the end, together."""
        if self.world > 1:
            self.barrier()
            dist.destroy_process_group()


ALONE = Ranks()


def join(device: str) -> Ranks:
    """Meet the other ranks, of which torchrun's environment tells. Raises Fault."""
    if host.world_size() == 1:
        return ALONE
    try:
        wait = timedelta(seconds=MEET_SECONDS)
        store, rank, world = next(iter(rendezvous("env://", timeout=wait)))
        store = PrefixStore(_session(store, rank, world), store)
        if device == "cuda":
            torch.cuda.set_device(host.local_rank())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=STUCK_SECONDS),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise Fault(f"the ranks did not meet: {error}; start them with torchrun") from error
    store = PrefixStore("tuppence", store)
    return Ranks(rank, world, host.local_rank(), host.local_world(), store)


def _session(store: Any, rank: int, world: int) -> str:
    """A name that only the ranks of this start know. Where torchrun starts ranks again, its store
    still has what those before have told, and nothing that it gives tells one start from another.

    A rank calls with a word of its own; the lead answers whatever call is there, and is done when
    every rank has heard the name.
    """
    call, answer, heard = "call of {}", "answer to {}", "{} heard by {}"
    if rank:
        mine = secrets.token_hex(8)
        store.set(call.format(rank), mine)
        name: str = store.get(answer.format(mine)).decode()
        store.set(heard.format(name, rank), "")
        return name
    name, missing = secrets.token_hex(8), set(range(1, world))
    deadline = time.monotonic() + MEET_SECONDS
    while missing := {r for r in missing if not store.check([heard.format(name, r)])}:
        for other in sorted(missing):
            if store.check([call.format(other)]):
                store.set(answer.format(store.get(call.format(other)).decode()), name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come in {MEET_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    return name


def is_cut_off(error: RuntimeError) -> bool:
    """Whether this is how a collective fails when another rank, or the way to it, is gone."""
    return re.search(CUT_OFF, str(error), re.IGNORECASE) is not None


def rows_of(length: int, rank: int, world: int) -> tuple[int, int]:
    """A rank's rows [start, stop) of `length`: as torch.chunk and FSDP2 cut, the last ones less."""
    each = -(-length // world)
    return min(length, rank * each), min(length, (rank + 1) * each)

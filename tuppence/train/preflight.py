"""Before real work: every rank is there, runs the same thing, and the wire between them carries.

facts        code, versions, plan, data: compared over the store, as JSON
all-reduce   rank r adds a one at place r: the sum is ones alone, if each took part once
16 MiB       the same again, timed: GB/s
"""

import json
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from tuppence.errors import Fault
from tuppence.ranks import Ranks

PROBE_BYTES = 16 << 20
ROUNDS = 3  # of the probe; the best counts, the first makes the connections
MEET_SECONDS = 600.0

Facts = Mapping[str, str | int | float | bool | None]


def preflight(
    ranks: Ranks, facts: Facts, *, device: str, seconds: float = MEET_SECONDS
) -> float | None:
    """GB/s of an all-reduce of 16 MiB (its size by its time), None alone.

    Raises Fault, on every rank, naming the ranks that do not come within `seconds` or differ from
    the lead in a fact, or where the sum is not what all together make.
    """
    if ranks.world == 1:
        return None
    _compare(_exchanged(ranks, facts, seconds))
    _prove(ranks, device)
    return _probe(device)


def _exchanged(ranks: Ranks, facts: Facts, seconds: float) -> list[Facts]:
    """Every rank's facts."""
    keys = [f"preflight/{rank}" for rank in range(ranks.world)]
    ranks.store.set(keys[ranks.rank], json.dumps(dict(facts)))
    try:
        ranks.store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        missing = [r for r in range(ranks.world) if not ranks.store.check([keys[r]])]
        if not missing:
            raise
        who = "rank" + ("s " if len(missing) > 1 else " ") + ", ".join(map(str, missing))
        raise Fault(f"{who} did not come to the preflight within {seconds:g} s") from error
    return [json.loads(text) for text in ranks.store.multi_get(keys)]


def _compare(all_facts: list[Facts]) -> None:
    first, differ = all_facts[0], []
    for rank, facts in enumerate(all_facts):
        for name in sorted(first.keys() | facts.keys()):
            if facts.get(name) != first.get(name):
                differ.append(f"rank {rank} has {name} {facts.get(name)}, rank 0 {first.get(name)}")
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise Fault(f"the ranks do not run the same: {'; '.join(differ[:3])}{more}")


def _prove(ranks: Ranks, device: str) -> None:
    """Raise Fault unless each rank took part exactly once."""
    ones = torch.zeros(ranks.world, dtype=torch.int64, device=device)
    ones[ranks.rank] = 1
    dist.all_reduce(ones)
    wrong = {rank: times for rank, times in enumerate(ones.tolist()) if times != 1}
    if wrong:
        found = ", ".join(f"rank {rank} {times} times" for rank, times in wrong.items())
        raise Fault(f"the first all-reduce added up wrongly: {found}, not once each")


def _probe(device: str) -> float:
    data = torch.zeros(PROBE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        dist.all_reduce(data)
        data[0].item()  # a GPU's work is done when its result is read
        best = min(best, time.perf_counter() - started)
    return PROBE_BYTES / best / 1e9

"""What a model answers: nats of the ids that count, many texts in a pass, each stem once.

    asks of an item     stem + " a barber"            row   [ stem | a barber | a cook | a bank ]
                        stem + " a cook"        ──▶   one pass, logits only where an id is asked for
                        stem + " a bank"

The last id of a text is never fed, since nobody asks what follows it. Rows of like length share a
pass; passes go to cores and ranks in turn, longest first. A text that is longer than the model's
context keeps its last ids, so that texts cut differently share nothing.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tuppence.errors import Fault
from tuppence.evals.items import Answer, Ask
from tuppence.evals.subject import Subject
from tuppence.model.branches import Branches
from tuppence.model.layers import HEAD_CHUNK
from tuppence.ranks import ALONE, Ranks

WORTH = 1.25  # a row with branches must have so many times fewer places: it needs a mask of its own
LOGITS = {"cpu": 2**25, "cuda": 2**28}  # at once: what they fill is read several times

Key = TypeVar("Key", bound=Hashable)
Ints = npt.NDArray[np.int64]


class NotFinite(Fault):
    """What a model answered is no number."""


@dataclass(frozen=True)
class _Row:
    """Ids to feed, with positions and branches; `asks` are (number, places, ids wanted there).

    `plain` rows have no branches: positions count up, and everyone looks back.
    """

    ids: Ints
    position: Ints
    branch: Ints
    asks: list[tuple[int, Ints, Ints]]
    plain: bool

    @property
    def reads(self) -> int:
        """How many logits are wanted."""
        return sum(len(places) for _, places, _ in self.asks)


def answers(
    subject: Subject,
    asked: Sequence[tuple[Key, Sequence[Ask]]],
    *,
    batch: int | None = None,
    keep: int | None = None,
    ranks: Ranks = ALONE,
    deadline: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Key, list[Answer]]]:
    """The answers to each item's asks, in an order of their own, on every rank alike.

    At most `batch` rows share a pass (as many as there is room for). Of a text the last `keep` ids
    count (the context). Ends early where the next pass would end after `deadline` (the lead's
    time.monotonic seconds); `tick` is called between passes. Raises NotFinite, on every rank, for
    nats that are no number.
    """
    keep = keep or subject.context
    owner = [item for item, (_, asks) in enumerate(asked) for _ in asks]
    first = [0, *itertools.accumulate(len(asks) for _, asks in asked)]
    found: list[Answer | None] = [None] * len(owner)
    missing = [len(asks) for _, asks in asked]
    rows = [
        row
        for item, (_, asks) in enumerate(asked)
        for row in _rows(asks, first[item], keep=keep, branching=subject.branching)
    ]
    for group in _passes(subject, rows, batch, ranks, deadline, tick):
        for number, answer in group:
            found[number] = answer
            item = owner[number]
            missing[item] -= 1
            if not missing[item]:
                key, asks = asked[item]
                here = found[first[item] : first[item] + len(asks)]
                yield key, [one for one in here if one is not None]


# ---------------------------------------------------------------- rows


def _rows(asks: Sequence[Ask], first: int, *, keep: int, branching: bool) -> Iterator[_Row]:
    """An item's asks, numbered from `first`, in as few places as may be."""
    cut: dict[int, list[tuple[int, Ints, int]]] = {}
    for number, ask in enumerate(asks, first):
        ids = np.asarray(ask.ids, dtype=np.int64)
        kept = ids[-keep:]
        scored = max(0, min(ask.scored, len(kept) - 1))  # before the first id there is nothing
        cut.setdefault(len(ids) - len(kept), []).append((number, kept, scored))
    for group in cut.values():
        together = _row(group)
        apart = sum(len(ids) - 1 for _, ids, _ in group)
        if together.plain or (branching and WORTH * len(together.ids) <= apart):
            yield together
        else:
            yield from (_row([one]) for one in group)


def _row(group: list[tuple[int, Ints, int]]) -> _Row:
    """Texts behind what they have in common."""
    fed = [ids[:-1] for _, ids, _ in group]
    stem = _common(fed)
    parts, position, branch = [fed[0][:stem]], [np.arange(stem)], [np.zeros(stem, np.int64)]
    asks, end = [], stem
    for i, (number, ids, scored) in enumerate(group, 1):
        own = fed[i - 1][stem:]
        at = np.arange(len(ids) - 1 - scored, len(ids) - 1)  # places in the text itself
        asks.append((number, np.where(at < stem, at, at - stem + end), ids[at + 1]))
        parts.append(own)
        position.append(np.arange(stem, stem + len(own)))
        branch.append(np.full(len(own), i))
        end += len(own)
    plain = end == max(len(ids) for ids in fed)
    ids, places, branches = (np.concatenate(each) for each in (parts, position, branch))
    return _Row(ids, places, branches, asks, plain)


def _common(texts: list[Ints]) -> int:
    """How many ids all begin with."""
    shortest = min(len(ids) for ids in texts)
    same = np.ones(shortest, dtype=bool)
    for ids in texts[1:]:
        same &= ids[:shortest] == texts[0][:shortest]
    return shortest if same.all() else int(same.argmin())


# ---------------------------------------------------------------- passes


@dataclass(frozen=True)
class _Pass:
    """Rows of like length; what they read, a row after the other."""

    idx_BT: Tensor
    read_N: Tensor
    wanted_N: Tensor
    branches: Branches | None
    starts: Ints  # of each ask's reads among the N
    numbers: list[int]
    tokens: list[int]


def _passes(
    subject: Subject,
    rows: list[_Row],
    batch: int | None,
    ranks: Ranks,
    deadline: float,
    tick: Callable[[], None],
) -> Iterator[list[tuple[int, Answer]]]:
    """The numbered answers of each group of passes, the same on every rank."""
    workers, longest = subject.workers, 0.0
    device = workers.device
    limit = LOGITS[torch.device(device).type] // subject.vocab_size
    plans = iter(list(_batches(rows, batch or subject.batch, subject.places, limit)))
    workers.train(False)
    try:
        while group := list(itertools.islice(plans, len(workers) * ranks.world)):
            before = time.monotonic()
            if not ranks.agree(before + longest <= deadline):
                return
            mine = group[ranks.rank :: ranks.world]
            # a rank that none is left for computes one all the same: others may need its weights
            passes = [_pass(rows, device) for rows in mine or group[:1]]
            with _uncompiled(workers.model):
                scored = workers.map(lambda model, each: _score(subject, model, each), passes)
            yield _gathered(group, scored[: len(mine)], ranks)
            longest = max(longest, time.monotonic() - before)
            tick()
    finally:
        workers.train()


def _batches(rows: list[_Row], batch: int, places: int, reads: int) -> Iterator[list[_Row]]:
    """Rows of one kind and of like length, the longest first: so many, places and reads at most."""
    for plain in (False, True):
        here: list[_Row] = []
        for row in sorted((r for r in rows if r.plain is plain), key=lambda r: -len(r.ids)):
            full = len(here) == batch or (len(here) + 1) * len((here or [row])[0].ids) > places
            if here and (full or sum(r.reads for r in here) + row.reads > reads):
                yield here
                here = []
            here.append(row)
        if here:
            yield here


def _pass(rows: list[_Row], device: str) -> _Pass:
    """Rows side by side, filled up behind."""
    width = max(1, *(len(row.ids) for row in rows))
    asks = [(b, *ask) for b, row in enumerate(rows) for ask in row.asks]
    lengths = [len(places) for _, _, places, _ in asks]

    def tensor(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    def filled(parts: Iterable[Ints], filler: int) -> Tensor:
        whole = np.full((len(rows), width), filler, dtype=np.int64)
        for b, part in enumerate(parts):
            whole[b, : len(part)] = part
        return tensor(whole)

    branches = None
    if not rows[0].plain:
        position_BT = filled((row.position for row in rows), 0)
        branches = Branches(position_BT, filled((row.branch for row in rows), -1))
    empty = [np.zeros(0, np.int64)]
    return _Pass(
        idx_BT=filled((row.ids for row in rows), 0),
        read_N=tensor(np.concatenate([*empty, *(b * width + at for b, _, at, _ in asks)])),
        wanted_N=tensor(np.concatenate([*empty, *(ids for _, _, _, ids in asks)])),
        branches=branches,
        starts=np.cumsum([0, *lengths]),
        numbers=[number for _, number, _, _ in asks],
        tokens=lengths,
    )


@torch.no_grad()
def _score(subject: Subject, model: nn.Module, each: _Pass) -> list[tuple[float, bool]]:
    """Summed nats of each ask, and whether its ids are the likeliest."""
    with subject.workers.autocast():
        logits_NV = subject.logits(model, each.idx_BT, each.read_N, each.branches)
    rows = max(1, HEAD_CHUNK[logits_NV.is_cuda] // subject.vocab_size)
    parts = [*zip(torch.split(logits_NV, rows), torch.split(each.wanted_N, rows), strict=True)]
    nats_N = torch.cat([_nats(logits, wanted) for logits, wanted in parts])
    likeliest_N = torch.cat([logits.argmax(-1) == wanted for logits, wanted in parts])
    nats, likeliest = nats_N.double().cpu().numpy(), likeliest_N.cpu().numpy()
    spans = [slice(a, b) for a, b in itertools.pairwise(each.starts.tolist())]
    return [(float(nats[span].sum()), bool(likeliest[span].all())) for span in spans]


def _nats(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    return logits_NV.logsumexp(-1) - logits_NV.gather(1, wanted_N[:, None])[:, 0]


def _gathered(
    group: list[list[_Row]], mine: list[list[tuple[float, bool]]], ranks: Ranks
) -> list[tuple[int, Answer]]:
    """What all ranks have scored of a group, in its order."""
    asks = [[(n, len(places)) for row in rows for n, places, _ in row.asks] for rows in group]
    parts: list[list[tuple[float, bool]]] = [[(0.0, False)] * len(of) for of in asks]
    parts[ranks.rank :: ranks.world] = mine
    nats = ranks.sum(*(total for part in parts for total, _ in part))
    greedy = ranks.sum(*(float(likeliest) for part in parts for _, likeliest in part))
    flat = [ask for of in asks for ask in of]
    broken = next((total for total in nats if not math.isfinite(total)), None)
    if broken is not None:
        raise NotFinite(
            f"the loss of an answer is {broken}: the weights are broken; take another --checkpoint"
        )
    return [
        (number, Answer(total, tokens, likeliest > 0))
        for (number, tokens), total, likeliest in zip(flat, nats, greedy, strict=True)
    ]


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Rows differ in shape, and a compiled model would be compiled anew for each."""
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl for m in model.modules()):
        eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return contextlib.nullcontext()

"""Muon: momentum, then the nearest orthogonal matrix (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), scaled by sqrt(max(1, rows / columns)).

torch.optim.Muon does the same one matrix at a time. Here those of one shape go through the
iteration together, packed ones (query, key, value) are taken apart first, and where ranks move rows
of their own each matrix goes through it on one rank alone:

    rows of momentum ──all to all──▶ whole matrices: orthogonalised ──all to all──▶ rows to move

Both ways in bf16, in which the iteration computes anyway: nothing is lost. Tests hold the result to
torch's, and the ranks' to one process's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tuppence.ranks import rows_of
from tuppence.train.parallel import Share
from tuppence.workers import Workers

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic, steepest at zero (Jordan et al. 2024)
ITERATIONS = 5
Matrices = list[tuple[Tensor, Tensor]]  # of one shape: what is moved, and its update


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised. `rows` says which parameters are several matrices in one.

    Parameters of a group have `lr`, `momentum` (Nesterov's) and `weight_decay` (decoupled). The
    matrices of a shape are moved in as many parts as there are `workers`. With an `exchange` the
    parameters are this rank's rows of those that it knows, in its order.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        rows: Mapping[nn.Parameter, tuple[int, ...]],
        workers: Workers | None = None,
        exchange: "Exchange | None" = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": list(params)}], defaults)
        self.rows, self.workers, self.exchange = rows, workers, exchange

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "no closure: gradients are there already"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if self.exchange is None:
                rows = [self.rows.get(p, (p.shape[0],)) for p in params]
                self._each(partial(_move, lr=group["lr"]), _parts(params, ahead, rows))
            else:
                self._move_rows(params, [*ahead], lr=group["lr"])

    def _move_rows(self, params: list[nn.Parameter], ahead: list[Tensor], *, lr: float) -> None:
        """Whole matrices where they are orthogonalised, and only rows of them before and after."""
        assert self.exchange is not None
        asked = {id(p): update for p, update in zip(params, ahead, strict=True)}
        shares = [s for s in self.exchange.shares if id(s.owned) in asked]
        wholes = self.exchange.gather(shares, [asked[id(s.owned)] for s in shares])
        rows = [self.rows.get(share.whole, (share.shape[0],)) for share, _ in wholes]
        updates = [update for _, update in wholes]
        self._each(_orthogonalise, _parts(updates, updates, rows))
        for share, update in zip(shares, self.exchange.scatter(shares, wholes), strict=True):
            for inside, scale in _scales(share, self.rows.get(share.whole, (share.shape[0],))):
                share.owned[inside].add_(update[inside].to(share.owned.dtype), alpha=-lr * scale)

    def _each(self, work: Callable[[Matrices], None], by_shape: Sequence[Matrices]) -> None:
        """Work on the matrices of every shape, in as many parts as there are workers."""
        ways = len(self.workers) if self.workers else 1
        parts = [same[i::ways] for same in by_shape for i in range(ways)]
        parts = [part for part in parts if part]
        if self.workers is None:
            for part in parts:
                work(part)
        else:
            self.workers.spread(work, parts)


def _parts(
    targets: Sequence[Tensor], updates: Sequence[Tensor], rows: Sequence[tuple[int, ...]]
) -> list[Matrices]:
    """Single matrices (views) with their updates, those of one shape together."""
    by_shape: dict[torch.Size, Matrices] = {}
    for target, update, packed in zip(targets, updates, rows, strict=True):
        pairs = zip(
            torch.split(target, list(packed)), torch.split(update, list(packed)), strict=True
        )
        for one in pairs:
            by_shape.setdefault(one[0].shape, []).append(one)
    return list(by_shape.values())


@torch.no_grad()
def _move(part: Matrices, *, lr: float) -> None:
    """Move matrices of one shape against their orthogonalised updates."""
    targets, updates = zip(*part, strict=True)
    stacked = orthogonalised(torch.stack(updates))
    torch._foreach_add_(targets, stacked.unbind(), alpha=-lr * _scale(*targets[0].shape))


@torch.no_grad()
def _orthogonalise(part: Matrices) -> None:
    """Put orthogonalised updates in the place of the updates."""
    targets, updates = zip(*part, strict=True)
    torch._foreach_copy_(targets, orthogonalised(torch.stack(updates)).unbind())


def _scale(rows: int, columns: int) -> float:
    return math.sqrt(max(1.0, rows / columns))


def _scales(share: Share, packed: tuple[int, ...]) -> list[tuple[slice, float]]:
    """The owned rows by matrix, each with its matrix's scale."""
    out, first = [], 0
    for rows in packed:
        start, stop = max(first, share.start), min(first + rows, share.stop)
        if stop > start:
            inside = slice(start - share.start, stop - share.start)
            out.append((inside, _scale(rows, share.shape[1])))
        first += rows
    return out


def orthogonalised(stack_NRC: Tensor) -> Tensor:
    """Each of N matrices with its singular values brought near one (0.7 to 1.2), in bf16.

    Five steps of X <- a X + (b X X' + c (X X')^2) X, on the shorter side.
    """
    a, b, c = NEWTON_SCHULZ
    X = stack_NRC.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(stack_NRC.dtype)


class Exchange:
    """Brings each matrix, of which every rank has rows, whole to one rank, and its rows back.

    The ranks that get them are chosen in turn, by shape, so that each has about as much to do.
    """

    def __init__(self, shares: Sequence[Share], *, rank: int, world: int) -> None:
        self.shares, self.rank, self.world = list(shares), rank, world
        in_turn = sorted(range(len(shares)), key=lambda i: (tuple(shares[i].shape), i))
        self._owner = {shares[i].name: turn % world for turn, i in enumerate(in_turn)}

    def gather(
        self, shares: Sequence[Share], updates: Sequence[Tensor]
    ) -> list[tuple[Share, Tensor]]:
        """This rank's rows of updates out; whole updates of its matrices in, bf16."""
        by_owner = [
            [u for s, u in zip(shares, updates, strict=True) if self._owner[s.name] == to]
            for to in range(self.world)
        ]
        sizes = [self._sizes(self._mine(shares), source) for source in range(self.world)]
        received = _to_all(by_owner, [sum(s) for s in sizes], like=updates[0])
        by_source = [torch.split(part, s) for part, s in zip(received, sizes, strict=True)]
        return [
            (share, torch.cat([parts[i] for parts in by_source]).view(share.shape))
            for i, share in enumerate(self._mine(shares))
        ]

    def scatter(
        self, shares: Sequence[Share], wholes: Sequence[tuple[Share, Tensor]]
    ) -> list[Tensor]:
        """Whole tensors of this rank's matrices out; its rows of every matrix in."""
        by_receiver = [
            [whole[slice(*rows_of(whole.shape[0], to, self.world))] for _, whole in wholes]
            for to in range(self.world)
        ]
        theirs = [
            [s for s in shares if self._owner[s.name] == source] for source in range(self.world)
        ]
        sizes = [self._sizes(of, self.rank) for of in theirs]
        like = wholes[0][1] if wholes else shares[0].owned.detach()
        received = _to_all(by_receiver, [sum(s) for s in sizes], like=like)
        found = {
            share.name: rows.view_as(share.owned)
            for of, part, s in zip(theirs, received, sizes, strict=True)
            for share, rows in zip(of, torch.split(part, s), strict=True)
        }
        return [found[share.name] for share in shares]

    def _mine(self, shares: Sequence[Share]) -> list[Share]:
        return [share for share in shares if self._owner[share.name] == self.rank]

    def _sizes(self, shares: Sequence[Share], rank: int) -> list[int]:
        """Elements of a rank's rows of each."""
        cut = [(share.shape, rows_of(share.shape[0], rank, self.world)) for share in shares]
        return [(stop - start) * math.prod(shape[1:]) for shape, (start, stop) in cut]


def _to_all(send: list[list[Tensor]], sizes: list[int], *, like: Tensor) -> tuple[Tensor, ...]:
    """`send[rank]`, flat and in bf16, to every rank; what each rank sent here, of these `sizes`."""
    flat = [
        torch.cat([t.reshape(-1) for t in part]) if part else like.new_empty(0) for part in send
    ]
    out = torch.cat(flat).bfloat16()
    received = out.new_empty(sum(sizes))
    dist.all_to_all_single(received, out, sizes, [len(part) for part in flat])
    return torch.split(received, sizes)

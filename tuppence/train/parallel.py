"""How a model is spread over ranks, applied from outside it.

    ddp     every rank has all of it, and moves all of it        gradients: all-reduce
    zero1   every rank has the weights, and moves its rows       reduce-scatter, then all-gather
    fsdp    every rank has its rows alone: torch's FSDP2         a block's weights are gathered
                                                                 while it computes
Rows are cut as FSDP2 cuts them, so that a checkpoint of one way loads into any other (zero1:
Rajbhandari et al. 2020, arXiv:1910.02054; fsdp: Zhao et al. 2023, arXiv:2304.11277). Under ddp and
zero1 the gradients of all micro-batches add up at home and cross the wire once a step, in fp32;
under fsdp after each micro-batch, since to hold them whole is what it is there to avoid.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as run_twice

from tuppence.checkpoint import Piece, Spec
from tuppence.model import Family
from tuppence.ranks import Ranks, all_gather, reduce_scatter, rows_of

BUCKET = 2**24  # elements that cross the wire at once: enough for its full speed
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Share:
    """What this rank moves of a parameter: rows [start, stop) of `shape`, as one of its own.

    `owned` lies in the same memory as those rows of `whole`.
    """

    name: str
    whole: nn.Parameter
    owned: nn.Parameter
    shape: torch.Size
    start: int
    stop: int

    @property
    def has_rows(self) -> bool:
        """A rank may have none of a small parameter."""
        return self.stop > self.start

    def piece(self, tensor: Tensor) -> Piece:
        """A tensor of these rows (weights or a moment), as checkpoints know it; a single number is
        the same on every rank."""
        if tensor.dim() == 0:
            return Piece(tensor, 0, ())
        return Piece(tensor, self.start * math.prod(self.shape[1:]), tuple(self.shape))


class Parallel:
    """A model spread over ranks: what of it this rank moves, and how gradients come together."""

    def __init__(
        self,
        model: Family,
        *,
        how: str,
        ranks: Ranks,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        """`how` is none (alone), ddp, zero1 or fsdp, which makes the model's parameters others."""
        assert (how == "none") == (ranks.world == 1), (how, ranks.world)
        self.how, self.ranks, self.model = how, ranks, model
        if how == "fsdp":
            _shard(model, precision, device, ranks.world)
        self.shares = [self._share(name, p) for name, p in model.named_parameters()]
        self._buckets = [*_buckets(self.shares)] if how in ("ddp", "zero1") else []

    @property
    def sharded(self) -> bool:
        """Whether each rank moves rows of its own."""
        return self.how in ("zero1", "fsdp")

    def of(self, params: Sequence[nn.Parameter]) -> list[Share]:
        """The shares of these parameters."""
        by_whole = {id(share.whole): share for share in self.shares}
        return [by_whole[id(p)] for p in params]

    def _share(self, name: str, p: nn.Parameter) -> Share:
        if not self.sharded:
            return Share(name, p, p, p.shape, 0, p.shape[0])
        start, stop = rows_of(p.shape[0], self.ranks.rank, self.ranks.world)
        rows = _local(p) if self.how == "fsdp" else p.detach()[start:stop]
        return Share(name, p, nn.Parameter(rows), p.shape, start, stop)

    # ------------------------------------------------------------ gradients and weights

    @torch.no_grad()
    def reduce(self) -> list[Tensor]:
        """Add up the ranks' gradients, and give each owned part its own; these are returned."""
        for bucket in self._buckets:
            if self.how == "ddp":
                _all_reduce(bucket)
            else:
                _reduce_scatter(bucket, self.ranks.world)
        if self.how == "fsdp":
            for share in self.shares:
                share.owned.grad = None if share.whole.grad is None else _local(share.whole.grad)
        return [s.owned.grad for s in self.shares if s.owned.grad is not None and s.has_rows]

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """The norm of all ranks' gradients, []. Alone it is torch's; among others it is summed in
        fp64, so that it is the same number however the rows lie."""
        if self.how == "none":
            return torch.nn.utils.get_total_norm(grads)
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads]
        total = torch.stack(squares).sum().item() if squares else 0.0
        return torch.tensor(math.sqrt(self.ranks.sum(total)[0] if self.sharded else total))

    @torch.no_grad()
    def spread(self) -> None:
        """After an update: give every rank the rows that others moved."""
        if self.how == "zero1":
            for bucket in self._buckets:
                _all_gather(bucket, self.ranks.world)

    def forget_gradients(self) -> None:
        """After a step, taken or not."""
        self.model.zero_grad(set_to_none=True)
        for share in self.shares:
            share.owned.grad = None

    # ------------------------------------------------------------ what checkpoints hold

    def weights(self) -> dict[str, Piece]:
        """The weights that this rank writes: its rows of all."""
        return dict(self._written(s, s.name, s.owned.detach()) for s in self._writing())

    def moments(self, optimizers: Optimizers) -> dict[str, Piece]:
        """The moments that this rank writes."""
        state: dict[Any, Mapping[str, Tensor]] = {}
        for optimizer in optimizers:
            state |= optimizer.state
        return dict(
            self._written(share, f"{share.name}.{key}", value)
            for share in self._writing()
            for key, value in state.get(share.owned, {}).items()
            if value.dim() or self.ranks.lead  # a number is written once
        )

    def _writing(self) -> list[Share]:
        """The shares of which this rank writes rows."""
        rank, world = self.ranks.rank, self.ranks.world
        cut = {s.name: rows_of(s.shape[0], rank, world) for s in self.shares}
        return [s for s in self.shares if cut[s.name][1] > cut[s.name][0]]

    def _written(self, share: Share, name: str, tensor: Tensor) -> tuple[str, Piece]:
        """Where all ranks hold all, each writes its rows of it."""
        if self.how != "ddp" or tensor.dim() == 0:
            return name, share.piece(tensor)
        start, stop = rows_of(share.shape[0], self.ranks.rank, self.ranks.world)
        row = math.prod(share.shape[1:])
        return name, Piece(tensor[start:stop], start * row, tuple(share.shape))

    def wanted(self) -> dict[str, Piece]:
        """The weights that this rank needs, to be read into."""
        if self.how == "fsdp":
            return {s.name: s.piece(s.owned.detach()) for s in self.shares}
        return {s.name: Piece(s.whole.detach(), 0, tuple(s.shape)) for s in self.shares}

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copy whole weights into what this rank has of them."""
        for s in self.shares:
            whole = weights[s.name]
            if self.how == "fsdp":
                s.owned.copy_(whole[s.start : s.stop])
            else:
                s.whole.copy_(whole)

    def wanted_moments(self, optimizers: Optimizers, there: Mapping[str, Spec]) -> dict[str, Piece]:
        """The moments that this rank needs of those that are `there`, made here to be read into."""
        owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
        shares = {s.name: s for s in self.shares}
        out = {}
        for full, spec in there.items():
            name, _, key = full.rpartition(".")
            share = shares[name]
            if share.owned in owner and share.has_rows:
                like = share.owned.detach()
                value = like.new_zeros(like.shape if spec.shape else (), dtype=spec.dtype)
                owner[share.owned].state[share.owned][key] = value
                out[full] = share.piece(value)
        return out


def recompute(model: Family) -> None:
    """Keep only what enters each block, and run it again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174). What is drawn is a function of keys, so that it is drawn alike again."""
    for block in model.blocks():
        block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., Tensor], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return run_twice(forward, *args, use_reentrant=False, preserve_rng_state=False)


def _shard(model: Family, precision: str, device: str, world: int) -> None:
    """FSDP2 over every block, and over what is left. Gradients are summed, in fp32.

    Blocks of matrices are gathered in the compute precision. Embeddings, head and scalars stay fp32
    and are cast where they are used, as without FSDP2: their gradients add up over many tokens. So
    do blocks with norms or biases, which meet what is fp32.
    """
    mesh = init_device_mesh(device, (world,))
    compute = torch.bfloat16 if precision == "bf16" else None
    for module in (*model.blocks(), model):
        vectors = any(p.dim() < 2 for p in module.parameters())
        policy = MixedPrecisionPolicy(
            param_dtype=None if module is model or vectors else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows nothing else


def _local(tensor: Any) -> Tensor:
    """This rank's rows of one of FSDP2's tensors."""
    rows: Tensor = tensor.detach().to_local()
    return rows


# ---------------------------------------------------------------- over the wire


def _buckets(shares: Sequence[Share]) -> Iterator[list[Share]]:
    """Shares in the order in which backward passes end, as many as a bucket holds."""
    bucket: list[Share] = []
    held = 0
    for share in reversed(shares):
        if bucket and held + share.whole.numel() > BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(share)
        held += share.whole.numel()
    yield bucket


def _all_reduce(bucket: Sequence[Share]) -> None:
    grads = [s.whole.grad for s in bucket if s.whole.grad is not None]
    flat = torch.cat([g.view(-1) for g in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def _reduce_scatter(bucket: Sequence[Share], world: int) -> None:
    sizes = [_chunk(share, world) for share in bucket]
    flat = bucket[0].whole.new_zeros(world, sum(sizes))
    seen = [share for share in bucket if share.whole.grad is not None]  # the same on every rank
    for share, room in zip(bucket, torch.split(flat, sizes, 1), strict=True):
        if share.whole.grad is not None:
            for there, rows in _cut(room, share.whole.grad):
                there.copy_(rows)
            share.whole.grad = None
    mine = torch.empty_like(flat[0])
    reduce_scatter(mine, flat.view(-1))
    for share, rows in zip(bucket, torch.split(mine, sizes), strict=True):
        if share in seen:
            share.owned.grad = rows[: share.owned.numel()].view_as(share.owned)


def _all_gather(bucket: Sequence[Share], world: int) -> None:
    sizes = [_chunk(share, world) for share in bucket]
    flat = bucket[0].whole.new_empty(world, sum(sizes))
    mine = torch.zeros_like(flat[0])
    for share, room in zip(bucket, torch.split(mine, sizes), strict=True):
        room[: share.owned.numel()] = share.owned.view(-1)
    all_gather(flat.view(-1), mine)
    for share, room in zip(bucket, torch.split(flat, sizes, 1), strict=True):
        for there, rows in _cut(room, share.whole.data):
            rows.copy_(there)


def _chunk(share: Share, world: int) -> int:
    """Elements of the largest share of a parameter: the first rank's."""
    return rows_of(share.shape[0], 0, world)[1] * math.prod(share.shape[1:])


def _cut(room: Tensor, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(room, rows) for the rows of each rank; room is [world, largest share]."""
    world = len(room)
    if tensor.shape[0] % world == 0:
        yield room, tensor.view(world, -1)
        return
    for rank in range(world):
        start, stop = rows_of(tensor.shape[0], rank, world)
        rows = tensor[start:stop]
        yield room[rank, : rows.numel()].view_as(rows), rows

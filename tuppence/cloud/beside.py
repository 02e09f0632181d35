"""What a launch costs beside its machines: storage, and what crosses from one cloud to another.

storage   shards and kept checkpoints at the rate of the store's cloud, for as long as the run
          and at least a week; the machines' own disks where they are billed apart
egress    out of the store: shards and environment that machines of another cloud read, and the
          last checkpoint on its way home; into it: what they write, at their cloud's rate
"""

from collections.abc import Sequence

from tuppence.cloud.launch import Stage
from tuppence.cloud.store_made import cloud_of
from tuppence.config import DataPlan
from tuppence.plan.bill import KEPT_CHECKPOINTS, WRITE_BYTES_PER_SECOND, tokens_to_prepare
from tuppence.plan.options import Option
from tuppence.plan.prices import LOCAL, egress_usd_per_gb, storage_usd_per_gb_month
from tuppence.plan.stages import (
    GB,
    KEPT_AT_LEAST_MONTHS,
    MONTH,
    disks_usd,
    egress_usd,
    shard_bytes,
    storage_usd,
)

PACK_GB = 3.0  # the environment as one file: assumed


def beside(store: str, stages: Sequence[Stage], option: Option, data: DataPlan) -> dict[str, float]:
    """Dollars of `store` and `egress`, by the names of the plan's phases."""
    assert option.tokens is not None
    assert option.stages is not None
    tokens = tokens_to_prepare(data, option.tokens.mid)
    shards = shard_bytes(tokens, vocab_size=option.work.shape.vocab_size) / GB
    checkpoint = option.work.checkpoint_bytes / GB
    saves = option.stages.seconds["save"] * WRITE_BYTES_PER_SECOND / GB
    held = sum(stage.seconds for stage in stages)
    stored = storage_usd(
        shards + KEPT_CHECKPOINTS * checkpoint,
        months=max(held / MONTH, KEPT_AT_LEAST_MONTHS),
        usd_per_gb_month=storage_usd_per_gb_month(cloud_of(store)).usd,
    )
    stored += sum(disks_usd(s.machines[0].cloud, s.seconds, s.nodes) for s in stages)
    out = checkpoint
    into = 0.0
    for number, stage in enumerate(stages):
        cloud = stage.machines[0].cloud
        if cloud_of(store) in (LOCAL, cloud):
            continue
        out += _read(stage, shards, checkpoint, packed=number > 0) * stage.nodes
        into += _egress(cloud, _written(stage, shards, saves))
    return {"store": stored, "egress": _egress(cloud_of(store), out) + into}


def _read(stage: Stage, shards: float, checkpoint: float, *, packed: bool) -> float:
    """Gigabytes that one machine reads of the store; a later stage finds the environment there."""
    read = PACK_GB if packed else 0.0
    if "train" in stage.does and "prepare" not in stage.does:
        read += shards
    return read + (checkpoint if stage.does == ("eval",) else 0.0)


def _written(stage: Stage, shards: float, saves: float) -> float:
    return (shards if "prepare" in stage.does else 0.0) + (saves if "train" in stage.does else 0.0)


def _egress(cloud: str, gigabytes: float) -> float:
    return egress_usd(gigabytes, usd_per_gb=egress_usd_per_gb(cloud).usd)

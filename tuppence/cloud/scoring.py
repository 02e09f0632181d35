"""What it costs to have a trained model judged: on the training machine, or on one with one GPU.

    seconds = tokens x FLOPs of a forward pass / (share of the card's fp32 peak x GPUs)

`tuppence eval` asks in fp32, where a large card is hardly faster than a small one: an hour of one
GPU can do what an hour of eight need not be paid for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tuppence.config import DataPlan, nearest
from tuppence.errors import UserError
from tuppence.plan.gpus import find_gpu
from tuppence.plan.job import Gpu
from tuppence.plan.market import Seller
from tuppence.plan.options import Option
from tuppence.plan.stages import INSTALL_SECONDS, PROVISION_SECONDS
from tuppence.plan.tasks import Priced, priced

HARNESS = "lm_eval:"
NAMES = ("bpb", "core", "hellaswag", "sample")
SHARE = 0.4  # of the sheet's fp32 without tensor cores that passes over short texts reach: assumed
STARTING_SECONDS = 60.0  # weights to the GPU, texts to ids: assumed
SAMPLES_SECONDS = 60.0  # fixed prompts continued: assumed
WEIGHT_BYTES, BESIDE_GIB = 4, 4.0  # fp32; logits and the context's activations: assumed


@dataclass(frozen=True)
class Judged:
    """One way to have it done: seconds and dollars from boot to end."""

    seller: Seller
    seconds: float
    usd: float


def names_of(tasks: str) -> tuple[str, ...]:
    """The tasks that `eval --tasks` is told. Raises UserError for one that there is not."""
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    for name in names:
        if name not in NAMES and not name.startswith(HARNESS):
            raise UserError(f"--tasks {name}{nearest(name, [*NAMES, 'lm_eval:TASK'])}")
    if not names:
        raise UserError("--tasks names no task: bpb, core, hellaswag, sample or lm_eval:TASK")
    return names


def tokens_of(tasks: str, data: DataPlan, *, context: int) -> float:
    """Tokens that a model reads to answer them; a task of the harness counts as HellaSwag does."""
    every = names_of(tasks)
    read = {
        "bpb": float(data.val_tokens),
        "core": _suite(priced("core"), data, context),
        "hellaswag": _suite(priced("hellaswag"), data, context),
        "sample": 0.0,
    }
    return sum(read.get(name, read["hellaswag"]) for name in every)


def here(option: Option, data: DataPlan, tasks: str, *, alone: bool) -> Judged:
    """On the training machines, where all GPUs share the work; `alone`: booted for it."""
    seller, cards = option.seller, option.seller.offer.gpu_count * option.nodes
    seconds = _seconds(option, option.gpu, data, tasks, cards=cards) + _boot(alone)
    return Judged(seller, seconds, seconds / 3600 * seller.usd_per_hour * option.nodes)


def on_one_gpu(
    option: Option, data: DataPlan, tasks: str, sellers: Sequence[Seller]
) -> tuple[Judged, ...]:
    """On a machine of its own with one GPU that holds the model, the cheapest first."""
    needed = option.work.shape.params * WEIGHT_BYTES / 2**30 + BESIDE_GIB
    found = []
    for seller in sellers:
        offer = seller.offer
        if offer.gpu is None or offer.gpu_count != 1:
            continue
        gpu = find_gpu(offer.gpu)
        if gpu.memory_gib >= needed and gpu.vector_tflops:
            seconds = _seconds(option, gpu, data, tasks, cards=1) + _boot(True)
            found.append(Judged(seller, seconds, seconds / 3600 * seller.usd_per_hour))
    return tuple(sorted(found, key=lambda judged: judged.usd))


def _suite(tasks: Sequence[Priced], data: DataPlan, context: int) -> float:
    return sum(task.items * task.tokens(data.bytes_per_token, context) for task in tasks)


def _seconds(option: Option, gpu: Gpu, data: DataPlan, tasks: str, *, cards: int) -> float:
    shape = option.work.shape
    tokens = tokens_of(tasks, data, context=shape.sequence_len)
    rate = SHARE * gpu.vector_tflops * 1e12 * cards / (shape.flops_per_token / 3)
    samples = SAMPLES_SECONDS if "sample" in names_of(tasks) else 0.0
    return STARTING_SECONDS + samples + tokens / rate


def _boot(alone: bool) -> float:
    return PROVISION_SECONDS + INSTALL_SECONDS if alone else 0.0

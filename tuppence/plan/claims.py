"""A figure of a published guide beside arithmetic, and the arithmetic that guides are judged by."""

from dataclasses import dataclass

from tuppence.plan.cost import Shape
from tuppence.plan.job import Gpu

FIXED_MFU = 0.4  # of the data sheet: the premise that the second guide's hours are judged by


@dataclass(frozen=True)
class Claim:
    """One figure of a guide. `code` is None where arithmetic agrees."""

    what: str
    unit: str
    said: float | None
    as_published: float | None
    arithmetic: float
    why: str
    code: str | None = None


@dataclass(frozen=True)
class Guide:
    """A published guide, by the number and the recipe that stand for it here."""

    recipe: str
    title: str
    claims: tuple[Claim, ...]


def mfu_hours(shape: Shape, gpu: Gpu, gpu_count: int, tokens: float, *, precision: str) -> float:
    """Hours of `tokens` at FIXED_MFU of the data sheet's peak."""
    rate = FIXED_MFU * gpu.sheet_tflops[precision] * 1e12 * gpu_count / shape.flops_per_token
    return tokens / rate / 3600


def implied_share(
    shape: Shape, gpu: Gpu, gpu_count: int, tokens: float, hours: float, *, precision: str
) -> float:
    """The share of the data sheet's peak that so many tokens in so many hours need."""
    flops = shape.flops_per_token * tokens / (hours * 3600)
    return flops / (gpu.sheet_tflops[precision] * 1e12 * gpu_count)


def depth_of(params: float) -> float:
    """The dial (width 64 x depth) whose matrices hold `params` weights: 12 L (64 L)^2."""
    return float((params / (12 * 64**2)) ** (1 / 3))

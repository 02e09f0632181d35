"""The learning rate as a pure function of progress, the spent fraction of the budget.

cosine   /‾‾\\___     warm up, then half a cosine down to the floor
wsd      /‾‾‾‾‾\\     warm up, stay, then straight down (Hu et al. 2024, arXiv:2404.06395)
"""

import math

from tuppence.config import SchedulePlan


def factor(progress: float, schedule: SchedulePlan) -> float:
    """What to multiply the peak learning rate by; progress 1 is the last step, at the floor."""
    if progress >= 1:
        return schedule.floor
    if progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.shape == "cosine":
        done = (progress - schedule.warmup) / (1 - schedule.warmup)
        return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))
    assert schedule.shape == "wsd", schedule.shape
    left = (1 - progress) / schedule.decay if schedule.decay > 0 else 1.0
    return schedule.floor + (1 - schedule.floor) * min(1.0, left)

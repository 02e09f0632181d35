"""Randomness that can be replayed: functions of a key and a place, not of what was drawn before.

A generator's numbers depend on everything drawn before them: a resumed run, another micro-batch or
another number of processes would draw others. Shapes: B sequences, T positions, D channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What one training pass draws: an int64 key per sequence, from (seed, step, place in the
    global batch), and for a looped model the iterations of this step."""

    key_B: Tensor | None = None
    recurrence: int | None = None


class Dropout:
    """Dropout whose mask is a pure function of a key per sequence, a counter of sites and a place.

    Each call is the next site of the network. Without keys, or with rate 0, it does nothing.
    """

    def __init__(self, rate: float, key_B: Tensor | None) -> None:
        self.rate, self.key_B, self.site = rate, key_B, 0

    def at(self, site: int) -> "Dropout":
        """The same one with so many sites behind it: what runs again draws again what it drew."""
        there = Dropout(self.rate, self.key_B)
        there.site = site
        return there

    def __call__(self, x_B: Tensor) -> Tensor:
        if self.key_B is None or self.rate == 0:
            return x_B
        self.site += 1
        key_B1 = hash32(self.key_B + 0x9E3779B1 * self.site)[:, None]
        place_N = torch.arange(x_B[0].numel(), device=x_B.device, dtype=torch.int64)
        kept = hash32(key_B1 ^ place_N[None]) >= int(self.rate * 2**32)
        return x_B * kept.view(x_B.shape).to(x_B.dtype) / (1 - self.rate)


def keyed_normal(key_B: Tensor, start: int, positions: int, channels: int) -> Tensor:
    """Standard normal [B, T, D] of positions `start` on: a function of key, position and channel.

    Box and Muller 1958: two uniforms, the halves of one hash each, make two normals.
    """
    pairs = positions * channels // 2
    place_N = torch.arange(pairs, device=key_B.device) + start * channels // 2
    first = hash32(hash32(key_B)[:, None] ^ place_N[None])
    second = hash32(first + 0x9E3779B1)
    radius = torch.sqrt(-2 * torch.log((first.float() + 1) / (2**32 + 1)))
    angle = second.float() * (2 * math.pi / 2**32)
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return both.view(len(key_B), positions, channels)


def hash32(x: Tensor) -> Tensor:
    """A bijective mix of the low 32 bits of an int64 tensor (two multiply-xorshift rounds).

    Constants: "lowbias32", Wellons, Prospecting for Hash Functions (2018).
    """
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)

"""A random order of 0 ... n-1 whose i-th element is computed, not stored.

A Feistel network is a bijection of [0, 2^bits) whatever its round function; walking the cycle
until the value falls below n makes it one of [0, n) (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). With 2^bits < 2n a value walks two steps on average. Memory: that of the
values asked for.

    left ^= F(right, key, round);  right ^= F(left, key, round + 1);  ...  until left|right < n
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_ROUNDS = 6


def key_of(*parts: int | str) -> int:
    """64 bits that depend on all the parts."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def mix(values: U64) -> U64:
    """A bijection of 64-bit words that scatters neighbours (splitmix64's finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permuted(indices: U64, *, n: int, keys: U64) -> U64:
    """Where each index in [0, n) goes; `keys` has one per index, each its own permutation."""
    assert n > 0
    bits = max(2, (n - 1).bit_length())
    found = _feistel(indices, keys, bits=bits)
    outside = np.flatnonzero(found >= n)
    while outside.size:
        walked = _feistel(found[outside], keys[outside], bits=bits)
        found[outside] = walked
        outside = outside[walked >= n]
    return found


def _feistel(values: U64, keys: U64, *, bits: int) -> U64:
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for turn in range(0, _ROUNDS, 2):
        low = low ^ (mix(high + mix(keys + np.uint64(turn))) & low_mask)
        high = high ^ (mix(low + mix(keys + np.uint64(turn + 1))) & high_mask)
    return (high << low_bits) | low

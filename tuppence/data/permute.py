"""Random orders of 0 ... n-1 whose i-th element is computed, not stored.

A Feistel network is a bijection of [0, 2^bits) whatever its round function; walking the cycle
until the value falls below n makes it one of [0, n) (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). With 2^bits < 2n a value walks two steps on average. Memory: that of the
values asked for.

    left ^= F(right, key, round);  right ^= F(left, key, round + 1);  ...  until left|right < n

`Order` is random at two scales, so that what is needed soon is known, and little:

    0 ........ | ......... | ......... | .. n-1      blocks of neighbours, the last may be short
    an epoch visits the blocks in one random order, and each block's own elements in another
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

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


@dataclass(frozen=True)
class Visit:
    """A block's turn: the samples `first` ... `end - 1` of a run are its elements `low` ...
    `high - 1`, each once."""

    epoch: int
    first: int
    end: int
    low: int
    high: int


class Order:
    """Epoch after epoch each of 0 ... n-1 once, block by block; with one block it is one
    permutation of all."""

    def __init__(self, n: int, *, block: int, key: int) -> None:
        assert n > 0, n
        assert block > 0, block
        self.n, self.block = n, min(n, block)
        self.n_blocks = -(-n // self.block)
        self._key = key
        self._visits: tuple[int, Indices, Indices] | None = None

    def keys(self, epochs: U64) -> U64:
        """What each epoch draws from."""
        return mix(epochs + np.uint64(self._key))

    def at(self, samples: U64) -> U64:
        """The element that each sample of a run is."""
        epochs, places = np.divmod(samples, np.uint64(self.n))
        blocks, insides = self._inside(epochs, places)
        keys = self.keys(epochs) ^ mix(blocks)  # block 0 has the epoch's own: mix(0) is 0
        last = blocks == np.uint64(self.n_blocks - 1)
        found = np.empty_like(samples)
        for some, size in ((~last, self.block), (last, self._size_of_last)):
            if some.any():
                found[some] = permuted(insides[some], n=size, keys=keys[some])
        return blocks * np.uint64(self.block) + found

    def visit(self, sample: int) -> Visit:
        """The block's turn that a sample falls into."""
        epoch, place = divmod(sample, self.n)
        blocks, ends = self._epoch(epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        low = int(blocks[turn]) * self.block
        high = min(low + self.block, self.n)
        end = epoch * self.n + int(ends[turn])
        return Visit(epoch, end - (high - low), end, low, high)

    @property
    def _size_of_last(self) -> int:
        return self.n - (self.n_blocks - 1) * self.block

    def _inside(self, epochs: U64, places: U64) -> tuple[U64, U64]:
        """The block that each place of an epoch falls into, and where inside it."""
        if self.n_blocks == 1:
            return np.zeros_like(places), places
        found, insides = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            blocks, ends = self._epoch(epoch)
            turns = np.searchsorted(ends, places[here].astype(np.int64), side="right")
            begins = np.concatenate(([0], ends[:-1]))
            found[here] = blocks[turns]
            insides[here] = places[here] - begins[turns].astype(np.uint64)
        return found, insides

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """An epoch's blocks in the order of their turns, and the places where the turns end."""
        if self._visits is None or self._visits[0] != epoch:
            key = self.keys(np.array([epoch], dtype=np.uint64)) ^ np.uint64(key_of("blocks"))
            turns = np.arange(self.n_blocks, dtype=np.uint64)
            keys = np.repeat(key, self.n_blocks)
            blocks = permuted(turns, n=self.n_blocks, keys=keys).astype(np.int64)
            sizes = np.where(blocks == self.n_blocks - 1, self._size_of_last, self.block)
            self._visits = epoch, blocks, np.cumsum(sizes)
        return self._visits[1], self._visits[2]

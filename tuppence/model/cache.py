"""Keys and values of positions that a model has seen, so that the next one costs one position.

Shapes: T new positions, S positions so far, K channels of a head; what stands before them
(sequences, heads) is the family's own.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class _Kept:
    """Keys and values [.., .., positions, K] of one executed layer; the first `length` are real."""

    k: Tensor
    v: Tensor
    length: int


class Cache:
    """Keys and values of each executed layer, kept as positions come, for up to `positions`.

    `length` counts the positions that the whole model has seen; layers are numbered as executed,
    so that a looped model has one for every block of every iteration.
    """

    def __init__(self, positions: int) -> None:
        self.positions, self.length = positions, 0
        self._layers: dict[int, _Kept] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values [.., .., T, K]; returns all it has, [.., .., S, K]."""
        if layer not in self._layers:
            room = (*k.shape[:2], self.positions, k.shape[3])
            self._layers[layer] = _Kept(k.new_zeros(room), v.new_zeros(room), 0)
        kept = self._layers[layer]
        start, kept.length = kept.length, kept.length + k.shape[2]
        assert kept.length <= self.positions, f"a cache of {self.positions} positions is full"
        kept.k[:, :, start : kept.length] = k
        kept.v[:, :, start : kept.length] = v
        return kept.k[:, :, : kept.length], kept.v[:, :, : kept.length]

    def seen(self, layer: int) -> int:
        """How many positions a layer has kept."""
        return self._layers[layer].length if layer in self._layers else 0

    def rewind(self, layer: int, positions: int) -> None:
        """Forget a layer's last positions."""
        if layer in self._layers:
            self._layers[layer].length -= positions

    def repeat(self, layer: int, like: int, positions: int) -> None:
        """Give `layer` the last positions of the layer `like`."""
        kept = self._layers[like]
        last = slice(kept.length - positions, kept.length)
        self.extend(layer, kept.k[:, :, last], kept.v[:, :, last])

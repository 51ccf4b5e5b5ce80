"""Levels at equal steps: rounding to the nearest of a symmetric grid, by tensor, by row or by group."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.packed import Array, Packed, Reshaped, narrowed, ungrouped
from tersenet.packed import Uniform as UniformNode


@dataclass(frozen=True)
class Uniform:
    """Round to 2^bits - 1 levels around 0; the largest |w| of the tensor, or of each row, is the last level.

    With `group` each run of so many neighbours in a row has its own step, where the row divides into such runs.
    """

    bits: int = 8
    by_row: bool = False
    group: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (UniformNode, Reshaped)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError("Uniform takes 2 to 16 bits")
        if self.group is not None and self.group < 2:
            raise ValueError("Uniform takes groups of at least 2 neighbours")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w = np.asarray(w, np.float32)
        if self.group is not None and w.ndim > 1 and math.prod(w.shape[1:]) % self.group == 0:
            return self._grouped(w, self.group)
        axes = tuple(range(1, w.ndim)) if self.by_row and w.ndim > 1 else None
        step = self._step(np.abs(w).max(axis=axes, keepdims=axes is not None))
        return UniformNode(self._levels(w, step), step)

    def _grouped(self, w: Array, group: int) -> Packed:
        flat = w.reshape(len(w), -1)
        step = self._step(np.abs(flat).reshape(len(w), -1, group).max(2, initial=0))
        node = UniformNode(self._levels(flat, ungrouped(step, flat.shape)), step)
        if w.ndim == 2:
            return node
        return Reshaped(node, w.shape, tuple(range(w.ndim)), w.shape)

    def _step(self, top: Array) -> Array:
        step = top / (2 ** (self.bits - 1) - 1)
        return np.where(step > 0, step, 1).astype(np.float32)

    def _levels(self, w: Array, step: Array) -> Array:
        return narrowed(np.rint(w.astype(np.float64) / step).astype(np.int32))

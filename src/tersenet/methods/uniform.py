"""Levels at equal steps: rounding to the nearest of a symmetric grid, by tensor or by row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.packed import Array, Packed, narrowed
from tersenet.packed import Uniform as UniformNode


@dataclass(frozen=True)
class Uniform:
    """Round to 2^bits - 1 levels around 0; the largest |w| of the tensor, or of each row, is the last level."""

    bits: int = 8
    by_row: bool = False
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (UniformNode,)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError("Uniform takes 2 to 16 bits")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w = np.asarray(w, np.float32)
        axes = tuple(range(1, w.ndim)) if self.by_row and w.ndim > 1 else None
        top = np.abs(w).max(axis=axes, keepdims=axes is not None) / (2 ** (self.bits - 1) - 1)
        step = np.where(top > 0, top, 1).astype(np.float32)
        q = np.rint(w.astype(np.float64) / step)
        return UniformNode(narrowed(q.astype(np.int32)), step)

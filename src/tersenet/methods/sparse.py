"""Which weights stay: magnitude (LeCun, Denker, Solla 1990 call it the simplest saliency; Han et al. 2015)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.packed import Array, Packed, Sparse


def largest(saliency: Array, count: int) -> Array:
    """A mask of exactly `count` places with the largest saliency; among equals the earlier place stays.

    >>> largest(np.array([1.0, 3.0, 1.0, 2.0]), 3).tolist()
    [True, True, False, True]
    """
    flat = np.asarray(saliency).reshape(-1)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return mask.reshape(np.shape(saliency))


def kept_count(density: float, size: int) -> int:
    """How many of `size` weights a density keeps: the nearest, at least one."""
    return min(size, max(1, math.floor(density * size + 0.5)))


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest |w| of a tensor, to a density in (0, 1]."""

    density: float = 0.1
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Sparse,)

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w = np.asarray(w)
        mask = largest(np.abs(w), kept_count(self.density, w.size))
        return Sparse(mask, w[mask])

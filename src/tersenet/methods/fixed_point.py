"""Fixed point and few levels: dynamic Qm.f, ternary weights with one scale, powers of two.

Dynamic fixed point shares the place of the binary point among the values of a tensor: b bits, of which f = b - 1 -
ceil(log2 max |x|) lie behind it, rounded half to even and saturated (Gysel et al. 2018). Ternary weights: Li, Zhang,
Liu (2016), equations 5 and 6. Powers of two: Zhou et al. (2017), equations 1 to 4.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.methods.kmeans import shared
from tersenet.packed import Array, Codebook, Packed, Uniform, narrowed

THRESHOLD = 0.7  # of the mean |w|: under it a ternary weight is zero


@dataclass(frozen=True)
class FixedPoint:
    """Levels of `bits` bits, sign and all, at steps of a power of two that the largest |w| sets."""

    bits: int = 8
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Uniform,)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError("FixedPoint takes 2 to 16 bits")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w = np.asarray(w)
        step = 2.0 ** -fraction(w, self.bits)
        last = 2 ** (self.bits - 1)
        q = np.clip(np.rint(w.astype(np.float64) / step), -last, last - 1)
        return Uniform(narrowed(q.astype(np.int32)), np.asarray(step, np.float32))


def fraction(values: Array, bits: int) -> int:
    """How many of the bits lie behind the binary point: fewer than none for large values.

    >>> fraction(np.array([0.9, -0.3]), 8), fraction(np.array([200.0]), 8)
    (7, -1)
    """
    return binary_point(float(np.abs(values).max(initial=0)), bits)


def binary_point(top: float, bits: int) -> int:
    """The same for values up to `top`."""
    return bits - 1 - (max(-100, math.ceil(math.log2(top))) if top > 0 else 0)


@dataclass(frozen=True)
class Ternary:
    """-s, 0 and s: zero under 0.7 of the mean |w|, s the mean |w| of what is above; of the tensor, or of each row."""

    by_row: bool = False
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Uniform,)

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w = np.asarray(w)
        axes = tuple(range(1, w.ndim)) if self.by_row and w.ndim > 1 else None
        size = np.abs(w.astype(np.float64))
        above = size > THRESHOLD * size.mean(axes, keepdims=axes is not None)
        count = np.maximum(above.sum(axes, keepdims=axes is not None), 1)
        scale = (size * above).sum(axes, keepdims=axes is not None) / count
        return Uniform((np.sign(w) * above).astype(np.int8), np.asarray(np.where(scale > 0, scale, 1), np.float32))


@dataclass(frozen=True)
class PowersOfTwo:
    """0 and plus and minus 2^(bits - 2) powers of two, from the largest |w| down; zero takes one code of `bits`."""

    bits: int = 5
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Codebook,)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 6:
            raise ValueError("PowersOfTwo takes 2 to 6 bits")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w = np.asarray(w, np.float32)
        return shared(w, *powers(float(np.abs(w).max(initial=0)), self.bits))


def powers(top: float, bits: int) -> tuple[Array, Array]:
    """The values that weights up to `top` may take, ascending, float32, and the cuts between their ranges.

    A weight takes the power p where it lies from 3/4 of p to 3/2 of p; the largest power is the last not above 4/3 of
    `top`, and under the smallest one's range there is zero.
    """
    last = math.floor(math.log2(4 * top / 3)) if top > 0 else 0
    sizes = 2.0 ** np.arange(last - 2 ** (bits - 2) + 1, last + 1)
    cuts = np.concatenate([[sizes[0] / 2], 0.75 * sizes[1:]])
    values = np.concatenate([-sizes[::-1], [0.0], sizes]).astype(np.float32)
    return values, np.concatenate([-cuts[::-1], cuts])

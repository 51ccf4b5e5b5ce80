"""The DCT of spatial kernels, chained before quantization (transform coding: Laude, Richter, Ostermann 2018).

The transform is applied to the kernel alone, never across channels, whose order means nothing, unless blocks are asked
for, as the paper has them for dense layers. It is orthonormal, so squared errors stay what they are. Together with
waterfilled steps it saves about a quarter of a bit per weight; with one step for all columns it costs accuracy, so the
two belong together.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.packed import Array, Packed, Reshaped, Transformed, kernel_dct

LARGEST, LONGEST = 256, 64  # places in a kernel, and along one side of it, beyond which transforming costs too much


def spatial(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape, [outputs, inputs, height, width], has kernels that a DCT can act on."""
    return len(shape) == 4 and 1 < shape[2] * shape[3] <= LARGEST and max(shape[2:]) <= LONGEST


@dataclass(frozen=True)
class KernelDCT:
    """The DCT-II of each kernel of a convolution; with `block`, of blocks of so many rows and columns elsewhere.

    What has neither kernels nor whole blocks of at least two by two is left as it is.
    """

    block: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Transformed, Reshaped)

    def __post_init__(self) -> None:
        if self.block is not None and not 2 <= self.block <= LONGEST:
            raise ValueError(f"KernelDCT takes blocks of 2 to {LONGEST} rows and columns")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed | Array:
        w = np.asarray(w)
        if spatial(w.shape):
            return Transformed(_transformed(w))
        if self.block is None or w.ndim < 2 or w.size != w.shape[0] * w.shape[1]:
            return w
        m, n = w.shape[:2]
        height, width = (max(k for k in range(1, self.block + 1) if extent % k == 0) for extent in (m, n))
        if min(height, width) < 2:
            return w
        split, axes = (m // height, height, n // width, width), (0, 2, 1, 3)
        blocks = np.ascontiguousarray(w.reshape(split).transpose(axes))
        return Reshaped(Transformed(_transformed(blocks)), split, axes, w.shape)


def _transformed(w: Array) -> Array:
    matrix = kernel_dct(*w.shape[2:])
    return (w.reshape(-1, len(matrix)) @ matrix.T).reshape(w.shape).astype(np.float32)

"""Waterfilled quantization with error feedback: the level of each weight is chosen knowing the errors made before it.

With A = L L^T the second moment of a layer's inputs, columns are quantized from the last to the first and each adjusts
to the errors of those after it (GPTQ, Frantar et al. 2023; the same recursion as Babai's nearest plane). Every column
has the same step in whitened units, step_j = c / L_jj, as reverse water-filling asks (WaterSIC, Lifar et al. 2026), on
a grid of 2^(1/2). Rows have their own factor on the same grid. Levels are chosen by distortion plus rate (RDOQ, as in
DeepCABAC and CERWU, Conzel et al. 2025), the rate being that of a rounded Laplace variable of the column's mean.
Where we differ: rows of all layers share one global c in the Fisher metric, so c alone sets the size of the network.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersenet.packed import Array, Packed, Transformed, Uniform, narrowed

BLOCK = 64
HIGHEST = 32767.0


@dataclass(frozen=True)
class Metric:
    """What an error in a layer's weights costs: L [groups, n, n] lower Cholesky factors of A, weight of each row.

    The cost of an error E [groups, rows, n] is half the sum of `rows` times the squared rows of E L. Where nothing is
    known of the inputs, `factor` is None and L the identity.
    """

    factor: Tensor | None
    rows: Tensor  # [groups, rows of a group]


@dataclass(frozen=True)
class Steps:
    """Step sizes of a layer: scale * 2^((row + channel + frequency) / 2), all exponents int8.

    A column is an input channel and a place in its kernel. Its exponent is the sum of the channel's and the place's,
    which costs far less to send than one for each column and, on the tried networks, loses nothing.
    """

    scale: float
    rows: Array  # [groups, rows of a group]
    channels: Array  # [channels, 1]
    places: Array  # [1, places]

    def dense(self) -> Tensor:
        columns = (self.channels.astype(np.float64) + self.places).reshape(-1)
        return torch.from_numpy(self.scale * 2.0 ** ((self.rows[..., None] + columns) / 2))


def waterfilled(metric: Metric, c: float, places: int) -> Steps:
    """Steps at which each level interval costs about c^2 / 12 in the metric, whatever its row and column.

    `places` is how many columns belong to one input channel: the size of the kernel.
    """
    if metric.factor is None:
        diagonal, places = np.ones((1, 1)), 1  # one step for all columns of a row
    else:
        diagonal = metric.factor.diagonal(dim1=1, dim2=2).numpy()
    group = np.exp(np.log(diagonal).mean(1, keepdims=True))  # [groups, 1]: a group's own scale goes to its rows
    columns = -2 * np.log2(diagonal / group).mean(0).reshape(-1, places)
    channels = np.rint(columns.mean(1, keepdims=True))
    rows = 1 / (np.sqrt(metric.rows.numpy()) * group)
    middle = math.exp(float(np.log(rows).mean()))
    found = (np.rint(2 * np.log2(rows / middle)), channels, np.rint((columns - channels).mean(0, keepdims=True)))
    clipped = [np.clip(part, -40, 40).astype(np.int8) for part in found]
    scale = float(np.float16(c * middle)) if 1e-4 < c * middle < 6e4 else float(np.float32(c * middle))
    return Steps(scale, *clipped)


def levels(w: Tensor, metric: Metric, steps: Tensor, rate: float) -> Tensor:
    """Integers [groups, rows, n] for weights of that shape, with error feedback; `rate` weighs bits against distortion.

    At `rate` 1 a bit is worth what it is worth at high rate: step^2 ln 2 / 6. With a diagonal factor and `rate` 0 this
    is rounding.
    """
    factor, n = metric.factor, w.shape[2]
    price = rate * math.log(2) / 6
    if factor is None:
        return chosen(w / steps, price)
    whitened = w @ factor
    q = torch.zeros_like(w)
    for end in range(n, 0, -BLOCK):
        begin = max(0, end - BLOCK)
        inside = factor[:, begin:end, begin:end]
        part = whitened[:, :, begin:end].clone()
        for j in range(end - 1, begin - 1, -1):
            k, step = j - begin, steps[:, :, j]
            x = part[:, :, k] / inside[:, k, k, None] / step
            q[:, :, j] = chosen(x, price)
            part[:, :, : k + 1] -= (q[:, :, j] * step)[..., None] * inside[:, k, None, : k + 1]
        if begin:
            whitened[:, :, :begin] -= (q * steps)[:, :, begin:end] @ factor[:, begin:end, :begin]
    return q


def chosen(x: Tensor, price: float) -> Tensor:
    """The level of each value: the nearest, or the next towards zero where the bits it saves are worth the error."""
    near = torch.round(x).clamp(-HIGHEST, HIGHEST)
    if price == 0:
        return near
    size = near.abs()
    mean = x.abs().mean(dim=1, keepdim=True).clamp_min(1e-3)
    significant = ((1 + 4 * mean * mean).sqrt() - 1) / (2 * mean)
    decay = (significant * significant).clamp(0.02, 0.98)
    step_bits = -torch.log2(decay)  # from k to k + 1, k >= 1
    first_bits = torch.log2((1 - significant) / (significant * (1 - decay))) + 1  # from 0 to 1, with its sign
    saved = torch.where(size > 1, step_bits, first_bits.clamp_min(0))
    lower = size - 1
    worse = (x.abs() - lower) ** 2 - (x.abs() - size) ** 2
    down = (size > 0) & (worse < price * saved)
    return torch.where(down, near - near.sign(), near)


def tree_of(q: Tensor, steps: Steps, shape: tuple[int, ...], transformed: bool) -> Packed:
    """The tree of a layer's levels: `Uniform` with row and column steps, under a `Transformed` where it is a DCT."""
    single = (1,) * (len(shape) - 1)
    kernel = shape[2:] if steps.places.size > 1 else (1,) * len(shape[2:])
    channels = steps.channels.reshape(1, -1, *single[1:])
    places = steps.places.reshape(1, 1, *kernel) if len(shape) > 2 else steps.places
    levels_ = narrowed(q.numpy().astype(np.int32).reshape(shape))
    parts = tuple(part for part in (steps.rows.reshape(shape[0], *single), channels, places) if part.any())
    node = Uniform(levels_, np.array(steps.scale, np.float32), None, parts)
    return Transformed(node) if transformed else node

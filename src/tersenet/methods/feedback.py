"""Waterfilled quantization with error feedback: each level is chosen knowing the errors made before it.

An error E of a layer's weights costs |R^T E L|^2, where L L^T = A is the second moment of the layer's inputs and
R R^T = G that of the gradients at its outputs. Columns are quantized from the last to the first and, in each, rows
likewise; every level makes up for what those before it added to its coordinate (Babai's nearest plane; for A alone this
is GPTQ, Frantar et al. 2023, with G as well YAQA, Tseng et al. 2025). Every coordinate has the same step in whitened
units, step_ij = c / (R_ii L_jj), as reverse water-filling asks (WaterSIC, Lifar et al. 2026), on a grid of 2^(1/2).
Levels are chosen by distortion plus rate (RDOQ, as in DeepCABAC and CERWU, Conzel et al. 2025), the rate being that of
a rounded Laplace variable of the column's mean. Where we differ: all layers share one global c, so that c alone sets
the size of the network.
"""

import math
from dataclasses import dataclass

import numpy as np

from tersenet.methods.recursion import MEANS, Recursion
from tersenet.packed import Array, Packed, Transformed, Uniform, narrowed


@dataclass(frozen=True)
class Metric:
    """What an error in a layer's weights costs: lower Cholesky factors of A and of G, in float64.

    Where nothing is known of the inputs, `inputs` is None and A the identity. `outputs` is [groups, rows, rows], or the
    factor's diagonal [groups, rows] where nothing else of it is known.
    """

    inputs: Array | None  # [groups, n, n]
    outputs: Array

    def rows(self) -> Array:
        """The diagonal [groups, rows] of the outputs' factor."""
        diagonal: Array = self.outputs if self.outputs.ndim == 2 else np.diagonal(self.outputs, axis1=1, axis2=2)
        return diagonal

    def cost(self, errors: Array) -> float:
        """|R^T E L|^2 of errors [groups, rows, n], summed over the groups."""
        turned = errors if self.inputs is None else errors @ self.inputs
        across = (
            self.outputs[..., None] * turned if self.outputs.ndim == 2 else self.outputs.transpose(0, 2, 1) @ turned
        )
        return float(np.square(across).sum())


@dataclass(frozen=True)
class Steps:
    """Step sizes of a layer: scale * 2^((row + channel + place) / 2), all exponents int8.

    A column is an input channel and a place in its kernel. Its exponent is the sum of the channel's and the place's,
    which costs far less to send than one for each column and, on the tried networks, loses nothing.
    """

    scale: float
    rows: Array  # [groups, rows of a group]
    channels: Array  # [channels, 1]
    places: Array  # [1, places]

    def parts(self) -> tuple[Array, Array]:
        """What steps are products of: the rows' part with the scale, [groups, rows], and the columns', [n] or [1]."""
        columns = (self.channels.astype(np.float64) + self.places).reshape(-1)
        return self.scale * 2.0 ** (self.rows / 2), 2.0 ** (columns / 2)

    def dense(self) -> Array:
        """The step of every weight, [groups, rows, n]."""
        rows, columns = self.parts()
        return rows[..., None] * columns


def waterfilled(metric: Metric, c: float, places: int) -> Steps:
    """Steps at which each level interval costs about c^2 / 12 in the metric, whatever its row and column.

    `places` is how many columns belong to one input channel: the size of the kernel.
    """
    if metric.inputs is None:
        diagonal, places = np.ones((1, 1)), 1  # one step for all columns of a row
    else:
        diagonal = np.diagonal(metric.inputs, axis1=1, axis2=2)
    group = np.exp(np.log(diagonal).mean(1, keepdims=True))  # [groups, 1]: a group's own scale goes to its rows
    columns = -2 * np.log2(diagonal / group).mean(0).reshape(-1, places)
    channels = np.rint(columns.mean(1, keepdims=True))
    rows = 1 / (metric.rows() * group)
    middle = math.exp(float(np.log(rows).mean()))
    found = (np.rint(2 * np.log2(rows / middle)), channels, np.rint((columns - channels).mean(0, keepdims=True)))
    clipped = [np.clip(part, -40, 40).astype(np.int8) for part in found]
    scale = float(np.float16(c * middle)) if 1e-4 < c * middle < 6e4 else float(np.float32(c * middle))
    return Steps(scale, *clipped)


def levels(
    w: Array, metric: Metric, steps: tuple[Array, Array], rate: float, kept: Array | None = None, trellis: bool = False
) -> Array:
    """Integers [groups, rows, n] for weights of that shape, with error feedback; 0 where `kept` is not set.

    The step of a weight is the product of its row's, steps[0] [groups, rows], and its column's, steps[1] [n] or [1].
    `rate` weighs bits against distortion: at 1 a bit is worth what it is worth at high rate. With diagonal factors and
    `rate` 0 this is rounding. With `trellis` each row is a path through the trellis (`codecs/trellis.py`), in which
    nothing can be held at zero.
    """
    if trellis and kept is not None:
        raise ValueError("levels in a trellis cannot be held at zero")
    q = np.empty(w.shape, np.int32)
    for g, weights in enumerate(w):
        rows = metric.outputs[g] if metric.outputs.ndim == 3 else None
        columns = None if metric.inputs is None else metric.inputs[g]
        whitened = np.array(weights if rows is None else rows.T @ weights, np.float64)
        own = np.ones(len(weights)) if rows is None else np.diagonal(rows)
        column = np.array(np.broadcast_to(steps[1], weights.shape[1:]), np.float64)
        profile = (np.abs(whitened) / (own * steps[0][g])[:, None]).mean(0) / column
        weight = None
        if trellis:
            weight = np.square(column if columns is None else column * np.diagonal(columns))
            weight /= weight.mean()
        factors = [f if f is None else np.ascontiguousarray(f) for f in (rows, columns)]
        given = Recursion(
            factors[0],
            None if columns is None else np.ascontiguousarray(columns / np.diagonal(columns)),
            np.array(steps[0][g], np.float64),
            column,
            profile / max(float(profile.mean()), 1e-300),
            worths(rate) if trellis else thresholds(rate),
            weight,
            None if kept is None else np.ascontiguousarray(kept[g]),
        )
        q[g] = given.levels(whitened)
    return q


def thresholds(rate: float) -> Array:
    """[means, 8]: how far above k - 1/2 a size must be to become k, for k = 1 and for k > 1, at each of `MEANS`."""
    significant = (np.sqrt(1 + 4 * MEANS * MEANS) - 1) / (2 * MEANS)
    decay = np.clip(significant * significant, 0.02, 0.98)
    first_bits = np.log2((1 - significant) / (significant * (1 - decay))) + 1  # from 0 to 1, with its sign
    price, found = rate * math.log(2) / 12, np.zeros((len(MEANS), 8))
    found[:, 0], found[:, 1] = price * np.maximum(first_bits, 0), -price * np.log2(decay)
    return found


def worths(rate: float) -> Array:
    """[means, 8]: what the bits of the numbers 0, 1, 2 and of each further one are worth, for even levels, then odd.

    Of a Laplace variable at each of `MEANS`, in squared steps: the error of a trellis is 0.255 of them, and at rate 1 a
    bit is worth 2 ln 2 times the error.
    """
    decay = np.clip(np.exp(-1 / MEANS), 1e-3, 1 - 1e-3)  # from one step to the next
    log, most = np.log2(decay), np.log2(0.5 * (1 - decay * decay))
    even = [np.log2(1 - decay), log + most, 3 * log + most, 2 * log]
    odd = [np.log2(1 - np.sqrt(decay)), np.log2(0.5 * (np.sqrt(decay) - decay * decay)), 2 * log + most, 2 * log]
    return np.ascontiguousarray(-rate * 2 * math.log(2) * 0.255 * np.stack(even + odd, 1))


def tree_of(q: Array, steps: Steps, shape: tuple[int, ...], transformed: bool) -> Packed:
    """The tree of a layer's levels: `Uniform` with row and column steps, under a `Transformed` where it is a DCT."""
    single = (1,) * (len(shape) - 1)
    kernel = shape[2:] if steps.places.size > 1 else (1,) * len(shape[2:])
    channels = steps.channels.reshape(1, -1, *single[1:])
    places = steps.places.reshape(1, 1, *kernel) if len(shape) > 2 else steps.places
    levels_ = narrowed(q.reshape(shape))
    parts = tuple(part for part in (steps.rows.reshape(shape[0], *single), channels, places) if part.any())
    node = Uniform(levels_, np.array(steps.scale, np.float32), None, parts)
    return Transformed(node) if transformed else node

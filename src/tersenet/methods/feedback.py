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

import ctypes
import math
from dataclasses import dataclass

import numpy as np

from tersenet import native
from tersenet.packed import Array, Packed, Transformed, Uniform, narrowed

HIGHEST = 32767.0
MEANS = 2.0 ** ((np.arange(24) - 0.5) / 2) / 256  # mean sizes of the columns for which rates are tabled
EDGES = 2.0 ** (np.arange(23) / 2) / 256


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


def levels(w: Array, metric: Metric, steps: tuple[Array, Array], rate: float, kept: Array | None = None) -> Array:
    """Integers [groups, rows, n] for weights of that shape, with error feedback; 0 where `kept` is not set.

    The step of a weight is the product of its row's, steps[0] [groups, rows], and its column's, steps[1] [n] or [1].
    `rate` weighs bits against distortion: at 1 a bit is worth what it is worth at high rate, step^2 ln 2 / 6. With
    diagonal factors and `rate` 0 this is rounding.
    """
    one, more = thresholds(rate)
    if metric.inputs is None:
        x = w / (steps[0][..., None] * steps[1])
        return np.copysign(rounded(np.abs(x), np.abs(x).mean(axis=1, keepdims=True), one, more), x).astype(np.int32)
    q = np.empty(w.shape, np.int32)
    for g, inputs in enumerate(metric.inputs):
        whitened = np.ascontiguousarray((w[g] @ inputs).T)
        outputs = None
        if metric.outputs.ndim == 3:
            outputs = np.ascontiguousarray(metric.outputs[g] / np.diagonal(metric.outputs[g]))
        mask = None if kept is None else np.ascontiguousarray(kept[g].T)
        q[g] = _fed_back(whitened, np.ascontiguousarray(inputs), outputs, (steps[1], steps[0][g], one, more), mask).T
    return q


def thresholds(rate: float) -> tuple[Array, Array]:
    """How far above k - 1/2 a size must be to become k, for k = 1 and for k > 1, at each of `MEANS`."""
    significant = (np.sqrt(1 + 4 * MEANS * MEANS) - 1) / (2 * MEANS)
    decay = np.clip(significant * significant, 0.02, 0.98)
    first_bits = np.log2((1 - significant) / (significant * (1 - decay))) + 1  # from 0 to 1, with its sign
    price = rate * math.log(2) / 12
    return price * np.maximum(first_bits, 0), -price * np.log2(decay)


def rounded(size: Array, mean: Array, one: Array, more: Array) -> Array:
    """Sizes in steps to whole numbers, down where the bits saved are worth the error."""
    context = np.searchsorted(EDGES, mean, side="right")
    size = np.minimum(size, HIGHEST)
    k = np.floor(size + 0.5)
    whole: Array = k - ((k > 0) & (size - (k - 0.5) < np.where(k > 1, more[context], one[context])))
    return whole


class _Steps(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("columns", "rows")],
        *[(name, ctypes.c_void_p) for name in ("column", "row", "edge", "one", "more")],
        ("contexts", ctypes.c_int32),
        ("highest", ctypes.c_double),
        ("kept", ctypes.c_void_p),
    ]


def _fed_back(
    whitened: Array, inputs: Array, outputs: Array | None, steps: tuple[Array, ...], kept: Array | None
) -> Array:
    """Levels [n, rows], 0 outside the boolean `kept` [n, rows]; `whitened` is used up."""
    column, row, one, more = (np.ascontiguousarray(part, np.float64) for part in steps)
    n, m = whitened.shape
    found = np.zeros((n, m), np.int32)
    tables = (part.ctypes.data for part in (column, row, EDGES, one, more))
    settings = _Steps(n, m, *tables, len(MEANS), HIGHEST, None if kept is None else kept.ctypes.data)
    given = (whitened, inputs, outputs, ctypes.byref(settings), found, np.empty(2 * m))
    done = native.call("feedback", *given)
    if done is None:
        return _fed_back_slowly(whitened, inputs, outputs, (column, row, one, more), kept)
    if done != found.size:
        raise RuntimeError(f"error feedback failed ({done})")
    return found


def _fed_back_slowly(
    whitened: Array, inputs: Array, outputs: Array | None, steps: tuple[Array, ...], kept: Array | None
) -> Array:
    column, row, one, more = steps
    found = np.zeros(whitened.shape, np.int32)
    kept = np.ones(whitened.shape, bool) if kept is None else kept
    for j in reversed(range(len(whitened))):
        step, own = row * column[j], inputs[j, j]
        mean = np.cumsum(np.abs(whitened[j] / (own * step)) * kept[j])[-1] / len(row)  # in the order of the C core
        if outputs is None:
            x = whitened[j] / (own * step)
            found[j] = np.copysign(rounded(np.abs(x), mean, one, more), x) * kept[j]
        else:
            carried = np.zeros(len(row))
            for i in reversed(range(len(row))):
                x = (whitened[j, i] + carried[i]) / (own * step[i])
                found[j, i] = np.copysign(rounded(np.abs(x), mean, one, more), x) * kept[j, i]
                carried[:i] += outputs[i, :i] * (whitened[j, i] - found[j, i] * step[i] * own)
        whitened[:j] -= inputs[j, :j, None] * (found[j] * step)
    return found


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

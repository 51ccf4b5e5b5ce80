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

from tersenet.methods.recursion import HIGHEST, MEANS, Recursion
from tersenet.packed import Array, Packed, Transformed, Uniform, narrowed

SHORT = 12  # weights: in a trellis a row's path begins among even levels, which costs shorter rows more than they gain
PART = 16.0  # bits by which an array of exponents makes a header longer that is much like others


class Overflow(ValueError):
    """A level is larger than levels may be: the steps are far too fine for the weights, or something is not finite."""


@dataclass(frozen=True)
class Metric:
    """What an error in a layer's weights costs: lower Cholesky factors of A and of G, in float64.

    A factor of n coordinates is a band [groups, n, b]: blocks of b columns along the diagonal (the last may be
    narrower), row i from column i // b * b on, zeros elsewhere. So b = n is the whole factor and b = 1 its diagonal,
    without feedback. Where nothing is known of the inputs, `inputs` is None and A the identity.
    """

    inputs: Array | None  # [groups, n, b]
    outputs: Array  # [groups, rows, b]

    def rows(self) -> Array:
        """The diagonal [groups, rows] of the outputs' factor."""
        return diagonal(self.outputs)

    def cost(self, errors: Array) -> float:
        """|R^T E L|^2 of errors [groups, rows, n], summed over the groups."""
        total = 0.0
        for g, error in enumerate(errors):
            across = _whitened(self.outputs[g], error)
            total += float(np.square(across if self.inputs is None else _whitened(self.inputs[g], across.T)).sum())
        return total


def diagonal(band: Array) -> Array:
    """The diagonal [groups, n] of factors [groups, n, b]."""
    at = np.arange(band.shape[1])
    found: Array = band[:, at, at % band.shape[2]]
    return found


def _parts(n: int, width: int) -> list[slice]:
    """The coordinates of each block of a factor."""
    return [slice(at, min(at + width, n)) for at in range(0, n, width)]


def _whitened(band: Array, x: Array) -> Array:
    """The transpose of a factor [n, b] times x [n, m]."""
    if band.shape[1] == 1:
        return band * x
    return np.concatenate([band[part, : part.stop - part.start].T @ x[part] for part in _parts(*band.shape)])


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


def waterfilled(metric: Metric, c: float, places: int, shape: tuple[int, ...]) -> Steps:
    """Steps at which each level interval costs about c^2 / 12 in the metric, whatever its row and column.

    `places` is how many columns belong to one input channel: the size of the kernel. `shape` is that of the weights,
    [groups, rows, n]. Exponents that would take more bits than they save are zero, at the same mean cost.
    """
    if metric.inputs is None:
        own, places = np.ones((1, 1)), 1  # one step for all columns of a row
    else:
        own = diagonal(metric.inputs)
    group = np.exp(np.log(own).mean(1, keepdims=True))  # [groups, 1]: a group's own scale goes to its rows
    columns = -2 * np.log2(own / group).mean(0).reshape(-1, places)
    rows = 1 / (metric.rows() * group)
    middle, size = math.exp(float(np.log(rows).mean())), math.prod(shape)
    for least in (-PART, math.inf):  # all but clear losses, or none where these do not pay: headers that are alike
        lines, by_row, first = _exponents(2 * np.log2(rows / middle), size, least)
        channels, by_channel, second = _exponents(columns.mean(1, keepdims=True), size, least)
        kernel, by_place, third = _exponents((columns - channels).mean(0, keepdims=True), size, least)
        if first + second + third >= 0:
            break
    step = c * middle * by_row * by_channel * by_place
    scale = float(np.float16(step)) if 1e-4 < step < 6e4 else float(np.float32(step))
    return Steps(scale, lines, channels, kernel)


def _exponents(wanted: Array, size: int, least: float) -> tuple[Array, float, float]:
    """One part of the exponents of so many weights as int8, zeros where they save fewer bits than `least`.

    Also what the scale is then multiplied by, and the bits that are saved. Steps of 2^(e/2) where 2^(w/2) are wanted
    cost mean 2^(e - w), and save size / 2 * mean e bits at high rate, less at low rate. Exponents are coded about as
    Laplace variables of their mean size.
    """
    wanted = np.clip(wanted, -200, 200)
    sent = np.clip(np.rint(wanted), -40, 40).astype(np.int8)
    mean = float(np.abs(sent.astype(np.float64)).mean())
    if mean == 0:
        return sent, 1.0, 0.0
    alone = float(np.log2(np.exp2(-wanted).mean()))
    saved = size / 2 * (alone - float(np.log2(np.exp2(sent - wanted).mean())) + float(sent.mean()))
    bits = (1 + mean) * math.log2(1 + mean) - mean * math.log2(mean) + mean / (1 + mean)
    saved -= wanted.size * bits
    if saved > least:
        return sent, 1.0, saved - PART
    return np.zeros_like(sent), 2 ** (-alone / 2), 0.0


def paths(n: int) -> bool:
    """Whether rows of n weights are to be paths through the trellis."""
    return n >= SHORT


def levels(
    w: Array, metric: Metric, steps: tuple[Array, Array], rate: float, kept: Array | None = None, trellis: bool = False
) -> Array:
    """Integers [groups, rows, n] for weights of that shape, with error feedback; 0 where `kept` is not set.

    The step of a weight is the product of its row's, steps[0] [groups, rows], and its column's, steps[1] [n] or [1].
    `rate` weighs bits against distortion: at 1 a bit is worth what it is worth at high rate. With diagonal factors and
    `rate` 0 this is rounding. With `trellis` each row is a path through the trellis (`codecs/trellis.py`), in which
    nothing can be held at zero. Raises `Overflow` where a level would have to be larger than any may be.
    """
    if trellis and kept is not None:
        raise ValueError("levels in a trellis cannot be held at zero")
    q = np.empty(w.shape, np.int32)
    scales = None if metric.inputs is None else diagonal(metric.inputs)
    for g, weights in enumerate(w):
        rows = None if metric.outputs.shape[2] == 1 else np.ascontiguousarray(metric.outputs[g])
        columns = None
        if metric.inputs is not None and scales is not None and metric.inputs.shape[2] > 1:
            columns = np.array(metric.inputs[g], order="C")
            for part in _parts(*columns.shape):
                columns[part, : part.stop - part.start] /= scales[g, part]
        whitened = np.array(weights if rows is None else _whitened(rows, weights), np.float64)
        own = np.ones(len(weights)) if rows is None else diagonal(rows[None])[0]
        column = np.array(np.broadcast_to(steps[1], weights.shape[1:]), np.float64)
        profile = (np.abs(whitened) / (own * steps[0][g])[:, None]).mean(0) / column
        weight = None
        if trellis:
            weight = np.square(column if scales is None else column * scales[g])
            weight /= weight.mean()
        given = Recursion(
            rows,
            columns,
            np.array(steps[0][g], np.float64),
            column,
            profile / max(float(profile.mean()), 1e-300),
            worths(rate) if trellis else thresholds(rate),
            weight,
            None if kept is None else np.ascontiguousarray(kept[g]),
        )
        q[g] = given.levels(whitened)
    if not np.abs(q).max(initial=0) < HIGHEST - 4:  # to which those of a trellis come as close
        raise Overflow(f"a level is over {HIGHEST:.0f}: the steps are too fine")
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
    wanted = (steps.rows.reshape(shape[0], *single), channels, places) if q.any() else ()  # zeros need no steps
    parts = tuple(part for part in wanted if part.any())
    node = Uniform(levels_, np.array(steps.scale, np.float32), None, parts)
    return Transformed(node) if transformed else node

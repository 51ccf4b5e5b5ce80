"""What is known of a network without data: from the shapes and sizes of its weights, how fine each one's step must be.

Three things are taken for true, since nothing speaks against them:

* The relative errors of layers count alike at the network's output. What is best then is where a bit less costs the
  same anywhere: a layer's relative squared error is proportional to its number of weights. So a first convolution or a
  classifier is quantized far more finely than an embedding of half of all weights.
* The rows of a layer count nearly alike, whatever their sizes: a norm, the next layer or a gate makes up for a row's
  size in most networks, though not in all. Steps follow the 3/4th power of a row's size, and at most four times as
  coarse, relative to it, as in the layer as a whole: small rows are not lost.
* A column of small weights reads large inputs (the outlying channels of transformers; channels whose sizes two layers
  share out between them). Its step is at most in proportion to its size; columns larger than their layer's mean get no
  coarser step, since there the large weights may well be those that matter. Kernels of convolutions are left out:
  there, small channels are dead ones more often than not.

Neither the order of names nor what they say is used.
"""

import math
from dataclasses import dataclass

import numpy as np

from tersenet.packed import Array

POWER = 0.75  # of a row's size in its step
COARSEST = 4.0  # how much coarser a row's step may be, relative to its size, than the layer's
FEW = 8  # rows and columns of fewer weights are taken to be as large as the layer's others
FAR = 64.0  # weights so many times beyond the others of their row are outliers
LEAST = 1e-12  # rows and columns are taken to be at least so large, as parts of the layer's root mean square


@dataclass(frozen=True)
class Prior:
    """How much weights count: the step of weight (i, j) is c / (rows[i] columns[j]), with one c for all layers."""

    rows: Array  # [rows]
    columns: Array | None = None  # [n], or None where all count alike


def prior(weight: Array, columns: bool = True) -> Prior:
    """What is known of a weight [rows, n] from its values; without `columns` all of these count alike."""
    peak = float(np.abs(weight).max(initial=0))
    if peak == 0:
        return Prior(np.ones(len(weight)))
    squares = np.square(weight / peak)  # neither overflow nor underflow
    if min(weight.shape) >= FEW:  # else rows and columns say no more than all weights together
        size = math.sqrt(float(np.square(_sizes(squares, 1)).mean()))
    else:
        size = math.sqrt(float(squares.mean()))
    rows, own = (_sizes(squares / size**2, axis) for axis in (1, 0))
    steps = np.minimum(rows**POWER, COARSEST * rows)
    own = 1 / np.minimum(own, 1)
    plain = not columns or float(own.max()) < 2**0.25  # exponents of half octaves would all be zero
    return Prior(1 / (steps * size * peak * math.sqrt(weight.size)), None if plain else own)


def _sizes(squares: Array, axis: int) -> Array:
    """Root mean squares; 1 where too few weights tell, or all are 0 and so nothing is lost.

    A few outliers do not make a row large: what is far beyond the others counts as `FAR` times these.
    """
    count = squares.shape[axis]
    top = max(1, count // 50)
    others = np.take(np.partition(squares, count - top - 1, axis), range(count - top), axis) if count > top else squares
    mean = np.minimum(squares, FAR**2 * others.mean(axis, keepdims=True)).mean(axis)
    mean = np.where(mean > 0, mean, squares.mean(axis))
    return np.where((mean > 0) & (count >= FEW), np.maximum(np.sqrt(mean), LEAST), 1.0)

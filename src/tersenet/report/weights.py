"""What the pictures of weights show: how values lie among codewords or steps, and which weights a mask keeps."""

import math
from dataclasses import dataclass, replace

import numpy as np

from tersenet.container import Tensor
from tersenet.packed import (
    Array,
    Bloomier,
    Codebook,
    Packed,
    Reshaped,
    Sliced,
    Sparse,
    Transformed,
    Tree,
    Uniform,
    unpack,
)
from tersenet.structure import support

READ = 1 << 20  # values of a weight that are counted, spread evenly over it
SINGLE = 64  # distinct values, up to which each has its own line
BINS = 61
TICKS = 200  # at most, of a grid of steps
SIDE = 256  # cells along an axis of a mask's picture
IMAGE = 8  # the least height and width of inputs that are shown as an image


@dataclass(frozen=True)
class Histogram:
    """Shares of the values [n] at places [n], zeros left out; `width` of a bin, 0 where each value has its own line.

    `marks` are codewords, or levels of a step; `says` tells what they are.
    """

    places: Array
    shares: Array
    width: float
    marks: Array
    zeros: float
    says: str


@dataclass(frozen=True)
class Mask:
    """Parts of the weights [rows, columns] that are kept, by cell, and in all; `says` tells what a cell is."""

    cells: Array
    kept: float
    says: str


def histogram(tensor: Tensor) -> Histogram:
    """How the values of a tensor lie; zeros are counted apart."""
    dense = tensor.unpack().reshape(-1)
    read = dense[:: math.ceil(dense.size / READ)].astype(np.float32)
    others = read[np.isfinite(read) & (read != 0)]
    marks, says = _grid(tensor.tree)
    if len(read) < dense.size:
        says += f"; {len(read):,} of {dense.size:,} values were counted"
    places, counts = np.unique(others, return_counts=True)
    width = 0.0
    if len(places) > SINGLE:
        counts, edges = np.histogram(others.astype(np.float64), BINS)
        places, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    within = marks[(marks >= places[0] - width) & (marks <= places[-1] + width)] if len(places) else marks[:0]
    zeros = float(np.mean(read == 0))
    return Histogram(places, counts / len(read), width, within if width else marks, zeros, says)


def _grid(tree: Tree) -> tuple[Array, str]:
    """The values that a tree draws from, and what these are; none where they are no plain list."""
    while isinstance(tree, Sparse | Sliced | Reshaped):
        tree = tree.values if isinstance(tree, Sparse) else tree.child
    nothing: Array = np.zeros(0, np.float32)
    if isinstance(tree, Codebook) and tree.codewords.shape[-1] > 1:
        *many, neighbours = tree.codewords.shape
        return nothing, f"{math.prod(many)} codewords of {neighbours} neighbours each"
    if isinstance(tree, Codebook | Bloomier):
        words = np.sort(np.asarray(unpack(tree.codewords), np.float32).reshape(-1))
        return words, f"{len(words)} codewords, which the ticks show"
    if isinstance(tree, Uniform):
        return _steps(tree)
    if isinstance(tree, Transformed):
        return nothing, "its transform is packed, not these values"
    return nothing, f"a {type(tree).__name__} tree" if isinstance(tree, Packed) else "not quantized"


def _steps(tree: Uniform) -> tuple[Array, str]:
    """The levels of the median step, and what steps there are."""
    dense = np.abs(np.asarray(unpack(tree), np.float32))
    steps = np.abs(np.asarray(unpack(replace(tree, q=np.ones(tree.q.shape, np.int8), zero=None)), np.float32))
    used = steps[np.isfinite(steps) & (steps > 0)]
    if not used.size:
        return used, "no step"
    low, middle, high = float(used.min()), float(np.median(used)), float(used.max())
    most = int(min(float(dense.max(initial=0)) / middle, TICKS + 1.0))
    levels = middle * np.arange(-most, most + 1) if 2 * most < TICKS else used[:0]
    if low == high:
        return levels, f"one step of {low:.3g}" + (", whose levels the ticks show" if len(levels) else "")
    ticks = f", whose median, {middle:.2g}, the ticks show" if len(levels) else ""
    return levels, f"steps of {low:.2g} to {high:.2g}{ticks}"


def mask(tree: Tree) -> Mask | None:
    """Which weights a tree keeps by its structure, rows by columns; None where it keeps all of them."""
    there = support(tree)
    if there.all() or there.ndim < 2:
        return None
    matrix = there.reshape(len(there), -1)
    cells = _coarse(matrix.astype(np.float32))
    each = "a cell is a weight" if cells.shape == matrix.shape else "a cell is a block of weights"
    return Mask(cells, float(there.mean()), f"{matrix.shape[0]:,} rows by {matrix.shape[1]:,} columns, {each}")


def image(tree: Tree) -> Mask | None:
    """The mask of a matrix whose inputs are as many as a square image has, folded back to it; None for any other."""
    there = support(tree)
    side = math.isqrt(there.shape[-1]) if there.ndim == 2 else 0
    if side < IMAGE or side * side != there.shape[-1] or there.all():
        return None
    cells = there.mean(0, dtype=np.float64).reshape(side, side)
    return Mask(cells, float(there.mean()), f"its inputs as an image of {side} x {side}")


def _coarse(matrix: Array) -> Array:
    """The means of blocks of a matrix, at most `SIDE` along each axis."""
    for axis, n in enumerate(matrix.shape):
        edges = np.arange(min(n, SIDE)) * n // min(n, SIDE)
        sizes = np.diff([*edges, n])
        matrix = np.add.reduceat(matrix, edges, axis) / np.expand_dims(sizes, 1 - axis)
    return matrix

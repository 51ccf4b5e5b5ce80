"""Nodes whose values are looked up or put in place: levels, shared values, zeros, slices, another order of axes."""

import math
from dataclasses import dataclass

import numpy as np

from tersenet.packed.tree import (
    Array,
    Packed,
    Tree,
    is_float_tree,
    is_integer,
    is_mask,
    is_numpy,
    is_shape,
    namespace,
    require,
    unpack,
)

# Rolled, so that negative exponents count from its end.
_HALVES = (2.0 ** (np.roll(np.arange(-128, 128), 128) / 2)).astype(np.float32)


def half_powers(exponents: Array) -> Array:
    """2^(e/2) in float32 for int8 exponents: the grid on which step ids are sent."""
    xp = namespace(exponents)
    return _HALVES[exponents] if xp is np else xp.asarray(_HALVES)[xp.asarray(exponents, dtype=xp.int64)]


@dataclass(frozen=True, eq=False)
class Uniform(Packed):
    """(q + zero) * scale * 2^(steps/2): levels of one step, by group and, with `steps`, by row or column.

    `scale`, `zero` and each of `steps` (int8 exponents) broadcast against `q`; one with fewer places along an axis, in
    equal groups, says the same for a whole group, as of 64 neighbours in a row. Waterfilled quantization (Lifar et al.
    2026) sends its column steps this way, or as channel times frequency.
    """

    q: Array
    scale: Tree
    zero: Array = None
    steps: tuple[Array, ...] = ()

    def unpack(self) -> Array:
        rows, columns = ungrouped(unpack(self.scale), self.shape), None
        xp = namespace(rows)
        dense = xp.asarray(self.q, dtype=xp.float32)
        if self.zero is not None:
            dense = dense + ungrouped(xp.asarray(self.zero, dtype=xp.float32), self.shape)
        for exponents in self.steps:
            powers = half_powers(ungrouped(exponents, self.shape))
            if exponents.shape[:1] == dense.shape[:1]:
                rows = rows * powers
            else:
                columns = powers if columns is None else columns * powers
        for factor in (rows, columns):  # in place for NumPy: memory that is fresh costs more than the product
            if factor is not None:
                dense = xp.multiply(dense, factor, out=dense if xp is np else None)
        return dense

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape)

    def check(self) -> None:
        shape, steps, zero = self.q.shape, self.steps, self.zero
        require(is_integer(self.q), "levels are integers")
        require(isinstance(steps, tuple), "steps are a tuple")
        for part in (self.scale, *steps) if zero is None else (self.scale, zero, *steps):
            require(_broadcasts(part.shape, shape), "scale, zero and steps broadcast against the levels, or by group")
        require(zero is None or is_integer(zero), "zero is an integer")
        for part in steps:
            require(not is_numpy(part) or part.dtype == np.int8, "steps are int8")
        require(is_float_tree(self.scale), "scale is a float")


@dataclass(frozen=True, eq=False)
class Codebook(Packed):
    """codewords[index]: k shared values (d = 1) or vectors of d neighbours in the last axis (product quantization).

    Codewords [groups, k, d] are those of equal groups of neighbours in the first axis, as of 8 output channels.
    """

    index: Array
    codewords: Tree  # [k, d] or [groups, k, d]

    def unpack(self) -> Array:
        codewords = unpack(self.codewords)
        return codewords.reshape(-1, codewords.shape[-1])[self.numbers()].reshape(self.shape)

    def numbers(self) -> Array:
        """The index among the codewords of all groups, int64."""
        xp, (*groups, k, _) = namespace(self.index), self.codewords.shape
        index = xp.asarray(self.index, dtype=xp.int64)
        if not groups:
            return index
        first = np.repeat(k * np.arange(groups[0]), index.shape[0] // groups[0])
        return index + xp.asarray(first.reshape(len(first), *[1] * (len(index.shape) - 1)))

    @property
    def shape(self) -> tuple[int, ...]:
        *head, last = self.index.shape
        return (*head, last * self.codewords.shape[-1])

    def room(self) -> int:
        return (2 * math.prod(self.index.shape) if len(self.codewords.shape) > 2 else 0) + math.prod(self.shape)

    def check(self) -> None:
        require(is_integer(self.index) and len(self.index.shape) >= 1, "index is an array of integers")
        axes = self.codewords.shape
        require(is_float_tree(self.codewords) and len(axes) in (2, 3), "codewords are [k, d] or [groups, k, d]")
        require(
            len(axes) == 2 or (axes[0] > 0 and self.index.shape[0] % axes[0] == 0),
            "groups of codewords are for as many places of the first axis each",
        )

    def check_values(self) -> None:
        index = np.asarray(self.index)
        require(index.size == 0 or int(index.min()) >= 0, "an index is below 0")
        require(index.size == 0 or int(index.max()) < self.codewords.shape[-2], "an index is past the codewords")


@dataclass(frozen=True, eq=False)
class Sparse(Packed):
    """`values` where `mask` is set, in C order, and exact zeros elsewhere."""

    mask: Array  # bool
    values: Tree  # [number of ones]

    def unpack(self) -> Array:
        values = unpack(self.values)
        xp = namespace(values)
        mask = xp.asarray(self.mask)
        dense = xp.zeros(tuple(mask.shape), dtype=values.dtype)
        dense[mask] = values
        return dense

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    def check(self) -> None:
        require(is_mask(self.mask), "a mask is boolean")
        require(is_float_tree(self.values) and len(self.values.shape) == 1, "values are a float vector")

    def check_values(self) -> None:
        require(int(np.count_nonzero(np.asarray(self.mask))) == self.values.shape[0], "mask and values do not match")


@dataclass(frozen=True, eq=False)
class Sliced(Packed):
    """A child that keeps only some places of one axis (channels, neurons); the others are zero.

    A mask of the places takes a fifth of the bytes that their numbers do.
    """

    kept: Array  # bool [size], or ascending integers
    child: Tree
    axis: int
    size: int

    def unpack(self) -> Array:
        child = unpack(self.child)
        xp = namespace(child)
        dense = xp.zeros(self.shape, dtype=child.dtype)
        kept = xp.asarray(self.kept) if is_mask(self.kept) else xp.asarray(self.kept, dtype=xp.int64)
        dense[(slice(None),) * self.axis + (kept,)] = child
        return dense

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.child.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    def check(self) -> None:
        require(isinstance(self.axis, int) and isinstance(self.size, int), "axis and size are numbers")
        require(is_float_tree(self.child) and 0 <= self.axis < len(self.child.shape), "the axis is one of the child's")
        require(is_integer(self.kept) and len(self.kept.shape) == 1, "kept is a vector of integers, or a mask")
        n = self.child.shape[self.axis]
        require(is_shape(self.shape), "the axis is no longer than can be counted")
        fits = self.kept.shape[0] == (self.size if is_mask(self.kept) else n)
        require(fits and n <= self.size, "kept has the child's length, or the axis's")

    def check_values(self) -> None:
        kept = places(self.kept)
        require(len(kept) == self.child.shape[self.axis], "kept and the child do not match")
        require(not kept.size or (kept[0] >= 0 and kept[-1] < self.size), "a kept place is outside")
        require(bool((np.diff(kept) > 0).all()), "kept places ascend")


@dataclass(frozen=True, eq=False)
class Reshaped(Packed):
    """The values of a child whose axes come in another order: it holds dense.reshape(split).transpose(axes).

    Rows come first in every other node, but not in `x @ W` (split [inputs, outputs], axes (1, 0)) or in a transposed
    convolution (split [groups, inputs / groups, outputs / groups, height, width], axes (0, 2, 1, 3, 4)).
    """

    child: Tree  # the values, in any shape
    split: tuple[int, ...]
    axes: tuple[int, ...]
    size: tuple[int, ...]

    def unpack(self) -> Array:
        child = unpack(self.child)
        ordered = child.reshape(tuple(self.split[axis] for axis in self.axes))
        return namespace(child).moveaxis(ordered, tuple(range(len(self.axes))), self.axes).reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def check(self) -> None:
        require(is_shape(self.split) and is_shape(self.size), "split and size are shapes")
        require(
            isinstance(self.axes, tuple)
            and all(isinstance(axis, int) for axis in self.axes)
            and sorted(self.axes) == list(range(len(self.split))),
            "the axes are those of the split, in some order",
        )
        require(is_float_tree(self.child), "a child is a float tree")
        count = math.prod(self.child.shape)
        require(math.prod(self.split) == count == math.prod(self.size), "split and size hold the child's values")


def places(kept: Array) -> Array:
    """The places that a `Sliced` node keeps, int64, as numbers or a mask say them."""
    array = np.asarray(kept)
    return np.flatnonzero(array) if is_mask(array) else array.astype(np.int64)


def ungrouped(part: Array, shape: tuple[int, ...]) -> Array:
    """An array that broadcasts against a shape, by group or as it is, with each group's value at all of its places."""
    for axis, (own, n) in enumerate(zip(part.shape, shape[len(shape) - len(part.shape) :], strict=True)):
        if own not in (1, n):
            xp = namespace(part)
            part = np.repeat(part, n // own, axis) if xp is np else xp.repeat_interleave(part, n // own, axis)
    return part


def _broadcasts(shape: tuple[int, ...], against: tuple[int, ...]) -> bool:
    skipped = len(against) - len(shape)
    pairs = zip(shape, against[max(skipped, 0) :], strict=False)
    return not shape or (skipped >= 0 and all(a in (1, b) or (a and b % a == 0) for a, b in pairs))

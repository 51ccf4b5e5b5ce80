"""What a compressed weight is: a small tree of arrays, the waist between what decides and what stores.

Integer arrays are structure: the file entropy-codes them. Float arrays are parameters: they are trained, rounded, or
rewritten by the next method. A bare float array is a legal tree. Every node rebuilds its dense weight with `unpack`,
from the same lines for NumPy and for torch, so gradients reach each float leaf. Nothing here knows of bytes or of
training, and torch is never imported: its functions are found through the tensors that a tree holds.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tersenet import bloomier, splitmix

Array: TypeAlias = Any  # np.ndarray or torch.Tensor, or a promise of one that has its shape and dtype
Tree: TypeAlias = "Packed | Array"

DEEPEST = 6  # slices of both channels, another order of axes, a transform, zeros, shared values
WORK = 1 << 13  # products for each value of an einsum's result or factors, at most
WHOLE_BLOCK = 1 << 8  # values of a transformed block, up to which one matrix transforms it
_SIXTEENTHS = (2.0 ** (np.arange(16) / 16)).astype(np.float32)
_HALVES = (2.0 ** (np.roll(np.arange(-128, 128), 128) / 2)).astype(
    np.float32
)  # so that negative exponents count from its end


def namespace(array: Array) -> ModuleType:
    """torch for its tensors, NumPy for everything else; the functions used here have the same names in both."""
    return sys.modules["torch"] if type(array).__module__.startswith("torch") else np


def sixteenth(exponent: int) -> Any:
    """2^(exponent/16) in float32, from a table and an exact scaling."""
    return np.ldexp(_SIXTEENTHS[exponent % 16], exponent // 16)


def half_powers(exponents: Array) -> Array:
    """2^(e/2) in float32 for int8 exponents: the grid on which step ids are sent."""
    xp = namespace(exponents)
    return _HALVES[exponents] if xp is np else xp.asarray(_HALVES)[xp.asarray(exponents, dtype=xp.int64)]


@dataclass(frozen=True, eq=False)
class Packed:
    """A node: its fields are integer arrays, float arrays, child trees, numbers, texts, or tuples of these."""

    def unpack(self) -> Array:
        """The dense float array, in NumPy or torch as the fields are."""
        raise TypeError(f"{type(self).__name__} does not say how to unpack")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `unpack` gives, known without unpacking."""
        raise TypeError(f"{type(self).__name__} does not say its shape")

    def room(self) -> int:
        """How many floats `unpack` makes of its parts, known without unpacking."""
        return math.prod(self.shape)

    def check(self) -> None:
        """Raises ValueError unless shapes and types fit together; looks at no value, so promises will do."""

    def check_values(self) -> None:
        """Raises ValueError unless the integers point only at what is there."""

    def __str__(self) -> str:
        return "\n".join(tree_lines("weight", self, lambda path, array: array.nbytes))


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
        _require(is_integer(self.q), "levels are integers")
        _require(isinstance(steps, tuple), "steps are a tuple")
        for part in (self.scale, *steps) if zero is None else (self.scale, zero, *steps):
            _require(_broadcasts(part.shape, shape), "scale, zero and steps broadcast against the levels, or by group")
        _require(zero is None or is_integer(zero), "zero is an integer")
        for part in steps:
            _require(not _is_numpy(part) or part.dtype == np.int8, "steps are int8")
        _require(is_float_tree(self.scale), "scale is a float")


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
        _require(is_integer(self.index) and len(self.index.shape) >= 1, "index is an array of integers")
        axes = self.codewords.shape
        _require(is_float_tree(self.codewords) and len(axes) in (2, 3), "codewords are [k, d] or [groups, k, d]")
        _require(
            len(axes) == 2 or (axes[0] > 0 and self.index.shape[0] % axes[0] == 0),
            "groups of codewords are for as many places of the first axis each",
        )

    def check_values(self) -> None:
        index = np.asarray(self.index)
        _require(index.size == 0 or int(index.min()) >= 0, "an index is below 0")
        _require(index.size == 0 or int(index.max()) < self.codewords.shape[-2], "an index is past the codewords")


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
        _require(_is_mask(self.mask), "a mask is boolean")
        _require(is_float_tree(self.values) and len(self.values.shape) == 1, "values are a float vector")

    def check_values(self) -> None:
        _require(int(np.count_nonzero(np.asarray(self.mask))) == self.values.shape[0], "mask and values do not match")


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
        kept = xp.asarray(self.kept) if _is_mask(self.kept) else xp.asarray(self.kept, dtype=xp.int64)
        dense[(slice(None),) * self.axis + (kept,)] = child
        return dense

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.child.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    def check(self) -> None:
        _require(isinstance(self.axis, int) and isinstance(self.size, int), "axis and size are numbers")
        _require(is_float_tree(self.child) and 0 <= self.axis < len(self.child.shape), "the axis is one of the child's")
        _require(is_integer(self.kept) and len(self.kept.shape) == 1, "kept is a vector of integers, or a mask")
        n = self.child.shape[self.axis]
        _require(_is_shape(self.shape), "the axis is no longer than can be counted")
        fits = self.kept.shape[0] == (self.size if _is_mask(self.kept) else n)
        _require(fits and n <= self.size, "kept has the child's length, or the axis's")

    def check_values(self) -> None:
        kept = places(self.kept)
        _require(len(kept) == self.child.shape[self.axis], "kept and the child do not match")
        _require(not kept.size or (kept[0] >= 0 and kept[-1] < self.size), "a kept place is outside")
        _require(bool((np.diff(kept) > 0).all()), "kept places ascend")


@dataclass(frozen=True, eq=False)
class Factored(Packed):
    """An einsum of factors, reshaped: SVD "or,ri->oi", CP, Tucker-2 and tensor trains differ in the equation alone."""

    equation: str
    factors: tuple[Tree, ...]
    size: tuple[int, ...]

    def unpack(self) -> Array:
        factors = [unpack(factor) for factor in self.factors]
        einsum = namespace(factors[0]).einsum
        for step in self._steps():
            pair = [factors.pop(at) for at in step.operands]
            factors.append(einsum(step.equation, *pair))
        return factors[0].reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return sum(step.size for step in self._steps())

    def _steps(self) -> "list[Contraction]":
        terms, _, result = self.equation.replace("->", ",").rpartition(",")
        return contractions(terms.split(","), [factor.shape for factor in self.factors], result)

    def check(self) -> None:
        _require(isinstance(self.equation, str) and len(self.equation) <= 128, "the equation is a short text")
        _require(isinstance(self.factors, tuple) and 1 <= len(self.factors) <= 8, "there are 1 to 8 factors")
        _require(_is_shape(self.size), "size is a shape")
        left, arrow, right = self.equation.partition("->")
        terms, extent = left.split(","), dict[str, int]()
        letters = left.replace(",", "") + right
        _require(
            arrow == "->" and letters.isascii() and (letters.isalpha() or not letters), "the equation has letters only"
        )
        _require(len(terms) == len(self.factors), "each factor has its term")
        for term, factor in zip(terms, self.factors, strict=True):
            _require(is_float_tree(factor) and len(term) == len(factor.shape), "a term has a letter for each axis")
            for letter, n in zip(term, factor.shape, strict=True):
                _require(extent.setdefault(letter, n) == n, "a letter has one extent")
        _require(len(set(right)) == len(right) and set(right) <= set(extent), "the result's letters are known")
        _require(math.prod(extent[c] for c in right) == math.prod(self.size), "the result fills the shape")
        held = max(1, math.prod(self.size), *(math.prod(factor.shape) for factor in self.factors))
        for step in self._steps():
            _require(step.work <= WORK * held and step.size <= 8 * held, "the equation's products are not too many")


class Contraction(NamedTuple):
    """One step of an einsum: its operands' places, the later first, what is done, its products, its result's size."""

    operands: tuple[int, ...]
    equation: str
    work: int
    size: int


def contractions(terms: Sequence[str], shapes: Sequence[tuple[int, ...]], result: str) -> list[Contraction]:
    """An einsum as steps of two operands each, the pair of fewest products first; the last gives the result."""
    extent = {c: n for term, shape in zip(terms, shapes, strict=True) for c, n in zip(term, shape, strict=True)}
    left, steps = list(terms), list[Contraction]()
    while not steps or len(left) > 1:
        pairs: list[tuple[int, ...]] = [(j, i) for j in range(len(left)) for i in range(j)] or [(0,)]
        work, pair = min((math.prod(extent[c] for c in {*"".join(left[k] for k in p)}), p) for p in pairs)
        own = [left.pop(at) for at in pair]
        needed = {*result, *"".join(left)}
        made = result if not left else "".join(sorted({*"".join(own)} & needed))
        steps.append(Contraction(pair, f"{','.join(own)}->{made}", work, math.prod(extent[c] for c in made)))
        left.append(made)
    return steps


@dataclass(frozen=True, eq=False)
class Transformed(Packed):
    """Coefficients of an orthonormal two-dimensional DCT-II over the last two axes (the kernel of a convolution)."""

    coefficients: Tree

    def unpack(self) -> Array:
        coefficients = unpack(self.coefficients)
        xp = namespace(coefficients)
        height, width = self.shape[-2:]
        if height * width > WHOLE_BLOCK:
            rows, columns = (xp.asarray(dct(n).astype(np.float32)) for n in (height, width))
            return rows.T @ coefficients @ columns
        kernel = xp.asarray(kernel_dct(height, width).astype(np.float32))
        return (coefficients.reshape(-1, height * width) @ kernel).reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.coefficients.shape)

    def check(self) -> None:
        _require(is_float_tree(self.coefficients) and len(self.shape) >= 2, "coefficients have two axes or more")
        _require(all(1 <= n <= 64 for n in self.shape[-2:]), "a transformed block is at least 1 x 1, at most 64 x 64")


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
        _require(_is_shape(self.split) and _is_shape(self.size), "split and size are shapes")
        _require(
            isinstance(self.axes, tuple)
            and all(isinstance(axis, int) for axis in self.axes)
            and sorted(self.axes) == list(range(len(self.split))),
            "the axes are those of the split, in some order",
        )
        _require(is_float_tree(self.child), "a child is a float tree")
        count = math.prod(self.child.shape)
        _require(math.prod(self.split) == count == math.prod(self.size), "split and size hold the child's values")


@dataclass(frozen=True, eq=False)
class Bloomier(Packed):
    """Values by position from a Bloomier filter: codewords[v] where v, the XOR of three cells and a mask, is one.

    Places that no key stood for are zero, but for false positives (Reagen et al. 2018). `cells` [(windows + 2) *
    length] have `bits` bits each; the three of a place lie in segments of `length` cells in a row.
    """

    cells: Array
    codewords: Tree  # [k]
    bits: int
    seed: int
    length: int
    size: tuple[int, ...]

    def unpack(self) -> Array:
        codewords = unpack(self.codewords)
        xp, number = namespace(codewords), self.numbers()
        found = number < codewords.shape[0]
        dense = xp.zeros(math.prod(self.size), dtype=codewords.dtype)
        dense[xp.asarray(found)] = codewords[xp.asarray(number[found].astype(np.int64))]
        return dense.reshape(self.size)

    def numbers(self) -> Array:
        """What the filter says to each place, uint16: a codeword's number, or one past all of them."""
        cells = self.cells if _is_numpy(self.cells) else self.cells.cpu().numpy()
        return bloomier.queried(cells, math.prod(self.size), self.seed, self.length, self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return 4 * math.prod(self.size)  # numbers, which of them are found, and where their codewords are

    def check(self) -> None:
        numbers = (self.bits, self.seed, self.length)
        _require(all(isinstance(n, int) for n in numbers), "bits, seed and length are numbers")
        _require(is_integer(self.cells) and len(self.cells.shape) == 1, "cells are a vector of integers")
        _require(1 <= self.bits <= 16 and 0 <= self.seed < 1 << 62, "cells have 1 to 16 bits, and a seed at most 62")
        _require(1 <= self.length <= 1 << 30 and self.cells.shape[0] < 1 << 31, "segments are short of 2^30 cells")
        _require(
            self.cells.shape[0] % self.length == 0 and self.cells.shape[0] >= 3 * self.length, "cells are segments"
        )
        _require(is_float_tree(self.codewords) and len(self.codewords.shape) == 1, "codewords are a float vector")
        _require(self.codewords.shape[0] <= 1 << self.bits, "a codeword's number fits into a cell")
        _require(_is_shape(self.size) and math.prod(self.size) < 1 << 31, "size is a shape short of 2^31 places")


@dataclass(frozen=True, eq=False)
class Lattice(Packed):
    """Points less a dither that the seed tells: randomised lattice quantization (Choi, El-Khamy, Lee 2018).

    The first values of `point`, in C order, minus 2^(step/16) times a number in [-1/2, 1/2) that `dimension` neighbours
    share (`splitmix.py`).
    """

    point: Tree
    step: int
    seed: int
    dimension: int
    size: tuple[int, ...]

    def unpack(self) -> Array:
        point, count = unpack(self.point), math.prod(self.size)
        xp = namespace(point)
        away = np.repeat(splitmix.dither(self.seed, -(-count // self.dimension)), self.dimension)[:count]
        away = away * sixteenth(self.step)
        return (point.reshape(-1)[:count] - xp.asarray(away)).reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return 4 * math.prod(self.size)  # the dither, how far away that is, and the differences

    def check(self) -> None:
        numbers = (self.step, self.seed, self.dimension)
        _require(all(isinstance(n, int) for n in numbers), "step, seed and dimension are numbers")
        _require(abs(self.step) <= 1600 and 0 <= self.seed < 1 << 62, "a step is within 2^100, a seed below 2^62")
        _require(1 <= self.dimension <= 64, "1 to 64 neighbours share a dither")
        _require(is_float_tree(self.point) and _is_shape(self.size), "points are a float tree, size is a shape")
        _require(math.prod(self.size) <= math.prod(self.point.shape), "there are points for the size")


@dataclass(frozen=True, eq=False)
class Hashed(Packed):
    """Buckets that many places share, each with a sign of its own: HashedNets (Chen et al. 2015).

    Which bucket a place has, and which sign, the seed tells (`splitmix.py`).
    """

    buckets: Tree  # [K]
    seed: int
    size: tuple[int, ...]

    def unpack(self) -> Array:
        buckets = unpack(self.buckets)
        xp = namespace(buckets)
        place, sign = splitmix.buckets(self.seed, math.prod(self.size), buckets.shape[0])
        return (buckets[xp.asarray(place)] * xp.asarray(sign)).reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return 6 * math.prod(self.size)  # buckets, which are int64, signs, and their products

    def check(self) -> None:
        _require(isinstance(self.seed, int) and 0 <= self.seed < 1 << 62, "a seed is a number below 2^62")
        _require(is_float_tree(self.buckets) and len(self.buckets.shape) == 1, "buckets are a float vector")
        _require(
            1 <= self.buckets.shape[0] < 1 << 32 and _is_shape(self.size), "there are buckets, and size is a shape"
        )


# The order is part of the file format: only ever append.
NODES: dict[str, type[Packed]] = {
    node.__name__: node
    for node in (Uniform, Codebook, Sparse, Sliced, Factored, Transformed, Reshaped, Bloomier, Lattice, Hashed)
}


def dct(n: int) -> Array:
    """The orthonormal DCT-II matrix [n, n] in float64: coefficients = dct(n) @ samples."""
    k, i = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.sqrt(2 / max(n, 1)) * np.cos(np.pi * k * (2 * i + 1) / (2 * max(n, 1)))
    matrix[:1] /= np.sqrt(2)
    return matrix


@functools.lru_cache(64)
def kernel_dct(height: int, width: int) -> Array:
    """The two-dimensional DCT-II matrix [height * width] squared: coefficients = matrix @ kernel, both in C order."""
    matrix = np.kron(dct(height), dct(width))
    matrix.flags.writeable = False
    return matrix


def unpack(tree: Tree) -> Array:
    """The dense array of a node, or the bare array itself."""
    return tree.unpack() if isinstance(tree, Packed) else tree


def children(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """The arrays and nodes directly under a node, with their field names (`steps.0` for a tuple's first)."""
    if not isinstance(tree, Packed):
        return
    for name in parts_of(type(tree)):
        value = getattr(tree, name)
        if isinstance(value, tuple):
            yield from ((f"{name}.{i}", v) for i, v in enumerate(value) if _is_tree(v))
        elif _is_tree(value):
            yield name, value


def parts_of(kind: type[Packed]) -> tuple[str, ...]:
    """The names of a node's fields, as its dataclass lists them."""
    return kind.__match_args__


def _is_tree(value: Any) -> bool:
    return isinstance(value, Packed) or hasattr(value, "shape")  # a node's shape is computed, so it is not asked for


def arrays(tree: Tree, path: str = "") -> Iterator[tuple[str, Array]]:
    """Every array of a tree with its path, depth first; a bare array has the path ""."""
    if not isinstance(tree, Packed):
        yield path, tree
    for name, child in children(tree):
        yield from arrays(child, f"{path}.{name}" if path else name)


def map_arrays(tree: Tree, change: Callable[[str, Array], Array], path: str = "") -> Tree:
    """The same tree with `change(path, array)` in place of every array."""
    if not isinstance(tree, Packed):
        return change(path, tree) if hasattr(tree, "shape") else tree
    changed: dict[str, Any] = {}
    for name in parts_of(type(tree)):
        value, below = getattr(tree, name), f"{path}.{name}" if path else name
        if isinstance(value, tuple):
            changed[name] = tuple(map_arrays(v, change, f"{below}.{i}") for i, v in enumerate(value))
        else:
            changed[name] = map_arrays(value, change, below)
    return type(tree)(**changed)


def float_leaves(tree: Tree) -> dict[str, Array]:
    """The trainable leaves by path."""
    return {path: array for path, array in arrays(tree) if not is_integer(array)}


def places(kept: Array) -> Array:
    """The places that a `Sliced` node keeps, int64, as numbers or a mask say them."""
    array = np.asarray(kept)
    return np.flatnonzero(array) if _is_mask(array) else array.astype(np.int64)


def check_tree(tree: Tree, above: int = 0) -> None:
    """Raises ValueError unless every node's parts fit together and the tree is at most six nodes deep."""
    if isinstance(tree, Packed):
        _require(above < DEEPEST, f"a tree is at most {DEEPEST} nodes deep")
        for _, child in children(tree):
            check_tree(child, above + 1)
        tree.check()


def check_tree_values(tree: Tree) -> None:
    if isinstance(tree, Packed):
        for _, child in children(tree):
            check_tree_values(child)
        tree.check_values()


def is_integer(array: Array) -> bool:
    return not isinstance(array, Packed) and not _is_float(array.dtype)


def is_float_tree(tree: Tree) -> bool:
    return isinstance(tree, Packed) or (hasattr(tree, "dtype") and _is_float(tree.dtype))


def _is_float(dtype: Any) -> bool:
    return dtype.kind == "f" if isinstance(dtype, np.dtype) else "float" in str(dtype)


def narrowed(integers: Array) -> Array:
    """NumPy integers in the smallest type that holds them all."""
    low, high = (int(integers.min()), int(integers.max())) if integers.size else (0, 0)
    return integers.astype(np.min_scalar_type(high if low >= 0 else min(low, -high - 1)))


def tree_lines(name: str, tree: Tree, size_of: Callable[[str, Array], int]) -> list[str]:
    """A table of a tree: name, kind, type and shape, bytes, share of the whole, bits per weight of the whole."""
    total = sum(size_of(path, array) for path, array in arrays(tree))
    weights = max(1, math.prod(tree.shape))

    def line(label: str, kind: str, size: int) -> str:
        share, rate = size / max(total, 1), 8 * size / weights
        return f"{label:<34} {kind:<28} {size:>10,} {share:>7.1%} {rate:>8.3f}"

    def walk(label: str, tree: Tree, path: str, indent: str) -> Iterator[str]:
        size = sum(size_of(f"{path}.{p}".strip("."), a) for p, a in arrays(tree))
        shape = "x".join(map(str, tree.shape)) or "scalar"
        kind = type(tree).__name__ if isinstance(tree, Packed) else str(tree.dtype).removeprefix("torch.")
        yield line(indent + label, f"{kind} {shape}", size)
        for below, child in children(tree):
            yield from walk(below, child, f"{path}.{below}".strip("."), indent + "  ")

    head = f"{'name':<34} {'kind':<28} {'bytes':>10} {'share':>7} {'bits/w':>8}"
    return [head, *walk(name, tree, "", "")]


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


def _is_shape(extents: Any) -> bool:
    """Whether this is a tuple of at most 8 extents whose product, zeros left out, NumPy can count."""
    if not (isinstance(extents, tuple) and len(extents) <= 8):
        return False
    return all(isinstance(n, int) and n >= 0 for n in extents) and math.prod(n or 1 for n in extents) < 1 << 60


def _is_mask(array: Array) -> bool:
    return str(array.dtype).endswith("bool")


def _is_numpy(array: Array) -> bool:
    return namespace(array) is np


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)

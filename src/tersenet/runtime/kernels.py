"""Which form a tree is executed in: `TABLE` by the outermost node, and a model of what a product costs.

A tree that is in no row, or for which nothing is faster, becomes dense once. Streams have been decoded by then.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersenet import native
from tersenet.packed import (
    Array,
    Codebook,
    Factored,
    Packed,
    Sliced,
    Sparse,
    Tree,
    Uniform,
    half_powers,
    places,
    unpack,
)
from tersenet.runtime.forms import (
    FEW,
    GROUP,
    Chain,
    Codes,
    Dense,
    Form,
    Levels,
    MaskedRows,
    Part,
    SparseColumns,
    SparseRows,
    Sum,
    Vectors,
)
from tersenet.runtime.layouts import codes, levels, masked_rows, sparse_columns, sparse_rows, vectors

SPARSE = 0.3  # part of weights that are not zero, under which sparse rows are faster than a bit for each weight
FEW_LEVELS = 0.05  # and faster than levels
OUTSIDE = 1 / 64  # part of the levels that may lie outside of fewer bits, and are then added as sparse rows
IN_CACHE = 8 << 20  # bytes of weights up to which they are taken to come from a cache
# Nanoseconds on one core, measured with bench/runtime.py on an AVX-512 machine with VNNI (Zen 4).
CALL = {Dense: 6e3, SparseRows: 38e3, SparseColumns: 38e3, MaskedRows: 40e3, Levels: 50e3, Codes: 40e3, Vectors: 40e3}
MEMORY = 0.04  # a byte that comes from memory
CACHED = 0.018  # from a cache
MANY = 0.026  # a dense weight times one more of many inputs
IMAGE, ROW = 0.25, 12  # of a sparse convolution: the most that is not zero, and the least numbers of a channel
LEVEL = {8: 0.014, 4: 0.013, 2: 0.009}  # a level taken apart
DIGIT = 0.006  # a level times a digit
SPLIT = 1.5  # an input taken apart into digits
NUMBER = 0.3  # a sparse number times one input
# How many times as long it takes in plain C, and with AVX2; of sparse rows, with many inputs.
SLOWER = {Levels: (45, 3, 1), Codes: (20, 20, 1), MaskedRows: (26, 26, 1), SparseRows: (3, 3, 1)}
LOOKED_UP = 0.35  # a place of a table of products


@dataclass(frozen=True)
class Choice:
    """A form for a weight, None for the dense array itself, and why it was taken."""

    form: Form | None
    why: str


def choose(tree: Tree, batch: int = 1, activations: int = 24, fixed: Sequence[int] | None = None) -> Choice:
    """The form that a product of [batch, columns] with the rows of a tree is expected to be fastest in.

    Rows are the first axis, columns all others. Inputs of integer products have 8, 16 or 24 bits; of those that are
    `fixed` point already, so many bits with so many of them behind the point, eight or fewer are taken as they are.
    """
    if activations not in (8, 16, 24):
        raise ValueError(f"activations have 8, 16 or 24 bits, not {activations}")
    shape = tree.shape[0], math.prod(tree.shape[1:])
    dense = _nanoseconds(shape, batch)
    if native.library() is None or min(shape) == 0:
        return Choice(None, "dense: nothing multiplies packed weights here")
    make = TABLE.get(type(tree))
    form = make(tree, activations // 8) if make else _mostly_zeros(tree)
    if form is None:
        return Choice(None, f"dense: {_named(tree)} has no form that is executed")
    if fixed and fixed[0] <= 8:
        form = _of_fixed(form, 2.0 ** -fixed[1])
    if batch <= FEW and isinstance(form, SparseRows) and len(form.book):
        form = sparse_columns(form)
    cost = nanoseconds(form, batch)
    told = f"about {cost / 1000:,.0f} us for a batch of {batch}, dense {dense / 1000:,.0f} us"
    if cost > dense:
        return Choice(None, f"dense: {described(form)} would take {told}")
    return Choice(form, f"{described(form)}: {told}")


def _of_fixed(form: Form, step: float) -> Form:
    """The form for inputs that are multiples of a step, from -128 to 127 of it."""
    if isinstance(form, Levels) and not form.factor.size:
        return replace(form, planes=1, step=step)
    if isinstance(form, Sum):
        return replace(form, forms=tuple(_of_fixed(part, step) for part in form.forms))
    if isinstance(form, Chain):
        return replace(form, forms=(_of_fixed(form.forms[0], step), *form.forms[1:]))
    return replace(form, form=_of_fixed(form.form, step)) if isinstance(form, Part) else form


def described(form: Form) -> str:
    """What a form is, in a few words."""
    if isinstance(form, SparseColumns):
        share = len(form.codes) / max(1, form.height * (form.starts.shape[1] - 1))
        return f"sparse columns, {share:.1%} not zero of {len(form.book)} shared values, those of zero inputs skipped"
    if isinstance(form, SparseRows | MaskedRows):
        share = len(form.values) / max(1, (len(form.starts) - 1) * form.width)
        shared = f" of {len(form.book)} shared values" if isinstance(form, SparseRows) and len(form.book) else ""
        kind = "a bit for each weight" if isinstance(form, MaskedRows) else "sparse rows"
        return f"{kind}, {share:.1%} not zero{shared}"
    if isinstance(form, Levels):
        groups = form.scale.shape[1]
        by = f" in {groups} groups" if groups > 1 else ""
        given = " as they are" if form.step else ""
        return f"{form.bits}-bit levels{by} times inputs of {8 * form.planes} bits{given}"
    if isinstance(form, Codes):
        return f"{form.bits}-bit numbers of {form.size} shared values"
    if isinstance(form, Vectors):
        return f"codewords of {len(form.book)} values, multiplied once and looked up"
    if isinstance(form, Sum):
        return " plus ".join(map(described, form.forms))
    if isinstance(form, Chain):
        return ", then ".join(map(described, form.forms))
    return f"some rows or columns: {described(form.form)}" if isinstance(form, Part) else "dense"


def nanoseconds(form: Form, batch: int) -> float:
    """What a product is expected to take on one core."""
    if isinstance(form, Chain | Sum):
        return sum(nanoseconds(part, batch) for part in form.forms)
    if isinstance(form, Part):
        return nanoseconds(form.form, batch) + CALL[Dense]
    if isinstance(form, Dense):
        return _nanoseconds(form.weight.shape, batch)
    read = form.nbytes * (MEMORY if form.nbytes > IN_CACHE else CACHED)
    if isinstance(form, SparseRows):
        n = len(form.values)
        work = n * NUMBER * (batch + 0.15 * batch * (len(form.book) > 0)) if batch <= FEW else n * (0.8 + 0.05 * batch)
    elif isinstance(form, SparseColumns):
        work = len(form.codes) * NUMBER * 1.15 * batch  # where no input is zero
    elif isinstance(form, MaskedRows):
        work = form.mask.size * 16 * max(0.12, 0.045 * batch)
    elif isinstance(form, Levels):
        n = form.rows * form.columns
        work = (
            n * (LEVEL[form.bits] * math.ceil(batch / 8) + DIGIT * form.planes * batch) + SPLIT * form.columns * batch
        )
    elif isinstance(form, Codes):
        registers = max(1, math.ceil(form.size / 16))
        work = form.rows * form.columns * ((0.02 + 0.011 * registers) * math.ceil(batch / 8) + 0.018 * batch)
    else:
        assert isinstance(form, Vectors)
        d, size = form.book.shape
        work = batch * (form.index.size * LOOKED_UP + form.blocks * d * size * 0.06)
    if not isinstance(form, SparseRows) or batch > FEW:
        work *= SLOWER.get(type(form), (1, 1, 1))[native.simd()]
    return CALL[type(form)] + max(read, work)


def _nanoseconds(shape: tuple[int, ...], batch: int) -> float:
    """What a dense product is expected to take on one core."""
    n = math.prod(shape)
    read = 4 * n * (MEMORY if 4 * n > IN_CACHE else CACHED)
    return CALL[Dense] + max(read, MANY * n * batch)


def _named(tree: Tree) -> str:
    return type(tree).__name__ if isinstance(tree, Packed) else "an array of floats"


# ---------------------------------------------------------------- trees


def _sparse(tree: Sparse, planes: int) -> Form | None:
    mask = np.asarray(tree.mask)
    mask = mask.reshape(len(mask), -1)
    part = np.count_nonzero(mask) / mask.size
    if isinstance(tree.values, Codebook) and tree.values.codewords.shape[1:] == (1,) and part < SPARSE:
        book = np.asarray(unpack(tree.values.codewords), np.float32).reshape(-1)
        if len(book) <= 256:
            return sparse_rows(mask, np.asarray(tree.values.index).reshape(-1), book)
    values = _array(tree.values)
    return sparse_rows(mask, values) if part < SPARSE or native.simd() < 2 else masked_rows(mask, values)


def _mostly_zeros(tree: Tree) -> Form | None:
    """The sparse rows of what another node unpacks to."""
    if not isinstance(tree, Packed):
        return None
    weight = _array(tree).reshape(tree.shape[0], -1)
    return _sparse_rows_of(weight) if np.count_nonzero(weight) < SPARSE * weight.size else None


def _sparse_rows_of(weight: Array) -> Form:
    mask = weight != 0
    return sparse_rows(mask, weight[mask])


def _uniform(tree: Uniform, planes: int) -> Form | None:
    parts = scales(tree)
    if parts is None:
        return None
    scale, offset, factor = parts
    q = np.asarray(tree.q).reshape(len(tree.q), -1)
    if q.dtype.itemsize > 2:
        q = q.astype(np.int64)
    if tree.zero is None and np.count_nonzero(q) < FEW_LEVELS * q.size:
        return _sparse_rows_of(_array(tree).reshape(q.shape))
    low, inside = _window(q)
    if low is None or np.abs(np.asarray(offset) + low).max(initial=0) > 255:  # sums of products have 32 bits
        return None
    kept = q if inside.all() else np.clip(q, q[inside].min(), q[inside].max())
    whole = levels(kept, scale, offset, factor, planes, low)
    if inside.all():
        return whole
    row, column = np.nonzero(~inside)
    group = column // (q.shape[1] // scale.shape[1])
    held = kept[row, column] + (offset if isinstance(offset, int) else offset[row, group])
    held = held.astype(np.float32) * scale[row, group] * (1 if factor is None else factor[column])
    rest = _array(tree).reshape(q.shape)[row, column] - held
    return Sum((whole, sparse_rows(~inside, rest)), ((0, q.shape[1]),) * 2)


def _window(q: Array) -> tuple[int | None, Array]:
    """The lowest level from which on 2, 4 or 8 bits hold all but few levels, and which they hold."""
    low, high = int(q.min()), int(q.max())
    counts = np.bincount(q.reshape(-1).astype(np.int64) - low) if high - low < 1 << 16 else np.zeros(0, np.int64)
    for size in (4, 16, 256):
        if high - low < size:
            return low, np.ones(q.shape, bool)
        if len(counts):
            within = np.convolve(counts, np.ones(size, np.int64), "valid")
            at = low + int(within.argmax())
            if q.size - within.max() <= OUTSIDE * q.size and abs(at) <= 255:
                return at, (q >= at) & (q < at + size)
    return None, np.ones(q.shape, bool)


def scales(tree: Uniform) -> tuple[Array, Array | int, Array | None] | None:
    """Scale [rows, groups], offset (a number, or [rows, groups]) and factor [columns] of a Uniform node.

    None where they do not lie by row, by groups of neighbours in it, or by column.
    """
    shape = tuple(tree.q.shape)
    rows, columns = shape[0], math.prod(shape[1:])
    by_row: list[Array] = []
    factor: Array | None = None
    for part in (np.asarray(unpack(tree.scale), np.float32), *map(half_powers, map(np.asarray, tree.steps))):
        own = _by_row(part, shape)
        if own is not None:
            by_row.append(own)
        elif _full(part, shape)[0] == 1:
            column = np.broadcast_to(part.reshape(_full(part, shape)), (1, *shape[1:])) if _even(part, shape) else None
            if column is None:
                return None
            column = column.reshape(columns)
            factor = column if factor is None else factor * column
        else:
            return None
    groups = math.lcm(1, *(part.shape[1] for part in by_row))
    offset: Array | int = 0
    if tree.zero is not None:
        zero = _by_row(np.asarray(tree.zero), shape)
        if zero is None:
            return None
        groups = math.lcm(groups, zero.shape[1])
        one = int(zero.flat[0]) if zero.size else 0
        offset = one if (zero == one).all() else np.repeat(zero, groups // zero.shape[1], 1).astype(np.int64)
        if not isinstance(offset, int):
            offset = np.broadcast_to(offset, (rows, groups))
    if columns % max(groups, 1) or groups > max(1, columns // 16) or (groups > 1 and columns // groups > GROUP):
        return None
    scale: Array = np.ones((rows, groups), np.float32)
    for part in by_row:
        scale = scale * np.repeat(part, groups // part.shape[1], 1)
    return scale, offset, factor


def _full(part: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    full: tuple[int, ...] = (1,) * (len(shape) - part.ndim) + tuple(part.shape)
    return full


def _even(part: Array, shape: tuple[int, ...]) -> bool:
    return all(own in (1, n) for own, n in zip(_full(part, shape), shape))


def _by_row(part: Array, shape: tuple[int, ...]) -> Array | None:
    """A part of a Uniform node as [rows or 1, groups of neighbours], or None where it does not lie so."""
    extents = _full(part, shape)
    if extents[0] not in (1, shape[0]):
        part, extents = np.repeat(part.reshape(extents), shape[0] // extents[0], 0), (shape[0], *extents[1:])
    axes = [k for k in range(1, len(shape)) if extents[k] > 1]
    if axes and extents[0] == 1 and _even(part, shape):
        return None  # by column
    last = max(axes, default=0)
    if any(extents[k] != shape[k] for k in range(1, last)):
        return None
    return part.reshape(extents[0], -1)


def _codebook(tree: Codebook, planes: int) -> Form | None:
    book = np.asarray(unpack(tree.codewords), np.float32)
    if book.ndim > 2:
        return None  # groups of rows have codewords of their own
    size, d = book.shape
    index = np.asarray(tree.index).reshape(len(tree.index), -1)
    if d > 1:
        return vectors(index, book) if size <= 256 else None
    return codes(index, book.reshape(-1)) if size <= 128 else None


def _factored(tree: Factored, planes: int) -> Form | None:
    """A chain of matrices, from the columns back to the rows."""
    left, right = tree.equation.split("->")
    terms = left.split(",")
    if (
        len(right) != 2
        or tuple(tree.shape) != tuple(_extents(tree)[c] for c in right)
        or any(len(t) != 2 for t in terms)
    ):
        return None
    found, here, waiting = list[Form](), right[1], list(zip(terms, tree.factors))
    while waiting:
        at = next((k for k, (term, _) in enumerate(waiting) if here in term), None)
        if at is None:
            return None
        term, factor = waiting.pop(at)
        if term[0] == term[1] or any(here in other for other, _ in waiting):
            return None
        there = term.replace(here, "")
        if term == there + here:
            found.append(_best(factor, planes))
        else:
            found.append(Dense(np.ascontiguousarray(_array(factor).T)))
        here = there
    return Chain(tuple(found)) if here == right[0] else None


def _extents(tree: Factored) -> dict[str, int]:
    terms = tree.equation.split("->")[0].split(",")
    return {c: n for term, factor in zip(terms, tree.factors) for c, n in zip(term, factor.shape)}


def _best(tree: Tree, planes: int) -> Form:
    """The form of a factor."""
    return choose(tree, 1, 8 * planes).form or Dense(_array(tree))


def _array(tree: Tree) -> Array:
    return np.asarray(unpack(tree), np.float32)


def _sliced(tree: Sliced, planes: int) -> Form | None:
    if tree.axis > 1 or len(tree.shape) != 2 or 0 in tree.child.shape:
        return None
    kept = places(tree.kept)
    none: Array = np.zeros(0, np.int64)
    inner = _best(tree.child, planes)
    return Part(inner, kept, none, tree.size) if tree.axis == 0 else Part(inner, none, kept, tree.shape[0])


TABLE: dict[Any, Callable[[Any, int], Form | None]] = {
    Sparse: _sparse,
    Uniform: _uniform,
    Codebook: _codebook,
    Factored: _factored,
    Sliced: _sliced,
}


def convolution(tree: Tree) -> Choice:
    """The form of a convolution's weight: sparse rows whose numbers go over the whole image, or dense."""
    weight = tree.mask if isinstance(tree, Sparse) else _array(tree)
    weight = np.asarray(weight).reshape(len(weight), -1)
    part = np.count_nonzero(weight) / max(1, weight.size)
    if native.library() is None or not 0 < weight.shape[1] <= 1 << 16:
        return Choice(None, "dense: nothing multiplies packed weights here")
    if part > IMAGE / SLOWER[SparseRows][native.simd()]:
        return Choice(None, f"dense: {part:.1%} of its weights are not zero, too many for a sparse convolution")
    if part * weight.shape[1] < ROW:
        return Choice(None, "dense: its output channels have too few weights each for a sparse convolution")
    form = sparse_rows(weight, _array(tree.values)) if isinstance(tree, Sparse) else _sparse_rows_of(weight)
    return Choice(form, f"{described(form)}, each times the whole image")

"""What stages do to the structure of a tree and may not do to its values: zeros held, places taken, slices kept.

A tree is plain where its values are floats by themselves: an array under any nest of `Sparse`, `Sliced` and `Reshaped`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tersenet.packed import (
    Array,
    Codebook,
    Factored,
    Packed,
    Reshaped,
    Sliced,
    Sparse,
    Transformed,
    Tree,
    Uniform,
    children,
    places,
    ungrouped,
    unpack,
)


def nodes(tree: Tree) -> Iterator[Packed]:
    """Every node of a tree, the outermost first."""
    if isinstance(tree, Packed):
        yield tree
        for _, child in children(tree):
            yield from nodes(child)


def is_plain(tree: Tree) -> bool:
    """Whether the values of a tree are floats by themselves, so that they may be scaled or put in place of."""
    if isinstance(tree, Sparse):
        return is_plain(tree.values)
    return is_plain(tree.child) if isinstance(tree, Sliced | Reshaped) else not isinstance(tree, Packed)


def once(change: Callable[[str, Array], Array]) -> Callable[[str, Array], Array]:
    """A change for `map_arrays` that is made once of an array: trees that share it share what becomes of it."""
    made: dict[int, tuple[Array, Array]] = {}  # the array too, so that its id stays its own

    def shared(path: str, array: Array) -> Array:
        if id(array) not in made:
            made[id(array)] = array, change(path, array)
        return made[id(array)][1]

    return shared


def support(tree: Tree) -> Array:
    """Where a tree may be other than zero by its structure: a boolean array of its shape."""
    if isinstance(tree, Sparse):
        return np.asarray(unpack(Sparse(tree.mask, support(tree.values))), bool)
    if isinstance(tree, Sliced | Reshaped):
        return np.asarray(unpack(replace(tree, child=support(tree.child))), bool)
    return np.ones(tree.shape, bool)


def refilled(tree: Tree, dense: Array) -> Tree:
    """A plain tree with other values, given dense; what lies outside its support is left out.

    Raises ValueError for a tree that is not plain.
    """
    if isinstance(tree, Sparse):
        return replace(tree, values=refilled(tree.values, dense[np.asarray(tree.mask)]))
    if isinstance(tree, Sliced):
        return replace(tree, child=refilled(tree.child, dense.take(places(tree.kept), tree.axis)))
    if isinstance(tree, Reshaped):
        return replace(tree, child=refilled(tree.child, _ordered(tree, dense)))
    if isinstance(tree, Packed):
        raise ValueError(f"the values of a {type(tree).__name__} node are not floats by themselves")
    return np.array(dense, tree.dtype)


def thinned(tree: Tree, mask: Array) -> Tree:
    """The tree with zeros held wherever the mask is not set, and where they were held before.

    Raises ValueError for a tree that is not plain, but for one under `Sparse`, whose values go.
    """
    if isinstance(tree, Sparse):
        old = np.asarray(tree.mask)
        stays = mask[old]
        return tree if stays.all() else Sparse(old & mask, taken(tree.values, 0, np.flatnonzero(stays)))
    if isinstance(tree, Sliced):
        return replace(tree, child=thinned(tree.child, mask.take(places(tree.kept), tree.axis)))
    if isinstance(tree, Reshaped):
        return replace(tree, child=thinned(tree.child, _ordered(tree, mask)))
    if mask.all():
        return tree
    if isinstance(tree, Packed):
        raise ValueError(f"a {type(tree).__name__} node holds no zeros at single places")
    w = np.asarray(tree)
    return Sparse(mask, w[mask])


def taken(tree: Tree, axis: int, wanted: Array) -> Tree:
    """The tree of `unpack(tree).take(wanted, axis)`, its values stored as they were; no place is taken twice.

    Raises ValueError where a node mixes the places of this axis with others.
    """
    wanted = np.asarray(wanted, np.int64)
    if isinstance(tree, Sparse):
        mask = np.asarray(tree.mask)
        number: Array = np.zeros(tree.shape, np.int64)
        number[mask] = np.arange(np.count_nonzero(mask))
        stays = mask.take(wanted, axis)
        return Sparse(stays, taken(tree.values, 0, number.take(wanted, axis)[stays]))
    if isinstance(tree, Sliced):
        return _taken_of_slice(tree, axis, wanted)
    if isinstance(tree, Uniform):
        return _taken_of_levels(tree, axis, wanted)
    if isinstance(tree, Codebook):
        return _taken_of_codewords(tree, axis, wanted)
    if isinstance(tree, Transformed):
        if axis >= len(tree.shape) - 2:
            raise ValueError("a Transformed node mixes the places of its last two axes")
        return Transformed(taken(tree.coefficients, axis, wanted))
    if isinstance(tree, Factored):
        return _taken_of_factors(tree, axis, wanted)
    if isinstance(tree, Reshaped):
        split = _same_axis(tree.size, tree.split, axis)
        ordered = tuple(tree.split[k] for k in tree.axes)
        child = taken(tree.child, *_same_places(ordered, tree.child.shape, tree.axes.index(split), wanted))
        return Reshaped(child, _put(tree.split, split, len(wanted)), tree.axes, _put(tree.size, axis, len(wanted)))
    if isinstance(tree, Packed):
        raise ValueError(f"places of a {type(tree).__name__} node cannot be taken")
    return np.asarray(tree).take(wanted, axis)


def sliced(tree: Tree, kept: Mapping[int, Array]) -> Tree:
    """The tree with zeros everywhere but in the kept places (ascending) of some axes, which alone are stored."""
    kept = {axis: np.asarray(there, np.int64) for axis, there in kept.items() if len(there) < tree.shape[axis]}
    child = tree
    for axis, there in kept.items():
        child = taken(child, axis, there)
    return placed(child, kept, tree.shape)


def placed(child: Tree, kept: Mapping[int, Array], shape: tuple[int, ...]) -> Tree:
    """A tree of a shape that holds a child in the kept places of some axes and zeros elsewhere."""
    for axis, there in kept.items():
        mask = np.zeros(shape[axis], bool)
        mask[there] = True
        child = Sliced(mask, child, axis, shape[axis])
    return child


def unsliced(tree: Tree) -> tuple[Tree, dict[int, Array]]:
    """What lies under the slices of a tree, and the places that they keep by axis: `placed` is the way back."""
    kept: dict[int, Array] = {}
    while isinstance(tree, Sliced):
        there = places(tree.kept)
        kept[tree.axis] = kept[tree.axis][there] if tree.axis in kept else there
        tree = tree.child
    return tree, dict(reversed(kept.items()))


def kept_places(tree: Tree, axis: int) -> Array:
    """The places of an axis that no slice around the tree leaves out."""
    found: Array = unsliced(tree)[1].get(axis, np.arange(tree.shape[axis]))
    return found


def _ordered(tree: Reshaped, dense: Array) -> Array:
    return dense.reshape(tree.split).transpose(tree.axes).reshape(tree.child.shape)


def _put(extents: tuple[int, ...], axis: int, n: int) -> tuple[int, ...]:
    return (*extents[:axis], n, *extents[axis + 1 :])


def _same_axis(one: tuple[int, ...], other: tuple[int, ...], axis: int) -> int:
    """The axis of another shape, of as many values, whose places are those of this one."""
    before = math.prod(one[:axis])
    for k, n in enumerate(other):
        if n == one[axis] and math.prod(other[:k]) == before:
            return k
    raise ValueError(f"axis {axis} of {one} is none of {tuple(other)}")


def _same_places(one: tuple[int, ...], other: tuple[int, ...], axis: int, wanted: Array) -> tuple[int, Array]:
    """The axis of another shape, of as many values, that has this one in it, and the places in it of those wanted.

    Of [16, 288] these are for place j of axis 1 of [16, 32, 3, 3] the places 9 j to 9 j + 8 of axis 1.
    """
    before = math.prod(one[:axis])
    for k, n in enumerate(other):
        outer, rest = divmod(before, max(math.prod(other[:k]), 1))
        inner, more = divmod(n, max(outer * one[axis], 1))
        if outer and not rest and not more:
            runs = np.arange(outer)[:, None] * one[axis] + wanted
            return k, (runs[..., None] * inner + np.arange(inner)).reshape(-1)
    raise ValueError(f"axis {axis} of {one} is none of {tuple(other)}")


def _taken_of_slice(tree: Sliced, axis: int, wanted: Array) -> Tree:
    if axis != tree.axis:
        return replace(tree, child=taken(tree.child, axis, wanted))
    number, kept = np.full(tree.size, -1), places(tree.kept)
    number[kept] = np.arange(len(kept))
    there = np.flatnonzero(number[wanted] >= 0)
    return placed(
        taken(tree.child, axis, number[wanted][there]),
        {axis: there} if len(there) < len(wanted) else {},
        _put(tree.shape, axis, len(wanted)),
    )


def _taken_of_levels(tree: Uniform, axis: int, wanted: Array) -> Tree:
    q = tree.q.take(wanted, axis)

    def part(values: Tree) -> Tree:
        own = axis - (len(tree.q.shape) - len(values.shape))
        if own < 0 or values.shape[own] == 1:
            return values
        by_group = values.shape[own] != tree.q.shape[axis]
        return taken(ungrouped(unpack(values), tree.q.shape) if by_group else values, own, wanted)

    def step(exponents: Array) -> Array:
        """Steps of rows are multiplied before those of columns, and told apart by their first extent."""
        found: Any = part(exponents)
        by_row = exponents.shape[:1] == tree.q.shape[:1]
        if by_row == (found.shape[:1] == q.shape[:1]):
            return found
        if by_row:
            aligned = found.reshape(*[1] * (q.ndim - found.ndim), *found.shape)
            return np.broadcast_to(aligned, (len(q), *aligned.shape[1:])).copy()
        return found.reshape(found.shape[next((k for k, n in enumerate(found.shape) if n > 1), len(found.shape)) :])

    zero = None if tree.zero is None else part(tree.zero)
    return Uniform(q, part(tree.scale), zero, tuple(map(step, tree.steps)))


def _taken_of_codewords(tree: Codebook, axis: int, wanted: Array) -> Tree:
    """With codewords of their own, the places that are left form groups again, the fewest that have one owner each."""
    blocks = _blocks(tree, axis, wanted)
    index = tree.index.take(blocks, axis)
    if axis or len(tree.codewords.shape) == 2 or not len(blocks):
        return replace(tree, index=index)
    owner = blocks // (tree.index.shape[0] // tree.codewords.shape[0])
    parts = (owner.reshape(n, -1) for n in range(1, 1 + len(owner)) if len(owner) % n == 0)
    groups = next(part[:, 0] for part in parts if (part == part[:, :1]).all())
    return Codebook(index, taken(tree.codewords, 0, groups))


def _blocks(tree: Codebook, axis: int, wanted: Array) -> Array:
    """The places of the index; where codewords are vectors, whole vectors alone can be taken of the last axis."""
    d = tree.codewords.shape[-1]
    if axis < len(tree.shape) - 1 or d == 1:
        return wanted
    whole = len(wanted) % d == 0 and (wanted.reshape(-1, d) == wanted[::d, None] // d * d + np.arange(d)).all()
    if not whole:
        raise ValueError(f"a Codebook node shares vectors of {d} values along its last axis")
    return wanted[::d] // d


def _taken_of_factors(tree: Factored, axis: int, wanted: Array) -> Tree:
    left, right = tree.equation.split("->")
    terms = left.split(",")
    extent = {c: n for term, f in zip(terms, tree.factors, strict=True) for c, n in zip(term, f.shape, strict=True)}
    letter = right[_same_axis(tree.size, tuple(extent[c] for c in right), axis)]
    factors = list(tree.factors)
    for at, term in enumerate(terms):
        for own, c in enumerate(term):
            if c == letter:
                factors[at] = taken(factors[at], own, wanted)
    return Factored(tree.equation, tuple(factors), _put(tree.size, axis, len(wanted)))

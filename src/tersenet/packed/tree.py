"""Trees of arrays: what a node is, and what is done with every tree whatever its nodes are.

torch is never imported: its functions are found through the tensors that a tree holds.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # np.ndarray or torch.Tensor, or a promise of one that has its shape and dtype
Tree: TypeAlias = "Packed | Array"

DEEPEST = 6  # slices of both channels, another order of axes, a transform, zeros, shared values


def namespace(array: Array) -> ModuleType:
    """torch for its tensors, NumPy for everything else; the functions used here have the same names in both."""
    return sys.modules["torch"] if type(array).__module__.startswith("torch") else np


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


def check_tree(tree: Tree, above: int = 0) -> None:
    """Raises ValueError unless every node's parts fit together and the tree is at most six nodes deep."""
    if isinstance(tree, Packed):
        require(above < DEEPEST, f"a tree is at most {DEEPEST} nodes deep")
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


def is_shape(extents: Any) -> bool:
    """Whether this is a tuple of at most 8 extents whose product, zeros left out, NumPy can count."""
    if not (isinstance(extents, tuple) and len(extents) <= 8):
        return False
    return all(isinstance(n, int) and n >= 0 for n in extents) and math.prod(n or 1 for n in extents) < 1 << 60


def is_mask(array: Array) -> bool:
    return str(array.dtype).endswith("bool")


def is_numpy(array: Array) -> bool:
    return namespace(array) is np


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


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

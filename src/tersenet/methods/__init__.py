"""What a weight may become. A method rewrites float arrays: `pack(w, stats)` gives a tree; `chain` applies one to the
float leaves that another left."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tersenet.packed import Array, Tree, is_integer, map_arrays

__all__ = ["Chain", "Method", "chain", "repack"]


class Method(Protocol):
    """A frozen dataclass that packs one array; `needs` names the statistics it wants."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        """The tree that stands for `w` from now on."""


def repack(tree: Tree, method: Method, stats: dict[str, Any] | None = None) -> Tree:
    """The tree with every float leaf of more than one value packed by the method."""

    def change(path: str, array: Array) -> Tree:
        return array if is_integer(array) or np.asarray(array).size < 2 else method.pack(np.asarray(array), stats)

    return map_arrays(tree, change)


@dataclass(frozen=True)
class Chain:
    """Methods one after the other, each on the float leaves of what came before."""

    methods: tuple[Method, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for method in self.methods for name in method.needs))

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        tree: Tree = w
        for method in self.methods:
            tree = repack(tree, method, stats)
        return tree


def chain(*methods: Method) -> Chain:
    """`chain(Magnitude(0.1), KMeans(5))`: a `Sparse` node that holds a `Codebook`."""
    return Chain(methods)

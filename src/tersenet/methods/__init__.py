"""What a weight may become. A method rewrites float arrays: `pack(w, stats)` gives a tree; `chain` applies one to the
float leaves that another left. Statistics that a method declares in `needs` come from `statistics.py`."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tersenet.packed import Array, Packed, Reshaped, Sliced, Sparse, Tree, is_integer, parts_of, places

__all__ = ["STATISTICS", "Chain", "Method", "chain", "needed", "repack"]

# What may be known of an array [groups * rows, ..] whose rows, as matrices [groups, rows, n], multiply inputs.
STATISTICS = {
    "inputs": "moments of the layer's inputs",  # [groups, n, n]
    "outputs": "moments of the gradients at the layer's outputs",  # [groups, rows, rows]
    "weights": "Fisher information of each weight",  # of the array's shape
}


class Method(Protocol):
    """A frozen dataclass that packs one array; `needs` names the statistics it wants.

    It may say what kinds of nodes it `makes` (`contract.py`).
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        """The tree that stands for `w` from now on."""


def repack(tree: Tree, method: Method, stats: dict[str, Any] | None = None) -> Tree:
    """The tree with every float leaf of more than one value packed by the method.

    `stats` are of the tree's dense array; a leaf gets those of the places where its values stand, if it has such.
    """
    if not isinstance(tree, Packed):
        return tree if is_integer(tree) or np.asarray(tree).size < 2 else method.pack(np.asarray(tree), stats)
    inner = _within(tree, stats or {})

    def change(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(change, part))
        return repack(part, method, inner) if isinstance(part, Packed) or hasattr(part, "shape") else part

    return type(tree)(**{name: change(getattr(tree, name)) for name in parts_of(type(tree))})


def _within(tree: Packed, stats: dict[str, Any]) -> dict[str, Any]:
    """What is known of the values under a node: of single weights, where each of them is one of the values."""
    if "weights" not in stats:
        return {}
    weights = np.asarray(stats["weights"])
    if isinstance(tree, Sparse):
        return {"weights": weights[tree.mask]}
    if isinstance(tree, Sliced):
        return {"weights": weights.take(places(tree.kept), tree.axis)}
    if isinstance(tree, Reshaped):
        return {"weights": weights.reshape(tree.split).transpose(tree.axes).reshape(tree.child.shape)}
    return {}


def needed(method: Method, name: str, stats: dict[str, Any] | None) -> Any:
    """One of the statistics; raises ValueError, with the remedy, where it is not there."""
    if not stats or name not in stats:
        raise ValueError(
            f"{type(method).__name__} needs the {STATISTICS[name]}: give a Task with training data, and pack with it"
            " before other methods do"
        )
    return stats[name]


@dataclass(frozen=True)
class Chain:
    """Methods one after the other, each on the float leaves of what came before."""

    methods: tuple[Method, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for method in self.methods for name in method.needs))

    @property
    def makes(self) -> tuple[type[Packed], ...]:
        return tuple(dict.fromkeys(kind for method in self.methods for kind in getattr(method, "makes", ())))

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        tree: Tree = w
        for method in self.methods:
            tree = repack(tree, method, stats)
        return tree


def chain(*methods: Method) -> Chain:
    """`chain(Magnitude(0.1), KMeans(5))`: a `Sparse` node that holds a `Codebook`."""
    return Chain(methods)

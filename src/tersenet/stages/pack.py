"""Pack weights with a method, or round the floats that are left; say in the ledger what stayed dense and why."""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import numpy as np

from tersenet.artifact import Tensor
from tersenet.draft import Draft, precise, round_leaves
from tersenet.methods import Method, repack
from tersenet.methods.kmeans import KMeans
from tersenet.packed import Packed, Tree, float_leaves
from tersenet.task import Task

SMALL = "dense: smaller than its codebook"
LEFT_OUT = "dense: left out by the recipe"


@dataclass(frozen=True)
class Pack:
    """Rewrite the float leaves of each weight whose name matches `only` with `method`.

    A tensor that packing would not make smaller (its floats after packing are as many as before) stays as it is.
    `other` packs the names that match its pattern instead, e.g. (("conv*", KMeans(8)),).
    """

    method: Method = field(default_factory=KMeans)
    only: str = "*"
    other: tuple[tuple[str, Method], ...] = ()

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        trees: dict[str, Tree] = {}
        notes: dict[str, str] = {}
        for name in draft.weights():
            method = next((m for pattern, m in self.other if fnmatch(name, pattern)), self.method)
            if not fnmatch(name, self.only):
                notes[name] = LEFT_OUT
                continue
            before = draft.tensors[name].tree
            tree = repack(before, method)
            if _floats(tree) >= _floats(before):
                notes[name] = SMALL
            else:
                trees[name] = tree
        return draft.with_trees(trees).with_notes(notes)


def _floats(tree: Tree) -> int:
    return sum(np.asarray(leaf).size for leaf in float_leaves(tree).values())


@dataclass(frozen=True)
class Narrow:
    """Round trainable float leaves (codewords, biases, norms) to "float16" or "bfloat16"; buffers keep every bit.

    A vector, as of biases or a norm's gains, stays as it is where one of its values would lose the type's precision.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError("Narrow takes float16 or bfloat16")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        renewed: dict[int, Tensor] = {}
        for name, tensor in draft.tensors.items():
            if name in draft.trainable and tensor.dtype == "float32":
                vector = len(tensor.tree.shape) < 2 and not isinstance(tensor.tree, Packed)
                tree = (precise if vector else round_leaves)(tensor.tree, self.dtype)
                if not all(np.isfinite(np.asarray(leaf)).all() for leaf in float_leaves(tree).values()):
                    raise ValueError(f"{name}: values too large for {self.dtype}; use bfloat16 or leave Narrow out")
                renewed.setdefault(id(tensor), replace(tensor, tree=tree))
        return replace(draft, tensors={n: renewed.get(id(t), t) for n, t in draft.tensors.items()})

"""What a tensor takes without any loss: a candidate beside all others, and at generous budgets the one to take."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tersenet.artifact import Artifact, Coding, Tensor
from tersenet.methods.exact import exact
from tersenet.packed import Array, Packed, Tree
from tersenet.structure import placed, unsliced

TABLE, FILE = 256, 220  # bits that a plane of bytes takes beside its entropy, and a file beside its arrays
BITS = Coding(("bits", "trits", "gaps", "context", "deflate"))


@dataclass(frozen=True)
class Lossless:
    """A tree that holds a tensor without loss, and about how many bits it takes."""

    tree: Tree
    bits: float


def lossless(tensors: Mapping[str, Tensor]) -> dict[str, Lossless]:
    """For each tensor the smallest tree that holds it without loss."""
    found: dict[str, Lossless] = {}
    for name, tensor in tensors.items():
        child, kept = unsliced(tensor.tree)
        trees = [] if isinstance(child, Packed) else exact(_positive(np.asarray(child)))
        trees = [placed(tree, kept, tensor.tree.shape) for tree in trees]
        trees += [tensor.tree] if isinstance(tensor.tree, Packed) else []
        options = [Lossless(tree, 8.0 * Artifact({"w": Tensor(tree, tensor.dtype)}, BITS).nbytes) for tree in trees]
        if not isinstance(tensor.tree, Packed):
            options.append(Lossless(tensor.tree, _float_bits(np.asarray(tensor.tree))))
        found[name] = min(options, key=lambda option: option.bits)
    return found


def entropy(q: Array) -> float:
    """Bits of integers as an ideal code without contexts would have them."""
    low, high = int(q.min(initial=0)), int(q.max(initial=0))
    if high - low < 1 << 20:
        counts = np.bincount((q - low).reshape(-1))
        counts = counts[counts > 0]
    else:
        counts = np.unique(q, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(q.size, 1))).sum())


def _float_bits(array: Array) -> float:
    """About how many bits a file takes that holds floats, their bytes coded plane by plane, each with its table."""
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize)
    return FILE + sum(entropy(planes[:, k].astype(np.int64)) + TABLE for k in range(array.itemsize))


def _positive(array: Array) -> Array:
    """The array with 0.0 for -0.0, which rounding leaves behind and no grid has."""
    return array + 0 if array.dtype.kind == "f" else array

"""Universal compression: one randomised lattice for all layers, whatever their weights are distributed like.

Choi, El-Khamy, Lee (2018): a dither that the decoder knows is added before rounding and taken away after it, so that
the error is uniform and does not depend on the weights. Integers of all layers share one table of values, which is
tuned with the mean of the gradients of a value's members; then any universal code serves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.contract import PACKED, Kind, check
from tersenet.draft import Draft
from tersenet.methods import repack
from tersenet.packed import Array, Codebook, Lattice, Packed, float_leaves, narrowed, sixteenth
from tersenet.splitmix import dither
from tersenet.structure import is_plain
from tersenet.task import Task


@dataclass(frozen=True)
class Universal:
    """Round all weights to one step, the largest |w| over 2^(bits - 1), after a dither for each `dimension` neighbours.

    Vectors of `dimension` integers are one symbol and share their values over all layers. Zeros of pruned weights stay
    zero. Without `dithered`, which takes one dimension, steps are plain ones.
    """

    bits: int = 5
    dimension: int = 1
    dithered: bool = True
    seed: int = 0
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, "it shares values itself: quantize plain weights")
    makes: ClassVar[tuple[Kind, ...]] = (Codebook, Lattice)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 12 or not 1 <= self.dimension <= 8:
            raise ValueError("Universal takes 2 to 12 bits and vectors of 1 to 8 weights")
        if not self.dithered and self.dimension > 1:
            raise ValueError("Universal without a dither takes one dimension")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        names = [name for name in draft.weights() if is_plain(draft.tensors[name].tree)]
        leaves = {n: np.asarray(next(iter(float_leaves(draft.tensors[n].tree).values()))) for n in names}
        top = max((float(np.abs(leaf).max(initial=0)) for leaf in leaves.values()), default=0.0)
        if not top:
            return draft
        step = max(-1600, min(1600, round(16 * math.log2(top / 2 ** (self.bits - 1)))))
        lattices = {n: _Lattice(step, self.seed + k, self.dimension, self.dithered) for k, n in enumerate(names)}
        points = [lattices[n].points(leaf) for n, leaf in leaves.items() if leaf.size]
        table = np.unique(np.concatenate(points), axis=0)
        codewords = (table * float(sixteenth(step))).astype(np.float32)
        made = {n: repack(draft.tensors[n].tree, _Given(lattices[n], table, codewords)) for n in names}
        return draft.with_trees(made)


@dataclass(frozen=True)
class _Lattice:
    """A step of 2^(step/16) and a dither."""

    step: int
    seed: int
    dimension: int
    dithered: bool

    def points(self, values: Array) -> Array:
        """The integers [vectors, dimension] of values, the last vector filled with zeros."""
        flat, n = values.reshape(-1).astype(np.float64), self.dimension
        padded = np.concatenate([flat, np.zeros(-len(flat) % n)]).reshape(-1, n) / float(sixteenth(self.step))
        if self.dithered:
            padded = padded + dither(self.seed, len(padded)).astype(np.float64)[:, None]
        return np.rint(padded).astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Given:
    """Values whose points stand in a table, as numbers of its rows."""

    lattice: _Lattice
    table: Array  # [rows, dimension], in ascending order
    codewords: Array
    needs: ClassVar[tuple[str, ...]] = ()

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        points = self.lattice.points(w)
        both = np.concatenate([self.table, points])
        _, number = np.unique(both, axis=0, return_inverse=True)
        index = narrowed(number.reshape(-1)[len(self.table) :])
        if not self.lattice.dithered:
            return Codebook(index.reshape(w.shape), self.codewords)
        point = Codebook(index, self.codewords)
        return Lattice(point, self.lattice.step, self.lattice.seed, self.lattice.dimension, tuple(w.shape))

"""Compact filters: kernels of a form that says as much with fewer numbers, begun as the nearest to the given ones.

Each form is a tree of the whole kernel, so that one file opens as the network that it was made of; no activation comes
between the parts, as there is in networks that are designed of such filters. Without training they are far from what
they replace: `papers.compact_filters` distils them.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.methods.sparse import kept_count, largest
from tersenet.packed import Array, Factored, Packed, Sparse, Tree, Uniform

UNFIT = "dense: not of the shape that compact filters need"


@dataclass(frozen=True)
class Separable:
    """Depthwise separable (Howard et al. 2017): a kernel for each input channel, and 1 x 1 from there.

    What all rows do with one input channel has rank 1 then; the nearest is its largest singular value's.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)
    note: ClassVar[str] = UNFIT

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if not _is_kernel(w) or w.shape[1] < 2:
            return w
        u, s, v = np.linalg.svd(w.reshape(*w.shape[:2], -1).swapaxes(0, 1).astype(np.float64), full_matrices=False)
        root = np.sqrt(s[:, :1])  # both halves of a channel on one level
        points, depths = (u[..., 0] * root).T, (v[:, 0] * root).reshape(w.shape[1:])
        letters = "hwd"[: w.ndim - 2]
        return Factored(f"oi,i{letters}->oi{letters}", (_single(points), _single(depths)), tuple(w.shape))


@dataclass(frozen=True)
class Fire:
    """A fire module's shape (Iandola et al. 2016): 1 x 1 to few channels, then rows of 1 x 1 and rows of whole kernels.

    There are `squeeze` times as many channels between as rows; `wide` of the rows keep their whole kernel, those that
    lose most without it. The nearest is the SVD of what is left.
    """

    squeeze: float = 0.25
    wide: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)
    note: ClassVar[str] = UNFIT

    def __post_init__(self) -> None:
        if not 0 < self.squeeze <= 1 or not 0 < self.wide <= 1:
            raise ValueError("Fire takes parts of the rows in (0, 1]")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if not _is_kernel(w) or w.shape[1] < 2 or any(n % 2 == 0 for n in w.shape[2:]):
            return w
        rows, inputs, places = len(w), w.shape[1], np.asarray(w, np.float64).reshape(*w.shape[:2], -1)
        middle = np.arange(places.shape[2]) == places.shape[2] // 2
        lost = np.square(places[..., ~middle]).sum((1, 2))
        kept = largest(lost, kept_count(self.wide, rows))[:, None, None] | middle
        between = min(kept_count(self.squeeze, rows), inputs)
        v = np.linalg.svd((places * kept).swapaxes(1, 2).reshape(-1, inputs), full_matrices=False)[2][:between]
        expand = ((places * kept).swapaxes(1, 2) @ v.T).swapaxes(1, 2).reshape(rows, between, *w.shape[2:])
        mask = np.broadcast_to(kept, (rows, between, places.shape[2])).reshape(expand.shape)
        letters = "hwd"[: w.ndim - 2]
        factors = Sparse(mask.copy(), _single(expand)[mask]), _single(v)
        return Factored(f"or{letters},ri->oi{letters}", factors, tuple(w.shape))


@dataclass(frozen=True)
class Grouped:
    """Convolution in groups with shuffled channels (Zhang et al. 2018): each row reads every `groups`-th input channel.

    Rows of a group lie together and its inputs apart, so that the next layer mixes the groups.
    """

    groups: int = 2
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Sparse,)
    note: ClassVar[str] = UNFIT

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError("Grouped takes 2 groups or more")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim < 3 or w.shape[0] % self.groups or w.shape[1] % self.groups:
            return w
        group = np.arange(w.shape[0]) * self.groups // w.shape[0]
        reads = group[:, None] == np.arange(w.shape[1]) % self.groups
        mask = np.broadcast_to(reads.reshape(*reads.shape, *[1] * (w.ndim - 2)), w.shape).copy()
        return Sparse(mask, np.asarray(w, np.float32)[mask])


@dataclass(frozen=True)
class CReLU:
    """Filters in pairs of opposite sign, as concatenated ReLU has them (Shang et al. 2016): half as many are stored.

    Pairs are those that are most opposite, taken greedily; the nearest filter of two is half of their difference. The
    paper finds such pairs in the first layers of trained networks.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)
    note: ClassVar[str] = UNFIT

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim < 3 or len(w) % 2:
            return w
        rows = np.asarray(w, np.float64).reshape(len(w), -1)
        norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(np.float64).tiny)
        alike = (rows / norms[:, None]) @ (rows / norms[:, None]).T
        alike[np.tril_indices(len(w))] = np.inf
        signs = np.zeros((len(w), len(w) // 2), np.int8)
        for pair in range(len(w) // 2):
            one, other = np.unravel_index(np.argmin(alike), alike.shape)
            signs[one, pair], signs[other, pair] = 1, -1
            for taken in (one, other):
                alike[taken], alike[:, taken] = np.inf, np.inf
        filters = _single(signs.T @ rows / 2).reshape(-1, *w.shape[1:])
        letters = "ihwd"[: w.ndim - 1]
        return Factored(f"ok,k{letters}->o{letters}", (_whole(signs), filters), tuple(w.shape))


@dataclass(frozen=True)
class Rotations:
    """Filters shared over four rotations (the group p4 of Cohen and Welling 2016): a quarter as many are stored.

    Rows are four turns of a quarter of them. So are the input channels, if four divides their number: a turned filter
    reads them turned and moved on by one, otherwise turned alone, as an image. The nearest is the mean over the turns.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)
    note: ClassVar[str] = UNFIT

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim != 4 or not _is_kernel(w) or w.shape[2] != w.shape[3] or len(w) % 4:
            return w
        sides = 1 if w.shape[1] % 4 else 4
        turns = _turns(w.shape[2], sides)
        whole = np.asarray(w, np.float64).reshape(4, len(w) // 4, sides, w.shape[1] // sides, -1)
        filters = np.einsum("rkslp,rsptq->ktlq", whole, turns) / 4
        equation = "ktlq,rsptq->rkslp"
        return Factored(equation, (_single(filters), _whole(turns)), tuple(w.shape))


@functools.cache
def _turns(extent: int, sides: int) -> Array:
    """Where the row of turn r finds its value for input side s at place p: side t and place q of the filter, or not."""
    places = np.arange(extent**2).reshape(extent, extent)
    made = np.zeros((4, sides, extent**2, sides, extent**2), np.int8)
    for r in range(4):
        turned = np.rot90(places, r).reshape(-1)
        for s in range(sides):
            made[r, s, np.arange(extent**2), (s - r) % sides, turned] = 1
    return made


def _is_kernel(w: Array) -> bool:
    """Whether it has places to look at, and more than one."""
    return w.ndim > 2 and int(np.prod(w.shape[2:])) > 1


def _single(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32)


def _whole(numbers: Array) -> Uniform:
    """Numbers of -1, 0 and 1 that no training tells apart."""
    return Uniform(numbers, np.ones((1,) * numbers.ndim, np.float32))

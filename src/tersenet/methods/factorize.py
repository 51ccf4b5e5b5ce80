"""Weights as chains of smaller layers: SVD, plain or in the metric of a layer's data, and Tucker-2.

SVD of a kernel [O, I, D, D] has two forms (Kim, Khan, Kyung 2019, section 3.1): by channels, D x D to r channels and
1 x 1 from them, or by space, D x 1 to r channels and 1 x D from them. With moments A = L L^T of the inputs the product
of rank r that loses least of the outputs, tr(E A E^T), is that of W L with L^-1 behind it. By space A is the mean over
the columns of the kernel, as if what these read were independent, so the product is only near the best. Gradients at
the outputs are left out: they tell what small errors cost, and those of a rank are large (docs/notes.md has figures).

Tucker-2 (Kim et al. 2016) has D x D from s to r channels between two layers of 1 x 1: the factors are the leading left
singular vectors of both unfoldings, improved in turns by HOOI (De Lathauwer, De Moor, Vandewalle 2000).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tersenet.methods import needed
from tersenet.methods.evbmf import evbmf
from tersenet.methods.surgeon import damped
from tersenet.packed import Array, Factored, Packed, Tree

DAMPING = 0.03  # of moments, as a part of their mean diagonals
FEW = 4  # input channels, as of an image, that are left as they are
TURNS = 5  # of HOOI
PART = 0.5  # of the largest rank that saves anything, where nothing else is asked


@dataclass(frozen=True, eq=False)
class Products:
    """The products of two factors that stand for a weight: left [groups, rows.., k] times right [groups, k, columns..].

    `values` [groups, k] are the singular values, in the metric if there is one.
    """

    equation: str
    left: Tensor
    right: Tensor
    values: Array
    size: tuple[int, ...]

    @property
    def each(self) -> int:
        """How many numbers a rank takes."""
        return int(self.left[..., 0].numel() + self.right[:, 0].numel())

    @property
    def most(self) -> int:
        """The largest rank that saves anything."""
        return min(int(self.values.shape[1]), (math.prod(self.size) - 1) // self.each)

    def tree(self, rank: int) -> Factored:
        """The weight at a rank."""
        both = self.left[..., :rank], self.right[:, :rank]
        if "g" not in self.equation:
            both = both[0][0], both[1][0]
        return Factored(self.equation, (single(both[0]), single(both[1])), self.size)


def products(w: Array, spatial: bool = False, inputs: Array | None = None) -> Products:
    """All that SVD may make of a weight: by space where a kernel has two axes and it is asked, else by channels.

    Moments are [groups, n, n]; without them it is one group, whose rows are the first axis.
    """
    groups, n = (1, math.prod(w.shape[1:])) if inputs is None else inputs.shape[:2]
    matrix = torch.from_numpy(np.asarray(w, np.float64)).reshape(groups, -1, n)
    rows, channel = matrix.shape[1], next(a for a in range(1, w.ndim) if math.prod(w.shape[a:]) == n)
    extents = w.shape[channel:]  # of the columns: channels, and the kernel
    apart = spatial and len(extents) == 3 and min(extents[1:]) > 1
    wide = extents[2] if apart else 1
    behind = _root(inputs if inputs is None or not apart else _averaged(inputs, extents))
    if apart:
        matrix = matrix.reshape(groups, rows, *extents).permute(0, 1, 4, 2, 3)
    matrix = matrix.reshape(groups, rows * wide, n // wide)
    u, values, v = torch.linalg.svd(matrix if behind is None else matrix @ behind, full_matrices=False)
    left, right = u * values.sqrt()[:, None], v * values.sqrt()[..., None]
    if behind is not None:
        right = torch.linalg.solve_triangular(behind, right, upper=False, left=False)
    k, lead = values.shape[1], "g" if groups > 1 else ""
    if apart:
        equation = f"{lead}owr,{lead}rih->{lead}oihw"
        left, right = left.reshape(groups, rows, wide, k), right.reshape(groups, k, *extents[:2])
    elif math.prod(extents[1:]) > 1:
        equation = f"{lead}or,{lead}rik->{lead}oik"
        left, right = left.reshape(groups, rows, k), right.reshape(groups, k, extents[0], -1)
    else:
        equation = f"{lead}or,{lead}ri->{lead}oi"
        left, right = left.reshape(groups, rows, k), right.reshape(groups, k, n)
    return Products(equation, left, right, values.numpy(), tuple(w.shape))


def _root(moments: Array | None) -> Tensor | None:
    """The Cholesky factor of damped moments."""
    return None if moments is None else torch.linalg.cholesky(torch.from_numpy(damped(np.asarray(moments), DAMPING)))


def _averaged(moments: Array, extents: tuple[int, ...]) -> Array:
    """Moments [groups, I H, I H] of what each column of a kernel reads, the mean over the columns."""
    i, h, w = extents
    mean: Array = np.einsum("gihwjkw->gihjk", moments.reshape(-1, i, h, w, i, h, w)) / w
    return mean.reshape(-1, i * h, i * h)


def single(tensor: Tensor) -> Array:
    """A factor as it is stored."""
    return np.ascontiguousarray(tensor.numpy(), np.float32)


def ranked(rank: int | None, part: float | None, most: int) -> int:
    """The rank that is asked for: a number, or a part of the largest that saves anything, at least 1."""
    return rank if rank is not None else max(1, int((part or 0) * most))


def settle(method: object, usual: str, otherwise: float, names: tuple[str, ...]) -> None:
    """Give the usual one of some settings a value where none of them is given.

    Raises ValueError where more than one is, or one is out of its bounds.
    """
    given = {name: getattr(method, name) for name in names}
    if all(one is None for one in given.values()):
        given[usual] = otherwise
        object.__setattr__(method, usual, otherwise)
    name, known = type(method).__name__, {k: v for k, v in given.items() if v is not None}
    if len(known) != 1:
        raise ValueError(f"{name} takes one of {', '.join(given)}")
    for setting, value in known.items():
        least = min(value) if isinstance(value, tuple) else value
        if least <= 0 or (setting == "part" and least > 1) or (setting == "ranks" and len(value) != 2):
            raise ValueError(f"{name}: {setting} is {value}; ranks are 1 or more, a part is in (0, 1], a scale above 0")


@dataclass(frozen=True)
class SVD:
    """Two factors of a `rank`, or of a `part` of the largest rank that saves anything, half of it by default.

    Kernels by channels or, if `spatial`, by space. `weighted` reads `stats["inputs"]` and loses least of the outputs;
    groups are factored apart there. A rank that saves nothing leaves the weight whole.
    """

    rank: int | None = None
    part: float | None = None
    spatial: bool = False
    weighted: bool = True
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)

    def __post_init__(self) -> None:
        settle(self, "part", PART, ("rank", "part"))

    @property
    def needs(self) -> tuple[str, ...]:
        return ("inputs",) if self.weighted else ()

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim < 2:
            return w
        found = products(w, self.spatial, *(needed(self, name, stats) for name in self.needs))
        rank = ranked(self.rank, self.part, found.most)
        return found.tree(rank) if rank <= found.most else w


@dataclass(frozen=True)
class Tucker2:
    """Channels to and from a smaller kernel: `ranks` of rows and columns, the same `part` of both, or EVBMF's.

    `part` is of the largest that saves anything; `scale` multiplies the ranks that EVBMF finds (Kim et al. 2016), which
    is done by default. Matrices, kernels of 1 x 1 and those that read few channels have two factors (Tucker-1). Grouped
    kernels are taken as they lie, as if all groups read the same channels. Ranks that save nothing leave the weight
    whole.
    """

    ranks: tuple[int, int] | None = None
    part: float | None = None
    scale: float | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)

    def __post_init__(self) -> None:
        settle(self, "scale", 1.0, ("ranks", "part", "scale"))

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim < 2:
            return w
        if w.shape[1] <= FEW or math.prod(w.shape[2:]) == 1:
            return self._one(w)
        x = torch.from_numpy(np.asarray(w, np.float64)).reshape(*w.shape[:2], -1)
        rows, columns = self._two(x)
        rows, columns = min(rows, columns * x.shape[2]), min(columns, rows * x.shape[2])
        if len(x) * rows + math.prod((rows, columns, x.shape[2])) + columns * x.shape[1] >= w.size:
            return w
        return Factored("or,rsk,si->oik", tuple(map(single, tucker2(x, rows, columns))), tuple(w.shape))

    def _one(self, w: Array) -> Tree:
        found = products(w)
        if self.scale is None:
            rank = ranked(self.ranks and self.ranks[0], self.part, found.most)
        else:
            rank = self._scaled(found.values[0], (len(w), w.size // len(w)))
        return found.tree(rank) if rank <= found.most else w

    def _two(self, x: Tensor) -> tuple[int, int]:
        """The ranks of rows and columns."""
        rows, columns = x.shape[:2]
        if self.ranks is not None:
            return min(self.ranks[0], rows), min(self.ranks[1], columns)
        if self.part is not None:  # at t of both, (O^2 + I^2) t + D^2 O I t^2 numbers are D^2 O I
            whole, thin = math.prod(x.shape), rows**2 + columns**2
            t = self.part * (math.sqrt(thin**2 + 4 * whole**2) - thin) / (2 * whole)
            return max(1, int(t * rows)), max(1, int(t * columns))
        both = (x.reshape(rows, -1), x.transpose(0, 1).reshape(columns, -1))
        found = (self._scaled(torch.linalg.svdvals(m).numpy(), (m.shape[0], m.shape[1])) for m in both)
        return min(next(found), rows), min(next(found), columns)

    def _scaled(self, values: Array, shape: tuple[int, int]) -> int:
        return max(1, round((self.scale or 0) * max(1, evbmf(values, shape))))


def tucker2(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, rows], core [rows, columns, K] and V [columns, I] of a tensor [O, I, K], U and V of orthonormal vectors."""
    v = _leading(x.transpose(0, 1), columns)
    for _ in range(TURNS):
        u = _leading(torch.einsum("oik,is->osk", x, v), rows)
        v = _leading(torch.einsum("oik,or->irk", x, u), columns)
    return u, torch.einsum("oik,or,is->rsk", x, u, v), v.T


def _leading(x: Tensor, count: int) -> Tensor:
    """The leading left singular vectors of the first unfolding."""
    vectors: Tensor = torch.linalg.svd(x.reshape(len(x), -1), full_matrices=False)[0][:, :count]
    return vectors

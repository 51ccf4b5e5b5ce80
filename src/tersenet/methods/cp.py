"""CP: a kernel as a sum of outer products, W = sum_r a_r x b_r x c_r x d_r (Lebedev et al. 2015, section 3).

As layers: 1 x 1 to r channels, one row and one column of the kernel for each of them, 1 x 1 from them. The factors are
fitted in turns, each by least squares for the others (Carroll, Chang 1970). A small ridge keeps components from growing
without bounds against each other, which they do where no best sum exists (de Silva, Lim 2008).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tersenet.methods.factorize import PART, products, ranked, settle, single
from tersenet.packed import Array, Factored, Packed, Tree

RIDGE = 1e-6  # as a part of the mean diagonal of the normal equations
ENOUGH = 1e-7  # change of the relative error at which the turns end
LETTERS = "oihwd"


@dataclass(frozen=True)
class CP:
    """A sum of `rank` components, or of a `part` of the most that save anything, half of them by default.

    `turns` over all factors at most; they begin with singular vectors, then random ones. Matrices and kernels of 1 x 1
    are SVDs. A rank that saves nothing leaves the weight whole.
    """

    rank: int | None = None
    part: float | None = None
    turns: int = 50
    seed: int = 0
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)

    def __post_init__(self) -> None:
        settle(self, "part", PART, ("rank", "part"))
        if self.turns < 1:
            raise ValueError("CP takes at least one turn")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim < 2:
            return w
        if math.prod(w.shape[2:]) == 1:
            found = products(w)
            rank = ranked(self.rank, self.part, found.most)
            return found.tree(rank) if rank <= found.most else w
        most = (w.size - 1) // sum(w.shape)
        rank = ranked(self.rank, self.part, most)
        if rank > most:
            return w
        factors = cp(torch.from_numpy(np.asarray(w, np.float64)), rank, self.turns, self.seed)
        letters = LETTERS[: w.ndim]
        terms = ("or", *(f"r{c}" for c in letters[2:]), "ri")  # as a chain of layers has them
        ordered = (factors[0], *(f.T for f in factors[2:]), factors[1].T)
        return Factored(f"{','.join(terms)}->{letters}", tuple(map(single, ordered)), tuple(w.shape))


def cp(x: Tensor, rank: int, turns: int, seed: int = 0) -> list[Tensor]:
    """A factor [extent, rank] for each axis of a tensor; those of a component are of one length."""
    draw = torch.Generator().manual_seed(seed)
    factors = [_start(x.movedim(axis, 0), rank, draw) for axis in range(x.dim())]
    letters, whole, before = LETTERS[: x.dim()], float(x.square().sum()), math.inf
    for _ in range(turns):
        for axis, own in enumerate(letters):
            others = [(c, f) for c, f in zip(letters, factors, strict=True) if c != own]
            gram = math.prod((f.T @ f for _, f in others[1:]), start=others[0][1].T @ others[0][1])
            gram = gram + (RIDGE * float(gram.diagonal().mean()) + 1e-300) * torch.eye(rank, dtype=gram.dtype)
            terms = ",".join(f"{c}r" for c, _ in others)
            right = torch.einsum(f"{letters},{terms}->{own}r", x, *(f for _, f in others))
            factors[axis] = torch.linalg.solve(gram, right.T).T
            if axis + 1 < x.dim():
                factors[axis] = factors[axis] / factors[axis].norm(dim=0).clamp_min(1e-300)
        # with the others as they are, |x - found|^2 = |x|^2 - 2 <x, found> + |found|^2
        last = factors[-1]
        lost = whole - 2 * float((right * last).sum()) + float(((last @ gram) * last).sum())
        if before - lost <= ENOUGH * whole:
            break
        before = lost
    lengths = torch.stack([f.norm(dim=0) for f in factors]).clamp_min(1e-300)
    even = lengths.log().mean(0).exp()
    return [f * (even / own) for f, own in zip(factors, lengths, strict=True)]


def _start(x: Tensor, rank: int, draw: torch.Generator) -> Tensor:
    """The leading left singular vectors of the first unfolding, and random vectors where there are no more."""
    vectors = torch.linalg.svd(x.reshape(len(x), -1), full_matrices=False)[0][:, :rank]
    more = torch.randn(len(x), rank - vectors.shape[1], dtype=x.dtype, generator=draw) / math.sqrt(len(x))
    return torch.cat([vectors, more], 1)

"""Tensor trains: a matrix or kernel as a product of small cores over parts of its axes (Oseledets 2011).

Rows M = m_1 .. m_d and columns N = n_1 .. n_d are split; W[(i_1 .. i_d), (j_1 .. j_d)] = G_1[i_1, j_1] .. G_d[i_d, j_d]
with matrices G_k[i, j] of r_{k-1} x r_k (Novikov et al. 2015, equation 2). A kernel has one core more, for its places,
before those of its channels (Garipov et al. 2016, equation 6).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tersenet.methods.factorize import PART, ranked, settle, single
from tersenet.packed import Array, Factored, Packed, Tree

ROWS, COLUMNS, RANKS, PLACE = "abcdefg", "ijklmno", "tuvwxyz", "p"
MOST = 7  # cores, beside that of a kernel


@dataclass(frozen=True)
class TensorTrain:
    """`cores` over balanced parts of rows and columns, or the parts `rows` and `columns`, with a cap on their ranks.

    The cap is a `rank`, or a `part` of the largest that saves anything, half of it by default; one that saves nothing
    leaves the weight whole. There is no chain of layers that says the same.
    """

    rank: int | None = None
    part: float | None = None
    cores: int = 3
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[type[Packed], ...]] = (Factored,)

    def __post_init__(self) -> None:
        settle(self, "part", PART, ("rank", "part"))
        parts = len(self.rows)
        if not 2 <= (parts or self.cores) <= MOST or len(self.columns) != parts:
            raise ValueError(f"TensorTrain takes 2 to {MOST} cores, and as many parts of the rows as of the columns")

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Tree:
        if w.ndim < 2:
            return w
        rows, columns = self.rows or balanced(w.shape[0], self.cores), self.columns or balanced(w.shape[1], self.cores)
        if (math.prod(rows), math.prod(columns)) != w.shape[:2]:
            raise ValueError(f"parts {rows} and {columns} do not make up {w.shape[0]} rows and {w.shape[1]} columns")
        area = math.prod(w.shape[2:])
        places = (area,) if area > 1 else ()
        extents = (*places, *(m * n for m, n in zip(rows, columns, strict=True)))
        most = _most(extents, w.size)
        rank = ranked(self.rank, self.part, most)
        if not 1 <= rank <= most:
            return w
        d, p = len(rows), len(places)
        split = torch.from_numpy(np.asarray(w, np.float64)).reshape(*rows, *columns, *places)
        pairs = split.permute(*[2 * d] * p, *(axis for k in range(d) for axis in (k, d + k)))
        cores = list(tensor_train(pairs.reshape(extents), rank))
        terms = [PLACE] * p + [ROWS[k] + COLUMNS[k] for k in range(d)]
        for k, (core, own) in enumerate(zip(cores, terms, strict=True)):
            first, last = k == 0, k + 1 == len(cores)
            inner = (rows[k - p], columns[k - p]) if k >= p else places
            cores[k] = core.reshape(*core.shape[: not first], *inner, *core.shape[2 : 3 - last])
            terms[k] = RANKS[k - 1] * (not first) + own + RANKS[k] * (not last)
        equation = f"{','.join(terms)}->{ROWS[:d]}{COLUMNS[:d]}{PLACE * p}"
        return Factored(equation, tuple(map(single, cores)), tuple(w.shape))


def tensor_train(x: Tensor, cap: int) -> list[Tensor]:
    """Cores [r, extent, s] of a tensor whose ranks are at most `cap`, by SVDs from the first axis on (TT-SVD)."""
    cores, rest, rank = list[Tensor](), x, 1
    for n in x.shape[:-1]:
        u, s, v = torch.linalg.svd(rest.reshape(rank * n, -1), full_matrices=False)
        kept = min(cap, len(s))
        cores.append(u[:, :kept].reshape(rank, n, kept))
        rest, rank = s[:kept, None] * v[:kept], kept
    return [*cores, rest.reshape(rank, x.shape[-1], 1)]


def balanced(n: int, count: int) -> tuple[int, ...]:
    """A number as a product of so many that are as equal as its prime factors allow, the larger first.

    >>> balanced(96, 3), balanced(10, 3)
    ((6, 4, 4), (5, 2, 1))
    """
    parts, primes, p = [1] * count, list[int](), 2
    while n > 1:
        while n % p == 0:
            primes.append(p)
            n //= p
        p = p + 1 if p * p <= n else max(n, 2)
    for prime in reversed(primes):
        parts[parts.index(min(parts))] *= prime
    return tuple(sorted(parts, reverse=True))


def numbers(extents: Sequence[int], cap: int) -> int:
    """How many numbers the cores have."""
    inner = [min(cap, math.prod(extents[:k]), math.prod(extents[k:])) for k in range(1, len(extents))]
    return sum(r * n * s for r, n, s in zip([1, *inner], extents, [*inner, 1], strict=True))


def _most(extents: Sequence[int], size: int) -> int:
    """The largest cap that saves anything, or 0."""
    low, high = 0, math.isqrt(size) + 1  # no rank is larger
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if numbers(extents, middle) < size else (low, middle)
    return low

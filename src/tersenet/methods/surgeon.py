"""Optimal brain surgery of one layer: which weights to remove, and how the others make up for it.

A layer with rows w of weights and the second moment A = E[u u^T] of its inputs loses |(w - v) A^(1/2)|^2 when v takes
the place of w. Removing weight p alone, and moving the others best, costs w_p^2 / [A^-1]_pp (Hassibi, Stork 1993).

`removals` removes one weight after the other, exactly (ExactOBS: Frantar, Alistarh 2022, algorithm 1). `refitted` gives
the best survivors for any mask, which is what ExactOBS ends in as well. `swept` chooses a mask by blocks of columns
and makes up for each column in those after it (SparseGPT: Frantar, Alistarh 2023), for layers that are too large.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from tersenet import native
from tersenet.methods import needed
from tersenet.methods.sparse import kept_count, largest
from tersenet.packed import Array, Packed, Sparse


def inverse(moments: Array) -> Array:
    """A^-1 [..., n, n], by torch, whose threads a caller can hold to one so that no sum depends on their number."""
    found: Array = torch.linalg.inv(torch.from_numpy(np.ascontiguousarray(moments))).numpy()
    return found


def solved(moment: Array, right: Array) -> Array:
    """A^-1 b for A [n, n] and b [n, any], by torch as well."""
    found: Array = torch.linalg.solve(
        *(torch.from_numpy(np.ascontiguousarray(part)) for part in (moment, right))
    ).numpy()
    return found


def removals(w: Array, inverted: Array, count: int) -> tuple[Array, Array]:
    """The places that the surgeon removes from one row, in order, and what each costs; `inverted` is A^-1 [n, n].

    Costs are in the layer's output error and add up. Among equals the earlier place goes first.
    """
    n = len(w)
    order, costs = np.zeros(count, np.int32), np.zeros(count)
    rest, left = np.array(w, np.float64), np.array(inverted, np.float64)
    done = native.call("surgeon", rest, left, n, count, order, costs)
    if done is not None:
        if done != count:
            raise RuntimeError(f"the surgeon failed ({done})")
        return order, costs
    gone = np.zeros(n, bool)
    for k in range(count):
        diagonal = np.diagonal(left)
        score = np.where(gone, np.inf, rest * rest / np.where(gone, 1.0, diagonal))
        p = int(np.argmin(score))
        order[k], costs[k], gone[p] = p, score[p], True
        column = left[p] / left[p, p]
        rest -= rest[p] * column
        left -= left[p][:, None] * column[None]
    return order, costs


def refitted(w: Array, mask: Array, moment: Array) -> Array:
    """Rows [m, n] that are zero outside the mask and lose least in the metric A [n, n], in float64."""
    found = np.zeros(w.shape)
    for i, kept in enumerate(mask):
        if kept.any():
            right = (torch.from_numpy(moment[kept]) @ torch.from_numpy(w[i])[:, None]).numpy()
            found[i, kept] = solved(moment[np.ix_(kept, kept)], right)[:, 0]
    return found


def swept(w: Array, moment: Array, density: float, block: int = 128, free: Array | None = None) -> tuple[Array, Array]:
    """Rows [m, n] at a density and their mask, by one sweep over the columns; what is not `free` stays zero."""
    upper = torch.linalg.cholesky(torch.from_numpy(inverse(moment)), upper=True).numpy()  # A^-1 = U^T U
    rest, mask = np.array(w, np.float64), np.zeros(w.shape, bool)
    kept, seen = 0, 0
    for begin in range(0, w.shape[1], block):
        end = min(begin + block, w.shape[1])
        seen += (end - begin) * len(w)
        score = np.square(rest[:, begin:end] / np.diagonal(upper)[begin:end])
        most = max(0, kept_count(density, seen) - kept)  # what rounding left to earlier blocks is made up for
        if free is not None:
            score = np.where(free[:, begin:end], score, -1.0)
        mask[:, begin:end] = largest(score, most) & (score >= 0)
        kept += int(np.count_nonzero(mask[:, begin:end]))
        for j in range(begin, end):
            error = np.where(mask[:, j], 0.0, rest[:, j]) / upper[j, j]
            rest[:, j:] -= error[:, None] * upper[j, j:]
    return np.where(mask, rest, 0.0), mask


@dataclass(frozen=True)
class SparseGPT:
    """One sweep with the moments of the layer's inputs, `stats["inputs"]` [groups, n, n], damped.

    Raises ValueError without them: it would be magnitude pruning. `OBS(order="sweep")` lets biases take up the mean of
    what is lost as well.
    """

    density: float = 0.5
    damping: float = 0.01
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    makes: ClassVar[tuple[type[Packed], ...]] = (Sparse,)

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w, moments = np.asarray(w), damped(np.asarray(needed(self, "inputs", stats)), self.damping)
        rows = np.asarray(w, np.float64).reshape(len(moments), -1, moments.shape[1])
        parts = [swept(part, moment, self.density) for part, moment in zip(rows, moments, strict=True)]
        dense, mask = (np.stack([part[k] for part in parts]).reshape(w.shape) for k in (0, 1))
        return Sparse(mask, dense[mask].astype(np.float32))


def damped(moments: Array, damping: float) -> Array:
    """Moments [groups, n, n] with a part of each mean diagonal added; dead inputs get the whole of it."""
    mean = np.diagonal(moments, axis1=1, axis2=2).mean(1)
    return moments + (damping * mean + 1e-12)[:, None, None] * np.eye(moments.shape[1])

"""Shared weights by one-dimensional k-means: Deep Compression's clusters (Han, Mao, Dally 2016, section 3).

Sorting and prefix sums make a Lloyd step O(k log n) and the exact optimum O(k n log n) (divide and conquer over the
monotone split points, Gronlund et al. 2017). `start="linear"` spreads the first centroids between the extremes, which
the paper found best; "density" takes quantiles, "random" draws weights. Weighted means make it the Hessian-weighted
k-means of Choi et al. (2017). All sums run in float64 in sorted order, so the result depends on nothing but the input.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tersenet.methods import needed
from tersenet.packed import Array, Codebook, Packed, narrowed

STARTS = ("linear", "density", "random", "exact")
FAINT = 1e-3  # what a weight of no Fisher information counts, as a part of the mean


def lloyd(values: Array, centroids: Array, weights: Array, steps: int = 300) -> Array:
    """Centroids [k] that no further Lloyd step improves, ascending; empty clusters keep their place.

    `values` [n] ascend; `weights` [n] are positive.
    """
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    moment = np.concatenate([[0.0], np.cumsum(weights * values)])
    for _ in range(steps):
        cuts = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], cuts, [values.size]])
        share = np.diff(mass[edges])
        moved = np.where(share > 0, np.diff(moment[edges]) / np.where(share > 0, share, 1), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids


def exact(values: Array, k: int, weights: Array) -> Array:
    """Centroids of the best split of ascending `values` [n] into k runs: least weighted squared error."""
    centre = values - values.mean()
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    moment = np.concatenate([[0.0], np.cumsum(weights * centre)])
    square = np.concatenate([[0.0], np.cumsum(weights * centre * centre)])

    def cost(begin: Array, end: Array) -> Array:
        share = np.maximum(mass[end] - mass[begin], 1e-300)
        return square[end] - square[begin] - (moment[end] - moment[begin]) ** 2 / share

    n = values.size
    best = cost(np.zeros(n + 1, np.int64), np.arange(n + 1))
    best[0] = 0.0
    splits = []
    for clusters in range(2, k + 1):
        best, split = _next_cluster(best, cost, clusters, n)
        splits.append(split)
    edges = [n]
    for split in reversed(splits):
        edges.append(int(split[edges[-1]]))
    edges.append(0)
    bounds = np.array(edges[::-1])
    return np.diff(moment[bounds]) / np.diff(mass[bounds]) + values.mean()


def _next_cluster(before: Array, cost: Any, clusters: int, n: int) -> tuple[Array, Array]:
    """Least cost of the first m values in one cluster more, and where its last cluster begins, for every m.

    The beginnings ascend with m, so each level of the recursion looks at about n candidates in one NumPy pass.
    """
    best, split = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    spans = np.array([[clusters, n, clusters - 1, n - 1]])  # ends lo..hi, beginnings from..to
    while len(spans):
        lo, hi, first, last = spans.T
        mid = (lo + hi) // 2
        top = np.minimum(last, mid - 1)
        count = top - first + 1
        starts = np.cumsum(count) - count
        begin = np.arange(int(count.sum())) - np.repeat(starts, count) + np.repeat(first, count)
        trial = before[begin] + cost(begin, np.repeat(mid, count))
        best[mid] = np.minimum.reduceat(trial, starts)
        hit = np.flatnonzero(trial == np.repeat(best[mid], count))
        owner = np.repeat(np.arange(len(mid)), count)[hit]
        split[mid] = begin[hit[np.searchsorted(owner, np.arange(len(mid)))]]
        left = np.stack([lo, mid - 1, first, split[mid]], 1)
        right = np.stack([mid + 1, hi, split[mid], last], 1)
        spans = np.concatenate([left, right])
        spans = spans[spans[:, 0] <= spans[:, 1]]
    return best, split


def filled(values: Array, centroids: Array, weights: Array) -> Array:
    """Lloyd's centroids with no cluster empty: an empty one moves to the middle of the worst cluster's values."""
    for _ in range(8):
        centroids = lloyd(values, centroids, weights)
        owner = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)
        empty = np.setdiff1d(np.arange(centroids.size), owner)
        if not empty.size:
            break
        error = np.bincount(owner, weights * np.square(values - centroids[owner]), centroids.size)
        for place, worst in zip(empty, np.argsort(-error, kind="stable"), strict=False):
            if error[worst] <= 0:
                break
            members = values[owner == worst]
            centroids[place] = (members[-1] + centroids[worst]) / 2
        centroids = np.sort(centroids)
    return centroids


def shared(w: Array, codewords: Array, cuts: Array) -> Codebook:
    """Values as numbers of ascending codewords, between which the cuts lie; those that no value has are left out."""
    index = np.searchsorted(cuts, w.reshape(-1).astype(np.float64))
    used, index = np.unique(index, return_inverse=True)
    return Codebook(narrowed(index.reshape(w.shape)), codewords[used][:, None])


@dataclass(frozen=True)
class KMeans:
    """At most 2^bits shared values; `weighted` counts errors by the Fisher information of weights, `stats["weights"]`.

    Weights whose information is next to nothing count a thousandth of the mean. With `group` each so many output
    channels, or the next smaller divisor, have values of their own. Their index is one array that begins anew with each
    group: with 16 values for 8 channels ResNet-20 takes 0.2 % more bytes than with 16 for a layer; it would take 9 %
    more if the index counted through all values, and 2 % more in arrays apart (`bench/results/codes.json`).
    """

    bits: int = 5
    start: str = "linear"
    seed: int = 0
    weighted: bool = False
    group: int | None = None
    makes: ClassVar[tuple[type[Packed], ...]] = (Codebook,)

    def __post_init__(self) -> None:
        if self.start not in STARTS or not 1 <= self.bits <= 12:
            raise ValueError(f"KMeans takes 1 to 12 bits and a start among {', '.join(STARTS)}")
        if self.group is not None and self.group < 1:
            raise ValueError("KMeans takes a group of one output channel or more")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("weights",) if self.weighted else ()

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        """A `Codebook` with ascending codewords [k, 1], or [groups, k, 1]."""
        w = np.asarray(w)
        weights = np.ones(w.shape)
        if self.weighted:
            known = np.asarray(needed(self, "weights", stats), np.float64).reshape(w.shape)
            weights = np.maximum(known, FAINT * known.mean()) if known.any() else weights
        if self.group is None:
            return self._shared(w, weights)
        if w.ndim < 2:
            raise ValueError(f"{self} finds no output channels here, as under a mask: leave the group out")
        many = len(w) // max(n for n in range(1, self.group + 1) if len(w) % n == 0)
        parts = [self._shared(*pair) for pair in zip(np.split(w, many), np.split(weights, many), strict=True)]
        books = [np.asarray(part.codewords) for part in parts]
        k = max(map(len, books))
        codewords = [np.pad(book, ((0, k - len(book)), (0, 0)), "edge") for book in books]
        return Codebook(np.concatenate([part.index for part in parts]), np.stack(codewords))

    def _shared(self, w: Array, weights: Array) -> Codebook:
        flat, weights = w.reshape(-1).astype(np.float64), weights.reshape(-1)
        order = np.argsort(flat, kind="stable")
        values, mass = flat[order], weights[order].astype(np.float64)
        distinct = np.unique(values)
        k = min(2**self.bits, distinct.size)
        if k == distinct.size:
            centroids = distinct
        elif self.start == "exact":
            centroids = exact(values, k, mass)
        else:
            centroids = filled(values, self._start(values, k), mass)
        codewords = np.unique(centroids.astype(np.float32))
        return shared(w, codewords, (codewords[1:].astype(np.float64) + codewords[:-1]) / 2)

    def _start(self, values: Array, k: int) -> Array:
        if self.start == "linear":
            return np.linspace(values[0], values[-1], k)
        if self.start == "density":
            return np.unique(values[((np.arange(k) + 0.5) * values.size / k).astype(np.int64)])
        return np.sort(np.random.Generator(np.random.PCG64(self.seed)).choice(np.unique(values), k, replace=False))

"""Product quantization: vectors of neighbouring weights share codewords, found in the metric of the layer's inputs.

Stock, Joulin, Gribonval, Graham, Jegou (2020), section 3: the rows of a layer are cut into vectors, in a convolution
one for each kernel, and k-means lowers |x~ (v - c)|^2 for all vectors v of the layer. In the paper x~ are all inputs,
cut alike; here each vector has those that it multiplies (docs/notes.md says what that is worth), so a codeword c solves
(sum of M) c = sum of M v over its vectors, with the moments M = x~^T x~ of each. The paper draws a part of x~ anew for
each iteration; here the moment of all inputs is known.

With `feedback` the error of a vector is made up for by those after it in the row, in the full metric of the layer, and
the codewords are then the best for what was chosen (van Baalen et al. 2024 do so for language models).
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from tersenet import cores, native
from tersenet.methods import needed
from tersenet.methods.surgeon import damped, inverse
from tersenet.packed import Array, Codebook, Packed, Reshaped, narrowed

LONGEST = 16  # values of a vector that is a kernel
RUN = 4  # neighbours in a vector where there are no kernels
WIDE, CHUNK = 32, 1 << 14  # codewords in a block of the core (TERSE_NEAREST), and vectors that a thread takes at a time
DAMPING = 0.01  # of the inputs' moment, as a part of its mean diagonal
BEGIN = 10  # steps of plain k-means before those in the metric
SPLITS, NOISE = 32, 1e-4  # rounds of splitting clusters, and how far apart their halves begin, in standard deviations
SWEEPS, SOLVES = 3, 20  # of error feedback, and of conjugate gradients after each


def nearest(vectors: Array, codewords: Array) -> Array:
    """The number of the nearest codeword [k, d] of each vector [n, d], the first among equals; both are float32."""
    n, (k, d) = len(vectors), codewords.shape
    index, blocks = np.empty(n, np.int32), -(-k // WIDE)
    half = np.zeros(k, np.float32)
    for column in codewords.T:
        half += column * column * np.float32(0.5)
    laid = np.zeros((blocks * WIDE, 1 + d), np.float32)
    laid[:, 0], laid[:k, 0], laid[:k, 1:] = np.inf, half, codewords
    laid = np.ascontiguousarray(laid.reshape(blocks, WIDE, 1 + d).transpose(0, 2, 1))
    vectors = np.ascontiguousarray(vectors, np.float32)

    def part(begin: int) -> None:
        some, out = vectors[begin : begin + CHUNK], index[begin : begin + CHUNK]
        if native.call("nearest", some, len(some), np.int32(d), laid, np.int32(blocks), out) is None:
            sums = np.repeat(half[None], len(some), 0)
            for j in range(d):
                sums -= some[:, j, None] * codewords[None, :, j]
            out[:] = sums.argmin(1)

    with ThreadPoolExecutor(cores.usable()) as pool:
        list(pool.map(part, range(0, n, CHUNK)))
    return index


def shared(vectors: Array, k: int, steps: int, seed: int, weights: Array | None = None) -> tuple[Array, Array]:
    """k-means of vectors [n, d]: at most k codewords, all of them used, and the number of each vector's.

    Begins with vectors drawn without replacement, and ends where no step changes anything. A cluster that is empty
    takes half of the largest one (section 4.1 of the paper). `weights` [n] are positive.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    draw = np.random.Generator(np.random.PCG64(seed))
    codewords = vectors[np.sort(draw.choice(len(vectors), min(k, len(vectors)), replace=False))]
    index = None
    for _ in range(steps):
        before = index
        codewords, index = _all_used(vectors, codewords, draw)
        if before is not None and np.array_equal(before, index):
            break
        codewords = means(vectors, index, len(codewords), weights).astype(np.float32)
    index = nearest(vectors, codewords)
    used, index = np.unique(index, return_inverse=True)
    return codewords[used], index.astype(np.int32)


def aware(rows: Array, moments: Array, d: int, k: int, steps: int, seed: int) -> tuple[Array, Array]:
    """k-means of the vectors of d values in rows [groups, m, n], each in the moment of what it multiplies.

    Moments are [groups, n, n]. At most k codewords, all of them used, and the number of each vector's, row by row.
    """
    groups, m, n = rows.shape
    vectors = rows.reshape(groups, m, n // d, d).transpose(0, 2, 1, 3).reshape(-1, m, d)  # by what they multiply
    blocks = np.einsum("gbibj->gbij", moments.reshape(groups, n // d, d, n // d, d)).reshape(-1, d, d)
    factors = np.linalg.cholesky(blocks)
    scaled = (vectors @ factors).astype(np.float32)
    draw = np.random.Generator(np.random.PCG64(seed))
    codewords = shared(vectors.reshape(-1, d), k, BEGIN, seed)[0].astype(np.float64)
    pulled: Array = vectors @ blocks
    index: Array = np.zeros(0, np.int32)
    unit = NOISE * float(vectors.std())
    for _ in range(steps):
        turned = (codewords @ factors).astype(np.float32)
        before, index = index, np.stack([nearest(v, c) for v, c in zip(scaled, turned, strict=True)])
        if np.array_equal(before, index):
            break
        codewords = _solved(index, blocks, pulled, codewords)
        count = np.bincount(index.reshape(-1), minlength=len(codewords))
        empty = np.flatnonzero(count == 0)
        largest = np.argsort(-count, kind="stable")[: len(empty)]
        codewords[empty] = codewords[largest] + unit * draw.standard_normal((len(empty), d))
    used, index = np.unique(index, return_inverse=True)
    return codewords[used], index.reshape(groups, n // d, m).transpose(0, 2, 1).reshape(-1).astype(np.int32)


def _solved(index: Array, blocks: Array, pulled: Array, codewords: Array) -> Array:
    """The codewords [k, d] that lose least for an index [blocks, m]; those of no vector stay."""
    k, d = codewords.shape
    counts = np.stack([np.bincount(own, minlength=k) for own in index])
    left = (counts.T @ blocks.reshape(len(blocks), -1)).reshape(k, d, d)
    right = np.stack([np.bincount(index.reshape(-1), v, k) for v in pulled.reshape(-1, d).T], 1)
    used = counts.any(0)
    found = codewords.copy()
    found[used] = np.linalg.solve(left[used], right[used][..., None])[..., 0]
    return found


def means(vectors: Array, index: Array, k: int, weights: Array | None = None) -> Array:
    """The mean [k, d] of each cluster's vectors, in float64; 0 where it has none."""
    mass = np.bincount(index, weights, k)
    sums = [np.bincount(index, v if weights is None else v * weights, k) for v in vectors.T]
    return np.stack(sums, 1) / np.where(mass > 0, mass, 1)[:, None]


def _all_used(vectors: Array, codewords: Array, draw: np.random.Generator) -> tuple[Array, Array]:
    """Codewords that are the nearest of some vector, as far as there are vectors that differ, and each vector's."""
    index = nearest(vectors, codewords)
    unit = NOISE * float(vectors.std())
    for _ in range(SPLITS):
        count = np.bincount(index, minlength=len(codewords))
        empty = np.flatnonzero(count == 0)
        largest = np.argsort(-count, kind="stable")[: len(empty)]
        largest = largest[count[largest] > 1]
        if not len(largest):
            break
        empty, codewords = empty[: len(largest)], codewords.copy()
        noise = (unit * draw.standard_normal((len(largest), codewords.shape[1]))).astype(np.float32)
        codewords[empty], codewords[largest] = codewords[largest] + noise, codewords[largest] - noise
        index = nearest(vectors, codewords)
    return codewords, index


@dataclass(frozen=True)
class Product:
    """At most 2^bits codewords for a layer, each of `kernels` kernels, or of 4 * `kernels` values without kernels.

    Vectors lie along the inputs of a row; where they do not divide it the next smaller divisor is taken. A layer gets
    fewer codewords than a quarter of its vectors. `weighted` reads `stats["inputs"]`, and then `feedback` makes up for
    errors; else all count alike.
    """

    bits: int = 8
    kernels: int = 1
    weighted: bool = True
    feedback: bool = True
    steps: int = 100
    seed: int = 0
    makes: ClassVar[tuple[type[Packed], ...]] = (Codebook, Reshaped)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 12 or self.kernels < 1 or self.steps < 1:
            raise ValueError("Product takes 1 to 12 bits, at least one kernel in a vector and at least one step")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("inputs",) if self.weighted else ()

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed | Array:
        """A `Codebook` of vectors, with the weight's shape; the weight itself where two codewords would be too many."""
        w = np.asarray(w)
        moments = damped(np.asarray(needed(self, "inputs", stats)), DAMPING) if self.weighted else None
        columns = moments.shape[1] if moments is not None else math.prod(w.shape[1:]) if w.ndim > 1 else w.size
        rows = w.reshape(-1, columns).astype(np.float64)
        d = length(w.shape, columns, self.kernels)
        k = min(2**self.bits, 2 ** max(0, (w.size // d - 1).bit_length() - 3))  # under a quarter of the vectors
        if k < 2:
            return w
        if moments is None:
            vectors = rows.reshape(-1, d)
            index = shared(vectors, k, self.steps, self.seed)[1]
            codewords = means(vectors, index, int(index.max()) + 1)
        else:
            grouped = rows.reshape(len(moments), -1, columns)
            codewords, index = aware(grouped, moments, d, k, self.steps, self.seed)
            if self.feedback:
                codewords, index = _fed_back(grouped, moments, codewords, index)
        node = Codebook(
            narrowed(index.reshape(*w.shape[:1], -1) if w.ndim > 1 else index), codewords.astype(np.float32)
        )
        return node if w.ndim < 3 else Reshaped(node, w.shape, tuple(range(w.ndim)), w.shape)


def length(shape: Sequence[int], columns: int, kernels: int) -> int:
    """The values of a vector: `kernels` kernels, or parts of large ones, or runs of 4, or the next smaller divisor."""
    area = math.prod(shape[2:])
    one = max(n for n in range(1, LONGEST + 1) if area % n == 0) if area > 1 else RUN
    return max(n for n in range(1, kernels * one + 1) if columns % n == 0)


def _fed_back(rows: Array, moments: Array, codewords: Array, index: Array) -> tuple[Array, Array]:
    """Codewords and index after sweeps of error feedback through rows [groups, m, n], the best sweep of all."""
    d, k = codewords.shape[1], len(codewords)
    index = index.reshape(*rows.shape[:2], -1)
    best = _error(rows, moments, codewords[index]), codewords, index
    for _ in range(SWEEPS):
        index = np.stack([_swept(part, a, codewords, d) for part, a in zip(rows, moments, strict=True)])
        codewords = _refitted(rows, moments, codewords, index, k)
        error = _error(rows, moments, codewords[index])
        if error >= best[0]:
            break
        best = error, codewords, index
    used, index = np.unique(best[2], return_inverse=True)
    return best[1][used], index.reshape(-1)


def _swept(rows: Array, moment: Array, codewords: Array, d: int) -> Array:
    """The codewords' numbers [m, n / d] for rows [m, n], each vector's error made up for by those after it."""
    upper = torch.linalg.cholesky(torch.from_numpy(inverse(moment)), upper=True)  # A^-1 = U^T U
    rest, c = torch.from_numpy(rows.copy()), torch.from_numpy(codewords)
    found = []
    for at in range(0, rows.shape[1], d):
        own = torch.linalg.inv(upper[at : at + d, at : at + d])
        chosen = nearest((rest[:, at : at + d] @ own).numpy(), (c @ own).numpy().astype(np.float32))
        lost = (rest[:, at : at + d] - c[torch.from_numpy(chosen).long()]) @ own
        rest[:, at:] -= lost @ upper[at : at + d, at:]
        found.append(chosen)
    return np.stack(found, 1)


def _refitted(rows: Array, moments: Array, codewords: Array, index: Array, k: int) -> Array:
    """The codewords that lose least in the full metric for an index [groups, m, n / d], by conjugate gradients."""
    a, flat, d = torch.from_numpy(moments), index.reshape(-1), codewords.shape[1]

    def gradient(codes: Array, target: Array | None = None) -> Array:
        dense = codes[index].reshape(rows.shape) if target is None else target
        pulled = (torch.from_numpy(dense) @ a).numpy().reshape(-1, d)
        return np.stack([np.bincount(flat, v, k) for v in pulled.T], 1)

    found = codewords.astype(np.float64)
    residual = gradient(found, rows) - gradient(found)
    way, size = residual, float(np.square(residual).sum())
    for _ in range(SOLVES):
        if not size:
            break
        turned = gradient(way)
        step = size / float((way * turned).sum())
        found, residual = found + step * way, residual - step * turned
        size, before = float(np.square(residual).sum()), size
        way = residual + size / before * way
    return found


def _error(rows: Array, moments: Array, dense: Array) -> float:
    lost = torch.from_numpy(rows - dense.reshape(rows.shape))
    return float(((lost @ torch.from_numpy(moments)) * lost).sum())

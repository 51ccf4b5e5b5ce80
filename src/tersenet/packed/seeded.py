"""Nodes whose places or dithers a seed tells: Bloomier filters, randomised lattices, hashed buckets."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersenet import bloomier, splitmix
from tersenet.packed.tree import (
    Array,
    Packed,
    Tree,
    is_float_tree,
    is_integer,
    is_numpy,
    is_shape,
    namespace,
    require,
    unpack,
)

_SIXTEENTHS = (2.0 ** (np.arange(16) / 16)).astype(np.float32)


def sixteenth(exponent: int) -> Any:
    """2^(exponent/16) in float32, from a table and an exact scaling."""
    return np.ldexp(_SIXTEENTHS[exponent % 16], exponent // 16)


@dataclass(frozen=True, eq=False)
class Bloomier(Packed):
    """Values by position from a Bloomier filter: codewords[v] where v, the XOR of three cells and a mask, is one.

    Places that no key stood for are zero, but for false positives (Reagen et al. 2018). `cells` [(windows + 2) *
    length] have `bits` bits each; the three of a place lie in segments of `length` cells in a row.
    """

    cells: Array
    codewords: Tree  # [k]
    bits: int
    seed: int
    length: int
    size: tuple[int, ...]

    def unpack(self) -> Array:
        codewords = unpack(self.codewords)
        xp, number = namespace(codewords), self.numbers()
        found = number < codewords.shape[0]
        dense = xp.zeros(math.prod(self.size), dtype=codewords.dtype)
        dense[xp.asarray(found)] = codewords[xp.asarray(number[found].astype(np.int64))]
        return dense.reshape(self.size)

    def numbers(self) -> Array:
        """What the filter says to each place, uint16: a codeword's number, or one past all of them."""
        cells = self.cells if is_numpy(self.cells) else self.cells.cpu().numpy()
        return bloomier.queried(cells, math.prod(self.size), self.seed, self.length, self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return 4 * math.prod(self.size)  # numbers, which of them are found, and where their codewords are

    def check(self) -> None:
        numbers = (self.bits, self.seed, self.length)
        require(all(isinstance(n, int) for n in numbers), "bits, seed and length are numbers")
        require(is_integer(self.cells) and len(self.cells.shape) == 1, "cells are a vector of integers")
        require(1 <= self.bits <= 16 and 0 <= self.seed < 1 << 62, "cells have 1 to 16 bits, and a seed at most 62")
        require(1 <= self.length <= 1 << 30 and self.cells.shape[0] < 1 << 31, "segments are short of 2^30 cells")
        require(self.cells.shape[0] % self.length == 0 and self.cells.shape[0] >= 3 * self.length, "cells are segments")
        require(is_float_tree(self.codewords) and len(self.codewords.shape) == 1, "codewords are a float vector")
        require(self.codewords.shape[0] <= 1 << self.bits, "a codeword's number fits into a cell")
        require(is_shape(self.size) and math.prod(self.size) < 1 << 31, "size is a shape short of 2^31 places")


@dataclass(frozen=True, eq=False)
class Lattice(Packed):
    """Points less a dither that the seed tells: randomised lattice quantization (Choi, El-Khamy, Lee 2018).

    The first values of `point`, in C order, minus 2^(step/16) times a number in [-1/2, 1/2) that `dimension` neighbours
    share (`splitmix.py`).
    """

    point: Tree
    step: int
    seed: int
    dimension: int
    size: tuple[int, ...]

    def unpack(self) -> Array:
        point, count = unpack(self.point), math.prod(self.size)
        xp = namespace(point)
        away = np.repeat(splitmix.dither(self.seed, -(-count // self.dimension)), self.dimension)[:count]
        away = away * sixteenth(self.step)
        return (point.reshape(-1)[:count] - xp.asarray(away)).reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return 4 * math.prod(self.size)  # the dither, how far away that is, and the differences

    def check(self) -> None:
        numbers = (self.step, self.seed, self.dimension)
        require(all(isinstance(n, int) for n in numbers), "step, seed and dimension are numbers")
        require(abs(self.step) <= 1600 and 0 <= self.seed < 1 << 62, "a step is within 2^100, a seed below 2^62")
        require(1 <= self.dimension <= 64, "1 to 64 neighbours share a dither")
        require(is_float_tree(self.point) and is_shape(self.size), "points are a float tree, size is a shape")
        require(math.prod(self.size) <= math.prod(self.point.shape), "there are points for the size")


@dataclass(frozen=True, eq=False)
class Hashed(Packed):
    """Buckets that many places share, each with a sign of its own: HashedNets (Chen et al. 2015).

    Which bucket a place has, and which sign, the seed tells (`splitmix.py`).
    """

    buckets: Tree  # [K]
    seed: int
    size: tuple[int, ...]

    def unpack(self) -> Array:
        buckets = unpack(self.buckets)
        xp = namespace(buckets)
        place, sign = splitmix.buckets(self.seed, math.prod(self.size), buckets.shape[0])
        return (buckets[xp.asarray(place)] * xp.asarray(sign)).reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return 6 * math.prod(self.size)  # buckets, which are int64, signs, and their products

    def check(self) -> None:
        require(isinstance(self.seed, int) and 0 <= self.seed < 1 << 62, "a seed is a number below 2^62")
        require(is_float_tree(self.buckets) and len(self.buckets.shape) == 1, "buckets are a float vector")
        require(1 <= self.buckets.shape[0] < 1 << 32 and is_shape(self.size), "there are buckets, and size is a shape")

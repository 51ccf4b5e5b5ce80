"""Nodes that are products: an einsum of factors, and coefficients of a transform."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tersenet.packed.tree import Array, Packed, Tree, is_float_tree, is_shape, namespace, require, unpack

WORK = 1 << 13  # products of an einsum for each value of its result or its largest factor, at most
WHOLE_BLOCK = 1 << 8  # values of a transformed block, up to which one matrix transforms it


@dataclass(frozen=True, eq=False)
class Factored(Packed):
    """An einsum of factors, reshaped: SVD "or,ri->oi", CP, Tucker-2 and tensor trains differ in the equation alone."""

    equation: str
    factors: tuple[Tree, ...]
    size: tuple[int, ...]

    def unpack(self) -> Array:
        factors = [unpack(factor) for factor in self.factors]
        einsum = namespace(factors[0]).einsum
        for step in self._steps():
            pair = [factors.pop(at) for at in step.operands]
            factors.append(einsum(step.equation, *pair))
        return factors[0].reshape(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    def room(self) -> int:
        return sum(step.size for step in self._steps())

    def _steps(self) -> "list[Contraction]":
        terms, _, result = self.equation.replace("->", ",").rpartition(",")
        return contractions(terms.split(","), [factor.shape for factor in self.factors], result)

    def check(self) -> None:
        require(isinstance(self.equation, str) and len(self.equation) <= 128, "the equation is a short text")
        require(isinstance(self.factors, tuple) and 1 <= len(self.factors) <= 8, "there are 1 to 8 factors")
        require(is_shape(self.size), "size is a shape")
        left, arrow, right = self.equation.partition("->")
        terms, extent = left.split(","), dict[str, int]()
        letters = left.replace(",", "") + right
        require(
            arrow == "->" and letters.isascii() and (letters.isalpha() or not letters), "the equation has letters only"
        )
        require(len(terms) == len(self.factors), "each factor has its term")
        for term, factor in zip(terms, self.factors, strict=True):
            require(is_float_tree(factor) and len(term) == len(factor.shape), "a term has a letter for each axis")
            for letter, n in zip(term, factor.shape, strict=True):
                require(extent.setdefault(letter, n) == n, "a letter has one extent")
        require(len(set(right)) == len(right) and set(right) <= set(extent), "the result's letters are known")
        require(math.prod(extent[c] for c in right) == math.prod(self.size), "the result fills the shape")
        held = max(1, math.prod(self.size), *(math.prod(factor.shape) for factor in self.factors))
        steps = self._steps()
        few = sum(step.work for step in steps) <= WORK * held and all(step.size <= 8 * held for step in steps)
        require(few, "the equation's products are not too many")


class Contraction(NamedTuple):
    """One step of an einsum: its operands' places, the later first, what is done, its products, its result's size."""

    operands: tuple[int, ...]
    equation: str
    work: int
    size: int


def contractions(terms: Sequence[str], shapes: Sequence[tuple[int, ...]], result: str) -> list[Contraction]:
    """An einsum as steps of two operands each, the pair of fewest products first; the last gives the result."""
    extent = {c: n for term, shape in zip(terms, shapes, strict=True) for c, n in zip(term, shape, strict=True)}
    left, steps = list(terms), list[Contraction]()
    while not steps or len(left) > 1:
        pairs: list[tuple[int, ...]] = [(j, i) for j in range(len(left)) for i in range(j)] or [(0,)]
        work, pair = min((math.prod(extent[c] for c in {*"".join(left[k] for k in p)}), p) for p in pairs)
        own = [left.pop(at) for at in pair]
        needed = {*result, *"".join(left)}
        made = result if not left else "".join(sorted({*"".join(own)} & needed))
        steps.append(Contraction(pair, f"{','.join(own)}->{made}", work, math.prod(extent[c] for c in made)))
        left.append(made)
    return steps


@dataclass(frozen=True, eq=False)
class Transformed(Packed):
    """Coefficients of an orthonormal two-dimensional DCT-II over the last two axes (the kernel of a convolution)."""

    coefficients: Tree

    def unpack(self) -> Array:
        coefficients = unpack(self.coefficients)
        xp = namespace(coefficients)
        height, width = self.shape[-2:]
        if height * width > WHOLE_BLOCK:
            rows, columns = (xp.asarray(dct(n).astype(np.float32)) for n in (height, width))
            return rows.T @ coefficients @ columns
        kernel = xp.asarray(kernel_dct(height, width).astype(np.float32))
        return (coefficients.reshape(-1, height * width) @ kernel).reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.coefficients.shape)

    def check(self) -> None:
        require(is_float_tree(self.coefficients) and len(self.shape) >= 2, "coefficients have two axes or more")
        require(all(1 <= n <= 64 for n in self.shape[-2:]), "a transformed block is at least 1 x 1, at most 64 x 64")


def dct(n: int) -> Array:
    """The orthonormal DCT-II matrix [n, n] in float64: coefficients = dct(n) @ samples."""
    k, i = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.sqrt(2 / max(n, 1)) * np.cos(np.pi * k * (2 * i + 1) / (2 * max(n, 1)))
    matrix[:1] /= np.sqrt(2)
    return matrix


@functools.lru_cache(64)
def kernel_dct(height: int, width: int) -> Array:
    """The two-dimensional DCT-II matrix [height * width] squared: coefficients = matrix @ kernel, both in C order."""
    matrix = np.kron(dct(height), dct(width))
    matrix.flags.writeable = False
    return matrix

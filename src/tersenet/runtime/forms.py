"""Forms of a weight matrix that are multiplied with as they are, W [rows, columns] with x [count, columns] of float32.

Arrays here are NumPy's. Nothing knows of torch, files or trees: `kernels.py` makes forms of trees.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tersenet import cores, native

Array = Any
ROWS, COLUMNS, ROOM = 16, 16, 4096  # TERSE_ROWS, TERSE_COLUMNS and TERSE_ROOM of native/terse.h
FEW = 4  # inputs up to which sparse rows are gone through for each
MOST = 1024  # inputs of sparse rows at a time
GROUP = 16_384  # columns whose products fit into 32 bits
WORTH_A_THREAD = 1 << 16  # bytes of a form


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; one that was forked has none of its parent's."""
    return ThreadPoolExecutor(max(1, cores.usable() - 1), "tersenet")


def shared(work: Callable[[int, int], object], n: int, threads: int) -> None:
    """Call work(first, last) for all of 0 to n in as many parts as there are threads, the first of them here."""
    threads = max(1, min(threads, n))
    edges = [n * k // threads for k in range(threads + 1)]
    first, *others = itertools.pairwise(edges)
    waiting = [_pool(os.getpid()).submit(work, *part) for part in others]
    work(*first)
    for done in waiting:
        done.result()


def called(name: str, *arguments: Any) -> None:
    """Call the C core; what it refuses would leave a product without values."""
    done = native.call(name, *arguments)
    if done is None or done < 0:
        raise RuntimeError(f"terse_{name} refused a product ({done}): the form is damaged, or the C core is gone")


def inputs(x: Array, columns: int) -> Array:
    """Inputs as the kernels read them; raises ValueError where they are not [count, columns]."""
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"inputs are [count, {columns}], not {list(x.shape)}")
    return np.ascontiguousarray(x, np.float32)


def padded(x: Array, least: int) -> Array:
    """Inputs with zeros behind them; several lie so that their cache lines are not those of one set."""
    stride = least if len(x) == 1 else (least // 1024 * 1024 + 16 if least % 1024 < 16 else least)
    return x if stride == x.shape[1] else np.pad(x, ((0, 0), (0, stride - x.shape[1])))


def aligned(*shape: int) -> Array:
    """Floats that begin with a cache line."""
    room: Array = np.empty(4 * math.prod(shape) + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + 4 * math.prod(shape)].view(np.float32).reshape(shape)


@dataclass(frozen=True, eq=False)
class Form:
    """A weight in executable form: its arrays, then numbers."""

    def product(self, x: Array, threads: int = 1) -> Array:
        """x W^T: float32 [count, columns] -> [count, rows]."""
        raise TypeError(f"{type(self).__name__} does not say how to multiply")

    @property
    def nbytes(self) -> int:
        parts = [getattr(self, f.name) for f in fields(self)]
        nested = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
        return sum(p.nbytes for p in nested if isinstance(p, np.ndarray | Form))

    def threads(self, most: int) -> int:
        """How many threads are worth being woken."""
        return max(1, min(most, self.nbytes // WORTH_A_THREAD))

    def spread(self, name: str, n: int, threads: int, head: Sequence[Any], *rest: Any) -> None:
        """Call a function of the core for 0 to n in parts; it takes `head`, the part's first and last, then `rest`."""
        shared(lambda first, last: called(name, *head, first, last, *rest), n, self.threads(threads))


@dataclass(frozen=True, eq=False)
class SparseRows(Form):
    """The numbers that are not zero, with their columns in 16 bits; `values` float32 or, with a `book`, uint8 codes.

    With few inputs each number looks up what it multiplies; with many it is multiplied by all of them, the rows of X^T.
    """

    values: Array  # [n]
    columns: Array  # uint16 [n]
    starts: Array  # int64 [rows + 1]
    book: Array  # float32 [k], k = 0 where values are floats
    width: int

    def product(self, x: Array, threads: int = 1) -> Array:
        x = inputs(x, self.width)
        count, rows = len(x), len(self.starts) - 1
        if count > MOST:  # places have 32 bits
            return np.concatenate([self.product(part, threads) for part in np.split(x, range(MOST, count, MOST))])
        if count <= FEW:
            y: Array = np.empty((count, rows), np.float32)
            for one, out in zip(x, y):
                self._shared("sparse_dot", threads, rows, one, out, native.simd())
            return y
        wide = -(-count // 16) * 16
        across = aligned(self.width, wide)
        across[:, :count] = x.T
        across[:, count:] = 0
        place = np.arange(0, self.width * wide, wide, dtype=np.int32)
        return np.ascontiguousarray(self.windows(across, place, wide, threads)[:, :count].T)

    def windows(self, x: Array, place: Array, width: int, threads: int = 1, out: Array | None = None) -> Array:
        """[rows, width or more]: of each row its numbers times x[place[column] + (0 to width)]; place is int32."""
        rows = len(self.starts) - 1
        y: Array = np.empty((rows, width), np.float32) if out is None else out
        self._shared("sparse_windows", threads, rows, x, place, width, y, y.shape[1], native.simd())
        return y

    def _shared(self, name: str, threads: int, rows: int, *rest: Any) -> None:
        floats = len(self.book) == 0
        own = (self.values, None, None) if floats else (None, self.values, self.book)
        self.spread(name, rows, threads, (*own, self.columns, self.starts), *rest)


@dataclass(frozen=True, eq=False)
class SparseColumns(Form):
    """Codes of shared values that are not zero, column by column in blocks of rows: for one input at a time.

    Columns that a zero of the input would multiply are never read, as in EIE (Han et al. 2016).
    """

    codes: Array  # uint8 [n]
    rows: Array  # uint16 [n], from the first of the block
    starts: Array  # int64 [blocks, columns + 1]
    book: Array  # float32 [k]
    height: int
    block: int

    def product(self, x: Array, threads: int = 1) -> Array:
        blocks, columns = len(self.starts), self.starts.shape[1] - 1
        x = inputs(x, columns)
        y: Array = np.empty((len(x), self.height), np.float32)
        head = (self.codes, self.book, len(self.book), self.rows, self.starts, columns, self.height, self.block)
        for one, out in zip(x, y):
            kept = np.flatnonzero(one).astype(np.int64, copy=False)
            self.spread("sparse_columns", blocks, threads, head, kept, len(kept), one, out)
        return y


@dataclass(frozen=True, eq=False)
class MaskedRows(Form):
    """The numbers that are not zero, and a bit for each column."""

    values: Array  # float32 [n + 16]
    mask: Array  # uint16 [rows, words]
    starts: Array  # int64 [rows + 1]
    width: int

    def product(self, x: Array, threads: int = 1) -> Array:
        rows, words = self.mask.shape
        x = padded(inputs(x, self.width), 16 * words)
        y: Array = np.empty((len(x), rows), np.float32)
        head = (self.values, self.mask, rows, words, self.starts, x, x.shape[1], len(x))
        self.spread("masked_product", rows, threads, head, y, native.simd())
        return y


@dataclass(frozen=True, eq=False)
class Levels(Form):
    """scale * (level + offset) in groups of columns, times inputs of `planes` bytes: exact in integers within a group.

    `factor` [columns] multiplies the inputs; without offsets by group all are `shift`.
    """

    weights: Array  # uint8 [blocks, groups, width / 16, bits / 2, 16, 4]
    scale: Array  # float32 [blocks, groups, 16]
    offset: Array  # int32 [blocks, groups, 16], or none
    factor: Array  # float32 [columns], or none
    bits: int
    rows: int
    columns: int
    group: int
    shift: int
    planes: int
    step: float = 0.0  # of which inputs are multiples, from -128 to 127 of one byte; 0: of each the largest sets it

    def product(self, x: Array, threads: int = 1) -> Array:
        x = inputs(x, self.columns)
        count, (blocks, groups, _) = len(x), self.scale.shape
        width = -(-self.group // COLUMNS) * COLUMNS
        y: Array = np.empty((count, self.rows), np.float32)
        digits, sums, steps = self._fixed(x, groups, width) if self.step else self._floating(x, groups, width)
        offset = self.offset if self.offset.size else None
        head = (self.weights, self.bits, self.rows, groups, width, self.scale, offset, self.shift, digits, sums, steps)
        self.spread("levels_product", blocks, threads, (*head, count, self.planes), y, native.simd())
        return y

    def _floating(self, x: Array, groups: int, width: int) -> tuple[Array, Array, Array]:
        """What `terse_levels_digits` says: digits, their sums by group, and the step of each input."""
        digits: Array = np.empty((len(x), groups * width * self.planes + 64), np.int8)
        sums: Array = np.empty((len(x), self.planes, groups), np.int32)
        steps: Array = np.empty(len(x), np.float64)
        factor = self.factor if self.factor.size else None
        called("levels_digits", x, factor, len(x), self.columns, self.group, width, self.planes, digits, sums, steps)
        return digits, sums, steps

    def _fixed(self, x: Array, groups: int, width: int) -> tuple[Array, Array, Array]:
        """The same of inputs in fixed point. A row that has others gives NaN."""
        q = np.rint(np.divide(x, self.step, dtype=np.float64))
        fits = ((q >= -128) & (q <= 127)).all(1)
        q = np.where(fits[:, None], q, 0).astype(np.int8)
        parts = np.pad(q, ((0, 0), (0, groups * self.group - self.columns))).reshape(len(x), groups, self.group)
        digits: Array = np.zeros((len(x), groups * width + 64), np.int8)
        digits[:, : groups * width] = np.pad(parts, ((0, 0), (0, 0), (0, width - self.group))).reshape(len(x), -1)
        return digits, parts.sum(2, dtype=np.int32)[:, None], np.where(fits, self.step, np.nan)


@dataclass(frozen=True, eq=False)
class Codes(Form):
    """book[codes] of at most 128 floats, 4 or 8 bits each."""

    codes: Array  # uint32 [blocks, words, 16]
    book: Array  # float32 [256]
    size: int
    bits: int
    rows: int
    columns: int

    def product(self, x: Array, threads: int = 1) -> Array:
        blocks, words, _ = self.codes.shape
        x = padded(inputs(x, self.columns), words * (32 // self.bits))
        y: Array = np.empty((len(x), self.rows), np.float32)
        head = (self.codes, self.bits, self.rows, words, self.book, self.size, x, x.shape[1], len(x))
        self.spread("codes_product", blocks, threads, head, y, native.simd())
        return y


@dataclass(frozen=True, eq=False)
class Vectors(Form):
    """Codewords that are vectors: each is multiplied by its part of the input once, and rows add up what they find."""

    index: Array  # uint8 [blocks / 16, rows, 16]
    book: Array  # float32 [d, size]
    blocks: int

    def product(self, x: Array, threads: int = 1) -> Array:
        (_, rows, _), (d, size) = self.index.shape, self.book.shape
        x = inputs(x, self.blocks * d)
        y: Array = np.empty((len(x), rows), np.float32)

        def work(first: int, last: int) -> None:
            room: Array = np.empty(ROOM, np.float32)
            for one, out in zip(x, y):
                called(
                    "blocks_product", self.index, rows, self.blocks, self.book, size, d, one, first, last, out, room
                )  # fmt: skip

        shared(work, rows, self.threads(threads))
        return y


@dataclass(frozen=True, eq=False)
class Chain(Form):
    """Factors one after another, the first of them first."""

    forms: tuple[Form, ...]

    def product(self, x: Array, threads: int = 1) -> Array:
        return functools.reduce(lambda x, form: form.product(x, threads), self.forms, x)


@dataclass(frozen=True, eq=False)
class Sum(Form):
    """Forms whose products are added, each of the columns from one edge to another."""

    forms: tuple[Form, ...]
    edges: tuple[tuple[int, int], ...]

    def product(self, x: Array, threads: int = 1) -> Array:
        whole = (0, x.shape[1])
        parts = [
            form.product(x if edge == whole else np.ascontiguousarray(x[:, slice(*edge)]), threads)
            for form, edge in zip(self.forms, self.edges)
        ]
        return functools.reduce(np.add, parts)


@dataclass(frozen=True, eq=False)
class Part(Form):
    """A form of some rows, or of some columns, of a weight with `size` rows; the others are zero."""

    form: Form
    rows: Array  # int64, or none: all
    columns: Array  # int64, or none: all
    size: int

    def product(self, x: Array, threads: int = 1) -> Array:
        y = self.form.product(x.take(self.columns, 1) if self.columns.size else x, threads)
        if not self.rows.size:
            return y
        whole: Array = np.zeros((len(x), self.size), np.float32)
        whole[:, self.rows] = y
        return whole


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """The weight itself."""

    weight: Array  # float32 [rows, columns]

    def product(self, x: Array, threads: int = 1) -> Array:
        with np.errstate(invalid="ignore"):  # inputs that are not finite, of which torch says nothing either
            return x @ self.weight.T


FORMS = {
    form.__name__: form
    for form in (SparseRows, SparseColumns, MaskedRows, Levels, Codes, Vectors, Chain, Sum, Part, Dense)
}

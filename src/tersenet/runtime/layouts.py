"""How weights are laid out for the kernels: arrays in the order of their rows become the forms of `forms.py`."""

import functools
from typing import Any

import numpy as np

from tersenet.runtime.forms import (
    COLUMNS,
    GROUP,
    ROOM,
    ROWS,
    Array,
    Codes,
    Form,
    Levels,
    MaskedRows,
    SparseColumns,
    SparseRows,
    Sum,
    Vectors,
)

RUN, BLOCKS = 128, 16  # numbers of a column in a block, at least, and blocks at most


def sparse_rows(mask: Array, values: Array, book: Array | None = None) -> Form:
    """Values of a mask [rows, columns] in C order, or codes of a book; by 65,536 columns at a time."""
    width = mask.shape[1]
    if width > 1 << 16:
        number: Array = np.zeros(mask.shape, np.int64)
        number[mask] = np.arange(len(values))
        edges = [(a, min(a + (1 << 16), width)) for a in range(0, width, 1 << 16)]
        parts = [(mask[:, a:b], values[number[:, a:b][mask[:, a:b]]]) for a, b in edges]
        return Sum(tuple(sparse_rows(own, there, book) for own, there in parts), tuple(edges))
    columns = np.nonzero(mask)[1].astype(np.uint16)
    codewords = np.zeros(0, np.float32) if book is None else np.ascontiguousarray(book, np.float32)
    kind = np.float32 if book is None else np.uint8
    return SparseRows(np.ascontiguousarray(values, kind), columns, _starts(mask), codewords, width)


def sparse_columns(form: SparseRows) -> SparseColumns:
    """The same numbers by column, of shared values."""
    height, n = len(form.starts) - 1, len(form.values)
    blocks = max(1, -(-height >> 16), min(BLOCKS, n // (RUN * max(1, form.width))))
    block = max(1, -(-height // blocks))
    number = np.repeat(np.arange(height) % block, np.diff(form.starts)).astype(np.uint16)
    codes, rows, starts = list[Array](), list[Array](), list[Array]()
    for top in range(0, height, block):
        first, last = form.starts[top], form.starts[min(top + block, height)]
        order = np.argsort(form.columns[first:last], kind="stable")
        codes.append(form.values[first:last][order])
        rows.append(number[first:last][order])
        counts = np.bincount(form.columns[first:last], minlength=form.width)
        starts.append(first + np.concatenate([[0], np.cumsum(counts)]))
    whole = np.stack(starts).astype(np.int64) if starts else np.zeros((0, form.width + 1), np.int64)
    return SparseColumns(
        np.concatenate([form.values[:0], *codes]), np.concatenate([number[:0], *rows]), whole, form.book, height, block
    )


def masked_rows(mask: Array, values: Array) -> Form:
    """The same with a bit for each column."""
    rows, width = mask.shape
    if width > 1 << 16:
        return sparse_rows(mask, values)
    padded = np.pad(mask, ((0, 0), (0, -width % 16)))
    words = np.packbits(padded, axis=1, bitorder="little").view("<u2").reshape(rows, padded.shape[1] // 16)
    kept = np.concatenate([values.astype(np.float32, copy=False), np.zeros(16, np.float32)])
    return MaskedRows(kept, np.ascontiguousarray(words, np.uint16), _starts(mask), width)


def _starts(mask: Array) -> Array:
    return np.concatenate([[0], np.cumsum(np.count_nonzero(mask, axis=1))]).astype(np.int64)


def levels(
    q: Array, scale: Array, offset: Array | int, factor: Array | None, planes: int, low: int | None = None
) -> Levels:
    """scale * (q + offset) * factor of integers [rows, columns]; scale is [rows, groups], offset too or a number.

    Levels are stored from `low`, without it the least, on in as few bits as they take, at most eight.
    """
    rows, columns = q.shape
    groups = scale.shape[1] if columns else 0
    scale, offset = scale[:, :groups], offset if isinstance(offset, int) else offset[:, :groups]
    low = int(q.min(initial=0)) if low is None else low
    most = int(q.max(initial=low)) - low
    bits = 2 if most < 4 else 4 if most < 16 else 8
    group = columns // groups if groups else 1
    if group > GROUP and groups > 1:
        raise ValueError(f"groups of levels have at most {GROUP:,} columns, not {group:,}, unless a row is one group")
    if group > GROUP:  # cut, with the same scale for all parts
        parts = -(-columns // GROUP)
        scale, group = np.repeat(scale, parts, 1), GROUP
        offset = offset if isinstance(offset, int) else np.repeat(offset, parts, 1)
        groups = parts
    width, blocks = -(-group // COLUMNS) * COLUMNS, -(-rows // ROWS)
    u: Array = np.zeros((blocks * ROWS, groups * group), np.uint8)
    np.subtract(q, low, out=u[:rows, :columns], casting="unsafe")
    u = np.pad(u.reshape(blocks, ROWS, groups, group), ((0, 0), (0, 0), (0, 0), (0, width - group)))
    per = 8 // bits
    u = u.reshape(blocks, ROWS, groups, width // COLUMNS, 4 // per, per, 4)
    packed = functools.reduce(np.bitwise_or, [u[..., t, :] << np.uint8(bits * t) for t in range(per)])
    weights = np.ascontiguousarray(packed.transpose(0, 2, 3, 4, 1, 5))

    def side_by_side(part: Array, kind: Any) -> Array:
        padded = np.pad(part, ((0, blocks * ROWS - rows), (0, 0)))
        return np.ascontiguousarray(padded.reshape(blocks, ROWS, groups).transpose(0, 2, 1), kind)

    none: Array = np.zeros(0, np.int32)
    shift, offsets = (low + offset, none) if isinstance(offset, int) else (0, side_by_side(offset + low, np.int32))
    columns_by = np.zeros(0, np.float32) if factor is None else np.ascontiguousarray(factor, np.float32)
    scales = side_by_side(scale, np.float32)
    return Levels(weights, scales, offsets, columns_by, bits, rows, columns, group, shift, planes)


def codes(index: Array, book: Array) -> Codes:
    """Codewords [k] by number [rows, columns]."""
    (rows, columns), size = index.shape, len(book)
    bits = 4 if size <= 16 else 8
    each, blocks = 32 // bits, -(-rows // ROWS)
    words = -(-columns // each)
    u = np.pad(index.astype(np.uint8), ((0, blocks * ROWS - rows), (0, words * each - columns)))
    u = u.reshape(blocks, ROWS, words, each).astype(np.uint32)
    packed = functools.reduce(np.bitwise_or, [u[..., t] << np.uint32(bits * t) for t in range(each)])
    whole = np.zeros(256, np.float32)
    whole[:size] = book
    return Codes(np.ascontiguousarray(packed.transpose(0, 2, 1)), whole, size, bits, rows, columns)


def vectors(index: Array, book: Array) -> Vectors:
    """Codewords [k, d] by number [rows, blocks]."""
    rows, blocks = index.shape
    each = ROOM // 256
    whole = np.pad(index.astype(np.uint8), ((0, 0), (0, -blocks % each))).reshape(rows, -(-blocks // each), each)
    by_block = np.ascontiguousarray(whole.transpose(1, 0, 2))
    return Vectors(by_block, np.ascontiguousarray(book.T, np.float32), blocks)

"""Filters for arrays of mostly zeros, each followed by the Huffman code: relative indices and zero runs.

`Gaps` is the sparse format of Deep Compression (Han, Mao, Dally 2016, section 2): the distance from one non-zero to
the next in a fixed width, with an escape for longer ones. Where the paper inserts a filler weight of value zero, the
escape stands in the gap stream alone, so that fillers cost no entry among the values. `Runs` writes runs of zeros in
bijective base 2, as bzip2 does.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs import huffman
from tersenet.codecs.stream import FormatError, Ints, Reader, Unsuited, flat32, put_number, shaped


def relative_index(flat: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
    """Gaps before each non-zero; the symbol `limit` means "that many zeros and no value yet".

    >>> relative_index(np.array([0, 7, 0, 0, 0, 0, 1], np.int32), 3).tolist()
    [1, 3, 1]
    """
    if native.library() is not None:
        out = np.empty(flat.size // limit + np.count_nonzero(flat) + 1, np.int32)
        return out[: native.call("gaps_encode", flat, flat.size, np.int32(limit), out, out.size)]
    gaps = np.diff(np.flatnonzero(flat), prepend=-1) - 1
    last = np.cumsum(gaps // limit + 1) - 1
    out = np.full(int(last[-1]) + 1 if last.size else 0, limit, np.int32)
    out[last] = gaps % limit
    return out


def positions(gaps: NDArray[np.int32], limit: int, count: int, size: int) -> NDArray[np.int64]:
    """Inverse of `relative_index`: `count` positions below `size`; raises `FormatError` for anything else."""
    out = np.empty(count, np.int64)
    done = native.call("gaps_decode", gaps, gaps.size, np.int32(limit), out, count, size)
    if done is None:
        ends = gaps != limit
        at = np.cumsum(gaps.astype(np.int64) + ends)
        bad = gaps.size and (gaps.min() < 0 or gaps.max() > limit or not ends[-1] or at[-1] > size)
        found = at[ends] - 1
        done = -2 if bad or found.size != count else count
        out = found
    if done != count:
        raise FormatError("a stream of relative indices is damaged")
    return out


def zero_runs(flat: NDArray[np.int32]) -> NDArray[np.int32]:
    """Non-negative integers with runs of zeros in bijective base 2 (digits 0 and 1 stand for 1 and 2), others plus one.

    >>> zero_runs(np.array([0, 0, 0, 4, 0], np.int32)).tolist()
    [0, 0, 5, 0]
    """
    out = np.empty(flat.size, np.int32)
    done = native.call("runs_encode", flat, flat.size, out, out.size)
    if done is not None:
        return out[:done]
    tokens: list[int] = []
    run = 0
    for value in [*flat.tolist(), None]:
        if value == 0:
            run += 1
            continue
        while run:
            tokens.append(0 if run % 2 else 1)
            run = (run - 1) // 2
        if value is not None:
            tokens.append(value + 1)
    return np.array(tokens, np.int32)


def undo_zero_runs(tokens: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """Inverse of `zero_runs`; raises `FormatError` unless it makes exactly `size` integers."""
    out = np.zeros(size, np.int32)
    done = native.call("runs_decode", tokens, tokens.size, out, size)
    if done is None:
        at, weight = 0, 1
        for token in tokens.tolist():
            if token > 1:
                if at < size:
                    out[at] = token - 1
                at, weight = at + 1, 1
            else:
                at, weight = at + weight * (token + 1), weight * 2
            if at > size:
                break
        done = size if at == size else -2
    if done != size:
        raise FormatError("a stream of zero runs is damaged")
    return out


class Gaps:
    """Relative indices of the non-zeros and, where they are not all 1, their values, each with a Huffman code."""

    pace = 100

    def encode(self, values: Ints) -> bytes:
        flat, low, high = flat32(values, huffman.ALPHABET)
        count = int(np.count_nonzero(flat))
        if 2 * count > flat.size:
            raise Unsuited("most values are not zero")
        best = min((self._gaps(flat, limit) for limit in (7, 15, 31, 63, 127, 255)), key=len)
        body = put_number(count) + best
        if low < 0 or high > 1:
            body += huffman.Huffman().encode(flat[flat != 0])
        return bytes([low < 0 or high > 1]) + body

    def _gaps(self, flat: NDArray[np.int32], limit: int) -> bytes:
        gaps = relative_index(flat, limit)
        coded = huffman.encode_table(gaps) if gaps.size else b""
        return put_number(limit) + put_number(gaps.size) + put_number(len(coded)) + coded

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader, size = Reader(data), math.prod(shape)
        valued, count = reader.byte(), reader.number(size + 1)
        limit, entries, length = reader.number(256), reader.number(2 * size + 1), reader.number()
        if limit < 1 or valued > 1:
            raise FormatError("a stream of relative indices is damaged")
        coded = Reader(reader.take(length))
        gaps = np.empty(0, np.int32)
        if entries:
            lengths = huffman.take_lengths(coded)
            gaps = huffman.decode_symbols(coded.rest(), lengths, entries)
        elif length:
            raise FormatError("a stream of relative indices is damaged")
        at = positions(gaps, limit, count, size)
        found: Ints = np.ones(count, np.int64)
        if valued:
            found = huffman.Huffman().decode(reader.rest(), (count,), np.dtype(np.int64))
        elif reader.left:
            raise FormatError("a stream of relative indices is too long")
        out = np.zeros(size, np.int64)
        out[at] = found
        return shaped(out, shape, dtype)


class Runs:
    """Zigzag, zero runs, Huffman code."""

    pace = 100

    def encode(self, values: Ints) -> bytes:
        flat, _, _ = flat32(values, huffman.ALPHABET // 4)
        tokens = zero_runs((flat << 1) ^ (flat >> 31))  # zigzag
        return put_number(tokens.size) + huffman.encode_table(tokens)

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader, size = Reader(data), math.prod(shape)
        count = reader.number(2 * size + 1)
        lengths = huffman.take_lengths(reader)
        folded = undo_zero_runs(huffman.decode_symbols(reader.rest(), lengths, count), size)
        return shaped(np.where(folded & 1, -((folded + 1) >> 1), folded >> 1), shape, dtype)

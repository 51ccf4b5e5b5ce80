"""Canonical Huffman codes (Huffman 1952), at most 15 bits, code lengths stored at 4 bits each.

Lengths come from package-merge (Larmore, Hirschberg 1990), so the limit of 15 bits costs next to nothing. The decoder
reads several symbols from one 12-bit table entry. Deep Compression (Han, Mao, Dally 2016) ends in this code.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs import bits
from tersenet.codecs.stream import FormatError, Ints, Reader, Unsuited, flat32, put_number, shaped, unzigzag, zigzag

LONGEST = 15
ALPHABET = 4096


def code_lengths(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
    """Code length of every symbol (0 where its count is 0), at most 15 bits, with the least total cost.

    >>> code_lengths([5, 1, 1, 0, 3]).tolist()
    [1, 3, 3, 0, 2]
    """
    counted = np.asarray(counts, np.int64)
    lengths = np.zeros(len(counted), np.uint8)
    symbols = counted.nonzero()[0]
    symbols = symbols[np.argsort(counted[symbols], kind="stable")]
    if len(symbols) == 1:
        lengths[symbols[0]] = 1
        return lengths
    leaves = counted[symbols]
    merged, orders = leaves, list[NDArray[np.int64]]()
    for _ in range(LONGEST - 1):
        pairs = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
        merged = np.concatenate([leaves, pairs])
        orders.append(np.argsort(merged, kind="stable"))
        merged = merged[orders[-1]]
    taken = 2 * len(leaves) - 2  # of the last list; each pair among them takes two of the list before
    for order in reversed(orders):
        here = int((order[:taken] < len(leaves)).sum())
        lengths[symbols[:here]] += 1
        taken = 2 * (taken - here)
    lengths[symbols[:taken]] += 1
    return lengths


def canonical_codes(lengths: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Codes in canonical order, bit-reversed so that the first bit of a code is the lowest.

    Raises `FormatError` unless the lengths make a complete code (a lone symbol has one bit).
    """
    present = np.flatnonzero(lengths)
    kraft = int((1 << (LONGEST - lengths[present].astype(np.int64))).sum())
    if kraft != 1 << LONGEST and not (len(present) == 1 and lengths[present[0]] == 1):
        raise FormatError("Huffman code lengths do not make a complete code")
    order = present[np.argsort(lengths[present], kind="stable")]
    length = lengths[order].astype(np.uint32)
    share = np.uint32(1) << (LONGEST - length)
    code = np.cumsum(share, dtype=np.uint32) - share  # from the first of LONGEST bits on
    codes = np.zeros(len(lengths), np.uint32)
    for bit in range(LONGEST):
        codes[order] |= (code >> np.uint32(LONGEST - 1 - bit) & 1) << np.uint32(bit)
    return codes


def encode_symbols(symbols: NDArray[np.int32], lengths: NDArray[np.uint8]) -> bytes:
    """The bit stream alone, without its table."""
    codes = canonical_codes(lengths)
    out = np.empty(int(lengths[symbols].sum(dtype=np.int64) + 7) // 8, np.uint8)
    if native.call("huffman_encode", symbols, symbols.size, codes, lengths, out, out.size) is None:
        span = lengths[symbols].astype(np.int64)
        within = np.arange(span.sum()) - np.repeat(np.cumsum(span) - span, span)
        stream = np.repeat(codes[symbols], span) >> within.astype(np.uint32) & 1
        out = np.packbits(stream.astype(np.uint8), bitorder="little")
    return out.tobytes()


def decode_symbols(data: bytes, lengths: NDArray[np.uint8], count: int) -> NDArray[np.int32]:
    """`count` symbols; raises `FormatError` unless the data is exactly their stream."""
    codes = canonical_codes(lengths)
    if count > 8 * len(data):
        raise FormatError("a Huffman stream is too short")
    raw, out = np.frombuffer(data, np.uint8), np.empty(count, np.int32)
    done = native.call("huffman_decode", raw, raw.size, codes, lengths, np.int32(len(lengths)), out, count)
    if done is None:
        done = _decode_slowly(raw, codes, lengths, out)
    if done < 0:
        raise FormatError("a Huffman stream is damaged")
    return out


def _decode_slowly(
    raw: NDArray[np.uint8], codes: NDArray[np.uint32], lengths: NDArray[np.uint8], out: NDArray[np.int32]
) -> int:
    table = np.full(1 << LONGEST, -1, np.int32)
    for symbol in np.flatnonzero(lengths):
        table[codes[symbol] :: 1 << int(lengths[symbol])] = symbol
    stream = np.concatenate([np.unpackbits(raw, bitorder="little"), np.zeros(LONGEST, np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(stream, LONGEST) @ (1 << np.arange(LONGEST, dtype=np.int32))
    at, end = 0, 8 * raw.size
    for i in range(out.size):
        if at >= end:
            return -2
        found = int(table[windows[at]])
        if found < 0:
            return -2
        out[i] = found
        at += int(lengths[found])
    return -2 if at > end or end - at >= 8 or stream[at:].any() else out.size


def put_lengths(lengths: NDArray[np.uint8]) -> bytes:
    return put_number(len(lengths)) + bits.pack(lengths, 4)


def take_lengths(reader: Reader) -> NDArray[np.uint8]:
    size = reader.number(ALPHABET + 1)
    return bits.unpack(reader.take((size * 4 + 7) // 8), size, 4).astype(np.uint8)


def encode_table(symbols: NDArray[np.int32]) -> bytes:
    """Code lengths and stream of symbols from 0 up; raises `Unsuited` for more than 4096 of them."""
    if symbols.size and int(symbols.max()) >= ALPHABET:
        raise Unsuited("too many symbols for a Huffman code")
    lengths = code_lengths(np.bincount(symbols))
    return put_lengths(lengths) + encode_symbols(symbols, lengths)


class Huffman:
    """Symbols are offsets from the lowest value; up to 4,096 of them."""

    pace = 400

    def encode(self, values: Ints) -> bytes:
        flat, low, _ = flat32(values, ALPHABET)
        return put_number(zigzag(low)) + encode_table(flat - np.int32(low))

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader = Reader(data)
        low = unzigzag(reader.number(1 << 32))
        lengths = take_lengths(reader)
        symbols = decode_symbols(reader.rest(), lengths, math.prod(shape))
        return shaped(symbols.astype(np.int64) + low, shape, dtype)

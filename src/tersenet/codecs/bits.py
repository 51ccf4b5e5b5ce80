"""Fixed-width codecs: `Bits`, every integer in the same number of bits, and `Trits`, base-3 digits five to a byte.

`Bits` takes any integers of up to 64 bits and is the only codec that may hold an empty array, so every array has a
codec. A constant array costs its value and no bits. Byte order: least significant bit first. `Trits` is the quartic
encoding of 3LC (Lim, Andersen, Kaminsky 2018) with neighbouring digits, not five partitions, in a byte.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tersenet import native
from tersenet.codecs.stream import FormatError, Ints, Reader, flat32, put_number, shaped, unzigzag, zigzag

SHORT = 512  # bits


def pack(values: Ints, width: int) -> bytes:
    """Unsigned integers in `width` (0..64) bits each.

    >>> pack(np.array([1, 2, 3], np.uint64), 2).hex()
    '39'
    """
    values = np.ascontiguousarray(values, np.uint64)
    out = np.empty((values.size * width + 7) // 8, np.uint8)
    if native.call("bits_encode", values, values.size, np.int32(width), out, out.size) is None:
        shifts = np.arange(width, dtype=np.uint64)
        out = np.packbits((values[:, None] >> shifts & np.uint64(1)).astype(np.uint8), bitorder="little")
    return out.tobytes()


def unpack(data: bytes, count: int, width: int) -> Ints:
    """`count` integers of `width` bits as uint64; raises `FormatError` unless the data is exactly that long."""
    if len(data) != (count * width + 7) // 8:
        raise FormatError("a packed stream has the wrong length")
    if count * width <= SHORT:  # a call of the C core takes longer than this
        whole, mask = int.from_bytes(data, "little"), (1 << width) - 1
        if whole >> count * width:
            raise FormatError("a packed stream has bits set after its end")
        return np.array([whole >> at & mask for at in range(0, count * width, width or 1)] or [0] * count, np.uint64)
    if width == 8:
        return np.frombuffer(data, np.uint8).astype(np.uint64)
    raw, out = np.frombuffer(data, np.uint8), np.empty(count, np.uint64)
    done = native.call("bits_decode", raw, raw.size, count, np.int32(width), out)
    if done is None:
        bits = np.unpackbits(raw, bitorder="little")
        done = -2 if bits[count * width :].any() else count
        places = bits[: count * width].reshape(count, width).astype(np.uint64) << np.arange(width, dtype=np.uint64)
        out = places.sum(1, dtype=np.uint64)
    if done < 0:
        raise FormatError("a packed stream has bits set after its end")
    return out


class Bits:
    """Offset from the lowest value, every integer in the bits that the widest needs."""

    pace = 700

    def encode(self, values: Ints) -> bytes:
        flat = np.ascontiguousarray(values).reshape(-1)
        if flat.dtype == np.bool_:
            flat = flat.astype(np.uint8)
        low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
        width = (high - low).bit_length()
        offset = flat.astype(np.uint64) - np.uint64(low % (1 << 64))
        return put_number(zigzag(low)) + bytes([width]) + pack(offset, width)

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader = Reader(data)
        low, width = unzigzag(reader.number(1 << 65)), reader.byte()
        if width > 64:
            raise FormatError("a packed stream says it has more than 64 bits to a value")
        values = unpack(reader.rest(), math.prod(shape), width)
        if dtype == np.bool_ and (low < 0 or low + int(values.max(initial=0)) > 1):
            raise FormatError("a stream of booleans holds other values")
        if dtype != np.bool_ and values.size:
            info = np.iinfo(dtype)
            if low < info.min or low + int(values.max()) > info.max:
                raise FormatError(f"a stream holds values that {dtype} cannot")
        return (values + np.uint64(low % (1 << 64))).astype(dtype).reshape(shape)


class Trits:
    """Integers of at most three neighbouring values: 1.6 bits each."""

    pace = 1000

    def encode(self, values: Ints) -> bytes:
        flat, low, _ = flat32(values, 3)
        digits = (flat - low).astype(np.uint8)
        out = np.empty((digits.size + 4) // 5, np.uint8)
        if native.call("trits_encode", digits, digits.size, out, out.size) is None:
            padded = np.pad(digits, (0, -digits.size % 5)).reshape(-1, 5)
            out = (padded @ np.array([1, 3, 9, 27, 81])).astype(np.uint8)
        return put_number(zigzag(low)) + out.tobytes()

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader = Reader(data)
        low, count = unzigzag(reader.number(1 << 32)), math.prod(shape)
        raw = np.frombuffer(reader.rest(), np.uint8)
        if raw.size != (count + 4) // 5:
            raise FormatError("a base-3 stream has the wrong length")
        out = np.empty(count, np.uint8)
        done = native.call("trits_decode", raw, raw.size, count, out)
        if done is None:
            digits = (raw[:, None].astype(np.int32) // np.array([1, 3, 9, 27, 81]) % 3).reshape(-1)
            done = -2 if (raw > 242).any() or digits[count:].any() else count
            out = digits[:count].astype(np.uint8)
        if done < 0:
            raise FormatError("a base-3 stream holds what no digits make")
        return shaped(out.astype(np.int64) + low, shape, dtype)

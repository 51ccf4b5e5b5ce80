"""What every stream is made of: the codec contract, variable-length integers, and the one error for bad bytes."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]


class FormatError(ValueError):
    """The bytes are not a valid tersenet file; nothing of them was used."""


class Unsuited(ValueError):
    """This codec cannot hold these integers (alphabet too large, values too wide); another one can."""


class Codec(Protocol):
    """Integers of any shape to bytes and back."""

    @property
    def pace(self) -> int:
        """A rough decoding speed, in million integers a second."""

    def encode(self, values: Ints) -> bytes:
        """The bytes for these integers; raises `Unsuited` where the codec cannot hold them."""

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        """The integers back, bit for bit; raises `FormatError` unless the bytes are exactly one valid stream."""


def put_number(value: int) -> bytes:
    """A non-negative integer, seven bits to a byte, least significant first (LEB128)."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads bytes from the front and refuses to go past the end."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count < 0 or count > self.left:
            raise FormatError("the data ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        try:
            value = self.data[self.at]
        except IndexError:
            raise FormatError("the data ends early") from None
        self.at += 1
        return value

    def number(self, limit: int = 1 << 63) -> int:
        """A LEB128 integer below `limit`, in its shortest form."""
        byte = self.byte()
        if byte < 128 and byte < limit:  # nearly all
            return byte
        value = shift = 0
        while True:
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift > 63:
                raise FormatError("an integer is too long")
            byte = self.byte()
        if value >= limit or (byte == 0 and shift):
            raise FormatError("an integer is out of range")
        return value

    def rest(self) -> bytes:
        return self.take(self.left)


def zigzag(value: int) -> int:
    """Signed to unsigned: 0, -1, 1, -2, ... becomes 0, 1, 2, 3, ..."""
    return -2 * value - 1 if value < 0 else 2 * value


def unzigzag(value: int) -> int:
    return -(value + 1) // 2 if value & 1 else value // 2


def flat(values: Ints, alphabet: int = 1 << 30) -> tuple[Ints, int, int]:
    """The flat values with their lowest and highest; raises `Unsuited` where they span over `alphabet` or 30 bits."""
    found = np.ascontiguousarray(values).reshape(-1)
    if found.size == 0:
        raise Unsuited("nothing to code")
    low, high = int(found.min()), int(found.max())
    if high - low >= alphabet or not (low > -(1 << 30) and high < 1 << 30):
        raise Unsuited(f"values span {low}..{high}")
    return found, low, high


def flat32(values: Ints, alphabet: int = 1 << 30) -> tuple[NDArray[np.int32], int, int]:
    """The same as int32."""
    found, low, high = flat(values, alphabet)
    return found.astype(np.int32), low, high


def offsets8(values: Ints, low: int) -> NDArray[np.uint8]:
    """Flat values less their lowest, where these differ by less than 256."""
    return values.astype(np.uint8) - np.uint8(low & 255)


def spread(values: Ints, most: int) -> Ints:
    """About `most` integers of an array, or all of a smaller one: eight runs of rows from all over it.

    Arrays are not alike from end to end. One axis is taken for rows of 1024 where that comes out even, as the context
    coder does, and else for integers.
    """
    if values.size <= most:
        return values
    rows = values.reshape([n for n in values.shape if n != 1])
    if rows.ndim == 1 and len(rows) % 1024 == 0:
        rows = rows.reshape(-1, 1024)
    kept = max(1, len(rows) * most // values.size)
    run = kept // 8 | 1  # odd, so that integers of one row are no multiple of 1024
    starts = [k * len(rows) // (kept // run) for k in range(kept // run)]
    found: Ints = np.concatenate([rows[start : start + run] for start in starts])
    return found


def shaped(values: Ints, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
    """Decoded integers in their shape and type; refuses values that the type cannot hold."""
    if values.size != math.prod(shape):
        raise FormatError("a stream has another length than its shape says")
    if dtype == np.bool_:
        low, high = 0, 1
    else:
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if values.size and values.dtype != dtype and (int(values.min()) < low or int(values.max()) > high):
        raise FormatError(f"a stream holds values that {dtype} cannot")
    return values.astype(dtype, copy=False).reshape(shape)

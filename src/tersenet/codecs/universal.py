"""General-purpose compressors as codecs: deflate, bzip2, LZMA, Zstandard (universal source coding, Choi et al. 2018).

Integers go as bytes in the narrowest width, nibbles two to a byte where they fit, most significant plane first.
Zstandard is not part of the standard library: a file that uses it needs the `zstandard` package to be read, so it is
chosen only where a caller names it.
"""

import bz2
import lzma
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersenet.codecs import literals
from tersenet.codecs.stream import (
    FormatError,
    Ints,
    Reader,
    flat,
    offsets8,
    put_number,
    shaped,
    spread,
    unzigzag,
    zigzag,
)

DICTIONARY = 1 << 23  # bytes that LZMA's strings may lie back
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": DICTIONARY}]
LOOK, FEWER = 1 << 14, 0.97  # strings occur again where deflate makes so much less of so many bytes than literals take


def _deflate(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return coder.compress(data) + coder.flush()


def _inflate(data: bytes, size: int) -> bytes:
    coder = zlib.decompressobj(-15)
    out = coder.decompress(data, size + 1)
    if not coder.eof or coder.unused_data:
        raise FormatError("a deflate stream is damaged")
    return out


def _bzip2(data: bytes, size: int) -> bytes:
    coder = bz2.BZ2Decompressor()
    out = coder.decompress(data, size + 1)
    if not coder.eof or coder.unused_data:
        raise FormatError("a bzip2 stream is damaged")
    return out


def _lzma(data: bytes) -> bytes:
    """Literals alone or, where strings occur again, what is smaller: the match finder is ten times slower."""
    part = spread(np.frombuffer(data, np.uint8), LOOK).tobytes()
    sizes = {context: len(literals.encode(part, context)) for context in (0, 4)}
    context = min(sizes, key=sizes.__getitem__)
    plain = literals.encode(data, context)
    if len(_deflate(part)) > FEWER * sizes[context]:
        return plain
    reach = min(DICTIONARY, max(1 << 12, 1 << (len(data) - 1).bit_length()))  # no more tables than are needed
    matched = lzma.compress(data, lzma.FORMAT_RAW, filters=[LZMA_FILTERS[0] | {"dict_size": reach}])
    return min(plain, matched, key=len)


def _unlzma(data: bytes, size: int) -> bytes:
    coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    out = coder.decompress(data, size + 1)
    if not coder.eof or coder.unused_data:
        raise FormatError("an LZMA stream is damaged")
    return out


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=19).compress(data)


def _unzstd(data: bytes, size: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise FormatError("this file needs the zstandard package: pip install zstandard") from None
    try:
        if zstandard.get_frame_parameters(data).content_size != size:
            raise FormatError("a Zstandard frame says it holds another length")
        coder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        out = coder.decompress(data)
    except zstandard.ZstdError as error:
        raise FormatError(f"a Zstandard stream is damaged: {error}") from None
    if not coder.eof or coder.unused_data:
        raise FormatError("a Zstandard stream is damaged")
    return out


@dataclass(frozen=True)
class Universal:
    """One general-purpose compressor over the bytes of the integers."""

    compress: Callable[[bytes], bytes]
    expand: Callable[[bytes, int], bytes]
    pace: int

    def encode(self, values: Ints) -> bytes:
        integers, low, high = flat(values)
        width = 0 if high - low < 16 else ((high - low).bit_length() + 7) // 8
        return put_number(zigzag(low)) + bytes([width]) + self.compress(_to_bytes(integers, low, width))

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader, count = Reader(data), math.prod(shape)
        low, width = unzigzag(reader.number(1 << 32)), reader.byte()
        if width > 4:
            raise FormatError("a stream says its integers have more than 32 bits")
        size = count * width if width else (count + 1) // 2
        try:
            plain = self.expand(reader.rest(), size)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            raise FormatError(f"a compressed stream is damaged: {error}") from None
        if len(plain) != size:
            raise FormatError("a compressed stream holds another length")
        return shaped(_from_bytes(plain, width, count) + low, shape, dtype)


def _to_bytes(integers: Ints, low: int, width: int) -> bytes:
    if width > 1:
        offset = integers.astype(np.int32) - np.int32(low)
        return b"".join((offset >> 8 * plane).astype(np.uint8).tobytes() for plane in reversed(range(width)))
    small = offsets8(integers, low)
    if width == 1:
        return small.tobytes()
    nibbles = np.append(small, np.zeros(small.size % 2, np.uint8))
    return (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()


def _from_bytes(plain: bytes, width: int, count: int) -> Ints:
    raw = np.frombuffer(plain, np.uint8)
    if width == 0:
        nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(-1)
        if nibbles[count:].any():
            raise FormatError("a stream of nibbles has a value too many")
        return nibbles[:count].astype(np.int64)
    values = np.zeros(count, np.int64)
    for plane in raw.reshape(width, count):
        values = values << 8 | plane
    return values


DEFLATE = Universal(_deflate, _inflate, 150)
BZIP2 = Universal(bz2.compress, _bzip2, 30)
LZMA = Universal(_lzma, _unlzma, 90)
ZSTD = Universal(_zstd, _unzstd, 1500)

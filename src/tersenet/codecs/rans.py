"""Static range asymmetric numeral systems (Duda 2013): `Rans` for up to 256 values, `RansPairs` for nibbles.

32 interleaved 32-bit states, 16-bit words and 12-bit frequencies, so that a decoder can run all lanes at once; short
arrays take fewer lanes, since each costs four bytes. The stream is read forwards and ends in the state that encoding
began with, which serves as a check. `RansPairs` codes two 4-bit symbols at a time: about 1 % more bytes, twice as fast.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import (
    FormatError,
    Ints,
    Reader,
    Unsuited,
    flat,
    offsets8,
    put_number,
    shaped,
    unzigzag,
    zigzag,
)

SCALE = 12
SLOTS = 1 << SCALE
FLOOR = 1 << 16
_BOTH = np.array([byte & 15 | byte >> 4 << 8 for byte in range(256)], "<u2")  # a pair's two nibbles as bytes
MOST_LANES = 32


def frequencies(symbols: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Counts scaled to sum to 4096, at least 1 for each symbol that occurs, at nearly the least total code length.

    What rounding leaves over goes, unit by unit, where it saves most (or is taken where it costs least).
    """
    counts = np.bincount(symbols, minlength=256)
    if np.count_nonzero(counts) < 2:
        raise Unsuited("a constant array needs no entropy code")
    scaled = np.where(counts > 0, np.maximum(1, counts * SLOTS // symbols.size), 0)
    rest = SLOTS - int(scaled.sum())
    step = 1 if rest > 0 else -1

    def loss(symbol: int, now: int) -> tuple[float, int]:
        """Minus d(counts * log f) for one unit, the least first; or infinity where there is none to take."""
        count = int(counts[symbol])
        return (-count * step / (now + step / 2) if now + step >= 1 else math.inf), symbol

    units = [loss(int(symbol), int(scaled[symbol])) for symbol in counts.nonzero()[0]]
    heapq.heapify(units)
    for _ in range(abs(rest)):
        symbol = units[0][1]
        scaled[symbol] += step
        heapq.heapreplace(units, loss(symbol, int(scaled[symbol])))
    return scaled.astype(np.uint16)


def put_frequencies(frequency: NDArray[np.uint16]) -> bytes:
    """Alphabet size, then every frequency plus one in Elias gamma code."""
    size = int(np.flatnonzero(frequency)[-1]) + 1
    text = "".join("0" * ((int(f) + 1).bit_length() - 1) + f"{int(f) + 1:b}" for f in frequency[:size])
    length = (len(text) + 7) // 8
    return bytes([size - 1]) + int(text.ljust(8 * length, "0"), 2).to_bytes(length, "big")


def take_frequencies(reader: Reader) -> NDArray[np.uint16]:
    size = reader.byte() + 1
    out, held, filled = np.zeros(256, np.uint16), 0, 0
    for symbol in range(size):
        zeros = 0
        while True:
            if filled == 0:
                held, filled = reader.byte(), 8
            filled -= 1
            if held >> filled & 1:
                break
            zeros += 1
            if zeros > SCALE:
                raise FormatError("a frequency is out of range")
        value = 1
        for _ in range(zeros):
            if filled == 0:
                held, filled = reader.byte(), 8
            filled -= 1
            value = value << 1 | (held >> filled & 1)
        out[symbol] = value - 1
    if int(out.sum(dtype=np.int64)) != SLOTS or out[size - 1] == 0 or held & ((1 << filled) - 1):
        raise FormatError("rANS frequencies do not sum to 4096")
    if int(out.max()) >= SLOTS:
        raise FormatError("a frequency is out of range")
    return out


def lanes_for(count: int) -> int:
    return MOST_LANES if count >= 1 << 15 else 4 if count >= 1 << 11 else 1


def encode_bytes(symbols: NDArray[np.uint8]) -> bytes:
    """Frequencies and stream of a byte array."""
    frequency, lanes = frequencies(symbols), lanes_for(symbols.size)
    out = np.empty(2 * symbols.size + 4 * lanes + 64, np.uint8)
    done = native.call("rans_encode", symbols, symbols.size, frequency, np.int32(lanes), out, out.size)
    stream = _encode_slowly(symbols, frequency, lanes) if done is None else out[:done].tobytes()
    return put_frequencies(frequency) + stream


def decode_bytes(reader: Reader, count: int, simd: int | None = None) -> NDArray[np.uint8]:
    """`count` bytes; `simd` overrides the path that the machine offers (tests compare them)."""
    frequency, lanes = take_frequencies(reader), lanes_for(count)
    raw, out = np.frombuffer(reader.rest(), np.uint8), np.empty(count, np.uint8)
    path = np.int32(native.simd() if simd is None else simd)
    done = native.call("rans_decode", raw, raw.size, frequency, np.int32(lanes), path, out, count)
    if done is None:
        done = _decode_slowly(raw, frequency, lanes, out)
    if done != count:
        raise FormatError("a rANS stream is damaged")
    return out


def _rounds(count: int, lanes: int) -> list[tuple[int, int]]:
    return [(i, min(lanes, count - i)) for i in range(0, count, lanes)]


def _encode_slowly(symbols: NDArray[np.uint8], frequency: NDArray[np.uint16], lanes: int) -> bytes:
    f = frequency.astype(np.uint64)
    start = np.cumsum(f) - f
    x = np.full(lanes, FLOOR, np.uint64)
    words: list[NDArray[np.uint16]] = []
    for at, used in reversed(_rounds(symbols.size, lanes)):
        s, state = symbols[at : at + used], x[:used]
        full = state >= f[s] << np.uint64(32 - SCALE)
        words.append((state[full] & np.uint64(0xFFFF)).astype("<u2"))
        state = np.where(full, state >> np.uint64(16), state)
        x[:used] = (state // f[s] << np.uint64(SCALE)) + state % f[s] + start[s]
    stream = b"".join(w.tobytes() for w in reversed(words))
    return x.astype("<u4").tobytes() + stream


def _decode_slowly(raw: NDArray[np.uint8], frequency: NDArray[np.uint16], lanes: int, out: NDArray[np.uint8]) -> int:
    if raw.size < 4 * lanes or (raw.size - 4 * lanes) % 2:
        return -2
    f = frequency.astype(np.uint64)
    start = np.cumsum(f) - f
    symbol_of = np.repeat(np.arange(256, dtype=np.uint8), frequency)
    x = np.frombuffer(raw[: 4 * lanes].tobytes(), "<u4").astype(np.uint64)
    words = np.frombuffer(raw[4 * lanes :].tobytes(), "<u2")
    if (x < FLOOR).any():
        return -2
    at = 0
    for begin, used in _rounds(out.size, lanes):
        slot = x[:used] & np.uint64(SLOTS - 1)
        s = symbol_of[slot]
        out[begin : begin + used] = s
        state = f[s] * (x[:used] >> np.uint64(SCALE)) + slot - start[s]
        low = np.flatnonzero(state < FLOOR)
        if at + low.size > words.size:
            return -2
        state[low] = state[low] << np.uint64(16) | words[at : at + low.size]
        at += low.size
        x[:used] = state
    return out.size if at == words.size and (x == FLOOR).all() else -2


class Rans:
    """Offsets from the lowest value, at most 256 of them, each at its share of 4096."""

    pace = 1000

    def encode(self, values: Ints) -> bytes:
        symbols, low, _ = flat(values, 256)
        return put_number(zigzag(low)) + encode_bytes(offsets8(symbols, low))

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader = Reader(data)
        low = unzigzag(reader.number(1 << 32))
        symbols = decode_bytes(reader, math.prod(shape))
        return shaped(_raised(symbols, low, dtype), shape, dtype)


class RansPairs:
    """Two neighbouring 4-bit offsets make one symbol (the first in the low nibble); made for speed."""

    pace = 2000

    def encode(self, values: Ints) -> bytes:
        symbols, low, _ = flat(values, 16)
        nibbles = offsets8(symbols, low)
        if nibbles.size % 2:
            nibbles = np.append(nibbles, nibbles[-1])
        return put_number(zigzag(low)) + encode_bytes((nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8))

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader, count = Reader(data), math.prod(shape)
        low = unzigzag(reader.number(1 << 32))
        pairs = decode_bytes(reader, (count + 1) // 2)
        nibbles = np.empty(2 * pairs.size, np.uint8)
        if native.call("rans_split", pairs, pairs.size, nibbles) is None:
            nibbles = _BOTH[pairs].view(np.uint8)
        if count % 2 and nibbles[-1] != nibbles[-2]:
            raise FormatError("a stream of pairs has a value too many")
        return shaped(_raised(nibbles[:count], low, dtype), shape, dtype)


def _raised(symbols: NDArray[np.uint8], low: int, dtype: np.dtype[Any]) -> Ints:
    """Symbols plus offset, without widening where the type holds them all."""
    if dtype.kind in "iu" and symbols.size:
        info = np.iinfo(dtype)
        if info.min <= low and low + 255 <= info.max and not low:
            return symbols.astype(dtype, copy=False)
        if info.min <= low and low + int(symbols.max()) <= info.max:
            raised: Ints = symbols.astype(dtype) + np.array(low).astype(dtype)
            return raised
    return symbols.astype(np.int64) + low

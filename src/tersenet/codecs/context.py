"""Adaptive binary arithmetic coding of integer matrices with contexts from what is already decoded.

A value becomes: significant?, sign, greater than 1?, greater than 2?, ... and an Exp-Golomb remainder, as in DeepCABAC
(Wiedemann et al. 2019) and ISO/IEC 15938-17. We differ in what a context is: a prediction of the magnitude, blended
from the running mean of the column over earlier rows and a decaying mean along the row, on a scale of 24 steps. Each
step starts from the odds that a Laplace distribution of that mean has, so small tensors pay little for learning. Signs
look at the left and the upper neighbour. Every probability is the mean of a fast and a slow estimate. How the array is
laid out as a matrix, the blend and the rates are chosen for each array and cost four bytes.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import FormatError, Ints, Reader, flat32, put_number, unzigzag, zigzag

LEVELS, FLAGS, DEPTH, PEAK = 24, 14, 32, 255
TRIAL = 1 << 18  # integers that are looked at to choose the model of a larger array

# Upper edges of the predicted magnitude in 1/256 for each context: 2^(k/2), so 1/256 .. 11.3.
_EDGES = [round(2 ** (k / 2)) for k in range(LEVELS - 1)]
LEVEL = np.searchsorted(np.array(_EDGES), np.arange(4096), side="right").astype(np.uint8)


def _laplace(mean: float) -> tuple[int, int]:
    """Odds in 1/65536 of "significant" and of "greater" for a rounded Laplace variable of this mean magnitude."""
    significant = (math.sqrt(1 + 4 * mean * mean) - 1) / (2 * mean)
    return round(65536 * significant), round(65536 * min(max(significant**2, 0.1), 0.97))


PRIOR = np.array([_laplace(2 ** ((k - 0.5) / 2) / 256) for k in range(LEVELS)], np.uint16)
RATE = np.array([65536 // (n + 6) if n < 255 else 0 for n in range(256)], np.uint16)


class _Model(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("low", "high", "fast", "slow", "blend", "memory", "settle")],
        *[(name, ctypes.c_void_p) for name in ("level", "prior", "rate")],
    ]


class Rates(NamedTuple):
    """Where the two estimates of a probability end: 2^-fast and 2^-slow a symbol."""

    fast: int
    slow: int


RATES = (Rates(5, 7), Rates(4, 6), Rates(5, 8), Rates(6, 10))
BLENDS = (8, 0, 4, 12, 16)
MEMORIES = (3, 2, 4, 5)
SETTLES = (4, 3, 6, 8)


@dataclass(frozen=True)
class Model:
    """How one array is coded: which axes make the rows, and the indices of its rates, blend and memories."""

    split: int = 1  # the first `split` axes are rows (0: a single row)
    transposed: bool = False
    rates: int = 0
    blend: int = 0
    memory: int = 0
    settle: int = 0

    def to_bytes(self) -> bytes:
        return bytes([self.split << 1 | self.transposed, self.rates << 4 | self.blend, self.memory << 4 | self.settle])

    @staticmethod
    def read(reader: Reader, rank: int) -> "Model":
        layout, first, second = reader.take(3)
        model = Model(layout >> 1, bool(layout & 1), first >> 4, first & 15, second >> 4, second & 15)
        limits = (len(RATES), len(BLENDS), len(MEMORIES), len(SETTLES))
        chosen = (model.rates, model.blend, model.memory, model.settle)
        if model.split > rank or any(c >= limit for c, limit in zip(chosen, limits, strict=True)):
            raise FormatError("a context model is out of range")
        return model

    def shape(self, shape: Sequence[int]) -> tuple[int, int]:
        rows, columns = math.prod(shape[: self.split]), math.prod(shape[self.split :])
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, values: Ints) -> NDArray[np.int32]:
        """The array as the matrix that is walked row by row."""
        rows = math.prod(values.shape[: self.split])
        flat = values.reshape(rows, values.size // rows)
        return np.ascontiguousarray(flat.T if self.transposed else flat, np.int32)

    def array(self, matrix: Ints, shape: Sequence[int]) -> Ints:
        return (matrix.T if self.transposed else matrix).reshape(shape)

    def native(self, size: tuple[int, int], low: int, high: int) -> _Model:
        rates = RATES[self.rates]
        tables = [t.ctypes.data for t in (LEVEL, PRIOR, RATE)]
        chosen = (BLENDS[self.blend], MEMORIES[self.memory], SETTLES[self.settle])
        return _Model(*size, low, high, rates.fast, rates.slow, *chosen, *tables)


def encode_matrix(matrix: NDArray[np.int32], model: Model, low: int, high: int) -> bytes:
    """The stream of a matrix whose values lie in low..high, low <= 0 <= high."""
    if native.library() is None:
        return _Encoder().walk(matrix, model, low, high)
    out = np.empty(matrix.size * 5 + 64, np.uint8)
    settings, work = model.native((matrix.shape[0], matrix.shape[1]), low, high), np.empty(matrix.shape[1], np.int32)
    done = native.call("context_encode", matrix, ctypes.byref(settings), out, out.size, work)
    if done is None or done < 0:
        raise RuntimeError(f"context coder failed ({done})")
    return out[:done].tobytes()


def decode_matrix(data: bytes, model: Model, size: tuple[int, int], low: int, high: int) -> NDArray[np.int32]:
    """Inverse of `encode_matrix`; raises `FormatError` unless the data is exactly one stream."""
    out, raw = np.zeros(size, np.int32), np.frombuffer(data, np.uint8)
    if native.library() is None:
        _Decoder(data).walk(out, model, low, high)
        return out
    settings, work = model.native(size, low, high), np.empty(size[1], np.int32)
    done = native.call("context_decode", raw, raw.size, ctypes.byref(settings), out, work)
    if done != out.size:
        raise FormatError("an arithmetic-coded stream is damaged")
    return out


def choose(values: Ints, low: int, high: int) -> Model:
    """The model that makes this array smallest, found one setting at a time on at most 2^18 of its integers."""
    sample = values
    if values.size > TRIAL:
        lines = max(1, TRIAL * values.shape[0] // values.size)
        sample = values[:lines]
    rank = values.ndim
    layouts = {(1, False), (rank - 1, False), (1, True)} if rank > 1 else {(0, False)}
    sized: dict[Model, int] = {}

    def size(model: Model) -> int:
        if model not in sized:
            sized[model] = len(encode_matrix(model.matrix(sample), model, low, high))
        return sized[model]

    best = min((Model(split, transposed) for split, transposed in sorted(layouts)), key=size)
    for name, options in (("blend", BLENDS), ("memory", MEMORIES), ("settle", SETTLES), ("rates", RATES)):
        best = min((replace(best, **{name: i}) for i in range(len(options))), key=size)  # type: ignore[arg-type]
    return best


class Context:
    """Levels around the most common value, in the layout and with the rates that suit them best."""

    pace = 60

    def encode(self, values: Ints) -> bytes:
        flat, low, high = flat32(values, 1 << 24)
        origin = low + int(np.bincount(flat - low).argmax()) if high - low < 1 << 16 else max(low, min(0, high))
        levels = (flat - np.int32(origin)).reshape(values.shape)
        low, high = low - origin, high - origin
        model = choose(levels, low, high)
        head = put_number(zigzag(origin)) + put_number(-low) + put_number(high) + model.to_bytes()
        return head + encode_matrix(model.matrix(levels), model, low, high)

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader = Reader(data)
        origin = unzigzag(reader.number(1 << 32))
        low, high = -reader.number(1 << 24), reader.number(1 << 24)
        model = Model.read(reader, len(shape))
        if math.prod(shape) == 0:
            raise FormatError("an empty array is not arithmetic-coded")
        info = np.iinfo(np.uint8 if dtype == np.bool_ else dtype)
        if low + origin < info.min or high + origin > (1 if dtype == np.bool_ else info.max) or origin >= 1 << 30:
            raise FormatError(f"a stream holds values that {dtype} cannot")
        levels = decode_matrix(reader.rest(), model, model.shape(shape), low, high)
        if origin:
            levels += np.int32(origin)
        return model.array(levels, shape).astype(dtype)


def _shortest(low: int, span: int) -> int:
    """The number in [low, low + span) with the most trailing zero bytes."""
    for bits in range(56, 0, -8):
        end = (low + (1 << bits) - 1) >> bits << bits
        if end - low < span:
            return end
    return low


class _Walk:
    """The NumPy twin of native/context.c: the same decisions in the same order, in Python integers."""

    def __init__(self) -> None:
        self.low, self.range = 0, (1 << 64) - 1

    def bit(self, chance: int, bit: int) -> int:
        raise AssertionError("the encoder and the decoder say what a bit is")

    def code(self, e: list[int], bit: int) -> int:
        bit = self.bit((e[0] + e[1]) >> 1, bit)
        target, rate = (65535 - 16 if bit else 16), int(RATE[e[2]])
        e[0] += (target - e[0]) * max(rate, self.fast) >> 16
        e[1] += (target - e[1]) * max(rate, self.slow) >> 16
        e[2] = min(e[2] + 1, 255)
        return bit

    def remainder(self, value: int) -> int:
        bits, prefix = (value + 1).bit_length() - 1, 0
        while prefix < DEPTH - 1 and self.code(self.prefix[prefix], prefix < bits):
            prefix += 1
        suffix = 1
        for b in reversed(range(prefix)):
            suffix = suffix << 1 | self.bit(32768, (value + 1) >> b & 1)
        return suffix - 1

    def magnitude(self, size: int, level: int, most: int) -> int:
        k = 1
        while k < most and k <= FLAGS and self.code(self.greater[level][k - 1], size > k):
            k += 1
        if k > FLAGS:
            rest = self.remainder(size - k)
            if rest > most - k:
                raise FormatError("an arithmetic-coded stream is damaged")
            k += rest
        return k

    def walk(self, matrix: NDArray[np.int32], model: Model, low: int, high: int) -> bytes:
        rates, blend = RATES[model.rates], BLENDS[model.blend]
        memory, least = MEMORIES[model.memory], 65536 >> SETTLES[model.settle]
        self.fast, self.slow = 65536 >> rates.fast, 65536 >> rates.slow
        prior = PRIOR.tolist()
        significant = [[p, p, 0] for p, _ in prior]
        self.greater = [[[p, p, 0] for _ in range(FLAGS)] for _, p in prior]
        sign, self.prefix = ([[32768, 32768, 0] for _ in range(n)] for n in (9, DEPTH))
        column, above = [0] * matrix.shape[1], [0] * matrix.shape[1]
        row = older = 32768  # predictions see the row's mean without the left neighbour
        for i, line in enumerate(matrix):
            settle, left = max(65536 // (i + 2) if i < 65536 else 0, least), 0
            values = line.tolist()
            for j, given in enumerate(values):
                mean = column[j] if i else older
                level = int(LEVEL[min((blend * mean + (16 - blend) * older) >> 12, 4095)])
                size = abs(given)
                if self.code(significant[level], size > 0):
                    e = sign[3 * (2 if left > 0 else left < 0) + (2 if above[j] > 0 else above[j] < 0)]
                    negative = 0 if low == 0 else 1 if high == 0 else self.code(e, given < 0)
                    size = self.magnitude(size, level, -low if negative else high)
                    value = -size if negative else size
                else:
                    size = value = 0
                values[j] = left = value
                seen = min(size, PEAK) << 16
                column[j] = mean + ((seen - mean) * settle >> 16)
                older = row
                row += (seen - row) >> memory
            matrix[i] = above = values
        return self.finish()

    def finish(self) -> bytes:
        raise AssertionError("the encoder and the decoder say what an end is")


class _Encoder(_Walk):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.words = 0, 0  # all bytes written so far as one integer: a carry is an addition

    def bit(self, chance: int, bit: int) -> int:
        bound = (self.range >> 16) * chance
        if bit:
            self.range = bound
        else:
            self.low += bound
            self.range -= bound
        if self.range >> 32 == 0:
            self.number = (self.number << 32) + (self.low >> 32)
            self.words += 1
            self.low, self.range = (self.low & 0xFFFFFFFF) << 32, self.range << 32
        return bit

    def finish(self) -> bytes:
        total = (self.number << 64) + _shortest(self.low, self.range)
        return total.to_bytes(4 * self.words + 8, "big").rstrip(b"\0")


class _Decoder(_Walk):
    def __init__(self, data: bytes) -> None:
        super().__init__()
        if data[-1:] == b"\0":
            raise FormatError("an arithmetic-coded stream ends in zeros")
        self.data, self.at = data, 8
        self.coded = int.from_bytes(data[:8].ljust(8, b"\0"), "big")

    def bit(self, chance: int, bit: int) -> int:
        bound = (self.range >> 16) * chance
        bit = int(self.coded < bound)
        if bit:
            self.range = bound
        else:
            self.coded -= bound
            self.range -= bound
        if self.range >> 32 == 0:
            word = self.data[self.at : self.at + 4].ljust(4, b"\0")
            self.coded = self.coded << 32 | int.from_bytes(word, "big")
            self.at, self.range = self.at + 4, self.range << 32
        return bit

    def finish(self) -> bytes:
        window = int.from_bytes(self.data[max(self.at - 8, 0) : self.at].ljust(8, b"\0"), "big")
        low = (window - self.coded) % (1 << 64)
        if self.at < len(self.data) or _shortest(low, self.range) % (1 << 64) != window:
            raise FormatError("an arithmetic-coded stream does not end as it should")
        return b""

"""Adaptive coding of integer matrices: letters of magnitude by rANS, with contexts from what is already decoded.

A value is one of 16 letters (magnitudes 0..7, half octaves up to 127, "128 and more") with its sign; even bits tell the
magnitudes of a letter apart. A letter's share is the mean of two adaptive alphabets. Both belong to a prediction of the
magnitude, on a scale of 24 steps, blended from the running mean of the column over earlier rows and a decaying mean
along the row; one also knows the left neighbour's magnitude. Each starts from the shares of a Laplace distribution of
that mean, so small tensors pay little for learning. Signs look at the left and the upper neighbour. How the array is
laid out as a matrix, the blend and the rates are chosen for each array and cost two bytes.

DeepCABAC (Wiedemann et al. 2019) and ISO/IEC 15938-17 code binary decisions instead: as small, but a processor guesses
each of them and starts again when it guessed wrong, which makes decoding a few times slower.
"""

import bisect
import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import FormatError, Ints, Reader, flat32, put_number, unzigzag, zigzag

LEVELS, LEFTS, LETTERS, EXACT, TAIL, COUNTS, PEAK = 24, 4, 16, 8, 128, 512, 15
WHOLE, LEAST = 32768, 3  # shares are in 1/WHOLE; no letter's tends to less than LEAST
TRIAL = 1 << 16  # integers that are looked at to choose the model of a larger array
BANDED = 1 << 20  # matrices of so many integers are coded in two bands

FLOOR = (*range(8), 8, 12, 16, 24, 32, 48, 64, TAIL)  # the least magnitude of each letter

# Upper edges of the predicted magnitude in 1/256 for each context: 2^(k/2), so 1/256 .. 11.3.
_EDGES = [round(2 ** (k / 2)) for k in range(LEVELS - 1)]
LEVEL = np.searchsorted(np.array(_EDGES), np.arange(4096), side="right").astype(np.uint8)


def _laplace(mean: float) -> list[int]:
    """Shares in 1/WHOLE, less WHOLE, of the letters up to each for a rounded Laplace variable of this mean."""
    significant = (math.sqrt(1 + 4 * mean * mean) - 1) / (2 * mean)
    greater = min(max(significant**2, 0.1), 0.97)
    free = WHOLE - LEAST * LETTERS
    ends = [int(free * (1 - significant * greater ** (floor - 1))) for floor in FLOOR[1:]]
    return [end + LEAST * (k + 1) - WHOLE for k, end in enumerate(ends)] + [0]


PRIOR = np.array([_laplace(2 ** ((k - 0.5) / 2) / 256) for k in range(LEVELS)], np.int16)
TABLES = LEVEL.ctypes.data, PRIOR.ctypes.data


class _Model(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("low", "high", "slow", "blend", "memory", "settle")],
        *[(name, ctypes.c_void_p) for name in ("level", "prior")],
    ]


SLOWS = (7, 6, 8, 9)  # a share moves by 2^-slow of its way in the end
BLENDS = (8, 4, 12, 0, 16)
MEMORIES = (3, 2, 4, 5)
SETTLES = (4, 3, 6, 8)
CHOICES = (SLOWS, BLENDS, MEMORIES, SETTLES)


class _Job(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_char_p),
        ("length", ctypes.c_int64),
        ("model", _Model),
        ("out", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Model:
    """How one array is coded: which axes make the rows, and the indices of its rate, blend and memories."""

    layout: int = 0  # rows are 0: the first axis; 1: all axes but the last; 2: columns of layout 0
    slow: int = 0
    blend: int = 0
    memory: int = 0
    settle: int = 0

    def number(self) -> int:
        total, indices = 0, (self.layout, self.slow, self.blend, self.memory, self.settle)
        for index, size in reversed(list(zip(indices, (3, *map(len, CHOICES)), strict=True))):
            total = total * size + index
        return total

    @staticmethod
    def of_number(number: int) -> "Model":
        indices = []
        for size in (3, *map(len, CHOICES)):
            number, index = divmod(number, size)
            indices.append(index)
        return Model(*indices)

    def shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the matrix for an array of this shape.

        An array of one axis is one row, or rows of 1024 where that comes out even: means of columns are then few.
        """
        if len(shape) < 2:
            size = math.prod(shape)
            return (size // 1024, 1024) if size and size % 1024 == 0 else (1, size)
        split = len(shape) - 1 if self.layout == 1 else 1
        rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
        return (columns, rows) if self.layout == 2 else (rows, columns)

    def matrix(self, values: Ints) -> NDArray[np.int32]:
        """The array as the matrix that is walked row by row."""
        rows, columns = self.shape(values.shape)
        matrix = values.reshape(columns, rows).T if self.layout == 2 else values.reshape(rows, columns)
        return np.ascontiguousarray(matrix, np.int32)

    def array(self, matrix: Ints, shape: Sequence[int]) -> Ints:
        return (matrix.T if self.layout == 2 else matrix).reshape(shape)

    def native(self, size: tuple[int, int], low: int, high: int) -> _Model:
        indices = (self.slow, self.blend, self.memory, self.settle)
        chosen = [options[index] for options, index in zip(CHOICES, indices, strict=True)]
        return _Model(*size, low, high, *chosen, *TABLES)


def encode_matrix(matrix: NDArray[np.int32], model: Model, low: int, high: int, simd: int | None = None) -> bytes:
    """The stream of a matrix whose values lie in low..high, low <= 0 <= high; `simd` as for `native.simd`."""
    simd = native.simd() if simd is None else simd
    if native.library() is None:
        return _Encoder(matrix, model, low, high).stream()
    sizes = np.abs(matrix)
    steps = np.empty(matrix.size + int((sizes >= EXACT).sum()) + 2 * int((sizes >= TAIL).sum()), np.uint32)
    out = np.empty(2 * steps.size + 8, np.uint8)
    settings = model.native((matrix.shape[0], matrix.shape[1]), low, high)
    work = np.empty(2 * matrix.shape[1], np.int32)
    given = (matrix, ctypes.byref(settings), steps, steps.size, out, out.size, work, np.int32(simd))
    done = native.call("context_encode", *given)
    if done is None or done < 0:
        raise RuntimeError(f"context coder failed ({done})")
    return out[:done].tobytes()


class Coded(NamedTuple):
    """A stream with what is needed to decode it, and the matrix that it goes to."""

    data: bytes
    model: Model
    out: NDArray[np.int32]
    low: int
    high: int


def decode(streams: Sequence[Coded], simd: int | None = None) -> None:
    """Fill the streams' matrices, two at a time; raises `FormatError` unless each is exactly one stream."""
    if native.library() is None:
        for c in streams:
            _Decoder(c.data).fill(c.out, c.model, c.low, c.high)
        return
    simd = native.simd() if simd is None else simd
    jobs, work = (_Job * len(streams))(), np.empty(2 * sum(c.out.shape[1] for c in streams), np.int32)
    at = work.ctypes.data
    for job, c in zip(jobs, sorted(streams, key=lambda c: -c.out.size)):  # the longest first
        # Bands of a single row lie in one piece of memory too, so every matrix here does.
        job.data, job.length, job.out, job.work = c.data, len(c.data), c.out.ctypes.data, at
        job.model = c.model.native((c.out.shape[0], c.out.shape[1]), c.low, c.high)
        at += 8 * c.out.shape[1]
    if native.call("context_decode", jobs, len(streams), np.int32(simd)) != len(streams):
        raise FormatError("a context-coded stream is damaged")


def bands(matrix: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """The parts of a matrix that are streams of their own: two for a large one, which are decoded side by side."""
    if matrix.size < BANDED:
        return [matrix]
    half = matrix.shape[0] // 2 or matrix.shape[1] // 2
    return [matrix[:half], matrix[half:]] if matrix.shape[0] > 1 else [matrix[:, :half], matrix[:, half:]]


def choose(values: Ints, low: int, high: int) -> Model:
    """The model that makes this array smallest, found one setting at a time on at most 2^16 of its integers."""
    sample = values
    if values.size > TRIAL:
        lines = max(1, TRIAL * values.shape[0] // values.size)
        sample = values[:lines]
    layouts = (0, 1, 2) if values.ndim > 2 else (0, 2) if values.ndim == 2 else (0,)
    sized: dict[Model, int] = {}

    def size(model: Model) -> int:
        if model not in sized:
            sized[model] = len(encode_matrix(model.matrix(sample), model, low, high))
        return sized[model]

    best = min((Model(layout) for layout in layouts), key=size)
    for name, options in (("blend", BLENDS), ("memory", MEMORIES), ("settle", SETTLES), ("slow", SLOWS)):
        best = min((replace(best, **{name: i}) for i in range(len(options))), key=size)
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
        head = put_number(zigzag(origin)) + put_number(-low) + put_number(high) + put_number(model.number())
        streams = [encode_matrix(band, model, low, high) for band in bands(model.matrix(levels))]
        return head + b"".join(put_number(len(stream)) for stream in streams[:-1]) + b"".join(streams)

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        return self.decode_all([(data, shape, dtype)])[0]

    def decode_all(self, coded: Sequence[tuple[bytes, Sequence[int], np.dtype[Any]]]) -> list[Ints]:
        """Several arrays at once, each as (bytes, shape, type): faster than one after the other."""
        streams, matrices = list[Coded](), []
        for data, shape, dtype in coded:
            reader = Reader(data)
            origin = unzigzag(reader.number(1 << 32))
            low, high = -reader.number(1 << 24), reader.number(1 << 24)
            model = Model.of_number(reader.number(3 * math.prod(map(len, CHOICES)) - 1))
            if math.prod(shape) == 0:
                raise FormatError("an empty array is not context-coded")
            info = np.iinfo(np.uint8 if dtype == np.bool_ else dtype)
            most = 1 if dtype == np.bool_ else info.max
            if low + origin < info.min or high + origin > most or origin >= 1 << 30:
                raise FormatError(f"a stream holds values that {dtype} cannot")
            out = np.empty(model.shape(shape), np.int32)
            parts = bands(out)
            lengths = [reader.number(reader.left) for _ in parts[:-1]]
            held = [reader.take(length) for length in lengths] + [reader.rest()]
            streams += [Coded(stream, model, part, low, high) for stream, part in zip(held, parts, strict=True)]
            matrices.append((out, origin, model))
        decode(streams)
        found = []
        for (out, origin, model), (_, shape, dtype) in zip(matrices, coded, strict=True):
            whole = np.uint8 if dtype == np.bool_ else dtype
            values = out.astype(whole)
            if origin:  # modulo the width of the type, which every value fits
                values += np.array(origin).astype(whole)
            found.append(model.array(values, shape).astype(dtype, copy=False))
        return found


def letter_of(size: int) -> int:
    """The letter of a magnitude."""
    return bisect.bisect_right(FLOOR, size) - 1


class _Walk:
    """The NumPy twin of native/context.c: the same steps in the same order, in Python integers."""

    state = 0

    def narrow(self, start: int, share: int) -> None:
        raise AssertionError("the encoder and the decoder say what a step is")

    def pick(self, value: int, share: int) -> int:
        raise AssertionError("the encoder and the decoder say what a step is")

    def bits(self, value: int, bits: int) -> int:
        if bits == 0:
            return 0
        share = 1 << (16 - bits)
        value = self.pick(value, share)
        self.narrow(value * share, share)
        return value

    def tail(self, value: int) -> int:
        bits = self.bits((value + 1).bit_length() - 1, 5)
        if bits > 29:
            return 1 << 30
        high = max(bits - 15, 0)
        top = self.bits((value + 1) >> 15 & ((1 << high) - 1), high)
        low = self.bits((value + 1) & ((1 << (bits - high)) - 1), bits - high)
        return (1 << bits | top << 15 | low) - 1

    def letter(self, ends: NDArray[np.int32], size: int) -> int:
        raise AssertionError("the encoder and the decoder say what a step is")

    def minus(self, start: int, split: int, negative: int) -> int:
        raise AssertionError("the encoder and the decoder say what a step is")

    def learn(self, alphabet: list[Any], letter: int) -> None:
        ends, count = alphabet
        rate = max(32768 // (count + 16), self.least)
        alphabet[:] = ends + ((self.targets[letter] - ends) * rate + 16384 >> 15), min(count + 1, COUNTS - 1)

    def value(self, alphabets: tuple[list[Any], list[Any]], signs: list[int], sign: int, given: int) -> tuple[int, int]:
        ends = alphabets[0][0] + alphabets[1][0] + 1 >> 1
        letter = self.letter(ends, abs(given))
        before = int(ends[letter - 1]) if letter else -WHOLE
        start, share, negative = 2 * (before + WHOLE), 2 * (int(ends[letter]) - before), 0
        if letter and FLOOR[letter] <= min(self.high, -self.low):
            split = ((share - 2) * signs[sign] >> 16) + 1
            negative = self.minus(start, split, int(given < 0))
            start, share = (start, split) if negative else (start + split, share - split)
            signs[sign] += ((65535 if negative else 0) - signs[sign]) >> 6
        self.narrow(start, share)
        for alphabet in alphabets:
            self.learn(alphabet, letter)
        rest = abs(given) - FLOOR[letter] if letter >= EXACT else 0
        if letter == LETTERS - 1:
            rest = self.tail(rest)
        elif letter >= EXACT:
            end = self.most + 1 if letter == letter_of(self.most) else FLOOR[letter + 1]
            rest = self.bits(rest, (end - FLOOR[letter] - 1).bit_length())
        return FLOOR[letter] + rest, negative or int(FLOOR[letter] > self.high)

    def walk(self, matrix: NDArray[np.int32], model: Model, low: int, high: int) -> None:
        blend, memory = BLENDS[model.blend], MEMORIES[model.memory]
        self.low, self.high, self.most = low, high, max(high, -low)
        self.least, least = 32768 >> SLOWS[model.slow], 65536 >> SETTLES[model.settle]
        last = max(letter_of(self.most), 1)  # no share may be the whole, which takes 17 bits
        first = np.where(last <= _PLACES, 0, PRIOR.astype(np.int32))
        tails, heads = LEAST * np.minimum(_PLACES - last, 0), LEAST * (_PLACES + 1) - WHOLE
        self.targets = [np.where(min(k, last) > _PLACES, heads, tails) for k in range(LETTERS)]
        far = [[row, 0] for row in first]
        near = [[[row, 0] for _ in range(LEFTS)] for row in first]
        signs = [32768] * 9
        column, above = [32768] * matrix.shape[1], [0] * matrix.shape[1]
        row = older = 32768  # predictions see the row's mean without the left neighbour
        for i, line in enumerate(matrix):
            settle, left = max(65536 // (i + 2) if i < 65536 else 0, least), 0
            values = line.tolist()
            for j, given in enumerate(values):
                mean = column[j]
                level = int(LEVEL[older + ((mean - older) * blend >> 4) >> 8])
                sign = 3 * ((left > 0) + 2 * (left < 0)) + (above[j] > 0) + 2 * (above[j] < 0)
                alphabets = (far[level], near[level][min(abs(left), LEFTS - 1)])
                size, negative = self.value(alphabets, signs, sign, given)
                if size > (-low if negative else high):
                    raise FormatError("a context-coded stream is damaged")
                values[j] = left = -size if negative else size
                seen = min(size, PEAK) << 16
                column[j] = mean + ((seen - mean) * settle >> 16)
                older = row
                row += (seen - row) >> memory
            matrix[i] = above = values


_PLACES = np.arange(LETTERS, dtype=np.int32)


class _Encoder(_Walk):
    def __init__(self, matrix: NDArray[np.int32], model: Model, low: int, high: int) -> None:
        self.steps: list[tuple[int, int]] = []
        self.walk(matrix.copy(), model, low, high)

    def narrow(self, start: int, share: int) -> None:
        self.steps.append((start, share))

    def pick(self, value: int, share: int) -> int:
        return value

    def letter(self, ends: NDArray[np.int32], size: int) -> int:
        return letter_of(size)

    def minus(self, start: int, split: int, negative: int) -> int:
        return negative

    def stream(self) -> bytes:
        """The state as it is, then the words in the order of decoding."""
        state, words = 0, list[bytes]()
        for start, share in reversed(self.steps):
            if state >> 48 >= share:
                words.append((state & 0xFFFFFFFF).to_bytes(4, "little"))
                state >>= 32
            slot = state % share + start  # its lowest bit goes on top, which saves the decoder a step
            state = state // share << 16 | slot >> 1 | (slot & 1) << 15
        return state.to_bytes((state.bit_length() + 7) // 8, "little") + b"".join(reversed(words))


class _Decoder(_Walk):
    def __init__(self, data: bytes) -> None:
        self.at = len(data) if len(data) <= 8 else 5 + (len(data) - 5) % 4
        if self.at and data[self.at - 1] == 0:
            raise FormatError("a context-coded stream is damaged")
        self.data, self.state = data, int.from_bytes(data[: self.at], "little")

    @property
    def slot(self) -> int:
        return (self.state & (WHOLE - 1)) << 1 | self.state >> 15 & 1

    def narrow(self, start: int, share: int) -> None:
        x = share * (self.state >> 16) + self.slot - start
        if x < 1 << 32 and self.at < len(self.data):
            x = x << 32 | int.from_bytes(self.data[self.at : self.at + 4], "little")
            self.at += 4
        self.state = x

    def pick(self, value: int, share: int) -> int:
        return self.slot // share

    def letter(self, ends: NDArray[np.int32], size: int) -> int:
        return int((ends <= (self.slot >> 1) - WHOLE).sum())

    def minus(self, start: int, split: int, negative: int) -> int:
        return int(self.slot - start < split)

    def fill(self, out: NDArray[np.int32], model: Model, low: int, high: int) -> None:
        self.walk(out, model, low, high)
        if self.state or self.at < len(self.data):
            raise FormatError("a context-coded stream is damaged")

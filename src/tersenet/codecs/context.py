"""Adaptive coding of integer arrays: letters of magnitude by rANS, with contexts from what is already decoded.

A magnitude is one of 16 letters (0..7, half octaves up to 127, "128 and more"); even bits tell the magnitudes of a
letter apart. The letters' alphabet belongs to a prediction of the magnitude, on a scale of 25 steps, and to the left
neighbour's magnitude. The prediction blends the mean of the column over earlier rows with a decaying mean along the
row, or one for each place of the kernels along the row; these begin where those of earlier rows have come to. An
alphabet is counted, leaning on the counts of its prediction alone and those on a Laplace distribution of that mean, so
small tensors pay little for learning. Signs follow; where it pays, two bytes tell how often a sign is that of its
neighbours in the kernel. The blend, the memories and what has contexts are chosen for each array and cost two bytes.
Where the rows are paths through the trellis (`trellis.py`), the levels' numbers are coded, with alphabets of their own
for states that hold odd levels. Where many columns hold nothing but zeros, they are named first and left out.

DeepCABAC (Wiedemann et al. 2019) and ISO/IEC 15938-17 code binary decisions instead: as small, but a processor
guesses each of them and starts again when it guessed wrong, which makes decoding several times slower.
"""

import bisect
import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import FormatError, Ints, Reader, Unsuited, flat32, put_number, spread, unzigzag, zigzag
from tersenet.codecs.trellis import NEXT, follows

LEVELS, LEFTS, LETTERS, EXACT, TAIL = 25, 4, 16, 8, 128
BITS, LEAST = 15, 4  # shares are in 1/2^15; no letter's tends to less than LEAST
WHOLE = 1 << BITS
LANES, SMALL, PLACES = 4, 1024, 64  # rows that are coded at once, from so many values on
FRESH, KNOWN = 32, 64  # what an alphabet's counts are added to: so much of its parent, of the prior
CHUNK, MANY = 256, 16  # kernels whose signs are coded side by side, where there are so many
MOST = (1 << 29) - 1  # integers of an array
NEIGHBOURS = ((1, 0), (0, 1), (1, 1), (1, -1))  # signs to the left and above whose shares are sent
TRIAL, MOST_TRIAL = 1 << 16, 1 << 16  # a model is chosen by an eighth: at least so many bits, at most so many integers
WORTH_SIGNS = 1 / 1024  # what contexts of signs must save: they take a fourteenth of the time
SIGN_BITS = [0, *(round(-1024 * math.log2(k / 16)) for k in range(1, 16))]  # in 1/1024, of a share of k/16
UNIT, ZERO = 1024, 7  # of means: half a letter, and what a zero counts as, so that their floats stay normal
FIRST = 2 * (127 + 2) + 1  # exponent and first bit of the fraction of means in the lowest context
WORTH_LEAVING = 4096  # zeros in columns that hold nothing else, from which on these are left out

FLOOR: tuple[int, ...] = (*range(8), 8, 12, 16, 24, 32, 48, 64, TAIL)  # the least magnitude of each letter


def _laplace(mean: float, odd: bool) -> list[int]:
    """Shares in 1/WHOLE of the letters up to each for a rounded Laplace variable of this mean.

    In states of a trellis that hold odd levels, the first lie at half a number, and zero takes half as much.
    """
    significant = (math.sqrt(1 + 4 * mean * mean) - 1) / (2 * mean)
    greater = min(max(significant**2, 0.1), 0.97)
    free = WHOLE - LEAST * LETTERS
    first = math.sqrt(significant) if odd else significant
    second = significant * math.sqrt(greater) if odd else significant * greater
    ends = [int(free * (1 - (first if floor == 1 else second * greater ** (floor - 2)))) for floor in FLOOR[1:]]
    return [end + LEAST * (k + 1) for k, end in enumerate(ends)] + [WHOLE]


def _priors() -> NDArray[np.float32]:
    """[2 * LEVELS, LETTERS] at an address that is a multiple of 16: of each prediction, for even levels and for odd."""
    room = np.zeros(2 * LEVELS * LETTERS + 4, np.float32)
    first = -(room.ctypes.data // 4) % 4
    prior = room[first : first + 2 * LEVELS * LETTERS].reshape(2 * LEVELS, LETTERS)
    prior[:] = [_laplace(2 ** ((k - 0.5) / 2) / 256, odd) for odd in (False, True) for k in range(LEVELS)]
    return prior


PRIOR = _priors()


CHOICES = {  # of each setting, the usual one first
    "places": (0, 1),
    "slow": (7, 6, 9, 11),
    "blend": (8, 4, 12, 0, 16),
    "memory": (3, 2, 4, 5),
    "settle": (4, 3, 6, 8),
    "signs": (0, 1),
    "trellis": (0, 1),
    "skip": (0, 1),
}
MODELS = math.prod(map(len, CHOICES.values()))


class Matrix(NamedTuple):
    """How an array is walked: as a matrix of that size, by its last two axes and the places that have their own means.

    `column` are the columns that are coded, and `width` behind them.
    """

    rows: int
    width: int
    column: NDArray[np.int32]
    kernel: tuple[int, int]
    places: int

    @property
    def columns(self) -> int:
        """How many are coded."""
        return len(self.column) - 1

    @property
    def lanes(self) -> int:
        """How many rows are coded at once."""
        few = self.rows < LANES or self.columns < LANES or self.rows * self.columns < SMALL
        return 1 if few else LANES


class Model(NamedTuple):
    """How one array is coded, as indices into `CHOICES`.

    `places` is 1 where each place of a kernel has its own mean along the row. Counts are halved at 2^(slow + 1).
    `blend` is the weight of the column's mean in 1/16. Means of a row and of a column move by 2^-memory and 2^-settle
    of their way.
    `signs` is 1 where signs have contexts (`sign_shares`), `trellis` where rows are paths through the trellis, `skip`
    where columns that hold nothing but zeros are left out.
    """

    places: int = 0
    slow: int = 0
    blend: int = 0
    memory: int = 0
    settle: int = 0
    signs: int = 0
    trellis: int = 0
    skip: int = 0

    def number(self) -> int:
        total = 0
        for index, options in zip(reversed(self), reversed(CHOICES.values()), strict=True):
            total = total * len(options) + index
        return total

    @staticmethod
    def of_number(number: int) -> "Model":
        indices = []
        for options in CHOICES.values():
            number, index = divmod(number, len(options))
            indices.append(index)
        return Model(*indices)

    def chosen(self) -> "Model":
        """The settings themselves in place of their indices."""
        return Model(*(options[index] for index, options in zip(self, CHOICES.values(), strict=True)))

    def matrix(self, shape: Sequence[int], live: Ints | None = None) -> Matrix:
        """The matrix for an array of this shape; `live` are the columns that are coded, if not all are."""
        rows, width, kernel, places = walked(shape)
        column = np.arange(width + 1, dtype=np.int32) if live is None else np.append(live, width).astype(np.int32)
        return Matrix(rows, width, column, kernel, places if self.places else 1)

    def for_c(self, matrix: Matrix, low: int, high: int, signs: int) -> native.Model:
        """The same for the C core."""
        c = self.chosen()
        settings = (low, high, c.slow, c.blend, c.memory, c.settle, signs, c.trellis)
        sizes = (matrix.rows, matrix.columns, matrix.width, matrix.column.ctypes.data, *matrix.kernel, matrix.places)
        return native.Model(*sizes, *settings, PRIOR.ctypes.data)


def walked(shape: Sequence[int]) -> tuple[int, int, tuple[int, int], int]:
    """Rows and columns of the matrix for an array of this shape, its last two axes, the places of a kernel up to 64.

    Axes of one place do not count; the rows are the first axis. An array of one axis is one row, or rows of 1024 where
    that comes out even: means of columns are then few.
    """
    axes = [size for size in shape if size != 1]
    if len(axes) < 2:
        size = math.prod(axes)
        axes = [size // 1024, 1024] if size and size % 1024 == 0 else [1, size]
    places = math.prod(axes[2:])
    return axes[0], math.prod(axes[1:]), (axes[-2], axes[-1]), places if places <= PLACES else 1


def _cells(width: int, kernel: tuple[int, int]) -> int:
    """Places for the kernels of the rows coded together, or of a part of them, and a row and a column more each."""
    high, wide = kernel
    if wide == width:
        return (LANES + 1) * (wide + 1)
    kernels = LANES * width // max(high * wide, 1)
    return (high + 1) * (wide + 1) * (min(kernels, CHUNK) if kernels >= MANY else 1)


@functools.lru_cache(256)
def _walk_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[tuple[int, ...], int]:
    """What the C core wants to know of an array, from its bytes on, and how much memory it needs for decoding it."""
    rows, width, kernel, places = walked(shape)
    room = 4 * (min(max(rows, 2), LANES) * width + 2 * (width + 1)) + _cells(width, kernel)
    return (dtype.itemsize, rows, width, *kernel, places, *_range(dtype)), room


def _range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The least and the highest that a type holds, as far as the coder goes."""
    if dtype == np.bool_:
        return 0, 1
    info = np.iinfo(dtype)
    return max(info.min, -(1 << 62)), min(info.max, 1 << 62)


NAMES = Model(blend=CHOICES["blend"].index(0))  # how the names of columns are coded: as one row


def sign_counts(values: NDArray[np.int32], kernel: tuple[int, int]) -> list[tuple[int, int]]:
    """How often a value is negative and positive after (+, 0), (0, +), (+, +), (+, -) left and above.

    After the opposite neighbours it counts the other way round.
    """
    sign = np.sign(values.reshape(-1, *kernel)).astype(np.int8)
    left, above = np.zeros_like(sign), np.zeros_like(sign)
    left[:, :, 1:], above[:, 1:] = sign[:, :, :-1], sign[:, :-1]
    found = np.bincount((sign * 9 + left * 3 + above + 13).reshape(-1), minlength=27).reshape(
        3, 3, 3
    )  # each from -1 on
    return [
        (
            int(found[0, 1 + one, 1 + other] + found[2, 1 - one, 1 - other]),
            int(found[2, 1 + one, 1 + other] + found[0, 1 - one, 1 - other]),
        )
        for one, other in NEIGHBOURS
    ]


def _sign_share(minus: int, plus: int) -> int:
    """The part of the negative ones in 1/16."""
    return min(max((32 * minus // (minus + plus) + 1) // 2 if minus + plus else 8, 1), 15)


def sign_shares(values: NDArray[np.int32], kernel: tuple[int, int]) -> int:
    """The parts of negative values after those neighbours, in 1/16: four bits each, after (+, 0) the lowest."""
    return sum(_sign_share(*counts) << 4 * k for k, counts in enumerate(sign_counts(values, kernel)))


def _used(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """1 for each column that holds anything, and for the first if none does."""
    used: NDArray[np.int32] = np.any(values.reshape(walked(values.shape)[:2]), 0).astype(np.int32)
    used[0] |= not used.any()
    return used


def encode_array(values: NDArray[np.int32], model: Model, low: int, high: int) -> bytes:
    """The stream of an array whose values lie in low..high, low <= 0 <= high."""
    if low < 0 and high == 0:
        values, low, high = np.asarray(-values), 0, -low
    head, live, signs = b"", None, 0
    if model.skip:
        used = _used(values)
        live, names = np.flatnonzero(used), encode_array(used, NAMES, 0, 1)
        head = put_number(len(names)) + names
    matrix = model.matrix(values.shape, live)
    if low and model.signs:
        signs = sign_shares(values, matrix.kernel)
        head += signs.to_bytes(2, "little")
    if native.library() is None:
        return head + _Encoder(values, matrix, model, low, high, signs).stream()
    sizes = np.abs(values)
    steps = values.size + int((sizes > 0).sum()) + int((sizes >= EXACT).sum()) + 2 * int((sizes >= TAIL).sum())
    listed, out = np.empty(steps, np.uint64), np.empty(2 * steps + 8 * (LANES + 1), np.uint8)
    mean = np.empty(matrix.columns + 1, np.float32)
    around = np.empty(_cells(matrix.width, matrix.kernel), np.uint8) if signs else None
    given = (listed, listed.size, out, out.size, mean, around)
    done = native.call("context_encode", values, ctypes.byref(model.for_c(matrix, low, high, signs)), *given)
    if done is None or done < 0:
        raise RuntimeError(f"context coder failed ({done})")
    return head + out[:done].tobytes()


def decode_array(data: bytes, model: Model, shape: Sequence[int], low: int, high: int) -> NDArray[np.int32]:
    """The array of this shape by the twin; raises `FormatError` unless `data` is exactly its stream."""
    if low < 0 and high == 0:
        return np.asarray(-decode_array(data, model, shape, 0, -low))
    live, signs = None, 0
    if model.skip:
        reader = Reader(data)
        live = decode_array(reader.take(reader.number()), NAMES, walked(shape)[1:2], 0, 1).nonzero()[0]
        if not live.size:
            raise FormatError("a context-coded stream leaves out all columns")
        data = reader.rest()
    matrix = model.matrix(shape, live)
    if low and model.signs:
        signs, data = int.from_bytes(data[:2], "little"), data[2:]
        if not all(signs >> at & 15 for at in (0, 4, 8, 12)):
            raise FormatError("a context-coded stream has signs that never occur")
    return _Decoder(data, matrix).array(model, low, high, signs).reshape(shape)


def choose(values: NDArray[np.int32], low: int, high: int) -> Model:
    """The model that makes this array smallest, found one setting at a time on a part of it.

    What is compared are the bits of the magnitudes; signs take theirs by themselves, whatever the other settings are.
    """
    flat = values.reshape(walked(values.shape)[:2])
    zeros = len(flat) * int((~flat.any(0)).sum())
    skip = zeros >= max(WORTH_LEAVING, flat.size // 32) and zeros < flat.size
    best = Model(trellis=int(follows(flat)), skip=int(skip))
    bits = (2 * int(np.abs(flat).sum(dtype=np.int64)) // flat.size + 1).bit_length() + 1  # about, of a value
    part = spread(values, min(max(TRIAL // bits, values.size // 8), MOST_TRIAL))
    sized = _Sizes(part, best, max(high, -low))
    for name in ("places", "blend", "memory", "settle", "slow"):
        best = min((best._replace(**{name: i}) for i in range(len(CHOICES[name]))), key=sized.bits)
    if low < 0 < high:
        counts = sign_counts(part, walked(part.shape)[2])
        shares = [(minus, plus, _sign_share(minus, plus)) for minus, plus in counts]
        saved = sum(UNIT * (n + p) - n * SIGN_BITS[s] - p * SIGN_BITS[16 - s] for n, p, s in shares) / UNIT - 16
        best = best._replace(signs=int(saved > WORTH_SIGNS * (sized.bits(best) + np.count_nonzero(part))))
    return best


class _Sizes:
    """What models make of the magnitudes of one array."""

    def __init__(self, values: NDArray[np.int32], model: Model, most: int) -> None:
        self.sizes, self.most, self.found = np.asarray(np.abs(values)), most, dict[Model, int]()
        self.live = _used(self.sizes).nonzero()[0] if model.skip else None
        steps = values.size + int((self.sizes >= EXACT).sum()) + 2 * int((self.sizes >= TAIL).sum())
        self.listed = np.empty(steps, np.uint64)
        self.mean = np.empty(walked(values.shape)[1] + 1, np.float32)

    def bits(self, model: Model) -> int:
        """About how many."""
        matrix = model.matrix(self.sizes.shape, self.live)
        model = model._replace(places=int(matrix.places > 1))
        if model not in self.found:
            c = model.for_c(matrix, 0, self.most, 0)
            done = native.call("context_size", self.sizes, ctypes.byref(c), self.listed, self.listed.size, self.mean)
            if done is not None and done < 0:
                raise RuntimeError(f"context coder failed ({done})")
            self.found[model] = _Encoder(self.sizes, matrix, model, 0, self.most, 0).length() if done is None else done
        return self.found[model]


class Context:
    """Levels around the most common value, in the layout and with the memories that suit them best."""

    pace = 130

    def encode(self, values: Ints) -> bytes:
        flat, low, high = flat32(values, 1 << 24)
        if flat.size > MOST:
            raise Unsuited("more integers than the context coder counts")
        origin = low + int(np.bincount(flat - low).argmax()) if high - low < 1 << 16 else max(low, min(0, high))
        levels = (flat - np.int32(origin)).reshape(values.shape)
        return encode_levels(levels, choose(levels, low - origin, high - origin), origin)

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        batch = Batch([(data, tuple(shape), dtype)])
        batch.run()
        return batch.array(0)


class Batch:
    """Streams that are decoded together: any number of threads may `run`, and each takes the next that is left."""

    def __init__(self, coded: Sequence[tuple[bytes, tuple[int, ...], np.dtype[Any]]]) -> None:
        self.coded, self.native = coded, native.library() is not None
        if not self.native:
            return
        rows, begin, end, self.room = list[tuple[int, ...]](), 0, 0, 0
        for data, shape, dtype in coded:
            walk, room = _walk_of(shape, dtype)
            rows.append((begin, len(data), end, *walk, 0))
            begin += len(data)
            end += (math.prod(shape) * dtype.itemsize + 7) // 8 * 8
            self.room = max(self.room, room)
        self.data, self.rows = b"".join([data for data, *_ in coded]), np.array(rows, np.int64)
        self.next, self.out = np.zeros(1, np.int32), np.empty(end, np.uint8)

    def run(self) -> None:
        """Decode until all are taken. The C core frees Python meanwhile; its twin decodes when it is asked."""
        if self.native:
            room = np.empty(self.room, np.uint8)
            given = ctypes.c_char_p(self.data), self.rows, len(self.rows), self.next, PRIOR, self.out, room, self.room
            native.call("context_decode", *given)

    def array(self, at: int) -> Ints:
        """One of the arrays, which lie in one block of memory, once all are decoded; raises `FormatError`."""
        data, shape, dtype = self.coded[at]
        if math.prod(shape) == 0:
            raise FormatError("an empty array is not context-coded")
        if not self.native:
            return _decode_slowly(data, shape, dtype)
        done, begin = int(self.rows[at, -1]), int(self.rows[at, 2])
        if done != math.prod(shape):
            raise FormatError(WRONG_TYPE.format(dtype) if done == -4 else "a context-coded stream is damaged")
        return np.ndarray(shape, dtype, self.out, begin)


WRONG_TYPE = "a stream holds values that {} cannot"


def encode_levels(levels: NDArray[np.int32], model: Model, origin: int = 0) -> bytes:
    """The whole stream of an array of levels, to which `origin` is added when they are decoded."""
    low, high = min(int(levels.min()), 0), max(int(levels.max()), 0)
    head = put_number(zigzag(origin)) + put_number(-low) + put_number(high) + put_number(model.number())
    return head + encode_array(levels, model, low, high)


def _decode_slowly(data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
    """The twin of terse_context_decode."""
    reader = Reader(data)
    origin = unzigzag(reader.number(1 << 32))
    low, high = -reader.number(1 << 24), reader.number(1 << 24)
    model = Model.of_number(reader.number(MODELS))
    least, most = _range(dtype)
    if low + origin < least or high + origin > most or origin + high >= 1 << 30:
        raise FormatError(WRONG_TYPE.format(dtype))
    levels = decode_array(reader.rest(), model, shape, low, high)
    return (levels.astype(np.int64) + origin).astype(dtype)


def letter_of(size: int) -> int:
    """The letter of a magnitude."""
    return bisect.bisect_right(FLOOR, size) - 1


class _Counts:
    """How often letters up to each were seen, halved until that is less than `most`."""

    def __init__(self) -> None:
        self.below = np.zeros(LETTERS, np.int64)

    def add(self, fresh: NDArray[np.int64], most: int) -> None:
        self.below = self.below + fresh
        while self.below[-1] >= most:
            self.below >>= 1


class _Alphabet:
    """Where the share of each letter ends."""

    def __init__(self, prior: NDArray[np.float32], far: _Counts, last: int) -> None:
        self.prior, self.far, self.near = prior, far, _Counts()
        self.ends = prior.astype(int)[:last].tolist() + [WHOLE] * (LETTERS - last)
        self.fresh, self.room = [0] * LETTERS, 1

    def renew(self, most: int, last: int) -> None:
        for counts in (self.near, self.far):
            counts.add(np.cumsum(self.fresh), most)
        one, near, far = np.float32(1), self.near.below.astype(np.float32), self.far.below.astype(np.float32)
        count = int(self.near.below[-1])
        lean, free = np.float32(FRESH + count // 2), np.float32(WHOLE - LEAST * (last + 1))
        by_own = one / (lean + near[-1])
        parent = lean * by_own * (one / (np.float32(KNOWN) + far[-1]))
        least = np.float32(LEAST) * (far[-1] * parent + near[-1] * by_own)
        ends = np.float32(KNOWN) * parent * self.prior + free * parent * far + free * by_own * near
        ends += least * np.arange(1, LETTERS + 1, dtype=np.float32)
        self.ends = ends.astype(int)[:last].tolist() + [WHOLE] * (LETTERS - last)
        self.fresh, self.room = [0] * LETTERS, 3 + int(np.diff(self.near.below, prepend=0).max()) // 3


class _Walk:
    """The NumPy twin of native/context.c: the same steps in the same order, in Python integers."""

    def narrow(self, start: int, share: int, lane: int) -> None:
        raise AssertionError("the encoder and the decoder say what a step is")

    def pick(self, value: int, ends: Sequence[int], lane: int) -> int:
        """The index of the interval that is coded, of those that end at `ends`: the given one, or what was decoded."""
        raise AssertionError("the encoder and the decoder say what a step is")

    def code(self, value: int, ends: Sequence[int], lane: int) -> int:
        value = self.pick(value, ends, lane)
        start = ends[value - 1] if value else 0
        self.narrow(start, ends[value] - start, lane)
        return value

    def bits(self, value: int, bits: int, lane: int) -> int:
        return self.code(value, range(WHOLE >> bits, WHOLE + 1, WHOLE >> bits), lane) if bits else 0

    def rest(self, letter: int, size: int, lane: int) -> int:
        floor = FLOOR[letter]
        if letter < LETTERS - 1:
            end = self.most + 1 if letter == letter_of(self.most) else FLOOR[letter + 1]
            return floor + self.bits(size - floor, (end - floor - 1).bit_length(), lane)
        rest = size - floor + 1
        bits = self.bits(rest.bit_length() - 1, 5, lane)
        if bits > 29:
            return 1 << 30
        high = max(bits - 14, 0)
        top = self.bits(rest >> 14 & ((1 << high) - 1), high, lane)
        low = self.bits(rest & ((1 << (bits - high)) - 1), bits - high, lane)
        return TAIL + (1 << bits | top << 14 | low) - 1

    def walk(self, values: list[int], matrix: Matrix, model: Model, low: int, high: int, signs: int) -> None:
        chosen = model.chosen()
        self.most = max(high, -low)
        if model.trellis:
            self.most = (self.most + 1) // 2
        last, most = max(letter_of(self.most), 1), 2 << chosen.slow  # no share may be the whole
        levels = []
        for prior in PRIOR[: LEVELS * (1 + chosen.trellis)]:
            far = _Counts()
            levels.append([_Alphabet(prior, far, last) for _ in range(LEFTS)])
        mean, start = np.full(matrix.columns + 1, UNIT, np.float32), np.full(matrix.places, UNIT, np.float32)
        for first in range(0, matrix.rows, matrix.lanes):
            active = min(matrix.lanes, matrix.rows - first)
            row = np.repeat(start[:, None], active, 1)
            self.sizes(values, matrix, chosen, first, (levels, last, most), mean, row)
            for lane in range(active):
                start = (np.float32(3) * start + row[:, lane]) * np.float32(0.25)
            here = range(first * matrix.width, (first + active) * matrix.width)
            if signs:
                self.signs(values, matrix, here, signs)
            elif low < 0:
                self.plain_signs(values, here, matrix.lanes)
        if min(values) < low or max(values) > high:
            raise FormatError("a context-coded stream is damaged")

    def sizes(
        self,
        values: list[int],
        matrix: Matrix,
        chosen: Model,
        first: int,
        alphabets: tuple[list[list[_Alphabet]], int, int],
        mean: NDArray[np.float32],
        row: NDArray[np.float32],
    ) -> None:
        (levels, last, most), active = alphabets, row.shape[1]
        blend, memory = np.float32(chosen.blend / 16), np.float32(2.0**-chosen.memory)
        settle = np.maximum(np.float32(1) / np.float32(first + 1 + active), np.float32(2.0**-chosen.settle))
        state = self.leapt([0] * active, int(matrix.column[0]), chosen)
        beside, learned = [0] * active, (0, 0, np.zeros(active, np.float32))
        level = _predicted(row[matrix.column[0] % matrix.places], mean[0], blend)
        for t in range(matrix.columns):
            at, ahead = int(matrix.column[t]), int(matrix.column[t + 1])
            coded = []
            for lane in range(active):
                alphabet = levels[int(level[lane]) + LEVELS * (state[lane] & 1)][min(beside[lane], LEFTS - 1)]
                here = (first + lane) * matrix.width + at
                coded.append((here, abs(values[here]) + (state[lane] & 1) >> chosen.trellis, alphabet))
            if t:
                self.learn(mean, row, learned, settle, memory)
            level = _predicted(row[ahead % matrix.places], mean[t + 1], blend)
            goal = np.zeros(active, np.float32)
            for lane, (_, size, alphabet) in enumerate(coded):
                beside[lane] = self.code(letter_of(size), alphabet.ends, lane)
                goal[lane] = UNIT * (2 * beside[lane] - (state[lane] & int(beside[lane] > 0))) + ZERO
            for lane, (here, size, _) in enumerate(coded):
                size = self.rest(beside[lane], size, lane) if beside[lane] >= EXACT else beside[lane]
                if chosen.trellis:
                    size = min(size, 1 << 29)
                    odd = state[lane] & int(size > 0)
                    state[lane] = NEXT[state[lane]][size & 1]
                    size = 2 * size - odd
                self.keep(values, here, size)
            for lane, (_, _, alphabet) in enumerate(coded):
                alphabet.fresh[beside[lane]] += 1
                if alphabet.fresh[beside[lane]] == alphabet.room:
                    alphabet.renew(most, last)
            if ahead > at + 1:
                state, beside = self.leapt(state, ahead - at - 1, chosen), [0] * active
            learned = t, at % matrix.places, goal
        self.learn(mean, row, learned, settle, memory)

    def learn(
        self,
        mean: NDArray[np.float32],
        row: NDArray[np.float32],
        seen: tuple[int, int, NDArray[np.float32]],
        settle: np.float32,
        memory: np.float32,
    ) -> None:
        t, place, goal = seen
        mean[t] += (goal.sum(dtype=np.float32) - np.float32(len(goal)) * mean[t]) * settle
        row[place] += (goal - row[place]) * memory

    def leapt(self, state: list[int], gap: int, chosen: Model) -> list[int]:
        """The states of the trellis after that many zeros."""
        for _ in range(gap % 4 if chosen.trellis else 0):
            state = [NEXT[s][0] for s in state]
        return state

    def keep(self, values: list[int], at: int, size: int) -> None:
        """Write down a decoded magnitude; the encoder knows it."""

    def plain_signs(self, values: list[int], here: range, lanes: int) -> None:
        """Where either sign is as likely: up to BITS of them in one step."""
        turn = 0
        for chunk in (here[k : k + CHUNK] for k in range(0, len(here), CHUNK)):
            signed = [at for at in chunk if values[at]]
            for some in (signed[k : k + BITS] for k in range(0, len(signed), BITS)):
                minus = self.bits(sum((values[at] < 0) << j for j, at in enumerate(some)), len(some), turn)
                for j, at in enumerate(some):
                    self.keep(values, at, -abs(values[at]) if minus >> j & 1 else abs(values[at]))
                turn = (turn + 1) % lanes

    def signs(self, values: list[int], matrix: Matrix, here: range, shares: int) -> None:
        """Signs with contexts: the same place of up to 256 kernels, then the next; a matrix of one kernel by rows."""
        (high, wide), turn = matrix.kernel, 0
        known = {neighbours: shares >> 4 * k & 15 for k, neighbours in enumerate(NEIGHBOURS)}
        known |= {(-left, -above): 16 - share for (left, above), share in known.items()} | {(0, 0): 8}
        order = list(here)
        if wide < matrix.width and len(here) // (high * wide) >= MANY:
            kernels = np.array(here).reshape(-1, high * wide)
            order = [int(at) for k in range(0, len(kernels), CHUNK) for at in kernels[k : k + CHUNK].T.reshape(-1)]
        for at in order:
            if values[at] == 0:
                continue
            left = values[at - 1] if at % wide else 0
            above = values[at - wide] if at // wide % high else 0
            split = known[_sign(left), _sign(above)] * (WHOLE // 16)
            plus = self.code(int(values[at] > 0), (split, WHOLE), turn)
            self.keep(values, at, abs(values[at]) if plus else -abs(values[at]))
            turn = (turn + 1) % matrix.lanes


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _predicted(row: NDArray[np.float32], column: np.float32, blend: np.float32) -> NDArray[np.int32]:
    """The contexts of predicted magnitude for means of rows and of a column: half octaves."""
    found: NDArray[np.float32] = row * (np.float32(1) - blend) + column * blend
    return (found.view(np.int32) >> 22) - FIRST


class _Encoder(_Walk):
    def __init__(
        self, values: NDArray[np.int32], matrix: Matrix, model: Model, low: int, high: int, signs: int
    ) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self.lanes = matrix.lanes
        self.walk(values.reshape(-1).tolist(), matrix, model, low, high, signs)

    def narrow(self, start: int, share: int, lane: int) -> None:
        self.steps.append((start, share, lane))

    def pick(self, value: int, ends: Sequence[int], lane: int) -> int:
        return value

    def stream(self) -> bytes:
        """The states as they are, with their lengths where there are several, then the words in order of decoding.

        A lane that has not come to 32 bits when another sends its first word begins at 2^32, or the decoder would take
        that word for it.
        """
        first = [0] * self.lanes
        while (found := self._states(first)) is None:
            pass
        states, words = found
        held = [state.to_bytes((state.bit_length() + 7) // 8, "little") for state in states]
        lengths = sum(len(state) << 4 * lane for lane, state in enumerate(held)).to_bytes(2, "little")
        return (lengths if self.lanes > 1 else b"") + b"".join(held) + b"".join(reversed(words))

    def length(self) -> int:
        """About how many bits the stream takes, from the exponents of products of shares."""
        total, products = BITS * len(self.steps), [1.0] * 4
        for k in range(0, len(self.steps), 256):
            for j, (_, share, _) in enumerate(self.steps[k : k + 256]):
                products[j & 3] *= share
            split = [math.frexp(product) for product in products]
            products = [2 * fraction for fraction, _ in split]
            total -= sum(exponent - 1 for _, exponent in split)
        return total

    def _states(self, first: list[int]) -> tuple[list[int], list[bytes]] | None:
        states, words = list(first), list[bytes]()
        for start, share, lane in reversed(self.steps):
            state = states[lane]
            if state >> 64 - BITS >= share:
                if not words and (low := [k for k, other in enumerate(states) if other >> 32 == 0]):
                    for k in low:
                        first[k] = 1 << 32
                    return None
                words.append((state & 0xFFFFFFFF).to_bytes(4, "little"))
                state >>= 32
            states[lane] = (state // share << BITS) + state % share + start
        return states, words


class _Decoder(_Walk):
    def __init__(self, data: bytes, matrix: Matrix) -> None:
        self.data, self.matrix, self.at = data, matrix, 0
        lengths = [len(data) if len(data) <= 8 else 5 + (len(data) - 5) % 4]
        if matrix.lanes > 1:
            head, self.at = int.from_bytes(data[:2], "little"), 2
            lengths = [head >> 4 * lane & 15 for lane in range(matrix.lanes)]
        self.states = []
        for length in lengths:
            held = data[self.at : self.at + length]
            if length > 8 or len(held) < length or (held and held[-1] == 0):
                raise FormatError("a context-coded stream is damaged")
            self.states.append(int.from_bytes(held, "little"))
            self.at += length
        if (len(data) - self.at) % 4:
            raise FormatError("a context-coded stream is damaged")

    def narrow(self, start: int, share: int, lane: int) -> None:
        state = self.states[lane]
        x = share * (state >> BITS) + (state & (WHOLE - 1)) - start
        if x < 1 << 32 and self.at < len(self.data):
            x = x << 32 | int.from_bytes(self.data[self.at : self.at + 4], "little")
            self.at += 4
        self.states[lane] = x

    def pick(self, value: int, ends: Sequence[int], lane: int) -> int:
        return bisect.bisect_right(ends, self.states[lane] & (WHOLE - 1))

    def keep(self, values: list[int], at: int, size: int) -> None:
        values[at] = size

    def array(self, model: Model, low: int, high: int, signs: int) -> NDArray[np.int32]:
        values = [0] * (self.matrix.rows * self.matrix.width)
        self.walk(values, self.matrix, model, low, high, signs)
        begun = (0,) if len(self.states) == 1 else (0, 1 << 32)
        if self.at < len(self.data) or any(state not in begun for state in self.states):
            raise FormatError("a context-coded stream is damaged")
        return np.array(values, np.int32)

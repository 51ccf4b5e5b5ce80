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

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs import context_twin
from tersenet.codecs.context_model import (
    CHOICES,
    CHUNK,
    DAMAGED,
    EXACT,
    LANES,
    MANY,
    NAMES,
    NEIGHBOURS,
    PRIOR,
    TAIL,
    WRONG_TYPE,
    Matrix,
    Model,
    one_row,
    value_range,
    walked,
)
from tersenet.codecs.context_twin import Encoder
from tersenet.codecs.stream import FormatError, Ints, Unsuited, flat32, put_number, spread, zigzag
from tersenet.codecs.trellis import follows

MOST = (1 << 29) - 1  # integers of an array
TRIAL, MOST_TRIAL = 1 << 16, 1 << 16  # a model is chosen by an eighth: at least so many bits, at most so many integers
WORTH_SIGNS = 1 / 1024  # what contexts of signs must save: they take a fourteenth of the time
SIGN_BITS = [0, *(round(-1024 * math.log2(k / 16)) for k in range(1, 16))]  # in 1/1024, of a share of k/16
WORTH_LEAVING = 4096  # zeros in columns that hold nothing else, from which on these are left out


def _cells(width: int, kernel: tuple[int, int]) -> int:
    """Places for the kernels of the rows coded together, or of a part of them, and a row and a column more each."""
    high, wide = kernel
    if wide == width:
        return (LANES + 1) * (wide + 1)
    kernels = LANES * width // max(high * wide, 1)
    return (high + 1) * (wide + 1) * (min(kernels, CHUNK) if kernels >= MANY else 1)


@functools.lru_cache(256)
def walk_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[tuple[int, ...], int]:
    """What the C core wants to know of an array, from its bytes on, and how much memory it needs for decoding it."""
    rows, width, kernel, places = walked(shape)
    room = 4 * (min(max(rows, 2), LANES) * width + 2 * (width + 1)) + _cells(width, kernel)
    return (dtype.itemsize, rows, width, *kernel, places, *value_range(dtype)), room


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
        live, names = np.flatnonzero(used), _encoded(used, one_row(used.size), NAMES, 0, 1, 0)
        head = put_number(len(names)) + names
    matrix = model.matrix(values.shape, live)
    if low and model.signs:
        signs = sign_shares(values, matrix.kernel)
        head += signs.to_bytes(2, "little")
    return head + _encoded(values, matrix, model, low, high, signs)


def _encoded(values: NDArray[np.int32], matrix: Matrix, model: Model, low: int, high: int, signs: int) -> bytes:
    """What the rANS coder makes of a matrix."""
    if native.library() is None:
        return Encoder(values, matrix, model, low, high, signs).stream()
    sizes = np.abs(values)
    steps = values.size + int((sizes > 0).sum()) + int((sizes >= EXACT).sum()) + 2 * int((sizes >= TAIL).sum())
    listed, out = np.empty(steps, np.uint64), np.empty(2 * steps + 8 * (LANES + 1), np.uint8)
    mean = np.empty(matrix.columns + 1, np.float32)
    around = np.empty(_cells(matrix.width, matrix.kernel), np.uint8) if signs else None
    given = (listed, listed.size, out, out.size, mean, around)
    done = native.call("context_encode", values, ctypes.byref(model.for_c(matrix, low, high, signs)), *given)
    if done is None or done < 0:
        raise RuntimeError(f"context coder failed ({done})")
    return out[:done].tobytes()


def encode_levels(levels: NDArray[np.int32], model: Model, origin: int = 0) -> bytes:
    """The whole stream of an array of levels, to which `origin` is added when they are decoded."""
    low, high = min(int(levels.min()), 0), max(int(levels.max()), 0)
    head = put_number(zigzag(origin)) + put_number(-low) + put_number(high) + put_number(model.number())
    return head + encode_array(levels, model, low, high)


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
        saved = sum(1024 * (n + p) - n * SIGN_BITS[s] - p * SIGN_BITS[16 - s] for n, p, s in shares) / 1024 - 16
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
            self.found[model] = Encoder(self.sizes, matrix, model, 0, self.most, 0).length() if done is None else done
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
            walk, room = walk_of(shape, dtype)
            rows.append((begin, len(data), end, *walk, 0))
            begin += len(data)
            end += (math.prod(shape) * dtype.itemsize + 7) // 8 * 8
            self.room = max(self.room, room if math.prod(shape) else 0)  # an empty array is refused, however wide
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
            return context_twin.decoded(data, shape, dtype)
        done, begin = int(self.rows[at, -1]), int(self.rows[at, 2])
        if done != math.prod(shape):
            raise FormatError(WRONG_TYPE.format(dtype) if done == -4 else DAMAGED)
        return np.ndarray(shape, dtype, self.out, begin)

"""Adaptive coding of integer arrays: letters of magnitude by rANS, with contexts from what is already decoded.

A magnitude is one of 16 letters (0..7, half octaves up to 127, "128 and more"); even bits tell the magnitudes of a
letter apart. The letters' alphabet belongs to a prediction of the magnitude, on a scale of 24 steps, and to the left
neighbour's magnitude. The prediction blends the mean of the column over earlier rows with a decaying mean along the
row, or one for each place of the kernels along the row; these begin where those of earlier rows have come to. An
alphabet is counted, leaning on the counts of its prediction alone and those on a Laplace distribution of that mean, so
small tensors pay little for learning. Signs follow; where it pays, two bytes tell how often a sign is that of its
neighbours in the kernel. The blend, the memories and what has contexts are chosen for each array and cost two bytes.
Where the rows are paths through the trellis (`trellis.py`), the levels' numbers are coded, with alphabets of their own
for states that hold odd levels.

DeepCABAC (Wiedemann et al. 2019) and ISO/IEC 15938-17 code binary decisions instead: as small, but a processor
guesses each of them and starts again when it guessed wrong, which makes decoding several times slower.
"""

import bisect
import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import FormatError, Ints, Reader, Unsuited, flat32, put_number, unzigzag, zigzag
from tersenet.codecs.trellis import NEXT, follows

LEVELS, LEFTS, LETTERS, EXACT, TAIL = 24, 4, 16, 8, 128
BITS, LEAST = 15, 4  # shares are in 1/2^15; no letter's tends to less than LEAST
WHOLE = 1 << BITS
LANES, SMALL, PLACES = 4, 1024, 64  # rows that are coded at once, from so many values on
FRESH, KNOWN = 32, 64  # what an alphabet's counts are added to: so much of its parent, of the prior
CHUNK, MANY = 256, 16  # kernels whose signs are coded side by side, where there are so many
MOST = (1 << 29) - 1  # integers of an array
NEIGHBOURS = ((1, 0), (0, 1), (1, 1), (1, -1))  # signs to the left and above whose shares are sent
EVEN = 0x8888  # shares of signs that are as likely
TRIAL = 1 << 16  # integers that are looked at to choose the model of a larger array

FLOOR: tuple[int, ...] = (*range(8), 8, 12, 16, 24, 32, 48, 64, TAIL)  # the least magnitude of each letter

# Upper edges of the predicted magnitude in 1/256 for each context: 2^(k/2), so 1/256 .. 11.3.
_EDGES = [round(2 ** (k / 2)) for k in range(LEVELS - 1)]
LEVEL = np.searchsorted(np.array(_EDGES), np.arange(4096), side="right").astype(np.uint8)


def _laplace(mean: float, odd: bool) -> list[int]:
    """Shares in 1/WHOLE, less WHOLE, of the letters up to each for a rounded Laplace variable of this mean.

    In states of a trellis that hold odd levels, the first lie at half a number, and zero takes half as much.
    """
    significant = (math.sqrt(1 + 4 * mean * mean) - 1) / (2 * mean)
    greater = min(max(significant**2, 0.1), 0.97)
    free = WHOLE - LEAST * LETTERS
    first = math.sqrt(significant) if odd else significant
    second = significant * math.sqrt(greater) if odd else significant * greater
    ends = [int(free * (1 - (first if floor == 1 else second * greater ** (floor - 2)))) for floor in FLOOR[1:]]
    return [end + LEAST * (k + 1) - WHOLE for k, end in enumerate(ends)] + [0]


PRIOR = np.array([_laplace(2 ** ((k - 0.5) / 2) / 256, odd) for odd in (False, True) for k in range(LEVELS)], np.int16)
TABLES = LEVEL.ctypes.data, PRIOR.ctypes.data


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "kernel_rows", "kernel_columns")],
        *[(name, ctypes.c_int32) for name in ("places", "low", "high", "slow", "blend", "memory", "settle")],
        *[(name, ctypes.c_int32) for name in ("signs", "trellis")],
        *[(name, ctypes.c_void_p) for name in ("level", "prior")],
    ]


CHOICES = {  # of each setting, the usual one first
    "places": (0, 1),
    "slow": (7, 6, 9, 11),
    "blend": (8, 4, 12, 0, 16),
    "memory": (3, 2, 4, 5),
    "settle": (4, 3, 6, 8),
    "signs": (0, 1),
    "trellis": (0, 1),
}
MODELS = math.prod(map(len, CHOICES.values()))


class Matrix(NamedTuple):
    """How an array is walked: the size of the matrix, the last two axes, how many places of a kernel have own means."""

    rows: int
    columns: int
    kernel: tuple[int, int]
    places: int

    @property
    def lanes(self) -> int:
        """How many rows are coded at once."""
        few = self.rows < LANES or self.columns < LANES or self.rows * self.columns < SMALL
        return 1 if few else LANES

    @property
    def kernels(self) -> int:
        """How many there are."""
        return self.rows * self.columns // (self.kernel[0] * self.kernel[1])

    @property
    def cells(self) -> int:
        """Places for the kernels whose signs are coded together, with an empty row and an empty column before each."""
        together = min(self.kernels, CHUNK) if self.kernels >= MANY else 1
        return together * (self.kernel[0] + 1) * (self.kernel[1] + 1)


class Model(NamedTuple):
    """How one array is coded, as indices into `CHOICES`.

    `places` is 1 where each place of a kernel has its own mean along the row. Counts are halved at 2^(slow + 1).
    `blend` is the weight of the column's mean in 1/16. Means of a row and of a column move by 2^-memory and 2^-settle
    of their way.
    `signs` is 1 where signs have contexts (`sign_shares`), `trellis` where rows are paths through the trellis.
    """

    places: int = 0
    slow: int = 0
    blend: int = 0
    memory: int = 0
    settle: int = 0
    signs: int = 0
    trellis: int = 0

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

    def matrix(self, shape: Sequence[int]) -> Matrix:
        """The matrix for an array of this shape, in which axes of one place do not count; its rows are the first axis.

        An array of one axis is one row, or rows of 1024 where that comes out even: means of columns are then few.
        """
        axes = [size for size in shape if size != 1]
        if len(axes) < 2:
            size = math.prod(axes)
            axes = [size // 1024, 1024] if size and size % 1024 == 0 else [1, size]
        rows, columns, kernel = axes[0], math.prod(axes[1:]), (axes[-2], axes[-1])
        places = math.prod(axes[2:]) if self.places else 1
        return Matrix(rows, columns, kernel, places if places <= PLACES else 1)

    def native(self, matrix: Matrix, low: int, high: int, signs: int) -> _Model:
        """The same for the C core."""
        c = self.chosen()
        settings = (low, high, c.slow, c.blend, c.memory, c.settle, signs, c.trellis)
        return _Model(matrix.rows, matrix.columns, *matrix.kernel, matrix.places, *settings, *TABLES)


def sign_shares(values: NDArray[np.int32], kernel: tuple[int, int]) -> int:
    """How often a value is negative, in 1/16: four bits each, after (+, 0), (0, +), (+, +), (+, -) left and above.

    After the opposite neighbours it is positive as often.
    """
    sign = np.sign(values.reshape(-1, *kernel))
    left, above = np.zeros_like(sign), np.zeros_like(sign)
    left[:, :, 1:], above[:, 1:] = sign[:, :, :-1], sign[:, :-1]
    shares = 0
    for place, (one, other) in enumerate(NEIGHBOURS):
        minus = plus = 0
        for side in (1, -1):
            found = sign[(left == side * one) & (above == side * other)] * side
            minus, plus = minus + int((found < 0).sum()), plus + int((found > 0).sum())
        share = (32 * minus // (minus + plus) + 1) // 2 if minus + plus else 8
        shares |= min(max(share, 1), 15) << 4 * place
    return shares


def encode_array(values: NDArray[np.int32], model: Model, low: int, high: int) -> bytes:
    """The stream of an array whose values lie in low..high, low <= 0 <= high."""
    if low < 0 and high == 0:
        values, low, high = np.asarray(-values), 0, -low
    matrix, head, signs = model.matrix(values.shape), b"", 0
    if low and model.signs:
        signs = sign_shares(values, matrix.kernel)
        head = signs.to_bytes(2, "little")
    if native.library() is None:
        return head + _Encoder(values, matrix, model, low, high, signs).stream()
    sizes = np.abs(values)
    steps = values.size + int((sizes > 0).sum()) + int((sizes >= EXACT).sum()) + 2 * int((sizes >= TAIL).sum())
    listed, out = np.empty(steps, np.uint64), np.empty(2 * steps + 8 * (LANES + 1), np.uint8)
    given = (listed, listed.size, out, out.size, *_room(matrix, signs))
    done = native.call("context_encode", values, ctypes.byref(model.native(matrix, low, high, signs)), *given)
    if done is None or done < 0:
        raise RuntimeError(f"context coder failed ({done})")
    return head + out[:done].tobytes()


def decode_array(data: bytes, model: Model, shape: Sequence[int], low: int, high: int) -> NDArray[np.int32]:
    """The array of this shape; raises `FormatError` unless `data` is exactly its stream."""
    if low < 0 and high == 0:
        return np.asarray(-decode_array(data, model, shape, 0, -low))
    matrix, signs = model.matrix(shape), 0
    if low and model.signs:
        signs, data = int.from_bytes(data[:2], "little"), data[2:]
        if not all(signs >> at & 15 for at in (0, 4, 8, 12)):
            raise FormatError("a context-coded stream has signs that never occur")
    if native.library() is None:
        return _Decoder(data, matrix).array(model, low, high, signs).reshape(shape)
    out = np.empty(shape, np.int32)
    given = (ctypes.byref(model.native(matrix, low, high, signs)), out, *_room(matrix, signs))
    if native.call("context_decode", ctypes.c_char_p(data), len(data), *given) != out.size:
        raise FormatError("a context-coded stream is damaged")
    return out


def _room(matrix: Matrix, signs: int) -> tuple[NDArray[np.int32], NDArray[np.uint8] | None]:
    return np.empty(matrix.columns, np.int32), np.empty(matrix.cells, np.uint8) if signs else None


def choose(values: NDArray[np.int32], low: int, high: int) -> Model:
    """The model that makes this array smallest, found one setting at a time on at most 2^16 of its integers."""
    sample = values
    if values.size > TRIAL:
        sample = values[: max(1, TRIAL * values.shape[0] // values.size)]
    sized: dict[Model, int] = {}

    def size(model: Model) -> int:
        if model not in sized:
            sized[model] = len(encode_array(sample, model, low, high))
        return sized[model]

    best = Model(trellis=int(follows(values.reshape(Model().matrix(values.shape)[:2]))))
    for name in ("places", "signs", "blend", "memory", "settle", "slow"):
        best = min((best._replace(**{name: i}) for i in range(len(CHOICES[name]))), key=size)
    return best


class Context:
    """Levels around the most common value, in the layout and with the memories that suit them best."""

    pace = 130

    def encode(self, values: Ints) -> bytes:
        flat, low, high = flat32(values, 1 << 24)
        if flat.size > MOST:
            raise Unsuited("more integers than the context coder counts")
        origin = low + int(np.bincount(flat - low).argmax()) if high - low < 1 << 16 else max(low, min(0, high))
        levels = (flat - np.int32(origin)).reshape(values.shape)
        low, high = low - origin, high - origin
        model = choose(levels, low, high)
        head = put_number(zigzag(origin)) + put_number(-low) + put_number(high) + put_number(model.number())
        return head + encode_array(levels, model, low, high)

    def decode(self, data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
        reader = Reader(data)
        origin = unzigzag(reader.number(1 << 32))
        low, high = -reader.number(1 << 24), reader.number(1 << 24)
        model = Model.of_number(reader.number(MODELS - 1))
        if math.prod(shape) == 0:
            raise FormatError("an empty array is not context-coded")
        info = np.iinfo(np.uint8 if dtype == np.bool_ else dtype)
        most = 1 if dtype == np.bool_ else info.max
        if low + origin < info.min or high + origin > most or origin >= 1 << 30:
            raise FormatError(f"a stream holds values that {dtype} cannot")
        whole = np.uint8 if dtype == np.bool_ else dtype
        values: Ints = decode_array(reader.rest(), model, shape, low, high).astype(whole)
        if origin:  # modulo the width of the type, which every value fits
            values += np.array(origin).astype(whole)
        return values.astype(dtype, copy=False)


def letter_of(size: int) -> int:
    """The letter of a magnitude."""
    return bisect.bisect_right(FLOOR, size) - 1


class _Counts:
    """How often letters up to each were seen, halved when that is often enough."""

    def __init__(self) -> None:
        self.below = np.zeros(LETTERS, np.int64)

    def add(self, fresh: NDArray[np.int64], most: int) -> None:
        self.below = self.below + fresh >> int(self.below[-1] + fresh[-1] >= most)


class _Alphabet:
    """Where the share of each letter ends."""

    def __init__(self, prior: NDArray[np.float32], far: _Counts, last: int) -> None:
        self.prior, self.far, self.near = prior, far, _Counts()
        self.ends = prior.astype(int)[:last].tolist() + [WHOLE] * (LETTERS - last)
        self.fresh, self.due = [0] * LETTERS, 1

    def renew(self, most: int, last: int) -> None:
        for counts in (self.near, self.far):
            counts.add(np.cumsum(self.fresh), most)
        near, far = self.near.below.astype(np.float32), self.far.below.astype(np.float32)
        count, free = int(self.near.below[-1]), np.float32(WHOLE - LEAST * (last + 1))
        lean, least = np.float32(FRESH + count // 2), np.arange(LEAST, LEAST * LETTERS + 1, LEAST, dtype=np.float32)
        by_own, by_all = np.float32(1) / (lean + near[-1]), np.float32(1) / (np.float32(KNOWN) + far[-1])
        parent = (np.float32(KNOWN) * self.prior + least * far[-1] + free * far) * by_all
        ends = (lean * parent + least * near[-1] + free * near) * by_own
        self.ends = ends.astype(int)[:last].tolist() + [WHOLE] * (LETTERS - last)
        self.fresh, self.due = [0] * LETTERS, 1 if count < 6 else count // 3


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
        self.most = max(high, -low)
        if model.trellis:
            self.most = (self.most + 1) // 2
        self.sizes(values, matrix, model.chosen())
        if low < 0:
            self.signs(values, matrix, signs)
        if min(values) < low or max(values) > high:
            raise FormatError("a context-coded stream is damaged")

    def sizes(self, values: list[int], matrix: Matrix, chosen: Model) -> None:
        rows, columns, lanes, places = matrix.rows, matrix.columns, matrix.lanes, matrix.places
        blend, memory, least = chosen.blend, 65536 >> chosen.memory, 4096 >> chosen.settle
        last, most = max(letter_of(self.most), 1), 2 << chosen.slow  # no share may be the whole
        levels = []
        for prior in (PRIOR.astype(np.float32) + np.float32(WHOLE))[: LEVELS * (1 + chosen.trellis)]:
            far = _Counts()
            levels.append([_Alphabet(prior, far, last) for _ in range(LEFTS)])
        mean, start = [32768] * columns, [32768] * places
        for first in range(0, rows, lanes):
            active = range(min(lanes, rows - first))
            settle = [max(4096 // (first + lane + 2), least) for lane in active]
            row, older = [list(start) for _ in active], [list(start) for _ in active]
            beside, state = [0 for _ in active], [0 for _ in active]
            for t in range(columns + len(active) - 1):
                now = [lane for lane in active if 0 <= t - lane < columns]
                for together in [now] if len(now) == LANES else [[lane] for lane in now]:
                    coded = []
                    for lane in together:
                        along = older[lane][(t - lane) % places]
                        level = int(LEVEL[along * (16 - blend) + mean[t - lane] * blend >> 12])
                        alphabet = levels[level + LEVELS * (state[lane] & 1)][min(beside[lane], LEFTS - 1)]
                        at = (first + lane) * columns + t - lane
                        size = abs(values[at]) + (state[lane] & 1) >> chosen.trellis
                        coded.append((lane, at, size, alphabet, alphabet.ends))
                    letters = []
                    for lane, _, size, alphabet, ends in coded:
                        letters.append(self.code(letter_of(size), ends, lane))
                        alphabet.fresh[letters[-1]] += 1
                    for (lane, at, size, alphabet, _), seen in zip(coded, letters, strict=True):
                        size, goal = self.rest(seen, size, lane) if seen >= EXACT else seen, seen << 16
                        if chosen.trellis:
                            size = min(size, 1 << 29)
                            odd = state[lane] & int(seen > 0)
                            state[lane] = NEXT[state[lane]][size & 1]
                            size, goal = 2 * size - odd, goal - (odd << 15)
                        self.keep(values, at, size)
                        alphabet.due -= 1
                        if alphabet.due == 0:
                            alphabet.renew(most, last)
                        j = t - lane
                        mean[j] += (goal - mean[j]) * settle[lane] >> 12
                        beside[lane], means = seen, row[lane]
                        older[lane][j % places] = means[j % places]
                        means[j % places] += (goal - means[j % places]) * memory >> 16
            for lane in active:
                start = [(3 * begun + come) // 4 for begun, come in zip(start, row[lane], strict=True)]

    def keep(self, values: list[int], at: int, size: int) -> None:
        """Write down a decoded magnitude; the encoder knows it."""

    def signs(self, values: list[int], matrix: Matrix, shares: int) -> None:
        (high, wide), turn, told = matrix.kernel, 0, shares or EVEN
        around = [0] * (matrix.kernels * (high + 1) * (wide + 1))
        known = {neighbours: told >> 4 * k & 15 for k, neighbours in enumerate(NEIGHBOURS)}
        known |= {(-left, -above): 16 - share for (left, above), share in known.items()} | {(0, 0): 8}
        for at in _order(matrix, shares):
            if values[at] == 0:
                continue
            kernel, place = divmod(at, high * wide)
            own = (kernel * (high + 1) + 1 + place // wide) * (wide + 1) + 1 + place % wide
            split = known[around[own - 1], around[own - wide - 1]] * (WHOLE // 16)
            around[own] = 2 * self.code(int(values[at] > 0), (split, WHOLE), turn) - 1
            self.keep(values, at, abs(values[at]) * around[own])
            turn = (turn + 1) % matrix.lanes


def _order(matrix: Matrix, shares: int) -> list[int]:
    """The order in which signs are coded: the same place of up to 256 kernels, then the next."""
    places, kernels = np.arange(matrix.rows * matrix.columns), matrix.kernels
    if kernels < MANY or not shares:
        return [int(at) for at in places]
    blocks = np.split(places.reshape(kernels, -1), range(CHUNK, kernels, CHUNK))
    return [int(at) for block in blocks for at in block.T.reshape(-1)]


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
        values = [0] * (self.matrix.rows * self.matrix.columns)
        self.walk(values, self.matrix, model, low, high, signs)
        begun = (0,) if len(self.states) == 1 else (0, 1 << 32)
        if self.at < len(self.data) or any(state not in begun for state in self.states):
            raise FormatError("a context-coded stream is damaged")
        return np.array(values, np.int32)

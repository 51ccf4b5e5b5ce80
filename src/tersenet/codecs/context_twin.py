"""The NumPy twin of native/context.c: the same steps in the same order, in Python integers.

It serves where no C core was built, and makes and reads the same bytes.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet.codecs.context_model import (
    BITS,
    CHUNK,
    DAMAGED,
    EXACT,
    FLOOR,
    LEAST,
    LETTERS,
    LEVELS,
    MANY,
    MODELS,
    NAMES,
    NEIGHBOURS,
    PRIOR,
    TAIL,
    WHOLE,
    WRONG_TYPE,
    Matrix,
    Model,
    one_row,
    value_range,
    walked,
)
from tersenet.codecs.stream import FormatError, Ints, Reader, unzigzag
from tersenet.codecs.trellis import NEXT

LEFTS = 4  # contexts of the left neighbour
FRESH, KNOWN = 32, 64  # what an alphabet's counts are added to: so much of its parent, of the prior
UNIT, ZERO = 1024, 7  # of means: half a letter, and what a zero counts as, so that their floats stay normal
FIRST = 2 * (127 + 2) + 1  # exponent and first bit of the fraction of means in the lowest context


def decoded(data: bytes, shape: Sequence[int], dtype: np.dtype[Any]) -> Ints:
    """The twin of terse_context_decode."""
    reader = Reader(data)
    origin = unzigzag(reader.number(1 << 32))
    low, high = -reader.number(1 << 24), reader.number(1 << 24)
    model = Model.of_number(reader.number(MODELS))
    least, most = value_range(dtype)
    if low + origin < least or high + origin > most or origin + high >= 1 << 30:
        raise FormatError(WRONG_TYPE.format(dtype))
    levels = _levels(reader.rest(), model, shape, low, high)
    return (levels.astype(np.int64) + origin).astype(dtype)


def _levels(data: bytes, model: Model, shape: Sequence[int], low: int, high: int) -> NDArray[np.int32]:
    """The array of this shape ; raises `FormatError` unless `data` is exactly its stream."""
    if low < 0 and high == 0:
        return np.asarray(-_levels(data, model, shape, 0, -low))
    live, signs = None, 0
    if model.skip:
        reader = Reader(data)
        names = one_row(walked(shape)[1])
        live = Decoder(reader.take(reader.number()), names).array(NAMES, 0, 1, 0).nonzero()[0]
        if not live.size:
            raise FormatError("a context-coded stream leaves out all columns")
        data = reader.rest()
    matrix = model.matrix(shape, live)
    if low and model.signs:
        signs, data = int.from_bytes(data[:2], "little"), data[2:]
        if not all(signs >> at & 15 for at in (0, 4, 8, 12)):
            raise FormatError("a context-coded stream has signs that never occur")
    return Decoder(data, matrix).array(model, low, high, signs).reshape(shape)


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
            raise FormatError(DAMAGED)

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


class Encoder(_Walk):
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


class Decoder(_Walk):
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
                raise FormatError(DAMAGED)
            self.states.append(int.from_bytes(held, "little"))
            self.at += length
        if (len(data) - self.at) % 4:
            raise FormatError(DAMAGED)

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
            raise FormatError(DAMAGED)
        return np.array(values, np.int32)

"""A second decoder of the context codec, in plain Python, that follows docs/format.md and uses nothing of the package.

It is slow, and what it refuses it refuses with AssertionError.
"""

import itertools
import math
import struct
from bisect import bisect_right
from collections.abc import Sequence

FLOOR = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128)
NEXT = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))


def single(value: float) -> float:
    """The nearest float32: a sum, product or quotient of two, made in double precision, is rounded as if at once."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def prior(odd: int, level: int) -> list[int]:
    m = 2 ** ((level - 0.5) / 2) / 256
    a = (math.sqrt(1 + 4 * m * m) - 1) / (2 * m)
    g = min(max(a * a, 0.1), 0.97)
    first, second = (math.sqrt(a), a * math.sqrt(g)) if odd else (a, a * g)
    tails = [first if floor == 1 else second * g ** (floor - 2) for floor in FLOOR[1:]]
    return [math.floor(32704 * (1 - tail)) + 4 * (k + 1) for k, tail in enumerate(tails)] + [32768]


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        assert self.at + count <= len(self.data)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, limit: int) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                assert value < limit and (byte or shift == 7)
                return value


class Rans:
    def __init__(self, data: bytes, lanes: int) -> None:
        self.bytes, self.lanes = Bytes(data), lanes
        lengths = [len(data) if len(data) <= 8 else 5 + (len(data) - 5) % 4]
        if lanes == 4:
            head = int.from_bytes(self.bytes.take(2), "little")
            lengths = [head >> 4 * lane & 15 for lane in range(4)]
        self.states = []
        for length in lengths:
            held = self.bytes.take(length)
            assert length <= 8 and (not held or held[-1])
            self.states.append(int.from_bytes(held, "little"))

    def step(self, lane: int, ends: Sequence[int]) -> int:
        """Which interval the slot lies in, of those that end at `ends`."""
        state = self.states[lane]
        slot = state % 32768
        found = bisect_right(ends, slot)
        start = ends[found - 1] if found else 0
        state = (ends[found] - start) * (state >> 15) + slot - start
        if state < 1 << 32 and self.bytes.at < len(self.bytes.data):
            state = state << 32 | int.from_bytes(self.bytes.take(4), "little")
        self.states[lane] = state
        return found

    def bits(self, lane: int, count: int) -> int:
        share = 32768 >> count
        return self.step(lane, range(share, 32769, share)) if count else 0

    def end(self) -> None:
        assert self.bytes.at == len(self.bytes.data)
        assert all(state == 0 or (self.lanes == 4 and state == 1 << 32) for state in self.states)


class Alphabet:
    def __init__(self, shares: list[int], far: list[int], last: int, halved: int) -> None:
        self.prior, self.far, self.last, self.halved = shares, far, last, halved
        self.near, self.fresh, self.room = [0] * 16, [0] * 16, 1
        self.ends = shares[:last] + [32768] * (16 - last)

    def count(self, letter: int) -> None:
        self.fresh[letter] += 1
        if self.fresh[letter] < self.room:
            return
        for counts in (self.near, self.far):
            for k, more in enumerate(itertools.accumulate(self.fresh)):
                counts[k] += more
            while counts[15] >= self.halved:
                counts[:] = [count // 2 for count in counts]
        n, f = self.near[15], self.far[15]
        lean, free = 32 + n // 2, 32768 - 4 * (self.last + 1)
        own = single(1 / (lean + n))
        parent = single(single(lean * own) * single(1 / (64 + f)))
        by_prior, by_far, by_near = single(64 * parent), single(free * parent), single(free * own)
        least = single(4 * single(single(f * parent) + single(n * own)))
        for k in range(self.last):
            end = single(single(by_prior * self.prior[k]) + single(by_far * self.far[k]))
            end = single(end + single(by_near * self.near[k]))
            self.ends[k] = math.floor(single(end + single(least * (k + 1))))
        self.room = 3 + max(b - a for a, b in itertools.pairwise([0, *self.near])) // 3
        self.fresh = [0] * 16


class Settings:
    def __init__(self, number: int) -> None:
        digits = []
        for base in (2, 4, 5, 4, 4, 2, 2, 2):
            number, digit = divmod(number, base)
            digits.append(digit)
        self.places, self.signs, self.trellis, self.skip = digits[0], *digits[5:]
        self.halved = (256, 128, 1024, 4096)[digits[1]]
        self.blend = (8 / 16, 4 / 16, 12 / 16, 0, 1)[digits[2]]
        self.memory = (1 / 8, 1 / 4, 1 / 16, 1 / 32)[digits[3]]
        self.settle = (1 / 16, 1 / 8, 1 / 64, 1 / 256)[digits[4]]


def decode(data: bytes, shape: Sequence[int], least: int, most: int) -> list[int]:
    """The values of an array of this shape, whose type holds `least` to `most`, in C order."""
    source = Bytes(data)
    origin = source.number(1 << 32)
    origin = -(origin + 1) // 2 if origin % 2 else origin // 2
    below, above, number = source.number(1 << 24), source.number(1 << 24), source.number(5120)
    assert least <= origin - below and origin + above <= most and origin + above < 1 << 30
    settings, sign = Settings(number), 1
    if below and not above:
        below, above, sign = 0, below, -1
    axes = [n for n in shape if n != 1]
    if len(axes) < 2:
        size = math.prod(axes)
        axes = [size // 1024, 1024] if size % 1024 == 0 else [1, size]
    rows, width, places = axes[0], math.prod(axes[1:]), math.prod(axes[2:])
    assert rows * width > 0
    columns = list(range(width))
    if settings.skip:
        stream = source.take(source.number(1 << 63))
        names = Matrix(1, width, columns, (1, width), 1, 0, 1, Settings(3 * 2 * 4)).decoded(stream, [])
        columns = [j for j in range(width) if names[j]]
        assert columns
    shares = []
    if below and settings.signs:
        shares = [byte >> shift & 15 for byte in source.take(2) for shift in (0, 4)]
        assert all(shares)
    places = places if settings.places and places <= 64 else 1
    matrix = Matrix(rows, width, columns, (axes[-2], axes[-1]), places, -below, above, settings)
    return [sign * level + origin for level in matrix.decoded(data[source.at :], shares)]


class Matrix:
    def __init__(
        self,
        rows: int,
        width: int,
        columns: list[int],
        kernel: tuple[int, int],
        places: int,
        low: int,
        high: int,
        settings: Settings,
    ) -> None:
        self.rows, self.width, self.columns, self.kernel, self.places = rows, width, columns, kernel, places
        self.low, self.high, self.set = low, high, settings
        many = rows >= 4 and len(columns) >= 4 and rows * len(columns) >= 1024
        self.lanes = 4 if many else 1
        self.most = max(high, -low)
        if settings.trellis:
            self.most = (self.most + 1) // 2
        self.last = max(bisect_right(FLOOR, self.most) - 1, 1)
        self.alphabets = []
        for odd in range(2):
            for level in range(25):
                far = [0] * 16
                made = [Alphabet(prior(odd, level), far, self.last, settings.halved) for _ in range(4)]
                self.alphabets.append(made)

    def decoded(self, data: bytes, shares: list[int]) -> list[int]:
        self.coder, self.levels = Rans(data, self.lanes), [0] * (self.rows * self.width)
        self.mean, self.start = [1024.0] * len(self.columns), [1024.0] * self.places
        for first in range(0, self.rows, self.lanes):
            active = min(self.lanes, self.rows - first)
            self.magnitudes(first, active)
            self.turn = 0
            group = range(first * self.width, (first + active) * self.width)
            if self.low < 0 and shares:
                self.signs_by_neighbours(group, shares)
            elif self.low < 0:
                self.even_signs(group)
        self.coder.end()
        assert all(self.low <= level <= self.high for level in self.levels)
        return self.levels

    def magnitudes(self, first: int, active: int) -> None:
        settle = max(single(1 / (first + 1 + active)), self.set.settle)
        row = [list(self.start) for _ in range(active)]
        state, left = [0] * active, [0] * active
        learned: list[tuple[int, list[int]]] = []
        before = -1
        for t, column in enumerate(self.columns):
            if column > before + 1:
                left = [0] * active
                for _ in range((column - before - 1) * self.set.trellis):
                    state = [NEXT[s][0] for s in state]
            before = column
            if len(learned) == 2:
                self.learn(*learned.pop(0), row, settle)
            used, goals = [], []
            for lane in range(active):
                blend, own = self.set.blend, row[lane][column % self.places]
                mean = single(single(own * (1 - blend)) + single(self.mean[t] * blend))
                level = (struct.unpack("<I", struct.pack("<f", mean))[0] >> 22) - 259
                odd = state[lane] % 2
                used.append(self.alphabets[25 * odd + level][min(left[lane], 3)])
                left[lane] = self.coder.step(lane, used[-1].ends)
                goals.append(1024 * (2 * left[lane] - (odd if left[lane] else 0)) + 7)
            for lane in range(active):
                number = self.whole(lane, left[lane])
                odd = state[lane] % 2
                if self.set.trellis:
                    state[lane] = NEXT[state[lane]][number % 2]
                    number = 2 * number - odd if number else 0
                self.levels[(first + lane) * self.width + column] = number
            for lane in range(active):
                used[lane].count(left[lane])
            learned.append((t, goals))
        for seen in learned:
            self.learn(*seen, row, settle)
        for own in row:
            self.start = [single(single(single(3 * s) + r) * 0.25) for s, r in zip(self.start, own, strict=True)]

    def learn(self, t: int, goals: list[int], row: list[list[float]], settle: float) -> None:
        mean, place = self.mean[t], self.columns[t] % self.places
        away = single(sum(goals) - single(len(goals) * mean))
        self.mean[t] = single(mean + single(away * settle))
        for own, goal in zip(row, goals, strict=True):
            own[place] = single(own[place] + single(single(goal - own[place]) * self.set.memory))

    def whole(self, lane: int, letter: int) -> int:
        """The magnitude, or number, of a letter."""
        if letter < 8:
            return letter
        if letter < 15:
            end = self.most + 1 if letter == self.last else FLOOR[letter + 1]
            return FLOOR[letter] + self.coder.bits(lane, (end - FLOOR[letter] - 1).bit_length())
        bits = self.coder.bits(lane, 5)
        assert bits < 30
        top = self.coder.bits(lane, bits - 14) if bits > 14 else 0
        return 127 + (1 << bits | top << 14 | self.coder.bits(lane, min(bits, 14)))

    def even_signs(self, group: range) -> None:
        for begin in range(0, len(group), 256):
            signed = [at for at in group[begin : begin + 256] if self.levels[at]]
            for k in range(0, len(signed), 15):
                some = signed[k : k + 15]
                minus = self.coder.bits(self.turn, len(some))
                for j, at in enumerate(some):
                    if minus >> j & 1:
                        self.levels[at] *= -1
                self.turn = (self.turn + 1) % self.lanes

    def signs_by_neighbours(self, group: range, shares: list[int]) -> None:
        high, wide = self.kernel
        size, order = high * wide, list(group)
        if wide < self.width and len(group) // size >= 16:
            kernels = [order[k : k + size] for k in range(0, len(order), size)]
            blocks = [kernels[k : k + 256] for k in range(0, len(kernels), 256)]
            order = [kernel[place] for block in blocks for place in range(size) for kernel in block]
        share = dict(zip([(1, 0), (0, 1), (1, 1), (1, -1)], shares, strict=True))
        share |= {(-left, -above): 16 - part for (left, above), part in share.items()} | {(0, 0): 8}
        for at in order:
            if self.levels[at]:
                left = self.levels[at - 1] if at % wide else 0
                above = self.levels[at - wide] if at // wide % high else 0
                split = 2048 * share[(left > 0) - (left < 0), (above > 0) - (above < 0)]
                if self.coder.step(self.turn, (split, 32768)) == 0:
                    self.levels[at] *= -1
                self.turn = (self.turn + 1) % self.lanes

"""How the context coder walks an array, and with what settings: what the C core and its twin share.

`docs/format.md` has it in words.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import Ints

LEVELS, LETTERS, EXACT, TAIL = 25, 16, 8, 128  # letters below EXACT stand for one magnitude
BITS, LEAST = 15, 4  # shares are in 1/2^15; no letter's tends to less than LEAST
WHOLE = 1 << BITS
LANES, SMALL, PLACES = 4, 1024, 64  # rows that are coded at once, from so many values on
CHUNK, MANY = 256, 16  # kernels whose signs are coded side by side, where there are so many
FLOOR: tuple[int, ...] = (*range(8), 8, 12, 16, 24, 32, 48, 64, TAIL)  # the least magnitude of each letter
NEIGHBOURS = ((1, 0), (0, 1), (1, 1), (1, -1))  # signs to the left and above whose shares are sent
WRONG_TYPE = "a stream holds values that {} cannot"
DAMAGED = "a context-coded stream is damaged"


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


def one_row(width: int) -> Matrix:
    """The names of columns, ones and zeros, as they are coded: one row, however long."""
    return Matrix(1, width, np.arange(width + 1, dtype=np.int32), (1, width), 1)


NAMES = Model(blend=CHOICES["blend"].index(0))  # the model of that row


def value_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The least and the highest that a type holds, as far as the coder goes."""
    if dtype == np.bool_:
        return 0, 1
    info = np.iinfo(dtype)
    return max(info.min, -(1 << 62)), min(info.max, 1 << 62)

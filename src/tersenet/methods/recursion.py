"""The recursion of error feedback over one weight, in C (native/feedback.c) or by its NumPy twin.

Rows are quantized from the last to the first, and in each the columns likewise; every level makes up for what those
before it added to its own coordinate of the error. A level is the nearest one, or one less where that saves enough
bits; or, with `weight`, a row is the path through the trellis that costs least in error and bits. The Viterbi search
keeps a path for each state, each with the errors that its own levels have made (per-survivor processing, Raheli et al.
1995), and decides a level when one to two blocks of columns behind it were searched.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

from tersenet import native
from tersenet.codecs.trellis import NEXT
from tersenet.packed import Array

HIGHEST = float(1 << 22)  # sizes of levels: a channel whose norm divides by next to nothing needs many
MEANS = 2.0 ** ((np.arange(32) - 0.5) / 2) / 256  # mean sizes for which rates are tabled
EDGES = 2.0 ** (np.arange(31) / 2) / 256
BLOCK, NEVER = 32, 1e300  # as in the C core


@dataclass(frozen=True, eq=False)
class Recursion:
    """The recursion over one group: its rows from the last to the first, and in each its columns likewise."""

    rows: Array | None  # Cholesky factor [rows, b] of blocks of b (see `Metric`), or None where it is diagonal
    columns: Array | None  # the same [columns, b], each column divided by its diagonal
    row: Array  # steps are products of a row's part and a column's
    column: Array
    profile: Array  # mean sizes of columns in steps, 1 on average
    prices: Array  # [means, 8], see `thresholds` and `worths`
    weight: Array | None  # of each column's squared error in steps, in a trellis
    kept: Array | None

    def levels(self, whitened: Array) -> Array:
        """Levels [rows, columns]; `whitened` is used up."""
        found = np.zeros(whitened.shape, np.int32)
        arrays = (self.row, self.column, EDGES, self.profile, self.prices, self.kept, self.weight)
        row, column, edges, profile, prices, kept, weight = (a if a is None else a.ctypes.data for a in arrays)
        widths = (1 if factor is None else factor.shape[1] for factor in (self.rows, self.columns))
        tables = (row, column, edges, profile, prices)
        settings = native.Steps(*whitened.shape, *widths, *tables, len(MEANS), HIGHEST, kept, weight)
        room = np.empty(len(self.column)), np.empty(len(self.column), np.int32)
        done = native.call("feedback", whitened, self.rows, self.columns, ctypes.byref(settings), found, *room)
        if done is None:
            return self._slowly(whitened)
        if done != found.size:
            raise RuntimeError(f"error feedback failed ({done})")
        return found

    def _slowly(self, whitened: Array) -> Array:
        """The NumPy twin of native/feedback.c."""
        found = np.zeros(whitened.shape, np.int32)
        for j in reversed(range(len(whitened))):
            start = j if self.rows is None else j // self.rows.shape[1] * self.rows.shape[1]
            own = 1.0 if self.rows is None else self.rows[j, j - start]
            steps = self.column * self.row[j]
            kept = np.ones(len(steps), bool) if self.kept is None else self.kept[j]
            mean = np.cumsum(np.abs(whitened[j] / (own * steps)) * kept)[-1] / len(steps)  # in the order of the C core
            prices = self.prices[np.searchsorted(EDGES, mean * self.profile, side="right")]
            line = _Line(whitened[j].copy(), own, steps, prices, self.columns)
            found[j] = line.nearest(kept) if self.weight is None else line.trellis(self.weight)
            if self.rows is not None:
                whitened[start:j] -= found[j] * steps * self.rows[j, : j - start, None]
        return found


@dataclass(frozen=True, eq=False)
class _Line:
    weights: Array
    own: float
    steps: Array
    prices: Array
    columns: Array | None

    def error(self, i: int, level: int) -> float:
        return float(self.weights[i] - level * self.steps[i] * self.own)

    def carry(self, carried: Array, i: int, level: int, first: int = 0) -> None:
        """What a level adds to the coordinates from `first` on that `carried` holds."""
        if self.columns is None:
            return
        start, stop = i // self.columns.shape[1] * self.columns.shape[1], first + len(carried)
        begin = max(first, start)
        if begin < stop:
            carried[begin - first :] += self.columns[i, begin - start : stop - start] * self.error(i, level)

    def nearest(self, kept: Array) -> Array:
        carried, found = np.zeros(len(self.steps)), np.zeros(len(self.steps), np.int32)
        for i in reversed(range(len(found))):
            x = (self.weights[i] + carried[i]) / (self.own * self.steps[i])
            size = min(abs(x), HIGHEST)
            k = int(size + 0.5)
            k -= k > 0 and size - (k - 0.5) < self.prices[i, int(k > 1)]
            found[i] = (-k if x < 0 else k) * kept[i]
            self.carry(carried[:i], i, found[i])
        return found

    def trellis(self, weight: Array) -> Array:
        carried, found = np.zeros(len(self.steps)), np.zeros(len(self.steps), np.int32)
        costs, past, stop = [0.0] * len(NEXT), list[_Choices](), len(found)
        while stop:
            first = (stop - 1) // BLOCK * BLOCK
            targets = []
            for s in range(len(NEXT)):
                target = (self.weights + carried)[first:stop]
                for k, level in reversed(list(enumerate(_followed(past, s)[0]))):
                    self.carry(target, stop + k, level, first)
                targets.append(target)
            now = list[_Choices]()
            for i in reversed(range(first, stop)):
                costs, targets, choices = self.searched(i, first, costs, targets, weight[i])
                now.insert(0, choices)
            start = 0 if first == 0 else min(range(len(NEXT)), key=lambda s: costs[s])
            levels, met = _followed(now, start)
            costs = [cost if _followed(now, s)[1] == met else NEVER for s, cost in enumerate(costs)]
            decided, _ = _followed(past, met)
            found[stop : stop + len(decided)] = decided
            for k, level in reversed(list(enumerate(decided))):
                self.carry(carried[:first], stop + k, level)
            if first == 0:
                found[:stop] = levels
            past, stop = now, first
        return found

    def searched(
        self, i: int, first: int, costs: list[float], targets: list[Array], weight: float
    ) -> tuple[list[float], list[Array], "_Choices"]:
        """Costs and targets of the paths from each state before a value, from those after it, and what they chose."""
        unit, now, then, choices = 1 / (self.own * self.steps[i]), [], [], []
        for s, nexts in enumerate(NEXT):
            ways = []
            for parity, after in enumerate(nexts):
                x = targets[after][i - first] * unit
                cost, level = _cheapest(abs(x), self.prices[i, 4 * (s & 1) :], weight, s & 1, parity)
                ways.append((cost + costs[after], -level if x < 0 else level, after))
            cost, level, after = min(ways, key=lambda way: way[0])
            target = targets[after][: i - first].copy()
            self.carry(target, i, level, first)
            now.append(cost)
            then.append(target)
            choices.append((level, after))
        return now, then, choices


_Choices = list[tuple[int, int]]  # for each state before a value: its level and the state after it


def _followed(block: list[_Choices], state: int) -> tuple[list[int], int]:
    """The levels of the path that begins in a state, and the state in which it leaves the block."""
    levels = []
    for choices in block:
        level, state = choices[state]
        levels.append(level)
    return levels, state


def _cheapest(size: float, bits: Array, weight: float, odd: int, parity: int) -> tuple[float, int]:
    """The cost of the cheapest level with that parity of its number, among the even levels or the odd ones and zero."""
    least = 2 - odd if parity else 4 - odd
    best = (NEVER, 0) if parity else (weight * size * size + bits[0], 0)
    size = min(size, HIGHEST)
    level = least + (int((size - least + 2) / 4) * 4 if size > least + 2 else 0)
    for tried in (level, level - 4):
        if tried >= least:
            number, off = (tried + odd) // 2, size - tried
            cost = weight * off * off + (bits[1] if number < 2 else bits[2] + (number - 2) * bits[3])
            best = min(best, (cost, tried), key=lambda way: way[0])
    return best

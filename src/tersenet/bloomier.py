"""Bloomier filters: a value for each of some keys in little more room than the values, and noise for all other keys.

Chazelle, Kilian, Rubinfeld, Tal (2004): the value of a key is the XOR of three cells and a mask that hashing chooses.
Cells are found by peeling: a key that alone wants a cell may be settled last. The three cells lie in three segments in
a row, which takes 1.13 cells a key for many keys (Dietzfelbinger, Walzer 2019; Graf, Lemire 2022); with one window the
segments are the three blocks of older filters, which take 1.23.
"""

import math
from typing import Any

import numpy as np

from tersenet import native
from tersenet.splitmix import below, mixed

Array = Any
TRIES = 8  # seeds for each number of cells
FACTORS = (1.125, 1.14, 1.16, 1.18, 1.2, 1.23, 1.26, 1.3, 1.35, 1.4, 1.5, 1.7, 2.0, 3.0)  # cells a key


def cells_of(keys: Array, seed: int, length: int, windows: int) -> tuple[Array, Array]:
    """The three cells [n, 3] of each key and the bits of its mask."""
    first = mixed(keys.astype(np.uint64) ^ mixed(np.uint64(seed)))
    second = mixed(first)
    begin = below(first >> np.uint64(32), windows) * np.uint64(length)
    within = [below(bits, length) for bits in (first, second >> np.uint64(32), second)]
    cells = np.stack([begin + np.uint64(k * length) + part for k, part in enumerate(within)], 1)
    return cells.astype(np.int64), mixed(second)


def queried(cells: Array, count: int, seed: int, length: int, bits: int, first: int = 0) -> Array:
    """The values, uint16, of `count` keys in a row."""
    wide, windows = np.ascontiguousarray(cells, np.uint16), len(cells) // length - 2
    found = np.empty(count, np.uint16)
    if native.call("bloomier_query", wide, first, count, seed, length, windows, np.int32(bits), found) is None:
        for begin in range(0, count, 1 << 20):
            keys = np.arange(begin, min(begin + (1 << 20), count)) + first
            own, mask = cells_of(keys, seed, length, windows)
            value = mask.astype(np.uint16) ^ wide[own[:, 0]] ^ wide[own[:, 1]] ^ wide[own[:, 2]]
            found[begin : begin + len(keys)] = value & np.uint16((1 << bits) - 1)
    return found


def built(keys: Array, values: Array, bits: int, seed: int = 0, windows: int | None = None) -> tuple[Array, int, int]:
    """The cells (uint16), the seed and the length of segments of a filter that gives each key its value.

    Keys are different integers from 0 on. As few cells are taken as one of a few seeds succeeds with; `windows` 1 makes
    three blocks.
    """
    keys, values = np.ascontiguousarray(keys, np.int64), np.ascontiguousarray(values, np.uint16)
    n = len(keys)
    for factor in FACTORS:
        for several in {_windows(n, factor): None, 1: None} if windows is None else (windows,):
            length = max(1, -(-math.ceil(factor * n) // (several + 2)))
            for tried in range(seed, seed + TRIES):
                cells = _peeled(keys, values, bits, tried, length, several)
                if cells is not None:
                    return cells, tried, length
    raise ValueError("no Bloomier filter was found: are keys there twice?")


def _windows(n: int, factor: float) -> int:
    """How many windows n keys take with `factor` cells each, their segments about as long as Graf and Lemire's."""
    length = 1 << max(2, min(18, int(math.log(max(n, 2)) / math.log(3.33) + 2.25)))
    return max(1, round(factor * n / length) - 2)


def _peeled(keys: Array, values: Array, bits: int, seed: int, length: int, windows: int) -> Array | None:
    """The cells, or None where keys stay that want no cell alone."""
    count, n = (windows + 2) * length, len(keys)
    cells = np.zeros(count, np.uint16)
    room = [np.empty(count, np.uint32) for _ in range(3)]
    size = np.int32(bits)
    done = native.call("bloomier_build", keys, values, n, seed, length, windows, size, cells, *room)
    if done is not None:
        return cells if done == n else None
    own, mask = cells_of(keys, seed, length, windows)
    degree = np.bincount(own.reshape(-1), minlength=count)
    alone = np.zeros(count, np.int64)  # the XOR of the numbers of the keys that want a cell
    np.bitwise_xor.at(alone, own.reshape(-1), np.repeat(np.arange(n), 3))
    peeled, ready = [], np.flatnonzero(degree == 1)
    while len(ready):
        _, at = np.unique(alone[ready], return_index=True)
        last = ready[np.sort(at)]
        settled = alone[last]
        peeled.append((last, settled))
        touched = own[settled].reshape(-1)
        np.subtract.at(degree, touched, 1)
        others = touched != np.repeat(last, 3)
        np.bitwise_xor.at(alone, touched[others], np.repeat(settled, 3)[others])
        back = touched[::-1]
        cell, at = np.unique(back, return_index=True)
        left = degree[cell] == 1
        ready = cell[left][np.argsort(-at[left], kind="stable")]  # in the order in which they came to be alone
    if sum(len(settled) for _, settled in peeled) < n:
        return None
    for last, settled in reversed(peeled):
        a, b, c = (cells[own[settled, k]] for k in range(3))
        cells[last] = (values[settled] ^ mask[settled].astype(np.uint16) ^ a ^ b ^ c) & np.uint16((1 << bits) - 1)
    return cells

"""Numbers from a seed and a place, the same in every version and language: splitmix64 (Steele, Lea, Flood 2014)."""

from typing import Any

import numpy as np

Array = Any
PART = 1 << 16  # places at a time: their numbers are larger than what is made of them
GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(x: Array) -> Array:
    """The generator's output after the state x, uint64."""
    with np.errstate(over="ignore"):
        x = x + GOLDEN
        x = (x ^ x >> np.uint64(30)) * FIRST
        x = (x ^ x >> np.uint64(27)) * SECOND
    return x ^ x >> np.uint64(31)


def numbers(seed: int, first: int, end: int) -> Array:
    """A 64-bit number for each of some places: mixed(place XOR mixed(seed))."""
    return mixed(np.arange(first, end, dtype=np.uint64) ^ mixed(np.uint64(seed)))


def below(bits: Array, n: int) -> Array:
    """The lower 32 bits of numbers, brought below n < 2^32."""
    return (bits & np.uint64(0xFFFFFFFF)) * np.uint64(n) >> np.uint64(32)


def dither(seed: int, count: int) -> Array:
    """Uniform numbers in [-1/2, 1/2), float32: the upper 24 bits of `numbers`."""
    out = np.empty(count, np.float32)
    for at in range(0, count, PART):
        upper = numbers(seed, at, min(at + PART, count)) >> np.uint64(40)
        out[at : at + PART] = upper.astype(np.float32) * np.float32(2**-24) - np.float32(0.5)
    return out


def buckets(seed: int, count: int, n: int) -> tuple[Array, Array]:
    """For each place one of n buckets, int64, and a sign, float32 1 or -1."""
    place, sign = np.empty(count, np.int64), np.empty(count, np.float32)
    for at in range(0, count, PART):
        found = numbers(seed, at, min(at + PART, count))
        place[at : at + PART] = below(found >> np.uint64(32), n)
        sign[at : at + PART] = 1 - 2 * (found & np.uint64(1)).astype(np.float32)
    return place, sign

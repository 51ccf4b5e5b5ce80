"""Numbers from a seed and a place, the same in every version and language: splitmix64 (Steele, Lea, Flood 2014)."""

from typing import Any

import numpy as np

Array = Any
GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(x: Array) -> Array:
    """The generator's output after the state x, uint64."""
    with np.errstate(over="ignore"):
        x = x + GOLDEN
        x = (x ^ x >> np.uint64(30)) * FIRST
        x = (x ^ x >> np.uint64(27)) * SECOND
    return x ^ x >> np.uint64(31)


def numbers(seed: int, count: int) -> Array:
    """A 64-bit number for each of `count` places: mixed(place XOR mixed(seed))."""
    return mixed(np.arange(count, dtype=np.uint64) ^ mixed(np.uint64(seed)))


def below(bits: Array, n: int) -> Array:
    """The lower 32 bits of numbers, brought below n < 2^32."""
    return (bits & np.uint64(0xFFFFFFFF)) * np.uint64(n) >> np.uint64(32)


def dither(seed: int, count: int) -> Array:
    """Uniform numbers in [-1/2, 1/2), float32: the upper 24 bits of `numbers`."""
    return (numbers(seed, count) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def buckets(seed: int, count: int, n: int) -> tuple[Array, Array]:
    """For each place one of n buckets, int64, and a sign, float32 1 or -1."""
    found = numbers(seed, count)
    return below(found >> np.uint64(32), n).astype(np.int64), 1 - 2 * (found & np.uint64(1)).astype(np.float32)

"""Integers to bytes and back. `CODECS` is the closed table of what a file may name; a codec's number is its place."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tersenet.codecs import universal
from tersenet.codecs.bits import Bits, Trits
from tersenet.codecs.context import Context
from tersenet.codecs.filters import Gaps, Runs
from tersenet.codecs.huffman import Huffman
from tersenet.codecs.rans import Rans, RansPairs
from tersenet.codecs.stream import Codec, FormatError, Ints, Unsuited, spread

__all__ = ["CODECS", "DEFAULT", "Codec", "FormatError", "encode"]

# The order is part of the file format: only ever append.
CODECS: dict[str, Codec] = {
    "bits": Bits(),
    "trits": Trits(),
    "huffman": Huffman(),
    "gaps": Gaps(),
    "runs": Runs(),
    "rans": Rans(),
    "rans-pairs": RansPairs(),
    "context": Context(),
    "deflate": universal.DEFLATE,
    "bzip2": universal.BZIP2,
    "lzma": universal.LZMA,
    "zstd": universal.ZSTD,
}
DEFAULT = tuple(name for name in CODECS if name != "zstd")  # what NumPy and the standard library can read
SHORT, LONGEST = 1 << 12, 1 << 15  # longer arrays are tried on a part first, of at least and at most so many integers
NEAR = 1.01  # codecs within so much of the smallest are left then,
TABLES = 128  # and so many bytes more for tables and learning, which cost less in the whole
LEARNS = 1.15  # the context coder learns from all rows of a matrix, and a part has few: so much more is near there
GENERAL = ("deflate", "bzip2", "lzma", "zstd")  # slow, with little to learn: left only where they are smallest already
SLACK = 1.05  # "speed" may cost five per cent over the smallest


def encode(values: Ints, codecs: Iterable[str] = DEFAULT, prefer: str = "size") -> tuple[str, bytes]:
    """The integers in the codec that makes them smallest, or, with `prefer="speed"`, in the fastest within 5 % of that.

    Returns the codec's name and the bytes. Ties go to the earlier codec in the table. Arrays of over 4096 integers are
    tried on a part, from all over the array, and those codecs that come near the best there see the whole.
    """
    names = [name for name in CODECS if name in set(codecs)] or ["bits"]
    left = names
    if values.size > SHORT and len(names) > 2:
        left = _promising(values, names, SLACK if prefer == "speed" else NEAR)
    coded = _tried(values, left) or _tried(values, names)  # the whole may hold what the part does not
    if not coded:
        return "bits", CODECS["bits"].encode(values)
    best = min(coded, key=lambda name: len(coded[name]))
    if prefer == "speed":
        near = [name for name in coded if len(coded[name]) <= SLACK * len(coded[best]) + 16]
        best = max(near, key=lambda name: CODECS[name].pace)
    return best, coded[best]


def _promising(values: Ints, names: Sequence[str], slack: float) -> list[str]:
    """The codecs that may be smallest, or near that, by what they make of a part."""
    part = spread(values, min(max(SHORT, values.size // 8), LONGEST))
    sizes = {name: len(data) for name, data in _tried(part, [name for name in names if name != "bzip2"]).items()}
    least = min((size for name, size in sizes.items() if name not in GENERAL), default=math.inf)
    if "bzip2" in names and sizes.get("deflate", 0) <= NEAR * min(sizes.values(), default=0):  # strings occur again
        sizes |= {name: len(data) for name, data in _tried(part, ["bzip2"]).items()}
    most = slack * min(sizes.values(), default=0) + TABLES
    found = [name for name in names if sizes.get(name, math.inf) <= (min(most, least) if name in GENERAL else most)]
    if values.ndim > 1 and "context" not in found and sizes.get("context", math.inf) <= LEARNS * most:
        found.append("context")
    return found


def _tried(values: Ints, names: Iterable[str]) -> dict[str, bytes]:
    coded: dict[str, bytes] = {}
    for name in names:
        try:
            coded[name] = CODECS[name].encode(values)
        except Unsuited:
            continue
    return coded


def decode(name: str, data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Ints:
    """The integers back; raises `FormatError` for anything that `encode` did not make."""
    return CODECS[name].decode(data, shape, dtype)

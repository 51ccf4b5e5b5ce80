"""Integers to bytes and back. `CODECS` is the closed table of what a file may name; a codec's number is its place."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tersenet.codecs import universal
from tersenet.codecs.bits import Bits, Trits
from tersenet.codecs.context import Context
from tersenet.codecs.filters import Gaps, Runs
from tersenet.codecs.huffman import Huffman
from tersenet.codecs.rans import Rans, RansPairs
from tersenet.codecs.stream import Codec, FormatError, Ints, Unsuited

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
SLOW_FROM = 1 << 20  # arrays this long are tried on a part first
SLACK = 1.05  # "speed" may cost five per cent over the smallest


def encode(values: Ints, codecs: Iterable[str] = DEFAULT, prefer: str = "size") -> tuple[str, bytes]:
    """The integers in the codec that makes them smallest, or, with `prefer="speed"`, in the fastest within 5 % of that.

    Returns the codec's name and the bytes. Ties go to the earlier codec in the table. Arrays of over a million
    integers are tried on a quarter of a million of them, and only the three most promising codecs see the whole.
    """
    names = [name for name in CODECS if name in set(codecs)] or ["bits"]
    if values.size > SLOW_FROM:
        part = values.reshape(-1)[: SLOW_FROM // 4] if values.ndim < 2 else values[: max(1, len(values) // 4)]
        tried = sorted(_tried(part, names).items(), key=lambda item: len(item[1]))
        names = [name for name in names if name in dict(tried[:3])] or ["bits"]
    coded = _tried(values, names)
    if not coded:
        return "bits", CODECS["bits"].encode(values)
    best = min(coded, key=lambda name: len(coded[name]))
    if prefer == "speed":
        near = [name for name in coded if len(coded[name]) <= SLACK * len(coded[best]) + 16]
        best = max(near, key=lambda name: CODECS[name].pace)
    return best, coded[best]


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

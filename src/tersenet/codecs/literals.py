"""A raw LZMA2 stream of literals alone, which any LZMA2 decoder reads; made for bytes that do not repeat.

The planes of floats are like that: exponents follow a distribution, which LZMA's adaptive binary range coder (Pavlov
1999) codes well, and mantissas are noise, which is stored as it is. Looking for strings that occur again would take
most of the time, and bytes too, since LZMA takes those that are found by chance.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from tersenet import native

BLOCK, CHUNK = 1024, 1 << 16  # bytes that are looked at to decide, and that a chunk holds at most
WHOLE = 1 << 11  # shares are in 1/2048


def encode(data: bytes, context: int) -> bytes:
    """The stream of some bytes, each coded as befits the highest bits (0..4 of them) of the one before."""
    raw = np.frombuffer(data, np.uint8)
    out = np.empty(raw.size + 7 * (raw.size // BLOCK + 1) + 1, np.uint8)
    done = native.call("literals_encode", raw, raw.size, np.int32(context), out, out.size)
    return _encode_slowly(raw, context) if done is None else out[:done].tobytes()


def _encode_slowly(raw: NDArray[np.uint8], context: int) -> bytes:
    """The twin of terse_literals_encode."""
    blocks = [raw[at : at + BLOCK] for at in range(0, raw.size, BLOCK)]
    out, trees, begun, last = bytearray(), [[WHOLE // 2] * 256 for _ in range(1 << context)], False, 0
    while blocks:
        stored, size = _noisy(blocks[0]), 1
        while size < min(len(blocks), CHUNK // BLOCK) and _noisy(blocks[size]) == stored:
            size += 1
        chunk, blocks = np.concatenate(blocks[:size]).tobytes(), blocks[size:]
        length = (len(chunk) - 1).to_bytes(2, "big")
        changed = [list(tree) for tree in trees]
        if not stored and len(coded := _coded(bytes([last]) + chunk, changed, context)) < len(chunk):
            head = b"\x80" if begun else b"\xc0" if out else b"\xe0"
            out += head + length + (len(coded) - 1).to_bytes(2, "big") + (b"" if begun else bytes([context])) + coded
            trees, begun = changed, True
        else:
            out += (b"\2" if out else b"\1") + length + chunk
        last = chunk[-1]
    return bytes(out) + b"\0"


def _noisy(block: NDArray[np.uint8]) -> bool:
    """Whether bytes occur as evenly as those of noise: an entropy of about 7.88 bits and more."""
    squares = int(np.square(np.bincount(block)).sum())
    return 25600 * squares <= 117 * block.size**2 + 25500 * block.size


def _coded(chunk: bytes, trees: list[list[int]], context: int) -> bytes:
    """The range coder's bytes for all of a chunk but its first; the first share of the first tree is of literals."""
    low, span, shifts = 0, 0xFFFFFFFF, 0  # low is the whole number so far
    for last, byte in itertools.pairwise(chunk):
        shares, node = trees[0], 0
        for bit in (0, *(byte >> k & 1 for k in range(7, -1, -1))):
            share, bound = shares[node], (span >> 11) * shares[node]
            low, span = (low + bound, span - bound) if bit else (low, bound)
            shares[node] = share - (share >> 5) if bit else share + ((WHOLE - share) >> 5)
            shares, node = trees[last >> (8 - context)], node << 1 | bit if node else 1
            if span < 1 << 24:
                low, span, shifts = low << 8, span << 8, shifts + 1
    return low.to_bytes(shifts + 5, "big")

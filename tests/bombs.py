"""Small files that promise more than a limit allows, or whose streams go on and end damaged; all checksums right."""

import functools
import zlib
from collections.abc import Iterator

import numpy as np
from mutations import Part, framed, put_together

from tersenet.codecs import CODECS
from tersenet.codecs.context import encode_levels
from tersenet.codecs.context_model import Model
from tersenet.codecs.stream import put_number, zigzag
from tersenet.container import ARRAY, KINDS, NODE, NONE, NUMBER, POOLED, SHARED, TEXT, TUPLE
from tersenet.packed import (
    Bloomier,
    Codebook,
    Factored,
    Hashed,
    Lattice,
    Reshaped,
    Sliced,
    Sparse,
    Transformed,
    Uniform,
)

BOOL, U8, I8, F32, FLOAT32 = 0, 1, 2, 10, 10  # formats of arrays, and the type of a tensor
LARGE = 1_000_000
CONSTANT = b"\0\0"  # of codec "bits": any number of zeros
Parts = list[Part]


def raw(*values: int) -> Part:
    return Part("raw", bytes(values))


def array(shape: tuple[int, ...], form: int = F32, codec: str = "bits", stream: bytes = CONSTANT) -> Parts:
    head = [raw(ARRAY), raw(form), raw(len(shape)), *(Part("number", n) for n in shape)]
    return [*head, raw(list(CODECS).index(codec)), Part("stream", stream)]


def pooled(shape: tuple[int, ...], form: int = U8) -> Parts:
    return [*array(shape, form)[:-2], raw(POOLED)]


def node(kind: type, *fields: Parts) -> Parts:
    return [raw(NODE + KINDS.index(kind)), *(part for field in fields for part in field)]


def number(value: int) -> Parts:
    return [raw(NUMBER), Part("number", zigzag(value))]


def text(value: str) -> Parts:
    return [raw(TEXT), Part("text", value.encode())]


def several(*values: Parts) -> Parts:
    return [raw(TUPLE), Part("number", len(values)), *(part for value in values for part in value)]


def shape(*extents: int) -> Parts:
    return several(*map(number, extents))


NOTHING = [raw(NONE)]


def file(
    *trees: Parts,
    dtype: int = FLOAT32,
    pool: Parts = (),
    notes: bytes = b"",
    more: Parts = (),
    form: str = "deflated",
) -> bytes:
    """A file of tensors with these trees."""
    parts = [Part("number", len(trees))]
    for k, tree in enumerate(trees):
        parts += [Part("number", 0), Part("text", str(k).encode()), raw(dtype), raw(0, 0, 0x7E), *tree]
        parts.append(Part("check", False))
    return put_together([*parts, *pool, Part("text", notes), *more], form)


def section(name: bytes, plain: int, coded: bytes) -> Parts:
    return [Part("text", name), raw(2), Part("number", plain), Part("stream", coded), Part("check", True)]


@functools.cache
def deflated(size: int) -> bytes:
    shrinker = zlib.compressobj(9, zlib.DEFLATED, -15)
    return shrinker.compress(bytes(size)) + shrinker.flush()


def nested(depth: int, size: int) -> Parts:
    """Slices of slices, each of another axis."""
    child = array((1,) * 8)
    for axis in range(depth):
        child = node(Sliced, array((1,), U8), child, number(axis), number(size))
    return child


def tied(count: int, name: int) -> bytes:
    """A tensor, and so many names for it, of so many bytes."""
    head = put_number(count + 1) + b"\0\0" + bytes([U8, 0, 0, 0x7E, ARRAY, U8, 0, POOLED])
    keys = [bytes(64 + (k >> 6 * j & 63) for j in range(4)) for k in range(count)]
    first = bytes([0]) + put_number(name) + keys[0].rjust(name, b"a") + b"\xff\0"
    others = b"".join(put_number(name - 4) + b"\4" + key + b"\xff\0" for key in keys[1:])
    plain = head + first + others + b"\0\2" + zlib.crc32(CONSTANT).to_bytes(4, "little") + b"\0"
    shrinker = zlib.compressobj(6, zlib.DEFLATED, -15)
    return framed(b"\1" + shrinker.compress(plain) + shrinker.flush(), CONSTANT)


def endless() -> Iterator[tuple[str, bytes]]:
    """Of each codec a stream that makes, or promises to make, far more values than it has bytes, and ends damaged."""
    pairs = b"\0\1" + int(f"{4096:025b}{2:03b}0000", 2).to_bytes(4, "big")  # 4,095 and 1 of 4,096 in Elias gamma
    one = bytes([1, 1])  # an alphabet of a symbol of one bit
    yield "bits", b"\0\7" + bytes(100)
    yield "trits", b"\0" + bytes(100)
    yield "huffman", b"\0" + one + bytes(100)
    yield (
        "gaps",
        b"\0" + put_number(LARGE) + put_number(255) + put_number(2 * LARGE) + put_number(102) + one + bytes(100),
    )
    yield "runs", put_number(2 * LARGE) + one + bytes(100)
    yield "rans", pairs + b"\xff" * 1128
    yield "rans-pairs", pairs + b"\xff" * 1128
    yield "context", encode_levels(np.zeros((64, 64), np.int32), Model()) + b"\1\2\3\4" * 9
    for name in ("deflate", "bzip2", "lzma"):
        yield name, CODECS[name].encode(np.resize(np.arange(17, dtype=np.uint8), LARGE + 1))
    yield "zstd", CODECS["zstd"].encode(np.zeros(1000, np.uint8))


def bombs() -> dict[str, bytes]:
    """Each by what it tries."""
    found = {f"a petabyte by {name}": file(array((1 << 50,), U8, name), dtype=U8) for name in CODECS}
    found |= {
        f"streams of {name} that end damaged": file(array((LARGE,), U8, name, stream), dtype=U8)
        for name, stream in endless()
    }
    found["2^40 in one axis"] = file(array((1 << 40,)))
    found["2^40 in one axis of a small file"] = file(array((1 << 40,)), form="small")
    found["a small file whose header expands 1000:1"] = framed(deflated(1 << 25), b"", small=True)
    found["a thousand trees of one array"] = file(
        array((1 << 20,)), *[[raw(SHARED), Part("number", 0)]] * 1000, form="small"
    )
    hashed = (number(1), shape(1 << 28))
    found["a hundred million places of one bucket"] = file(node(Hashed, array((1,)), *hashed))
    found["a lattice of 2^28"] = file(node(Lattice, array((1 << 28,)), number(0), number(1), number(1), shape(1 << 28)))
    found["a product past 64 bits"] = file(array((1 << 40, 1 << 40)))
    found["huge beside zero"] = file(array((0, 1 << 62)))
    found["a row of 11 million"] = file(array((11_000_001,), U8, "context", b"\0\0\1\0"), dtype=U8)
    found["nothing in 2^40 columns"] = file(array((0, 1 << 40), U8, "context", b"\0\0\1\0"), dtype=U8)
    found["80 million floats"] = file(array((80_000_000,)))
    found["a hundred tensors of a million floats"] = file(*[array((1 << 20,))] * 100)
    found["billions of pooled values"] = file(
        *[pooled((1 << 26,))] * 60, dtype=U8, pool=[raw(0), Part("stream", CONSTANT), Part("check", True)]
    )
    found["a billion tensors"] = put_together([Part("number", 10**9), Part("text", bytes(200))])
    found["a header that expands 1000:1"] = framed(b"\1" + deflated(1 << 27), b"")
    found["a header of 16 MiB"] = framed(b"\1" + deflated(1 << 24) + bytes(1 << 19), b"")
    found["two hundred thousand names"] = tied(200_000, 6)
    found["long names"] = tied(20_000, 1000)
    found["a section that says it has a terabyte"] = file(more=[Part("number", 1), *section(b"s", 1 << 40, b"\3\0")])
    found["a section that expands past what it says"] = file(
        more=[Part("number", 1), *section(b"s", 1 << 20, deflated(1 << 27))]
    )
    found["sections that together expand too far"] = file(
        more=[Part("number", 60), *(p for k in range(60) for p in section(bytes([65 + k]), 1 << 24, deflated(1 << 24)))]
    )
    found["notes of brackets"] = file(notes=b"[" * 60_000)
    found["notes of a long number"] = file(notes=b"9" * 60_000)
    vector = array((1 << 20,))
    found["an outer product"] = file(node(Factored, text("a,b->ab"), several(vector, vector), shape(1 << 40)))
    ring, cube = text("abc,bcd,cde,def,efa,fab->"), array((120, 120, 120))
    found["a ring of six cubes"] = file(node(Factored, ring, several(*[cube] * 6), shape()))
    wide = text("ab,ac,ad,ae->bcde")
    found["a result of 10^12"] = file(node(Factored, wide, several(*[array((2, 1000))] * 4), shape(10**12)))
    found["a middle of 10^8"] = file(
        node(Factored, text("ab,cd,bd->ac"), several(array((9999, 2)), array((9999, 2)), array((2, 2))), shape(9999**2))
    )
    found["slices of slices"] = file(nested(6, 1 << 8))
    found["seven nodes deep"] = file(nested(7, 2))
    found["ten thousand nodes deep"] = file([raw(NODE + KINDS.index(Transformed))] * 10_000)
    found["ten thousand tuples deep"] = file([raw(TUPLE), Part("number", 1)] * 10_000)
    found["a slice beside nothing"] = file(node(Sliced, array((0,), U8), array((3, 0)), number(1), number(1 << 61)))
    found["a mask of 2^34"] = file(node(Sparse, array((1 << 17, 1 << 17), BOOL), array((0,))))
    found["codewords of a million"] = file(node(Codebook, array((1 << 20,), U8), array((1, 1 << 20))))
    found["levels of 2^33 by one scale"] = file(node(Uniform, array((1 << 33,), U8), array(()), NOTHING, several()))
    filtered = (number(4), number(1), number(1), shape(1 << 30))
    found["a filter over 2^30 places"] = file(node(Bloomier, array((3,), U8), array((9,)), *filtered))
    found["reshaped to 2^50"] = file(node(Reshaped, array((1 << 50,)), shape(1 << 50), shape(0), shape(1 << 50)))
    found["transforms of 2^40"] = file(node(Transformed, array((1 << 27, 64, 64))))
    found["a thousand steps of a million"] = file(
        *[node(Uniform, array((1 << 20,), I8), array(()), NOTHING, several(*[array((1 << 20,), I8)] * 250))] * 4
    )
    return found

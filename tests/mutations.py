"""Valid files taken apart, changed in their parts, and put together again with every checksum right.

`docs/format.md` is the grammar. A file is a list of parts: numbers, raw bytes, texts, coded streams and checks. What
`mutated` changes are these, so that a change reaches the reader behind the checksums. A case's number makes its file.
"""

import contextlib
import functools
import random
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import floats, path_levels, small_files, trees

from tersenet import FormatError, load
from tersenet.artifact import Artifact, Coding, Section, Tensor
from tersenet.codecs import CODECS
from tersenet.codecs.stream import Reader, Unsuited, put_number
from tersenet.container import (
    ALIAS,
    ARRAY,
    DICTIONARY,
    DTYPES,
    FOOTER,
    KINDS,
    NODE,
    NONE,
    NUMBER,
    POOLED,
    PREAMBLE,
    SHARED,
    SMALL,
    SMALL_FOOTER,
    SMALL_VERSION,
    STAND_IN,
    TEXT,
)
from tersenet.packed import Codebook, Factored, Reshaped, Sliced, Sparse, Transformed, Uniform, parts_of

LIMIT = 1 << 24  # decoded bytes that a mutated file may have
TURNS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 1023, 4095, 4096, 4097, 65535, 65536, (1 << 24) - 1, 1 << 24, 1 << 29)
TURNS += ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 59, 1 << 60, (1 << 62) - 1, 1 << 62, (1 << 63) - 1)
TEXTS = (
    b"",
    b"[" * 60_000,
    b'{"a":' * 9_000,
    b"{}",
    b"null",
    b'{"rules":5}',
    b'{"rules":{"w":[[]]}}',
    b"\xff\xfe{\0}\0",
)
TEXTS += (b"ii->i", b"ab,bc->ac", b"ab,cd->abcd", b"ab,cd->", b"->", b",->", b"abc,bcd,cde,def,efa,fab->", b"\xc3\x28")
TEXTS += (b"9" * 5_000, b'"\\ud800"', b"\0", b"../x", b"a" * 1_024)


class Part(NamedTuple):
    """A "number", "raw" bytes, a "text" behind its length, a "stream" behind its length, or the "check" of the streams
    since the last: where `value` is False only if there are any."""

    kind: str
    value: Any
    told: int | None = None  # the length of a stream, where it is a lie


class Whole(NamedTuple):
    """A file's parts, and where its values begin and end among them."""

    parts: list[Part]
    values: list[tuple[int, int]]
    names: list[str]


def taken_apart(file: bytes) -> Whole:
    """The parts of a valid file."""
    apart = _Apart(file)
    apart.tensors()
    apart.rest()
    assert not apart.reader.left and not apart.streams.left
    return Whole(apart.parts, apart.values, apart.names)


class _Apart:
    def __init__(self, file: bytes) -> None:
        coded, streams, self.small = opened(file)
        if self.small:
            plain = zlib.decompressobj(-15, DICTIONARY).decompress(coded)
        else:
            plain = zlib.decompress(coded[1:], -15) if coded[0] else coded[1:]
        self.reader, self.streams = Reader(plain), Reader(streams)
        self.parts, self.values, self.names, self.pooled = (
            list[Part](),
            list[tuple[int, int]](),
            list[str](),
            set[int](),
        )

    def take(self, kind: str, value: Any) -> Any:
        self.parts.append(Part(kind, value))
        return value

    def number(self) -> int:
        return self.take("number", self.reader.number())

    def byte(self) -> int:
        return self.take("raw", self.reader.take(1))[0]

    def text(self) -> bytes:
        return self.take("text", self.reader.take(self.reader.number()))

    def stream(self) -> None:
        self.take("stream", self.streams.take(self.reader.number()))

    def check(self, always: bool, held: bool = True) -> None:
        self.reader.take(0 if self.small else 4 * held)
        self.take("check", always)

    def tensors(self) -> None:
        name = b""
        for _ in range(self.number()):
            name = name[: self.number()] + self.text()
            self.names.append(name.decode())
            if self.byte() == ALIAS:
                self.number()
                continue
            self.take("raw", self.reader.take(3))
            at = self.streams.at
            self.value()
            self.check(False, self.streams.at > at)

    def value(self) -> None:
        begin, tag = len(self.parts), self.byte()
        if tag == NUMBER:
            self.number()
        elif tag == TEXT:
            self.text()
        elif tag == SHARED:
            self.number()
        elif tag == ARRAY:
            form, rank = self.byte(), self.byte()
            for _ in range(rank):
                self.number()
            if self.byte() == POOLED:
                self.pooled.add(form)
            else:
                self.stream()
        elif tag != NONE:
            for _ in range(len(parts_of(KINDS[tag - NODE])) if tag >= NODE else self.number()):
                self.value()
        self.values.append((begin, len(self.parts)))

    def rest(self) -> None:
        """Pools, notes and sections."""
        for _ in self.pooled:
            self.byte()
            self.stream()
        if self.pooled:
            self.check(True)
        self.text()
        for _ in range(self.number() if self.reader.left else 0):
            self.text()
            self.byte()
            self.number()
            self.stream()
            self.check(True)


def opened(file: bytes) -> tuple[bytes, bytes, bool]:
    """The header as it is coded and the streams of a valid file, and whether it is of the smaller form."""
    if file[5] == SMALL_VERSION:
        reader = Reader(file[:-SMALL_FOOTER], 6)
        return reader.take(reader.number()), reader.rest(), True
    (length,) = struct.unpack("<I", file[6:10])
    return file[PREAMBLE : PREAMBLE + length], file[PREAMBLE + length : -FOOTER], False


def put_together(parts: list[Part], form: str = "plain") -> bytes:
    """The file of these parts with the checksums of what it holds; its form is "plain", "deflated" or "small"."""
    plain, streams, checked = bytearray(), bytearray(), 0
    for part in parts:
        if part.kind == "number":
            plain += put_number(part.value)
        elif part.kind == "raw":
            plain += part.value
        elif part.kind == "text":
            plain += put_number(len(part.value)) + part.value
        elif part.kind == "stream":
            plain += put_number(len(part.value) if part.told is None else part.told)
            streams += part.value
        elif form != "small":
            if part.value or len(streams) > checked:
                plain += struct.pack("<I", zlib.crc32(streams[checked:]))
            checked = len(streams)
    if form == "plain":
        return framed(b"\0" + bytes(plain), bytes(streams))
    shrinker = zlib.compressobj(6, zlib.DEFLATED, -15, 8, 0, DICTIONARY if form == "small" else b"")
    deflated = shrinker.compress(plain) + shrinker.flush()
    return framed(deflated if form == "small" else b"\1" + deflated, bytes(streams), form == "small")


def framed(coded: bytes, streams: bytes, small: bool = False) -> bytes:
    """A file around a header as it is coded and streams, its own checksums right."""
    if small:
        body = b"TERSE\2" + put_number(len(coded)) + coded + streams
        return body + struct.pack("<I", zlib.crc32(body))
    head = b"TERSE\1" + struct.pack("<I", len(coded))
    body = head + struct.pack("<I", zlib.crc32(head + coded)) + coded + streams
    body += struct.pack("<Q", len(body) + FOOTER)
    return body + struct.pack("<I", zlib.crc32(body))


def changed_number(rng: random.Random, value: int) -> int:
    near = (value + 1, max(value - 1, 0), 2 * value, value // 2, value ^ 1 << rng.randrange(63), rng.randrange(1 << 20))
    return min(rng.choice((*TURNS, *near, *near, *near)), (1 << 63) - 1)


def changed_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Bytes with a bit, a byte, a number, or a part of them changed, left out, repeated, or taken from others."""
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    where = rng.randrange(4)
    if where == 0:  # what a stream says of itself stands first
        at, to = (min(k, len(data)) for k in sorted((rng.randrange(8), rng.randrange(8))))
    other = rng.choice(others)
    begin = rng.randrange(len(other) + 1)
    end = begin + rng.randrange(1, 24)
    match rng.randrange(8):
        case 0 | 1 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2 if at < len(data):
            return data[:at] + bytes([rng.choice((0, 1, 127, 128, 254, 255, rng.randrange(256)))]) + data[at + 1 :]
        case 3:
            old = Reader(data, at)
            try:
                value = old.number()
            except FormatError:
                value = 0
            return data[:at] + put_number(changed_number(rng, value)) + data[old.at :]
        case 4:
            return data[:at] if rng.random() < 0.5 else data[to:]
        case 5:
            return data[:to] + data[at:]
        case 6:
            return data[:at] + other[begin:end] + data[min(len(data), at + end - begin) if where else at :]
    return other


def mutated(number: int, seed: int = 0) -> tuple[bytes, str]:
    """The file of this case, and the name of a tensor that the file it was made of holds."""
    rng, files = random.Random(f"{seed} {number}"), corpus()
    parts, values, names = rng.choice(files)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        parts = changed(rng, parts, values if len(parts) >= max(end for _, end in values) else [(1, len(parts))])
    name, kept = rng.choice(names), sum(len(part.value) for part in parts if part.kind == "stream")
    file = put_together(parts, rng.choice(("plain", "deflated", "small", "small") if kept < SMALL // 2 else ("plain",)))
    if rng.random() < 0.9:
        return file, name
    coded, streams, small = opened(file)
    match rng.randrange(3):
        case 0:
            return framed(changed_bytes(rng, coded, [streams]), streams, small), name
        case 1:
            return framed(coded, changed_bytes(rng, streams, [coded]), small), name
    return changed_bytes(rng, file[:18], [file]) + file[18:], name


def changed(rng: random.Random, parts: list[Part], values: list[tuple[int, int]]) -> list[Part]:
    """The parts with one change."""
    files = corpus()
    other, others, _ = rng.choice(files)
    kind = rng.choice(("stream",) * 8 + ("number",) * 5 + ("raw",) * 3 + ("text", "value", "value", "value", "part"))
    begin, end = rng.choice(values)
    if kind == "value":
        first, last = rng.choice(others)
        taken = other[first:last]
        match rng.randrange(4):
            case 0:
                return parts[:begin] + parts[end:]
            case 1:
                return parts[:begin] + taken + parts[begin:]
            case 2:  # under one more node, with what else it needs
                more = [Part("raw", bytes([NODE + rng.randrange(len(KINDS))])), *parts[begin:end]]
                return parts[:begin] + more + taken * rng.randrange(3) + parts[end:]
        return parts[:begin] + taken + parts[end:]
    if kind == "part":
        at = rng.randint(1, len(parts))
        new = rng.choice(([], parts[at : at + 1] * 2, [rng.choice(parts)], [rng.choice(other)]))
        return parts[:at] + new + parts[at + 1 :]
    found = [at for at, part in enumerate(parts) if part.kind == kind]
    if not found:
        return parts
    at = rng.choice(found)
    part = parts[at]
    if kind == "number":
        new = part._replace(value=changed_number(rng, part.value))
    elif kind == "stream" and rng.random() < 0.1:
        new = part._replace(told=changed_number(rng, len(part.value)))
    else:
        streams = [p.value for p in other if p.kind == "stream"] or [b""]
        likely = [*TEXTS] if kind == "text" else streams
        new = part._replace(value=changed_bytes(rng, part.value, likely))
        if kind == "raw":  # fields of a fixed width
            width = len(part.value)
            new = new._replace(value=(new.value + rng.randbytes(width))[:width] if rng.random() < 0.95 else new.value)
    return [*parts[:at], new, *parts[at + 1 :]]


@functools.cache
def corpus() -> list[Whole]:
    """Valid files: small ones of each node, codec and section, golden ones, and such whose streams have many lanes."""
    golden = sorted((Path(__file__).parent / "golden" / "v1").glob("*.terse"))
    files = [*small_files().values(), *(path.read_bytes() for path in golden), *many_lanes(), *nests()]
    return [taken_apart(file) for file in files]


def many_lanes() -> list[bytes]:
    """Files of arrays whose streams have more than one lane."""
    rng = np.random.default_rng(4)
    sparse = np.rint(rng.laplace(0, 2, (12, 300)) * (rng.random(300) < 0.2)).astype(np.int16)
    arrays = {
        "matrix": np.rint(rng.laplace(0, 1, (9, 130))).astype(np.int8),
        "kernels": np.rint(np.abs(rng.laplace(0, 20, (8, 20, 3, 3)))).astype(np.int32),
        "columns": np.where(np.abs(sparse) < 9, sparse, 0),
        "negative": -np.abs(sparse),
        "path": path_levels(16, 12, 3, 3),
        "line": rng.integers(-1, 2, 3072).astype(np.int64),
        "long": np.minimum(rng.geometric(0.5, 33_000), 16).astype(np.uint8),
        "bools": rng.random((8, 300)) < 0.1,
    }
    files = []
    for name, values in arrays.items():
        for codec in ("context", "rans", "rans-pairs", "huffman", "gaps", "runs"):
            try:
                CODECS[codec].encode(values)
            except Unsuited:
                continue
            tree = Sparse(values, floats(int(values.sum()))) if values.dtype == np.bool_ else Uniform(values, floats())
            files.append(Artifact({name: Tensor(tree)}, Coding((codec,))).to_bytes())
    return files


def nests() -> list[bytes]:
    """Files of every type, and of trees with nodes in nodes, with notes, sections and tied names."""
    found, rng = trees(), np.random.default_rng(5)
    mask = np.arange(40) % 5 == 0
    deep = Uniform(np.arange(-4, 4, dtype=np.int8), Sparse(np.arange(8) % 2 == 0, floats(4)))
    deep = Sliced(mask, Reshaped(deep, (4, 2), (1, 0), (8,)), 0, 40)
    deep = Sparse(rng.random((5, 20)) < 0.4, deep)
    deep = Sparse(deep.mask, Codebook(rng.integers(0, 8, int(deep.mask.sum())).astype(np.uint8), floats(8, 1)))
    nested = {
        "deep": Sliced(np.array([1, 3, 4, 5, 9], np.int16), deep, 0, 10),
        "chain": Factored("or,ir,hr,wr->oihw", (floats(4, 3), floats(5, 3), floats(3, 3), floats(3, 3)), (4, 5, 3, 3)),
        "factors": Factored("ab,bc->ac", (found["Sparse"], Transformed(floats(20, 6))), (36,)),
        "frequencies": Transformed(Sliced(np.array([True, False, True]), floats(4, 2, 3), 1, 3)),
        "words": Codebook(np.zeros((3, 4), np.uint64), found["Uniform"]),
    }
    wide, single = np.array([1, -2, 3] * 30), floats(70)
    plain = {kind: Tensor(wide.astype(kind), kind) for kind in DTYPES if kind not in STAND_IN}
    plain |= {
        "bfloat16": Tensor(wide.astype(np.float32) * 2.0**99, "bfloat16"),
        "e4m3": Tensor(np.ones(7, np.uint8), "float8_e4m3fn"),
    }
    plain |= {"float32 in float64": Tensor(single.astype(np.float64), "float64"), "float32": Tensor(single)}
    plain |= {"float64 itself": Tensor(single.astype(np.float64) / 3, "float64")}
    files = [Artifact(plain).to_bytes()]
    for dtype in ("float32", "float16", "float64", "bfloat16"):
        tensors = {f"layer.{name}": Tensor(tree, dtype, "", 0.25) for name, tree in nested.items()}
        tied = {"layer.tied": tensors["layer.deep"]}
        meta = {"metadata": {"format": "pt"}, "rules": {"layer.deep": "conv*"}}
        files.append(Artifact(tensors | tied, meta=meta, sections={"graph": Section(b"graph" * 50)}).to_bytes())
    return files


def outcome(file: bytes, name: str) -> str:
    """What reading a file ends in, the whole of it and one tensor alone: "decoded", or what the refusal says.

    Whatever is neither is raised, and AssertionError where the two disagree or the ledger does not add up.
    """
    try:
        artifact = load(file, limit=LIMIT)
    except FormatError as wrong:
        refusal = str(wrong)
        with contextlib.suppress(FormatError, KeyError):
            load(file, [name], limit=LIMIT)
        assert "allocate" not in refusal and refusal.strip(), refusal  # memory that was not counted
        return refusal
    dense = artifact.unpack()
    assert sum(array.nbytes for array in dense.values()) <= LIMIT * len(dense)
    assert sum(row.total for row in artifact.ledger()) == len(file) and str(artifact)
    for one in list(dense)[:1]:
        alone = load(file, [one], limit=LIMIT).unpack()[one]
        assert alone.dtype == dense[one].dtype and alone.tobytes() == dense[one].tobytes()
    return "decoded"

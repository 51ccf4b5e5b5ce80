"""The bytes of a file: how `docs/format.md` is read and written. Nothing here opens or replaces a file.

Reading never trusts: the header is parsed and every size checked against what is left of the file and against the
limit before anything is allocated; `FormatError` is the only exception that bad bytes raise.
"""

import json
import math
import os
import struct
import sys
import zlib
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from tersenet import codecs, cores
from tersenet.codecs.context import Batch
from tersenet.codecs.stream import FormatError, Reader, put_number, unzigzag, zigzag
from tersenet.packed import DEEPEST, NODES, Array, Packed, Tree, arrays, check_tree, parts_of, unpack

MAGIC, VERSION = b"TERSE", 1
PREAMBLE, FOOTER = 14, 12  # magic, version, header length, header CRC; whole length, whole CRC
HEADER_CAP, NAME_CAP, META_CAP, SECTION_CAP, RANK_CAP = 1 << 24, 1 << 10, 1 << 16, 64, 8
# Decoded bytes: 256 MiB, or 1000 times the file up to 4 GiB, or 64 times a file that is larger.
ALWAYS, EXPANSION, CEILING, LARGE = 1 << 28, 1000, 1 << 32, 64
ALIAS = 255
POOLED_SIZE, POOLED_VECTOR = 64, 1024  # values of arrays, and of vectors, that share the stream of others

# How an array lies in memory and, where that loses nothing, in a narrower type in the file. Only ever append.
FORMATS = [
    ("bool", "bool"), ("uint8", "uint8"), ("int8", "int8"), ("uint16", "uint16"), ("int16", "int16"),
    ("uint32", "uint32"), ("int32", "int32"), ("uint64", "uint64"), ("int64", "int64"),
    ("float16", "float16"), ("float32", "float32"), ("float64", "float64"),
    ("float32", "float16"), ("float32", "bfloat16"), ("float64", "float32"),
]  # fmt: skip
WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64",
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
FLOATS = ("float16", "float32", "float64", "bfloat16")  # what may be packed; 8-bit floats are kept as bytes
# What holds a type that NumPy has not: float32 whose values are bfloat16's, and the bytes of 8-bit floats.
STAND_IN = {name: "float32" if name == "bfloat16" else "uint8" for name in DTYPES[12:]}
# Why a tensor is as it is. Only ever append.
NOTES = [
    "",
    "dense: no stage packed it",
    "dense: fewer weights than packing would save",
    "dense: a buffer, kept bit for bit",
    "dense: not a floating-point tensor",
    "dense: NaN or infinite values",
    "dense: left out by the recipe",
    "dense: empty",
    "dense: smaller than its codebook",
    "dense: 8-bit floats, kept bit for bit",
    "folded: its scale went into the layer before it",
    "dense: kept by a rule",
    "dense: no result depends on it, so what its method needs is not known",
]


@dataclass(frozen=True)
class Coding:
    """How integer arrays become bytes: which codecs may be used, and whether size or decoding speed decides."""

    codecs: tuple[str, ...] = codecs.DEFAULT
    prefer: str = "size"

    def __post_init__(self) -> None:
        if unknown := set(self.codecs) - set(codecs.CODECS):
            raise ValueError(f"unknown codec {sorted(unknown)[0]!r}; there are {', '.join(codecs.CODECS)}")
        if self.prefer not in ("size", "speed"):
            raise ValueError(f"prefer is 'size' or 'speed', not {self.prefer!r}")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a network: its tree, the type it had, why it is as it is, and its error against the original.

    `error` is the relative L2 error ||w - packed|| / ||w||, or None where nobody measured it.
    """

    tree: Tree
    dtype: str = "float32"
    note: str = ""
    error: float | None = None

    def unpack(self) -> Array:
        """The dense NumPy array in the tensor's own type, or its `STAND_IN`: bfloat16's values as float32."""
        dense = np.asarray(unpack(self.tree))
        if self.dtype == "float16" and isinstance(self.tree, Packed):
            dense = np.asarray(np.clip(dense, -65504, 65504))  # what packing moved past the largest half is no infinity
        return as_type(dense, self.dtype)


def as_type(dense: Array, dtype: str) -> Array:
    """An array rounded to a tensor's type, ties to even, or to the values of its `STAND_IN`; itself where it is so."""
    with np.errstate(over="ignore"):
        single = dense.astype(STAND_IN.get(dtype, dtype), copy=False)
    if dtype != "bfloat16":
        return single
    words = single.view(np.uint32).reshape(-1)
    low = words & np.uint32(0xFFFF)
    if not low.any():
        return single
    rounded = (words + np.uint32(0x7FFF) + (words >> 16 & 1)) & np.uint32(0xFFFF0000)
    quiet = words & np.uint32(0xFFFF0000) | np.uint32(0x400000)  # rounding would make some NaN a zero
    rounded = np.where(np.isnan(single).reshape(-1) & (low > 0), quiet, rounded)
    return rounded.view(np.float32).reshape(single.shape)


@dataclass(slots=True)
class Promise:
    """An array that is not decoded yet: what the header says of it and where its bytes are.

    Where `codec` is POOLED it is part of the pool of its format, from the value `offset` on.
    """

    shape: tuple[int, ...]
    form: int
    codec: int
    length: int
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return IN_MEMORY[self.form]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Source:
    """Random access to the file's bytes."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        raise TypeError("a source says how it is read")


class Memory(Source):
    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class File(Source):
    def __init__(self, file: Any) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        data: bytes = self.file.read(length)
        return data


class Section(NamedTuple):
    """Named bytes beside the tensors; a reader that does not know a section that is `required` refuses the file."""

    data: bytes
    required: bool = False


@dataclass(slots=True)
class SectionPlace:
    """A section that is not read yet: whether it is required and deflated, its lengths, its place and its CRC-32."""

    flags: int
    plain: int
    length: int
    offset: int
    check: int


@dataclass(slots=True)
class Entry:
    """What the header says of a tensor's bytes: its arrays in the order of the file, CRC-32 of its own streams."""

    promises: list[Promise]
    check: int
    header: int  # bytes of its part of the plain header


@dataclass
class Header:
    tensors: dict[str, Tensor]
    entries: dict[str, Entry]
    pools: list[Promise]  # the small arrays of each format, as one
    pools_check: int
    meta: dict[str, Any]
    sections: dict[str, SectionPlace]
    plain: int
    coded: int
    needed: int  # bytes in memory once all is decoded and unpacked, and 8 for each integer of the longest stream
    total: int

    @staticmethod
    def read(data: Source, limit: int | None) -> "Header":
        if data.size < PREAMBLE + FOOTER:
            raise FormatError("not a tersenet file: it is too short")
        preamble = data.read(0, PREAMBLE)
        if preamble[:5] != MAGIC:
            raise FormatError("not a tersenet file: it does not begin with TERSE")
        if preamble[5] > VERSION:
            raise FormatError(f"the file has format version {preamble[5]}, newer than {VERSION}: update tersenet")
        length, crc = struct.unpack("<II", preamble[6:])
        if preamble[5] != VERSION or length > min(HEADER_CAP, data.size - PREAMBLE - FOOTER):
            raise FormatError("the file is truncated or damaged in its first bytes")
        coded = data.read(PREAMBLE, length)
        if zlib.crc32(preamble[:10] + coded) != crc:
            raise FormatError("the header is damaged: its checksum does not fit")
        header = _parse(_plain(coded), PREAMBLE + length, length)
        if header.total != data.size:
            raise FormatError("the file's length is not what its header says: it is truncated or has bytes added")
        usual = max(ALWAYS, min(CEILING, EXPANSION * data.size), LARGE * data.size)
        allowed = usual if limit is None else limit
        if header.needed > allowed:
            raise FormatError(
                f"the file would decode to {header.needed:,} bytes, over the limit of {allowed:,}:"
                f" if you trust it, load(path, limit={header.needed})"
            )
        return header

    def check_whole(self, data: Source) -> None:
        check, at = 0, 0
        while at < data.size - 4:
            chunk = data.read(at, min(1 << 24, data.size - 4 - at))
            if not chunk:
                raise FormatError("the file ended while it was read")
            check, at = zlib.crc32(chunk, check), at + len(chunk)
        length, crc = struct.unpack("<QI", data.read(data.size - FOOTER, FOOTER))
        if length != data.size or crc != check:
            raise FormatError("the file is damaged: its checksum does not fit")


def _expanded(coded: int) -> int:
    """How many bytes a deflated header may expand to: many small tensors alike repeat themselves."""
    return min(HEADER_CAP, 32 * coded + (1 << 16))


def _plain(coded: bytes) -> bytes:
    if coded[:1] == b"\0":
        return coded[1:]
    if coded[:1] != b"\1":
        raise FormatError("the header is of an unknown kind")
    expander = zlib.decompressobj(-15)
    try:
        plain = expander.decompress(coded[1:], _expanded(len(coded) - 1))
    except zlib.error:
        raise FormatError("the header is damaged") from None
    if not expander.eof or expander.unused_data:
        raise FormatError("the header is damaged or expands too far")
    return plain


def _parse(plain: bytes, offset: int, coded: int) -> Header:
    parser = _Parser(plain, offset)
    count = parser.number()
    if count > parser.left:
        raise FormatError("the header says it has more tensors than it has bytes")
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    order: list[str] = []
    name = b""
    for _ in range(count):
        begin = parser.at
        shared = parser.number(len(name) + 1)
        name = name[:shared] + parser.take(parser.number(NAME_CAP + 1 - shared))
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise FormatError("a tensor's name is not UTF-8") from None
        if text in tensors:
            raise FormatError(f"two tensors are named {text!r}")
        code = parser.byte()
        if code == ALIAS:
            at = parser.number()
            if at >= len(order):
                raise FormatError(f"{text}: tied to a tensor that is not there")
            tensors[text], other = tensors[order[at]], entries[order[at]]
            entries[text] = Entry(other.promises, other.check, parser.at - begin)
        else:
            tensors[text] = parser.tensor(text, code)
            check = parser.take(4) if any(p.length for p in parser.promises) else bytes(4)
            entries[text] = Entry(parser.promises, int.from_bytes(check, "little"), parser.at - begin)
        order.append(text)
    pools = parser.pools()
    check = parser.take(4) if pools else bytes(4)
    try:
        meta = json.loads(parser.take(parser.number(META_CAP)) or b"{}")
    except ValueError:
        raise FormatError("the header's notes are not JSON") from None
    sections = parser.sections() if parser.left else {}
    if parser.left or not isinstance(meta, dict):
        raise FormatError("the header is longer than its tensors")
    sizes = len(plain), coded, parser.needed + 8 * parser.longest, parser.offset + FOOTER
    return Header(tensors, entries, pools, int.from_bytes(check, "little"), meta, sections, *sizes)


REQUIRED, DEFLATED = 1, 2  # flags of a section
KNOWN = frozenset[str]()  # required sections that this version understands
NONE, NUMBER, TEXT, TUPLE, ARRAY, NODE = range(6)
KINDS, CODED = tuple(NODES.values()), tuple(codecs.CODECS)
POOLED = 127  # in place of a codec
CONTEXT = CODED.index("context")
IN_MEMORY = tuple(np.dtype(held) for held, _ in FORMATS)
INTEGERS = tuple(WIDTH.get(stored, 1) for _, stored in FORMATS)  # that codecs see for a value: a float's bytes
MISFIT = (ValueError, TypeError, AttributeError, IndexError)  # what a node of parts that do not belong together raises


class _Parser(Reader):
    """Reads trees. Streams lie back to back in the order of the header, small arrays in the pool of their format."""

    def __init__(self, plain: bytes, offset: int) -> None:
        super().__init__(plain)
        self.offset, self.needed, self.longest = offset, 0, 0
        self.promises: list[Promise] = []  # of the tensor that is read
        self.pooled: Counter[int] = Counter()  # how many values the pool of each format holds
        self.heads: dict[bytes, tuple[tuple[int, ...], int, int]] = {}  # of arrays that were read: shape, codec, size

    def tensor(self, name: str, code: int) -> Tensor:
        note, error = struct.unpack("<Be", self.take(3))
        if code >= len(DTYPES) or note >= len(NOTES):
            raise FormatError(f"{name}: unknown type or note")
        self.promises = []
        try:
            tree = self.value(0, 0)
            shape = tree.shape
        except FormatError:
            raise
        except MISFIT as wrong:
            raise FormatError(f"{name}: the tree does not fit together: {wrong}") from None
        packed = isinstance(tree, Packed)
        dtype = DTYPES[code]
        fits = dtype in FLOATS if packed else str(tree.dtype) == STAND_IN.get(dtype, dtype)
        if not fits or len(shape) > RANK_CAP:
            raise FormatError(f"{name}: the tensor's type is not its array's")
        if packed and dtype != "float32":  # unpacking makes float32 first
            self.needed += max(4, WIDTH[dtype]) * math.prod(shape)
        return Tensor(tree, dtype, NOTES[note], None if math.isnan(error) else error)

    def value(self, depth: int, nodes: int) -> Any:
        tag = self.byte()
        if tag == ARRAY:
            return self.array()
        if tag >= NODE:
            if tag - NODE >= len(KINDS):
                raise FormatError("a tree has a node that this version does not know")
            if nodes == DEEPEST:
                raise FormatError(f"a tree is at most {DEEPEST} nodes deep")
            kind = KINDS[tag - NODE]
            node = kind(*[self.value(depth + 1, nodes + 1) for _ in parts_of(kind)])
            node.check()
            self.needed += 4 * math.prod(node.shape)
            return node
        if tag == NONE:
            return None
        if tag == NUMBER:
            return unzigzag(self.number())
        if tag == TEXT:
            return self.take(self.number(1 << 10)).decode()
        if depth > 8:
            raise FormatError("a tree is too deep")
        return tuple([self.value(depth + 1, nodes) for _ in range(self.number(min(256, self.left + 1)))])

    def array(self) -> Promise:
        begin = self.at
        form, rank = self.data[begin], self.data[begin + 1]
        head = self.data[begin : begin + 3 + rank]  # whole where every number of it takes one byte, as nearly all do
        if head in self.heads:
            self.at = begin + len(head)
            shape, codec, size = self.heads[head]
        else:
            shape, codec, size = self.head()
            if self.at == begin + len(head):
                self.heads[head] = shape, codec, size
        self.needed += size * IN_MEMORY[form].itemsize
        if codec == POOLED:
            promise = Promise(shape, form, codec, 0, self.pooled[form])
            self.pooled[form] += size
        else:
            promise = Promise(shape, form, codec, self.number(), self.offset)
            self.offset += promise.length
            self.longest = max(self.longest, size * INTEGERS[form])
        self.promises.append(promise)
        return promise

    def head(self) -> tuple[tuple[int, ...], int, int]:
        form, rank = self.take(2)
        if form >= len(FORMATS) or rank > RANK_CAP:
            raise FormatError("an array has an unknown type or too many axes")
        *axes, codec = [self.number() for _ in range(rank + 1)]
        size = math.prod(axes)
        if size >= 1 << 60 or (not size and math.prod([n or 1 for n in axes]) >= 1 << 60):
            raise FormatError("an array has too many values")
        if codec >= len(CODED) and codec != POOLED:
            raise FormatError("an array has an unknown codec")
        return tuple(axes), codec, size

    def pools(self) -> list[Promise]:
        found = []
        for form, count in sorted(self.pooled.items()):
            codec, length = self.byte(), self.number()
            if codec >= len(CODED):
                raise FormatError("an array has an unknown codec")
            found.append(Promise((count,), form, codec, length, self.offset))
            self.offset += length
            self.longest = max(self.longest, count * INTEGERS[form])
        return found

    def sections(self) -> dict[str, SectionPlace]:
        found: dict[str, SectionPlace] = {}
        count = self.number(min(SECTION_CAP, self.left))
        for _ in range(count):
            try:
                name = self.take(self.number(NAME_CAP)).decode()
            except UnicodeDecodeError:
                raise FormatError("a section's name is not UTF-8") from None
            flags, plain, length = self.byte(), self.number(), self.number()
            check = int.from_bytes(self.take(4), "little")
            if name in found or flags > REQUIRED | DEFLATED or (not flags & DEFLATED and plain != length):
                raise FormatError(f"the section {name!r} is named twice, or of an unknown kind")
            if flags & REQUIRED and name not in KNOWN:
                raise FormatError(f"the file needs its section {name!r} to be understood: update tersenet")
            found[name] = SectionPlace(flags, plain, length, self.offset, check)
            self.offset += length
            self.needed += plain
        if not found:
            raise FormatError("the header is longer than its tensors")
        return found


def sections_of(header: Header, data: Source) -> dict[str, Section]:
    """The bytes of every section."""
    found: dict[str, Section] = {}
    for name, held in header.sections.items():
        coded = data.read(held.offset, held.length)
        if zlib.crc32(coded) != held.check:
            raise FormatError(f"the section {name!r} is damaged")
        if held.flags & DEFLATED:
            expander = zlib.decompressobj(-15)
            try:
                plain = expander.decompress(coded, held.plain + 1)
            except zlib.error:
                raise FormatError(f"the section {name!r} is damaged") from None
            if len(plain) != held.plain or not expander.eof or expander.unused_data:
                raise FormatError(f"the section {name!r} is damaged")
            coded = plain
        found[name] = Section(coded, bool(held.flags & REQUIRED))
    return found


THREADS = 1 if sys.platform == "emscripten" else min(4, cores.usable())  # a browser's Python has none to start
WORTH_A_THREAD = 1 << 14  # integers beside the largest array
Job = tuple[str, Promise, bytes]  # a tensor's name, an array of it, and the array's stream


def decoded(header: Header, names: Sequence[str], data: Source) -> dict[str, Tensor]:
    """The named tensors with their arrays; tied names share one."""
    unique = {id(header.tensors[name]): name for name in reversed(names)}.values()
    coded: list[Job] = []
    if any(p.codec == POOLED for name in unique for p in header.entries[name].promises):
        coded += _streams("(small arrays)", header.pools, header.pools_check, data)
    for name in unique:
        coded += _streams(name, header.entries[name].promises, header.entries[name].check, data)
    arrays = _arrays(coded)
    pools = {pool.form: arrays[id(pool)] for pool in header.pools if id(pool) in arrays}
    found: dict[int, Tensor] = {}
    for name in unique:
        tensor = header.tensors[name]
        ready = [
            arrays[id(p)] if p.codec != POOLED else pools[p.form][p.offset : p.offset + p.size].reshape(p.shape)
            for p in header.entries[name].promises
        ]
        try:
            tree = _filled(tensor.tree, iter(ready))
        except ValueError as wrong:
            raise FormatError(f"{name}: {wrong}") from None
        found[id(tensor)] = Tensor(tree, tensor.dtype, tensor.note, tensor.error)
    return {name: found[id(header.tensors[name])] for name in names}


def _streams(name: str, promises: list[Promise], check: int, data: Source) -> list[Job]:
    """The arrays that have bytes of their own, which lie side by side in the file."""
    own = [p for p in promises if p.codec != POOLED]
    first = own[0].offset if own else 0
    whole = data.read(first, sum([p.length for p in own]))
    if zlib.crc32(whole) != check:
        raise FormatError(f"{name}: its bytes are damaged")
    return [(name, p, whole[p.offset - first : p.offset - first + p.length]) for p in own]


def _arrays(coded: list[Job]) -> dict[int, Array]:
    """Every promised array by the promise's id, decoded on as many threads as are worth it: the C core frees Python.

    Context-coded streams are decoded in one call for each thread, which then need not wait for each other's Python.
    """
    coded.sort(key=lambda job: -job[1].size)
    shared: list[Job] = []
    others: list[Job] = []
    for job in coded:
        (shared if job[1].codec == CONTEXT and job[1].dtype.kind != "f" else others).append(job)
    batch = _named("(all arrays)", Batch, [(stream, promise.shape, promise.dtype) for _, promise, stream in shared])
    rest = iter(others)
    found: dict[int, Array] = {}
    ended: SimpleQueue[Exception | None] = SimpleQueue()

    def decode() -> None:
        try:
            batch.run()
            for name, promise, stream in rest:  # each thread takes the next
                found[id(promise)] = _named(name, _array, promise, stream)
            ended.put(None)
        except Exception as error:
            ended.put(error)

    few = sum([promise.size for _, promise, _ in coded[1:]]) < WORTH_A_THREAD
    threads = 1 if few else THREADS
    for _ in range(threads - 1):
        start_new_thread(decode, ())  # a threading.Thread would have us wait until it runs
    decode()
    for _ in range(threads):
        if wrong := ended.get():
            raise wrong
    for at, (name, promise, _) in enumerate(shared):
        found[id(promise)] = _named(name, batch.array, at)
    return found


def _filled(tree: Any, ready: Iterator[Array]) -> Any:
    """The tree with the next array in place of each promise, in the order in which they were parsed.

    Raises ValueError where integers point at what is not there.
    """
    if isinstance(tree, Promise):
        return next(ready)
    if isinstance(tree, Packed):
        node = type(tree)(*[_filled(getattr(tree, part), ready) for part in parts_of(type(tree))])
        node.check_values()
        return node
    return tuple([_filled(value, ready) for value in tree]) if isinstance(tree, tuple) else tree


BROKEN = (ValueError, OverflowError, IndexError, MemoryError)  # what decoding garbled bytes may raise


def _named(name: str, decode: Callable[..., Array], *given: Any) -> Array:
    """What `decode` returns; bad bytes raise `FormatError` with the tensor's name."""
    try:
        return decode(*given)
    except FormatError as wrong:
        raise FormatError(f"{name}: {wrong}") from None
    except BROKEN as wrong:
        raise FormatError(f"{name}: cannot be decoded: {wrong}") from None


def _array(promise: Promise, coded: bytes) -> Array:
    codec, dtype = CODED[promise.codec], promise.dtype
    if dtype.kind != "f":
        return codecs.decode(codec, coded, promise.shape, dtype)
    stored = FORMATS[promise.form][1]
    width = WIDTH[stored]
    planes = codecs.decode(codec, coded, (width * promise.size,), np.dtype(np.uint8))
    raw = np.ascontiguousarray(planes.reshape(width, promise.size).T)
    if stored == "bfloat16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(f"<f{width}")
    return values.reshape(promise.shape).astype(dtype)


# ---------------------------------------------------------------- writing


def write(
    tensors: Mapping[str, Tensor], coding: Coding, notes: Mapping[str, Any], sections: Mapping[str, Section]
) -> bytes:
    """The whole file."""
    plain, begun = bytearray(put_number(len(tensors))), list[int]()
    streams = _Streams(coding)
    streams.prepare([array for tensor in tensors.values() for _, array in arrays(tensor.tree)])
    first: dict[int, int] = {}
    last = b""
    for name, tensor in tensors.items():
        text = name.encode()
        if len(text) > NAME_CAP:
            raise ValueError(f"{name[:40]}...: a tensor's name has at most {NAME_CAP} bytes")
        shared = next((i for i, (a, b) in enumerate(zip(last, text)) if a != b), min(len(last), len(text)))
        plain += put_number(shared) + put_number(len(text) - shared) + text[shared:]
        last = text
        if id(tensor) in first:
            plain += bytes([ALIAS]) + put_number(first[id(tensor)])
        else:
            plain += _tensor_header(name, tensor, streams)
        first.setdefault(id(tensor), len(begun))
        begun.append(len(plain))
    plain += streams.pools()
    meta = json.dumps(dict(notes), separators=(",", ":"), sort_keys=True).encode() if notes else b""
    if len(meta) >= META_CAP:
        raise ValueError(f"the notes of a file have at most {META_CAP} bytes")
    plain += put_number(len(meta)) + meta + _section_headers(sections, streams)
    deflated = _deflated(plain)
    small = len(deflated) < len(plain) <= _expanded(len(deflated))
    coded = b"\1" + deflated if small else b"\0" + bytes(plain)
    if max(len(coded), len(plain)) > HEADER_CAP:
        raise ValueError(f"the header would be over {HEADER_CAP:,} bytes")
    head = MAGIC + bytes([VERSION]) + struct.pack("<I", len(coded))
    own = struct.pack("<I", zlib.crc32(head + coded))
    parts: list[bytes | bytearray] = [head, own, coded, streams.data]  # joined once: files are large
    parts.append(struct.pack("<Q", sum(map(len, parts)) + FOOTER))
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return b"".join([*parts, struct.pack("<I", check)])


class _Streams:
    """The coded arrays, and the pools of small ones that wait for the end."""

    def __init__(self, coding: Coding) -> None:
        self.coding, self.data = coding, bytearray()
        self.pooled: dict[int, list[Array]] = {}  # flat arrays by format
        self.ready: dict[int, tuple[str, bytes]] = {}  # what was coded ahead, by the array's id

    def prepare(self, listed: Sequence[Array]) -> None:
        """Code large integer arrays ahead, on as many threads as are worth it."""
        large = {id(a): a for a in map(np.asarray, listed) if a.dtype.kind != "f" and a.size >= WORTH_A_THREAD}
        if THREADS > 1 and len(large) > 1:
            from concurrent.futures import ThreadPoolExecutor  # which readers need not wait for

            with ThreadPoolExecutor(THREADS) as pool:
                order = sorted(large, key=lambda key: -large[key].size)
                self.ready = dict(zip(order, pool.map(lambda key: self._coded(large[key]), order), strict=True))

    def array(self, array: Array) -> bytes:
        """Take an array in; its header."""
        if array.dtype.kind == "f":
            stored, raw = _narrowest(array)
        else:
            stored, raw = str(array.dtype), array
        form = FORMATS.index((str(array.dtype), stored))
        head = bytes([ARRAY, form, array.ndim]) + b"".join(put_number(n) for n in array.shape)
        if _small(array):
            self.pooled.setdefault(form, []).append(raw if stored in WIDTH else raw.reshape(-1))
            return head + bytes([POOLED])
        return head + self.stream(_planes(raw) if stored in WIDTH else raw)

    def stream(self, values: Array) -> bytes:
        """Code integers; the codec and the length."""
        codec, coded = self.ready.get(id(values)) or self._coded(values)
        self.data += coded
        return bytes([CODED.index(codec)]) + put_number(len(coded))

    def _coded(self, values: Array) -> tuple[str, bytes]:
        return codecs.encode(values, self.coding.codecs, self.coding.prefer)

    def pools(self) -> bytes:
        """Code what has waited; the header of the pools."""
        begin, head = len(self.data), b""
        for _, parts in sorted(self.pooled.items()):
            head += self.stream(_planes(np.concatenate(parts)))
        return head + self.check(begin) if self.pooled else b""

    def check(self, begin: int) -> bytes:
        """CRC-32 of what was coded since."""
        return struct.pack("<I", zlib.crc32(memoryview(self.data)[begin:]))


def _section_headers(sections: Mapping[str, Section], streams: _Streams) -> bytes:
    if len(sections) > SECTION_CAP:
        raise ValueError(f"a file has at most {SECTION_CAP} sections")
    head = put_number(len(sections)) if sections else b""
    for name, section in sections.items():
        text, coded = name.encode(), _deflated(section.data)
        if len(text) > NAME_CAP:
            raise ValueError(f"{name[:40]}...: a section's name has at most {NAME_CAP} bytes")
        flags = REQUIRED * section.required | DEFLATED * (len(coded) < len(section.data))
        coded = coded if flags & DEFLATED else section.data
        head += put_number(len(text)) + text + bytes([flags]) + put_number(len(section.data))
        head += put_number(len(coded)) + struct.pack("<I", zlib.crc32(coded))
        streams.data += coded
    return head


def _deflated(data: bytes | bytearray) -> bytes:
    shrinker = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return shrinker.compress(data) + shrinker.flush()


def _small(array: Array) -> bool:
    """Whether an array shares the stream of others: too few values for a codec to know them by, or a vector.

    A constant costs two bytes in a stream of its own.
    """
    axes = sum(n > 1 for n in array.shape)
    if array.size > (POOLED_VECTOR if axes < 2 else POOLED_SIZE) or not array.size:
        return False
    return array.dtype.kind == "f" or bool((array != array.flat[0]).any())


def _tensor_header(name: str, tensor: Tensor, streams: _Streams) -> bytes:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: cannot store a tensor of type {tensor.dtype}; convert it or leave it out")
    if len(tensor.tree.shape) > RANK_CAP:
        raise ValueError(f"{name}: a tensor has at most {RANK_CAP} axes")
    packed, held = isinstance(tensor.tree, Packed), STAND_IN.get(tensor.dtype, tensor.dtype)
    kind = type(tensor.tree).__name__ if packed else np.asarray(tensor.tree).dtype
    if not (tensor.dtype in FLOATS if packed else np.can_cast(kind, held, "same_kind")):
        raise ValueError(f"{name}: a tensor of type {tensor.dtype} cannot be held as {kind}")
    try:
        check_tree(tensor.tree)
    except ValueError as wrong:
        raise ValueError(f"{name}: {wrong}") from None
    head = bytes([DTYPES.index(tensor.dtype), NOTES.index(tensor.note)]) + struct.pack("<e", _bound(tensor.error))
    begin = len(streams.data)
    head += _value_header(tensor.tree if packed else tensor.unpack(), streams)
    return head + streams.check(begin) if len(streams.data) > begin else head


def _bound(error: float | None) -> np.float16:
    """The smallest half that is no less than an error, so that no error is worse than the file says."""
    with np.errstate(over="ignore"):
        half = np.float16(np.nan if error is None else error)
    return half if error is None or float(half) >= error else np.nextafter(half, np.float16(np.inf))


def _value_header(value: Any, streams: _Streams) -> bytes:
    if value is None:
        return bytes([NONE])
    if isinstance(value, int):
        return bytes([NUMBER]) + put_number(zigzag(value))
    if isinstance(value, str):
        return bytes([TEXT]) + put_number(len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return bytes([TUPLE]) + put_number(len(value)) + b"".join(_value_header(v, streams) for v in value)
    if isinstance(value, Packed):
        parts = (_value_header(getattr(value, name), streams) for name in parts_of(type(value)))
        return bytes([NODE + list(NODES).index(type(value).__name__)]) + b"".join(parts)
    return streams.array(np.asarray(value))


def _planes(raw: Array) -> Array:
    """Bytes [values, width] as all first bytes, all second bytes, ..."""
    return np.ascontiguousarray(raw.T).reshape(-1)


def _narrowest(array: Array) -> tuple[str, Array]:
    """The narrowest type that keeps every bit of a float array, and its little-endian raw bytes [values, width]."""
    flat = np.ascontiguousarray(array).reshape(-1)
    stored, raw = str(flat.dtype), flat.astype(flat.dtype.newbyteorder("<"))
    if flat.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = flat.astype("<f2")
        words = flat.astype("<f4").view("<u4")
        if np.array_equal(half.astype("<f4").view("<u4"), words):
            stored, raw = "float16", half
        elif not (words & 0xFFFF).any():
            stored, raw = "bfloat16", (words >> 16).astype("<u2")
    elif flat.dtype == np.float64:
        with np.errstate(over="ignore"):
            single = flat.astype("<f4")
        if np.array_equal(single.astype("<f8").view("<u8"), flat.astype("<f8").view("<u8")):
            stored, raw = "float32", single
    return stored, raw.view(np.uint8).reshape(flat.size, WIDTH[stored])

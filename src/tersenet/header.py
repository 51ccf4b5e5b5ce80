"""How a file's header is read: nothing is trusted, and nothing allocated before every size is checked.

Each size is held against what is left of the file and against the limit; `FormatError` is the only exception that bad
bytes raise.
"""

import json
import math
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersenet.access import Source
from tersenet.codecs.stream import FormatError, Reader, unzigzag
from tersenet.container import (
    ALIAS,
    ALWAYS,
    ARRAY,
    CEILING,
    CODED,
    DEFLATED,
    DICTIONARY,
    DTYPES,
    EACH,
    EXPANSION,
    FLOATS,
    FOOTER,
    FORMATS,
    HEADER_CAP,
    IN_MEMORY,
    INTEGERS,
    KINDS,
    LARGE,
    MAGIC,
    MANY,
    META_CAP,
    NAME_CAP,
    NAMES_CAP,
    NODE,
    NONE,
    NOTES,
    NUMBER,
    OBJECTS,
    POOLED,
    PREAMBLE,
    RANK_CAP,
    REQUIRED,
    SECTION_CAP,
    SHARED,
    SMALL,
    SMALL_FOOTER,
    SMALL_VERSION,
    STAND_IN,
    TEXT,
    VERSION,
    WIDTH,
    Tensor,
    expanded,
    inflated,
)
from tersenet.packed import DEEPEST, Packed, parts_of

UPDATE = "update"  # the section of a file whose tensors are changes
KNOWN = frozenset({UPDATE})  # required sections that this version understands
MISFIT = (ValueError, TypeError, AttributeError, IndexError)  # what a node of parts that do not belong together raises


@dataclass(slots=True)
class Promise:
    """An array that is not decoded yet: what the header says of it and where its bytes are.

    Where `codec` is POOLED it is part of the pool of its format, from the value `offset` on; else its bytes are among
    those of the tensor `owner`, the first that holds it.
    """

    owner: str
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


@dataclass(slots=True)
class SectionPlace:
    """A section that is not read yet: whether it is required and deflated, its lengths, its place and its CRC-32."""

    flags: int
    plain: int
    length: int
    offset: int
    check: int | None


@dataclass(slots=True)
class Entry:
    """What the header says of a tensor's bytes: its arrays in the order of its tree, CRC-32 of its own streams."""

    promises: list[Promise]
    check: int | None  # None where they were checked with the whole file
    header: int  # bytes of its part of the plain header


@dataclass
class Header:
    tensors: dict[str, Tensor]
    entries: dict[str, Entry]
    pools: list[Promise]  # the small arrays of each format, as one
    pools_check: int | None
    meta: dict[str, Any]
    sections: dict[str, SectionPlace]
    plain: int
    coded: int
    needed: int  # bytes in memory once all is decoded and unpacked, with what its largest stream takes beside
    total: int

    @staticmethod
    def read(data: Source, limit: int | None) -> "Header":
        preamble = data.read(0, PREAMBLE)
        if len(preamble) <= 2 * len(MAGIC):
            raise FormatError("not a tersenet file: it is too short")
        if preamble[:5] != MAGIC:
            raise FormatError("not a tersenet file: it does not begin with TERSE")
        if preamble[5] > SMALL_VERSION:
            raise FormatError(f"the file has format version {preamble[5]}, newer than {SMALL_VERSION}: update tersenet")
        usual = max(ALWAYS, min(CEILING, EXPANSION * data.size), LARGE * data.size)
        allowed = usual if limit is None else limit
        header = _small(data, allowed) if preamble[5] == SMALL_VERSION else _large(data, preamble, allowed)
        if header.total != data.size:
            raise FormatError("the file's length is not what its header says: it is truncated or has bytes added")
        _allow(header.needed, allowed)
        return header


def _allow(needed: int, allowed: int) -> None:
    if needed > allowed:
        raise FormatError(
            f"the file would decode to {needed:,} bytes, over the limit of {allowed:,}:"
            f" if you trust it, load(path, limit={needed})"
        )


def _large(data: Source, preamble: bytes, allowed: int) -> Header:
    length, crc = struct.unpack("<II", preamble[6:].ljust(8, b"\xff"))
    if preamble[5] != VERSION or length > min(HEADER_CAP, data.size - PREAMBLE - FOOTER):
        raise FormatError("the file is truncated or damaged in its first bytes")
    coded = data.read(PREAMBLE, length)
    if zlib.crc32(preamble[:10] + coded) != crc:
        raise FormatError("the header is damaged: its checksum does not fit")
    return _parse(_plain(coded, allowed), PREAMBLE + length, length, data.size, False)


def _small(data: Source, allowed: int) -> Header:
    if data.size > SMALL:
        raise FormatError("the file is damaged or has bytes added: it is larger than a small file")
    whole = data.read(0, data.size)
    if zlib.crc32(whole[:-SMALL_FOOTER]) != int.from_bytes(whole[-SMALL_FOOTER:], "little"):
        raise FormatError("the file is truncated, damaged or has bytes added: its checksum does not fit")
    reader = Reader(whole[:-SMALL_FOOTER], len(MAGIC) + 1)
    coded = reader.take(reader.number())
    plain = inflated(coded, min(expanded(len(coded)), allowed // OBJECTS), DICTIONARY)
    return _parse(plain, reader.at, len(coded), data.size, True)


def _plain(coded: bytes, allowed: int) -> bytes:
    """The header as it is parsed, if there is memory for what that makes of it."""
    if coded[:1] == b"\0":
        _allow(OBJECTS * (len(coded) - 1), allowed)
        return coded[1:]
    if coded[:1] != b"\1":
        raise FormatError("the header is of an unknown kind")
    return inflated(coded[1:], min(expanded(len(coded) - 1), allowed // OBJECTS))


def _parse(plain: bytes, offset: int, coded: int, size: int, small: bool) -> Header:
    parser = _Parser(plain, offset, small)
    count = parser.number()
    if count > min(parser.left, max(MANY, size // EACH)):
        raise FormatError(f"the header says it has {count:,} tensors, too many for its bytes")
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    order: list[str] = []
    name, named = b"", 0
    for _ in range(count):
        begin = parser.at
        shared = parser.number(len(name) + 1)
        name = name[:shared] + parser.take(parser.number(NAME_CAP + 1 - shared))
        named += len(name)
        if named > NAMES_CAP:
            raise FormatError(f"the names of the tensors have over {NAMES_CAP:,} bytes")
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
            check = parser.check(any(p.length for p in parser.promises if p.owner == text))
            entries[text] = Entry(parser.promises, check, parser.at - begin)
        order.append(text)
    pools = parser.pools()
    check = parser.check(bool(pools))
    try:
        meta = json.loads(parser.take(parser.number(1 + META_CAP)) or b"{}")
    except (ValueError, RecursionError):  # brackets in brackets
        raise FormatError("the header's notes are not JSON") from None
    sections = parser.sections() if parser.left else {}
    if parser.left or not isinstance(meta, dict):
        raise FormatError("the header is longer than its tensors")
    needed, total = OBJECTS * len(plain) + parser.needed + parser.beside, parser.offset
    sizes = len(plain), coded, needed, total + (SMALL_FOOTER if small else FOOTER)
    return Header(tensors, entries, pools, check, meta, sections, *sizes)


class _Parser(Reader):
    """Reads trees. Streams lie back to back in the order of the header, small arrays in the pool of their format."""

    def __init__(self, plain: bytes, offset: int, small: bool) -> None:
        super().__init__(plain)
        self.offset, self.small, self.needed, self.beside = offset, small, 0, 0
        self.name, self.promises = "", list[Promise]()  # of the tensor that is read
        self.described: list[Promise] = []  # all arrays of the file, each once
        self.pooled: Counter[int] = Counter()  # how many values the pool of each format holds
        self.heads: dict[bytes, tuple[tuple[int, ...], int, int]] = {}  # of arrays that were read: shape, codec, size

    def tensor(self, name: str, code: int) -> Tensor:
        note, error = struct.unpack("<Be", self.take(3))
        if code >= len(DTYPES) or note >= len(NOTES):
            raise FormatError(f"{name}: unknown type or note")
        self.name, self.promises = name, []
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
        if tag == SHARED:
            promise = self.described[self.number(len(self.described))]
            self.needed += promise.size * promise.dtype.itemsize  # as if it were stored again: it may be copied
            self.promises.append(promise)
            return promise
        if tag >= NODE:
            if tag - NODE >= len(KINDS):
                raise FormatError("a tree has a node that this version does not know")
            if nodes == DEEPEST:
                raise FormatError(f"a tree is at most {DEEPEST} nodes deep")
            kind = KINDS[tag - NODE]
            node = kind(*[self.value(depth + 1, nodes + 1) for _ in parts_of(kind)])
            node.check()
            self.needed += 4 * node.room()
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
            promise = Promise(self.name, shape, form, codec, 0, self.pooled[form])
            self.pooled[form] += size
        else:
            promise = Promise(self.name, shape, form, codec, self.number(), self.offset)
            self.offset += promise.length
            self.streamed(form, codec, size)
        self.described.append(promise)
        self.promises.append(promise)
        return promise

    def streamed(self, form: int, codec: int, size: int) -> None:
        """Count what decoding a stream takes beside its array."""
        self.beside = max(self.beside, size * INTEGERS[form] * (24 if CODED[codec] == "context" else 8))

    def check(self, coded: bool) -> int | None:
        """The CRC-32 of what was coded, 0 of nothing; a small file has none, for it is checked as a whole."""
        if self.small:
            return None
        return int.from_bytes(self.take(4), "little") if coded else 0

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
            found.append(Promise("", (count,), form, codec, length, self.offset))
            self.offset += length
            self.streamed(form, codec, count)
        return found

    def sections(self) -> dict[str, SectionPlace]:
        found: dict[str, SectionPlace] = {}
        count = self.number(1 + min(SECTION_CAP, self.left))
        for _ in range(count):
            try:
                name = self.take(self.number(1 + NAME_CAP)).decode()
            except UnicodeDecodeError:
                raise FormatError("a section's name is not UTF-8") from None
            flags, plain, length = self.byte(), self.number(), self.number()
            check = self.check(True)
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

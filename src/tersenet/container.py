"""The bytes of a file: how `docs/format.md` is read and written. Nothing here opens or replaces a file.

Reading never trusts: the header is parsed and every size checked against what is left of the file and against the
limit before anything is allocated; `FormatError` is the only exception that bad bytes raise.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersenet import codecs
from tersenet.codecs.stream import FormatError, Reader, put_number, unzigzag, zigzag
from tersenet.packed import (
    NODES,
    Array,
    Packed,
    Tree,
    arrays,
    check_tree,
    check_tree_values,
    map_arrays,
    parts_of,
    unpack,
)

MAGIC, VERSION = b"TERSE", 1
PREAMBLE, FOOTER = 14, 12  # magic, version, header length, header CRC; whole length, whole CRC
HEADER_CAP, NAME_CAP, META_CAP, RANK_CAP = 1 << 24, 1 << 10, 1 << 16, 8
EXPANSION, ALWAYS, CEILING = 1000, 1 << 24, 1 << 32  # decoded bytes: 1000 x the file or 16 MiB, and at most 4 GiB
ALIAS = 255

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
    "bfloat16",
]  # fmt: skip
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
        """The dense NumPy array in the tensor's own type (float32 for bfloat16, which NumPy has not)."""
        dense = np.asarray(unpack(self.tree))
        return dense.astype("float32" if self.dtype == "bfloat16" else self.dtype, copy=False)


@dataclass(frozen=True)
class Promise:
    """An array that is not decoded yet: what the header says of it and where its bytes are."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: str
    codec: str
    length: int
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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


@dataclass
class Header:
    tensors: dict[str, Tensor]
    sizes: dict[str, int]  # bytes of each tensor's part of the plain header
    checks: dict[str, int]  # CRC-32 of each tensor's streams
    meta: dict[str, Any]
    plain: int
    coded: int
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
        allowed = min(CEILING, max(ALWAYS, EXPANSION * data.size)) if limit is None else limit
        needed = sum(_decoded_size(t.tree) for t in {id(t): t for t in header.tensors.values()}.values())
        if needed > allowed:
            raise FormatError(f"the file would decode to {needed:,} bytes, over the limit of {allowed:,}")
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


def _plain(coded: bytes) -> bytes:
    if coded[:1] == b"\0":
        return coded[1:]
    if coded[:1] != b"\1":
        raise FormatError("the header is of an unknown kind")
    expander = zlib.decompressobj(-15)
    try:
        plain = expander.decompress(coded[1:], min(HEADER_CAP, 32 * len(coded) + 4096))
    except zlib.error:
        raise FormatError("the header is damaged") from None
    if not expander.eof or expander.unused_data:
        raise FormatError("the header is damaged or expands too far")
    return plain


def _parse(plain: bytes, offset: int, coded: int) -> Header:
    reader = Reader(plain)
    count = reader.number()
    if count > reader.left:
        raise FormatError("the header says it has more tensors than it has bytes")
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    checks: dict[str, int] = {}
    order: list[tuple[Tensor, int]] = []
    name = b""
    streams = _Streams(offset)
    for _ in range(count):
        begin = reader.at
        shared = reader.number(len(name) + 1)
        name = name[:shared] + reader.take(reader.number(NAME_CAP + 1 - shared))
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise FormatError("a tensor's name is not UTF-8") from None
        if text in tensors:
            raise FormatError(f"two tensors are named {text!r}")
        tensors[text], checks[text] = tensor, _ = _parse_tensor(reader, order, streams, text)
        order.append((tensor, checks[text]))
        sizes[text] = reader.at - begin
    try:
        meta = json.loads(reader.take(reader.number(META_CAP)) or b"{}")
    except ValueError:
        raise FormatError("the header's notes are not JSON") from None
    if reader.left or not isinstance(meta, dict):
        raise FormatError("the header is longer than its tensors")
    return Header(tensors, sizes, checks, meta, len(plain), coded, streams.offset + FOOTER)


def _parse_tensor(
    reader: Reader, order: list[tuple[Tensor, int]], streams: "_Streams", name: str
) -> tuple[Tensor, int]:
    code = reader.byte()
    if code == ALIAS:
        at = reader.number()
        if at >= len(order):
            raise FormatError(f"{name}: tied to a tensor that is not there")
        return order[at]
    note = reader.byte()
    (error,) = struct.unpack("<e", reader.take(2))
    if code >= len(DTYPES) or note >= len(NOTES):
        raise FormatError(f"{name}: unknown type or note")
    tree = _parse_value(reader, streams, 0)
    (check,) = struct.unpack("<I", reader.take(4))
    try:
        check_tree(tree)
        shape = tree.shape
    except (ValueError, TypeError, AttributeError, IndexError) as wrong:
        raise FormatError(f"{name}: the tree does not fit together: {wrong}") from None
    whole = not isinstance(tree, Packed) and DTYPES[code] not in (str(tree.dtype), "bfloat16")
    if whole or len(shape) > RANK_CAP or (isinstance(tree, Packed) and "float" not in DTYPES[code]):
        raise FormatError(f"{name}: the tensor's type is not its array's")
    return Tensor(tree, DTYPES[code], NOTES[note], None if math.isnan(error) else error), check


class _Streams:
    """Hands out the offsets of the streams, which lie back to back in the order of the header."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def place(self, length: int) -> int:
        self.offset += length
        return self.offset - length


NONE, NUMBER, TEXT, TUPLE, ARRAY, NODE = range(6)
KINDS, CODED = tuple(NODES.values()), tuple(codecs.CODECS)


def _parse_value(reader: Reader, streams: _Streams, depth: int) -> Any:
    tag = reader.byte()
    if depth > 8:
        raise FormatError("a tree is too deep")
    if tag == NONE:
        return None
    if tag == NUMBER:
        return unzigzag(reader.number())
    if tag == TEXT:
        try:
            return reader.take(reader.number(1 << 10)).decode()
        except UnicodeDecodeError:
            raise FormatError("a text is not UTF-8") from None
    if tag == TUPLE:
        return tuple(_parse_value(reader, streams, depth + 1) for _ in range(reader.number(min(256, reader.left + 1))))
    if tag == ARRAY:
        return _parse_array(reader, streams)
    if tag - NODE >= len(NODES):
        raise FormatError("a tree has a node that this version does not know")
    node = KINDS[tag - NODE]
    return node(*(_parse_value(reader, streams, depth + 1) for _ in parts_of(node)))


def _parse_array(reader: Reader, streams: _Streams) -> Promise:
    form, rank = reader.byte(), reader.byte()
    if form >= len(FORMATS) or rank > RANK_CAP:
        raise FormatError("an array has an unknown type or too many axes")
    shape = tuple(reader.number() for _ in range(rank))
    codec, length = reader.byte(), reader.number()
    if codec >= len(codecs.CODECS) or math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise FormatError("an array has an unknown codec or too many values")
    held, stored = FORMATS[form]
    return Promise(shape, np.dtype(held), stored, CODED[codec], length, streams.place(length))


def _decoded_size(tree: Tree) -> int:
    """Bytes in memory while this tree is decoded and unpacked, counted at the width that codecs work in."""
    held: int = sum(math.prod(a.shape) * max(4, a.dtype.itemsize) for _, a in arrays(tree))
    return held + 4 * math.prod(tree.shape) + sum(4 * math.prod(t.shape) for t in _nodes(tree))


def _nodes(tree: Tree) -> Iterator[Packed]:
    if isinstance(tree, Packed):
        for name in parts_of(type(tree)):
            value = getattr(tree, name)
            for child in value if isinstance(value, tuple) else (value,):
                if isinstance(child, Packed):
                    yield child
                    yield from _nodes(child)


def decoded(header: Header, names: Sequence[str], data: Source) -> dict[str, Tensor]:
    """The named tensors with their arrays; tied names share one."""
    named = {id(header.tensors[name]): name for name in reversed(names)}
    found = {key: _filled(name, header.tensors[name], header.checks[name], data) for key, name in named.items()}
    return {name: found[id(header.tensors[name])] for name in names}


BROKEN = (ValueError, OverflowError, IndexError, MemoryError)  # what decoding garbled bytes may raise


def _filled(name: str, tensor: Tensor, check: int, data: Source) -> Tensor:
    promises = [promise for _, promise in arrays(tensor.tree)]
    first = min((p.offset for p in promises), default=0)
    whole = data.read(first, sum(p.length for p in promises))
    if zlib.crc32(whole) != check:
        raise FormatError(f"{name}: its bytes are damaged")

    def read(path: str, promise: Promise) -> Array:
        begin = promise.offset - first
        try:
            return _decode_array(promise, whole[begin : begin + promise.length])
        except FormatError as wrong:
            raise FormatError(f"{name}: {wrong}") from None
        except BROKEN as wrong:
            raise FormatError(f"{name}: {path or 'the tensor'} cannot be decoded: {wrong}") from None

    tree = map_arrays(tensor.tree, read)
    try:
        check_tree_values(tree)
    except ValueError as wrong:
        raise FormatError(f"{name}: {wrong}") from None
    return Tensor(tree, tensor.dtype, tensor.note, tensor.error)


def _decode_array(promise: Promise, coded: bytes) -> Array:
    if promise.dtype.kind != "f":
        return codecs.decode(promise.codec, coded, promise.shape, promise.dtype)
    width, count = WIDTH[promise.stored], math.prod(promise.shape)
    planes = codecs.decode(promise.codec, coded, (width * count,), np.dtype(np.uint8))
    raw = np.ascontiguousarray(planes.reshape(width, count).T)
    if promise.stored == "bfloat16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(f"<f{width}")
    return values.reshape(promise.shape).astype(promise.dtype)


# ---------------------------------------------------------------- writing


def write(tensors: Mapping[str, Tensor], coding: Coding, notes: Mapping[str, Any]) -> bytes:
    """The whole file."""
    plain, streams, begun = bytearray(put_number(len(tensors))), bytearray(), list[int]()
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
            plain += _tensor_header(name, tensor, coding, streams)
        first.setdefault(id(tensor), len(begun))
        begun.append(len(plain))
    meta = json.dumps(dict(notes), separators=(",", ":"), sort_keys=True).encode() if notes else b""
    if len(meta) >= META_CAP:
        raise ValueError(f"the notes of a file have at most {META_CAP} bytes")
    plain += put_number(len(meta)) + meta
    shrinker = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    deflated = shrinker.compress(plain) + shrinker.flush()
    small = len(deflated) < len(plain) <= 32 * len(deflated)
    coded = b"\1" + deflated if small else b"\0" + bytes(plain)
    if max(len(coded), len(plain)) > HEADER_CAP:
        raise ValueError(f"the header would be over {HEADER_CAP:,} bytes")
    head = MAGIC + bytes([VERSION]) + struct.pack("<I", len(coded))
    body = head + struct.pack("<I", zlib.crc32(head + coded)) + coded + bytes(streams)
    body += struct.pack("<Q", len(body) + FOOTER)
    return body + struct.pack("<I", zlib.crc32(body))


def _tensor_header(name: str, tensor: Tensor, coding: Coding, streams: bytearray) -> bytes:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: cannot store a tensor of type {tensor.dtype}; convert it or leave it out")
    if len(tensor.tree.shape) > RANK_CAP:
        raise ValueError(f"{name}: a tensor has at most {RANK_CAP} axes")
    try:
        check_tree(tensor.tree)
    except ValueError as wrong:
        raise ValueError(f"{name}: {wrong}") from None
    error = np.float16(np.nan if tensor.error is None else min(tensor.error, 65504.0))
    head = bytes([DTYPES.index(tensor.dtype), NOTES.index(tensor.note)]) + struct.pack("<e", error)
    begin = len(streams)
    tree = _value_header(tensor.tree, coding, streams)
    return head + tree + struct.pack("<I", zlib.crc32(memoryview(streams)[begin:]))


def _value_header(value: Any, coding: Coding, streams: bytearray) -> bytes:
    if value is None:
        return bytes([NONE])
    if isinstance(value, int):
        return bytes([NUMBER]) + put_number(zigzag(value))
    if isinstance(value, str):
        return bytes([TEXT]) + put_number(len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return bytes([TUPLE]) + put_number(len(value)) + b"".join(_value_header(v, coding, streams) for v in value)
    if isinstance(value, Packed):
        parts = (_value_header(getattr(value, name), coding, streams) for name in parts_of(type(value)))
        return bytes([NODE + list(NODES).index(type(value).__name__)]) + b"".join(parts)
    return _array_header(np.asarray(value), coding, streams)


def _array_header(array: Array, coding: Coding, streams: bytearray) -> bytes:
    held = str(array.dtype)
    if array.dtype.kind == "f":
        stored, raw = _narrowest(array)
        values = np.ascontiguousarray(raw.view(np.uint8).reshape(array.size, WIDTH[stored]).T).reshape(-1)
    else:
        stored, values = held, array
    codec, coded = codecs.encode(values, coding.codecs, coding.prefer)
    streams += coded
    head = bytes([ARRAY, FORMATS.index((held, stored)), array.ndim]) + b"".join(put_number(n) for n in array.shape)
    number = list(codecs.CODECS).index(codec)
    return head + bytes([number]) + put_number(len(coded))


def _narrowest(array: Array) -> tuple[str, Array]:
    """The narrowest type that keeps every bit of a float array, and its little-endian raw bytes."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = flat.astype("<f2")
        words = flat.astype("<f4").view("<u4")
        if np.array_equal(half.astype("<f4").view("<u4"), words):
            return "float16", half
        if not (words & 0xFFFF).any():
            return "bfloat16", (words >> 16).astype("<u2")
    if flat.dtype == np.float64:
        with np.errstate(over="ignore"):
            single = flat.astype("<f4")
        if np.array_equal(single.astype("<f8").view("<u8"), flat.astype("<f8").view("<u8")):
            return "float32", single
    return str(flat.dtype), flat.astype(flat.dtype.newbyteorder("<"))

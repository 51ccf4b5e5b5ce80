"""How a file is written: the same tensors and coding give the same bytes."""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from tersenet import codecs, container
from tersenet.codecs.stream import put_number, zigzag
from tersenet.container import (
    ALIAS,
    ARRAY,
    CODED,
    DEFLATED,
    DTYPES,
    FLOATS,
    FOOTER,
    FORMATS,
    HEADER_CAP,
    MAGIC,
    META_CAP,
    NAME_CAP,
    NODE,
    NONE,
    NOTES,
    NUMBER,
    POOLED,
    POOLED_SIZE,
    POOLED_VECTOR,
    RANK_CAP,
    REQUIRED,
    SECTION_CAP,
    STAND_IN,
    TEXT,
    TUPLE,
    VERSION,
    WIDTH,
    Coding,
    Section,
    Tensor,
    expanded,
    groups,
)
from tersenet.packed import NODES, Array, Packed, arrays, check_tree, parts_of

COPIED = 1 << 24  # bytes of a file that are copied at a time


def write(
    tensors: Mapping[str, Tensor],
    coding: Coding,
    notes: Mapping[str, Any],
    sections: Mapping[str, Section],
    file: BinaryIO,
) -> bytes:
    """Code the streams into an empty file, holding some tensors at a time; the bytes that stand before them."""
    plain, begun = bytearray(put_number(len(tensors))), list[int]()
    streams = _Streams(coding)
    first: dict[int, int] = {}
    last = b""
    for name, tensor in _prepared(tensors, streams):
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
            streams.flush(file)
        first.setdefault(id(tensor), len(begun))
        begun.append(len(plain))
    plain += streams.pools()
    meta = json.dumps(dict(notes), separators=(",", ":"), sort_keys=True).encode() if notes else b""
    if len(meta) >= META_CAP:
        raise ValueError(f"the notes of a file have at most {META_CAP} bytes")
    plain += put_number(len(meta)) + meta + _section_headers(sections, streams)
    streams.flush(file)
    deflated = _deflated(plain)
    small = len(deflated) < len(plain) <= expanded(len(deflated))
    coded = b"\1" + deflated if small else b"\0" + bytes(plain)
    if max(len(coded), len(plain)) > HEADER_CAP:
        raise ValueError(f"the header would be over {HEADER_CAP:,} bytes")
    head = MAGIC + bytes([VERSION]) + struct.pack("<I", len(coded))
    return head + struct.pack("<I", zlib.crc32(head + coded)) + coded


def pieces(head: bytes, file: BinaryIO) -> Iterator[bytes]:
    """The whole file, some bytes at a time: the head, the streams that `write` put into a file, the end."""
    check, size = zlib.crc32(head), len(head)
    yield head
    file.seek(0)
    while piece := file.read(COPIED):
        check, size = zlib.crc32(piece, check), size + len(piece)
        yield piece
    end = struct.pack("<Q", size + FOOTER)
    yield end + struct.pack("<I", zlib.crc32(end, check))


def _prepared(tensors: Mapping[str, Tensor], streams: "_Streams") -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, the large arrays of each group coded ahead."""
    for group in groups(tensors):
        streams.prepare([array for tensor in group.values() for _, array in arrays(tensor.tree)])
        yield from group.items()
        streams.ready = {}  # it goes by ids, which other arrays may get


class _Streams:
    """The coded arrays, and the pools of small ones that wait for the end."""

    def __init__(self, coding: Coding) -> None:
        self.coding, self.data = coding, bytearray()
        self.pooled: dict[int, list[Array]] = {}  # flat arrays by format
        self.ready: dict[int, tuple[str, bytes]] = {}  # what was coded ahead, by the array's id

    def prepare(self, listed: Sequence[Array]) -> None:
        """Code large integer arrays ahead, on as many threads as are worth it."""
        large = {
            id(a): a for a in map(np.asarray, listed) if a.dtype.kind != "f" and a.size >= container.WORTH_A_THREAD
        }
        if container.THREADS > 1 and len(large) > 1:
            from concurrent.futures import ThreadPoolExecutor  # which readers need not wait for

            with ThreadPoolExecutor(container.THREADS) as pool:
                order = sorted(large, key=lambda key: -large[key].size)
                self.ready = dict(zip(order, pool.map(lambda key: self._coded(large[key]), order), strict=True))

    def flush(self, file: BinaryIO) -> None:
        """Move what was coded into a file."""
        file.write(self.data)
        self.data.clear()

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

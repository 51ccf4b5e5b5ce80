"""How a file is written: the same tensors and coding give the same bytes."""

import json
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from tersenet import codecs, container
from tersenet.codecs.stream import put_number, zigzag
from tersenet.container import (
    ALIAS,
    ARRAY,
    CODED,
    DEFLATED,
    DICTIONARY,
    DTYPES,
    EACH,
    FLOATS,
    FOOTER,
    FORMATS,
    HEADER_CAP,
    MAGIC,
    MANY,
    META_CAP,
    NAME_CAP,
    NAMES_CAP,
    NODE,
    NONE,
    NOTES,
    NUMBER,
    POOLED,
    POOLED_SIZE,
    POOLED_VECTOR,
    RANK_CAP,
    REQUIRED,
    RISING,
    SECTION_CAP,
    SHARED,
    SMALL,
    SMALL_FOOTER,
    SMALL_VERSION,
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
    in_order,
)
from tersenet.packed import NODES, Array, Packed, arrays, check_tree, parts_of

COPIED = 1 << 24  # bytes of a file that are copied at a time
PALETTE = 64  # floats from which on it pays to tell those that rise by their distances


def write(
    tensors: Mapping[str, Tensor],
    coding: Coding,
    notes: Mapping[str, Any],
    sections: Mapping[str, Section],
    file: BinaryIO,
) -> bytes:
    """Code the streams into an empty file, holding some tensors at a time; the bytes that stand before them."""
    if sum(len(name.encode()) for name in tensors) > NAMES_CAP:
        raise ValueError(f"the names of a file's tensors have at most {NAMES_CAP:,} bytes together")
    records: list[tuple[bytes, bytes]] = [(put_number(len(tensors)), b"")]  # of the header, each with its CRC-32
    streams = _Streams(coding)
    first: dict[int, int] = {}
    last = b""
    for number, (name, tensor) in enumerate(_prepared(tensors, streams)):
        text = name.encode()
        if len(text) > NAME_CAP:
            raise ValueError(f"{name[:40]}...: a tensor's name has at most {NAME_CAP} bytes")
        shared = next((i for i, (a, b) in enumerate(zip(last, text)) if a != b), min(len(last), len(text)))
        records.append((put_number(shared) + put_number(len(text) - shared) + text[shared:], b""))
        last = text
        if id(tensor) in first:
            records.append((bytes([ALIAS]) + put_number(first[id(tensor)]), b""))
        else:
            records.append(_tensor_header(name, tensor, streams))
            streams.flush(file)
        first.setdefault(id(tensor), number)
    records.append(streams.pools())
    meta = json.dumps(dict(notes), separators=(",", ":"), sort_keys=True).encode() if notes else b""
    if len(meta) > META_CAP:
        raise ValueError(f"the notes of a file have at most {META_CAP} bytes")
    records += [(put_number(len(meta)) + meta, b""), *_section_headers(sections, streams)]
    streams.flush(file)
    head = _small_head(records, file.tell()) or _large_head(records)
    size = written(head, file)
    if len(tensors) > (most := max(MANY, size // EACH)):
        raise ValueError(f"a file of {size:,} bytes holds at most {most:,} tensors")
    return head


def written(head: bytes, file: BinaryIO) -> int:
    """The size of the whole file, when `write` has put its streams into a file."""
    return len(head) + file.tell() + (SMALL_FOOTER if _is_small(head) else FOOTER)


def _is_small(head: bytes) -> bool:
    return head[len(MAGIC)] == SMALL_VERSION


def _small_head(records: Sequence[tuple[bytes, bytes]], streams: int) -> bytes | None:
    """The head of a file with one check for all of it, where it is small enough with so many bytes of streams."""
    if streams > SMALL:
        return None
    plain = b"".join(record for record, _ in records)
    coded = _deflated(plain, DICTIONARY)
    head = MAGIC + bytes([SMALL_VERSION]) + put_number(len(coded)) + coded
    fits = len(head) + streams + SMALL_FOOTER <= SMALL and len(plain) <= expanded(len(coded))
    return head if fits else None


def _large_head(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    plain = b"".join(record + check for record, check in records)
    deflated = _deflated(plain)
    small = len(deflated) < len(plain) <= expanded(len(deflated))
    coded = b"\1" + deflated if small else b"\0" + plain
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
    end = b"" if _is_small(head) else struct.pack("<Q", size + FOOTER)
    yield end + struct.pack("<I", zlib.crc32(end, check))


def _prepared(tensors: Mapping[str, Tensor], streams: "_Streams") -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, the large arrays of each group coded ahead."""
    for group in groups(tensors):
        streams.prepare([array for tensor in group.values() for _, array in arrays(tensor.tree)])
        yield from group.items()
        streams.alone, streams.ready = {}, {}  # which go by ids, that other arrays may get


class _Streams:
    """The coded arrays, and the pools of small ones that wait for the end."""

    def __init__(self, coding: Coding) -> None:
        self.coding, self.data = coding, bytearray()
        self.pooled: dict[int, list[Array]] = {}  # flat arrays by format
        self.alone: dict[int, Array] = {}  # what has a stream of its own, by its id, kept while that is asked for
        self.ready: dict[int, tuple[bytes, bytes]] = {}
        self.taken = 0  # arrays
        self.known: dict[int, tuple[int, Callable[[], Array | None]]] = {}  # their numbers by ids, while they live

    def prepare(self, listed: Sequence[Array]) -> None:
        """Code arrays ahead, on as many threads as are worth it."""
        new = (np.asarray(a) for a in listed if self._number(a) is None)
        found = (a for a in new if a.dtype in container.IN_MEMORY and not _small(a))
        self.alone = {id(a): a for a in sorted(found, key=lambda a: -a.size)}
        if container.CORES > 1 and sum(a.size for a in self.alone.values()) >= container.WORTH_A_THREAD:
            from concurrent.futures import ThreadPoolExecutor  # which readers need not wait for

            with ThreadPoolExecutor(container.CORES) as pool:
                self.ready = dict(zip(self.alone, pool.map(self._coded, self.alone.values()), strict=True))

    def flush(self, file: BinaryIO) -> None:
        """Move what was coded into a file."""
        file.write(self.data)
        self.data.clear()

    def array(self, given: Array) -> bytes:
        """Take an array in; its header."""
        if (number := self._number(given)) is not None:
            return bytes([SHARED]) + put_number(number)
        held = weakref.ref(given) if isinstance(given, np.ndarray) else lambda: given  # a number
        self.known[id(given)] = self.taken, held
        self.taken += 1
        array = np.asarray(given)
        if _small(array):
            stored, raw = _narrowest(array)
            self.pooled.setdefault(_form(array, stored), []).append(raw if stored in WIDTH else raw.reshape(-1))
            return _array_header(array, stored) + bytes([POOLED])
        head, coded = self.ready.get(id(array)) or self._coded(array)
        self.data += coded
        return head

    def _number(self, given: Array) -> int | None:
        """The number of an array that was taken in; its id alone may be that of one that is gone."""
        number, held = self.known.get(id(given), (0, lambda: None))
        return number if held() is given else None

    def _coded(self, array: Array) -> tuple[bytes, bytes]:
        """An array's header and its stream."""
        stored, raw = _narrowest(array)
        head, coded = self._stream(_planes(raw) if stored in WIDTH else raw)
        return _array_header(array, stored) + head, coded

    def _stream(self, values: Array) -> tuple[bytes, bytes]:
        """The codec and the length, and the bytes."""
        codec, coded = codecs.encode(values, self.coding.codecs, self.coding.prefer)
        return bytes([CODED.index(codec)]) + put_number(len(coded)), coded

    def pools(self) -> tuple[bytes, bytes]:
        """Code what has waited; the header of the pools, and its CRC-32."""
        begin, head = len(self.data), b""
        for _, parts in sorted(self.pooled.items()):
            own, coded = self._stream(_planes(np.concatenate(parts)))
            head += own
            self.data += coded
        return head, self.check(begin)

    def check(self, begin: int) -> bytes:
        """CRC-32 of what was coded since, if anything was."""
        return struct.pack("<I", zlib.crc32(memoryview(self.data)[begin:])) if len(self.data) > begin else b""


def _section_headers(sections: Mapping[str, Section], streams: _Streams) -> list[tuple[bytes, bytes]]:
    if len(sections) > SECTION_CAP:
        raise ValueError(f"a file has at most {SECTION_CAP} sections")
    heads = [(put_number(len(sections)) if sections else b"", b"")]
    for name, section in sections.items():
        text, coded = name.encode(), _deflated(section.data)
        if len(text) > NAME_CAP:
            raise ValueError(f"{name[:40]}...: a section's name has at most {NAME_CAP} bytes")
        flags = REQUIRED * section.required | DEFLATED * (len(coded) < len(section.data))
        coded = coded if flags & DEFLATED else section.data
        head = put_number(len(text)) + text + bytes([flags]) + put_number(len(section.data)) + put_number(len(coded))
        heads.append((head, struct.pack("<I", zlib.crc32(coded))))
        streams.data += coded
    return heads


def _deflated(data: bytes, dictionary: bytes = b"") -> bytes:
    shrinker = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary)
    return shrinker.compress(data) + shrinker.flush()


def _small(array: Array) -> bool:
    """Whether an array shares the stream of others: too few values for a codec to know them by, or a vector.

    A constant costs two bytes in a stream of its own.
    """
    axes = sum(n > 1 for n in array.shape)
    if array.size > (POOLED_VECTOR if axes < 2 else POOLED_SIZE) or not array.size:
        return False
    return array.dtype.kind == "f" or bool((array != array.flat[0]).any())


def _tensor_header(name: str, tensor: Tensor, streams: _Streams) -> tuple[bytes, bytes]:
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
    return head, streams.check(begin)


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
    return streams.array(value)


def _array_header(array: Array, stored: str) -> bytes:
    return bytes([ARRAY, _form(array, stored), array.ndim]) + b"".join(put_number(n) for n in array.shape)


def _form(array: Array, stored: str) -> int:
    return FORMATS.index((str(array.dtype), stored))


def _planes(raw: Array) -> Array:
    """Bytes [values, width] as all first bytes, all second bytes, ..."""
    return np.ascontiguousarray(raw.T).reshape(-1)


def _rises(order: Array) -> bool:
    """Whether none of the numbers is below the one before."""
    return bool((order[1:] >= order[:-1]).all())


def _narrowest(array: Array) -> tuple[str, Array]:
    """The narrowest type that keeps every bit of a float array, and its little-endian raw bytes [values, width].

    Other arrays are what they are.
    """
    if array.dtype.kind != "f":
        return str(array.dtype), array
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
        elif flat.size >= PALETTE and _rises(in_order(words[:PALETTE])) and _rises(order := in_order(words)):
            stored, raw = RISING, np.diff(order, prepend=np.uint32(0)).astype("<u4")
    elif flat.dtype == np.float64:
        with np.errstate(over="ignore"):
            single = flat.astype("<f4")
        if np.array_equal(single.astype("<f8").view("<u8"), flat.astype("<f8").view("<u8")):
            stored, raw = "float32", single
    return stored, raw.view(np.uint8).reshape(flat.size, WIDTH[stored])

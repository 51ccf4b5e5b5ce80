"""How the arrays of a file are decoded, once its header was read."""

import functools
import threading
import zlib
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import numpy as np

from tersenet import codecs, container
from tersenet.access import Source
from tersenet.codecs.context import Batch
from tersenet.codecs.stream import FormatError
from tersenet.container import (
    CODED,
    DEFLATED,
    FORMATS,
    POOLED,
    REQUIRED,
    RISING,
    WIDTH,
    Section,
    Tensor,
    from_order,
    inflated,
)
from tersenet.deferred import Deferred
from tersenet.header import Header, Promise
from tersenet.packed import Array, Packed, Tree, parts_of

CONTEXT = CODED.index("context")
Job = tuple[str, Promise, bytes]  # a tensor's name, an array of it, and the array's stream


def sections_of(header: Header, data: Source) -> dict[str, Section]:
    """The bytes of every section."""
    found: dict[str, Section] = {}
    for name, held in header.sections.items():
        coded = data.read(held.offset, held.length)
        if held.check is not None and zlib.crc32(coded) != held.check:
            raise FormatError(f"the section {name!r} is damaged")
        if held.flags & DEFLATED:
            coded = _named(f"the section {name!r}", inflated, coded, held.plain)
        if len(coded) != held.plain:
            raise FormatError(f"the section {name!r} is damaged")
        found[name] = Section(coded, bool(held.flags & REQUIRED))
    return found


def decoded(header: Header, names: Sequence[str], data: Source) -> dict[str, Tensor]:
    """The named tensors with their arrays; tied names share one."""
    unique = {id(header.tensors[name]): name for name in reversed(names)}
    arrays = _kept(header, (p for name in unique.values() for p in header.entries[name].promises), data)
    found = {key: replace(header.tensors[name], tree=_tree(header, name, arrays)) for key, name in unique.items()}
    return {name: found[id(header.tensors[name])] for name in names}


@dataclass
class Opened:
    """A file whose tensors are decoded one by one, each when its tree is read.

    Its small arrays, and those that several tensors share, stay in memory once one of them was read.
    """

    header: Header
    data: Source
    _common: dict[int, Array] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor with its tree deferred; tied names share one."""
        unique = {id(tensor): (name, tensor) for name, tensor in reversed(self.header.tensors.items())}
        made = {
            key: replace(tensor, tree=Deferred(tensor.shape, functools.partial(self.tree, name)))
            for key, (name, tensor) in unique.items()
        }
        return {name: made[id(tensor)] for name, tensor in self.header.tensors.items()}

    def tree(self, name: str) -> Tree:
        """A tensor's tree; raises `FormatError` where its bytes are not those that were written."""
        common, own = list[Promise](), list[Promise]()
        for p in self.header.entries[name].promises:
            (common if id(p) in self.places else own).append(p)
        arrays = _kept(self.header, own, self.data)
        if common:
            held = self.common()
            arrays |= {id(p): held[id(p)] for p in common}
        return _tree(self.header, name, arrays)

    @functools.cached_property
    def places(self) -> dict[int, Promise]:
        """The promises of all arrays in common: small ones, and those that several tensors share."""
        entries = {id(entry.promises): entry.promises for entry in self.header.entries.values()}  # of tied names once
        held = Counter(key for promises in entries.values() for key in {id(p) for p in promises})
        every = (p for promises in entries.values() for p in promises)
        return {id(p): p for p in every if p.codec == POOLED or held[id(p)] > 1}

    def common(self) -> dict[int, Array]:
        """The arrays of `places`, each one object for all who hold it, whichever thread asks first."""
        with self._lock:
            self._common = self._common or _kept(self.header, self.places.values(), self.data)
        return self._common


def _kept(header: Header, promises: Iterable[Promise], data: Source) -> dict[int, Array]:
    """The arrays of promises by their ids, each once."""
    wanted = {id(p): p for p in promises}
    coded: list[Job] = []
    if any(p.codec == POOLED for p in wanted.values()):
        coded += _streams("(small arrays)", header.pools, header.pools_check, data)
    for name in dict.fromkeys(p.owner for p in wanted.values() if p.codec != POOLED):
        entry = header.entries[name]
        own = [p for p in entry.promises if p.codec != POOLED and p.owner == name]
        coded += [job for job in _streams(name, own, entry.check, data) if id(job[1]) in wanted]
    arrays = _arrays(coded)
    pools = {pool.form: arrays[id(pool)] for pool in header.pools if id(pool) in arrays}
    for key, p in wanted.items():
        if p.codec == POOLED:
            arrays[key] = pools[p.form][p.offset : p.offset + p.size].reshape(p.shape)
        if FORMATS[p.form][1] == RISING:
            arrays[key] = _risen(arrays[key])
    return arrays


def _risen(distances: Array) -> Array:
    """Floats from how far the bits of each are from those of the last, of which the sum is below 2^32."""
    words = np.cumsum(distances.reshape(-1).view(np.uint32), dtype=np.uint64)
    if words.size and words[-1] >> 32:
        raise FormatError("values that rise go beyond all floats")
    return from_order(words.astype(np.uint32)).view(np.float32).reshape(distances.shape)


def _tree(header: Header, name: str, arrays: Mapping[int, Array]) -> Tree:
    """A tensor's tree of arrays that were decoded, by the ids of their promises."""
    tree: Tree = header.tensors[name].tree
    try:
        return _filled(tree, arrays)
    except ValueError as wrong:
        raise FormatError(f"{name}: {wrong}") from None


def _streams(name: str, own: list[Promise], check: int | None, data: Source) -> list[Job]:
    """The streams of arrays, which lie side by side in the file."""
    first = own[0].offset
    whole = data.read(first, sum([p.length for p in own]))
    if check is not None and zlib.crc32(whole) != check:
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

    few = sum([promise.size for _, promise, _ in coded[1:]]) < container.WORTH_A_THREAD
    threads = 1 if few else container.THREADS
    for _ in range(threads - 1):
        start_new_thread(decode, ())  # a threading.Thread would have us wait until it runs
    decode()
    for _ in range(threads):
        if wrong := ended.get():
            raise wrong
    for at, (name, promise, _) in enumerate(shared):
        found[id(promise)] = _named(name, batch.array, at)
    return found


def _filled(tree: Any, arrays: Mapping[int, Array]) -> Any:
    """The tree with the array in place of each promise, by the promise's id.

    Raises ValueError where integers point at what is not there.
    """
    if isinstance(tree, Promise):
        return arrays[id(tree)]
    if isinstance(tree, Packed):
        node = type(tree)(*[_filled(getattr(tree, part), arrays) for part in parts_of(type(tree))])
        node.check_values()
        return node
    return tuple([_filled(value, arrays) for value in tree]) if isinstance(tree, tuple) else tree


BROKEN = (ValueError, OverflowError, IndexError, MemoryError)  # what decoding garbled bytes may raise


def _named(name: str, decode: Callable[..., Any], *given: Any) -> Any:
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

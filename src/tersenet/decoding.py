"""How the arrays of a file are decoded, once its header was read."""

import functools
import zlib
from _thread import start_new_thread
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np

from tersenet import codecs, container
from tersenet.codecs.context import Batch
from tersenet.codecs.stream import FormatError
from tersenet.container import (
    CODED,
    DEFLATED,
    FORMATS,
    POOLED,
    REQUIRED,
    WIDTH,
    Section,
    Tensor,
)
from tersenet.deferred import Deferred
from tersenet.header import Header, Promise, Source
from tersenet.packed import Array, Packed, Tree, parts_of

CONTEXT = CODED.index("context")
Job = tuple[str, Promise, bytes]  # a tensor's name, an array of it, and the array's stream


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


def decoded(header: Header, names: Sequence[str], data: Source) -> dict[str, Tensor]:
    """The named tensors with their arrays; tied names share one."""
    unique = {id(header.tensors[name]): name for name in reversed(names)}.values()
    coded: list[Job] = []
    if any(p.codec == POOLED for name in unique for p in header.entries[name].promises):
        coded += _streams("(small arrays)", header.pools, header.pools_check, data)
    for name in unique:
        coded += _streams(name, header.entries[name].promises, header.entries[name].check, data)
    arrays = _arrays(coded)
    found = {
        id(header.tensors[name]): replace(header.tensors[name], tree=_tree(header, name, arrays)) for name in unique
    }
    return {name: found[id(header.tensors[name])] for name in names}


@dataclass
class Opened:
    """A file whose tensors are decoded one by one, each when its tree is read. Its small arrays stay in memory."""

    header: Header
    data: Source

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
        entry = self.header.entries[name]
        arrays = _arrays(_streams(name, entry.promises, entry.check, self.data))
        return _tree(
            self.header, name, arrays | self.pools if any(p.codec == POOLED for p in entry.promises) else arrays
        )

    @functools.cached_property
    def pools(self) -> dict[int, Array]:
        return _arrays(_streams("(small arrays)", self.header.pools, self.header.pools_check, self.data))


def _tree(header: Header, name: str, arrays: Mapping[int, Array]) -> Tree:
    """A tensor's tree of arrays that were decoded, by the ids of their promises and of the pools."""
    pools = {pool.form: pool for pool in header.pools}
    ready = [
        arrays[id(p)] if p.codec != POOLED else arrays[id(pools[p.form])][p.offset : p.offset + p.size].reshape(p.shape)
        for p in header.entries[name].promises
    ]
    try:
        return _filled(header.tensors[name].tree, iter(ready))
    except ValueError as wrong:
        raise FormatError(f"{name}: {wrong}") from None


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

"""An update: a .terse file that, applied to the network it names by digest, gives another one.

Exact, it holds the distance of every weight's bits from the old ones', as floats are ordered; the result equals the new
network bit for bit. Lossy, it holds the differences of large float tensors on a grid. What that leaves out is carried
forward by itself where the next difference is taken from what the receivers have, as in error feedback (Lim, Andersen,
Kaminsky 2019): of the result of `patch`, not of the network that was meant.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tersenet.access import Memory, checked
from tersenet.artifact import Artifact, as_stored, load
from tersenet.codecs.stream import FormatError
from tersenet.container import FLOATS, Section, Tensor, as_type, at_hand, from_order, in_order
from tersenet.decoding import decoded, sections_of
from tersenet.header import UPDATE, Header
from tersenet.packed import Array, Packed, Tree, Uniform, arrays, map_arrays, narrowed, parts_of, unpack
from tersenet.sources import read

SAME, BITS, STEPS, WHOLE = "=~+!"  # how an update tells a tensor
LOW = "update bits"  # the section of what follows the highest bit of each distance
LEAST = 256  # values of a tensor that a lossy update may round
DEAD = 0.2  # of a step: differences this much past the middle still go to the multiple nearer to zero
ROUNDS = 9  # of looking for the step
NOTHING = np.zeros(0, np.uint8)
CHUNK = 1 << 18  # values whose bits lie apart in memory at a time


def network(path: Path) -> Artifact:
    """The network in a .terse file, or in any checkpoint that `sources.read` takes."""
    if path.suffix.lower() == ".terse":
        return load(path)
    found = read(path)
    tensors = {name: Tensor(*as_stored(name, value)) for name, value in found.tensors.items()}
    return Artifact(tensors, meta={"metadata": found.metadata} if found.metadata else {})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types and trees, in whatever order and file they lie."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, tensor.dtype]).encode())
        _digest(found, tensor.tree)
    return found.hexdigest()


def _digest(found: Any, value: Any) -> None:
    if isinstance(value, Packed):
        found.update(type(value).__name__.encode())
        value = tuple(getattr(value, part) for part in parts_of(type(value)))
    if isinstance(value, tuple):
        found.update(f"({len(value)}".encode())
        for part in value:
            _digest(found, part)
    elif value is None or isinstance(value, int | str):
        found.update(json.dumps(value).encode())
    else:
        array = np.asarray(value)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())


def diff(old: Artifact, new: Artifact, ratio: float | None = None) -> Artifact:
    """The update from `old` to `new`: exact, or so many times smaller than the new network's 32-bit weights.

    Raises ValueError where what a lossy update keeps exactly is already larger.
    """
    if taken := {UPDATE, LOW} & set(new.sections):
        raise ValueError(f"the new network has a section {sorted(taken)[0]!r}, a name that updates use")
    old, new = (replace(one, tensors=at_hand(one.tensors)) for one in (old, new))  # what they share goes by identity
    base, exact = digest(old.tensors), _update(old, new)
    if ratio is None:
        return _file(exact, new, base, digest(new.tensors))
    if not 0 < ratio < math.inf:
        raise ValueError(f"a ratio is a number over 0, not {ratio}")
    room = 4 * sum(math.prod(tensor.tree.shape) for tensor in {id(t): t for t in new.tensors.values()}.values()) / ratio

    def fitting(told: Told) -> Artifact | None:
        made = _file(told, new, base, digest(_applied(old, told)))
        return made if made.nbytes <= room else None

    if found := fitting(exact):
        return found
    low, high = 0.0, max((2 * float(np.abs(d).max()) for d in _differences(old, new)), default=1.0)
    found = fitting(_update(old, new, high))
    if found is None:
        raise ValueError(f"over {room:,.0f} bytes are needed for what is kept exactly; give a smaller ratio")
    for _ in range(ROUNDS):  # the finest step that fits
        step = math.sqrt(low * high) or high / 16
        tried = fitting(_update(old, new, step))
        low, high, found = (low, step, tried) if tried else (step, high, found)
    return found


def patch(old: Artifact, update: Artifact) -> Artifact:
    """The network that an update (`opened`) makes of `old`, checked by its digest.

    Raises ValueError where it is for another network, naming both digests.
    """
    try:
        says = json.loads(update.sections[UPDATE].data)
        told = Told(dict(update.tensors), str(says["how"]), update.sections[LOW].data)
        base, result, groups = str(says["base"]), str(says["result"]), list(says.get("shared", ()))
    except (KeyError, ValueError, TypeError):
        raise FormatError("this is no update") from None
    old = replace(old, tensors=at_hand(old.tensors))
    if (own := digest(old.tensors)) != base:
        raise ValueError(f"has the digest {own}, and the update is for the network of digest {base}")
    tensors = _applied(old, told)
    if digest(tensors) != result:
        raise FormatError("the update does not give the network that it says it gives")
    tensors = _sharing_again(tensors, groups)
    sections = {name: section for name, section in update.sections.items() if name not in (UPDATE, LOW)}
    return Artifact(tensors, meta=update.meta, sections=sections)


def opened(path: Path) -> Artifact:
    """An update's file. Raises FormatError for all but whole, undamaged ones."""
    data = Memory(path.read_bytes())
    header = Header.read(data, None)
    for _ in checked(data):
        pass
    if UPDATE not in header.sections:
        raise FormatError("this is no update; `terse diff` makes one")
    return Artifact(decoded(header, list(header.tensors), data), meta=header.meta, sections=sections_of(header, data))


class Told(NamedTuple):
    """What an update holds: for each new tensor what it is told by, and how; the low bits of distances."""

    tensors: dict[str, Tensor]
    how: str
    low: bytes


def _file(told: Told, new: Artifact, base: str, result: str) -> Artifact:
    groups = _sharing(new.tensors)
    told_of = {"base": base, "result": result, "how": told.how, **({"shared": groups} if groups else {})}
    says = json.dumps(told_of, separators=(",", ":")).encode()
    sections = {**new.sections, UPDATE: Section(says, required=True), LOW: Section(told.low)}
    return Artifact(told.tensors, meta=new.meta, sections=sections)


def _update(old: Artifact, new: Artifact, step: float = 0) -> Told:
    tensors, how, low = dict[str, Tensor](), "", bytearray()
    first: dict[int, tuple[str, str]] = {}
    for name, tensor in new.tensors.items():
        if id(tensor) not in first:
            letter, tree, bits = _told(old.tensors.get(name), tensor, step)
            dtype = {SAME: "uint8", BITS: "uint8", STEPS: "float32", WHOLE: tensor.dtype}[letter]
            error = None if step else tensor.error  # which was measured of the tensor that is meant
            tensors[name] = replace(tensor, tree=tree, dtype=dtype, error=error)
            first[id(tensor)] = name, letter
            low += bits
        known, letter = first[id(tensor)]
        tensors[name] = tensors[known]
        how += letter
    return Told(tensors, how, bytes(low))


def _told(was: Tensor | None, tensor: Tensor, step: float) -> tuple[str, Tree, bytes]:
    """How a tensor is told, what by, and low bits."""
    if was is not None and digest({"": was}) == digest({"": tensor}):
        return SAME, NOTHING, b""
    if was is None or not _alike(was, tensor):
        return WHOLE, tensor.tree, b""
    if step and (difference := _difference(was, tensor)) is not None:
        size = np.floor(np.abs(difference) / step + (0.5 - DEAD))
        if not size.any():
            return SAME, NOTHING, b""
        with np.errstate(over="ignore"):
            tree = Uniform(narrowed(np.copysign(size, difference).astype(np.int64)), np.array(step, np.float32))
        if np.isfinite(_stepped(was, tree)).all():  # a step past the largest number of the type would be infinite
            return STEPS, tree, b""
    lengths, low = _distances(_words(tensor) - _words(was))
    return BITS, lengths.reshape(tensor.tree.shape), low


def _applied(old: Artifact, told: Told) -> dict[str, Tensor]:
    tensors, done, at = dict[str, Tensor](), dict[int, Tensor](), 0
    if len(told.how) != len(told.tensors):
        raise FormatError("the update tells of more tensors than it has, or fewer")
    for (name, tensor), letter in zip(told.tensors.items(), told.how, strict=True):
        if id(tensor) not in done:
            was = old.tensors.get(name)
            if letter == WHOLE:
                done[id(tensor)] = tensor
            elif was is None:
                raise FormatError(f"{name}: the update changes it, but it is not there")
            else:
                tree, at = _changed(name, was, tensor.tree, letter, told.low, at)
                done[id(tensor)] = replace(tensor, tree=tree, dtype=was.dtype)
        tensors[name] = done[id(tensor)]
    if at != len(told.low):
        raise FormatError("the update has bits left over")
    return tensors


def _sharing(tensors: Mapping[str, Tensor]) -> list[list[tuple[str, str]]]:
    """The places, as names and paths, of each array that several trees share."""
    found: dict[int, list[tuple[str, str]]] = {}
    for name, tensor in {id(t): (n, t) for n, t in reversed(list(tensors.items()))}.values():
        for path, array in arrays(tensor.tree):
            found.setdefault(id(array), []).append((name, path))
    return [places for places in found.values() if len(places) > 1]


def _sharing_again(tensors: dict[str, Tensor], groups: list[Any]) -> dict[str, Tensor]:
    """The tensors with one array at the places of each group, which must hold the same."""
    for group in groups:
        try:
            places = [(str(name), str(path)) for name, path in group]
            held = [dict(arrays(tensors[name].tree))[path] for name, path in places]
        except (TypeError, ValueError, KeyError):
            raise FormatError("this is no update") from None
        for (name, path), array in zip(places[1:], held[1:], strict=True):
            if digest({"": Tensor(array)}) != digest({"": Tensor(held[0])}):
                raise FormatError(f"{name}: what the update says is shared differs")
            was = tensors[name]
            shared = replace(was, tree=_with(was.tree, path, held[0]))
            tensors = {n: shared if t is was else t for n, t in tensors.items()}
    return tensors


def _with(tree: Tree, path: str, array: Array) -> Tree:
    """The tree with another array at a path."""
    return map_arrays(tree, lambda at, old: array if at == path else old)


def _changed(name: str, was: Tensor, tree: Tree, letter: str, low: bytes, at: int) -> tuple[Tree, int]:
    """The new tree, and where the next tensor's bits begin."""
    if letter == SAME:
        return was.tree, at
    if isinstance(was.tree, Packed) or was.tree.shape != tree.shape:
        raise FormatError(f"{name}: the update is for a tensor of another shape")
    if letter == STEPS and isinstance(tree, Uniform) and was.dtype in FLOATS:
        return _stepped(was, tree), at
    if letter == BITS and not isinstance(tree, Packed) and tree.dtype == np.uint8:
        words = _words(was)
        distances, at = _from_distances(tree.reshape(-1), words.dtype, low, at)
        return _from_words(words + distances, was).reshape(tree.shape), at
    raise FormatError(f"{name}: the update changes it in a way that is not known")


def _stepped(was: Tensor, tree: Tree) -> Array:
    """A tensor and the differences of a lossy update, in its type."""
    with np.errstate(over="ignore", invalid="ignore"):
        return as_type(was.unpack().astype(_wide(was)) + unpack(tree), was.dtype)


def _alike(was: Tensor, tensor: Tensor) -> bool:
    """Whether both are arrays, of one type and shape."""
    if isinstance(was.tree, Packed) or isinstance(tensor.tree, Packed):
        return False
    return was.dtype == tensor.dtype and was.tree.dtype == tensor.tree.dtype and was.tree.shape == tensor.tree.shape


def _differences(old: Artifact, new: Artifact) -> Iterator[Array]:
    for name, tensor in new.tensors.items():
        was = old.tensors.get(name)
        if was is not None and _alike(was, tensor) and (found := _difference(was, tensor)) is not None:
            yield found


def _difference(was: Tensor, tensor: Tensor) -> Array | None:
    """New minus old, where a lossy update may round it."""
    if tensor.dtype not in FLOATS or math.prod(tensor.tree.shape) < LEAST:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        found = tensor.unpack().astype(_wide(tensor)) - was.unpack().astype(_wide(tensor))
    return found if np.isfinite(found).all() else None


def _wide(tensor: Tensor) -> str:
    return "float64" if tensor.dtype == "float64" else "float32"


def _words(tensor: Tensor) -> Array:
    """An array's bits as unsigned integers [n], those of floats in their order: -0.0 next to 0.0, NaN at the ends."""
    array = np.ascontiguousarray(tensor.tree).reshape(-1)
    words = array.view(f"u{array.itemsize}")
    if tensor.dtype == "bfloat16":
        words = (words >> np.uint32(16)).astype(np.uint16)
    return in_order(words) if tensor.dtype in FLOATS else words


def _from_words(words: Array, tensor: Tensor) -> Array:
    if tensor.dtype in FLOATS:
        words = from_order(words)
    if tensor.dtype == "bfloat16":
        words = words.astype(np.uint32) << np.uint32(16)
    return words.view(np.asarray(tensor.tree).dtype)


def _distances(differences: Array) -> tuple[Array, bytes]:
    """Differences of words as lengths in bits (uint8) of zigzag numbers, and what follows each number's highest bit."""
    width = 8 * differences.itemsize
    signed = differences.view(f"i{differences.itemsize}")
    zigzag = (signed << 1 ^ signed >> (width - 1)).view(differences.dtype)
    lengths = _bit_length(zigzag)
    parts, places = [], np.arange(width - 1, dtype=np.uint8)
    for begin in range(0, zigzag.size, CHUNK):
        part = zigzag[begin : begin + CHUNK, None]
        bits = (part >> places.astype(part.dtype) & part.dtype.type(1)).astype(bool)
        parts.append(bits[places + 1 < lengths[begin : begin + CHUNK, None]])
    return lengths, np.packbits(np.concatenate(parts), bitorder="little").tobytes() if parts else b""


def _from_distances(lengths: Array, dtype: Any, low: bytes, at: int) -> tuple[Array, int]:
    """The differences back, and where the next tensor's bits begin."""
    width = 8 * dtype.itemsize
    count = int(np.maximum(lengths, 1).sum(dtype=np.int64)) - lengths.size
    end = at + (count + 7) // 8
    if lengths.max(initial=0) > width or end > len(low):
        raise FormatError("the update's bits end early")
    bits = np.unpackbits(np.frombuffer(low, np.uint8)[at:end], bitorder="little").astype(bool)
    places, zigzag, taken = np.arange(width - 1, dtype=np.uint8), np.empty(lengths.size, dtype), 0
    for begin in range(0, lengths.size, CHUNK):
        part = lengths[begin : begin + CHUNK, None]
        there = places + 1 < part
        digits = np.zeros(there.shape, dtype)
        digits[there] = bits[taken : (taken := taken + int(there.sum()))]
        highest = np.where(part > 0, dtype.type(1) << np.maximum(part, 1).astype(dtype) - dtype.type(1), dtype.type(0))
        zigzag[begin : begin + CHUNK] = (digits << places.astype(dtype)).sum(1, dtype=dtype) + highest[:, 0]
    one = dtype.type(1)
    return (zigzag >> one ^ (~(zigzag & one) + one)), end


def _bit_length(words: Array) -> Array:
    """Bits of each unsigned integer without leading zeros, as uint8."""
    if words.itemsize < 8:
        return np.frexp(words.astype(np.float64))[1].astype(np.uint8)
    high = words >> np.uint64(32)
    return np.where(high > 0, 32 + _bit_length(high.astype(np.uint32)), _bit_length(words.astype(np.uint32)))

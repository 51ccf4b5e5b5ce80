"""One safe file: names, trees and bytes; `docs/format.md` is its contract.

The ledger accounts for every byte.
"""

import contextlib
import functools
import io
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tersenet.access import File, Memory, Source, checked
from tersenet.codecs.stream import FormatError
from tersenet.container import (
    CODED,
    FLOATS,
    FORMATS,
    POOLED,
    RISING,
    SMALL,
    Coding,
    Section,
    Tensor,
    as_type,
    at_hand,
    groups,
    is_large,
)
from tersenet.decoding import Opened, decoded, sections_of
from tersenet.deferred import Deferred
from tersenet.dense import as_stored, numbers, place, relative_error, same
from tersenet.header import UPDATE, Header
from tersenet.packed import Array, Packed, Tree
from tersenet.replacing import scratch, write_atomically
from tersenet.writing import pieces, write, written

__all__ = [
    "FLOATS",
    "Artifact",
    "Coding",
    "FormatError",
    "Section",
    "Tensor",
    "as_stored",
    "load",
    "relative_error",
]


class LedgerRow(NamedTuple):
    """One line of the ledger: bytes of the tensor's integers (payload), floats (tables) and header."""

    name: str
    kind: str
    shape: tuple[int, ...]
    codec: str
    payload: int
    tables: int
    header: int
    weights: int
    error: float | None
    note: str

    @property
    def total(self) -> int:
        return self.payload + self.tables + self.header


@dataclass
class Artifact(Mapping[str, Tree]):
    """The tensors of one network by name, and the file they make. Two names of one `Tensor` object are stored once.

    A mapping of names to trees. Those of a large file are decoded when they are asked for and kept while someone holds
    them (`load`). `sections` are named bytes that travel beside the tensors, such as a graph.

    >>> artifact = Artifact({"w": Tensor(np.ones(1000, np.float32))})
    >>> artifact.nbytes < 70
    True
    """

    tensors: dict[str, Tensor]
    coding: Coding = field(default_factory=Coding)
    meta: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Section] = field(default_factory=dict)
    _source: Source | None = field(default=None, init=False, repr=False, compare=False)  # the file, once there is one

    @staticmethod
    def of_arrays(state: Mapping[str, Array]) -> "Artifact":
        """Every NumPy array or torch tensor bit for bit; names of one array are tied. Not for training or packing.

        Nothing is copied: each is looked up again when the file is written or its tree read, so a mapping that reads
        a checkpoint tensor by tensor is never in memory as a whole. Raises ValueError as `as_stored` does.
        """
        tensors, seen = dict[str, Tensor](), dict[Any, tuple[Any, str]]()
        for name in state:
            value = state[name]
            array, kind = as_stored(name, value)
            other, first = seen.get(place(value), (lambda: None, name))
            if other() is not None:  # else its place in memory was free again, and says nothing
                tensors[name] = tensors[first]
                continue
            tensors[name] = Tensor(Deferred(array.shape, functools.partial(_stored, state, name)), kind)
            if place(value) is not None:
                seen[place(value)] = weakref.ref(value), name
        return Artifact(tensors)

    def __getitem__(self, name: str) -> Tree:
        return self.tensors[name].tree

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def check(self) -> None:
        """Raises `FormatError` unless every tensor can be decoded; holds some at a time of a large file."""
        for _ in groups(self.tensors):
            pass

    def unpack(self) -> dict[str, Array]:
        """Every tensor as a dense NumPy array; tied names share one array."""
        return self._each(Tensor.unpack)

    def _each(self, convert: Callable[[Tensor], Any]) -> dict[str, Any]:
        """What every tensor is converted to; tied names share one."""
        made: dict[int, Any] = {}
        for group in groups(self.tensors):
            for tensor in group.values():
                if id(tensor) not in made:
                    made[id(tensor)] = convert(tensor)
        return {name: made[id(tensor)] for name, tensor in self.tensors.items()}

    def into(self, module: Any) -> Any:
        """Load the tensors into a torch module of the same architecture and return it.

        Extra state (`get_extra_state`) that the file lacks stays the module's own. Raises RuntimeError, as torch
        does, where names or shapes differ. Norms that are folded stay in evaluation form, whoever trains the module on.
        """
        from tersenet.norms import folded_norms, hold

        own = {n: v for n, v in module.state_dict().items() if n.rpartition(".")[2] == "_extra_state"}
        module.load_state_dict(own | self.state_dict())
        hold(module, folded_norms(self.tensors))
        return module

    def attach(self, module: Any, batch: int = 1, activations: int = 24) -> Any:
        """Load the tensors into a torch module, whose layers then run on packed weights where that is faster.

        It says what `into` says, up to rounding, with inputs of integer products of 24 bits; with 16 or 8 `activations`
        it is faster and says less exactly what it says. Where the file rounds what layers take and give
        (`activations.py`), so does the module. Forms are chosen for a `batch` of rows at a time (`docs/runtime.md`).
        The module runs forward only, on the CPU. Raises as `into` does, and `FormatError` for a section "activations"
        that says nothing.
        """
        from tersenet.runtime.attaching import attached

        return attached(module, self, batch, activations)[0]

    def realise(self, module: Any) -> Any:
        """A copy of a torch module with the tensors in it, whose sliced layers are smaller and factored ones chains.

        It says what `into` says. Warns, naming them, where such weights stay dense (`realise.py`).
        """
        from tersenet.realise import realise

        return realise(module, at_hand(self.tensors))

    def state_dict(self) -> dict[str, Any]:
        """Every tensor as a new torch tensor of its own type, also bfloat16 and 8-bit floats; tied names share one."""
        import torch

        def convert(tensor: Tensor) -> Any:
            dense = tensor.unpack()
            if tensor.dtype == "bfloat16":  # the upper half of float32; a cast would not keep every NaN
                dense = (dense.view(np.uint32) >> 16).astype(np.uint16)
            return torch.from_numpy(np.array(dense)).view(getattr(torch, tensor.dtype))

        return self._each(convert)

    def to_bytes(self) -> bytes:
        """The whole file. The same tensors and coding give the same bytes."""
        if self._source is None or not self._source.whole:
            file = io.BytesIO()
            head = write(self.tensors, self.coding, self.meta, self.sections, file)
            self._source = Memory(b"".join(pieces(head, file)))
        if isinstance(self._source, Memory):
            return self._source.data
        return b"".join(checked(self._source))

    def _coded(self) -> Source:
        """The file, or at least its head."""
        if self._source is None:
            self.to_bytes()
        assert self._source is not None
        return self._source

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return self._coded().size

    def save(self, path: str | Path, limit: int | None = None) -> None:
        """Write the file atomically: after a crash the old file or the new one is there, whole.

        A large network is coded into a scratch file beside it first, with some tensors in memory at a time. Raises
        ValueError where `load` with the same `limit` would refuse to open it.
        """
        path = Path(path)
        if (self._source is None or not self._source.whole) and is_large(self.tensors):
            with scratch(path) as file:
                head = write(self.tensors, self.coding, self.meta, self.sections, file)
                size = written(head, file)
                self._source = Memory(b"".join(pieces(head, file)) if size <= SMALL else head, size)
                _check_limit(path, self._source, limit)
                write_atomically(path, pieces(head, file))
        else:
            _check_limit(path, self._coded(), limit)
            write_atomically(path, checked(self._coded()))

    def ledger(self) -> list[LedgerRow]:
        """A row for each tensor and one for the file's own bytes; the rows add up to the size of the file."""
        return _ledger(self._coded())

    def __str__(self) -> str:
        return ledger_text(self.ledger())

    def _repr_html_(self) -> str:
        from tersenet.notebook import ledger_html

        return ledger_html(self.ledger())


def load(source: str | Path | bytes, tensors: Iterable[str] | None = None, limit: int | None = None) -> Artifact:
    """Open a file and check every byte of it; or open the named tensors of it alone, without reading the others.

    Networks of up to 33 million values, and named tensors, are decoded at once. The file of a larger network stays open
    as long as the artifact or one of its tensors is held: each is decoded, and checked again, when its tree is read, so
    one that cannot be decoded, or was damaged since, raises `FormatError` then. Windows does not let a file that is
    open be replaced.
    `limit` is how many decoded bytes are allowed; without it 256 MiB, or a thousand times the file's size up to 4 GiB,
    or 64 times the size of a file that is larger. Raises `FormatError` for all but whole, undamaged files of ours.
    """
    with contextlib.ExitStack() as stack:
        data: Source = Memory(source) if isinstance(source, bytes) else File(Path(source))
        if isinstance(data, File):
            stack.callback(data.close)
            data = Memory(data.read(0, data.size)) if data.size <= SMALL else data  # as it is checked, so it is decoded
        header = Header.read(data, limit)
        if UPDATE in header.sections:
            raise FormatError("this is an update, not a network: terse patch OLD UPDATE -o NEW applies it")
        large = is_large(header.tensors)
        if tensors is None:
            if not large and isinstance(data, File):
                data = Memory(data.read(0, data.size))
                header = Header.read(data, limit)
            for _ in checked(data):
                pass
        wanted = set(header.tensors if tensors is None else tensors)
        if missing := sorted(wanted - set(header.tensors)):
            raise KeyError(f"no tensor {missing[0]!r} in this file")
        sections = sections_of(header, data)
        if tensors is None and large:
            artifact = Artifact(Opened(header, data).tensors(), meta=header.meta, sections=sections)
            stack.pop_all()
        else:
            found = decoded(header, [name for name in header.tensors if name in wanted], data)
            artifact = Artifact(found, meta=header.meta, sections=sections)
        if tensors is None:
            artifact._source = data
        return artifact


def _check_limit(path: Path, data: Source, limit: int | None) -> None:
    try:
        Header.read(data, limit)
    except FormatError as wrong:
        raise ValueError(f"{path}: {wrong}, and the same limit for save") from None


def _ledger(data: Source) -> list[LedgerRow]:
    header = Header.read(data, sys.maxsize)
    rows, seen = [], dict[int, str]()
    shrunk, pools = header.coded / max(header.plain, 1), {pool.form: pool for pool in header.pools}
    rules = header.meta.get("rules")
    rules = rules if isinstance(rules, dict) else {}
    for name, tensor in header.tensors.items():
        shape, kinds, entry = tensor.tree.shape, _kinds(tensor.tree), header.entries[name]
        note = _ruled(tensor.note, rules[name]) if isinstance(rules.get(name), str) else tensor.note
        share = int(entry.header * shrunk)
        if id(tensor) in seen:
            rows.append(LedgerRow(name, "tied", shape, "", 0, 0, share, 0, None, f"tied to {seen[id(tensor)]}"))
            continue
        seen[id(tensor)] = name
        stored = [p for p in entry.promises if p.owner == name]
        parts = []  # codec, length, whether they are floats; of a pool the tensor's share
        for p in stored:
            pool = pools[p.form] if p.codec == POOLED else p
            length = p.length if pool is p else pool.length * p.size // max(pool.size, 1)
            parts.append((CODED[pool.codec], length, p.dtype.kind == "f"))
        payload, tables = (sum(length for _, length, floats in parts if floats == kind) for kind in (False, True))
        used = "+".join(dict.fromkeys(codec for codec, *_ in sorted(parts, key=lambda part: -part[1])))
        rows.append(LedgerRow(name, kinds, shape, used, payload, tables, share, math.prod(shape), tensor.error, note))
    for name, held in header.sections.items():
        rows.append(
            LedgerRow(f"({name})", "section", (), "", held.length, 0, 0, 0, None, f"{held.plain:,} bytes as they came")
        )
    own = data.size - sum(row.total for row in rows)
    return [*rows, LedgerRow("(file)", "", (), "", 0, 0, own, 0, None, "magic, version, lengths, checks, notes")]


def _ruled(note: str, rule: str) -> str:
    """A note with the rule that it is due to, or beside which it stands."""
    if note.endswith("by a rule"):
        return f"{note.removesuffix('a rule')}the rule {rule!r}"
    return f"{note}; by the rule {rule!r}".removeprefix("; ")


def _kinds(tree: Tree) -> str:
    if not isinstance(tree, Packed):
        held, stored = FORMATS[tree.form]
        return str(held if stored == RISING else stored)
    below = (getattr(tree, f.name) for f in fields(tree))
    inner = [_kinds(child) for child in below if isinstance(child, Packed)]
    return f"{type(tree).__name__}({', '.join(inner)})" if inner else type(tree).__name__


def ledger_text(rows: list[LedgerRow]) -> str:
    """The ledger as a table, with the sum and the ratio to 32-bit weights."""
    total, weights = sum(row.total for row in rows), sum(row.weights for row in rows)
    names = [printable(row.name) for row in rows]
    wide = max(20, *map(len, names))
    head = f"{'tensor':<{wide}} {'tree':<18} {'codec':<14} {'payload':>9} {'tables':>8} {'header':>7}"
    head += f" {'bits/w':>7} {'error':>7}"
    lines = [head]
    for name, row in zip(names, rows, strict=True):
        rate = f"{8 * row.total / row.weights:7.3f}" if row.weights else " " * 7
        error = f"{row.error:7.4f}" if row.error is not None else " " * 7
        text = f"{name:<{wide}} {row.kind:<18} {row.codec:<14} {row.payload:>9,} {row.tables:>8,} {row.header:>7,} "
        lines.append(f"{text}{rate} {error}  {printable(row.note)}".rstrip())
    ratio = 4 * weights / max(total, 1)
    bits = 8 * total / max(weights, 1)
    lines.append(f"{total:,} bytes for {weights:,} weights: {bits:.3f} bits each, {ratio:.1f}x smaller than float32")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text of a file as a terminal may have it: what would move the cursor, end the line or turn it is escaped.

    >>> printable("a\\nb\\x1b[2J")
    'a\\\\nb\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _stored(state: Mapping[str, Array], name: str) -> Array:
    return as_stored(name, state[name])[0]


def errors_against(artifact: Artifact, original: Mapping[str, Array]) -> dict[str, float]:
    """Relative L2 error of every tensor against the original's NumPy array or torch tensor.

    It is 0 where the tensor is the original rounded to its own type. Raises ValueError where names or shapes differ.
    """
    errors = dict[str, float]()
    if missing := sorted(set(artifact) ^ set(original)):
        raise ValueError(f"{missing[0]}: in one of the two only")
    for name, tensor in (pair for group in groups(artifact.tensors) for pair in group.items()):
        was, kind = as_stored(name, original[name])
        array, own = tensor.unpack(), tensor.dtype
        if was.shape != array.shape:
            raise ValueError(f"{name}: shape {array.shape}, but the original has {was.shape}")
        alike = kind == own or (kind in FLOATS and own in FLOATS)
        rounded = alike and bool(same(array, as_type(was, own)).all())
        errors[name] = 0.0 if rounded else relative_error(numbers(array, own), numbers(was, kind))
    return errors

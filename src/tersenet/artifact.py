"""One safe file: names, trees and bytes; `docs/format.md` is its contract.

The ledger accounts for every byte.
"""

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tersenet.codecs.stream import FormatError
from tersenet.container import (
    CODED,
    DTYPES,
    FLOATS,
    FORMATS,
    POOLED,
    SMALL,
    STAND_IN,
    Coding,
    Section,
    Tensor,
    as_type,
)
from tersenet.decoding import decoded, sections_of
from tersenet.header import UPDATE, File, Header, Memory, Source
from tersenet.packed import Array, Packed, Tree
from tersenet.replacing import write_atomically
from tersenet.writing import write

CHUNK = 1 << 20  # values that are compared at a time
__all__ = ["FLOATS", "Artifact", "Coding", "FormatError", "Section", "Tensor", "load"]


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
class Artifact:
    """The tensors of one network by name, and the file they make. Two names of one `Tensor` object are stored once.

    `sections` are named bytes that travel beside the tensors, such as a graph.

    >>> artifact = Artifact({"w": Tensor(np.ones(1000, np.float32))})
    >>> artifact.nbytes < 70
    True
    """

    tensors: dict[str, Tensor]
    coding: Coding = field(default_factory=Coding)
    meta: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Section] = field(default_factory=dict)
    _bytes: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> Tree:
        return self.tensors[name].tree

    def unpack(self) -> dict[str, Array]:
        """Every tensor as a dense NumPy array; tied names share one array."""
        dense: dict[int, Array] = {}
        for tensor in self.tensors.values():
            if id(tensor) not in dense:
                dense[id(tensor)] = tensor.unpack()
        return {name: dense[id(tensor)] for name, tensor in self.tensors.items()}

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

    def realise(self, module: Any) -> Any:
        """A copy of a torch module with the tensors in it, whose sliced layers are smaller and factored ones chains.

        It says what `into` says. Warns, naming them, where such weights stay dense (`realise.py`).
        """
        from tersenet.realise import realise

        return realise(module, self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Every tensor as a new torch tensor of its own type, also bfloat16 and 8-bit floats; tied names share one."""
        import torch

        made: dict[int, Any] = {}
        for tensor in self.tensors.values():
            if id(tensor) not in made:
                dense = tensor.unpack()
                if tensor.dtype == "bfloat16":  # the upper half of float32; a cast would not keep every NaN
                    dense = (dense.view(np.uint32) >> 16).astype(np.uint16)
                made[id(tensor)] = torch.from_numpy(np.array(dense)).view(getattr(torch, tensor.dtype))
        return {name: made[id(tensor)] for name, tensor in self.tensors.items()}

    def to_bytes(self) -> bytes:
        """The whole file. The same tensors and coding give the same bytes."""
        if self._bytes is None:
            self._bytes = write(self.tensors, self.coding, self.meta, self.sections)
        return self._bytes

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return len(self.to_bytes())

    def save(self, path: str | Path, limit: int | None = None) -> None:
        """Write the file atomically: after a crash the old file or the new one is there, whole.

        Raises ValueError where `load` with the same `limit` would refuse to open it.
        """
        try:
            Header.read(Memory(self.to_bytes()), limit)
        except FormatError as wrong:
            raise ValueError(f"{path}: {wrong}, and the same limit for save") from None
        write_atomically(Path(path), self.to_bytes())

    def ledger(self) -> list[LedgerRow]:
        """A row for each tensor and one for the file's own bytes; the rows add up to the size of the file."""
        return _ledger(self.to_bytes())

    def __str__(self) -> str:
        return ledger_text(self.ledger())


def load(source: str | Path | bytes, tensors: Iterable[str] | None = None, limit: int | None = None) -> Artifact:
    """Open a file and decode it, or only the named tensors of it, without reading the others.

    `limit` is how many decoded bytes are allowed; without it 256 MiB, or a thousand times the file's size up to 4 GiB,
    or 64 times the size of a file that is larger. Raises `FormatError` for all but whole, undamaged files of ours.
    """
    if tensors is None and not isinstance(source, bytes):
        source = _read_whole(Path(source), limit)
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            data: Source = Memory(source)
        else:
            file = File(stack.enter_context(Path(source).open("rb")))
            data = Memory(file.read(0, file.size)) if file.size <= SMALL else file  # as it is checked, so it is decoded
        header = Header.read(data, limit)
        if UPDATE in header.sections:
            raise FormatError("this is an update, not a network: terse patch OLD UPDATE -o NEW applies it")
        wanted = set(header.tensors if tensors is None else tensors)
        if missing := sorted(wanted - set(header.tensors)):
            raise KeyError(f"no tensor {missing[0]!r} in this file")
        if tensors is None:
            header.check_whole(data)
        found = decoded(header, [name for name in header.tensors if name in wanted], data)
        artifact = Artifact(found, meta=header.meta, sections=sections_of(header, data))
        if isinstance(source, bytes) and tensors is None:
            artifact._bytes = source
        return artifact


def _read_whole(path: Path, limit: int | None) -> bytes:
    """The file's bytes, once its header has shown that it is one of ours."""
    with path.open("rb") as file:
        Header.read(File(file), limit)
        file.seek(0)
        return file.read()


def _ledger(data: bytes) -> list[LedgerRow]:
    header = Header.read(Memory(data), sys.maxsize)
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
    own = len(data) - sum(row.total for row in rows)
    return [*rows, LedgerRow("(file)", "", (), "", 0, 0, own, 0, None, "magic, version, lengths, checks, notes")]


def _ruled(note: str, rule: str) -> str:
    """A note with the rule that it is due to, or beside which it stands."""
    if note.endswith("by a rule"):
        return f"{note.removesuffix('a rule')}the rule {rule!r}"
    return f"{note}; by the rule {rule!r}".removeprefix("; ")


def _kinds(tree: Tree) -> str:
    if not isinstance(tree, Packed):
        return str(FORMATS[tree.form][1])
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


def as_stored(name: str, value: Any) -> tuple[Array, str]:
    """A NumPy array or torch tensor as a `Tensor` holds it, and its type's name; may share memory with the value.

    Raises ValueError, naming the tensor, for what is no dense array of a type that a file knows.
    """
    if hasattr(value, "data_ptr"):
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_meta or hasattr(value, "materialize"):  # the second: a lazy layer that never ran
            raise ValueError(f"{name}: holds no data (a meta tensor or an unused lazy layer); load its weights first")
        if value.layout != sys.modules["torch"].strided:
            kind = f"{value.layout} {kind}".removeprefix("torch.")
        value = value.detach().cpu() if kind in DTYPES else value
        if kind in STAND_IN:
            value = value.view(sys.modules["torch"].int16 if kind == "bfloat16" else sys.modules["torch"].uint8)
        array: Array = value.numpy() if kind in DTYPES else None
    else:
        array = np.asarray(value)
        kind = array.dtype.newbyteorder("=").name
    if kind not in DTYPES:
        raise ValueError(f"{name}: cannot store {kind}; convert it to dense numbers of up to 64 bits, or leave it out")
    if kind == "bfloat16":
        return np.asarray(np.left_shift(array.view(np.uint16), 16, dtype=np.uint32)).view(np.float32), kind
    return array.view(np.uint8) if kind in STAND_IN else array.astype(kind, copy=False), kind


def errors_against(artifact: Artifact, original: Mapping[str, Array]) -> dict[str, float]:
    """Relative L2 error of every tensor against the original's NumPy array or torch tensor.

    It is 0 where the tensor is the original rounded to its own type. Raises ValueError where names or shapes differ.
    """
    dense, errors = artifact.unpack(), {}
    if missing := sorted(set(dense) ^ set(original)):
        raise ValueError(f"{missing[0]}: in one of the two only")
    for name, array in dense.items():
        was, kind = as_stored(name, original[name])
        own = artifact.tensors[name].dtype
        if was.shape != array.shape:
            raise ValueError(f"{name}: shape {array.shape}, but the original has {was.shape}")
        alike = kind == own or (kind in FLOATS and own in FLOATS)
        rounded = alike and bool(_same(array, as_type(was, own)).all())
        errors[name] = 0.0 if rounded else relative_error(_numbers(array, own), _numbers(was, kind))
    return errors


def relative_error(array: Array, original: Array) -> float:
    """||original - array|| / ||original|| in float64; nothing is too small or too large to be seen.

    Values that are equal, NaN too, or become so in the type of `array`, differ by 0. Infinite where zeros came back as
    something else, and where one of the two alone is NaN or infinite.
    """
    lost, whole = [], []
    for begin in range(0, array.size, CHUNK):
        now, was = (values.reshape(-1)[begin : begin + CHUNK] for values in (array, original))
        with np.errstate(all="ignore"):
            difference = now.astype(np.float64) - was.astype(np.float64)
            difference[_same(now, was.astype(now.dtype))] = 0
        lost.append(_norm(difference))
        whole.append(_norm(was[np.isfinite(was)].astype(np.float64)))
    error, norm = math.hypot(*lost), math.hypot(*whole)
    if not error:
        return 0.0
    return error / norm if norm and error < math.inf else math.inf


def _norm(values: Array) -> float:
    """The L2 norm, taken of values over their largest, whose squares neither vanish nor overflow."""
    largest = float(np.abs(values).max(initial=0))
    if not 0 < largest < math.inf:
        return 0.0 if largest == 0 else math.inf
    return largest * math.sqrt(np.square(values / largest).sum())


def _same(array: Array, other: Array) -> Array:
    """Where two arrays are equal, NaN to NaN too."""
    return (array == other) | (np.isnan(array) & np.isnan(other))


def _numbers(array: Array, dtype: str) -> Array:
    """What the stored array stands for: 8-bit floats lie there as bytes, which torch can read."""
    if dtype in FLOATS or dtype not in STAND_IN:
        return array
    import torch

    return torch.from_numpy(np.array(array)).view(getattr(torch, dtype)).float().numpy()

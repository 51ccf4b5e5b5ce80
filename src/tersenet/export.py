"""A file as a C array for small devices, with the memory that the decoder of `examples/c` needs for it.

What that decoder lacks is refused here, before anything is written.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tersenet.access import Memory
from tersenet.artifact import Artifact, load, printable
from tersenet.codecs.context import walk_of
from tersenet.container import CODED, INTEGERS, POOLED, Tensor
from tersenet.header import Header, Promise
from tersenet.packed import (
    Array,
    Codebook,
    Packed,
    Sliced,
    Sparse,
    Transformed,
    Tree,
    Uniform,
    arrays,
    children,
    parts_of,
)

LACKS_CODECS = {"bzip2", "zstd"}
HAS_NODES = {"Uniform", "Codebook", "Sparse", "Sliced", "Transformed", "Reshaped"}
ITEM, TENSOR, DICTIONARY = 128, 32, 648  # bytes of a value of the header and of a tensor, at most, and beside its text
TABLE, CODES, SKIP = 1024, 256, 255  # of values that are told apart by a byte; gaps end there
SHARES, PRIOR, SLOTS = 28_272, 3_200, 4_096  # what LZMA, the context codec and rANS learn or look up


def c_name(text: str) -> str:
    """A C identifier for a file's name without its folder and end; what C lacks becomes underscores.

    >>> c_name("../my nets/le-net 5.terse"), c_name("int.terse")
    ('model_le_net_5', 'model_int')
    """
    stem = re.split(r"[/\\]", text)[-1].removesuffix(".terse")
    return "model_" + re.sub(r"[^A-Za-z0-9_]", "_", stem)


def c_header(data: bytes, name: str) -> str:
    """The text of a C header: the file, and its sizes as constants, under `c_name(name)`.

    Raises `FormatError` for a bad file and ValueError, with the tensor and a remedy, for what `examples/c` cannot read.
    """
    artifact, header, c = load(data), Header.read(Memory(data), None), c_name(name)
    for required in (section for section, held in artifact.sections.items() if held.required):
        raise ValueError(f"section {required!r}: the small decoder does not know it; export a network's own file")
    codings = _codings(artifact, header)
    read = {n: t for n, t in artifact.tensors.items() if _is_read(n, t, codings)}
    lines = [
        f"   {_comment(n)}: {' x '.join(map(str, t.shape)) or 'scalar'}, {_kinds(t.tree)}"
        + ("" if n in read else ", which the small decoder does not read")
        for n, t in artifact.tensors.items()
    ]
    sizes = {
        "bytes": len(data),
        "arena": _arena(artifact, header, read, codings),
        "tensors": len(artifact.tensors),
        "largest": max((math.prod(t.shape) for t in read.values()), default=0),
    }
    told = ", ".join(f"{c}_{key} = {value}" for key, value in sizes.items())
    rows = [", ".join(map(str, data[at : at + 24])) for at in range(0, len(data), 24)]
    return (
        f"/* {_comment(name)}, written by terse export. `{c}_arena` bytes of memory are enough to open it and\n"
        f"   load every tensor, matrices as layers and vectors as floats; `{c}_largest` values has the largest.\n\n"
        + "\n".join(lines)
        + f" */\n#include <stdint.h>\n\nenum {{ {told} }};\n\nstatic const uint8_t {c}[] = {{\n    "
        + ",\n    ".join(rows)
        + "};\n"
    )


def _comment(text: str) -> str:
    """Text of others, as a C comment may hold it."""
    return printable(text).encode("ascii", "backslashreplace").decode().replace("*", "\\x2a")


def _kinds(tree: Tree) -> str:
    inner = (
        "" if not isinstance(tree, Packed) else ", ".join(_kinds(t) for _, t in children(tree) if isinstance(t, Packed))
    )
    return (type(tree).__name__ if isinstance(tree, Packed) else str(tree.dtype)) + (f"({inner})" if inner else "")


def _nodes(tree: Tree) -> Iterator[Packed]:
    if isinstance(tree, Packed):
        yield tree
        for _, child in children(tree):
            yield from _nodes(child)


Coding = tuple[str, Promise, Array]  # a codec's name, what the header says of an array, and the array


def _codings(artifact: Artifact, header: Header) -> dict[str, list[Coding]]:
    """By each tensor its arrays; of pooled ones the whole pool stands for each of its arrays."""
    held: dict[int, list[Array]] = {}
    paired = dict[str, list[tuple[Promise, Array]]]()
    for name, tensor in artifact.tensors.items():
        promises = (p for _, p in arrays(header.tensors[name].tree))
        paired[name] = list(zip(promises, (a for _, a in arrays(tensor.tree)), strict=True))
        for p, array in paired[name]:
            if p.codec == POOLED:
                held.setdefault(p.form, []).append(array.reshape(-1))
    pools = {pool.form: (CODED[pool.codec], pool, np.concatenate(held[pool.form])) for pool in header.pools}
    return {
        name: [pools[p.form] if p.codec == POOLED else (CODED[p.codec], p, array) for p, array in pairs]
        for name, pairs in paired.items()
    }


def _is_read(name: str, tensor: Tensor, codings: dict[str, list[Coding]]) -> bool:
    """Whether a tensor holds floats, which the small decoder reads; raises ValueError where it cannot."""
    tree = tensor.tree
    if not isinstance(tree, Packed) and tree.dtype.kind != "f":
        return False
    for node in _nodes(tree):
        if (kind := type(node).__name__) not in HAS_NODES:
            raise ValueError(
                f"{_comment(name)}: the small decoder has no {kind} node; pack it by another method or keep it dense"
            )
        if isinstance(node, Codebook) and len(node.codewords.shape) > 2:
            raise ValueError(f"{_comment(name)}: the small decoder has no codebooks by group; pack it without a group")
    if (isinstance(tree, Packed) and tensor.dtype != "float32") or any(a.dtype == np.float64 for _, a in arrays(tree)):
        raise ValueError(
            f"{_comment(name)}: the small decoder has no packed {tensor.dtype}; convert it to float32 first"
        )
    for codec, _, _ in codings[name]:
        if codec in LACKS_CODECS:
            raise ValueError(
                f"{_comment(name)}: the codec {codec} is not in the small decoder; save the file again with"
                f" tersenet.Coding(('bits', 'huffman', 'gaps', 'rans', 'lzma')) as the coding of its Artifact"
            )
    return True


def _rounded(size: int) -> int:
    return (size + 15) // 16 * 16


def _arena(artifact: Artifact, header: Header, read: dict[str, Tensor], codings: dict[str, list[Coding]]) -> int:
    """Bytes that are enough for opening a file and loading the tensors: what stays, and the most on loan beside it."""
    own, text = {id(t): t for t in artifact.tensors.values()}, sum(_rounded(len(n.encode())) for n in header.tensors)
    values = sum(_items(tensor.tree) for tensor in {id(t): t for t in header.tensors.values()}.values())
    opened = ITEM * values + TENSOR * len(header.tensors) + text
    kept = sum(
        _rounded(16) + _layer(t) if len(t.shape) > 1 else _rounded(4 * math.prod(t.shape)) for t in read.values()
    )
    lent = max((_lent(own[id(t)].tree, codings[n]) for n, t in read.items()), default=0)
    return 32 + _rounded(max(opened + _rounded(header.plain) + DICTIONARY, opened + kept + lent))


def _items(value: Any) -> int:
    """The values that a value of the header is made of."""
    if isinstance(value, Packed):
        return 1 + sum(_items(getattr(value, part)) for part in parts_of(type(value)))
    return 1 + (sum(map(_items, value)) if isinstance(value, tuple) else 0)


def _layer(tensor: Tensor) -> int:
    """Bytes of a weight as products run on it."""
    tree, rows = tensor.tree, tensor.shape[0]
    columns = math.prod(tensor.shape[1:])
    sides = 0
    if isinstance(tree, Uniform) and _comes_apart(tree):
        zero = 0 if tree.zero is None else int(np.asarray(tree.zero).reshape(-1)[0])
        dense, sides = tree.q.reshape(-1).astype(np.int64) + zero, _rounded(4 * rows) + _rounded(4 * columns)
    else:
        dense = np.asarray(tensor.unpack(), np.float32).reshape(-1)
    places = np.flatnonzero(dense)
    different = np.unique(dense[places]).size
    width, table = (1, _rounded(4 * (different + 1))) if different < CODES else (4, 0)
    entries = int(((np.diff(places, prepend=-1) - 1) // SKIP).sum()) + places.size
    sparse = entries + width * places.size
    if sparse >= width * dense.size or any(isinstance(node, Transformed) for node in _nodes(tree)):
        return sides + table + _rounded(4 * dense.size if width == 4 else dense.size)
    return sides + table + _rounded(entries) + _rounded(width * places.size)


def _comes_apart(tree: Uniform) -> bool:
    """Whether every part goes by row or by column alone, as `examples/c/layers.c` has it."""
    q = tree.q.shape

    def one_way(shape: Sequence[int]) -> bool:
        return len(shape) < len(q) or shape[0] in (1, math.prod(shape))

    return (tree.zero is None or tree.zero.size == 1) and all(one_way(p.shape) for p in (tree.scale, *tree.steps))


def _lent(tree: Tree, coded: Sequence[Coding]) -> int:
    """Bytes on loan while a tensor is loaded, at most."""
    index = 0
    for node in _nodes(tree):
        if isinstance(node, Sparse):
            index += _rounded(4 * (math.prod(node.shape) // 256 + 1))
        elif isinstance(node, Sliced):
            index += _rounded(4 * node.size)
        elif isinstance(node, Transformed):
            index += _rounded(4 * sum(n * n for n in node.shape[-2:]))
    own = [array for _, array in arrays(tree)]
    held = [_decoded(codec, p, pool, array) for (codec, p, pool), array in zip(coded, own, strict=True)]
    return TABLE + index + sum(size for size, _ in held) + max((beside for _, beside in held), default=0)


def _decoded(codec: str, promise: Promise, whole: Array, array: Array) -> tuple[int, int]:
    """Bytes of an array in memory, and what decoding its stream takes beside them, at most."""
    floats = promise.dtype.kind == "f"  # whose bytes are coded
    shape, kind = (
        ((INTEGERS[promise.form] * whole.size,), np.dtype(np.uint8)) if floats else (promise.shape, promise.dtype)
    )
    low, high = (0, 255) if floats else (int(whole.min(initial=0)), int(whole.max(initial=0)))
    if not floats and codec != "gaps" and whole.size:
        low, high = int(whole.min()), int(whole.max())
    folded, span = max(2 * high, -2 * low - 1, 0), high - low  # zigzag
    width = 0 if span < 16 else (span.bit_length() + 7) // 8
    coded = (math.prod(shape) + 1) // 2 if width == 0 and not floats else math.prod(shape) * max(width, 1)
    beside = {
        "rans": SLOTS,
        "rans-pairs": SLOTS,
        "deflate": coded,
        "lzma": coded + SHARES,
        "context": walk_of(shape, kind)[1] + PRIOR,
    }.get(codec, 3 * (span + 512 + folded))  # code lengths, and the symbols by length
    if floats:
        return _rounded(4 * array.size), _rounded(beside) + 64
    general = (1 << 8 * width) - 1 if width else 15
    most = {"runs": folded // 2 + (folded + 1) // 2, "trits": 2, "rans-pairs": 15, "deflate": general, "lzma": general}
    bits = 1 if kind == np.bool_ else most.get(codec, span).bit_length()
    return _rounded((array.size * bits + 7) // 8), _rounded(beside) + 64

"""Networks that others compressed, taken in as the trees that they are: the same weights, in fewer bytes.

Nothing is decided and nothing lost: palettes become `Codebook`, product quantization a `Codebook` of vectors, 4-bit
levels by group `Uniform`, and what is dense stays as it is.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersenet.artifact import Artifact, Tensor, as_stored
from tersenet.packed import Array, Codebook, Packed, Reshaped, Sparse, Tree, Uniform, narrowed

INDEX, CODEWORDS = ("index", "indices", "assignments"), ("codewords", "codebook", "centroids", "palette", "lut")
Shapes = Mapping[str, tuple[int, ...]]


def squeezenet() -> dict[str, tuple[int, ...]]:
    """The kernels of SqueezeNet 1.0, in the order of Deep Compression's file."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (96, 3, 7, 7)}
    channels = 96
    widths = (16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256)
    for k, (squeeze, expand) in enumerate(widths, 2):
        shapes |= _fire(k, channels, squeeze, expand)
        channels = 2 * expand
    return shapes | _fire(9, channels, 64, 256) | {"conv10": (1000, 512, 1, 1)}


def _fire(k: int, channels: int, squeeze: int, expand: int) -> dict[str, tuple[int, ...]]:
    ones, threes = (expand, squeeze, 1, 1), (expand, squeeze, 3, 3)
    return {f"fire{k}.squeeze": (squeeze, channels, 1, 1), f"fire{k}.expand1": ones, f"fire{k}.expand3": threes}


def deep_compression(data: bytes, shapes: Shapes) -> Artifact:
    """The network in a file of Deep Compression's authors (Han, Mao, Dally 2016), by its kernels' shapes in order.

    Counts u32; then for each layer 256 codewords and its biases in float32, a codeword's number u8 for each weight that
    is kept, and the gaps between these in 4 bits, of which 15 with a weight of zero bridges longer ones. Raises
    ValueError where the file is no such thing.
    """
    at = 4 * len(shapes)

    def take(kind: str, count: int) -> Array:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise ValueError("the file ends within a layer: it is not of this network, or not whole")
        part = np.frombuffer(data, kind, count, at)
        at += part.nbytes
        return part

    if len(data) < at:
        raise ValueError("the file is too short for the network's layers")
    tensors = dict[str, Tensor]()
    for (name, shape), count in zip(shapes.items(), np.frombuffer(data, "<u4", len(shapes)), strict=True):
        book, bias = take("<f4", 256), take("<f4", shape[0])
        number, pairs = take("u1", int(count)), take("u1", (int(count) + 1) // 2)
        gaps = np.stack([pairs % 16, pairs // 16], 1).reshape(-1)[: int(count)].astype(np.int64)
        places, size = np.cumsum(gaps + 1) - 1, math.prod(shape)
        if len(places) and places[-1] >= size:
            raise ValueError(f"{name}: a weight lies behind the kernel's end: the file is not of this network")
        dense = np.zeros(size, np.float32)
        dense[places] = book[number]
        mask = dense != 0
        codewords, index = np.unique(dense[mask], return_inverse=True)
        node = Codebook(narrowed(index), codewords[:, None])
        tensors[f"{name}.weight"] = Tensor(Sparse(mask.reshape(shape), node))
        tensors[f"{name}.bias"] = Tensor(bias.copy())
    if at != len(data):
        raise ValueError(f"{len(data) - at:,} bytes are left behind the last layer: the file is not of this network")
    return Artifact(tensors)


def repacked(state: Mapping[str, Any], shapes: Shapes | None = None) -> Artifact:
    """Named arrays or torch tensors, those of one compressed weight together: X.index with X.codewords, and X.qweight.

    The weight is called X.weight and has the shape that `shapes` gives that name. Without one vectors of 9, 18, ... are
    3 x 3 kernels, and rows stay rows. 4-bit weights are GPTQ's: eight levels of a column in an int32, zeros likewise,
    float16 scales [groups, columns]. Raises ValueError, naming the weight, for what does not belong together.
    """
    left, tensors = dict(state), dict[str, Tensor]()
    for name in state:
        layer, _, part = name.rpartition(".")
        if part in INDEX and (other := next((c for c in CODEWORDS if f"{layer}.{c}" in left), None)):
            index, book = (_array(f"{layer}.{p}", left.pop(f"{layer}.{p}")) for p in (part, other))
            kind = "float64" if book.dtype == np.float64 else "float32"
            made: tuple[Tree, str] = _shared(layer, index, book.astype(kind)), kind
        elif part == "qweight" and f"{layer}.scales" in left:
            made = _four_bits(
                layer, {p: left.pop(f"{layer}.{p}", None) for p in ("qweight", "scales", "qzeros", "g_idx")}
            )
        else:
            continue
        weight, wanted = f"{layer}.weight".removeprefix("."), (shapes or {}).get(f"{layer}.weight".removeprefix("."))
        tensors[weight] = Tensor(_shaped(weight, made[0], wanted), made[1])
    if not tensors:
        raise ValueError(
            "holds no weights of a kind that is known: X.index with X.codewords, or X.qweight with X.scales"
        )
    for name, value in left.items():
        if name in tensors:
            raise ValueError(f"{name}: is there twice, dense and compressed")
        array, kind = as_stored(name, value)
        tensors[name] = Tensor(np.array(array), kind)
    return Artifact(tensors)


def _array(name: str, value: Any) -> Array:
    return np.array(as_stored(name, value)[0])


def _shared(layer: str, index: Array, book: Array) -> Packed:
    """Codewords by number."""
    book = book.reshape(len(book), -1) if book.ndim else book
    if index.dtype.kind not in "iu" or book.ndim != 2 or not index.ndim:
        raise ValueError(f"{layer}: an index of integers and codewords [k, d] are needed")
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < len(book):
        raise ValueError(f"{layer}: the index points at codewords that are not there")
    node = Codebook(narrowed(index), book)
    if book.shape[1] % 9 or index.ndim != 2:
        return node
    kernels = (*node.shape[:1], node.shape[1] // 9, 3, 3)
    return Reshaped(node, kernels, (0, 1, 2, 3), kernels)


def _four_bits(layer: str, parts: Mapping[str, Any]) -> tuple[Packed, str]:
    """(q - zero - 1) * scale, rows first, and the scales' type."""
    if parts["qzeros"] is None:
        raise ValueError(f"{layer}: has no qzeros beside its qweight; only GPTQ's layout is known")
    packed, zeros = (_array(layer, parts[name]) for name in ("qweight", "qzeros"))
    scales, kind = as_stored(layer, parts["scales"])
    if packed.dtype != np.int32 or zeros.dtype != np.int32 or packed.ndim != 2 or scales.ndim != 2:
        raise ValueError(f"{layer}: qweight and qzeros are int32 matrices, scales a matrix of floats")
    columns, (groups, rows) = 8 * len(packed), scales.shape
    if packed.shape[1] != rows or zeros.shape != (groups, -(-rows // 8)) or not groups or columns % groups:
        raise ValueError(f"{layer}: qweight, qzeros and scales do not fit together; only GPTQ's 4 bits are known")
    order = np.arange(columns) // (columns // groups)
    if parts["g_idx"] is not None and not np.array_equal(_array(layer, parts["g_idx"]), order):
        raise ValueError(f"{layer}: its columns are not in the order of their groups (desc_act)")
    shifts = 4 * np.arange(8, dtype=np.uint32)
    levels = (packed.view(np.uint32)[:, None] >> shifts[None, :, None] & 15).reshape(columns, rows)
    nought = (zeros.view(np.uint32)[:, :, None] >> shifts & 15).reshape(groups, -1)[:, :rows]
    scale = np.ascontiguousarray(scales.T, np.float32)
    return Uniform(levels.T.astype(np.uint8), scale, -1 - nought.T.astype(np.int8)), kind


def _shaped(name: str, tree: Tree, wanted: tuple[int, ...] | None) -> Tree:
    if wanted is None or tuple(tree.shape) == tuple(wanted):
        return tree
    if math.prod(wanted) != math.prod(tree.shape):
        raise ValueError(
            f"{name}: holds {math.prod(tree.shape):,} weights, but the network's has {math.prod(wanted):,}"
        )
    child = tree.child if isinstance(tree, Reshaped) else tree
    return Reshaped(child, tuple(wanted), tuple(range(len(wanted))), tuple(wanted))

"""The grammar of the bytes that reading and writing share: `docs/format.md`, its numbers and its tables."""

import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tersenet import codecs, cores
from tersenet.codecs.stream import FormatError
from tersenet.deferred import Deferred, MadeWhenRead
from tersenet.packed import NODES, Array, Packed, Tree, unpack

MAGIC, VERSION, SMALL_VERSION = b"TERSE", 1, 2  # a file of up to `SMALL` bytes has one check for all that is in it
PREAMBLE, FOOTER = 14, 12  # magic, version, header length, header CRC; whole length, whole CRC
SMALL, SMALL_FOOTER = 1 << 16, 4
HEADER_CAP, NAMES_CAP, NAME_CAP, META_CAP, SECTION_CAP, RANK_CAP = 1 << 24, 1 << 24, 1 << 10, 1 << 16, 64, 8
# Decoded bytes: 256 MiB, or 1000 times the file up to 4 GiB, or 64 times a file that is larger.
ALWAYS, EXPANSION, CEILING, LARGE = 1 << 28, 1000, 1 << 32, 64
OBJECTS = 100  # bytes in memory, about, for each byte of the header
MANY, EACH = 1 << 16, 16  # so many tensors; more have so many bytes of the file each
ALIAS = 255  # in place of a type: the tensor is an earlier one
SHARED = 255  # in place of a tag: the array is an earlier one
POOLED_SIZE, POOLED_VECTOR = 64, 1024  # values of arrays, and of vectors, that share the stream of others

RISING = "rising"  # float32 that never fall, as those of a palette: how far the bits of each are from the last's
# How an array lies in memory and, where that loses nothing, in a narrower type in the file. Only ever append.
FORMATS = [
    ("bool", "bool"), ("uint8", "uint8"), ("int8", "int8"), ("uint16", "uint16"), ("int16", "int16"),
    ("uint32", "uint32"), ("int32", "int32"), ("uint64", "uint64"), ("int64", "int64"),
    ("float16", "float16"), ("float32", "float32"), ("float64", "float64"),
    ("float32", "float16"), ("float32", "bfloat16"), ("float64", "float32"), ("float32", RISING),
]  # fmt: skip
WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, RISING: 4}
DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64",
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
FLOATS = ("float16", "float32", "float64", "bfloat16")  # what may be packed; 8-bit floats are kept as bytes
# What holds a type that NumPy has not: float32 whose values are bfloat16's, and the bytes of 8-bit floats.
STAND_IN = {name: "float32" if name == "bfloat16" else "uint8" for name in DTYPES[12:]}
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
    "dense: 8-bit floats, kept bit for bit",
    "folded: its scale went into the layer before it",
    "dense: kept by a rule",
    "dense: no result depends on it, so what its method needs is not known",
    "dense: no rank that was asked for saves anything",
    "dense: left whole by the ranks that were chosen",
    "packed so that its dead channels cannot go alone",
    "dense: a statistic of the network as it is here",
    "dense: not of the shape that compact filters need",
]
REQUIRED, DEFLATED = 1, 2  # flags of a section
NONE, NUMBER, TEXT, TUPLE, ARRAY, NODE = range(6)
KINDS, CODED = tuple(NODES.values()), tuple(codecs.CODECS)
POOLED = 127  # in place of a codec
IN_MEMORY = tuple(np.dtype(held) for held, _ in FORMATS)
INTEGERS = tuple(WIDTH.get(stored, 1) for _, stored in FORMATS)  # that codecs see for a value: a float's bytes
CORES = 1 if sys.platform == "emscripten" else cores.usable()  # a browser's Python has no threads to start
THREADS = min(4, CORES)  # that decode
WORTH_A_THREAD = 1 << 14  # integers beside the largest array
GROUP = 1 << 25  # values, over which a network is large: so many are in memory at a time, or one tensor that has more
# What the header of a small file is deflated against: names, then records of tensors, the likeliest last, where fewer
# bits point. Part of the format: never change it.
DICTIONARY = (
    b'{"folded":{"metadata":"{"rules":{"'
    b"module.model.encoder.decoder.backbone.transformer.blocks.embeddings.word_position_token_type_"
    b"attention.self.query.key.value.in_proj_out_proj.qkv.intermediate.output.dense.LayerNorm.mlp.norm."
    b"weight_ih_l0weight_hh_l0bias_ih_l0bias_hh_l0features.classifier.head.stem.downsample.shortcut.running_mean"
    b"\x03var\x0a\x03\x00~\x04\x0a\x01"
    b"\x13num_batches_tracked\x08\x04\x00~\x04\x08\x00\x00\x02"
    b"layer1.0.conv2.weight\xff"
    b"\x0abn2.weight\x0a\x0a\x00\x00\x05\x04\x02\x01\x10\x00\x02\x04\x0c\x00\x7f\x00\x03\x00"
    b"\x0crunning_mean\x0a\x00\x00\x00\x05\x04\x02\x01 \x00\x02\x04\x0a\x00\x7f\x00\x03\x00"
    b"\x07\x04\x00\x04\x01\x05\x05\x07\x06\x04\x01\x01\x7f\x04\x0c\x02\x10\x01\x7f"
    b"\x07\x04\x00\x02\x06\x04\x01\x01\x7f\x04\x0c\x02 \x01\x7f"
    b"\x00\x0cconv1.weight\x0a\x00\x0a\x05\x04\x02\x04@ \x03\x03\x07\x04\x0c\x00\x7f\x00\x03\x02\x04\x02\x04@\x01\x01"
    b"\x01\x7f\x04\x02\x04\x01\x01\x03\x03\x7f\x06\x04bias\x0a\x00\x00~\x04\x0c\x01@\x7f"
    b"\x00\x0afc1.weight\x0a\x00\x05\x04\x02\x02\x0a@\x07\x04\x0c\x00\x7f\x00\x03\x02\x04\x02\x02@\x01\x7f\x04\x02\x02"
    b"\x01\x7f\x04\x04bias\x0a\x00\x05\x04\x02\x01\x0a\x7f\x04\x0a\x00\x7f\x00\x03\x00"
    b"\x04\x04bias\x0a\x01\x04\x0c\x01\x0a\x7f\x00\x082.weight\x0a\x00\x05\x04\x02\x02\x0a\x07\x04\x0c\x00\x7f\x00\x03"
    b"\x00"
)


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

    `error` is the relative L2 error ||w - packed|| / ||w||, or None where nobody measured it. A tree that is given as
    `Deferred` is made whenever `tree` is read; all else is known before.
    """

    tree: Tree = MadeWhenRead()  # noqa: RUF009 - a descriptor, which holds nothing itself
    dtype: str = "float32"
    note: str = ""
    error: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense shape; nothing is decoded for it."""
        return tuple(vars(self)["tree"].shape)

    def __reduce__(self) -> Any:  # a copy, or what is sent to another process, has its tree with it
        return Tensor, (self.tree, self.dtype, self.note, self.error)

    def unpack(self) -> Array:
        """The dense NumPy array in the tensor's own type, or its `STAND_IN`: bfloat16's values as float32."""
        dense = np.asarray(unpack(self.tree))
        if self.dtype == "float16" and isinstance(self.tree, Packed):
            dense = np.asarray(np.clip(dense, -65504, 65504))  # what packing moved past the largest half is no infinity
        return as_type(dense, self.dtype)


def in_order(words: Array) -> Array:
    """The bits of floats, as unsigned integers, in the floats' order: -0.0 next to 0.0, NaN at the ends.

    >>> in_order(np.array([-1.0, -0.0, 0.0, 1.0], np.float32).view(np.uint32)).argsort().tolist()
    [0, 1, 2, 3]
    """
    top = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words & top, ~words, words | top)


def from_order(words: Array) -> Array:
    """The inverse of `in_order`."""
    top = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words & top, words ^ top, ~words)


def as_type(dense: Array, dtype: str) -> Array:
    """An array rounded to a tensor's type, ties to even, or to the values of its `STAND_IN`; itself where it is so."""
    with np.errstate(over="ignore"):
        single = dense.astype(STAND_IN.get(dtype, dtype), copy=False)
    if dtype != "bfloat16":
        return single
    words = single.view(np.uint32).reshape(-1)
    low = words & np.uint32(0xFFFF)
    if not low.any():
        return single
    rounded = (words + np.uint32(0x7FFF) + (words >> 16 & 1)) & np.uint32(0xFFFF0000)
    quiet = words & np.uint32(0xFFFF0000) | np.uint32(0x400000)  # rounding would make some NaN a zero
    rounded = np.where(np.isnan(single).reshape(-1) & (low > 0), quiet, rounded)
    return rounded.view(np.float32).reshape(single.shape)


def is_large(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a network is decoded and written some tensors at a time."""
    return sum(math.prod(tensor.shape) for tensor in {id(t): t for t in tensors.values()}.values()) > GROUP


def groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in their order, as many at a time as `GROUP` allows, their trees in memory until the next are."""
    group, size, seen = dict[str, Tensor](), 0, set[int]()
    for name, tensor in tensors.items():
        more = 0 if id(tensor) in seen else math.prod(tensor.shape)
        seen.add(id(tensor))
        if group and size + more > GROUP:
            yield from _held(group)
            group, size = {}, 0
        group[name], size = tensor, size + more
    yield from _held(group)


def _held(group: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    trees = _trees(list({id(tensor): tensor for tensor in group.values()}.values()))
    yield group
    del trees  # which held what is deferred


def _trees(tensors: Sequence[Tensor]) -> list[Tree]:
    """The trees of tensors, made on as many threads as may be where there are several to make."""
    deferred = [tensor for tensor in tensors if isinstance(vars(tensor)["tree"], Deferred)]
    if THREADS == 1 or len(deferred) < 2:
        return [tensor.tree for tensor in tensors]
    from concurrent.futures import ThreadPoolExecutor  # which readers of small files need not wait for

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda tensor: tensor.tree, tensors))


def at_hand(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every tree in memory for good; tied names share one."""
    made = {id(t): replace(t) for group in groups(tensors) for t in {id(t): t for t in group.values()}.values()}
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


class Section(NamedTuple):
    """Named bytes beside the tensors; a reader that does not know a section that is `required` refuses the file."""

    data: bytes
    required: bool = False


def expanded(coded: int) -> int:
    """How many bytes a deflated header may expand to: many small tensors alike repeat themselves."""
    return min(HEADER_CAP, 32 * coded + (1 << 16))


def inflated(coded: bytes, most: int, dictionary: bytes = b"") -> bytes:
    """Bytes as they were before they were deflated; raises `FormatError` where they would be over `most`."""
    expander = zlib.decompressobj(-15, dictionary)
    try:
        plain = expander.decompress(coded, most + 1)
    except zlib.error:
        raise FormatError("deflated bytes are damaged") from None
    if len(plain) > most or not expander.eof or expander.unused_data:
        raise FormatError("deflated bytes are damaged or expand too far")
    return plain

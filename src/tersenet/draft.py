"""The network under work: every tensor as a tree, so that a draft is itself a file."""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.artifact import FLOATS, Artifact, Coding, Section, Tensor, as_stored, relative_error
from tersenet.dense import place
from tersenet.journal import Journal
from tersenet.norms import FOLDED
from tersenet.packed import Array, Packed, Tree, map_arrays, unpack
from tersenet.task import duplicate

KEPT = "dense: no stage packed it"
QUICK = Coding(("bits", "context"))  # to count bytes: nearly as small as the best of all codecs, and never smaller
ERROR = 3  # bytes that a measured error will add to each tensor
ACTIVATIONS = "activations"  # the section that tells how these are rounded (`activations.py`)
KEPT_BY_RULE = "dense: kept by a rule"
BUFFER = "dense: a buffer, kept bit for bit"
PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
NOT_FINITE = "dense: NaN or infinite values"
EIGHT_BITS = "dense: 8-bit floats, kept bit for bit"
RULES_CAP = 30_000  # bytes of the rules that a file tells; its notes hold 64 KiB in all
# Last parts of the names of what is no weight, for arrays that come without their module.
BUFFERS = (
    "running_*", "moving_mean", "moving_var*", "mean", "var", "std", "pixel_mean", "pixel_std", "num_batches_tracked",
    "*inv_freq", "freqs_cis", "cos_cached", "sin_cached", "*position_ids", "token_type_ids", "*mask*",
    "anchors", "anchor_grid", "*_index", "relative_coords_table", "zero_point", "betas", "*alphas_cumprod*",
)  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """The network under work: its module (None where only arrays were given) and every tensor as a tree.

    `folded` has, by the name of a folded norm, the weight that took its scale and, of a transposed convolution, its
    groups (else 0): of those norms for which the order of the tensors does not tell it (`folding.py`). `left` has the
    names that no stage may change, and `rules` those that a rule packed, each with the text of the rule (`where.py`).
    `activations` has, by layer, the fixed point in which its values are to be (`activations.py`).
    `journal` is where stages write what they do.
    """

    model: nn.Module | None
    tensors: Mapping[str, Tensor]
    trainable: frozenset[str] = frozenset()
    folded: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, Sequence[int]] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)

    @staticmethod
    def of_model(model: nn.Module) -> "Draft":
        """The draft of a module: tied weights are one tensor, buffers are kept bit for bit, extra state is left out.

        Raises ValueError for NaN or infinite weights, naming the layer.
        """
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        tensors = _dense(state, lambda name, array: name in parameters)
        weights = {name: tensor for name, tensor in tensors.items() if name in parameters and tensor.dtype in FLOATS}
        if broken := [name for name, tensor in weights.items() if tensor.note == NOT_FINITE]:
            raise ValueError(f"{broken[0]}: holds NaN or infinite weights; train it again or repair them first")
        return Draft(model, tensors, frozenset(weights))

    @staticmethod
    def of_arrays(arrays: Mapping[str, Array]) -> "Draft":
        """The draft of named arrays or torch tensors, which need no module: finite floats that are no buffers by name.

        Arrays that share their numbers, or are equal, are one tensor: nothing trains them apart. Extra state that is
        none is left out. Floats of two or more axes count as weights.
        """
        state = {n: a for n, a in arrays.items() if hasattr(a, "dtype") or n.rpartition(".")[2] != "_extra_state"}
        tensors = _dense(state, lambda name, array: not _is_buffer(name, array))
        trainable = frozenset(name for name, tensor in tensors.items() if tensor.note == KEPT)
        several = [name for name, tensor in tensors.items() if math.prod(tensor.tree.shape) > 1]
        return Draft(None, tensors, trainable).tied(several)

    def weights(self) -> list[str]:
        """The names that methods may pack: trainable floats of two axes or more, not empty, tied ones once."""
        seen, names = set[int](), []
        for name, tensor in self.tensors.items():
            shape = tensor.tree.shape
            fits = name in self.trainable and len(shape) >= 2 and np.prod(shape) > 0 and "float" in tensor.dtype
            if fits and id(tensor) not in seen:
                seen.add(id(tensor))
                names.append(name)
        return names

    def frozen(self) -> set[str]:
        """The names of parameters that are not to be trained: `requires_grad` is False."""
        parameters = [] if self.model is None else self.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in parameters if not parameter.requires_grad}

    def count(self) -> int:
        """How many numbers the draft's tensors hold, tied ones once."""
        unique = {id(tensor): tensor for tensor in self.tensors.values()}
        return sum(math.prod(tensor.tree.shape) for tensor in unique.values())

    def with_trees(self, trees: Mapping[str, Tree], note: str = "") -> "Draft":
        """The draft with new trees for some names; names tied to these follow, what is folded or `left` stays so."""
        before = {name: (self.tensors[name], tree) for name, tree in trees.items() if name not in self.left}
        renewed = {id(b): replace(b, tree=t, note=FOLDED if b.note == FOLDED else note) for b, t in before.values()}
        return replace(self, tensors={n: renewed.get(id(t), t) for n, t in self.tensors.items()})

    def with_notes(self, notes: Mapping[str, str]) -> "Draft":
        renewed = {id(self.tensors[n]): replace(self.tensors[n], note=note) for n, note in notes.items()}
        return replace(self, tensors={n: renewed.get(id(t), t) for n, t in self.tensors.items()})

    def leaving(self, rules: Mapping[str, str]) -> "Draft":
        """The draft whose named tensors, and those tied to them, no stage changes; each name has its rule's text."""
        text = {id(self.tensors[name]): rule for name, rule in rules.items()}
        left = {name: text[id(tensor)] for name, tensor in self.tensors.items() if id(tensor) in text}
        return replace(self, left={**self.left, **left}, trainable=self.trainable - left.keys())

    def tied(self, names: Iterable[str]) -> "Draft":
        """The draft with those of the named tensors that are equal stored once, buffers apart from what is trained."""
        seen: dict[tuple[Any, ...], list[Tensor]] = {}
        made = dict(self.tensors)
        for name in names:
            tensor, raw = made[name], _raw(made[name].unpack())
            kind = name in self.trainable, tensor.dtype, tensor.note, tensor.tree.shape, zlib.crc32(raw)
            alike = seen.setdefault(kind, [])
            twin = next((other for other in alike if np.array_equal(_raw(other.unpack()), raw)), None)
            if twin is None:
                alike.append(tensor)
            else:
                made[name] = twin
        return replace(self, tensors=made)

    def module(self) -> nn.Module:
        """A copy of the module with the draft's weights in it."""
        if self.model is None:
            raise ValueError("this stage runs the network, but only arrays were given: use Task(model, ...)")
        return artifact_of(self).into(duplicate(self.model))  # type: ignore[no-any-return]

    def bias(self, weight: str) -> str | None:
        """The name of the bias that is added to a weight's output, where it has one that may change."""
        name = weight.removesuffix("weight") + "bias"
        held = self.tensors.get(name)
        fits = held is not None and name in self.trainable and held.tree.shape == self.tensors[weight].tree.shape[:1]
        return name if fits else None


def artifact_of(draft: Draft, coding: Coding | None = None, original: Mapping[str, Tensor] | None = None) -> Artifact:
    """The draft's file; with the original tensors, the error of each that is packed or changed is measured and stored.

    Where norms are folded the originals are taken folded alike (`folding.refolded`).
    """
    done: dict[int, Tensor] = {}
    for name, tensor in draft.tensors.items():
        error = None
        if original is not None and id(tensor) not in done and "float8" not in tensor.dtype:
            error = relative_error(tensor.unpack(), original[name].unpack())
            error = None if not error and not isinstance(tensor.tree, Packed) else error
        done.setdefault(id(tensor), replace(tensor, error=error))
    meta: dict[str, Any] = {"folded": dict(draft.folded)} if draft.folded else {}
    if rules := {**draft.rules, **draft.left}:
        meta |= {"rules": rules} if len(json.dumps(rules)) < RULES_CAP else {}
    told = json.dumps(dict(draft.activations), separators=(",", ":")).encode() if draft.activations else None
    sections = {} if told is None else {ACTIVATIONS: Section(told)}
    return Artifact({name: done[id(t)] for name, t in draft.tensors.items()}, coding or Coding(), meta, sections)


def _dense(state: Mapping[str, Array], is_weight: Callable[[str, Array], bool]) -> dict[str, Tensor]:
    """Every array as it came, with the reason; those that share their numbers are one tensor."""
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        array, dtype = as_stored(name, value)
        known = first.setdefault(place(value) or name, name)
        if known != name:
            tensors[name] = tensors[known]
            continue
        note = KEPT if is_weight(name, array) else BUFFER
        if not array.size:
            note = "dense: empty"
        elif dtype not in FLOATS:
            note = EIGHT_BITS if "float" in dtype else "dense: not a floating-point tensor"
        elif not np.isfinite(array).all():
            note = NOT_FINITE
        tensors[name] = Tensor(array.copy(), dtype, note)
    return tensors


def _raw(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _is_buffer(name: str, array: Array) -> bool:
    """Whether an array without a module is no weight, as the last part of its name or a triangle of ones tells."""
    last = re.split(r"[./]", name.lower().removesuffix(":0"))[-1]
    square = array.ndim >= 2 and array.shape[-1] == array.shape[-2] > 1
    causal = square and not array[..., 0, 1:].any() and bool((array == np.tri(array.shape[-1], dtype=np.int8)).all())
    return causal or any(fnmatch(last, pattern) for pattern in BUFFERS)


def round_leaves(tree: Tree, dtype: str = "float16") -> Tree:
    """The tree with each float leaf rounded to values that a narrower type holds exactly (leaves stay float32)."""

    def change(path: str, array: Array) -> Array:
        if "float" not in str(array.dtype):
            return array
        return torch.from_numpy(np.array(array)).to(getattr(torch, dtype)).to(torch.float32).numpy()

    return map_arrays(tree, change)


def precise(values: Array, dtype: str = "float16") -> Array:
    """Values as float32, rounded to a narrower type where each keeps the relative precision of its mantissa.

    Values too small or too large for the type do not.
    """
    single = np.asarray(values, np.float32)
    rounded = np.asarray(round_leaves(single, dtype))
    with np.errstate(invalid="ignore"):
        keeps = np.abs(rounded - single) <= PRECISION[dtype] * np.abs(single)
    return rounded if bool(keeps.all()) else single


def dense_array(tensor: Tensor) -> Array:
    """The tensor's dense float32 array."""
    return np.asarray(unpack(tensor.tree), np.float32)

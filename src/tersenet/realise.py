"""Trees become modules here: a draft or file as a network that is really smaller, and the way back.

Where the weight of a layer is `Sliced`, the layer loses the channels that are gone, as `SMALLER` says for its type.
Where it is `Factored`, or `Sparse` in groups of channels, the layer becomes a chain of ordinary layers (`chains.py`).
Everything else stays dense in the user's own layer. `absorb` brings weights that were tuned in the small form back into
the same trees.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.artifact import Artifact, Tensor, as_stored
from tersenet.chains import Step, chained, grouped, groups_of, steps_of, together
from tersenet.packed import Array, Factored, Packed, Tree
from tersenet.structure import is_plain, placed, refilled, support, unsliced
from tersenet.task import duplicate

Kept = Mapping[int, Array]  # the places of a tensor that stay, by axis


@dataclass(frozen=True)
class Smaller:
    """What becomes of a layer: the places of its tensors that stay, its own numbers, and the steps of its chain.

    Or it is one in `groups`, behind a shuffle.
    """

    parts: Mapping[str, Kept] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    groups: int = 0

    @property
    def last(self) -> str:
        """Where the layer that has the bias lies in a chain."""
        return "1." if self.groups else f"{len(self.steps) - 1}." if self.steps else ""


def realise(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with the tensors in it, its sliced layers smaller and its factored layers chains.

    It says what `Artifact.into` says, up to rounding, in torch's own layers. The module's code must not fix the numbers
    of channels that are gone; tracing sees to that where stages take them out. Transformers of torch whose layers are
    chains no longer take its fast paths, which leave padded places at zero. Warns, naming each, where a sliced or
    factored weight stays dense; raises ValueError where the tensors of a layer do not fit each other.
    """
    model, plan = Artifact(dict(tensors)).into(duplicate(module)), _plan(module, tensors)
    if dense := _dense(tensors, plan):
        warnings.warn(f"no smaller layer says the same, so these stay dense: {', '.join(dense)}", stacklevel=2)
    for name, smaller in plan.items():
        layer = model.get_submodule(name)
        for part, kept in smaller.parts.items():
            _shrink(layer, part, kept, _name(name, part))
        vars(layer).update(smaller.numbers)
        if smaller.last:
            tree, _ = unsliced(tensors[_name(name, "weight")].tree)
            made = chained(layer, tree, smaller.steps) if isinstance(tree, Factored) else grouped(layer, smaller.groups)
            if not name:
                return made
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, made)
    _slowed(model)
    return model  # type: ignore[no-any-return]


def _slowed(model: nn.Module) -> None:
    """Keep transformers of torch off their fast paths, which read the weight of a layer, where it is a chain."""
    chains = set[nn.Module]()
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and nn.Sequential in map(type, (layer.linear1, layer.linear2)):
            layer.activation_relu_or_gelu = 0
            chains.add(layer)
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoder) and not chains.isdisjoint(layer.layers):
            layer.use_nested_tensor = False


def absorb(small: nn.Module, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which `realise(module, tensors)` made `small`, in the same trees, with the values of `small` now.

    A tensor that did not change is the same object. Raises ValueError, naming the tensor, where `small` is of another
    shape or type, or changed what the tree cannot hold: quantized values, zeros of the structure, one of two tied.
    """
    with warnings.catch_warnings(action="ignore"):
        moved = _moved(realise(module, tensors), small)
    plan, found, first = _plan(module, tensors), dict[str, Tensor](), dict[int, str]()
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        smaller, tree = plan.get(layer, Smaller()), tensor.tree
        if part == "weight" and smaller.steps:
            chain = {k: moved[at] for k in range(len(smaller.steps)) if (at := _name(layer, f"{k}.weight")) in moved}
            tree = _refactored(name, tree, smaller.steps, chain)
        elif (now := moved.get(_name(layer, smaller.last + part))) is not None:
            if smaller.groups and part == "weight":
                now = together(now, smaller.groups)
            whole = np.array(tensor.unpack())
            kept = smaller.parts.get(part, {})
            whole[np.ix_(*(kept.get(axis, np.arange(n)) for axis, n in enumerate(whole.shape)))] = now
            tree = _refilled(name, tree, whole)
        found[name] = tensor if tree is tensor.tree else replace(tensor, tree=tree, error=None)
        one = found[first.setdefault(id(tensor), name)]
        if not np.array_equal(one.unpack(), found[name].unpack(), equal_nan=True):
            raise ValueError(
                f"{name}: stored once with {first[id(tensor)]}, but no longer equal; store them apart first"
            )
        found[name] = one
    return found


# ---------------------------------------------------------------- what becomes of each layer


def _plan(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Smaller]:
    """What becomes of each layer that changes, by name; layers whose tensors others share do not."""
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    plan: dict[str, Smaller] = {}
    for name, layer in module.named_modules():
        leading = next((part for part in ("weight", "running_mean") if _name(name, part) in tensors), None)
        if leading is None or any(uses[id(p)] > 1 for p in layer.parameters(recurse=False)):
            continue
        tree, kept = unsliced(tensors[_name(name, leading)].tree)
        smaller: Smaller | None = Smaller({leading: {}})
        if kept:
            shrink = next((shrink for kind, shrink in SMALLER if isinstance(layer, kind)), None)
            if any(len(there) == 0 for there in kept.values()):
                raise ValueError(f"{_name(name, leading)}: keeps no channel, and a layer cannot do without; use `into`")
            smaller = shrink(layer, kept) if shrink and max(kept) < 2 else None
        if smaller is None:
            continue
        if isinstance(tree, Factored) and all(kept[axis] is smaller.parts["weight"].get(axis) for axis in kept):
            smaller = replace(smaller, steps=steps_of(layer, tree))
        if not kept:
            smaller = replace(smaller, groups=groups_of(layer, tree))
        for part, places in smaller.parts.items():
            own = unsliced(tensors[_name(name, part)].tree)[1] if _name(name, part) in tensors else {}
            if any(not np.array_equal(there, places.get(axis, there)) for axis, there in own.items()):
                raise ValueError(f"{_name(name, part)}: keeps other channels than {leading} does; slice both alike")
        if any(smaller.parts.values()) or smaller.last:
            plan[name] = smaller
    return plan


def _linear(layer: Any, kept: Kept) -> Smaller:
    numbers = {("out_features", "in_features")[axis]: len(there) for axis, there in kept.items()}
    return Smaller({"weight": kept, "bias": {0: kept[0]} if 0 in kept else {}}, numbers)


def _convolution(layer: Any, kept: Kept) -> Smaller | None:
    """Groups that lose all their rows lose their inputs too, as in depthwise convolutions."""
    rows, inside = _all(kept, 0, layer.out_channels), _all(kept, 1, layer.in_channels // layer.groups)
    groups = _groups(rows, layer.groups, layer.out_channels)
    numbers = {"out_channels": len(rows), "in_channels": groups * len(inside), "groups": groups}
    return Smaller({"weight": kept, "bias": {0: rows}}, numbers) if groups else None


def _transposed(layer: Any, kept: Kept) -> Smaller | None:
    """The weight has inputs on axis 0 and the outputs of one group on axis 1."""
    width = layer.out_channels // layer.groups
    inputs, inside = _all(kept, 0, layer.in_channels), _all(kept, 1, width)
    groups = _groups(inputs, layer.groups, layer.in_channels)
    there = np.unique(inputs // (layer.in_channels // layer.groups))
    numbers = {"in_channels": len(inputs), "out_channels": groups * len(inside), "groups": groups}
    bias = (there[:, None] * width + inside).reshape(-1)
    return Smaller({"weight": kept, "bias": {0: bias}}, numbers) if groups else None


def _norm(layer: Any, kept: Kept) -> Smaller:
    """A norm without weights is known by its running mean."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return Smaller(dict.fromkeys(parts, kept), {"num_features": len(kept[0])})


def _group_norm(layer: Any, kept: Kept) -> Smaller | None:
    """Whole groups alone: what is left of one would be normalised by other numbers."""
    groups, width = _groups(kept[0], layer.num_groups, layer.num_channels), layer.num_channels // layer.num_groups
    numbers = {"num_groups": groups, "num_channels": len(kept[0])}
    return Smaller({"weight": kept, "bias": kept}, numbers) if groups * width == len(kept[0]) else None


def _prelu(layer: Any, kept: Kept) -> Smaller:
    return Smaller({"weight": kept}, {"num_parameters": len(kept[0])})


def _embedding(layer: Any, kept: Kept) -> Smaller | None:
    """Rows stay, since any token may come."""
    return Smaller({"weight": {1: kept[1]}}, {"embedding_dim": len(kept[1])}) if 1 in kept else None


SMALLER: tuple[tuple[type[nn.Module], Callable[[Any, Kept], Smaller | None]], ...] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvTransposeNd, _transposed),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.modules.batchnorm._NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
    (nn.Embedding, _embedding),
)


def _all(kept: Kept, axis: int, size: int) -> Array:
    return kept.get(axis, np.arange(size))


def _groups(there: Array, groups: int, size: int) -> int:
    """How many groups are left of an axis: those that are whole, or all where each has lost as many; else 0."""
    width = size // groups
    counts = np.bincount(there // width, minlength=groups)
    if set(counts) <= {0, width}:
        return int((counts > 0).sum())
    return groups if len(set(counts)) == 1 else 0


# ---------------------------------------------------------------- values


def _name(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _dense(tensors: Mapping[str, Tensor], plan: Mapping[str, Smaller]) -> list[str]:
    """The names of the sliced and factored tensors that stay dense, along some axis at least."""
    names = []
    for name, tensor in tensors.items():
        tree, kept = unsliced(tensor.tree)
        layer, _, part = name.rpartition(".")
        smaller = plan.get(layer, Smaller())
        chain = part == "weight" and bool(smaller.steps)
        if kept.keys() - smaller.parts.get(part, {}).keys() or (isinstance(tree, Factored) and not chain):
            names.append(name)
    return names


def _shrink(layer: nn.Module, part: str, kept: Kept, name: str) -> None:
    """Leave out what is gone of a tensor of a layer, if it has it."""
    whole = getattr(layer, part, None)
    if whole is None or not kept:
        return
    less, rest = whole.detach(), whole.detach().clone()
    for axis, there in kept.items():
        less = less.index_select(axis, torch.from_numpy(np.asarray(there)).to(whole.device))
    rest[np.ix_(*(kept.get(axis, np.arange(n)) for axis, n in enumerate(whole.shape)))] = 0
    if isinstance(whole, nn.Parameter) and bool(rest.any()):
        raise ValueError(f"{name}: has values in channels that are gone; slice it as the layer's weight is")
    setattr(
        layer,
        part,
        nn.Parameter(less.clone(), whole.requires_grad) if isinstance(whole, nn.Parameter) else less.clone(),
    )


def _moved(before: nn.Module, now: nn.Module) -> dict[str, Array]:
    """The tensors of a module that differ from another's of the same layers, as arrays."""
    one, other = (
        {name: as_stored(name, t) for name, t in m.state_dict().items() if isinstance(t, torch.Tensor)}
        for m in (before, now)
    )
    forms = [{name: (array.shape, kind) for name, (array, kind) in state.items()} for state in (one, other)]
    if wrong := sorted(name for name in forms[0].keys() | forms[1].keys() if forms[0].get(name) != forms[1].get(name)):
        raise ValueError(f"{wrong[0]}: is not as `realise` makes it of these tensors; absorb what came from them")
    return {
        name: array for name, (array, _) in other.items() if not np.array_equal(array, one[name][0], equal_nan=True)
    }


def _refactored(name: str, tree: Tree, steps: Sequence[Step], weights: Mapping[int, Array]) -> Tree:
    """A factored weight with the weights of its chain, by number, in place of its factors."""
    inner, kept = unsliced(tree)
    assert isinstance(inner, Factored)
    factors = list(inner.factors)
    for at, weight in weights.items():
        factor = factors[steps[at].factor]
        factors[steps[at].factor] = _refilled(name, factor, steps[at].back(weight, factor.shape))
    return placed(replace(inner, factors=tuple(factors)), kept, tree.shape) if weights else tree


def _refilled(name: str, tree: Tree, dense: Array) -> Tree:
    """The tree with other values."""
    if isinstance(unsliced(tree)[0], Factored):
        raise ValueError(
            f"{name}: stays dense, and its factors cannot follow what tuning moved; freeze it while tuning"
        )
    if not is_plain(tree):
        raise ValueError(f"{name}: its values are quantized, but tuning moved them; absorb first, quantize afterwards")
    if isinstance(tree, Packed) and dense[~support(tree)].any():
        raise ValueError(f"{name}: tuning filled places that the tree holds at zero; hold them while tuning")
    return refilled(tree, dense)

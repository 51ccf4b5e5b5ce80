"""The trees of a draft as leaves that torch trains, the dense weights that they make, and the way back.

The gradient of a codeword is the sum over its members, as Deep Compression has it (Han, Mao, Dally 2016, section 3.3):
it falls out of differentiating `unpack`. `Shared` takes the mean, as codewords of many members need (Stock et al. 2020,
section 3.3). Pruned weights have no leaf, so no momentum or weight decay can move them.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from tersenet.artifact import Artifact, Tensor, as_stored
from tersenet.draft import Draft
from tersenet.norms import FOLDED
from tersenet.packed import Array, Codebook, Packed, Tree, Uniform, map_arrays, narrowed, parts_of, unpack
from tersenet.structure import is_plain, once, refilled, support


class Network:
    """The draft's trees as torch leaves, the dense weights they make, and the way back.

    An array that several trees share is one leaf, whose gradient is the sum over them; steps of levels part ways.
    Leaves are float32, or float64 where the arrays are; the network gets each tensor in its own type. What is not
    trained is `kept`, dense: buffers, frozen parameters, the scales of folded norms.
    """

    def __init__(self, draft: Draft, device: str = "cpu") -> None:
        self.before, self.device, self.leaves = draft, torch.device(device), list[torch.Tensor]()
        names = draft.trainable - draft.frozen()
        free = {n: t for n, t in draft.tensors.items() if n in names and t.note != FOLDED}
        self.trees: dict[int, Tree] = {}
        self.held, self.leaf = once(self._held), once(self._leaf)
        with self._placed():
            for tensor in free.values():
                if id(tensor) not in self.trees:
                    self.trees[id(tensor)] = self._tree(tensor.tree)
        rest = {name: tensor for name, tensor in draft.tensors.items() if id(tensor) not in self.trees}
        dense = Artifact(rest).state_dict()
        self.kept = {id(tensor): dense[name].to(self.device) for name, tensor in rest.items()}

    def _placed(self) -> Any:
        """Makes new tensors on the device, those that nodes make while they unpack too."""
        return contextlib.nullcontext() if self.device.type == "cpu" else self.device

    def _tree(self, tree: Tree) -> Tree:
        if isinstance(tree, Uniform) and not isinstance(tree.scale, Packed):
            node, unit = cast(Uniform, map_arrays(tree, self.held)), self._held("", _unit(tree))
            moved = torch.zeros_like(unit).requires_grad_()
            self.leaves.append(moved)
            return _Stepped(node, moved, unit)
        return _rebuilt(tree, self._tree) if isinstance(tree, Packed) else map_arrays(tree, self.leaf)

    def _held(self, path: str, array: object) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def _leaf(self, path: str, array: object) -> torch.Tensor:
        made = self._held(path, array)
        if made.is_floating_point():
            made = (made if made.dtype == torch.float64 else made.float()).requires_grad_()
            self.leaves.append(made)
        return made

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, in its own type, made of the leaves as they are now."""
        dense: dict[int, torch.Tensor] = dict(self.kept)
        with self._placed():
            for tensor in self.before.tensors.values():
                if id(tensor) not in dense:
                    made = unpack(self.trees[id(tensor)]).to(getattr(torch, tensor.dtype))
                    dense[id(tensor)] = _Strided.apply(made)  # type: ignore[no-untyped-call]
        return {name: dense[id(tensor)] for name, tensor in self.before.tensors.items()}

    def tensors(self) -> list[torch.Tensor]:
        """All that training changes."""
        return [*self.leaves, *self.kept.values()]

    def follow(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over buffers that the network has put in place of those it was given; it changes most in place."""
        for name, tensor in self.before.tensors.items():
            if id(tensor) in self.kept:
                self.kept[id(tensor)] = state[name].detach()

    def draft(self) -> Draft:
        renewed, read = dict[int, Tensor](), once(lambda _, array: array.detach().cpu().numpy())
        for name, tensor in self.before.tensors.items():
            if id(tensor) in self.trees:
                with self._placed():
                    tree = self._arrays(self.trees[id(tensor)], read)
                whole = isinstance(tree, Packed)
                renewed[id(tensor)] = replace(tensor, tree=tree if whole else replace(tensor, tree=tree).unpack())
            elif is_plain(tensor.tree):
                now = as_stored(name, self.kept[id(tensor)])[0]
                renewed[id(tensor)] = replace(tensor, tree=refilled(tensor.tree, now))
        return replace(self.before, tensors={n: renewed.get(id(t), t) for n, t in self.before.tensors.items()})

    def _arrays(self, tree: Tree, read: Callable[[str, Array], Array]) -> Tree:
        if isinstance(tree, _Stepped):
            return replace(cast(Uniform, map_arrays(tree.node, read)), scale=map_arrays(tree.scale, read))
        if isinstance(tree, Packed):
            return _rebuilt(tree, lambda part: self._arrays(part, read))
        return map_arrays(tree, read)


def _unit(node: Uniform) -> Any:
    """By how much each step of a `Uniform` changes where its weights together change by 1."""
    scale = np.asarray(node.scale)
    squares = np.square(replace(node, scale=np.ones_like(scale)).unpack().astype(np.float64))
    squares = squares.sum(tuple(range(squares.ndim - scale.ndim)))
    groups = [part for own, n in zip(scale.shape, squares.shape, strict=True) for part in (own, n // max(own, 1))]
    squares = squares.reshape(groups).sum(tuple(range(1, len(groups), 2)))
    return np.asarray(1 / np.sqrt(np.where(squares > 0, squares, 1)), np.float32).reshape(scale.shape)


class _Strided(torch.autograd.Function):
    """The same tensor, with a gradient that optimisers and nodes can take where an embedding gives a sparse one."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.to_dense() if gradient.is_sparse else gradient


@dataclass(frozen=True, eq=False)
class _Stepped(Packed):
    """A `Uniform` whose steps are trained by what `moved` adds to them, in units of `_unit`.

    A step is shared by many levels: its own gradient is as much larger than a weight's as all of these together.
    """

    node: Uniform
    moved: torch.Tensor
    unit: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        scale: torch.Tensor = unpack(self.node.scale)
        return scale + self.moved * self.unit

    def unpack(self) -> torch.Tensor:
        dense: torch.Tensor = replace(self.node, scale=self.scale).unpack()
        return dense

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.shape


@dataclass(frozen=True, eq=False)
class _Straight(Packed):
    """A `Uniform` whose levels are trained: `weight` is rounded to them, its gradient passes straight through."""

    weight: torch.Tensor
    kept: torch.Tensor  # 0 where the level is held at zero
    node: Uniform

    def levels(self) -> torch.Tensor:
        free = self.weight / self._step() * self.kept
        return free + (free.round() - free).detach()

    def unpack(self) -> torch.Tensor:
        return self.levels() * self._step()

    def _step(self) -> torch.Tensor:
        step: torch.Tensor = replace(self.node, q=torch.ones_like(self.weight)).unpack()
        return step

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


class Shared(Network):
    """The same with the mean of its members' gradients for each codeword, of members in all trees that share it."""

    def __init__(self, draft: Draft, device: str) -> None:
        self.counts: dict[int, list[torch.Tensor]] = {}  # by the leaf's id
        super().__init__(draft, device)

    def _tree(self, tree: Tree) -> Tree:
        made = super()._tree(tree)
        if isinstance(made, Codebook) and not isinstance(made.codewords, Packed):
            counts, axes = self.counts.setdefault(id(made.codewords), []), made.codewords.shape[:-1]
            if not counts:
                made.codewords.register_hook(
                    lambda gradient: gradient / torch.stack(counts).sum(0).clamp(min=1)[..., None]
                )
            counts.append(torch.bincount(made.numbers().reshape(-1), minlength=axes.numel()).reshape(axes))
        return made


class Partly(Network):
    """The same with places of plain weights held, by name."""

    def __init__(self, draft: Draft, device: str, held: Mapping[str, Any]) -> None:
        self.free = {id(draft.tensors[name].tree): ~np.asarray(mask) for name, mask in held.items()}
        super().__init__(draft, device)

    def _tree(self, tree: Tree) -> Tree:
        free = self.free.get(id(tree))
        if free is None:
            return super()._tree(tree)
        dense = np.asarray(unpack(tree))
        stays = free & support(tree)
        values = self._leaf("", dense[stays])
        return _Held(self._held("", stays), values, self._held("", dense).to(values), tree)

    def _arrays(self, tree: Tree, read: Callable[[str, Array], Array]) -> Tree:
        return (
            refilled(tree.before, read("", tree.unpack())) if isinstance(tree, _Held) else super()._arrays(tree, read)
        )


@dataclass(frozen=True, eq=False)
class _Held(Packed):
    """Values where the mask is set, those of `dense` elsewhere; `before` is the tree that they stand for."""

    mask: torch.Tensor
    values: torch.Tensor
    dense: torch.Tensor
    before: Tree

    def unpack(self) -> torch.Tensor:
        return self.dense.masked_scatter(self.mask, self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dense.shape)


class Levels(Network):
    """The same for `TrainLevels`: only what is quantized is trained, its levels too."""

    def _tree(self, tree: Tree) -> Tree:
        if not isinstance(tree, Packed):
            return map_arrays(tree, self.held)
        if isinstance(tree, Uniform) and tree.zero is None and tree.q.min() != tree.q.max():  # constants stay
            node = cast(Uniform, map_arrays(tree, self.held))
            weight = node.unpack().requires_grad_()
            self.leaves.append(weight)
            kept = (node.q != 0).float() if weight.dim() > 1 else torch.ones_like(weight)
            return _Straight(weight, kept, node)
        return _rebuilt(tree, self._tree)

    def _arrays(self, tree: Tree, read: Callable[[str, Array], Array]) -> Tree:
        if isinstance(tree, _Straight):
            q = tree.levels().detach().round().to(torch.int32).cpu().numpy()
            return replace(cast(Uniform, map_arrays(tree.node, read)), q=narrowed(q))
        return super()._arrays(tree, read)


def _rebuilt(tree: Packed, change: Callable[[Tree], Tree]) -> Packed:
    """The node with `change` in place of everything directly under it."""
    parts = {name: getattr(tree, name) for name in parts_of(type(tree))}
    changed = {n: tuple(map(change, p)) if isinstance(p, tuple) else change(p) for n, p in parts.items()}
    return type(tree)(**changed)

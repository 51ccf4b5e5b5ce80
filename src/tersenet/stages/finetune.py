"""Train the float leaves of the trees, hold the integers: masked retraining, centroid tuning and scale learning alike.

The gradient of a codeword is the SUM over its members, as Deep Compression has it (Han, Mao, Dally 2016, section 3.3):
it falls out of differentiating `unpack`. Pruned weights have no leaf, so no momentum or weight decay can move them.

`TrainLevels` trains the levels of `Uniform` nodes as well: a float weight stands behind each, is rounded on the way
forward, and takes the gradient straight through (Bengio, Leonard, Courville 2013). Steps stay what the quantization
chose, and levels that are zero stay zero, so that the file does not grow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor as Array
from torch import nn
from torch.func import functional_call

from tersenet.artifact import Tensor
from tersenet.packed import Packed, Tree, Uniform, map_arrays, narrowed, parts_of, unpack
from tersenet.recipe import Draft
from tersenet.task import Schedule, Task, one_thread, progress


def tune(draft: Draft, task: Task, schedule: Schedule, epochs: range, seed: int, label: str = "tuning") -> Draft:
    """The draft with its trainable float leaves, biases and norms trained over `epochs` of the schedule.

    Buffers such as BatchNorm's running statistics follow, as in any training. Raises ValueError where the loss stops
    being a number.
    """
    return _trained(_Network(draft), task, schedule, epochs, seed, label)


def _trained(network: "_Network", task: Task, schedule: Schedule, epochs: range, seed: int, label: str) -> Draft:
    if network.before.model is None:
        raise ValueError("this stage trains the network, but only arrays were given: use Task(model, ...)")
    with one_thread():
        optimizer = schedule.optimizer(network.leaves)
        model = network.before.model.train()
        if isinstance(network, _Levels):
            for layer in model.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()  # folded norms have no statistics to follow
        for epoch in progress(epochs, label, len(epochs)):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(epoch)
            for x, y in task.batches(epoch, seed, schedule.batch):
                optimizer.zero_grad(set_to_none=True)
                outputs = functional_call(model, network.state(), (x,), tie_weights=False)
                loss = task.loss_of(outputs, x, y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the loss became {loss.item()} in epoch {epoch}: lower the learning rate {schedule.lr}"
                )
        model.eval()
        return network.draft()


class _Network:
    """The draft's trees as torch leaves, the dense weights they make, and the way back."""

    def __init__(self, draft: Draft) -> None:
        self.before, self.leaves = draft, list[Array]()
        self.trees: dict[int, Tree] = {}
        for name, tensor in draft.tensors.items():
            if id(tensor) not in self.trees:
                self.trees[id(tensor)] = self._tree(tensor.tree, name in draft.trainable)

    def _tree(self, tree: Tree, trainable: bool) -> Tree:
        return map_arrays(tree, self._leaf if trainable else _held)

    def _leaf(self, path: str, array: object) -> Array:
        made = _held(path, array)
        if made.is_floating_point():
            made = made.float().requires_grad_()
            self.leaves.append(made)
        return made

    def state(self) -> dict[str, Array]:
        dense = {key: unpack(tree) for key, tree in self.trees.items()}
        return {name: dense[id(tensor)] for name, tensor in self.before.tensors.items()}

    def draft(self) -> Draft:
        renewed: dict[int, Tensor] = {}
        for tensor in self.before.tensors.values():
            tree = self._arrays(self.trees[id(tensor)])
            if not isinstance(tree, Packed) and tree.dtype.kind == "f" and tensor.dtype in ("float16", "float64"):
                tree = tree.astype(tensor.dtype)
            renewed.setdefault(id(tensor), replace(tensor, tree=tree))
        return replace(self.before, tensors={n: renewed[id(t)] for n, t in self.before.tensors.items()})

    def _arrays(self, tree: Tree) -> Tree:
        return map_arrays(tree, lambda _, a: a.detach().numpy())


@dataclass(frozen=True, eq=False)
class _Straight(Packed):
    """A `Uniform` whose levels are trained: `weight` is rounded to them, its gradient passes straight through."""

    weight: Array
    kept: Array  # 0 where the level is held at zero
    node: Uniform

    def levels(self) -> Array:
        free = self.weight / self._step() * self.kept
        return free + (free.round() - free).detach()

    def unpack(self) -> Array:
        return self.levels() * self._step()

    def _step(self) -> Array:
        step: Array = replace(self.node, q=torch.ones_like(self.weight)).unpack()
        return step

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


class _Levels(_Network):
    """The same for `TrainLevels`: only what is quantized is trained, its levels too."""

    def _tree(self, tree: Tree, trainable: bool) -> Tree:
        if not trainable or not isinstance(tree, Packed):
            return map_arrays(tree, _held)
        if isinstance(tree, Uniform) and tree.zero is None and np.ptp(tree.q) > 0:  # a folded norm's are all equal
            node = cast(Uniform, map_arrays(tree, _held))
            weight = node.unpack().requires_grad_()
            self.leaves.append(weight)
            kept = (node.q != 0).float() if weight.dim() > 1 else torch.ones(weight.shape)
            return _Straight(weight, kept, node)
        return _rebuilt(tree, lambda part: self._tree(part, True))

    def _arrays(self, tree: Tree) -> Tree:
        if isinstance(tree, _Straight):
            q = tree.levels().detach().round().to(torch.int32).numpy()
            return replace(super()._arrays(tree.node), q=narrowed(q))
        return _rebuilt(tree, self._arrays) if isinstance(tree, Packed) else super()._arrays(tree)


def _rebuilt(tree: Packed, change: Callable[[Tree], Tree]) -> Packed:
    """The node with `change` in place of everything directly under it."""
    parts = {name: getattr(tree, name) for name in parts_of(type(tree))}
    changed = {n: tuple(map(change, p)) if isinstance(p, tuple) else change(p) for n, p in parts.items()}
    return type(tree)(**changed)


def _held(path: str, array: object) -> Array:
    return torch.from_numpy(np.array(array))


@dataclass(frozen=True)
class Finetune:
    """Train what the trees leave free. Without `lr`, at a hundredth of the task's learning rate."""

    epochs: int = 2
    lr: float | None = None
    seed: int = 0

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        if task is None:
            raise ValueError("Finetune trains the network: give a Task with training data")
        rate = task.schedule.lr / 100 if self.lr is None else self.lr
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=rate, drops=(0.5,), weight_decay=0.0)
        return tune(draft, task, schedule, range(self.epochs), self.seed)


@dataclass(frozen=True)
class TrainLevels:
    """Train a quantized network, its levels with it. Zeros stay zero.

    The rate is `lr`, a tenth of it from the middle on, or it falls along a cosine where the task's schedule does.
    """

    epochs: int = 10
    lr: float = 0.001
    seed: int = 0

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        if task is None:
            raise ValueError("TrainLevels trains the network: give a Task with training data")
        network = _Levels(draft)
        if not network.leaves:
            raise ValueError("TrainLevels finds no levels: quantize first, with Waterfill or Pack(Uniform())")
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=self.lr, drops=(0.5,), weight_decay=0.0)
        return _trained(network, task, schedule, range(self.epochs), self.seed, "training levels")

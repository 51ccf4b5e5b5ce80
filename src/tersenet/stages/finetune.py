"""Train the float leaves of the trees, hold the integers: masked retraining, centroid tuning and scale learning alike.

The gradient of a codeword is the SUM over its members, as Deep Compression has it (Han, Mao, Dally 2016, section 3.3):
it falls out of differentiating `unpack`. `Distill` takes the MEAN, as codewords that are vectors of many members need
(Stock et al. 2020, section 3.3). Pruned weights have no leaf, so no momentum or weight decay can move them.

`TrainLevels` trains the levels of `Uniform` nodes as well: a float weight stands behind each, is rounded on the way
forward, and takes the gradient straight through (Bengio, Leonard, Courville 2013). Steps stay what the quantization
chose, and levels that are zero stay zero, so that the file does not grow.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from tersenet.artifact import Artifact, Tensor, as_stored
from tersenet.checkpoint import Checkpoint, Place
from tersenet.contract import DATA, Kind, check
from tersenet.data import Stream, split_of
from tersenet.draft import Draft
from tersenet.norms import FOLDED, folded_norms
from tersenet.packed import Array, Codebook, Packed, Tree, Uniform, map_arrays, narrowed, parts_of, unpack
from tersenet.structure import is_plain, once, refilled, support
from tersenet.task import Schedule, Task, Teacher, duplicate, one_thread, progress


def tune(
    draft: Draft,
    task: Task,
    schedule: Schedule,
    epochs: range,
    seed: int,
    label: str = "tuning",
    mean: bool = False,
    held: Mapping[str, Any] | None = None,
) -> Draft:
    """The draft with its trainable float leaves, biases and norms trained over `epochs` of the schedule.

    Buffers such as BatchNorm's running statistics follow, as in any training, but those of folded norms. What has
    `requires_grad` False is left as it is. With `mean` the gradient of a codeword is the mean of its members'. Places
    of plain weights where a mask in `held`, by name, is set keep their bits. Raises ValueError where the loss stops
    being a number.
    """
    if held is None:
        network = _Shared(draft, task.device) if mean else _Network(draft, task.device)
    else:
        network = _Partly(draft, task.device, held)
    return _trained(network, task, schedule, epochs, seed, label)


def _trained(network: "_Network", task: Task, schedule: Schedule, epochs: range, seed: int, label: str) -> Draft:
    before = network.before
    if before.model is None:
        raise ValueError("this stage trains the network, but only arrays were given: use Task(model, ...)")
    if len(epochs) and not network.leaves:
        raise ValueError("this stage trains the network, but all of it is frozen or kept: set requires_grad")
    held = folded_norms(before.tensors)
    with one_thread():
        optimizer = schedule.optimizer(network.leaves)
        whole = _Whole(duplicate(before.model).to(task.device).train(), task)
        for name, layer in whole.model.named_modules():
            # Folded norms have no statistics to follow, nor have those of a network whose weights are levels, nor those
            # that are not trained.
            norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
            still = norm and (
                isinstance(network, _Levels) or (layer.affine and f"{name}.weight" not in before.trainable)
            )
            if name in held or still:
                layer.eval()
        called = whole.model, task.loss, task.augment, task.forward, task.teacher
        course = before.tensors, type(network).__name__, schedule, epochs, seed
        checkpoint = Checkpoint(before.journal, optimizer, course, called)
        place = checkpoint.restored(network.tensors()) or Place(epochs.start)
        if isinstance(split_of(task.train, "train"), Stream):  # a loader may hang on how often it was read
            for epoch in range(epochs.start, place.epoch):
                deque(task.batches(epoch, seed, schedule.batch), 0)
        left = range(place.epoch, epochs.stop)
        for epoch in progress(left, label, len(left)):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(epoch)
            done = place.batch
            with contextlib.closing(task.batches(epoch, seed, schedule.batch)) as batches:
                for number, (inputs, targets) in enumerate(batches, 1):
                    if number <= done:  # it was trained on before the stop
                        if number == done:
                            checkpoint.go_on()
                        continue
                    optimizer.zero_grad(set_to_none=True)
                    state = {f"model.{name}": value for name, value in network.state().items()}
                    outputs = functional_call(whole, state, (inputs,), tie_weights=False)
                    loss = task.loss_of(outputs, inputs, targets)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    network.follow({name.removeprefix("model."): value for name, value in state.items()})
                    place = Place(epoch, number, place.total + loss.item(), loss.item())
                    checkpoint.keep(place, network.tensors())
            if not place.batch:
                raise ValueError("this stage trains the network, but the training data hold no batch")
            if not math.isfinite(place.last):
                raise ValueError(
                    f"the loss became {place.last} in epoch {epoch}: lower the learning rate {schedule.lr}"
                )
            mean = round(place.total / place.batch, 6)
            before.journal.write(epoch=epoch, training=label, loss=mean, rate=schedule.rate(epoch))
            place = Place(epoch + 1)
        return network.draft()


class _Whole(nn.Module):
    """The network as the task calls it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs: Any) -> Any:
        return self.task.outputs(self.model, inputs)


class _Network:
    """The draft's trees as torch leaves, the dense weights they make, and the way back.

    An array that several trees share is one leaf, whose gradient is the sum over them; steps of levels part ways.
    Leaves are float32, or float64 where the arrays are; the network gets each tensor in its own type. What is not
    trained is `kept`, dense: buffers, frozen parameters, the scales of folded norms.
    """

    def __init__(self, draft: Draft, device: str = "cpu") -> None:
        self.before, self.device, self.leaves = draft, torch.device(device), list[torch.Tensor]()
        model = draft.model
        parameters = [] if model is None else model.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        free = {n: t for n, t in draft.tensors.items() if n in draft.trainable - frozen and t.note != FOLDED}
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


class _Shared(_Network):
    """The same with the mean of its members' gradients for each codeword, of members in all trees that share it."""

    def __init__(self, draft: Draft, device: str) -> None:
        self.counts: dict[int, list[torch.Tensor]] = {}  # by the leaf's id
        super().__init__(draft, device)

    def _tree(self, tree: Tree) -> Tree:
        made = super()._tree(tree)
        if isinstance(made, Codebook) and not isinstance(made.codewords, Packed):
            counts = self.counts.setdefault(id(made.codewords), [])
            if not counts:
                made.codewords.register_hook(
                    lambda gradient: gradient / torch.stack(counts).sum(0).clamp(min=1)[:, None]
                )
            counts.append(torch.bincount(made.index.reshape(-1).long(), minlength=len(made.codewords)))
        return made


class _Partly(_Network):
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
        return _Held(self._held("", stays), self._leaf("", dense[stays]), self._held("", dense), tree)

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


class _Levels(_Network):
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


@dataclass(frozen=True)
class Finetune:
    """Train what the trees leave free. Without `lr`, at a hundredth of the task's learning rate.

    The gradient of a codeword is the "sum" over its members, or the "mean".
    """

    epochs: int = 2
    lr: float | None = None
    seed: int = 0
    gradient: str = "sum"
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}

    def __post_init__(self) -> None:
        if self.gradient not in ("sum", "mean"):
            raise ValueError("the gradient of a codeword is the 'sum' over its members, or the 'mean'")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        rate = task.schedule.lr / 100 if self.lr is None else self.lr
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=rate, drops=(0.5,), weight_decay=0.0)
        return tune(draft, task, schedule, range(self.epochs), self.seed, mean=self.gradient == "mean")


@dataclass(frozen=True)
class Distill:
    """Train what the trees leave free towards the task's teacher or, where it has none, the network before compression.

    The gradient of a codeword is the mean of its members', so that a rate serves clusters of any size.
    """

    epochs: int = 1
    lr: float = 0.01
    temperature: float = 1.0
    mix: float = 1.0
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        return self.tuned(draft, task, "distilling")

    def tuned(self, draft: Draft, task: Task, label: str) -> Draft:
        """The draft with what is trainable of it trained."""
        models = (duplicate(task.model).eval(),) if task.teacher is None else task.teacher.models
        taught = replace(task, teacher=Teacher(models, self.temperature, self.mix))
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=self.lr, drops=(0.5,), weight_decay=0.0)
        return tune(draft, taught, schedule, range(self.epochs), self.seed, label, mean=True)


@dataclass(frozen=True)
class TrainLevels:
    """Train a quantized network, its levels with it. Zeros stay zero.

    The rate is `lr`, a tenth of it from the middle on, or it falls along a cosine where the task's schedule does.
    """

    epochs: int = 10
    lr: float = 0.001
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {
        DATA: "trains the network: give a Task with training data",
        Uniform: "finds no levels: quantize first, with Waterfill or Pack(Uniform())",
    }

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        network = _Levels(draft, task.device)
        if not network.leaves:
            raise ValueError("TrainLevels finds no levels: quantize first, with Waterfill or Pack(Uniform())")
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=self.lr, drops=(0.5,), weight_decay=0.0)
        return _trained(network, task, schedule, range(self.epochs), self.seed, "training levels")

"""Which channels of a network must go together, seen in one forward pass.

Every tensor on the way carries a label for each of its channels (axis 1). A convolution or linear layer makes new
labels; normalisations, depthwise convolutions and what maps 0 to 0 channel by channel hand them on; a sum joins them, a
concatenation puts them side by side. Whatever is not known here, or fixes a number of channels in its code, as padding
of channels does, freezes the labels that it touches: those channels stay. Any model that runs can be traced; nothing is
compiled and no layer has to be of a known class.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersenet.data import reachable, samples, tensors
from tersenet.task import Task

KNOWN = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)  # layers that `channels.small` can shrink
# Functions that work on each channel alone and map 0 to 0, by the names that torch gives them.
CHANNELWISE = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "elu", "gelu", "silu",
    "tanh", "hardswish", "abs", "neg", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "dropout", "dropout_", "contiguous", "to", "float", "clone", "detach", "interpolate",
}  # fmt: skip
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "mul", "__mul__"}


@dataclass(frozen=True)
class Use:
    """One layer: labels of its rows and columns, what a column spans, and positions times kernel for each pair."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    depthwise: bool
    work: int  # multiplications and additions for one row and one column of one sample


@dataclass
class Coupling:
    """The labels of every layer's channels, and which of them may go.

    `axes` has, for each tensor and axis, the label of each place; `roots` joins labels that go together.
    """

    axes: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    roots: list[int] = field(default_factory=lambda: [0])
    frozen: set[int] = field(default_factory=lambda: {0})

    @staticmethod
    def of(task: Task, model: nn.Module, inputs: Any) -> "Coupling":
        """What one forward pass of a batch of inputs shows; the model is read in evaluation mode."""
        found, own = Coupling(), task.running(model)
        tracer = _Tracer(own, found, samples(inputs))
        handle = own.register_forward_hook(lambda layer, given, out: tracer.freeze(out))
        with torch.no_grad(), tracer:
            tracer.freeze(task.outputs(own, inputs))
        handle.remove()
        for (name, _), labels in found.axes.items():
            if tracer.reads[name] != 1:  # what else reads a parameter needs all of it
                found.frozen.update(labels)
        return found

    def root(self, label: int) -> int:
        while self.roots[label] != label:
            self.roots[label] = label = self.roots[self.roots[label]]
        return label

    def join(self, a: Iterable[int], b: Iterable[int]) -> None:
        for one, other in zip(a, b, strict=True):
            first, second = sorted((self.root(one), self.root(other)))
            self.roots[second] = first

    def spaces(self) -> list[tuple[int, ...]]:
        """Sets of channels, by root, that lie in the same places, in the order of the layers that make them."""
        frozen = {self.root(label) for label in self.frozen}
        where: dict[int, list[tuple[str, int]]] = {}
        for place, labels in self.axes.items():
            for root in dict.fromkeys(map(self.root, labels)):
                if root not in frozen:
                    where.setdefault(root, []).append(place)
        knowledge: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for root, places in where.items():
            knowledge.setdefault(tuple(places), []).append(root)
        return [tuple(roots) for roots in knowledge.values()]

    def kept(self, place: tuple[str, int], gone: set[int]) -> np.ndarray[Any, Any]:
        """Which places along an axis of a tensor stay when these roots go."""
        return np.array([self.root(label) not in gone for label in self.axes[place]])

    def macs(self, gone: set[int]) -> int:
        """Multiplications and additions for one sample when these roots are gone."""
        total = 0
        for use in self.uses.values():
            rows, columns = (sum(self.root(n) not in gone for n in part) for part in (use.rows, use.columns))
            total += use.work * rows * (1 if use.depthwise else columns)
        return total


class _Tracer(TorchFunctionMode):
    """Hands labels from tensor to tensor; a tensor without labels has channels that stay."""

    def __init__(self, model: nn.Module, found: Coupling, count: int) -> None:
        super().__init__()
        self.found, self.samples, self.reads = found, count, Counter[str]()
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.names = {
            id(p): f"{layer}.{part}".lstrip(".")
            for layer, module in model.named_modules()
            for part, p in module.named_parameters(recurse=False)
            if isinstance(module, KNOWN) and part in ("weight", "bias") and uses[id(p)] == 1
        }
        self.labels: dict[int, tuple[int, ...]] = {}
        self.alive: list[Any] = []  # no id may be used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        before = [self.labels.get(id(t)) for t in tensors((args, given))]  # in-place functions change their input
        result = func(*args, **given)
        if tensors(result):
            self.reads.update(self.names[id(t)] for t in tensors((args, given)) if id(t) in self.names)
        if isinstance(result, Tensor):
            self.alive.append((result, args, given))
            labels = self._handed(getattr(func, "__name__", ""), args, given, result, before)
            if labels is None:
                self.freeze((args, given))
                self.labels.pop(id(result), None)
            elif result.dim() > 1 and len(labels) == result.shape[1]:
                self.labels[id(result)] = labels
            else:
                self.found.frozen.update(labels)
        elif tensors(result):
            self.freeze((args, given))
        return result

    def freeze(self, things: Any) -> None:
        for tensor in reachable(things):
            self.found.frozen.update(self.labels.get(id(tensor), ()))

    def _handed(self, name: str, args: Any, given: Any, out: Tensor, before: list[Any]) -> tuple[int, ...] | None:
        """The labels of a result's channels, or None where the function is not known to keep channels apart."""
        mine: tuple[int, ...] | None = before[0] if before else None
        if name in ("conv1d", "conv2d", "conv3d", "linear"):
            return self._layer(name, args, given, out, mine)
        if mine is None:
            return None if any(before) else ()
        if name in ("batch_norm", "instance_norm"):
            own = [self.names[id(p)] for p in tensors((args[3:], given)) if id(p) in self.names]
            self.found.axes |= dict.fromkeys([(one, 0) for one in own], mine)
            return mine if any(one.endswith("weight") for one in own) else None  # a scale of 0 makes its channel 0
        if name == "prelu" and args[1].numel() > 1:
            return None
        if name in CHANNELWISE:
            return mine
        if name in SUMS and len(before) == 2 and before[1] is not None and args[0].shape == args[1].shape:
            self.found.join(mine, before[1])
            return mine
        if name == "cat" and (given.get("dim", args[1] if len(args) > 1 else 0)) == 1 and all(before):
            return tuple(label for part in before for label in part)
        if name == "pad" and len(args[1]) <= 2 * (args[0].dim() - 2) and not any(args[2:]) and not given.get("value"):
            return mine
        return self._reshaped(name, args, given, out, mine)

    def _reshaped(self, name: str, args: Any, given: Any, out: Tensor, mine: tuple[int, ...]) -> tuple[int, ...] | None:
        x = args[0]
        if name in ("mean", "sum", "amax"):
            dims = given.get("dim", args[1] if len(args) > 1 else None)
            dims = (dims,) if isinstance(dims, int) else dims
            apart = dims is not None and all(d % x.dim() > 1 for d in dims)
            return mine if apart else None
        if name in ("flatten", "reshape", "view") and out.dim() == 2 and out.shape[1] % len(mine) == 0:
            return tuple(label for label in mine for _ in range(out.shape[1] // len(mine)))
        if name == "__getitem__" and isinstance(args[1], tuple) and out.dim() == x.dim():
            whole = all(part == slice(None) for part in args[1][:2])
            return mine if whole else None
        return None

    def _layer(self, name: str, args: Any, given: Any, out: Tensor, mine: Any) -> tuple[int, ...] | None:
        x, weight = args[0], args[1] if len(args) > 1 else given["weight"]
        known = self.names.get(id(weight))
        bias = given.get("bias", args[2] if len(args) > 2 else None)
        groups = given.get("groups", args[6] if len(args) > 6 else 1)
        if known in self.found.uses:  # what is used twice has both uses' channels to serve
            self.found.frozen.update((*self.found.uses[known].rows, *self.found.uses[known].columns))
        axes = 2 if name == "linear" else int(name[4]) + 2
        if known is None or known in self.found.uses or x.dim() != axes:
            return None
        columns = mine if mine is not None else (0,) * x.shape[1]
        depthwise = groups > 1 and groups == x.shape[1] == len(weight)
        if groups > 1 and not depthwise:
            self.found.frozen.update(columns)
        first = len(self.found.roots)
        rows = columns if depthwise else tuple(range(first, first + len(weight)))
        if not depthwise:
            self.found.roots += rows
        if groups > 1 and not depthwise:
            self.found.frozen.update(rows)
        else:
            self.found.axes[known, 0] = rows
            if not depthwise:
                self.found.axes[known, 1] = columns
            if bias is not None and id(bias) not in self.names:
                self.found.frozen.update(rows)
            elif bias is not None:
                self.found.axes[self.names[id(bias)], 0] = rows
        work = max(1, out.numel() // (self.samples * out.shape[1])) * math.prod(weight.shape[2:])
        grouped = groups > 1 and not depthwise
        self.found.uses[known] = Use(rows, columns, depthwise, work // groups if grouped else work)
        return rows

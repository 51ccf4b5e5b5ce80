"""Which channels of a network must go together, seen in one forward pass.

Every tensor on the way carries a label for each of its channels (axis 1). A convolution or linear layer makes new
labels; normalisations, depthwise convolutions and what maps 0 to 0 channel by channel hand them on; a sum joins them, a
concatenation puts them side by side. Whatever is not known here, or fixes a number of channels in its code, as padding
of channels does, freezes the labels that it touches: those channels stay. Any model that runs can be traced; nothing is
compiled and no layer has to be of a known class. A shape that the code gives in numbers is such a number too: of the
ways to lay channels flat, `flatten(1)` and `view(n, -1)` alone are followed.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from tersenet.data import reachable, samples, tensors
from tersenet.task import Task
from tersenet.tracing.feeding import FORMAL
from tersenet.tracing.operations import CONVOLUTIONS, arguments

KNOWN = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.PReLU)  # that `realise` makes smaller
OWN = ("weight", "bias", "running_mean")  # tensors of these layers that have a place for each channel
# Functions that work on each channel alone and map 0 to 0, by the names that torch gives them.
CHANNELWISE = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish",
    "tanh", "hardswish", "hardshrink", "softshrink", "softsign", "abs", "neg", "square", "dropout", "dropout_",
    "dropout1d", "dropout2d", "dropout3d", "contiguous", "to", "float", "clone", "detach", "interpolate",
}  # fmt: skip
POOLS = {f"{kind}_pool{k}d": k for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for k in (1, 2, 3)}
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "mul", "__mul__"}
NORMS = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"),
}


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
        handles = [
            own.register_forward_hook(lambda layer, given, out: tracer.freeze(out)),
            register_module_forward_pre_hook(
                lambda layer, given: tracer.freeze(given) if _is_compiled(layer) else None
            ),
        ]
        try:
            with torch.no_grad(), tracer:
                tracer.freeze(task.outputs(own, inputs))
        finally:
            for handle in handles:
                handle.remove()
        tracer.freeze([list(vars(layer).values()) for layer in own.modules()])  # what a pass left for others to read
        read = {found.root(label) for (_, axis), labels in found.axes.items() if axis == 1 for label in labels}
        for (name, _), labels in found.axes.items():
            if tracer.reads[name] != 1:  # what else reads a parameter needs all of it
                found.frozen.update(labels)
            found.frozen.update(
                label for label in labels if found.root(label) not in read
            )  # read out of sight, if at all
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
        every = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        uses = Counter(id(tensor) for part in every for _, tensor in part)
        self.names = {
            id(tensor): f"{layer}.{part}".lstrip(".")
            for layer, module in model.named_modules()
            for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if isinstance(module, KNOWN) and part in OWN and uses[id(tensor)] == 1
        }
        self.labels: dict[int, tuple[int, ...]] = {}
        self.alive: list[Any] = []  # no id may be used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given, name = dict(kwargs or {}), getattr(func, "__name__", "")
        result = func(*args, **given)
        if name in FORMAL and not tensors(result):
            return result
        self.reads.update(self.names[id(t)] for t in tensors((args, given)) if id(t) in self.names)
        self.alive.append((result, args, given))
        labels = self._handed(name, args, given, result) if isinstance(result, Tensor) else None
        if labels is None:
            self.freeze((args, given))
            self.labels.pop(id(result), None)
        elif result.dim() > 1 and len(labels) == result.shape[1]:
            self.labels[id(result)] = labels
        else:
            self.found.frozen.update(labels)
        return result

    def freeze(self, things: Any) -> None:
        for tensor in reachable(things):
            self.found.frozen.update(self.labels.get(id(tensor), ()))

    def _handed(self, name: str, args: Any, given: Any, out: Tensor) -> tuple[int, ...] | None:
        """The labels of a result's channels, or None where the function is not known to keep channels apart."""
        if name in CONVOLUTIONS or name == "linear":
            return self._layer(name, arguments(name, args, given), out)
        things = tensors((args, given))
        known = [self.labels.get(id(t)) for t in things]
        mine = known[0] if known else None
        if mine is None:
            return None if any(known) else ()
        x = things[0]
        if name in NORMS:
            return mine if self._norm(NORMS[name], args, given, mine) else None
        if name == "prelu":
            return mine if things[1].numel() == 1 or self._own([things[1]], mine) else None
        if name == "hardtanh":
            return mine if _at(args, given, 1, "min_val", -1) <= 0 <= _at(args, given, 2, "max_val", 1) else None
        if name in CHANNELWISE:
            return mine
        if name in POOLS:  # a sample without its batch has channels on another axis
            return mine if x.dim() == POOLS[name] + 2 else None
        if name in SUMS and len(things) == 2 and known[1] is not None and given.keys() <= {"input", "other"}:
            fits = x.dim() == things[1].dim() and len(mine) == len(known[1]) == out.shape[1]
            if fits:
                self.found.join(mine, known[1])
            return mine if fits else None
        if name == "cat":
            side = _at(args, given, 1, "dim", 0) % x.dim() == 1 and all(known)
            return tuple(label for part in known for label in part or ()) if side else None
        if name == "pad":
            within = len(_at(args, given, 1, "pad", ())) <= 2 * (x.dim() - 2)
            return mine if within and not _at(args, given, 3, "value", 0) else None
        return self._reshaped(name, args, given, out, x, mine)

    def _reshaped(
        self, name: str, args: Any, given: Any, out: Tensor, x: Tensor, mine: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """The labels behind what leaves samples and channels on their axes, or lays each sample flat."""
        if name in ("mean", "sum", "amax", "squeeze", "unsqueeze"):
            dims = _at(args, given, 1, "dim", None)
            dims = (dims,) if isinstance(dims, int) else dims or ()
            within = [d % (x.dim() + (name == "unsqueeze")) > 1 for d in dims]
            return mine if within and all(within) else None
        if name == "flatten":
            start = _at(args, given, 1, "start_dim", 0) % x.dim()
            return None if start == 0 else mine if start > 1 else _repeated(mine, out.shape[1])
        if name in ("view", "reshape"):
            whole = args[1:] in ((x.shape[0], -1), ((x.shape[0], -1),), ([x.shape[0], -1],))
            return _repeated(mine, out.shape[1]) if whole and not given else None
        if name == "__getitem__" and isinstance(args[1], tuple) and all(isinstance(part, slice) for part in args[1]):
            return mine if args[1][:2] == (slice(None), slice(None)) else None
        return None

    def _norm(self, names: tuple[str, ...], args: Any, given: Any, mine: tuple[int, ...]) -> bool:
        """Whether a norm's results are 0 where its own parameters, or the input and the running mean, are."""
        _, mean, _, weight, bias, batch = (_at(args, given, at, name, None) for at, name in enumerate(names))
        if weight is not None:
            return self._own([weight] if bias is None else [weight, bias], mine)
        return bias is None and mean is not None and not batch and self._own([mean], mine)

    def _own(self, parts: list[Tensor], labels: tuple[int, ...]) -> bool:
        """Give the first axis of a layer's own tensors these labels; False where they are somebody else's."""
        names = [self.names.get(id(part)) for part in parts]
        if any(name is None or (name, 0) in self.found.axes for name in names):
            for name in names:
                self.found.frozen.update(self.found.axes.get((name or "", 0), ()))
            return False
        self.found.axes |= {(str(name), 0): labels for name in names}
        return True

    def _layer(self, name: str, bound: Mapping[str, Any], out: Tensor) -> tuple[int, ...] | None:
        x, weight, bias, groups = (bound[part] for part in ("input", "weight", "bias", "groups"))
        known, mine, groups = self.names.get(id(weight)), self.labels.get(id(x)), groups or 1
        if known in self.found.uses:  # what is used twice has both uses' channels to serve
            self.found.frozen.update((*self.found.uses[known].rows, *self.found.uses[known].columns))
        axes = 2 if name == "linear" else CONVOLUTIONS[name] + 2
        if known is None or known in self.found.uses or x.dim() != axes:
            return None
        columns = mine if mine is not None else (0,) * x.shape[1]
        depthwise = groups > 1 and groups == x.shape[1] == len(weight)
        first = len(self.found.roots)
        rows = columns if depthwise else tuple(range(first, first + len(weight)))
        if not depthwise:
            self.found.roots += rows
        if groups > 1 and not depthwise:
            self.found.frozen.update((*rows, *columns))
            columns = columns[: weight.shape[1]]  # as many as each row reads
        else:
            self.found.axes[known, 0] = rows
            if not depthwise:
                self.found.axes[known, 1] = columns
            if bias is not None and not self._own([bias], rows):
                self.found.frozen.update(rows)
                self.freeze(bias)
        work = max(1, out.numel() // (self.samples * out.shape[1])) * math.prod(weight.shape[2:])
        self.found.uses[known] = Use(rows, columns, depthwise, work)
        return rows


def _is_compiled(layer: nn.Module) -> bool:
    """Whether what a layer does is out of sight."""
    return isinstance(layer, torch.jit.ScriptModule)


def _at(args: Any, given: Mapping[str, Any], at: int, name: str, otherwise: Any) -> Any:
    """An argument of a call, given by its place or by its name."""
    return args[at] if len(args) > at else given.get(name, otherwise)


def _repeated(labels: tuple[int, ...], count: int) -> tuple[int, ...] | None:
    """Each label as often as its channel has places, where all have as many."""
    times, rest = divmod(count, max(len(labels), 1))
    return None if rest else tuple(label for label in labels for _ in range(times))

"""Which layer's result feeds which norm, and who else reads it, seen in the operations of forward passes."""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tersenet.data import reachable, tensors
from tersenet.task import Task
from tersenet.tracing.operations import CONVOLUTIONS, TRANSPOSED, arguments

STATISTICS = ("running_mean", "running_var")
LAYERS = {"linear": 0, **CONVOLUTIONS, **TRANSPOSED}  # axes of their kernels
# Functions that see a tensor's form and none of its values, where they give no tensor.
FORMAL = {
    "__get__", "dim", "size", "numel", "stride", "ndimension", "nelement", "__len__", "is_floating_point", "is_complex",
    "is_contiguous", "get_device", "element_size", "storage_offset", "data_ptr", "type", "is_inference", "is_set_to",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A norm and the weight that feeds it; `groups` of a transposed convolution, else 0."""

    norm: str
    weight: str
    groups: int = 0
    eps: float = 1e-5

    @property
    def bias(self) -> str:
        """The name of the bias of the layer, if it has one."""
        return self.weight.removesuffix("weight") + "bias"

    def like(self, other: "Pair | None") -> bool:
        return other is not None and (self.weight, self.groups) == (other.weight, other.groups)


@dataclass
class _Result:
    """What a layer gave: its weight, how often it was read, the norm that read it."""

    tensor: "weakref.ref[torch.Tensor]"
    turn: int
    weight: str
    groups: int
    reads: int = 0
    norm: str | None = None
    eps: float = 0.0


class Reads(TorchFunctionMode):
    """Counts who reads the results of layers, parameters and buffers in forward passes, and keeps what norms say."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.names.setdefault(id(tensor), name)
        self.turn = 0
        self.counts: Counter[tuple[str, int]] = Counter()
        self.made: dict[int, _Result] = {}
        self.all: list[_Result] = []
        self.outs: dict[tuple[str, int], torch.Tensor] = {}  # of norms, by the batch's number
        self.results: list[torch.Tensor] = []

    @staticmethod
    def of(task: Task, model: nn.Module, batches: Sequence[Any]) -> "Reads":
        """What is seen when the model runs on batches of inputs."""
        own = task.running(model)
        found = Reads(own)
        handle = own.register_forward_hook(lambda layer, given, out: found.left(out))
        for found.turn, batch in enumerate(batches):
            with torch.no_grad(), found:
                out = task.outputs(own, batch)
            found.left([list(vars(layer).values()) for layer in own.modules()])
            found.results += [tensor.detach().cpu() for tensor in tensors(out)]
        handle.remove()
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given, name = dict(kwargs or {}), getattr(func, "__name__", "")
        out = func(*args, **given)
        if name not in FORMAL or tensors(out):
            for tensor in tensors((args, given)):
                if id(tensor) in self.names:
                    self.counts[self.names[id(tensor)], self.turn] += 1
            self.left((args, given))
        if func is F.batch_norm:
            self._norm(args, given, out)
        elif name in LAYERS:
            self._layer(name, args, given, out)
        return out

    def left(self, things: Any) -> None:
        """Count tensors that are read, or that others may read when the pass is over."""
        for tensor in reachable(things):
            if (result := self._result(tensor)) is not None:
                result.reads += 1

    def _result(self, tensor: torch.Tensor) -> _Result | None:
        found = self.made.get(id(tensor))
        return found if found is not None and found.tensor() is tensor else None

    def _layer(self, name: str, args: Any, given: Any, out: torch.Tensor) -> None:
        bound = arguments(name, args, given)
        weight, bias = (self.names.get(id(bound[part])) for part in ("weight", "bias"))
        dims = LAYERS[name]
        if weight is None or out.dim() != dims + 2:
            return
        groups = int(bound["groups"] or 1) if name in TRANSPOSED else 0
        wanted = Pair("", weight).bias if bound["bias"] is not None else None
        if bias == wanted and (bias is not None or Pair("", weight).bias not in self.names.values()):
            self.made[id(out)] = result = _Result(weakref.ref(out), self.turn, weight, groups)
            self.all.append(result)

    def _norm(self, args: Any, given: Any, out: torch.Tensor) -> None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        bound = {"training": False, "eps": 1e-5, **dict(zip(names, args, strict=False)), **given}
        result, held = self._result(bound["input"]), self.names.get(id(bound["running_var"]), "")
        norm = held.removesuffix(".running_var")
        given_here = {part: bound[part] for part in names[1:5] if bound.get(part) is not None}
        own = all(self.names.get(id(tensor)) == f"{norm}.{part}" for part, tensor in given_here.items())
        if norm and own and not bound["training"]:
            self.outs[norm, self.turn] = out[:2].detach().clone().cpu()
            if result is not None:
                result.norm, result.eps = norm, float(bound["eps"])

    def pairs(self) -> list[Pair]:
        """Layers and norms of which each was used once in every pass that used one of them, in the norms' order."""
        turns: dict[Pair, list[int]] = {}
        for one in self.all:
            if one.norm is not None and one.reads == 1:
                turns.setdefault(Pair(one.norm, one.weight, one.groups, one.eps), []).append(one.turn)
        reads: dict[str, dict[int, int]] = {}
        for (name, turn), count in self.counts.items():
            reads.setdefault(name, {})[turn] = count
        known, order = set(self.names.values()), [norm for norm, _ in self.outs]
        found = []
        for pair, seen in turns.items():
            own = {pair.weight, pair.bias, *(f"{pair.norm}.{part}" for part in ("weight", "bias", *STATISTICS))} & known
            if all(reads.get(name) == dict.fromkeys(seen, 1) for name in own):
                found.append(pair)
        return sorted(found, key=lambda pair: order.index(pair.norm))

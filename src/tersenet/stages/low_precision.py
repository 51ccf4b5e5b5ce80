"""Training from the beginning in few bits: weights, what layers take and give, and gradients, with stochastic rounding.

Gupta, Agrawal, Gopalakrishnan, Narayanan (2015), equation 1: a value is rounded up with the probability that makes its
expectation the value itself, so that updates smaller than a step are not lost. Each tensor has a fixed point of its own
that its largest value sets, as in dynamic fixed point (Courbariaux, Bengio, David 2015). No weight is held in more bits
anywhere, and there is no momentum, whose state would have to be; sums within an operation are float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tersenet.activations import LAYERS, hook, rounded
from tersenet.contract import DATA, NORMS, PACKED, Kind, check
from tersenet.draft import Draft
from tersenet.methods import repack
from tersenet.methods.fixed_point import FixedPoint, binary_point
from tersenet.packed import Uniform
from tersenet.stages.activations import Activations
from tersenet.stages.finetune import trained
from tersenet.stages.network import Network
from tersenet.stages.prune import reinitialized
from tersenet.task import Task, duplicate

REMEDY = "it trains all weights from the beginning: train before other stages pack or fold"


@dataclass(frozen=True)
class LowPrecision:
    """Train the network from a fresh initialisation with `bits` bits throughout, biases and norms too.

    By the task's own schedule without momentum, at the rate `lr`, or the task's over 1 - momentum. Pruned weights stay
    zero. The file says in which fixed point activations are, as with `Activations`.
    """

    bits: int = 8
    epochs: int | None = None
    lr: float | None = None
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys((NORMS, *PACKED), REMEDY)
    makes: ClassVar[tuple[Kind, ...]] = (Uniform,)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError("LowPrecision takes 2 to 16 bits")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        own = task.schedule
        epochs = own.epochs if self.epochs is None else self.epochs
        rate = own.lr / (1 - own.momentum) if self.lr is None else self.lr
        schedule = replace(own, epochs=max(epochs, 1), lr=rate, momentum=0.0, adam=False)
        fresh = replace(reinitialized(draft, self.seed), activations={})
        model = duplicate(fresh.model)  # type: ignore[arg-type]
        for layer in model.modules():
            if isinstance(layer, LAYERS):
                hook(layer, self._narrowed, self._narrowed)
        network = _Few(replace(fresh, model=model), task.device, self.bits)
        after = trained(network, task, schedule, range(epochs), self.seed, "training in low precision")
        names = [name for name, tensor in fresh.tensors.items() if id(tensor) in network.trees]
        trees = {name: repack(after.tensors[name].tree, FixedPoint(self.bits)) for name in names}
        return Activations(self.bits)(replace(after, model=draft.model).with_trees(trees), task)

    def _narrowed(self, x: Tensor) -> Any:
        return _Narrowed.apply(x, self.bits) if x.is_floating_point() else x  # type: ignore[no-untyped-call]


class _Few(Network):
    """Leaves that hold nothing but multiples of a power of two in few bits, before and after each step."""

    def __init__(self, draft: Draft, device: str, bits: int) -> None:
        super().__init__(draft, device)
        self.bits = bits
        for leaf in self.leaves:
            leaf.data = rounded(leaf.data, bits, _fraction(leaf.data, bits))
            leaf.register_hook(lambda gradient: stochastic(gradient, bits))  # type: ignore[no-untyped-call]

    def follow(self, state: Mapping[str, Tensor]) -> None:
        super().follow(state)
        for leaf in self.leaves:
            leaf.data = stochastic(leaf.data, self.bits)


class _Narrowed(torch.autograd.Function):
    """Values to the nearest of few bits, their gradients stochastically."""

    @staticmethod
    def forward(context: Any, x: Tensor, bits: int) -> Tensor:
        context.bits = bits
        return rounded(x, bits, _fraction(x, bits))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return stochastic(gradient, context.bits), None


def stochastic(x: Tensor, bits: int) -> Tensor:
    """Multiples of a power of two in so many bits, up or down at random so that the mean is x itself.

    By torch's global generator; what would round past the largest saturates.
    """
    step, last = 2.0 ** -_fraction(x, bits), 2 ** (bits - 1)
    low = (x / step).floor()
    return (low + (torch.rand_like(x) < x / step - low)).clamp(-last, last - 1) * step


def _fraction(x: Tensor, bits: int) -> int:
    top = float(x.abs().max()) if x.numel() else 0.0
    if not math.isfinite(top):
        raise ValueError("training in low precision came to values that are not finite: lower the learning rate")
    return binary_point(top, bits)

"""What training learns from other networks: their softened outputs, and the features of layers inside.

Word-level distillation of Kim and Rush (2016, section 3.1) is the same loss over the words of a sentence.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.data import reachable

IGNORED = -100  # the target of positions that teach nothing, as F.cross_entropy has it by default


def soft_targets(outputs: Tensor, wanted: Tensor, temperature: float = 3.0) -> Tensor:
    """T^2 times the divergence of softmax(outputs / T) from softmax(wanted / T) over axis 1, a mean over samples.

    The factor keeps gradients comparable when the temperature changes (Hinton, Vinyals, Dean 2015, section 2.1).
    """
    found, goal = ((z / temperature).log_softmax(1) for z in (outputs, wanted))
    count = outputs.numel() / outputs.shape[1]
    return temperature**2 * F.kl_div(found, goal, reduction="sum", log_target=True) / count


@dataclass(frozen=True)
class Teacher:
    """Networks that know, whose softened outputs training follows (Hinton, Vinyals, Dean 2015).

    `mix` is the part of the soft targets in what is lowered, the rest is the task's own loss; an ensemble says the mean
    of its networks' softened distributions. `features`, {student's layer: teacher's layer} or the names that both have,
    adds `weight` times the mean squared error between the two layers' outputs (Romero et al. 2015), summed over the
    layers. Positions whose target is -100, which `F.cross_entropy` passes over, have no soft targets. Classes lie along
    axis 1. Where the task's `likelihood` says "bernoulli" each output is softened by itself, and where it says
    "gaussian" the mean squared error from the teacher's outputs is lowered, of a mean over networks.
    """

    models: tuple[nn.Module, ...]
    temperature: float = 3.0
    mix: float = 1.0
    features: Any = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.models, nn.Module):
            object.__setattr__(self, "models", (self.models,))
        names = (self.features,) if isinstance(self.features, str) else self.features
        object.__setattr__(self, "features", dict(names if isinstance(names, Mapping) else zip(names, names)))
        if not self.models or not self.temperature > 0 or not 0 <= self.mix <= 1 or not self.weight > 0:
            raise ValueError("a Teacher has a network or more, a temperature and a weight above 0, a mix in [0, 1]")
        if not self.mix and not self.features:
            raise ValueError("a Teacher with mix 0 teaches nothing: give a mix above 0, or features")

    def loss(self, task: Any, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """What training lowers for a batch of the task; `model` is the student, in the mode that it is trained in."""
        with _heard(model, self.features.keys(), "student") as own:
            outputs = task.outputs(model, inputs)
        wanted, goals = [], []
        for teacher in self.models:
            names = self.features.values()
            with torch.no_grad(), _evaluating(teacher.to(task.device)), _heard(teacher, names, "teacher") as goal:
                wanted.append(task.outputs(teacher, inputs))
            goals.append(goal)
        soft = self._soft(outputs, wanted, targets, task.likelihood) if self.mix else None
        loss: Tensor = task.loss(outputs, targets) if soft is None else soft
        if 0 < self.mix < 1:
            loss = self.mix * loss + (1 - self.mix) * task.loss(outputs, targets)
        for goal in goals if self.features else ():
            loss = loss + self.weight / len(goals) * self._apart(own, goal)
        return loss

    def _soft(self, outputs: Tensor, wanted: list[Tensor], targets: Any, likelihood: str | None) -> Tensor:
        if likelihood == "gaussian":
            return F.mse_loss(outputs, torch.stack(wanted).mean(0).to(outputs.dtype))
        if likelihood == "bernoulli":
            ones = torch.stack([(z / self.temperature).sigmoid() for z in wanted]).mean(0).to(outputs.dtype)
            return self.temperature**2 * F.binary_cross_entropy_with_logits(outputs / self.temperature, ones)
        if outputs.dim() < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"soft targets are of two classes or more along axis 1, which outputs {list(outputs.shape)} have not: "
                "give Task(likelihood='gaussian') or 'bernoulli'"
            )
        said = wanted[0]
        if len(wanted) > 1:
            logs = torch.stack([z / self.temperature for z in wanted]).log_softmax(2)
            said = self.temperature * (logs.logsumexp(0) - math.log(len(wanted)))
        if isinstance(targets, Tensor) and targets.shape == outputs[:, 0].shape:
            there = targets != IGNORED
            if not there.all():
                outputs, said = (z.movedim(1, -1)[there] for z in (outputs, said))
        return soft_targets(outputs, said, self.temperature)

    def _apart(self, own: Mapping[str, list[Tensor]], goal: Mapping[str, list[Tensor]]) -> Tensor:
        """The sum over layers of the mean squared error between student and teacher, a mean over a layer's calls."""
        total = torch.zeros(())
        for name, other in self.features.items():
            found, wanted = own[name], goal[other]
            shapes = [[list(t.shape) for t in calls] for calls in (found, wanted)]
            if not found or shapes[0] != shapes[1]:
                told = (", ".join(map(str, calls)) or "nothing, since it is not called" for calls in shapes)
                raise ValueError(
                    f"{name}: features are matched where shapes are equal, but the student gives {next(told)}, and the "
                    f"teacher's {other} {next(told)}: name other layers in Teacher(features=...)"
                )
            errors = [F.mse_loss(f, w.to(f.dtype)) for f, w in zip(found, wanted, strict=True)]
            total = total.to(errors[0]) + torch.stack(errors).mean()
        return total


@contextlib.contextmanager
def _heard(model: nn.Module, names: Iterable[str], whose: str) -> Iterator[dict[str, list[Tensor]]]:
    """What the named layers give, the first tensor of each call, by name; the hooks are gone afterwards."""
    layers, found = dict(model.named_modules(remove_duplicate=False)), {name: list[Tensor]() for name in names}
    if missing := [name for name in found if name not in layers]:
        raise ValueError(f"{missing[0]}: the {whose} has no such layer: name layers of both in Teacher(features=...)")

    def listening(calls: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
        # A copy, since an activation that works in place may follow in one of the networks.
        return lambda layer, given, output: calls.extend(t.clone() for t in reachable(output)[:1])

    hooks = [layers[name].register_forward_hook(listening(calls)) for name, calls in found.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The module in evaluation mode while it lasts."""
    training = [layer for layer in model.modules() if layer.training]
    model.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True

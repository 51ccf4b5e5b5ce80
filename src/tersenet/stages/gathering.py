"""What is known of a network before it is quantized: its folded norms, its moments, what errors of each layer cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tersenet.calibrate import Moments, moments
from tersenet.data import samples, split_of, tensors
from tersenet.likelihood import Likelihood
from tersenet.packed import unpack
from tersenet.recipe import Draft
from tersenet.stages.folding import folded
from tersenet.stages.lossless import Lossless, lossless
from tersenet.task import Task, duplicate, one_thread, progress, spread

if TYPE_CHECKING:
    from tersenet.stages.waterfill import Layer, Prepared

HELD = 5  # of so many batches one is not among those that moments are made of
# Samples on which a layer's errors are seen: least, most, as many as hold so many numbers, and for all layers together.
PROBED = 64, 256, 1 << 23, 1 << 14
Halves = tuple[Moments, Moments]


@dataclass(frozen=True)
class Gathered:
    """A draft with BatchNorm folded, its layers' moments, and which bias is added to each weight's output.

    Moments come from two halves of the batches: how far the halves differ says how much to trust them. Every fifth
    batch is `held` back from them: feedback steers errors to where the others do not see them. `worth` is what errors
    of a layer cost at the network's outputs, in parts of what its moments say. `lossless` has trees that lose nothing.
    """

    draft: Draft
    task: Task | None = None
    likelihood: Likelihood | None = None
    found: Mapping[str, Halves] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    held: Sequence[Any] = ()
    worth: Mapping[str, float] = field(default_factory=dict)
    lossless: Mapping[str, Lossless] = field(default_factory=dict)


def gather(draft: Draft, task: Task | None, count: int = 1024) -> Gathered:
    """Fold BatchNorm and gather the moments of `count` samples; without a task there are none."""
    if task is None or draft.model is None:
        return Gathered(draft, lossless=lossless(_unique(draft)))
    known = split_of(task.train, "train").count or count
    batches = task.calibration(count, max(1, min(16, min(known, count) // (2 * HELD))))
    likelihood = Likelihood.of(task)
    draft, norms = folded(draft, task, batches[:1])
    held = batches[HELD - 1 :: HELD] if len(batches) >= HELD else batches
    rest = [batch for k, batch in enumerate(batches) if k % HELD != HELD - 1 or len(batches) < HELD]
    seen = sum(map(samples, rest))
    labels = min(16, max(4, 4096 // seen))  # where there are few inputs, more labels make up for it in part
    model = draft.module()
    one = moments(task, model, rest[::2], likelihood, labels)
    other = moments(task, model, rest[1::2], likelihood, labels, seed=len(rest)) if len(rest) > 1 else one
    found = {}
    for name in {**one, **other}:
        halves = one.get(name) or other[name], other.get(name) or one[name]
        if not all(bool(part.isfinite().all()) for half in halves for part in (half.inputs, half.outputs)):
            raise ValueError(
                f"{name}: what the layer sees of the calibration inputs is not finite: check Task(train=...)"
            )
        same = halves[0].form == halves[1].form and halves[0].outputs.shape == halves[1].outputs.shape
        found[name] = halves if same else (halves[0], halves[0])
    biases = {name: a.bias for name, (a, b) in found.items() if a.bias is not None and a.bias == b.bias}
    free = {name: bias for name, bias in biases.items() if bias in draft.trainable and _single(biases, bias)}
    return Gathered(draft, task, likelihood, found, free | norms, held, lossless=lossless(_unique(draft)))


def _single(biases: Mapping[str, str], bias: str) -> bool:
    return sum(other == bias for other in biases.values()) == 1


def _unique(draft: Draft) -> dict[str, Any]:
    return {name: draft.tensors[name] for name in draft.weights()}


def outputs(task: Task, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """What a module says to batches of inputs."""

    def one(batch: Any) -> Any:
        with torch.no_grad():
            return _on_cpu(task.outputs(task.running(model), batch))

    with one_thread():
        return list(spread(one, batches))


def _on_cpu(things: Any) -> Any:
    return [tensor.detach().cpu() for tensor in tensors(things)]


def weighed(gathered: Gathered, prepared: "Prepared", c: float) -> Gathered:
    """The same with what errors of each layer cost at the outputs, seen by quantizing each alone at c.

    Moments know well which errors of a layer cost less than others; how layers compare, where gradients at positions
    are summed as if these had nothing to do with each other, or where there are few inputs for many weights, they know
    less well. A layer whose errors are not seen at all keeps what its moments say.
    """
    layers = [layer for layer in prepared.layers if layer.name in gathered.found]
    task, likelihood = gathered.task, gathered.likelihood
    if not layers or task is None or likelihood is None:
        return gathered
    batches = _probes(gathered.held, len(layers))
    model = gathered.draft.module().eval()

    def said(own: nn.Module) -> list[Any]:
        with torch.no_grad():
            return [_on_cpu(task.outputs(own, batch)) for batch in batches]

    wanted = said(task.running(model))

    def ratio(layer: "Layer") -> float | None:
        alone = replace(prepared, lossless={}, shifts=_own(prepared.shifts, layer))
        packing = alone.packed(layer, c, 0.5)
        changed = {
            name: torch.from_numpy(np.array(unpack(tree), np.float64))
            for name, tree in alone.trees([layer], [packing], c).items()
        }
        seen = likelihood.difference(wanted, said(swapped(model, changed).to(task.device)))
        return math.log(seen / packing.cost) if min(seen, packing.cost) > 0 and math.isfinite(seen) else None

    with one_thread():
        logs = list(progress(spread(ratio, layers), "weighing layers", len(layers)))
    known = [(log, layer.weight.size) for log, layer in zip(logs, layers, strict=True) if log is not None]
    if not known:
        return gathered
    middle = float(np.average([log for log, _ in known], weights=[size for _, size in known]))
    worth = {
        layer.name: math.exp(min(max(log - middle, -8), 8))
        for log, layer in zip(logs, layers, strict=True)
        if log is not None
    }
    return replace(gathered, worth=worth)


def _own(shifts: Mapping[str, float], layer: "Layer") -> dict[str, float]:
    return {name: step for name, step in shifts.items() if name == layer.bias}


def _probes(held: Sequence[Any], layers: int) -> list[Any]:
    """As many of the held back batches as are worth it."""
    least, most, numbers, together = PROBED
    single = max(1, sum(t.numel() for t in tensors(held[0])) // max(1, samples(held[0])))
    wanted = max(16, min(most, max(least, numbers // single), together // layers))
    kept: list[Any] = []
    for batch in held:
        if sum(map(samples, kept)) < wanted:
            kept.append(batch)
    return kept


def swapped(model: nn.Module, changed: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a module that shares all parameters but the changed ones."""
    held = dict(model.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(p): p for p in held.values()}
    for name, value in changed.items():
        if name in held:
            memo[id(held[name])] = nn.Parameter(value.reshape(held[name].shape).to(held[name]), requires_grad=False)
    return duplicate(model, memo)

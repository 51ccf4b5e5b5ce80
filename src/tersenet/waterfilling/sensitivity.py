"""What errors of each layer cost at the network's outputs, seen by quantizing it alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.data import samples, tensors
from tersenet.display import progress
from tersenet.packed import unpack
from tersenet.task import duplicate, one_thread, spread
from tersenet.waterfilling.knowledge import Knowledge, on_cpu
from tersenet.waterfilling.layers import Layer, Waterfilling

# Samples on which a layer's errors are seen: least, most, as many as hold so many numbers, and for all layers together.
PROBED = 64, 256, 1 << 23, 1 << 14


def with_sensitivities(knowledge: Knowledge, waterfilling: Waterfilling, c: float) -> Knowledge:
    """The same with what errors of each layer cost at the outputs, seen by quantizing each alone at c.

    Moments know well which errors of a layer cost less than others; how layers compare, where gradients at positions
    are summed as if these had nothing to do with each other, or where there are few inputs for many weights, they know
    less well. A layer whose errors are not seen at all keeps what its moments say.
    """
    layers = [layer for layer in waterfilling.layers if layer.name in knowledge.found]
    task, likelihood = knowledge.task, knowledge.likelihood
    if not layers or task is None or likelihood is None:
        return knowledge
    batches = _probes(knowledge.held, len(layers))
    model = knowledge.draft.module().eval()

    def said(own: nn.Module) -> list[Any]:
        with torch.no_grad():
            return [on_cpu(task.outputs(own, batch)) for batch in batches]

    wanted = said(task.running(model))

    def ratio(layer: Layer) -> float | None:
        alone = replace(waterfilling, lossless={}, shifts=_own(waterfilling.shifts, layer))
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
        return knowledge
    middle = float(np.average([log for log, _ in known], weights=[size for _, size in known]))
    found = {
        layer.name: math.exp(min(max(log - middle, -8), 8))
        for log, layer in zip(logs, layers, strict=True)
        if log is not None
    }
    return replace(knowledge, sensitivity=found)


def _own(shifts: Mapping[str, float], layer: Layer) -> dict[str, float]:
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

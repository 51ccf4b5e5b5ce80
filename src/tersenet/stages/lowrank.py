"""ENC: layers become chains of two smaller ones, of ranks that together keep to a part of the work (Kim et al. 2019).

What layers cost is counted where the network runs, at their real positions; a chain by space costs more than its
weights tell where a stride makes the map smaller after its first layer. The ranks are chosen by `allocators/rank.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from tersenet.allocators.rank import NOTHING, Curve, cost, mapped, modelled
from tersenet.chains import steps_of
from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.data import samples
from tersenet.display import progress
from tersenet.draft import Draft, artifact_of, dense_array
from tersenet.methods.factorize import SVD, Products, products
from tersenet.packed import Factored, Reshaped, Sliced, Sparse
from tersenet.stages.channels import some
from tersenet.statistics import read, statistics
from tersenet.task import Task, one_thread, spread
from tersenet.tracing.operations import Use, Watch

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
CHOICES = ("map", "model", "inf")
METRICS = ("energy", "accuracy")
POINTS = 5  # ranks of a layer at which the network is measured
WHOLE = "dense: left whole by the ranks that were chosen"
DENSE = "factor layers before other stages"


@dataclass(frozen=True)
class Layers:
    """What may be factored, by name: all products that stand for it and what its choices cost, and what is left."""

    found: Mapping[str, Products]
    curves: Mapping[str, Curve]
    fixed: float  # what everything else costs
    whole: float  # what the network costs


@dataclass(frozen=True)
class ENC:
    """Factor layers by SVD until `macs` of the multiplications, or `density` of the weights, are left.

    The ranks are chosen by "map", "model" or "inf": by singular values alone, or among the `candidates` best by the
    metric on up to `scored` samples of the task's data for choosing. How much of a layer a rank keeps is told by the
    "energy" of its singular values, or by the "accuracy" of the network with this layer alone at five ranks, straight
    lines between (section 3.2), which takes minutes. `weighted` SVDs lose least of the layers' outputs
    to `samples` training inputs. Layers without a chain (grouped and transposed convolutions, tied weights) stay whole.
    The paper leaves the first and the last layer whole, which rules (`keep`) do here.
    """

    macs: float | None = None
    density: float | None = None
    by: str = "map"
    spatial: bool = True
    weighted: bool = True
    samples: int = 512
    candidates: int = 40
    scored: int = 1000
    seed: int = 0
    metric: str = "energy"
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys((Sparse, Sliced, Reshaped, *PACKED), DENSE)
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "runs the network: give a Task with training data"}
    makes: ClassVar[tuple[Kind, ...]] = (Factored,)

    def __post_init__(self) -> None:
        if self.macs is None and self.density is None:
            object.__setattr__(self, "macs", 0.5)
        part = self.macs if self.density is None else self.density
        if part is None or (self.macs is not None and self.density is not None) or not 0 < part <= 1:
            raise ValueError("ENC takes a part of the MACs or of the weights (density), in (0, 1]")
        if self.by not in CHOICES or self.candidates < 1:
            raise ValueError(f"ENC chooses by one of {', '.join(CHOICES)}, among one candidate or more")
        if self.metric not in METRICS:
            raise ValueError(f"ENC tells what a rank keeps by one of {', '.join(METRICS)}")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        part = (self.macs if self.density is None else self.density) or 0.0
        if part == 1:
            return draft
        layers = self.layers(draft, task)
        curves = list(layers.curves.values())
        most = part * layers.whole - layers.fixed
        least = cost(curves, [0] * len(curves)) + layers.fixed
        if least > part * layers.whole:
            what = "weights" if self.macs is None else "MACs"
            raise ValueError(
                f"ENC: {part:.0%} of the {what} cannot be met: the least ranks need {least / layers.whole:.0%}"
            )
        if self.metric == "accuracy":
            layers = self.measured(draft, task, layers)
            curves = list(layers.curves.values())
        if self.by == "map":
            return chosen(draft, layers, mapped(curves, most))
        places = modelled(curves, most, self.candidates if self.by == "inf" else 1)
        if len(places) == 1:
            return chosen(draft, layers, places[0])
        data, model = some(task, self.scored), draft.module()
        scores = []
        for one in progress(places, "scoring ranks", len(places)):
            found = task.score(data, artifact_of(chosen(draft, layers, one)).into(model))
            scores.append(task.metric.gain(found, 0.0))
        return chosen(draft, layers, places[scores.index(max(scores))])

    def measured(self, draft: Draft, task: Task, layers: Layers) -> Layers:
        """The layers with the curves that measuring the network gives."""
        data, model, curves = some(task, self.scored), draft.module(), dict(layers.curves)
        whole = task.score(data, model)
        for name in progress(list(curves), "measuring ranks", len(curves)):
            curve, weight, scores = curves[name], model.get_parameter(name), []
            points = np.unique(np.linspace(0, len(curve.ranks) - 2, POINTS).round().astype(int)).tolist()
            before = weight.detach().clone()
            for at in points if len(curve.ranks) > 1 else ():
                made = torch.from_numpy(layers.found[name].tree(int(curve.ranks[at])).unpack())
                with torch.no_grad():
                    weight.copy_(made)
                scores.append(task.score(data, model))
            with torch.no_grad():
                weight.copy_(before)
            if scores:
                curves[name] = by_accuracy(curve, points, scores, whole, task.metric.better)
        return replace(layers, curves=curves)

    def layers(self, draft: Draft, task: Task) -> Layers:
        """The layers that may be factored, with the spectra and costs of their ranks."""
        model = draft.module().to(task.device).eval()
        inputs = task.calibration(1)[0]
        with torch.no_grad(), one_thread(), Watch(model) as watch:
            task.outputs(model, inputs)
        names = _names(draft, model)
        method = SVD(1, spatial=self.spatial, weighted=self.weighted)
        known = statistics(draft, task, dict.fromkeys(names, method), self.samples, self.seed)

        def factored(name: str) -> Products:
            stats = [read(known[name], need) for need in method.needs]
            return products(dense_array(draft.tensors[name]), self.spatial, *stats)

        names = [name for name in names if not method.needs or name in known]
        with one_thread():
            found = dict(zip(names, progress(spread(factored, names), "factoring", len(names)), strict=True))
        uses = {name: [use for use in watch.uses if use.name == name] for name in names}
        count = samples(inputs)
        if self.macs is None:
            whole = float(sum(np.prod(draft.tensors[name].tree.shape) for name in draft.weights()))
        else:
            whole = math.fsum(_work(use) for use in watch.uses) / count
        curves, fixed = dict[str, Curve](), whole
        for name, own in found.items():
            layer, size = model.get_submodule(name.rpartition(".")[0]), float(math.prod(own.size))
            one = own.tree(1)
            each = float(own.each)
            if self.macs is not None:
                size = math.fsum(map(_work, uses[name])) / count
                each = math.fsum(_each(use, layer, one) for use in uses[name]) / count
            most = min(own.most, math.ceil(size / each) - 1) if each else 0
            curves[name] = Curve.of(own.values[0], each, size, most)
            fixed -= size
        return Layers(found, curves, fixed, whole)


def by_accuracy(curve: Curve, points: Sequence[int], scores: Sequence[float], whole: float, better: str) -> Curve:
    """The curve whose ranks keep as much as the network scores with them at some places, by what it scores whole.

    Never less at a higher rank. Raises ValueError where the network scores nothing.
    """
    if whole <= 0 or min(scores) < 0:
        raise ValueError("ENC: a rank keeps a part of the metric, which must be above 0; tell by the energy")
    parts = [found / whole if better == "more" else whole / max(found, NOTHING) for found in scores]
    kept = np.maximum.accumulate(np.clip(parts, NOTHING, 1))
    ranks = curve.ranks[:-1]
    return replace(curve, kept=np.append(np.interp(ranks, ranks[points], kept), 1.0))


def chosen(draft: Draft, layers: Layers, places: Sequence[int]) -> Draft:
    """The draft with each layer at its choice."""
    ranks = {n: int(curve.ranks[k]) for (n, curve), k in zip(layers.curves.items(), places, strict=True)}
    trees = {name: layers.found[name].tree(rank) for name, rank in ranks.items() if rank}
    return draft.with_trees(trees).with_notes({name: WHOLE for name, rank in ranks.items() if not rank})


def _names(draft: Draft, model: nn.Module) -> list[str]:
    """Weights of layers of which a factored weight makes a chain."""
    layers = dict(model.named_modules())
    tied = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    names = []
    for name in draft.weights():
        above, _, part = name.rpartition(".")
        layer = layers.get(above)
        if part != "weight" or not isinstance(layer, LAYERS) or tied.count(id(layer.weight)) > 1:
            continue
        rows, *columns = draft.tensors[name].tree.shape
        factors = np.zeros((rows, 1), np.float32), np.zeros((1, math.prod(columns)), np.float32)
        if steps_of(layer, Factored("or,ri->oi", factors, (rows, *columns))):
            names.append(name)
    return names


def _work(use: Use) -> int:
    """Multiplications of one use of a weight."""
    if use.inputs is None:
        return 0
    if use.form.kernel and not use.form.straight:  # a transposed convolution spreads each of its inputs
        return use.inputs.numel() * use.form.rows * math.prod(use.form.kernel)
    return use.out.numel() * use.form.columns


def _each(use: Use, layer: nn.Module, tree: Factored) -> int:
    """Multiplications that one rank of a chain costs in a use."""
    assert use.inputs is not None
    axes = len(tree.size) - 2
    if not axes:
        return use.out.numel() // use.form.rows * sum(tree.size)
    before, after = use.inputs.shape[2:], use.out.shape[-axes:]
    total, done = 0, set[int]()
    for step in steps_of(layer, tree):
        done |= set(step.kernel)
        places = math.prod(after[k] if k + 2 in done else before[k] for k in range(axes))
        total += len(use.inputs) * places * math.prod(step.shape)
    return total

"""Output-aware quantization of a whole network without retraining: one global step in the Fisher metric.

The step of weight (i, j) of a layer is c / (R_ii L_jj): A = L L^T from the layer's inputs in the DCT domain of its
kernels, G = R R^T from its output gradients, both damped. One number, c, sets size and accuracy of the whole network
and so settles what each layer and row gets. BatchNorm is first folded to a scale and a shift, and its scale into the
layer before it; the shifts and all biases are quantized by the same rule. Weights that were pruned before, or are zero
in large part, stay zero; their layers are not transformed. What holds a weight without loss (`methods/exact.py`, or its
floats) is taken where it costs no more bits than its loss is worth at this c.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from tersenet.draft import Draft, dense_array, precise
from tersenet.methods.feedback import Metric, Overflow, Steps, diagonal, levels, paths, tree_of, waterfilled
from tersenet.methods.prior import prior
from tersenet.methods.recursion import HIGHEST
from tersenet.methods.transform import spatial
from tersenet.packed import Array, Packed, Reshaped, Tree, Uniform, kernel_dct, narrowed, unpack
from tersenet.structure import is_plain, placed, sliced, support, unsliced
from tersenet.task import one_thread, spread
from tersenet.tracing.operations import Form
from tersenet.waterfilling.factors import Damping, band, input_factors, kept_moments, mean_diagonal, output_factors
from tersenet.waterfilling.knowledge import Halves, Knowledge
from tersenet.waterfilling.lossless import Lossless, entropy

FEW = 16  # tensors with fewer weights stay floats
VECTORS = 0.5  # where vectors hold more of a network's numbers than this, they are layers themselves
FINER = 4.0  # vectors without moments are quantized so many times finer than weights of equal size
LEVELS = 1 << 9  # of a vector without moments, on either side of zero; one that asks for more stays floats
PRUNED = 0.3  # where so many weights are zero, zeros stay zero
SKETCH = 1 << 12  # weights of a layer that are looked at to guess a step
LARGEST = 1e37  # weights beyond it are not quantized: a level more would be infinite
FAINT = 1e-4  # a layer's statistics say at least so much of what is usual: where they vanish, it must not look free
NOISE = 0.255  # squared error of a trellis in squared steps


@dataclass(frozen=True)
class Layer:
    """A weight ready to be quantized at any c; `bias` names what takes up the mean of its output's error."""

    name: str
    form: Form
    weight: Array  # [groups, rows, n], in the DCT domain where `transformed`
    metric: Metric
    means: Array  # [groups, n] of the inputs
    transformed: bool
    bias: str | None
    kept: Array | None = None  # [groups, rows, n], where the weight was pruned before: the rest stays zero
    slices: Mapping[int, Array] = field(default_factory=dict)  # by axis of the tensor, the places that alone are stored

    @cached_property
    def peak(self) -> float:
        """The largest weight."""
        return float(np.abs(self.weight).max(initial=0))

    @cached_property
    def sketch(self) -> Array:
        """Some of the weights' sizes, in steps of c = 1."""
        columns = np.ones((1, 1)) if self.metric.inputs is None else diagonal(self.metric.inputs)
        sizes = np.abs(self.weight) * self.metric.rows()[..., None] * columns[:, None]
        found: Array = sizes.reshape(-1)[:: max(1, sizes.size // SKETCH)]
        return found

    @cached_property
    def energy(self) -> float:
        """What losing the whole weight would cost, a weight."""
        return float(self.metric.cost(self.weight) / self.weight.size)

    def at(self, c: float, rate: float) -> tuple[Array, Steps]:
        """Levels [groups, rows, n] and their steps at c; raises `Overflow` where steps are far too fine."""
        if self.peak > LARGEST:
            raise Overflow(f"{self.name}: weights so large that their levels overflow float32")
        steps = waterfilled(self.metric, c, math.prod(self.form.kernel), self.weight.shape)
        # One row alone is a vector, which the coder lays out anew.
        trellis = self.kept is None and paths(self.weight.shape[2]) and math.prod(self.weight.shape[:2]) > 1
        return levels(self.weight, self.metric, steps.parts(), rate, self.kept, trellis), steps

    def matrix(self, w: Array) -> Array:
        """The tensor's dense array as the layer sees it, [groups, rows, n], in the DCT domain where `transformed`."""
        if w.size != self.weight.size:
            for axis, places in self.slices.items():
                w = w.take(places, axis)
        found: Array = self.form.matrix(w)
        if self.transformed:
            height, width = self.form.kernel if len(self.form.kernel) == 2 else self.form.split[-2:]
            found = (found.reshape(-1, height * width) @ kernel_dct(height, width).T).reshape(found.shape)
        return found

    def lost(self, error: Array, size: int) -> Array:
        """The mean change of the outputs, of which there are `size`, those that are not stored among them."""
        own: Array = (error @ self.means[..., None]).reshape(-1)
        if own.size == size:
            return own
        found = np.zeros(size)
        found[self.slices[0]] = own
        return found

    def tree(self, q: Array, steps: Steps, shape: tuple[int, ...]) -> Tree:
        """The tree of levels, for a tensor of this shape."""
        if self.weight.size == math.prod(shape):  # what the tensor does not store was held at zero
            return sliced(self._tree(q, steps, shape), self.slices)
        part = tuple(len(self.slices.get(axis, range(n))) for axis, n in enumerate(shape))
        return placed(self._tree(q, steps, part), self.slices, shape)

    def _tree(self, q: Array, steps: Steps, shape: tuple[int, ...]) -> Tree:
        if len(shape) == 1:
            return Uniform(narrowed(q.reshape(shape)), np.array(steps.scale, np.float32))
        inner = (self.form.columns // math.prod(self.form.kernel), *self.form.kernel)
        made = (math.prod(self.weight.shape[:2]), *inner)
        if self.form.straight and made == shape:
            return tree_of(q, steps, shape, self.transformed)
        return Reshaped(tree_of(q, steps, made, self.transformed), self.form.split, self.form.axes, shape)


@dataclass(frozen=True)
class Waterfilling:
    """All that does not depend on c: layers with their metrics, biases with the step that one unit of c gives.

    Of what is known without moments, `vectors` have such steps too.
    """

    draft: Draft
    layers: list[Layer]
    shifts: dict[str, float] = field(default_factory=dict)
    lossless: Mapping[str, Lossless] = field(default_factory=dict)
    vectors: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        knowledge: Knowledge, damping: Damping | None = None, aware: bool = True, hold: bool = True
    ) -> "Waterfilling":
        """Shrink, damp and factor the moments of every layer; without `aware` none is used, as if there were no data.

        Weights that are zero in large part keep their zeros, unless `hold` is not set; what was pruned always does, and
        stays out of the problem where whole rows and columns are gone. What is packed by others stays as it is.
        """
        damping = damping or Damping()
        draft = knowledge.draft
        known = {
            id(draft.tensors[name]): halves
            for name, halves in knowledge.found.items()
            if aware and name in draft.tensors
        }
        packed = {name: draft.tensors[name].tree for name in draft.weights()}
        names = [n for n, tree in packed.items() if is_plain(tree) and math.prod(unsliced(tree)[0].shape) >= FEW]
        halves = {name: known.get(id(draft.tensors[name])) for name in names}  # by any name of tied weights
        with one_thread():
            layers = list(spread(lambda name: _layer(name, knowledge, halves[name], damping, hold), names))
        layers += _vectors(draft)
        layers = _levelled(layers, {name for name, one in halves.items() if one is not None})
        shifts: dict[str, float] = {}
        trees: dict[str, Tree] = {}
        for layer in layers:
            one = halves.get(layer.name)
            if one is not None and layer.bias is not None:
                # A constant input would get c / sqrt(mean G); biases are few, so they get half of that.
                mean = sum(mean_diagonal(half.outputs) for half in one) / 2
                sensitivity = knowledge.sensitivity.get(layer.name, 1.0)
                shifts[layer.bias] = 0.5 / math.sqrt((1 + damping.rows) * sensitivity * mean) if mean > 0 else 0.0
        blind = not any(halves.values())  # else c is in another unit, and of other vectors no unit is known
        free = _steps(draft, {layer.name for layer in layers}) if blind else {}
        done = {layer.name for layer in layers} | set(shifts) | set(free)
        for name in sorted(draft.trainable & set(draft.tensors)):
            tree, size = draft.tensors[name].tree, math.prod(draft.tensors[name].tree.shape)
            few = len(tree.shape) < 2 or size < FEW
            if few and not isinstance(tree, Packed) and draft.tensors[name].dtype == "float32" and name not in done:
                trees[name] = precise(tree)
        return Waterfilling(draft.with_trees(trees), layers, shifts, knowledge.lossless, free)

    @property
    def unit(self) -> float:
        """The c at which weights take half a bit each: far coarser, hardly anything is left of them."""
        return self.guess(sum(layer.weight.size for layer in self.layers) // 16)

    @property
    def finest(self) -> float:
        """The c at which the last layer has steps as fine as levels allow: at finer ones files become no larger."""
        sizes = [float(layer.sketch.max()) for layer in self.layers if layer.sketch.any()]
        return max(min(sizes, default=0.0) / HIGHEST, 1e-300)

    def guess(self, most: int) -> float:
        """The c at which a file would have about so many bytes; a few huge weights do not mislead it."""
        known = [(layer.sketch, layer.weight.size) for layer in self.layers if layer.sketch.any()]
        if not known:
            return 1.0
        logs = [float(np.log(sketch[sketch > 0]).mean()) for sketch, _ in known]
        low, high = min(logs) - 30, max(logs) + 30
        for _ in range(50):
            middle = (low + high) / 2
            bits = sum(n * float(np.log2(1 + 4.3 * np.square(x / math.exp(middle))).mean()) / 2 for x, n in known)
            low, high = (middle, high) if bits > 8 * most else (low, middle)
        return math.exp(high)

    def loss(self, draft: Draft) -> float:
        """What the errors of a draft's weights cost in the layers' metrics."""
        dense = ((layer, dense_array(draft.tensors[layer.name]).astype(np.float64)) for layer in self.layers)
        return sum(layer.metric.cost(layer.weight - layer.matrix(w)) for layer, w in dense)

    def at(self, c: float, rate: float = 0.5) -> Draft:
        """The draft quantized with the global step c."""
        packings = list(spread(lambda layer: self.packed(layer, c, rate), self.layers))
        return self.draft.with_trees(self.trees(self.layers, packings, c))

    def trees(self, layers: Sequence[Layer], packings: Sequence["Packing"], c: float) -> dict[str, Tree]:
        """The trees of layers and of the biases that take up the means of their errors; other biases are rounded."""
        trees: dict[str, Tree] = {}
        biases = {name: dense_array(self.draft.tensors[name]).astype(np.float64) for name in self.shifts}
        for layer, packing in zip(layers, packings, strict=True):
            trees[layer.name] = packing.tree
            if layer.bias is not None and packing.lost is not None:
                biases[layer.bias] += packing.lost
        for name, step in self.shifts.items():
            before = self.draft.tensors[name].tree
            kept = unsliced(before)[1]
            tree = rounded(biases[name].take(kept[0]) if kept else biases[name], c * step)
            if not isinstance(tree, Packed) and not isinstance(before, Packed):
                tree = np.asarray(tree).astype(np.asarray(before).dtype)
            trees[name] = placed(tree, kept, before.shape)
        for name, step in self.vectors.items():
            tensor = self.draft.tensors[name]
            tree = rounded(dense_array(tensor).astype(np.float64), c * step, LEVELS)
            if isinstance(tree, Packed) or tensor.dtype == "float32":  # floats of other types are as they were
                trees[name] = tree
        return trees

    @staticmethod
    def _levels(layer: Layer, c: float, rate: float) -> tuple[Array, Steps, bool] | None:
        """Levels at c and True, or False and those at the finest step that one huge weight allows, if there is one."""
        for more in range(0, 100, 3):
            with contextlib.suppress(Overflow):
                return *layer.at(c * 2.0**more, rate), more == 0
        return None

    def packed(self, layer: Layer, c: float, rate: float) -> "Packing":
        """A layer at c, or its tree without loss where that costs no more than the loss is worth."""
        kept, shape = self.lossless.get(layer.name), tuple(self.draft.tensors[layer.name].tree.shape)
        found = self._levels(layer, c, rate)
        if found is None:
            return Packing(kept.tree if kept else self.draft.tensors[layer.name].tree, None, 0.0)
        q, steps, fine = found
        error = steps.dense()  # one column where all have one step
        error = np.multiply(error, q, out=error if error.shape == q.shape else None)
        np.subtract(layer.weight, error, out=error)  # in place: a table of embeddings is large
        cost = layer.metric.cost(error)
        # Where one weight is so large that steps must be coarser, what the others lose is no reason to keep all.
        worth = cost / (2 * math.log(2) * NOISE * c * c) if fine else 0.0
        if kept is not None and kept.bits <= entropy(q) + worth:
            return Packing(kept.tree, None, 0.0)
        lost = None
        if layer.bias is not None:
            lost = layer.lost(error, math.prod(self.draft.tensors[layer.bias].tree.shape))
        return Packing(layer.tree(q, steps, shape), lost, cost)


class Packing(NamedTuple):
    """A layer's tree, the mean error of its outputs, and what its errors cost in the metric."""

    tree: Tree
    lost: Array | None
    cost: float


def rounded(values: Array, step: float, most: int = 1 << 22) -> Tree:
    """Values at multiples of a step, or as floats where there is no step or `most` levels are too few."""
    step = float(np.float32(step))
    q = np.rint(values / step) if step > 0 else np.full(values.shape, np.inf)
    if not np.abs(q).max(initial=0) < most:
        return precise(values)
    return Uniform(narrowed(q.astype(np.int32)), np.array(step, np.float32))


def _steps(draft: Draft, done: set[str]) -> dict[str, float]:
    """Steps at c = 1 of vectors of which nothing is known but their values; few values stay floats."""
    found: dict[int, tuple[str, float]] = {}
    for name in sorted((draft.trainable & set(draft.tensors)) - done):
        tensor = draft.tensors[name]
        fits = len(tensor.tree.shape) == 1 and tensor.tree.shape[0] >= FEW and not isinstance(tensor.tree, Packed)
        if fits and not _whole(w := dense_array(tensor).astype(np.float64)):
            found.setdefault(id(tensor), (name, 1 / (FINER * float(prior(w[None]).rows[0]))))
    return dict(found.values())


def _whole(values: Array) -> bool:
    """Whether all are whole numbers, as counts are: those are kept."""
    return bool((values == np.rint(values)).all())


def _vectors(draft: Draft) -> list[Layer]:
    """Layers of the vectors, where these are most of the network; else they stay floats."""
    sizes = {name: math.prod(draft.tensors[name].tree.shape) for name in draft.trainable & set(draft.tensors)}
    flat = {name: size for name, size in sizes.items() if len(draft.tensors[name].tree.shape) == 1 and size >= FEW}
    if sum(flat.values()) <= VECTORS * sum(sizes.values()):
        return []
    layers, seen = list[Layer](), set[int]()
    for name in sorted(flat):
        tensor = draft.tensors[name]
        if id(tensor) not in seen and not isinstance(tensor.tree, Packed) and dense_array(tensor).any():
            w = dense_array(tensor).astype(np.float64).reshape(1, 1, -1)
            form, metric = Form((1, flat[name]), (0, 1)), Metric(None, FINER * prior(w[0]).rows[None, :, None])
            layers.append(Layer(name, form, w, metric, np.zeros((1, flat[name])), False, None))
        seen.add(id(tensor))
    return layers


def _layer(name: str, knowledge: Knowledge, known: Halves | None, damping: Damping, hold: bool) -> Layer:
    tensor = knowledge.draft.tensors[name]
    tree, slices = unsliced(tensor.tree)
    if slices and known is not None:
        parts = [kept_moments(half, slices, tensor.tree.shape) for half in known]
        if parts[0] is None or parts[1] is None:  # then the whole is quantized, with zeros held
            tree = tensor.tree
        else:
            known = parts[0], parts[1]
    w, shape, free = np.asarray(unpack(tree), np.float32).astype(np.float64), tuple(tree.shape), support(tree)
    form = Form.plain(shape) if known is None else known[0].form
    flat = form.matrix(w)
    kept = None
    if not free.all() or (hold and np.count_nonzero(w) < (1 - PRUNED) * w.size):
        kept = np.ascontiguousarray(form.matrix(free if not free.all() else w != 0))
    kernel = form.kernel if known is not None else shape[2:]
    transformed = kept is None and len(kernel) == 2 and spatial(shape)
    t = kernel_dct(*kernel) if transformed else np.eye(1)
    flat = (flat.reshape(-1, len(t)) @ t.T).reshape(flat.shape)
    if known is None:
        one = prior(flat[0], len(shape) == 2)
        metric = Metric(None if one.columns is None else one.columns[None, :, None], one.rows[None, :, None])
        return Layer(name, form, flat, metric, np.zeros((1, flat.shape[2])), transformed, None, kept, slices)
    bias, turn = knowledge.biases.get(name), torch.from_numpy(t.copy())
    inputs = input_factors(known, damping, bias is not None, turn, flat)
    outputs = math.sqrt(knowledge.sensitivity.get(name, 1.0)) * output_factors(known, damping, flat)
    n, m = flat.shape[2], flat.shape[1]
    metric = Metric(band(inputs, len(flat), n), band(outputs, len(flat), m))
    means = ((known[0].means + known[1].means) / 2).reshape(-1, len(t)) @ turn.T
    return Layer(name, form, flat, metric, means.reshape(len(flat), n).numpy(), transformed, bias, kept, slices)


def _levelled(layers: list[Layer], known: set[str]) -> list[Layer]:
    """The layers in one unit: those without moments, or with hardly any, cost a usual amount when they are lost."""
    told = [layer for layer in layers if layer.name in known and layer.energy > 0]  # pruned ones may be all zero
    sizes = [layer.weight.size for layer in told]
    usual = math.exp(float(np.average([math.log(one.energy) for one in told], weights=sizes))) if told else None
    found = []
    for layer in layers:
        least = usual if layer.name not in known else None if usual is None else FAINT * usual
        if least is not None and (layer.name not in known or layer.energy < least):
            factor = math.sqrt(least / layer.energy) if layer.energy > 0 else 1.0
            layer = replace(layer, metric=Metric(layer.metric.inputs, layer.metric.outputs * factor))
        found.append(layer)
    return found

"""Second-order pruning of a whole network, without retraining: optimal brain surgery in the Fisher metric.

The loss around a trained network is about E[(E W's error) A and G]: A the moments of a layer's inputs, G those of the
gradients at its outputs, from labels sampled from the network itself (calibrate.py). Three orders in which weights go:

* "kronecker": MLPrune (Zeng, Urtasun 2019). Removing w_ij costs w_ij^2 / (2 [A^-1]_jj [G^-1]_ii); one threshold over
  all layers sets each layer's ratio, which is the method's point. Survivors move by the sum of the single weights'
  updates, as in the paper, or by the best update in the metric A, which does not assume that removals do not meet.
* "exact": one weight after the other in the metric A (ExactOBS: Frantar, Alistarh 2022), rows and layers merged by cost
  times G_ii. O(n^3) for each row of n.
* "sweep": SparseGPT (Frantar, Alistarh 2023), every layer at the same density.

Where a layer has a bias, A is the covariance of its inputs and the bias takes up the mean of the error, which is what
counting the bias as an input of 1 does. A and G of very wide layers come as diagonal blocks; where A is wider than
`block`, A^-1 is that of its diagonal blocks too.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from tersenet import cores
from tersenet.calibrate import Moments, moments
from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.display import progress
from tersenet.draft import Draft, dense_array
from tersenet.folding import untied
from tersenet.likelihood import Likelihood
from tersenet.methods.sparse import kept_count, largest
from tersenet.methods.surgeon import damped, inverse, refitted, removals, swept
from tersenet.packed import Array, Sparse, Tree
from tersenet.stages.prune import masked
from tersenet.structure import is_plain, refilled, support, thinned
from tersenet.task import Task, one_thread
from tersenet.tracing.operations import Form

ORDERS = ("kronecker", "exact", "sweep")
UPDATES = ("sum", "best", "none")


@dataclass(frozen=True)
class Prunable:
    """A weight as blocks of its columns, with what removing parts of it costs, all in float64.

    There is a block for each of the k diagonal blocks of A in each group; what goes past the last column is masked.
    `bias` names what takes up the mean of the error.
    """

    name: str
    form: Form
    weight: Array  # [groups * k, rows, b]
    mask: Array  # the same, of what is not pruned already
    inputs: Array  # A [groups * k, b, b], damped
    outputs: Array  # G [groups, l, d, d], damped
    means: Array  # [groups * k, b] of the inputs where a bias takes up the mean, else 0
    bias: str | None = None
    block: int = 2048

    @property
    def size(self) -> int:
        return math.prod(self.form.split)

    @property
    def widths(self) -> list[int]:
        """How many columns of each block are the weight's."""
        count, width = len(self.weight) // self.form.groups, self.weight.shape[2]
        return [min(width, self.form.columns - k * width) for k in range(count)] * self.form.groups

    def laid(self, whole: Array) -> Array:
        """An array of the weight's shape as the blocks lie."""
        return _blocked(self.form, whole, self.weight.shape[2])

    def whole(self, blocks: Array) -> Array:
        """The way back."""
        form, (_, rows, width) = self.form, blocks.shape
        seen = blocks.reshape(form.groups, -1, rows, width).transpose(0, 2, 1, 3).reshape(form.groups, rows, -1)
        ordered = seen[:, :, : form.columns].reshape(form.ordered)
        return ordered.transpose(np.argsort(form.axes)).reshape(form.split)

    @cached_property
    def inverses(self) -> tuple[Array, Array]:
        """A^-1, of diagonal blocks where A is wider than `block`, and G^-1."""
        found = np.zeros_like(self.inputs)
        for at in range(0, self.inputs.shape[1], self.block):
            part = (slice(None), slice(at, at + self.block), slice(at, at + self.block))
            found[part] = inverse(self.inputs[part])
        return found, inverse(self.outputs)

    def along_rows(self, outputs: Array) -> Array:
        """The diagonal of G, or of its inverse, for each block [groups * k, rows]."""
        rows = np.diagonal(outputs, axis1=2, axis2=3).reshape(len(outputs), -1)[:, : self.form.rows]
        return rows.repeat(len(self.weight) // len(rows), 0)

    @property
    def stiffness(self) -> Array:
        """[A^-1]_jj [G^-1]_ii for each weight, [groups * k, rows, b]."""
        inputs, outputs = self.inverses
        return self.along_rows(outputs)[:, :, None] * np.diagonal(inputs, axis1=1, axis2=2)[:, None]

    def moved(self, removed: Array) -> Array:
        """G^-1 E A^-1 for what is removed, in units of the stiffness, [groups * k, rows, b]."""
        inputs, outputs = (torch.from_numpy(np.ascontiguousarray(one)) for one in self.inverses)
        groups, count, width, _ = outputs.shape
        padded = np.pad(removed, ((0, 0), (0, count * width - removed.shape[1]), (0, 0)))
        parts = torch.from_numpy(padded).reshape(groups, -1, count, width, removed.shape[2])
        found = (outputs[:, None] @ parts).reshape(padded.shape)[:, : removed.shape[1]] @ inputs
        return found.numpy()


def _blocked(form: Form, whole: Array, width: int) -> Array:
    """An array of a weight's shape as blocks [groups * k, rows, width] of its columns, zero past the last."""
    seen = form.matrix(whole)
    groups, rows, n = seen.shape
    count = -(-n // width)
    padded = np.pad(seen, ((0, 0), (0, 0), (0, count * width - n)))
    parts = padded.reshape(groups, rows, count, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(parts.reshape(groups * count, rows, width))


@dataclass(frozen=True)
class OBS:
    """Keep a density of the weights, chosen and made up for by second moments of `samples` training inputs.

    `damping` and `rows` are what is added to A and to G, as parts of their mean diagonals: G is known from far fewer
    gradients than A from positions, and MLPrune inverts it. `update` moves the survivors; "exact" and "sweep"
    always end in the best update. Layers whose moments are not known stay dense.
    """

    density: float = 0.5
    order: str = "exact"
    update: str = "best"
    damping: float = 0.01
    rows: float = 1.0
    samples: int = 1024
    block: int = 2048
    seed: int = 0
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, "prune before packing")
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "needs the network's inputs: give a Task with training data"}
    makes: ClassVar[tuple[Kind, ...]] = (Sparse,)

    def __post_init__(self) -> None:
        if self.order not in ORDERS or self.update not in UPDATES:
            raise ValueError(f"OBS takes order among {', '.join(ORDERS)} and update among {', '.join(UPDATES)}")
        if not 0 < self.density <= 1:
            raise ValueError("OBS takes a density in (0, 1]")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        if task is None or self.density == 1:
            return draft
        draft = untied(draft)
        with one_thread():
            layers = self._layers(draft, task)
            if not layers:
                raise ValueError("OBS finds no weight whose inputs are known: use Prune")
            if self.order == "sweep":
                return self._swept(draft, layers)
            chosen = self._ranked(draft, layers) if self.order == "kronecker" else self._merged(draft, layers)
            return self._updated(chosen, layers)

    def _layers(self, draft: Draft, task: Task) -> list[Prunable]:
        batches, likelihood = task.calibration(self.samples), Likelihood.of(task)
        found = moments(task, draft.module(), batches, likelihood, seed=self.seed)
        known = {id(draft.tensors[name]): m for name, m in found.items() if name in draft.tensors}
        return [
            self._layer(draft, name, known[id(draft.tensors[name])])
            for name in draft.weights()
            if id(draft.tensors[name]) in known
        ]

    def _layer(self, draft: Draft, name: str, known: Moments) -> Prunable:
        w, tree, form = dense_array(draft.tensors[name]).astype(np.float64), draft.tensors[name].tree, known.form
        a, g, means = known.inputs.flatten(0, 1).numpy(), known.outputs.numpy(), known.means.numpy()
        if not (np.isfinite(a).all() and np.isfinite(g).all()):
            raise ValueError(f"{name}: what the layer sees of the training inputs is not finite: check Task(train=...)")
        bias = known.bias if known.bias in draft.trainable and known.bias in draft.tensors else None
        width = a.shape[2]
        rest = len(a) // form.groups * width - form.columns
        means = np.pad(means, ((0, 0), (0, rest))).reshape(len(a), width) * (bias is not None)
        level = np.diagonal(g, axis1=2, axis2=3).reshape(len(g), -1).sum(1) / form.rows
        outputs = g + (self.rows * level + 1e-12)[:, None, None, None] * np.eye(g.shape[2])
        inputs = damped(a - means[:, :, None] * means[:, None], self.damping)
        weight, left = (_blocked(form, part, width) for part in (w, support(tree)))
        return Prunable(name, form, weight, left, inputs, outputs, means, bias, self.block)

    def _ranked(self, draft: Draft, layers: list[Prunable]) -> Draft:
        saliency = {layer.name: layer.whole(np.square(layer.weight) / (2 * layer.stiffness)) for layer in layers}
        shaped = {name: cost.reshape(draft.tensors[name].tree.shape) for name, cost in saliency.items()}
        return masked(draft, shaped, dict.fromkeys(shaped, self.density), set())

    def _merged(self, draft: Draft, layers: list[Prunable]) -> Draft:
        """Costs along each row's removals never fall, so the cheapest of all rows together are prefixes of each."""

        def taken(row: tuple[Prunable, int, int]) -> tuple[Array, Array]:
            layer, k, r = row
            there = np.flatnonzero(layer.mask[k, r])
            inverted = inverse(layer.inputs[k][np.ix_(there, there)])
            order, cost = removals(layer.weight[k, r][there], inverted, len(there))
            place = np.ravel_multi_index((k, r, there[order]), layer.weight.shape)
            return np.maximum.accumulate(cost) * scales[layer.name][k, r], place

        scales = {layer.name: layer.along_rows(layer.outputs) for layer in layers}
        rows = [
            (layer, k, r) for layer in layers for k, r in np.ndindex(layer.mask.shape[:2]) if layer.mask[k, r].any()
        ]
        with ThreadPoolExecutor(cores.usable()) as pool:
            found = list(progress(pool.map(taken, rows), "removing weights", len(rows)))
        kept = largest(np.concatenate([cost for cost, _ in found]), kept_count(self.density, _size(layers)))
        masks = {layer.name: layer.mask.copy().reshape(-1) for layer in layers}
        for (layer, *_), (_, place) in zip(rows, found, strict=True):
            masks[layer.name][place], kept = np.split(kept, [len(place)])
        trees: dict[str, Tree] = {}
        for layer in layers:
            tree = draft.tensors[layer.name].tree
            mask = layer.whole(masks[layer.name].reshape(layer.mask.shape)).reshape(tree.shape)
            trees[layer.name] = thinned(tree, mask)
        return draft.with_trees(trees)

    def _updated(self, chosen: Draft, layers: list[Prunable]) -> Draft:
        """The survivors of a draft that was pruned, moved; the layers hold the weights from before."""
        weights: dict[str, Array] = {}
        for layer in layers:
            mask = layer.laid(support(chosen.tensors[layer.name].tree))
            if self.update == "best":
                found = np.stack([refitted(w, m, a) for w, m, a in zip(layer.weight, mask, layer.inputs, strict=True)])
            elif self.update == "sum":
                found = layer.weight - layer.moved(np.where(mask, 0, layer.weight / layer.stiffness))
            else:
                found = layer.weight
            weights[layer.name] = np.where(mask, found, 0)
        return self._with_weights(chosen, layers, weights)

    def _swept(self, draft: Draft, layers: list[Prunable]) -> Draft:
        weights, masks = dict[str, Array](), dict[str, Tree]()
        for layer in progress(layers, "sweeping", len(layers)):
            found, kept = np.zeros(layer.weight.shape), np.zeros(layer.weight.shape, bool)
            for k, n in enumerate(layer.widths):
                w, a, free = layer.weight[k, :, :n], layer.inputs[k, :n, :n], layer.mask[k, :, :n]
                found[k, :, :n], kept[k, :, :n] = swept(w, a, self.density, free=free)
            weights[layer.name], tree = found, draft.tensors[layer.name].tree
            masks[layer.name] = thinned(tree, layer.whole(kept).reshape(tree.shape))
        return self._with_weights(draft.with_trees(masks), layers, weights)

    def _with_weights(self, draft: Draft, layers: list[Prunable], weights: dict[str, Array]) -> Draft:
        """The draft with new weights under its masks; biases take up the mean of what was lost."""
        trees, biases = dict[str, Tree](), dict[str, Array]()
        for layer in layers:
            tree, w = draft.tensors[layer.name].tree, weights[layer.name]
            trees[layer.name] = refilled(tree, layer.whole(w).reshape(tree.shape))
            if layer.bias is not None:
                lost = ((layer.weight - w) @ layer.means[..., None]).reshape(layer.form.groups, -1, layer.form.rows)
                before: Array = biases.get(layer.bias, dense_array(draft.tensors[layer.bias]))
                biases[layer.bias] = before + lost.sum(1).reshape(before.shape)
        for name, bias in biases.items():
            before = draft.tensors[name].tree  # a constant beside a folded norm is a bias again
            trees[name] = refilled(before, bias) if is_plain(before) else bias.astype(np.float32)
        return draft.with_trees(trees)


def _size(layers: list[Prunable]) -> int:
    return sum(layer.size for layer in layers)

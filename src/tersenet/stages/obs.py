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
counting the bias as an input of 1 does. Where a layer is wider than `block`, A^-1 is that of A's diagonal blocks.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch

from tersenet.calibrate import Moments, moments
from tersenet.methods.sparse import kept_count, largest
from tersenet.methods.surgeon import damped, inverse, refitted, removals, swept
from tersenet.packed import Array, Sparse, Tree
from tersenet.recipe import Draft, dense_array
from tersenet.stages.prune import masked
from tersenet.task import Task, one_thread, progress

ORDERS = ("kronecker", "exact", "sweep")
UPDATES = ("sum", "best", "none")


@dataclass(frozen=True)
class Layer:
    """A weight as groups of rows, with what removing parts of it costs, all in float64."""

    name: str
    weight: Array  # [groups, rows, n]
    mask: Array  # the same, of what is not pruned already
    inputs: Array  # A [groups, n, n], damped
    outputs: Array  # G [groups, rows, rows], damped
    means: Array  # [groups, n] of the inputs where a bias takes up the mean, else 0
    block: int = 2048

    @cached_property
    def inverses(self) -> tuple[Array, Array]:
        """A^-1, of diagonal blocks where A is wider than `block`, and G^-1."""
        found = np.zeros_like(self.inputs)
        for at in range(0, self.inputs.shape[1], self.block):
            part = (slice(None), slice(at, at + self.block), slice(at, at + self.block))
            found[part] = inverse(self.inputs[part])
        return found, inverse(self.outputs)

    @property
    def stiffness(self) -> Array:
        """[A^-1]_jj [G^-1]_ii for each weight, [groups, rows, n]."""
        inputs, outputs = (np.diagonal(one, axis1=1, axis2=2) for one in self.inverses)
        return outputs[:, :, None] * inputs[:, None]


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

    def __post_init__(self) -> None:
        if self.order not in ORDERS or self.update not in UPDATES:
            raise ValueError(f"OBS takes order among {', '.join(ORDERS)} and update among {', '.join(UPDATES)}")
        if not 0 < self.density <= 1:
            raise ValueError("OBS takes a density in (0, 1]")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        if task is None or draft.model is None:
            raise ValueError("OBS needs the network's inputs: give a Task with training data")
        if self.density == 1:
            return draft
        with one_thread():
            layers = self._layers(draft, task)
            if self.order == "sweep":
                return self._swept(draft, layers)
            chosen = self._ranked(draft, layers) if self.order == "kronecker" else self._merged(draft, layers)
            return self._updated(chosen, layers)

    def _layers(self, draft: Draft, task: Task) -> list[Layer]:
        found = moments(draft.module(), task.calibration(self.samples), task, seed=self.seed)
        known = {id(draft.tensors[name]): m for name, m in found.items() if name in draft.tensors}
        return [
            self._layer(draft, name, known[id(draft.tensors[name])])
            for name in draft.weights()
            if id(draft.tensors[name]) in known
        ]

    def _layer(self, draft: Draft, name: str, known: Moments) -> Layer:
        w, tree = dense_array(draft.tensors[name]).astype(np.float64), draft.tensors[name].tree
        a, means = known.inputs.numpy(), known.means.numpy()
        if self._bias(draft, name) is None:
            means = np.zeros_like(means)
        groups, rows = len(a), len(w) // len(a)
        g = known.outputs.numpy()
        g = np.stack([g[at : at + rows, at : at + rows] for at in range(0, len(w), rows)])
        shape = (groups, rows, a.shape[1])
        mask = tree.mask if isinstance(tree, Sparse) else np.ones(w.shape, bool)
        covariance = a - means[:, :, None] * means[:, None]
        damping = (damped(covariance, self.damping), damped(g, self.rows))
        return Layer(name, w.reshape(shape), mask.reshape(shape), *damping, means, self.block)

    def _bias(self, draft: Draft, name: str) -> str | None:
        tied = sum(tensor is draft.tensors[name] for tensor in draft.tensors.values()) > 1
        return None if tied else draft.bias(name)  # the moments of tied weights are those of all their layers

    def _ranked(self, draft: Draft, layers: list[Layer]) -> Draft:
        saliency = {}
        for layer in layers:
            cost = np.square(layer.weight) / (2 * layer.stiffness)
            saliency[layer.name] = cost.reshape(draft.tensors[layer.name].tree.shape)
        return masked(draft, saliency, dict.fromkeys(saliency, self.density), set())

    def _merged(self, draft: Draft, layers: list[Layer]) -> Draft:
        """Costs along each row's removals never fall, so the cheapest of all rows together are prefixes of each."""

        def taken(row: tuple[Layer, int, int]) -> tuple[Array, Array]:
            layer, g, r = row
            there = np.flatnonzero(layer.mask[g, r])
            inverted = inverse(layer.inputs[g][np.ix_(there, there)])
            order, cost = removals(layer.weight[g, r][there], inverted, len(there))
            place = np.ravel_multi_index((g, r, there[order]), layer.weight.shape)
            return np.maximum.accumulate(cost) * layer.outputs[g, r, r], place

        rows = [
            (layer, g, r) for layer in layers for g, r in np.ndindex(layer.mask.shape[:2]) if layer.mask[g, r].any()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(progress(pool.map(taken, rows), "removing weights", len(rows)))
        total = sum(layer.weight.size for layer in layers)
        kept = largest(np.concatenate([cost for cost, _ in found]), kept_count(self.density, total))
        masks = {layer.name: layer.mask.copy().reshape(-1) for layer in layers}
        for (layer, *_), (_, place) in zip(rows, found, strict=True):
            masks[layer.name][place], kept = np.split(kept, [len(place)])
        trees: dict[str, Tree] = {}
        for layer in layers:
            shape = draft.tensors[layer.name].tree.shape
            mask = masks[layer.name].reshape(shape)
            trees[layer.name] = Sparse(mask, layer.weight.reshape(shape)[mask].astype(np.float32))
        return draft.with_trees(trees)

    def _updated(self, chosen: Draft, layers: list[Layer]) -> Draft:
        """The survivors of a draft that was pruned, moved; the layers hold the weights from before."""
        trees: dict[str, Array] = {}
        for layer in layers:
            tree = cast(Sparse, chosen.tensors[layer.name].tree)
            mask = tree.mask.reshape(layer.weight.shape)
            if self.update == "best":
                found = np.stack([refitted(w, m, a) for w, m, a in zip(layer.weight, mask, layer.inputs, strict=True)])
            elif self.update == "sum":
                moved = torch.from_numpy(np.where(mask, 0, layer.weight / layer.stiffness))
                inputs, outputs = (torch.from_numpy(one) for one in layer.inverses)
                found = layer.weight - (outputs @ moved @ inputs).numpy()
            else:
                found = layer.weight
            trees[layer.name] = np.where(mask, found, 0)
        return self._with_weights(chosen, layers, trees)

    def _swept(self, draft: Draft, layers: list[Layer]) -> Draft:
        trees, masks = dict[str, Array](), dict[str, Tree]()
        for layer in progress(layers, "sweeping", len(layers)):
            parts = [swept(w, a, self.density) for w, a in zip(layer.weight, layer.inputs, strict=True)]
            trees[layer.name] = np.stack([dense for dense, _ in parts])
            mask = np.stack([mask for _, mask in parts]).reshape(draft.tensors[layer.name].tree.shape)
            masks[layer.name] = Sparse(mask, np.zeros(int(mask.sum()), np.float32))
        return self._with_weights(draft.with_trees(masks), layers, trees)

    def _with_weights(self, draft: Draft, layers: list[Layer], weights: dict[str, Array]) -> Draft:
        """The draft with new weights under its masks; biases take up the mean of what was lost."""
        trees: dict[str, Tree] = {}
        for layer in layers:
            tree, w = cast(Sparse, draft.tensors[layer.name].tree), weights[layer.name]
            trees[layer.name] = Sparse(tree.mask, w.reshape(tree.mask.shape)[tree.mask].astype(np.float32))
            if (bias := self._bias(draft, layer.name)) is not None:
                lost = ((layer.weight - w) @ layer.means[..., None]).reshape(-1)
                trees[bias] = (dense_array(draft.tensors[bias]) + lost).astype(np.float32)
        return draft.with_trees(trees)

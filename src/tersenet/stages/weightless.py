"""Weightless: pruned layers as Bloomier filters, whose false positives the layers after them are trained around.

Reagen, Gupta, Adolf, Mitzenmacher, Rush, Wei, Brooks (2018), section 3. A filter of t bits a cell answers a place that
was pruned with one of K values where chance has it, which is K / 2^t of the time; it is known which, once it is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np

from tersenet.bloomier import built
from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.display import progress
from tersenet.draft import Draft
from tersenet.methods.kmeans import KMeans
from tersenet.packed import Bloomier, Codebook, Tree, narrowed, unpack
from tersenet.stages.finetune import tune
from tersenet.stages.layerwise import in_order
from tersenet.structure import placed, support, unsliced
from tersenet.task import Task
from tersenet.where import Where, chosen


@dataclass(frozen=True)
class Weightless:
    """Put pruned weights into Bloomier filters in the order of use, and retrain what comes later for `tune` epochs.

    Survivors share 2^`bits` values; cells have `cells` bits, or what a rule says (None leaves a weight). With `within`
    each layer takes the fewest bits, from `bits` + 1 on, with which the metric on held back data loses no more than
    that after retraining. Weights without pruned zeros are left.
    """

    bits: int = 3
    cells: int = 8
    rules: tuple[tuple[Where | str, int | None], ...] = ()
    within: float | None = None
    tune: int = 1
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "retrains the layers: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, "it shares values itself: encode pruned weights")
    makes: ClassVar[tuple[Kind, ...]] = (Bloomier,)

    def __post_init__(self) -> None:
        given = [self.cells, *(cells for _, cells in self.rules if cells is not None)]
        if not 1 <= self.bits <= 8 or not all(self.bits <= cells <= 16 for cells in given):
            raise ValueError("Weightless takes 1 to 8 bits for values, and cells of no fewer bits and at most 16")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        sizes = dict.fromkeys(draft.weights(), self.cells) | {n: c for n, (_, c) in chosen(draft, self.rules).items()}
        pruned = {n for n in sizes if 0 < np.mean(support(unsliced(draft.tensors[n].tree)[0])) < 1}
        names = [name for name in in_order(draft, task) if name in pruned and sizes[name] is not None]
        trainable, floor = draft.trainable, -np.inf
        if self.within is not None:
            floor = task.metric.gain(task.score(task.held(), draft.module()), 0.0) - self.within
        for name in progress(names, "Bloomier filters", len(names)):
            most = sizes[name]
            assert most is not None
            tried = range(most if self.within is None else min(self.bits + 1, most), most + 1)
            for cells in tried:
                after = self._encoded(draft, task, name, cells)
                if cells == most or task.metric.gain(task.score(task.held(), after.module()), 0.0) >= floor:
                    break
            draft = after
        return replace(draft, trainable=trainable)

    def _encoded(self, draft: Draft, task: Task, name: str, cells: int) -> Draft:
        """The draft with a weight in a filter, which is kept as it is while the others are trained."""
        held = draft.tensors[name]
        draft = draft.with_trees({name: filtered(held.tree, self.bits, cells, self.seed)})
        own = draft.tensors[name]
        free = frozenset(n for n in draft.trainable if draft.tensors[n] is not own)
        schedule = replace(task.schedule, epochs=max(self.tune, 1), lr=task.schedule.lr / 10, drops=(0.5,))
        epochs = range(self.tune if free else 0)
        return tune(replace(draft, trainable=free), task, schedule, epochs, self.seed, f"retraining after {name}")


def filtered(tree: Tree, bits: int, cells: int, seed: int = 0) -> Tree:
    """A pruned weight as a Bloomier filter of at most 2^bits values, with cells of `cells` bits; slices stay."""
    child, kept = unsliced(tree)
    mask, dense = support(child), np.asarray(unpack(child), np.float32)
    shared = cast(Codebook, KMeans(bits).pack(dense[mask]))
    keys = np.flatnonzero(mask)
    found, tried, length = built(keys, np.asarray(shared.index), cells, seed)
    codewords = np.asarray(shared.codewords)[:, 0]
    return placed(Bloomier(narrowed(found), codewords, cells, tried, length, tuple(dense.shape)), kept, tree.shape)

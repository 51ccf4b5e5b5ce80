"""Single- and multi-level quantization: shared values a part at a time, the rest trained around what is decided.

Xu, Wang, Zhou, Lin, Xiong (2018). SLQ clusters the weights of a layer, shares the clusters that lose most, trains the
others, and goes on with these. MLQ, for two bits, has too few clusters for that: it shares a part of each cluster, and
a few layers at a time, while all others make up for it (incremental layer compensation). What is shared never moves
again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.display import progress
from tersenet.draft import Draft
from tersenet.methods import fixed_point, repack
from tersenet.methods.kmeans import lloyd
from tersenet.packed import Array, Codebook, Packed, Tree, narrowed, unpack
from tersenet.stages.finetune import tune
from tersenet.stages.layerwise import in_order
from tersenet.structure import is_plain, refilled, support
from tersenet.task import Task

STEPS = 10  # of k-means each time
SHARED = "it shares values itself: quantize plain weights"


@dataclass(frozen=True)
class SLQ:
    """Share 2^(bits - 1) + 1 values a layer, zero among them, in `rounds` with `epochs` of training after each but the
    last. The rate of training is a tenth of the task's.
    """

    bits: int = 5
    rounds: int = 5
    epochs: int = 1
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, SHARED)
    makes: ClassVar[tuple[Kind, ...]] = (Codebook,)

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8 or self.rounds < 1:
            raise ValueError("SLQ takes 3 to 8 bits and a round or more; MLQ is for 2 bits")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        layers, clusters = _layers(draft, draft.weights()), 2 ** (self.bits - 1) + 1

        def share(name: str, round_: int) -> None:
            count = -(-clusters * round_ // self.rounds)  # how many clusters are shared from now on
            layers[name].share(powers(layers[name].values, clusters), count)

        steps = [(round_, list(layers)) for round_ in range(1, self.rounds + 1)]
        return _in_steps(draft, task, layers, steps, share, (self.epochs, self.seed), "single-level quantization")


@dataclass(frozen=True)
class MLQ:
    """Three values a layer (ternary), shared in `rounds`, each for a part of every cluster, in `groups` of layers.

    After each group all that is not shared yet is trained for `epochs`, at a tenth of the task's rate.
    """

    rounds: int = 2
    groups: int = 4
    epochs: int = 1
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, SHARED)
    makes: ClassVar[tuple[Kind, ...]] = (Codebook,)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.groups < 1:
            raise ValueError("MLQ takes a round and a group or more")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        layers = _layers(draft, in_order(draft, task))

        def share(name: str, round_: int) -> None:
            layers[name].share_within(round_ / self.rounds)

        rounds = range(1, self.rounds + 1)
        steps = [(round_, group) for round_ in rounds for group in _groups(list(layers), self.groups)]
        return _in_steps(draft, task, layers, steps, share, (self.epochs, self.seed), "multi-level quantization")


@dataclass(frozen=True)
class INQ:
    """Incremental network quantization (Zhou et al. 2017): the largest weights to powers of two, the rest trained.

    `portions` of all weights of each layer are rounded one after the other, with `epochs` of training after each but
    the last, at a tenth of the task's rate; zero takes one of the codes of `bits`.
    """

    bits: int = 5
    portions: tuple[float, ...] = (0.5, 0.75, 0.875, 1.0)
    epochs: int = 1
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, SHARED)
    makes: ClassVar[tuple[Kind, ...]] = (Codebook,)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.portions), self.portions, strict=False))
        if not 2 <= self.bits <= 6 or not rising or self.portions[-1:] != (1.0,):
            raise ValueError("INQ takes 2 to 6 bits, and portions that rise from above 0 to 1")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        layers = _layers(draft, draft.weights())
        tops = {name: float(np.abs(layer.values).max(initial=0)) for name, layer in layers.items()}

        def share(name: str, part: float) -> None:
            layers[name].round(*fixed_point.powers(tops[name], self.bits), part)

        steps = [(part, list(layers)) for part in self.portions]
        return _in_steps(draft, task, layers, steps, share, (self.epochs, self.seed), "incremental quantization")


def _layers(draft: Draft, names: Iterable[str]) -> dict[str, "_Layer"]:
    """The plain ones of the named weights."""
    return {name: _Layer.of(draft, name) for name in names if is_plain(draft.tensors[name].tree)}


def _in_steps(
    draft: Draft,
    task: Task,
    layers: "dict[str, _Layer]",
    steps: Sequence[tuple[Any, Sequence[str]]],
    share: Callable[[str, Any], None],
    training: tuple[int, int],
    label: str,
) -> Draft:
    """The draft after steps that each share more of some layers by `share(name, step)`, what is free trained between.

    `training` are the epochs after each step but the last, and the seed.
    """
    for k, (step, names) in enumerate(progress(steps, label, len(steps))):
        for name in names:
            layers[name].read(draft, name)
            share(name, step)
        draft = _placed(draft, layers)
        if k + 1 < len(steps):
            draft = _trained(draft, task, layers, *training, k)
    return draft.with_trees({name: layer.packed(draft, name) for name, layer in layers.items()})


def powers(values: Array, clusters: int) -> Array:
    """Where centroids begin: 0 and plus and minus the powers of two from the largest |value| down."""
    top = np.exp2(np.floor(np.log2(max(float(np.abs(values).max(initial=0)), 1e-30))))
    sizes = top / np.exp2(np.arange(clusters // 2))
    return np.sort(np.concatenate([[0.0], sizes, -sizes]))


@dataclass
class _Layer:
    """The values of a weight's support, which of them are shared, and the centroids that these have (NaN: none yet)."""

    values: Array
    frozen: Array
    centroids: Array

    @staticmethod
    def of(draft: Draft, name: str) -> "_Layer":
        tree = draft.tensors[name].tree
        values = np.asarray(unpack(tree), np.float64)[support(tree)]
        return _Layer(values, np.zeros(values.size, bool), np.empty(0))

    def read(self, draft: Draft, name: str) -> None:
        """Take in what training made of the values that are free."""
        tree = draft.tensors[name].tree
        now = np.asarray(unpack(tree), np.float64)[support(tree)]
        self.values = np.where(self.frozen, self.values, now)

    def share(self, start: Array, count: int) -> None:
        """Cluster what is free around the centroids that are not taken; share the clusters that lose most, up to
        `count` in all."""
        taken = self.centroids
        free = self.values[~self.frozen]
        rest = len(start) - len(taken)
        if not rest or not free.size:
            self._end()
            return
        moving = start[np.argsort(np.abs(start), kind="stable")][:rest] if len(taken) else start
        zero = 0.0 if not (taken == 0).any() else None
        centroids = _clustered(free, moving, zero)
        own = _nearest(free, centroids)
        loss = np.bincount(own, np.square(free - centroids[own]), len(centroids))
        chosen = np.argsort(-loss, kind="stable")[: max(0, count - len(taken))]
        if count == len(start):
            chosen = np.arange(len(centroids))
        stays = np.isin(own, chosen)
        self._freeze(np.flatnonzero(~self.frozen)[stays], centroids[own[stays]])
        self.centroids = np.concatenate([taken, centroids[chosen].astype(np.float32)])
        if count == len(start):
            self._end()

    def share_within(self, part: float) -> None:
        """Share a part of each of three clusters, what lies farthest from the centroids first."""
        if not self.centroids.size:
            deviation = float(self.values.std()) if self.values.size else 0.0
            centre = float(np.median(self.values)) if self.values.size else 0.0
            self.centroids = _clustered(self.values, centre + deviation * np.array([-1.2, 0.0, 1.2]), None).astype(
                np.float32
            )
        own = _nearest(self.values, self.centroids)
        apart = np.abs(self.values - self.centroids[own])
        for k in range(len(self.centroids)):
            members = np.flatnonzero((own == k) & ~self.frozen)
            whole = np.count_nonzero(own == k)
            count = len(members) if part >= 1 else max(0, round(part * whole) - (whole - len(members)))
            chosen = members[np.argsort(-apart[members], kind="stable")[:count]]
            self._freeze(chosen, np.full(len(chosen), self.centroids[k]))

    def round(self, codewords: Array, cuts: Array, part: float) -> None:
        """Round the largest values that are free, until a part of all is rounded."""
        free = np.flatnonzero(~self.frozen)
        count = max(0, round(part * self.values.size) - int(self.frozen.sum()))
        chosen = free[np.argsort(-np.abs(self.values[free]), kind="stable")[:count]]
        self._freeze(chosen, codewords[np.searchsorted(cuts, self.values[chosen])])

    def _end(self) -> None:
        """Share what is left with the nearest centroid there is."""
        left = np.flatnonzero(~self.frozen)
        if left.size and self.centroids.size:
            own = _nearest(self.values[left], self.centroids)
            self._freeze(left, self.centroids[own])

    def _freeze(self, places: Array, values: Array) -> None:
        self.values[places] = np.asarray(values, np.float32)
        self.frozen[places] = True

    def packed(self, draft: Draft, name: str) -> Tree:
        """The weight's tree with shared values."""
        return repack(refilled(draft.tensors[name].tree, _dense(draft, name, self.values)), _Given())


@dataclass(frozen=True)
class _Given:
    """Values that are codewords, as numbers of these."""

    needs: ClassVar[tuple[str, ...]] = ()

    def pack(self, w: Array, stats: Mapping[str, Array] | None = None) -> Packed:
        codewords, index = np.unique(np.asarray(w, np.float32), return_inverse=True)
        return Codebook(narrowed(index.reshape(w.shape)), codewords[:, None])


def _clustered(values: Array, start: Array, zero: float | None) -> Array:
    """Centroids after Lloyd's steps; one that has to be zero stays so, and one without members where it is."""
    ordered, ones, centroids = np.sort(values), np.ones(values.size), np.sort(start.astype(np.float64))
    for _ in range(STEPS):
        least = int(np.abs(centroids).argmin())
        centroids = lloyd(ordered, centroids, ones, 1)
        if zero is not None:
            centroids[least] = zero
    return centroids


def _nearest(values: Array, centroids: Array) -> Array:
    """The number of each value's nearest centroid, whatever their order."""
    order = np.argsort(centroids, kind="stable")
    ascending = centroids[order].astype(np.float64)
    found: Array = order[np.searchsorted((ascending[1:] + ascending[:-1]) / 2, values)]
    return found


def _dense(draft: Draft, name: str, values: Array) -> Array:
    tree = draft.tensors[name].tree
    dense = np.zeros(tree.shape, np.float32)
    dense[support(tree)] = values
    return dense


def _placed(draft: Draft, layers: Mapping[str, _Layer]) -> Draft:
    """The draft with the layers' values in it."""
    trees = {n: refilled(draft.tensors[n].tree, _dense(draft, n, layer.values)) for n, layer in layers.items()}
    return draft.with_trees(trees)


def _trained(draft: Draft, task: Task, layers: Mapping[str, _Layer], epochs: int, seed: int, round_: int) -> Draft:
    """The draft with all trained but what is shared."""
    held = {}
    for name, layer in layers.items():
        mask = np.zeros(draft.tensors[name].tree.shape, bool)
        mask[support(draft.tensors[name].tree)] = layer.frozen
        held[name] = mask
    schedule = replace(task.schedule, epochs=max(epochs, 1), lr=task.schedule.lr / 10, drops=(0.5,))
    return tune(draft, task, schedule, range(epochs), seed + round_, "training what is free", held=held)


def _groups(names: list[str], count: int) -> Iterator[list[str]]:
    size = -(-len(names) // count)
    for begin in range(0, len(names), size):
        yield names[begin : begin + size]

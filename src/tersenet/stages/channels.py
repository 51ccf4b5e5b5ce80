"""Whole channels and neurons: the layers really shrink, in the file and, with `Artifact.realise`, where it runs.

Channels that must go together are found by coupling.py. Which of a space's channels stay is decided by the L1 norm of
the weights that read them, and the layers that read them are fitted again, as in AMC (He et al. 2018, section 3) and
He, Zhang, Sun (2017): W' = W A[:, K] A[K, K]^-1 keeps their outputs closest, A being the moments of their inputs. Where
we differ: one least-squares problem in closed form from moments instead of sampled points.

A pruned weight is stored as what stays with the places it stays in (`Sliced`), so the file still opens as the original
architecture, with zeros; norms and biases of channels that are gone are zeros too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from tersenet.allocators.amc import AMC, Problem, RandomSearch
from tersenet.calibrate import Moments, moments
from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.data import Batch, samples
from tersenet.draft import Draft, artifact_of, dense_array
from tersenet.folding import untied
from tersenet.key import key_of
from tersenet.likelihood import Likelihood
from tersenet.methods.sparse import kept_count, largest
from tersenet.methods.surgeon import damped, refitted, solved
from tersenet.packed import Array, Sliced, Tree, unpack
from tersenet.structure import is_plain, kept_places, refilled, sliced, support
from tersenet.task import Task, one_thread
from tersenet.tracing.coupling import Coupling

STUCK = "packed so that its dead channels cannot go alone"
UNFIT = dict.fromkeys(PACKED, "take out channels before packing")
RUN: dict[Kind, str] = {DATA: "finds channels by running the network: give a Task with training data"}


@dataclass(frozen=True)
class Plan:
    """A network whose channels can be taken out: its spaces, what each channel is worth, and its moments."""

    draft: Draft
    coupling: Coupling
    spaces: list[tuple[int, ...]]
    worth: dict[int, float]  # of each channel, by root
    found: dict[str, Moments]
    before: frozenset[int] = frozenset()  # channels that went earlier, by root

    @staticmethod
    def of(draft: Draft, task: Task, count: int, seed: int = 0) -> "Plan":
        """Trace the network on training inputs and gather its moments."""
        draft = untied(draft)
        model, batches = draft.module(), task.calibration(count)
        with one_thread():
            coupling = _coupled(draft, task)
            found = moments(task, model, batches, Likelihood.of(task), labels=1, seed=seed)
        spaces = coupling.spaces()
        if not spaces:
            rules = ", or kept by rules" if draft.left else ""
            raise ValueError(f"no channel of this network can be taken out: all are fixed by what reads them{rules}")
        before = frozenset(
            coupling.root(labels[place])
            for (name, axis), labels in coupling.axes.items()
            for place in set(range(len(labels))) - set(kept_places(draft.tensors[name].tree, axis).tolist())
        )
        return Plan(draft, coupling, spaces, _worth(draft, coupling), found, before)

    def gone(self, ratios: Sequence[float]) -> set[int]:
        """The channels that are gone when each space keeps a part of its channels, at least one."""
        return set(self.before) | {
            root
            for roots, ratio in zip(self.spaces, ratios, strict=True)
            for root, stays in zip(roots, largest(self._worths(roots), kept_count(ratio, len(roots))), strict=True)
            if not stays
        }

    def _worths(self, roots: tuple[int, ...]) -> Array:
        return np.array([-1.0 if root in self.before else self.worth[root] for root in roots])

    def macs(self, ratios: Sequence[float] | None = None) -> int:
        """Multiplications and additions for one sample, of the whole architecture or at these ratios."""
        return self.coupling.macs(set() if ratios is None else self.gone(ratios))

    def uniform(self, part: float) -> list[float]:
        """The largest ratio, the same for all spaces, that keeps the MACs to a part of the network's."""
        most, low, high = part * self.macs(), 0.0, 1.0
        if self.macs([low] * len(self.spaces)) > most:
            least = self.macs([low] * len(self.spaces)) / self.macs()
            raise ValueError(f"{part:.0%} of the MACs cannot be met: one channel in each layer needs {least:.0%}")
        for _ in range(40):
            middle = (low + high) / 2
            fits = self.macs([middle] * len(self.spaces)) <= most
            low, high = (middle, high) if fits else (low, middle)
        return [low] * len(self.spaces)

    def problem(self, part: float, score: Callable[[Draft], float]) -> Problem:
        """The search for the ratios that keep the score best at a part of the MACs."""
        features = []
        for k, roots in enumerate(self.spaces):
            made, read = (self._work(set(roots), rows) for rows in (True, False))
            features.append((k, len(roots), made[0], read[0], made[1], read[1]))
        table = np.array(features, np.float64)
        span = np.ptp(table, axis=0)
        normal = (table - table.min(0)) / np.where(span > 0, span, 1)
        return Problem(
            tuple(map(len, self.spaces)),
            tuple(map(tuple, normal.tolist())),
            self.macs,
            part * self.macs(),
            lambda ratios: score(self.pruned(ratios)),
        )

    def _work(self, roots: set[int], rows: bool) -> tuple[int, int]:
        """MACs and weights of the layers whose rows, or columns, a space's channels are."""
        work, weights = 0, 0
        for name, use in self.coupling.uses.items():
            if any(self.coupling.root(label) in roots for label in (use.rows if rows else use.columns)):
                size = len(use.rows) * (1 if use.depthwise else len(use.columns))
                work, weights = work + use.work * size, weights + int(np.prod(self.draft.tensors[name].tree.shape))
        return work, weights

    def pruned(self, ratios: Sequence[float], damping: float = 1e-3) -> Draft:
        """The draft without the channels that go, the layers that read them fitted again."""
        with one_thread():
            return self._pruned(self.gone(ratios), damping)

    def _pruned(self, gone: set[int], damping: float) -> Draft:
        kept: dict[str, dict[int, Array]] = {}
        for name, axis in self.coupling.axes:
            kept.setdefault(name, {})[axis] = self.coupling.kept((name, axis), gone)
        trees = {name: self.draft.tensors[name].tree for name in kept}
        for name, along in kept.items():
            known = self.found.get(name)
            if known is not None and known.form.straight and 1 in along and self._reads(name, ~along[1]):
                free = {n for n in trees if n not in self.draft.left and is_plain(trees[n])}
                bias = known.bias if known.bias in free else None
                fitted, lost = self._fitted(name, along[1], damping, bias is not None)
                trees[name] = refilled(trees[name], fitted)
                if bias is not None:
                    trees[bias] = refilled(trees[bias], unpack(trees[bias]) + lost)
        return self.draft.with_trees({name: _sliced(trees[name], along) for name, along in kept.items()})

    def _reads(self, name: str, gone: Array) -> bool:
        """Whether a weight reads any of the channels that are gone."""
        return bool(dense_array(self.draft.tensors[name])[:, gone].any())

    def _fitted(self, name: str, kept: Array, damping: float, biased: bool) -> tuple[Array, Array]:
        """Weights that read only the kept channels, and the mean that their output lost, for a bias to take up."""
        w, known = dense_array(self.draft.tensors[name]), self.found[name]
        blocks, mean = known.inputs.numpy()[0], known.means.numpy()[0]
        flat, free = (
            w.reshape(len(w), -1).astype(np.float64),
            support(self.draft.tensors[name].tree).reshape(len(w), -1),
        )
        columns, found, width = np.repeat(kept, flat.shape[1] // len(kept)), np.zeros_like(flat), blocks.shape[1]
        held = not free[np.ix_(free.any(1), columns)].all()
        for block, at in zip(blocks, range(0, flat.shape[1], width), strict=True):
            part, there = flat[:, at : at + width], columns[at : at + width]
            n, own = part.shape[1], mean[at : at + width]
            a = block[:n, :n] - np.outer(own, own) if biased else block[:n, :n]
            if there.any():
                within = a[np.ix_(there, there)]
                inner = damped(within[None], damping)[0]
                if held:
                    whole = a + (inner - within)[0, 0] * np.eye(n)
                    found[:, at : at + n] = refitted(part, free[:, at : at + n] & there, whole)
                    continue
                product = (torch.from_numpy(part.copy()) @ torch.from_numpy(a[:, there])).numpy()
                right = product + part[:, there] * (inner - within).diagonal()
                found[:, at + np.flatnonzero(there)] = solved(inner, right.T).T
        return found.reshape(w.shape).astype(np.float32), (flat - found) @ mean


def _worth(draft: Draft, coupling: Coupling) -> dict[int, float]:
    """L1 norm of the weights that read each channel, or of those that make it where none read it, by root."""
    made, read = dict[int, float](), dict[int, float]()
    for (name, axis), labels in coupling.axes.items():
        w, worth = dense_array(draft.tensors[name]), read if axis == 1 else made
        if w.ndim > 1:
            sums = np.abs(w).sum(axis=tuple(d for d in range(w.ndim) if d != axis), dtype=np.float64)
            for label, total in zip(labels, sums.tolist(), strict=True):
                root = coupling.root(label)
                worth[root] = worth.get(root, 0.0) + total
    return made | read


def _sliced(tree: Tree, stays: Mapping[int, Array]) -> Tree:
    """The tree without what does not stay along these axes."""
    return sliced(tree, {axis: np.flatnonzero(there) for axis, there in stays.items()})


@dataclass(frozen=True)
class Channels:
    """Take out channels until `macs` of the architecture's multiplications are left.

    Each space keeps its part of `ratios`, or all the same. Channels that went earlier stay gone and count as gone;
    zeros stay zero, each row being fitted under its own.
    """

    macs: float = 0.5
    ratios: tuple[float, ...] = ()
    samples: int = 512
    seed: int = 0
    refuses: ClassVar[Mapping[Kind, str]] = UNFIT
    requires: ClassVar[Mapping[Kind, str]] = RUN
    makes: ClassVar[tuple[Kind, ...]] = (Sliced,)

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1:
            raise ValueError("Channels takes a part of the MACs in (0, 1]")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        if task is None or (self.macs == 1 and not self.ratios):
            return draft
        plan = Plan.of(draft, task, self.samples, self.seed)
        if self.ratios and len(self.ratios) != len(plan.spaces):
            raise ValueError(f"Channels got {len(self.ratios)} ratios; this network has {len(plan.spaces)} spaces")
        return plan.pruned(self.ratios or plan.uniform(self.macs))


@dataclass(frozen=True)
class SearchChannels:
    """Take out channels until `macs` are left, the ratios searched by AMC or by its random control.

    Choices are scored, without retraining, on up to `scored` samples of the task's data for choosing.
    """

    macs: float = 0.5
    search: AMC | RandomSearch = field(default_factory=AMC)
    samples: int = 512
    scored: int = 2000
    refuses: ClassVar[Mapping[Kind, str]] = UNFIT
    requires: ClassVar[Mapping[Kind, str]] = RUN
    makes: ClassVar[tuple[Kind, ...]] = (Sliced,)

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        plan, model = Plan.of(draft, task, self.samples, self.search.seed), draft.module()
        part = some(task, self.scored)

        def score(pruned: Draft) -> float:
            return float(task.metric.gain(task.score(part, artifact_of(pruned).into(model)), 0.0))

        key = key_of((draft.tensors, self), "search")[:24]
        return plan.pruned(self.search.allocate(plan.problem(self.macs, score), draft.journal, key))


def some(task: Task, count: int) -> list[Batch]:
    """Batches of up to so many samples of the data that choices are made on."""
    part: list[Batch] = []
    for batch in task.held().batches(min(500, count)):
        if part and sum(samples(inputs) for inputs, _ in (*part, batch)) > count:
            break
        part.append(batch)
    return part


@dataclass(frozen=True)
class DropDead:
    """After unstructured pruning, take out the channels that nothing reads or that are always 0, until none is left.

    Channels stay where a weight is packed in a way that cannot lose them alone; its note says so.
    """

    requires: ClassVar[Mapping[Kind, str]] = RUN
    makes: ClassVar[tuple[Kind, ...]] = (Sliced,)

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        apart = untied(draft)
        with one_thread():
            coupling = _coupled(draft, task)
        stay, stuck = {coupling.root(label) for label in coupling.frozen}, dict[str, str]()
        while True:
            gone, trees = _dead(apart, coupling, stay), dict[str, Tree]()
            try:
                for name, along in _going(apart, coupling, gone).items():
                    trees[name] = _sliced(apart.tensors[name].tree, along)
            except ValueError:
                stuck[name] = STUCK
                stay |= {coupling.root(n) for axis in along for n in coupling.axes[name, axis]}
                continue
            return (apart.with_trees(trees) if trees else draft).with_notes(stuck)


def _coupled(draft: Draft, task: Task) -> Coupling:
    """Which channels go together; those of tensors that no stage may change stay."""
    coupling = Coupling.of(task, draft.module(), task.calibration(2)[0])
    coupling.frozen.update(*(labels for (name, _), labels in coupling.axes.items() if name in draft.left))
    return coupling


def _dead(draft: Draft, coupling: Coupling, stay: set[int]) -> set[int]:
    """The channels that nothing makes or reads, or nothing but what is dead itself, by root; some stay."""
    dense = {name: dense_array(draft.tensors[name]).copy() for name, _ in coupling.axes}
    while True:
        alive: dict[int, list[bool]] = {}
        for (name, axis), labels in coupling.axes.items():
            w = dense[name]
            there = np.abs(w).sum(axis=tuple(d for d in range(w.ndim) if d != axis)) > 0
            for label, some in zip(labels, there, strict=True):
                made, read = alive.setdefault(coupling.root(label), [False, False])
                alive[coupling.root(label)] = [made or (axis == 0 and some), read or (axis == 1 and some)]
        gone = {root for root, (made, read) in alive.items() if not (made and read)} - stay
        before = sum(int(np.count_nonzero(w)) for w in dense.values())
        for name, axis in coupling.axes:
            dense[name][(slice(None),) * axis + (~coupling.kept((name, axis), gone),)] = 0
        if sum(int(np.count_nonzero(w)) for w in dense.values()) == before:
            return gone


def _going(draft: Draft, coupling: Coupling, gone: set[int]) -> dict[str, dict[int, Array]]:
    """What stays along each axis of each tensor that stores channels which are gone."""
    found: dict[str, dict[int, Array]] = {}
    for name, axis in coupling.axes:
        stays = coupling.kept((name, axis), gone)
        if not stays[kept_places(draft.tensors[name].tree, axis)].all():
            found.setdefault(name, {})[axis] = stays
    return found

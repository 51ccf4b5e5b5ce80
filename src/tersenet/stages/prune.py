"""Prune by magnitude, globally or by layer, in rounds with retraining (Han et al. 2015; Renda, Frankle, Carbin 2020).

After each round the survivors are retrained: "finetune" at the schedule's last learning rate, "learning-rate" from the
same weights with the schedule rewound by `epochs`, "weights" from the weights of that earlier epoch as well (the
lottery ticket of Frankle and Carbin 2019, rewound to an early epoch as in Frankle et al. 2020). "random" is the control
for it: the same masks, the whole schedule, from a fresh random initialisation. The last epochs of the task's own
schedule are replayed exactly; a schedule with fewer epochs is replayed whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tersenet.artifact import Tensor, as_stored
from tersenet.contract import DATA, NORMS, PACKED, Kind, check
from tersenet.data import seeded
from tersenet.draft import Draft, dense_array
from tersenet.methods.sparse import kept_count, largest
from tersenet.packed import Array, Sparse, Tree
from tersenet.stages.finetune import tune
from tersenet.structure import refilled, support, thinned
from tersenet.task import Task, duplicate
from tersenet.where import Where, chosen

RETRAIN = ("learning-rate", "finetune", "weights", "random", "none")
# What cannot be rewound.
UNFIT = dict.fromkeys((NORMS, *PACKED), "the weights from before do not fit: rewind before quantizing or packing")


@dataclass(frozen=True)
class Prune:
    """Keep a density of the weights, reached geometrically in `rounds`, retraining after each.

    `scope` is "global" (one threshold for all layers) or "layer". `rules` give layers their own density, e.g.
    (("conv*", 0.5),); with "global" each of these is pruned apart. `epochs` of retraining follow each round; `final`
    follow the last. `by` is "magnitude" or "random", the control that knows nothing of the weights. BatchNorm and
    biases are never pruned; the density hits its target to one weight.
    """

    density: float = 0.1
    rounds: int = 5
    epochs: int = 1
    final: int | None = None
    retrain: str = "learning-rate"
    scope: str = "global"
    rules: tuple[tuple[Where | str, float], ...] = ()
    by: str = "magnitude"
    seed: int = 0
    makes: ClassVar[tuple[Kind, ...]] = (Sparse,)

    @property
    def refuses(self) -> Mapping[Kind, str]:
        return (UNFIT if self.retrain in ("weights", "random") else {}) | dict.fromkeys(PACKED, "prune before packing")

    @property
    def requires(self) -> Mapping[Kind, str]:
        trains = self.retrain != "none" and (self.epochs or self.final)
        return {DATA: "retrains the network: give a Task with training data, or retrain='none'"} if trains else {}

    def __post_init__(self) -> None:
        if self.retrain not in RETRAIN or self.scope not in ("global", "layer"):
            raise ValueError(f"Prune takes retrain among {', '.join(RETRAIN)} and scope global or layer")
        if self.by not in ("magnitude", "random"):
            raise ValueError("Prune takes by magnitude or random")
        densities = [self.density, *(density for _, density in self.rules)]
        if not all(0 < density <= 1 for density in densities) or self.rounds < 1:
            raise ValueError("Prune takes a density in (0, 1] and at least one round")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        for part in self.parts():
            draft = part(draft, task)
        return draft

    def parts(self) -> tuple["Round", ...]:
        """The rounds as stages of their own, so that a run that was stopped goes on with the next."""
        return tuple(Round(self, number) for number in range(1, self.rounds + 1))

    def round(self, draft: Draft, task: Task | None, number: int) -> Draft:
        """The draft after round `number` of 1..rounds."""
        check([self], draft, task)
        names = draft.weights()
        ruled = chosen(draft, self.rules)
        wanted = dict.fromkeys(names, self.density) | {name: density for name, (_, density) in ruled.items()}
        densities = {name: density ** (number / self.rounds) for name, density in wanted.items()}
        saliency = {name: np.abs(dense_array(draft.tensors[name])) for name in names}
        if self.by == "random":
            generator = np.random.default_rng(self.seed + number)
            saliency = {name: generator.random(s.shape) for name, s in saliency.items()}
        draft = masked(draft, saliency, densities, set(ruled) if self.scope == "global" else set(names))
        rules = {name: rule for name, (rule, density) in ruled.items() if density < 1}
        draft = replace(draft, rules={**draft.rules, **rules})
        if self.retrain != "none" and task is not None:
            epochs = self.final if number == self.rounds and self.final is not None else self.epochs
            label = f"pruning, round {number} of {self.rounds}"
            draft = retrained(draft, task, self.retrain, epochs, self.seed + number, label)
        return draft


@dataclass(frozen=True)
class Retrain:
    """Train what is left after pruning, as `Prune` does after each round; `kind` is its `retrain`."""

    kind: str = "learning-rate"
    epochs: int = 1
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}

    @property
    def refuses(self) -> Mapping[Kind, str]:
        return UNFIT if self.kind in ("weights", "random") else {}

    def __post_init__(self) -> None:
        if self.kind not in RETRAIN:
            raise ValueError(f"Retrain takes a kind among {', '.join(RETRAIN)}")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        if task is None or self.kind == "none" or not self.epochs:
            return draft
        return retrained(draft, task, self.kind, self.epochs, self.seed, "retraining")


def retrained(draft: Draft, task: Task, kind: str, epochs: int, seed: int, label: str) -> Draft:
    """The draft trained over the last `epochs` of the task's schedule, from where `kind` says."""
    schedule = task.schedule
    if kind == "finetune":
        last = schedule.rate(schedule.epochs - 1)
        schedule = replace(schedule, lr=last, drops=(), cosine=False, epochs=epochs)
    if kind == "random":
        epochs, draft = schedule.epochs, reinitialized(draft, seed)
    begin = schedule.epochs - epochs
    if begin < 0:
        schedule, begin = replace(schedule, epochs=epochs), 0
    if kind == "weights":
        draft = rewound(draft, task, begin)
    return tune(draft, task, schedule, range(begin, begin + epochs), seed, label)


@dataclass(frozen=True)
class Round:
    """One round of `Prune`: prune to its density, retrain."""

    prune: Prune
    number: int

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        return self.prune.round(draft, task, self.number)


def masked(draft: Draft, saliency: Mapping[str, Array], densities: Mapping[str, float], apart: set[str]) -> Draft:
    """The draft without its weights of least saliency; what is pruned stays pruned.

    All weights named in `densities` are ranked together, but those in `apart`, each of which is ranked by itself.
    """
    free = {name: support(draft.tensors[name].tree) for name in densities}
    ranked = {name: np.where(there, saliency[name], -np.inf) for name, there in free.items()}
    masks: dict[str, Array] = {}
    shared = [name for name in densities if name not in apart]
    if shared:
        flat = np.concatenate([ranked[name].reshape(-1) for name in shared])
        mask = largest(flat, kept_count(densities[shared[0]], flat.size))
        for name in shared:
            masks[name], mask = np.split(mask, [ranked[name].size])
    for name in densities.keys() & apart:
        masks[name] = largest(ranked[name], kept_count(densities[name], ranked[name].size))
    trees: dict[str, Tree] = {}
    for name in densities:
        mask = masks[name].reshape(free[name].shape)
        if (free[name] & ~mask).any():
            trees[name] = thinned(draft.tensors[name].tree, mask)
    return draft.with_trees(trees)


def rewound(draft: Draft, task: Task, epoch: int) -> Draft:
    """The draft with every tensor's values as they were before that epoch, its masks kept."""
    if epoch not in task.snapshots:
        there = ", ".join(map(str, sorted(task.snapshots))) or "none"
        raise ValueError(
            f"weight rewinding needs the weights of epoch {epoch}; the task has {there}: trained(keep=[{epoch}])"
        )
    snapshot = task.snapshots[epoch]
    if missing := sorted(set(draft.tensors) - set(snapshot)):
        raise ValueError(f"{missing[0]}: the weights of epoch {epoch} lack this tensor: are they another network's?")
    return _under_masks(draft, snapshot)


def reinitialized(draft: Draft, seed: int) -> Draft:
    """The draft with fresh random weights under its masks, by the layers' own `reset_parameters`; frozen ones stay."""
    if draft.model is None:
        raise ValueError("a random initialisation needs the network's layers, but only arrays were given")
    model, frozen = duplicate(draft.model), draft.frozen()
    with seeded(seed):
        for layer in model.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    return _under_masks(draft, {n: value for n, value in model.state_dict().items() if n not in frozen})


def _under_masks(draft: Draft, values: Mapping[str, Any]) -> Draft:
    """The draft with other values under its masks; tensors that are not among them stay."""
    renewed: dict[int, Tensor] = {}
    for name, tensor in draft.tensors.items():
        if name in values and name not in draft.left:
            try:
                tree = refilled(tensor.tree, as_stored(name, values[name])[0])
            except ValueError as wrong:
                raise ValueError(f"{name}: {wrong}: rewind before packing") from None
            renewed.setdefault(id(tensor), replace(tensor, tree=tree))
    return replace(draft, tensors={name: renewed.get(id(t), t) for name, t in draft.tensors.items()})

"""HashedNets: weights that share buckets at random, trained from the beginning (Chen et al. 2015)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.draft import Draft
from tersenet.packed import Hashed, Sliced, Sparse, unpack
from tersenet.stages.finetune import tune
from tersenet.task import Task
from tersenet.where import Where, chosen

REMEDY = "it trains its weights from the beginning: hash before other stages"


@dataclass(frozen=True)
class Hash:
    """Give each weight a bucket of its layer and a sign by hashing, `density` buckets a weight, and train these.

    Buckets begin at random, as large as the layer's weights are, and are trained by the task's own schedule; a rule
    says another density, or None for a weight that stays as it is, as frozen ones do. A bucket's gradient is the sum
    over its places.
    """

    density: float = 0.125
    rules: tuple[tuple[Where | str, float | None], ...] = ()
    epochs: int | None = None
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys((Sparse, Sliced, *PACKED), REMEDY)
    makes: ClassVar[tuple[Kind, ...]] = (Hashed,)

    def __post_init__(self) -> None:
        given = [self.density, *(density for _, density in self.rules if density is not None)]
        if not all(0 < density <= 1 for density in given):
            raise ValueError("a density of Hash is in (0, 1]")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        densities, frozen = dict.fromkeys(draft.weights(), self.density), draft.frozen()
        told = {**densities, **{name: density for name, (_, density) in chosen(draft, self.rules).items()}}
        trees = {}
        for k, (name, density) in enumerate(told.items()):
            if density is None or name in frozen:
                continue
            w = np.asarray(unpack(draft.tensors[name].tree))
            draw = np.random.Generator(np.random.PCG64([self.seed, k]))
            many = max(1, round(density * w.size))
            size = float(np.sqrt(np.mean(np.square(w, dtype=np.float64))))
            trees[name] = Hashed((size * draw.standard_normal(many)).astype(np.float32), self.seed + k, tuple(w.shape))
        schedule = task.schedule
        epochs = schedule.epochs if self.epochs is None else self.epochs
        return tune(draft.with_trees(trees), task, schedule, range(epochs), self.seed, "training buckets")

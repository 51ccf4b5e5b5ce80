"""Pack the layers one after the other, each with statistics of the network whose layers before it are packed already.

Before a layer is packed it takes up what those before it lost: with u its inputs in the original network and v those in
the packed one, W E[u v^T] E[v v^T]^-1 comes closest to the original's outputs (He, Zhang, Sun 2017; Li et al. 2025).
Without this, statistics of the packed network are no better than those of the original. What is still dense may be
tuned after each layer instead (Zhou et al. 2017).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from tersenet.calibrate import across
from tersenet.contract import DATA, Kind, check
from tersenet.display import progress
from tersenet.draft import Draft, dense_array
from tersenet.methods import Method
from tersenet.methods.surgeon import damped
from tersenet.packed import Packed
from tersenet.stages.finetune import Distill, tune
from tersenet.stages.pack import made_by, methods_of, refused_by, repacked
from tersenet.task import Task, one_thread
from tersenet.tracing.operations import Watch
from tersenet.where import Where

DAMPING = 0.01  # of E[v v^T], as a part of its mean diagonal
FEW = 0.1  # what is added to that where as few inputs were seen as there are columns


@dataclass(frozen=True)
class Layerwise:
    """Pack each weight with `method`, or with that of a rule, in the order in which the network uses them.

    Each is first fitted to the inputs that the packed layers before it give. Or, with `tune`, all that is not packed
    yet is trained for so many epochs after each layer, at a hundredth of the task's learning rate. With `distill` what
    was packed last is trained by itself after each layer (Stock et al. 2020). Weights that the network does not use
    come last.
    """

    method: Method | None
    rules: tuple[tuple[Where | str, Method | None], ...] = ()
    tune: int = 0
    samples: int = 1024
    seed: int = 0
    distill: Distill | None = None
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "runs the network: give a Task with training data"}

    @property
    def makes(self) -> tuple[Kind, ...]:
        return made_by(self.method, self.rules)

    @property
    def refuses(self) -> Mapping[Kind, str]:
        return refused_by(self.method, self.rules)

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        choices, original = methods_of(draft, self.method, self.rules), draft.module()
        names, frozen = in_order(draft, task), draft.frozen()
        for k, name in enumerate(progress(names, "layer by layer", len(names))):
            if k and not self.tune and choices[name][1] is not None:
                draft = fitted(draft, original, task, name, self.samples)
            draft = repacked(draft, task, {name: choices[name]}, self.samples, self.seed)
            if self.tune and k + 1 < len(names):
                draft = self._tuned(draft, task, name)
            if self.distill is not None and choices[name][1] is not None and name not in frozen:
                draft = self._distilled(draft, task, name, self.distill)
        vectors = {name: choice for name, choice in choices.items() if name not in names}
        return repacked(draft, task, vectors, self.samples, self.seed)

    def _tuned(self, draft: Draft, task: Task, name: str) -> Draft:
        """The draft with all that is not packed tuned."""
        schedule = replace(task.schedule, epochs=self.tune, lr=task.schedule.lr / 100, drops=(0.5,), weight_decay=0.0)
        dense = {n for n in draft.trainable if not isinstance(draft.tensors[n].tree, Packed)}
        if not dense:
            return draft
        free = replace(draft, trainable=frozenset(dense))
        tuned = tune(free, task, schedule, range(self.tune), self.seed, f"tuning after {name}")
        return replace(tuned, trainable=draft.trainable)

    def _distilled(self, draft: Draft, task: Task, name: str, distill: Distill) -> Draft:
        """The draft with what a packed weight leaves free tuned, and nothing else."""
        if not isinstance(draft.tensors[name].tree, Packed):
            return draft
        own = frozenset(n for n in draft.trainable if draft.tensors[n] is draft.tensors[name])
        tuned = distill.tuned(replace(draft, trainable=own), task, f"distilling {name}")
        return replace(tuned, trainable=draft.trainable)


def fitted(draft: Draft, original: nn.Module, task: Task, name: str, samples: int) -> Draft:
    """The draft with a dense weight whose results come closest to the original's; moved less where few inputs tell."""
    tensor = draft.tensors[name]
    if isinstance(tensor.tree, Packed):
        return draft
    names = {other for other, held in draft.tensors.items() if held is tensor}
    known = across(task, (original, draft.module()), task.calibration(samples), names)
    if known is None:
        return draft
    form, count, both, own = known
    moment = torch.from_numpy(damped(own.numpy(), DAMPING + FEW * form.columns / count))
    w = torch.from_numpy(form.matrix(dense_array(tensor)).astype(np.float64))
    with one_thread():
        moved = w + torch.linalg.solve(moment, (w @ (both - own)).transpose(1, 2)).transpose(1, 2)
    dense = moved.numpy().reshape(form.ordered).transpose(np.argsort(form.axes)).reshape(tensor.tree.shape)
    made = replace(tensor, tree=np.ascontiguousarray(dense, np.float32)).unpack()
    return draft.with_trees({name: made}, tensor.note)


def in_order(draft: Draft, task: Task) -> list[str]:
    """The names of the weights in the order of their first use."""
    model = draft.module().to(task.device).eval()
    with torch.no_grad(), one_thread(), Watch(model) as watch:
        task.outputs(model, task.calibration(1)[0])
    used = {id(draft.tensors[use.name]): place for place, use in reversed(list(enumerate(watch.uses)))}
    names = draft.weights()
    return sorted(names, key=lambda name: used.get(id(draft.tensors[name]), len(watch.uses)))

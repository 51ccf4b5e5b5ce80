"""Let the running statistics of BatchNorms follow what was done to the weights.

Every method that changes weights moves the means and variances that the norms behind them see. Low rank moves them
most: an SVD without tuning loses points of accuracy by the norms alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tersenet.artifact import as_stored
from tersenet.contract import DATA, Kind, check
from tersenet.data import samples
from tersenet.display import progress
from tersenet.draft import Draft
from tersenet.norms import folded_norms
from tersenet.running_statistics import followed, held, of_batches
from tersenet.structure import is_plain, refilled
from tersenet.task import Task, duplicate

BATCH = 128
AGAIN = "dense: a statistic of the network as it is here"


@dataclass(frozen=True)
class Recalibrate:
    """Move the means and variances of BatchNorms as their statistics on `samples` training inputs moved; nothing else.

    They moved from what they are in the network before compression, and are taken over batches. So a network that
    nothing changed keeps its own, whatever the inputs, and data that differ from those that it was trained with (for
    want of their augmentation, say) cost nothing. Folded norms, which have no statistics, and norms that no input
    reaches stay as they are. Raises ValueError where a statistic is not finite, naming the norm.
    """

    samples: int = 1024
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "runs the network: give a Task with training data"}

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError("Recalibrate takes 2 samples or more")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None and draft.model is not None
        left_out = folded_norms(draft.tensors)
        own = held(draft.model, left_out)
        batches = task.calibration(self.samples, BATCH) if own else []
        batches = [inputs for inputs in batches if samples(inputs) > 1]  # one sample may have no variance
        before, after = (
            of_batches(model, task, progress(batches, f"norms {when} compression", len(batches)), left_out)
            for model, when in ((duplicate(draft.model), "before"), (draft.module(), "after"))
        )
        renewed = dict(draft.tensors)
        for layer_name in (name for name in after if name in before):
            moved = followed(own[layer_name], before[layer_name], after[layer_name])
            for part, values in (("running_mean", moved.mean), ("running_var", moved.variance)):
                name = f"{layer_name}.{part}" if layer_name else part
                tensor = draft.tensors[name]
                if not torch.isfinite(values).all():
                    raise ValueError(f"{name}: is not finite on the training inputs; look at the weights before it")
                if name not in draft.left and is_plain(tensor.tree):
                    renewed[name] = replace(tensor, tree=refilled(tensor.tree, as_stored(name, values)[0]), note=AGAIN)
        return replace(draft, tensors=renewed)

"""Take the running statistics of BatchNorms again, in the network as it is now.

Every method that changes weights moves the means and variances that the norms behind them see. Low rank moves them
most: an SVD without tuning loses points of accuracy by the norms alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersenet.artifact import as_stored
from tersenet.contract import DATA, Kind, check
from tersenet.data import samples
from tersenet.display import progress
from tersenet.draft import Draft
from tersenet.norms import folded_norms
from tersenet.structure import is_plain, refilled
from tersenet.task import Task, one_thread

BATCH = 128
AGAIN = "dense: a statistic of the network as it is here"


@dataclass(frozen=True)
class Recalibrate:
    """Take the means and variances of BatchNorms again on `samples` training inputs; nothing else changes.

    They are those of batches, the mean over them. Folded norms, which have none, and norms that no input reaches stay
    as they are. Raises ValueError where a statistic is not finite, naming the norm.
    """

    samples: int = 1024
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "runs the network: give a Task with training data"}

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError("Recalibrate takes 2 samples or more")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        model = draft.module().to(task.device).eval()
        norms = {name: layer for name, layer in _norms(model).items() if name not in folded_norms(draft.tensors)}
        for layer in norms.values():
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
            layer.train()
        batches = task.calibration(self.samples, BATCH) if norms else []
        batches = [inputs for inputs in batches if samples(inputs) > 1]  # one sample may have no variance
        with torch.no_grad(), one_thread():
            for inputs in progress(batches, "taking norms again", len(batches)):
                task.outputs(model, inputs)
        state, renewed = model.state_dict(), dict(draft.tensors)
        for layer_name, layer in norms.items():
            if not layer.num_batches_tracked:
                continue
            for part in ("running_mean", "running_var"):
                name = f"{layer_name}.{part}" if layer_name else part
                tensor = draft.tensors[name]
                if not torch.isfinite(state[name]).all():
                    raise ValueError(f"{name}: is not finite on the training inputs; look at the weights before it")
                if name not in draft.left and is_plain(tensor.tree):
                    tree = refilled(tensor.tree, as_stored(name, state[name])[0])
                    renewed[name] = replace(tensor, tree=tree, note=AGAIN)
        return replace(draft, tensors=renewed)


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorms that have running statistics, by name."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    return {name: layer for name, layer in found.items() if layer.running_mean is not None}

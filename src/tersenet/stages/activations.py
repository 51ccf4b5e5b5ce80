"""Activations in fixed point beside weights of any kind, by calibration (Gysel et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from tersenet.activations import calibrated
from tersenet.contract import DATA, FIXED, Kind, check
from tersenet.draft import Draft
from tersenet.task import Task


@dataclass(frozen=True)
class Activations:
    """Round what each layer with weights takes and gives to `width` bits, whose ranges `samples` training inputs tell.

    The file says how; whoever measures it, and stages that train afterwards, run the network so. Weights stay as they
    are. It comes after what packs or folds, which changes what layers give and is refused behind it.
    """

    width: int = 8
    samples: int = 1024
    makes: ClassVar[tuple[Kind, ...]] = (FIXED,)
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "runs the network: give a Task with training data"}

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 16 or self.samples < 1:
            raise ValueError("Activations takes a width of 2 to 16 bits and a sample or more")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        formats = calibrated(task, draft.module(), draft.weights(), self.width, self.samples)
        return replace(draft, activations=formats)

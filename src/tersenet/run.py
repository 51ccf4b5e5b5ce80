"""Run a recipe: stages take a draft to a draft, and each one's result is kept under the key of all that led to it."""

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tersenet.artifact import Artifact, Coding, FormatError, load
from tersenet.draft import Draft, artifact_of, dense_array
from tersenet.task import Task, duplicate

FORMAT = 2  # of what is kept between runs: raise it when a stage's meaning changes


class Stage(Protocol):
    """A frozen dataclass whose fields say all that its result depends on."""

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        """The draft after this stage."""


Recipe = Sequence[Stage]


Row = dict[str, Any]  # what a stage did: the stage, the density, the metric on the data for choosing, seconds


@dataclass(frozen=True)
class Choice:
    """What a drop was kept on: the data for choosing, how many samples of it, and the metric there before and after.

    `error` is the standard error of the difference, where the metric is a mean over samples.
    """

    samples: int | None
    before: float
    after: float
    error: float | None

    @staticmethod
    def of(task: Task, artifact: Artifact) -> "Choice":
        """Measured on the reopened file; the standard error comes from small batches."""
        held, models = task.held(), (task.model, load(artifact.to_bytes()).into(duplicate(task.model)))
        before, after = (task.score(held, model) for model in models)
        one, other = (task.measured(held, model, max(1, (held.count or 1) // 24))[1] for model in models)
        apart = [a - b for a, b in zip(other, one, strict=True)]
        error = float(np.std(apart, ddof=1) / math.sqrt(len(apart))) if len(apart) > 3 else None
        return Choice(held.count, before, after, error)

    def __str__(self) -> str:
        many = "batches" if self.samples is None else f"{self.samples:,} samples"
        spread = "" if self.error is None else f", standard error of the difference {self.error:.4f}"
        return f"metric {self.before:.4f} -> {self.after:.4f} on the {many} held back for choosing{spread}"


@dataclass(frozen=True)
class Result:
    """What compressing gave: the artifact and, where the task has test data, the metric before and after.

    `after` is measured on the file's bytes, opened again. `rows` tell what each stage, and each round of it, reached;
    `choice` tells what a drop was kept on.
    """

    artifact: Artifact
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    choice: Choice | None = None

    def __str__(self) -> str:
        text = f"{self.artifact}\n"
        if self.choice is not None:
            text += f"{self.choice}\n"
        if self.after is not None and self.before is not None:
            text += f"test metric {self.before:.4f} -> {self.after:.4f} (from the reopened file)\n"
        return text + f"{self.seconds:.1f} s"


def run(draft: Draft, task: Task | None, recipe: Recipe, folder: Path | None, log: Callable[[Row], None]) -> Draft:
    """Run the stages and log a row for each; keep each result in `folder` under the hash of what led to it.

    A run that was stopped goes on after the last result that was kept. A stage with `parts`, such as the rounds of
    pruning, is kept part by part.
    """
    mark = hashlib.sha256(f"{FORMAT}{task.digest() if task else ''}".encode())
    if task is None:
        mark.update(artifact_of(draft).to_bytes())
    for stage in itertools.chain.from_iterable(map(_parts, recipe)):
        mark.update(repr(stage).encode())
        kept = None if folder is None else folder / f"{mark.hexdigest()[:24]}.terse"
        begun = time.monotonic()
        earlier = _kept(kept)
        if earlier is not None:
            draft = replace(draft, tensors=earlier.tensors, folded=earlier.meta.pop("folded", {}))
            log({**earlier.meta, "kept": True})
            continue
        draft = stage(draft, task)
        row = {"stage": str(stage), **_measured(draft, task), "seconds": round(time.monotonic() - begun, 1)}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            whole = artifact_of(draft)
            Artifact(whole.tensors, Coding(("bits",)), {**whole.meta, **row}).save(kept)
        log(row)
    return draft


def _parts(stage: Stage) -> Sequence[Stage]:
    return stage.parts() if hasattr(stage, "parts") else (stage,)


def _measured(draft: Draft, task: Task | None) -> Row:
    """The part of the weights that is not zero and, with a task, the metric on its data for choosing."""
    dense = [dense_array(draft.tensors[name]) for name in draft.weights()]
    found: Row = {}
    if dense:
        found["density"] = round(float(sum(map(np.count_nonzero, dense)) / sum(w.size for w in dense)), 5)
    if task is not None and draft.model is not None and (task.train is not None or task.valid is not None):
        found["metric"] = round(task.score(task.held(), draft.module()), 5)
    return found


def _kept(path: Path | None) -> Artifact | None:
    """An earlier run's result; a file that is damaged or of another version is as good as none."""
    try:
        return load(path, limit=1 << 40) if path is not None and path.exists() else None
    except FormatError:
        return None


def cache_folder() -> Path:
    """Where stage results are kept unless a caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tersenet"

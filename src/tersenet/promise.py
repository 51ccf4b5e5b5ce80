"""`compress`: run a recipe over a task or bare arrays, keep to the budget, prove the file by opening it again."""

import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.artifact import Artifact, Coding, errors_against, load
from tersenet.calibrate import moments
from tersenet.packed import Array
from tersenet.recipe import (
    Budget,
    Draft,
    PromiseBroken,
    Recipe,
    Result,
    Row,
    artifact_of,
    cache_folder,
    dense_array,
    run,
)
from tersenet.stages.budget import to_drop, to_size
from tersenet.stages.folding import folded
from tersenet.stages.waterfill import gather
from tersenet.task import Task, one_thread

METRIC_BYTES = 24  # what the measured metric adds to a file, at most


def compress(
    source: Task | Mapping[str, Array],
    recipe: Recipe | None = None,
    budget: Budget | None = None,
    *,
    coding: Coding | None = None,
    folder: str | Path | None = None,
) -> Result:
    """Turn a task's model, or named arrays, into an `Artifact`, and measure it from the reopened file.

    Without a recipe the network is quantized, output-aware and without retraining, to the budget: from below for a size
    or a ratio, and for a drop to the coarsest step whose metric on the task's data for choosing keeps the floor. The
    default budget is a drop of half a point, or, where there are only arrays, a ratio of 8. A metric that was measured
    is kept in the file's notes as "metric", so that `verify` can hold the file to it.

    `folder` keeps the stages' results, so that a run that was stopped goes on (default: the user's cache folder).
    Raises `PromiseBroken` where the budget is not met or the file is not smaller than its input, ValueError for input
    that cannot be compressed. The task's model is left as it was.
    """
    begun = time.monotonic()
    task = replace(source, model=copy.deepcopy(source.model)) if isinstance(source, Task) else None
    draft = Draft.of_model(task.model) if task else Draft.of_arrays(source)  # type: ignore[arg-type]
    original = dict(draft.tensors)
    weights = sum(math.prod(t.tree.shape) for t in {id(t): t for t in original.values()}.values())
    before = task.score(task.test) if task and task.test is not None else None
    rows: list[Row] = []

    def log(row: Row) -> None:
        rows.append(row)
        _log(row)

    with one_thread():
        if recipe is None:
            budget = budget or (Budget(drop=0.5) if task else Budget(ratio=8))
            most = budget.bytes_for(weights)
            if most is not None and before is not None:
                most -= METRIC_BYTES
            draft = quantized(draft, task, budget, most, coding)
        else:
            draft = run(draft, task, recipe, Path(folder) if folder else cache_folder(), log)
        artifact = artifact_of(draft, coding, original)
        after = None
        if task is not None and before is not None:
            after = task.score(task.test, load(artifact.to_bytes()).into(draft.model))
            artifact = Artifact(artifact.tensors, artifact.coding, {"metric": round(after, 6)})
    result = Result(artifact, before, after, time.monotonic() - begun, rows)
    # A drop without a recipe was kept on the data for choosing; what the test split says is reported beside it.
    _keep_promise(result, None if recipe is None and budget and budget.drop is not None else budget, weights)
    return result


def quantized(draft: Draft, task: Task | None, budget: Budget, most: int | None, coding: Coding | None = None) -> Draft:
    """The draft quantized without retraining so that its file keeps the budget."""
    usable = task if task is not None and task.train is not None else None
    gathered = gather(draft, usable)
    if most is not None:
        return to_size(gathered, most, coding)
    if usable is None or budget.drop is None:
        raise ValueError("a drop is measured on data: give Task(train=...), or a size or ratio")
    return to_drop(gathered, budget.drop, usable, coding)


def _keep_promise(result: Result, budget: Budget | None, weights: int) -> None:
    artifact = result.artifact
    if artifact.nbytes >= 4 * weights + 64 * len(artifact.tensors) + 64:
        raise PromiseBroken(f"the file has {artifact.nbytes:,} bytes, no less than the {4 * weights:,} of its input")
    if budget is None:
        return
    most = budget.bytes_for(weights)
    if most is not None and artifact.nbytes > most:
        raise PromiseBroken(
            f"the file has {artifact.nbytes:,} bytes, the budget allows {most:,}: lower the recipe's density or bits"
        )
    if budget.drop is not None:
        if result.after is None or result.before is None:
            raise ValueError("a drop needs a task with test data to measure it on: give Task(test=...)")
        if 100 * (result.before - result.after) > budget.drop:
            raise PromiseBroken(
                f"the metric fell from {result.before:.4f} to {result.after:.4f}, the budget allows {budget.drop}"
                " points: raise the recipe's density or bits"
            )


def _log(row: Row) -> None:
    if sys.stderr.isatty():
        from rich.console import Console

        text = "  ".join(f"{name} {value}" for name, value in row.items())
        Console(stderr=True).print(text, style="dim", highlight=False)


def verify(path: str | Path, against: Mapping[str, Array] | None = None, task: Task | None = None) -> dict[str, Any]:
    """Open a file afresh, check every byte and claim, and measure it: {"bytes", "tensors", "errors", "metric"}.

    Raises `FormatError` for a damaged file, `PromiseBroken` where an error or the metric is worse than the file says.
    """
    artifact = load(path)
    found: dict[str, Any] = {"bytes": artifact.nbytes, "tensors": len(artifact.tensors)}
    if against is not None:
        found["errors"] = errors_against(artifact, against)
        for name, error in found["errors"].items():
            claim = artifact.tensors[name].error
            if claim is not None and error > claim * 1.002 + 1e-6:
                raise PromiseBroken(f"{name}: the error is {error:.5f}, the file says {claim:.5f}")
    if task is not None and task.test is not None:
        found["metric"] = task.score(task.test, artifact.into(task.model))
        if found["metric"] < artifact.meta.get("metric", 0) - 1e-6:
            raise PromiseBroken(f"the metric is {found['metric']:.4f}, the file says {artifact.meta['metric']:.4f}")
    return found


def output_errors(artifact: Artifact, task: Task, samples: int = 256) -> dict[str, float]:
    """Relative L2 error of each layer's outputs on the task's training inputs, by the name of its weight.

    The task's model holds the original weights; where the file holds them with BatchNorm folded in, they are compared
    folded. Layers that are not linear or convolutional are left out.
    """
    draft = Draft.of_model(copy.deepcopy(task.model))
    x = task.calibration(samples)
    with one_thread():
        known = moments(draft.module(), x, task, labels=1)
    both, dense, errors = (draft, folded(draft, x[:8])[0]), artifact.unpack(), dict[str, float]()
    for name, found in known.items():
        if name not in dense or not found.means.any():
            continue
        shape = (len(found.inputs), -1, found.inputs.shape[1])
        originals = [dense_array(one.tensors[name]).astype(np.float64).reshape(shape) for one in both]
        stored = dense[name].astype(np.float64).reshape(shape)
        original = min(originals, key=lambda w: float(np.square(stored - w).sum()))
        lost, whole = (float(((e @ found.inputs.numpy()) * e).sum()) for e in (stored - original, original))
        errors[name] = math.sqrt(max(lost, 0) / whole) if whole > 0 else 0.0
    return errors

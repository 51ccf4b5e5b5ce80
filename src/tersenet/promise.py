"""`compress`: run a recipe over a task or bare arrays, keep to the budget, prove the file by opening it again."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.artifact import Artifact, Coding, Tensor, errors_against, load
from tersenet.budget import Budget, PromiseBroken
from tersenet.calibrate import moments
from tersenet.draft import Draft, artifact_of, dense_array
from tersenet.folding import refolded
from tersenet.journal import Row
from tersenet.likelihood import Likelihood
from tersenet.packed import Array, Packed
from tersenet.run import Choice, Recipe, Result, cache_folder, run
from tersenet.task import Task, duplicate, one_thread
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.search import to_drop, to_size

METRIC_BYTES = 24  # what the measured metric adds to a file, at most
WIDTHS = {"float64": 8, "int64": 8, "uint64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # others count 4


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
    default budget is a drop of half a point, or, where there are only arrays, a ratio of 8. A point is a hundredth of
    the metric's unit. A metric that was measured is kept in the file's notes as "metric", so that `verify` can hold the
    file to it.

    `folder` keeps the stages' results, so that a run that was stopped goes on (default: the user's cache folder).
    Raises `PromiseBroken` where the budget is not met or the file is not smaller than its input, ValueError for input
    that cannot be compressed. The task's model is left as it was.
    """
    begun = time.monotonic()
    task = replace(source, model=duplicate(source.model)) if isinstance(source, Task) else None
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
            budget = budget or (Budget(drop=0.5) if task and task.train is not None else Budget(ratio=8))
            most = budget.bytes_for(weights)
            if most is not None and before is not None:
                most -= METRIC_BYTES
            draft = quantized(draft, task, budget, most, coding, log)
        else:
            draft = run(draft, task, recipe, Path(folder) if folder else cache_folder(), log)
        artifact = artifact_of(draft, coding, refolded(original, draft))
        after = None
        if task is not None and before is not None:
            after = _proved(artifact, task)
            artifact = Artifact(artifact.tensors, artifact.coding, {**artifact.meta, "metric": round(after, 6)})
        chosen = None
        if task is not None and budget is not None and budget.drop is not None and recipe is None:
            chosen = Choice.of(task, artifact)
    result = Result(artifact, before, after, time.monotonic() - begun, rows, chosen, draft.journal.path)
    # A drop without a recipe was kept on the data for choosing; what the test split says is reported beside it.
    _keep_promise(result, None if recipe is None and budget and budget.drop is not None else budget, task, original)
    return result


def _proved(artifact: Artifact, task: Task) -> float:
    """The metric of the file's bytes, opened again."""
    try:
        return task.score(task.test, load(artifact.to_bytes()).into(duplicate(task.model)))
    except ValueError as wrong:
        raise PromiseBroken(f"the file cannot be measured: {wrong}") from None


def quantized(
    draft: Draft,
    task: Task | None,
    budget: Budget,
    most: int | None,
    coding: Coding | None = None,
    log: Callable[[Row], None] = lambda row: None,
) -> Draft:
    """The draft quantized without retraining so that its file keeps the budget; what was assumed is logged."""
    usable = task if task is not None and task.train is not None else None
    if most is None and usable is None:
        raise ValueError("a drop is measured on data: give Task(train=...), or a size or ratio")
    knowledge = Knowledge.of(draft, usable)
    if (known := knowledge.likelihood) is not None:
        kind = f"{known.kind} along axis {known.axis}" if known.kind == "classes" else known.kind
        log({"stage": "calibration", "likelihood": f"{kind}, told {known.why}", "layers": len(knowledge.found)})
    if most is not None:
        return to_size(knowledge, most, coding)
    assert usable is not None and budget.drop is not None
    return to_drop(knowledge, budget.drop, usable, coding)


def _keep_promise(result: Result, budget: Budget | None, task: Task | None, original: Mapping[str, Tensor]) -> None:
    artifact, unique = result.artifact, {id(t): t for t in original.values()}.values()
    held = sum(math.prod(t.tree.shape) * WIDTHS.get(t.dtype, 4) for t in unique)
    weights = sum(math.prod(t.tree.shape) for t in unique)
    if artifact.nbytes >= held + 64 * len(artifact.tensors) + 64:
        raise PromiseBroken(f"the file has {artifact.nbytes:,} bytes, no less than the {held:,} of its input")
    if budget is None:
        return
    most = budget.bytes_for(weights)
    if most is not None and artifact.nbytes > most:
        raise PromiseBroken(
            f"the file has {artifact.nbytes:,} bytes, the budget allows {most:,}: lower the recipe's density or bits"
        )
    if budget.drop is not None:
        if result.after is None or result.before is None or task is None:
            raise ValueError("a drop needs a task with test data to measure it on: give Task(test=...)")
        if -100 * task.metric.gain(result.after, result.before) > budget.drop:
            raise PromiseBroken(
                f"the metric went from {result.before:.4f} to {result.after:.4f}, the budget allows {budget.drop}"
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
        known = Draft.of_arrays(against).tensors
        alike = {name: tensor.tree for name, tensor in refolded(known, artifact).items() if tensor is not known[name]}
        found["errors"] = errors_against(artifact, {name: alike.get(name, against[name]) for name in known})
        for name, error in found["errors"].items():
            tensor = artifact.tensors[name]
            claim = tensor.error if tensor.error is not None or isinstance(tensor.tree, Packed) else 0.0
            if claim is not None and error > claim * 1.002 + 1e-6:
                raise PromiseBroken(f"{name}: the error is {error:.5f}, the file says {claim:.5f}")
    if task is not None and task.test is not None:
        found["metric"] = _proved(artifact, task)
        claimed = artifact.meta.get("metric")
        if claimed is not None and task.metric.gain(found["metric"], claimed) < -1e-6:
            raise PromiseBroken(f"the metric is {found['metric']:.4f}, the file says {claimed:.4f}")
    return found


def output_errors(artifact: Artifact, task: Task, count: int = 256) -> dict[str, float]:
    """Relative L2 error of each layer's outputs on the task's training inputs, by the name of its weight.

    The task's model holds the original weights; where the file holds them with BatchNorm folded in, they are compared
    folded. Weights that take no inputs, as those of embeddings, are left out.
    """
    draft = Draft.of_model(duplicate(task.model))
    batches = task.calibration(count)
    with one_thread():
        known = moments(task, draft.module(), batches, Likelihood.of(task), labels=1)
    originals, dense, errors = refolded(draft.tensors, artifact), artifact.unpack(), dict[str, float]()
    for name, found in known.items():
        if name not in dense or not found.means.any():
            continue
        original = found.form.matrix(dense_array(originals[name]).astype(np.float64))
        stored = found.form.matrix(dense[name].astype(np.float64))
        lost, whole = (_energy(e, found.inputs.numpy()) for e in (stored - original, original))
        errors[name] = math.sqrt(max(lost, 0) / whole) if whole > 0 else 0.0
    return errors


def _energy(errors: Array, inputs: Array) -> float:
    """Sum over groups of e A e^T for errors [groups, rows, n] and blocks [groups, k, b, b]."""
    groups, count, width, _ = inputs.shape
    padded = np.pad(errors, ((0, 0), (0, 0), (0, count * width - errors.shape[2])))
    parts = padded.reshape(groups, -1, count, width).transpose(0, 2, 1, 3)
    return float(((parts @ inputs) * parts).sum())

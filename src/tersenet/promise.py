"""`compress`: run a recipe over a task or bare arrays, keep to the budget, prove the file by opening it again."""

import functools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.activations import into
from tersenet.artifact import Artifact, Coding, FormatError, Tensor, errors_against, load
from tersenet.budget import Budget, PromiseBroken, UnmetBudget
from tersenet.calibrate import moments
from tersenet.contract import check
from tersenet.display import finished
from tersenet.draft import ERROR, Draft, artifact_of, dense_array
from tersenet.folding import refolded
from tersenet.journal import Journal, Row, cache_folder
from tersenet.likelihood import Likelihood
from tersenet.methods import Method
from tersenet.packed import Array, Packed
from tersenet.papers import output_aware
from tersenet.run import Choice, Recipe, Result, run
from tersenet.stages.pack import Pack
from tersenet.strength import has_setting, keeping, meeting, numbers, setting, waits, with_budget
from tersenet.task import Task, duplicate, one_thread
from tersenet.where import Where, kept

PLAIN = Coding(("bits",))  # of the file that is measured: what is written must hold the same weights
METRIC_BYTES = 24  # what the measured metric adds to a file, at most
WIDTHS = {"float64": 8, "int64": 8, "uint64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # others count 4


def compress(
    source: Task | Mapping[str, Array],
    recipe: Recipe | None = None,
    budget: Budget | None = None,
    *,
    keep: Where | str | Iterable[Where | str] = (),
    rules: Sequence[tuple[Where | str, Method]] = (),
    coding: Coding | None = None,
    notes: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> Result:
    """Turn a task's model, or named arrays, into an `Artifact`, and measure it from the reopened file.

    Without a recipe it is `papers.output_aware()`: the network is quantized without retraining to the budget. The
    default budget is a drop of half a point, or, where there are only arrays, a ratio of 8; a point is a hundredth of
    the metric's unit. A recipe with a budget runs at its own setting that meets it (`strength.py`).

    Weights that `keep` matches stay bit for bit as they are; those that `rules` match, e.g. (("conv*", KMeans(4)),),
    are packed before the recipe begins (`where.py`).

    A metric that was measured is kept in the file's notes as "metric", so that `verify` can hold the file to it;
    `notes` are kept there too. `folder` keeps the stages' results, so that a run that was stopped goes on (default: the
    user's cache folder). Raises `PromiseBroken` where the budget is not met or the file is not smaller than its input,
    ValueError for input that cannot be compressed. The task's model is left as it was.
    """
    begun, attempts = time.monotonic(), list[tuple[Journal, Recipe]]()
    task = replace(source, model=duplicate(source.model)) if isinstance(source, Task) else None
    draft, recipe, budget = prepared(source if task is None else task, recipe, budget, keep=keep, rules=rules)
    begin, original, weights = draft, draft.tensors, draft.count()
    most, extra = None if budget is None else budget.bytes_for(weights), _notes_bytes(notes, task)
    inner = budget if most is None else Budget(size=max(1, most - extra))  # the notes' bytes are the file's too
    budgeted = None if inner is None else with_budget(recipe, inner, coding)
    check(recipe, draft, task)
    if budgeted is None and budget is not None and budget.drop is not None and (task is None or task.test is None):
        raise ValueError("a drop needs a task with test data to measure it on: give Task(test=...)")
    before = task.score(task.test) if task and task.test is not None else None
    by_drop = budgeted is None and budget is not None and budget.drop is not None and has_setting(recipe)
    held = task.score(task.held()) if by_drop and task and (task.train or task.valid) is not None else None

    def attempt(stages: Recipe) -> Draft:
        made = run(replace(begin, journal=Journal()), task, stages, Path(folder) if folder else cache_folder(), _log)
        attempts.append((made.journal, stages))
        return made

    def sized(made: Draft) -> tuple[int, Draft]:
        return artifact_of(made, coding).nbytes + ERROR * len(original), made

    def judged(stages: Recipe) -> tuple[bool, Draft]:
        """Whether a network keeps the drop on the data for choosing."""
        assert task is not None and budget is not None and budget.drop is not None and held is not None
        made = attempt(stages)
        module = into(artifact_of(made), duplicate(task.model))
        return -100 * task.metric.gain(task.score(task.held(), module), held) <= budget.drop, made

    def quick_size(stages: Recipe) -> int:
        return sized(functools.reduce(lambda made, stage: stage(made, task), stages, begin))[0]

    try:
        if budgeted is None and most is not None:
            draft = meeting(recipe, max(1, most - extra), lambda stages: sized(attempt(stages)), quick_size)
        elif held is not None:
            draft = keeping(recipe, judged)
        else:
            draft = attempt(budgeted or recipe)
    except UnmetBudget as wrong:
        raise UnmetBudget(wrong.most + extra, wrong.least + extra, wrong.why) from None
    artifact, after = _proved(artifact_of(draft, coding, refolded(original, draft)), notes, task, before is not None)
    on_choice = held is not None or (budgeted is not None and budget is not None and budget.drop is not None)
    chosen = Choice.of(task, artifact) if on_choice and task is not None else None
    seconds, rows = time.monotonic() - begun, [r for r in draft.journal.rows if {"stage", "likelihood"} & r.keys()]
    result = Result(artifact, before, after, seconds, rows, chosen, draft.journal.path)
    _tell(draft.journal, result, attempts)
    # A drop that a stage kept was kept on the data for choosing; what the test split says is reported beside it.
    if chosen is not None and task is not None and budget is not None:
        _keep_drop(budget, task, chosen.before, chosen.after, " on the data for choosing")
    _keep_promise(result, None if on_choice else budget, task, original)
    return result


def prepared(
    source: Task | Mapping[str, Array],
    recipe: Recipe | None,
    budget: Budget | None,
    *,
    keep: Where | str | Iterable[Where | str] = (),
    rules: Sequence[tuple[Where | str, Method]] = (),
) -> tuple[Draft, Recipe, Budget | None]:
    """What a run begins with: the draft with what is kept, the recipe with the rules before it, the budget.

    Raises ValueError where the recipe has a stage that cannot do without a budget.
    """
    draft = Draft.of_model(source.model) if isinstance(source, Task) else Draft.of_arrays(source)
    if budget is None and recipe is None:
        budget = Budget(drop=0.5) if isinstance(source, Task) and source.train is not None else Budget(ratio=8)
    recipe = output_aware() if recipe is None else recipe
    if budget is None and any(map(waits, recipe)):
        raise ValueError("a stage of this recipe waits for a budget: give a size, a ratio or a drop")
    return kept(draft, keep), (Pack(None, tuple(rules)), *recipe) if rules else recipe, budget


def _notes_bytes(notes: Mapping[str, Any] | None, task: Task | None) -> int:
    """About how many bytes a file's notes take, at most."""
    metric = METRIC_BYTES if task is not None and task.test is not None else 0
    return metric + (len(json.dumps(dict(notes))) + 8 if notes else 0)


def _proved(
    artifact: Artifact, notes: Mapping[str, Any] | None, task: Task | None, measured: bool
) -> tuple[Artifact, float | None]:
    """The file with its notes and, if it is to be measured, its metric, and that of its bytes, opened again."""
    artifact = replace(artifact, meta={**artifact.meta, **(notes or {})})
    if task is None or not measured:
        return artifact, None
    opened = _opened(replace(artifact, coding=PLAIN))
    after = _measured(opened, task)
    artifact = replace(artifact, meta={**artifact.meta, "metric": round(after, 6)})
    _same(opened, _opened(artifact))
    return artifact, after


def _opened(artifact: Artifact) -> Artifact:
    """The file's bytes, opened again."""
    try:
        return load(artifact.to_bytes())
    except FormatError as wrong:
        raise PromiseBroken(f"the file cannot be opened: {wrong}") from None


def _measured(artifact: Artifact, task: Task) -> float:
    """The metric of an opened file."""
    try:
        return task.score(task.test, into(artifact, duplicate(task.model)))
    except ValueError as wrong:
        raise PromiseBroken(f"the file cannot be measured: {wrong}") from None


def _same(one: Artifact, other: Artifact) -> None:
    """Raises PromiseBroken unless two files hold the same weights: the one that is written and the one measured."""
    if one.sections != other.sections:
        raise PromiseBroken("sections: the file that was written is not the one that was measured")
    for name, tensor in one.tensors.items():  # one at a time: networks are large
        array, held = tensor.unpack(), other.tensors[name].unpack()
        if array.dtype != held.dtype or array.tobytes() != held.tobytes():
            raise PromiseBroken(f"{name}: the file that was written is not the one that was measured")


def _tell(journal: Journal, result: Result, attempts: Sequence[tuple[Journal, Recipe]]) -> None:
    """Tell the journal of the run that was taken what came out, and what runs at other settings reached."""
    for own, stages in attempts if len(attempts) > 1 else []:
        name, last = setting(stages), [row for row in own.rows if "stage" in row][-1]
        label = f"{name} {numbers(stages, name)[-1]:.4g}"
        journal.write(candidate=label, bytes=last.get("bytes"), metric=last.get("metric"))
        if own is journal:
            journal.write(chosen=label)
    seconds = round(result.seconds, 1)
    journal.write(result=result.artifact.nbytes, before=result.before, metric=result.after, seconds=seconds)
    journal.keep_result(result.artifact.save)


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
        assert result.after is not None and result.before is not None and task is not None
        _keep_drop(budget, task, result.before, result.after)


def _keep_drop(budget: Budget, task: Task, before: float, after: float, where: str = "") -> None:
    if budget.drop is not None and -100 * task.metric.gain(after, before) > budget.drop:
        raise PromiseBroken(
            f"the metric went from {before:.4f} to {after:.4f}{where}, the budget allows {budget.drop} points:"
            " raise the recipe's density or bits"
        )


def _log(row: Row) -> None:
    finished("  ".join(f"{name} {value}" for name, value in row.items()))


def verify(
    source: str | Path | bytes, against: Mapping[str, Array] | None = None, task: Task | None = None
) -> dict[str, Any]:
    """Open a file afresh, check every byte and claim, and measure it: {"bytes", "tensors", "errors", "metric"}.

    Raises `FormatError` for a damaged file, `PromiseBroken` where an error or the metric is worse than the file says.
    """
    artifact = load(source)
    found: dict[str, Any] = {"bytes": artifact.nbytes, "tensors": len(artifact.tensors)}
    if against is None:
        artifact.check()
    else:
        known = Draft.of_arrays(against).tensors
        alike = {name: tensor.tree for name, tensor in refolded(known, artifact).items() if tensor is not known[name]}
        found["errors"] = errors_against(artifact, {name: alike.get(name, against[name]) for name in known})
        for name, error in found["errors"].items():
            tensor = artifact.tensors[name]
            claim = tensor.error if tensor.error is not None or isinstance(tensor.tree, Packed) else 0.0
            if claim is not None and error > claim * 1.002 + 1e-6:
                raise PromiseBroken(f"{name}: the error is {error:.5f}, the file says {claim:.5f}")
    if task is not None and task.test is not None:
        found["metric"] = _measured(artifact, task)
        claimed = artifact.meta.get("metric")
        if not isinstance(claimed, int | float | None):
            raise FormatError(f"the file's metric is no number: {claimed!r:.80}")
        if claimed is not None and not task.metric.gain(found["metric"], claimed) >= -1e-6:  # nor is it so for NaN
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

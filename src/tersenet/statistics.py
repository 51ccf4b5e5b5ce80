"""The statistics that methods declare in `needs`, from one pass over training inputs for all who ask.

They are moments in the Fisher metric (`calibrate.py`): A of what a weight multiplies, G of the gradients at its
results. The Fisher information of the single weight (i, j) is A_jj G_ii.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersenet.calibrate import Moments, moments
from tersenet.draft import Draft
from tersenet.likelihood import Likelihood
from tersenet.methods import STATISTICS, Method, repack
from tersenet.packed import Array, Packed, Reshaped, Tree
from tersenet.task import Task, one_thread

MOST = 1 << 27  # numbers in one statistic: a gigabyte


def statistics(
    draft: Draft, task: Task | None, methods: Mapping[str, Method], samples: int, seed: int = 0
) -> dict[str, Moments]:
    """Moments of those weights whose methods want some, from `samples` training inputs of the draft's network.

    A weight that no result depends on has none. Raises ValueError where there are no training data.
    """
    asking = {name: method for name, method in methods.items() if method.needs}
    if not asking:
        return {}
    if task is None or task.train is None or draft.model is None:
        name, method = next(iter(asking.items()))
        raise ValueError(
            f"{name}: {method} needs the {STATISTICS[method.needs[0]]}: give a Task with training data, or a method"
            " that needs none"
        )
    tied = {id(draft.tensors[name]): name for name in asking}
    only = {name for name, tensor in draft.tensors.items() if id(tensor) in tied}
    labels = 1 if all(set(method.needs) <= {"inputs"} for method in asking.values()) else 4
    with one_thread():
        batches, likelihood = task.calibration(samples), Likelihood.of(task)
        found = moments(task, draft.module(), batches, likelihood, labels, seed, only)
    for name, known in found.items():
        if not bool(known.inputs.isfinite().all() and known.outputs.isfinite().all()):
            raise ValueError(f"{name}: what the layer sees of the training inputs is not finite: check Task(train=...)")
    return {tied[id(draft.tensors[name])]: known for name, known in found.items()}


def packed(tree: Tree, method: Method, known: Moments | None) -> Tree:
    """The tree of a weight packed by a method, which gets what it needs of what is known.

    A method that reads inputs or outputs finds the weight's rows first, in any layer.
    """
    if known is None:
        return repack(tree, method)
    form, shape = known.form, tuple(tree.shape)
    stats = {need: read(known, need) for need in method.needs}
    turned = bool({"inputs", "outputs"} & set(method.needs)) and not form.straight and not isinstance(tree, Packed)
    if "weights" in stats:
        ordered = stats["weights"].reshape(form.ordered)
        stats["weights"] = ordered if turned else ordered.transpose(np.argsort(form.axes)).reshape(shape)
    if not turned:
        return repack(tree, method, stats)
    made = repack(np.ascontiguousarray(np.asarray(tree).reshape(form.split).transpose(form.axes)), method, stats)
    return Reshaped(made, form.split, form.axes, shape) if isinstance(made, Packed) else tree


def read(known: Moments, need: str) -> Array:
    """One of the statistics of a weight, as methods get it."""
    form = known.form
    if need == "weights":
        rows, columns = (_diagonals(part) for part in (known.outputs, known.inputs))
        return rows[:, : form.rows, None] * columns[:, None, : form.columns]
    return _whole(*((known.inputs, form.columns) if need == "inputs" else (known.outputs, form.rows)))


def _diagonals(blocks: Any) -> Array:
    """The diagonals of blocks [groups, k, b, b], side by side."""
    found: Array = blocks.diagonal(dim1=2, dim2=3).flatten(1).numpy()
    return found


def _whole(blocks: Any, n: int) -> Array:
    """Blocks [groups, k, b, b] as moments [groups, n, n], zero between them."""
    groups, count, width, _ = blocks.shape
    if count == 1:
        return np.asarray(blocks[:, 0, :n, :n].numpy())
    if groups * n * n > MOST:
        raise ValueError(f"moments of {math.prod((groups, n, n)):,} numbers are too many: use another method")
    found = np.zeros((groups, n, n))
    for k in range(count):
        begin, end = k * width, min((k + 1) * width, n)
        found[:, begin:end, begin:end] = blocks[:, k, : end - begin, : end - begin].numpy()
    return found

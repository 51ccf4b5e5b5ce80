"""The running statistics of BatchNorms: what they would be in a network as it is now, and whether the data agree.

Norms hold statistics of the data that a network was trained with, which is seldom what is at hand: it was varied, and
crops over black borders have other variances than whole images. So statistics are never taken anew. They keep what
they are, and follow what changing the weights did to those of the data at hand.
"""

import contextlib
import math
import warnings
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersenet.data import Stream, samples, split_of
from tersenet.task import Task, duplicate, one_thread

TINY = 1e-5  # of variances
CHECKED, APART = 512, 0.15  # samples looked at before training, and by how much logarithms of variances may differ


class Moments(NamedTuple):
    """The mean and the variance of each channel."""

    mean: Tensor
    variance: Tensor


def held(model: nn.Module, left_out: Container[str] = ()) -> dict[str, Moments]:
    """What the BatchNorms hold that have running statistics, by name."""
    return {name: _moments(layer) for name, layer in _norms(model).items() if name not in left_out}


def of_batches(
    model: nn.Module, task: Task, batches: Iterable[Any], left_out: Container[str] = ()
) -> dict[str, Moments]:
    """The mean over batches of their statistics, by norm that an input reaches. The model is left with them."""
    found = {name: layer for name, layer in _norms(model.to(task.device).eval()).items() if name not in left_out}
    for layer in found.values():
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    with torch.no_grad(), one_thread():
        for inputs in batches:
            task.outputs(model, inputs)
    return {name: _moments(layer) for name, layer in found.items() if layer.num_batches_tracked}


def followed(own: Moments, before: Moments, after: Moments) -> Moments:
    """What a norm holds, moved as its statistics on some data moved; nothing where these did not.

    A channel that said nothing before gets what it says now.

    >>> followed(*(Moments(torch.tensor([m]), torch.tensor([v])) for m, v in ((3.0, 8.0), (1.0, 2.0), (1.5, 1.0))))
    Moments(mean=tensor([3.5000]), variance=tensor([4.]))
    """
    spoke = before.variance > 0
    ratio = after.variance / torch.where(spoke, before.variance, 1)
    return Moments(
        torch.where(spoke, own.mean + (after.mean - before.mean), after.mean),
        torch.where(spoke, own.variance * ratio, after.variance),
    )


def warn_of_other_data(task: Task, batch: int) -> None:
    """Warn where a trained network's norms hold other variances than training on the task's data would give them.

    Training moves the statistics to the data's, and so the network is another one before it has learned anything.
    A loader's batches are not looked at, since reading may change what it gives next.
    """
    if task.train is None or isinstance(split_of(task.train, "train"), Stream):
        return
    trained = {n: m for n, m in held(task.model).items() if bool((m.variance != 1).any()) or bool(m.mean.any())}
    if not trained:
        return
    found = of_batches(duplicate(task.model), task, _some(task, batch))
    worst, name = 0.0, ""
    for norm, moments in trained.items():
        if norm in found:
            logs = ((found[norm].variance + TINY) / (moments.variance + TINY)).log()
            apart = float(logs.abs().median())
            worst, name = max((worst, name), (apart, norm))
    if worst > APART:
        warnings.warn(
            f"{name}: the training data give it variances that are {math.expm1(worst):.0%} off those it holds, so"
            " training loses accuracy by that alone: give Task(augment=...) that varies them as the network's own"
            " training did",
            stacklevel=2,
        )


def _some(task: Task, batch: int) -> Iterator[Any]:
    """Batches of training inputs, varied as in training, until enough samples are seen."""
    seen = 0
    with contextlib.closing(task.batches(0, 0, batch)) as batches:
        for inputs, _ in batches:
            if samples(inputs) > 1:
                yield inputs
            if (seen := seen + samples(inputs)) >= CHECKED:
                return


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    return {name: layer for name, layer in found.items() if layer.running_mean is not None}


def _moments(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None and layer.running_var is not None
    return Moments(layer.running_mean.cpu(), layer.running_var.cpu())

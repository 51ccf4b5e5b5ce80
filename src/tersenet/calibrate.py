"""Second moments of each layer's inputs and of the loss gradients at its outputs, streamed over batches.

For a linear layer, or a convolution unrolled over its positions, with inputs u and output gradients g of one sample:
A = E[mean over positions of u u^T] and G = E[(sum of g)(sum of g)^T], the gradients being of the log-likelihood of
labels SAMPLED from the network's own prediction (the true Fisher of K-FAC, Martens and Grosse 2015; the sum over
positions is the "reduce" form of Eschenhagen et al. 2023). Sums are float64. Batches are spread over the cores and
added in order, so the number of threads changes nothing.

A weight of another kind (of recurrent and attention layers, small embeddings, or one that is used without its layer)
gets the nearest factors of its own gradient's moments: with D [rows, n] the gradient over a batch of sampled labels,
which on average are independent, A is E[D^T D] and G is E[D D^T], scaled so that their traces' product is E |D|^2.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.task import Task, one_thread, progress

BATCH = 16
LARGEST = 1 << 19  # numbers in a batch, which has fewer samples where these are large
WIDEST = 4096  # weights with more rows or columns than this, and no layer to watch, have no moments
FLATTER = 2.0  # temperature of the distribution that labels are drawn from


@dataclass(frozen=True)
class Moments:
    """A [groups, n, n] and mean [groups, n] of a layer's unrolled inputs, G [outputs, outputs] of its gradients."""

    inputs: Tensor
    means: Tensor
    outputs: Tensor


def moments(model: nn.Module, inputs: Tensor, task: Task, labels: int = 4, seed: int = 0) -> dict[str, Moments]:
    """Moments by the name of each layer's weight, over `inputs` [samples, ...] and `labels` sampled labels for each.

    The model is read in evaluation mode and left as it was. Tied weights gather what all their layers see.
    """
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    size = max(1, min(BATCH, LARGEST // max(1, inputs[0].numel())))
    batches = list(enumerate(inputs.split(size)))  # type: ignore[no-untyped-call]
    training = model.training
    model.eval()
    sums: dict[str, list[Tensor]] = {}
    with one_thread(), _watched(layers) as seen, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda part: _batch_sums(model, part[1], seen, task, (labels, seed + part[0])), batches)
        for part in progress(parts, "calibrating", len(batches)):
            _add(sums, part)
    model.train(training)
    return {name: _scaled(*(s / len(inputs) for s in found)) for name, found in sums.items()}


def _scaled(inputs: Tensor, means: Tensor, outputs: Tensor) -> Moments:
    """Where sums of gradients stand for a layer's inputs (their means are empty), the scale is shared out."""
    if means.numel():
        return Moments(inputs, means, outputs)
    size = inputs.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-300)
    return Moments(
        inputs / size * inputs.shape[1], torch.zeros(inputs.shape[:2], dtype=inputs.dtype), outputs / inputs.shape[1]
    )


def _add(sums: dict[str, list[Tensor]], more: dict[str, list[Tensor]]) -> None:
    for name, parts in more.items():
        sums[name] = [a + b for a, b in zip(sums[name], parts)] if name in sums else parts


Seen = Callable[[], dict[str, list[tuple[nn.Module, Tensor, Tensor]]]]


@contextmanager
def _watched(layers: dict[str, nn.Module]) -> Iterator[Seen]:
    """While it lasts, each thread's forward passes leave (layer, input, output) by name in that thread's record."""
    local = threading.local()

    def record() -> dict[str, list[tuple[nn.Module, Tensor, Tensor]]]:
        if not hasattr(local, "seen"):
            local.seen = {}
        return local.seen  # type: ignore[no-any-return]

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            record().setdefault(name, []).append((layer, given[0].detach(), out))

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _batch_sums(
    model: nn.Module, x: Tensor, seen: Seen, task: Task, chance: tuple[int, int]
) -> dict[str, list[Tensor]]:
    labels, seed = chance
    generator = torch.Generator().manual_seed(seed)
    record = seen()
    record.clear()
    with torch.enable_grad():
        logits = model(x.clone().requires_grad_() if x.is_floating_point() else x)
    calls = [(name, *call) for name, passes in record.items() for call in passes]
    record.clear()
    others = _unwatched(model, [layer for _, layer, *_ in calls])
    asked = [out for *_, out in calls] + list(others.values())
    gradients: list[list[Tensor]] = []
    for turn in range(labels):
        loss = _sampled_loss(logits, task, generator)
        found = torch.autograd.grad(loss, asked, retain_graph=turn + 1 < labels, allow_unused=True)
        full = [torch.zeros_like(o) if g is None else g for g, o in zip(found, asked)]
        watched = [_summed(layer, g) for (_, layer, *_), g in zip(calls, full)]  # at once: the whole takes gigabytes
        gradients.append([*watched, *(g.flatten(1) for g in full[len(calls) :])])
    sums: dict[str, list[Tensor]] = {}
    for k, (name, layer, given, _) in enumerate(calls):
        reduced = torch.cat([turn[k] for turn in gradients]).double()
        _add(sums, {f"{name}.weight".lstrip("."): [*input_moments(layer, given), reduced.T @ reduced / labels]})
    for k, name in enumerate(others, len(calls)):
        d = torch.stack([turn[k] for turn in gradients]).double()
        across, along = (d.transpose(1, 2) @ d).mean(0), (d @ d.transpose(1, 2)).mean(0)
        _add(sums, {name: [across[None], torch.empty(0), along]})
    return sums


def _unwatched(model: nn.Module, layers: list[nn.Module]) -> dict[str, Tensor]:
    """The weights of two axes or more that none of the watched layers holds."""
    known = {id(layer.weight) for layer in layers}
    found = {n: p for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad and id(p) not in known}
    return {n: p for n, p in found.items() if p.numel() and max(len(p), p[0].numel()) <= WIDEST}


def _sampled_loss(outputs: Tensor, task: Task, generator: torch.Generator) -> Tensor:
    """Minus the log-likelihood of outputs drawn from the model: classes for cross entropy, else unit Gaussians.

    Classes are drawn from the flatter softmax(z / 2) and weighted back by the root of the ratio of the two (squared
    gradients then have the right mean): a network that is sure of its training data would hardly ever draw the rare
    classes that carry most of its Fisher information.
    """
    if task.loss is F.cross_entropy:
        scores = outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
        sure, flat = scores.detach().log_softmax(1), (scores.detach() / FLATTER).softmax(1)
        drawn = torch.multinomial(flat, 1, generator=generator)
        weight = (0.5 * (sure - flat.log()).gather(1, drawn)[:, 0]).exp()
        return (weight * F.cross_entropy(scores, drawn[:, 0], reduction="none")).sum()
    return (outputs * torch.randn(outputs.shape, generator=generator)).sum()


def _summed(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Output gradients summed over positions: [samples, outputs]."""
    if isinstance(layer, nn.Conv2d):
        return gradient.flatten(2).sum(2)
    return gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(1)


def input_moments(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over samples of the means over positions of u u^T [groups, n, n] and of u [groups, n], in float64.

    Columns lie as in the flattened weight.
    """
    if not isinstance(layer, nn.Conv2d):
        flat = x.reshape(-1, x.shape[-1])
        share = len(x) / len(flat)
        return (flat.T @ flat).double()[None] * share, flat.double().sum(0)[None] * share
    x = F.pad(
        x, layer._reversed_padding_repeated_twice, "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    )
    groups, channels = layer.groups, layer.in_channels // layer.groups
    if layer.kernel_size == (1, 1):
        x = x[:, :, :: layer.stride[0], :: layer.stride[1]]
        rows = x.reshape(len(x), groups, channels, -1)
    else:
        rows = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = rows.reshape(len(x), groups, channels * layer.kernel_size[0] * layer.kernel_size[1], -1)
    positions = rows.shape[3]
    rows = rows.permute(1, 2, 0, 3).reshape(groups, rows.shape[2], -1)
    return (rows @ rows.transpose(1, 2)).double() / positions, rows.double().sum(2) / positions

"""A factored weight as a chain of ordinary layers: which factor is which layer, in the order that inputs pass them.

The einsum is read as a path from the input's channels to the output's. A factor that leads from one letter to the next
is a layer, with the kernel that its other letters span; one that has no next letter scales channels apart, as a
depthwise convolution. So SVD "or,ri->oi", Tucker-2 "or,rshw,si->oihw", CP "or,rh,rw,ri->oihw" and longer chains need no
rules of their own. What is no path, such as a tensor train, is no chain. A sparse weight whose rows read every so many
of the input's channels is a convolution in groups, behind channels that are shuffled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.packed import Array, Factored, Sparse, Tree, unpack

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Step:
    """One layer: the factor it is made of, the order in which its weight has the factor's axes, and its shape.

    `kernel` are the axes of the whole weight that this layer's kernel spans.
    """

    factor: int
    order: tuple[int, ...]
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    depthwise: bool

    def weight(self, factor: Array) -> Array:
        """The layer's weight."""
        return np.ascontiguousarray(factor.transpose(self.order).reshape(self.shape))

    def back(self, weight: Array, extents: Sequence[int]) -> Array:
        """The factor, of these extents, that a layer's weight is."""
        ordered = weight.reshape(tuple(extents[axis] for axis in self.order))
        return ordered.transpose(tuple(np.argsort(self.order)))


def steps_of(layer: nn.Module, tree: Factored) -> tuple[Step, ...]:
    """The chain that a layer with this weight becomes; none where there is no chain that says the same."""
    kind = type(layer)  # what derives from these may compute something else, or be read by its parent
    if layer._forward_hooks or layer._forward_pre_hooks:
        return ()
    if kind is nn.Embedding and layer.max_norm is None:
        steps = _path(tree, backwards=True)
    elif kind is nn.Linear or (kind in CONVOLUTIONS and layer.groups == 1):
        steps = _path(tree)
    else:
        return ()
    return () if kind not in CONVOLUTIONS and any(step.depthwise for step in steps) else steps


def chained(layer: nn.Module, tree: Factored, steps: Sequence[Step]) -> nn.Sequential:
    """The chain of a layer, whose bias and numbers it takes over, from the factors of its weight."""
    like, bias, made = layer.weight, getattr(layer, "bias", None), list[nn.Module]()
    assert isinstance(like, torch.Tensor)
    for at, step in enumerate(steps):
        last = at + 1 == len(steps)
        one = _layer(layer, step, at == 0, last and bias is not None)
        weight = torch.from_numpy(np.array(step.weight(np.asarray(unpack(tree.factors[step.factor])))))
        one.weight = nn.Parameter(weight.to(like), like.requires_grad)
        if last and bias is not None:
            one.bias = bias
        made.append(one)
    return nn.Sequential(*made).train(layer.training)


def groups_of(layer: nn.Module, tree: Tree) -> int:
    """How many groups of shuffled channels a convolution with this weight has, or 0: row o reads each i = o's group."""
    fits = type(layer) in CONVOLUTIONS and not layer._forward_hooks and not layer._forward_pre_hooks
    if not fits or not isinstance(tree, Sparse) or layer.groups != 1 or not tree.mask.size:
        return 0
    rows, inputs = tree.shape[:2]
    reads = np.asarray(tree.mask).reshape(rows, inputs, -1)
    groups = inputs // max(1, int(reads[0].any(1).sum()))
    if groups < 2 or rows % groups or inputs % groups:
        return 0
    wanted = np.arange(rows)[:, None] * groups // rows == np.arange(inputs) % groups
    return groups if bool((reads == wanted[..., None]).all()) else 0


def grouped(layer: Any, groups: int) -> nn.Sequential:
    """The convolution in groups, behind its shuffled channels, that says the same."""
    made = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups,
        layer.bias is not None, layer.padding_mode, device="meta",
    )  # fmt: skip
    weight, rows = layer.weight.detach(), layer.out_channels // groups
    within = torch.cat([weight[g * rows : (g + 1) * rows, g::groups] for g in range(groups)])
    made.weight = nn.Parameter(within, layer.weight.requires_grad)
    made.bias = layer.bias
    return nn.Sequential(nn.ChannelShuffle(layer.in_channels // groups), made).train(layer.training)


def together(within: Array, groups: int) -> Array:
    """The whole weight [O, I, ..] of one in groups [O, I / groups, ..], zeros elsewhere."""
    rows, inputs, *kernel = within.shape
    whole = np.zeros((rows, inputs * groups, *kernel), within.dtype)
    for g in range(groups):
        own = slice(g * rows // groups, (g + 1) * rows // groups)
        whole[own, g::groups] = within[own]
    return whole


def _layer(layer: nn.Module, step: Step, first: bool, biased: bool) -> nn.Module:
    """A layer of one step, still without values."""
    rows, columns = step.shape[:2]
    if isinstance(layer, nn.Embedding) and first:
        more: dict[str, Any] = {
            "scale_grad_by_freq": layer.scale_grad_by_freq,
            "sparse": layer.sparse,
            "device": "meta",
        }
        return nn.Embedding(rows, columns, layer.padding_idx, **more)
    if not isinstance(layer, CONVOLUTIONS):
        return nn.Linear(columns, rows, biased, device="meta")
    kernel = step.shape[2:]

    def own(values: Sequence[int], otherwise: int) -> tuple[int, ...]:
        return tuple(n if axis in step.kernel else otherwise for axis, n in enumerate(values, 2))

    padding = layer.padding if isinstance(layer.padding, str) else own(layer.padding, 0)
    groups = rows if step.depthwise else 1
    kind: Any = type(layer)
    made: nn.Module = kind(
        columns * groups, rows, kernel, own(layer.stride, 1), padding, own(layer.dilation, 1), groups, biased,
        layer.padding_mode, device="meta",
    )  # fmt: skip
    return made


def _path(tree: Factored, backwards: bool = False) -> tuple[Step, ...]:
    """The steps from a weight's columns to its rows, or from its rows to its columns; none where it is no path."""
    left, right = tree.equation.split("->")
    terms, spans = left.split(","), _spans(tree)
    if len(right) < 2 or spans[:1] != [(0,)] or any(len(set(term)) < len(term) for term in terms):
        return ()
    span, spatial = dict(zip(right, spans, strict=True)), right[2:]
    here, end = (right[0], right[1]) if backwards else (right[1], right[0])
    steps, waiting = list[Step](), list(range(len(terms)))
    while waiting:
        onward = {k: [c for c in terms[k] if c != here and c not in spatial] for k in waiting if here in terms[k]}
        k = next((k for k, letters in onward.items() if not letters), next(iter(onward), None))
        if k is None or len(onward[k]) > 1 or (onward[k] and (len(onward) > 1 or here == end)):
            return ()
        waiting.remove(k)
        term, lead = terms[k], [*onward[k], here]
        if backwards and not steps:  # an embedding has a row for each of its inputs
            lead.reverse()
        wide = [c for c in spatial if c in term]
        merged = span[here][1:] if here == right[1] else ()  # axes of the kernel that are one letter with the columns
        if merged and not onward[k]:
            return ()
        kernel = (*merged, *(axis for c in wide for axis in span[c]))
        extent = dict(zip(term, tree.factors[k].shape, strict=True)) | {right[1]: tree.size[1]}
        shape = (*(extent[c] for c in lead), *(() if onward[k] else (1,)))
        shape += tuple(n if axis in kernel else 1 for axis, n in enumerate(tree.size[2:], 2))
        steps.append(Step(k, tuple(term.index(c) for c in (*lead, *wide)), shape, kernel, not onward[k]))
        here = (onward[k] or [here])[0]
    covered = [axis for step in steps for axis in step.kernel]
    return tuple(steps) if here == end and len(covered) == len(set(covered)) else ()


def _spans(tree: Factored) -> list[tuple[int, ...]]:
    """Which axes of the weight each letter of the result is; empty where a letter is a part of an axis."""
    left, right = tree.equation.split("->")
    terms = zip(left.split(","), tree.factors, strict=True)
    extent = {c: n for term, factor in terms for c, n in zip(term, factor.shape, strict=True)}
    spans, at = list[tuple[int, ...]](), 0
    for number, letter in enumerate(right):
        end = at + 1
        while end < len(tree.size) and (number + 1 == len(right) or math.prod(tree.size[at:end]) < extent[letter]):
            end += 1
        if at >= len(tree.size) or math.prod(tree.size[at:end]) != extent[letter]:
            return []
        spans.append(tuple(range(at, end)))
        at = end
    return spans if at == len(tree.size) else []

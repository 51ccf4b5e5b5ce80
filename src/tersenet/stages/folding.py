"""BatchNorm folded into the layer before it, where that changes nothing but rounding."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor as Array
from torch import nn

from tersenet import artifact
from tersenet.packed import Sparse, Tree, Uniform
from tersenet.recipe import Draft, dense_array


def folded(draft: Draft, x: Array) -> tuple[Draft, dict[str, str]]:
    """BatchNorm as scale and shift, its scale moved into the convolution that feeds it, where outputs stay the same.

    Also tells, for each weight, the name of the bias or shift that is added to its output.

    Which layer feeds which is seen in one forward pass; the folded network's outputs on `x` are compared with the
    original's, and where they differ by more than rounding nothing is folded.
    """
    model = draft.module()
    biases = {name: own for name in draft.weights() if (own := name.removesuffix("weight") + "bias") in draft.tensors}
    feeds = _feeds(model, x)
    if not feeds:
        return draft, biases
    with torch.no_grad():
        before = model.eval()(x)
    trees: dict[str, Tree] = {}
    layers = dict(model.named_modules())
    constants: list[str] = []
    for norm_name, conv_name in feeds.items():
        norm, weight = layers[norm_name], dense_array(draft.tensors[f"{conv_name}.weight"])
        if f"{norm_name}.weight" not in draft.tensors:
            continue
        gamma, beta, mean, var = (
            dense_array(draft.tensors[f"{norm_name}.{part}"]).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(var + norm.eps)
        weight = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        tree = draft.tensors[f"{conv_name}.weight"].tree
        trees[f"{conv_name}.weight"] = Sparse(tree.mask, weight[tree.mask]) if isinstance(tree, Sparse) else weight
        constant = {f"{norm_name}.weight": 1, f"{norm_name}.running_mean": 0, f"{norm_name}.running_var": 1 - norm.eps}
        if (own := f"{conv_name}.bias") in draft.tensors:
            mean -= dense_array(draft.tensors[own])
            constant[own] = 0
        trees[f"{norm_name}.bias"] = (beta - mean * scale).astype(np.float32)
        for name, value in constant.items():  # equal levels take no bits, where floats would take all of theirs
            trees[name] = Uniform(np.ones(len(scale), np.int8), np.array(value, np.float32))
        constants += constant
        if (counter := f"{norm_name}.num_batches_tracked") in draft.tensors:
            constants.append(counter)
    after = tied(draft.with_trees(trees), constants)
    with torch.no_grad():
        off = (after.module().eval()(x) - before).abs().max()
    if float(off) > 1e-3 * float(before.abs().max()) + 1e-6:
        return draft, biases
    return after, biases | {f"{feeds[n]}.weight": f"{n}.bias" for n in feeds if f"{n}.bias" in trees}


def tied(draft: Draft, names: Iterable[str]) -> Draft:
    """The draft with those of the named tensors that are equal stored once."""
    first: dict[tuple[str, tuple[int, ...], bytes], artifact.Tensor] = {}
    tensors = dict(draft.tensors)
    for name in names:
        array = dense_array(tensors[name])
        tensors[name] = first.setdefault((tensors[name].dtype, array.shape, array.tobytes()), tensors[name])
    return replace(draft, tensors=tensors)


def _feeds(model: nn.Module, x: Array) -> dict[str, str]:
    """For each BatchNorm in evaluation form, the convolution or linear layer whose output it takes, both used once."""
    made: dict[int, str] = {}
    kept: list[Array] = []
    feeds: dict[str, str] = {}
    calls: dict[str, int] = {}

    def layer_hook(name: str) -> object:
        def hook(layer: nn.Module, given: tuple[Array, ...], out: Array) -> None:
            made[id(out)] = name
            kept.append(out)  # keeps the id from being used again
            calls[name] = calls.get(name, 0) + 1

        return hook

    def norm_hook(name: str) -> object:
        def hook(layer: nn.Module, given: tuple[Array, ...], out: Array) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(given[0]) in made:
                feeds[name] = made[id(given[0])]

        return hook

    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats:
            handles.append(layer.register_forward_hook(norm_hook(name)))  # type: ignore[arg-type]
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            handles.append(layer.register_forward_hook(layer_hook(name)))  # type: ignore[arg-type]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return {norm: layer for norm, layer in feeds.items() if calls[norm] == calls[layer] == 1}

"""Which layers of a network run on packed weights, and the network with these in place of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from tersenet.activations import Formats, formats_of, rounding
from tersenet.artifact import Artifact
from tersenet.container import Tensor
from tersenet.norms import folded_norms, hold
from tersenet.packed import Codebook, Tree, Uniform
from tersenet.runtime import kernels
from tersenet.runtime.modules import PackedConv2d, PackedEmbedding, PackedLinear, PackedRecurrent, PackedWeight

READ_BY_PARENTS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # which read the weights of the layers in them


def packed_layers(
    module: nn.Module, tensors: Mapping[str, Tensor], batch: int, activations: int, formats: Formats
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of a module that run on packed weights, by name, and a sentence for each layer that has a weight.

    `formats` are those in which layers take and give values, as a file has them.
    """
    layers, why = dict[str, nn.Module](), dict[str, str]()
    parents = [parent for parent in module.modules() if isinstance(parent, READ_BY_PARENTS)]
    read = {id(layer) for parent in parents for layer in parent.children()}
    for name, layer in module.named_modules():
        make = MADE.get(type(layer))
        if make is None:
            if any(parameter.dim() > 1 for parameter in layer.parameters(recurse=False)):
                why[name] = f"dense: {type(layer).__name__} is not executed"
            continue
        parts = [part for part, _ in layer.named_parameters(recurse=False, remove_duplicate=False)]
        own = {part: tensors[f"{name}.{part}" if name else part] for part in parts}
        if reason := _left(layer, own, id(layer) in read):
            why[name] = f"dense: {reason}"
            continue
        trees = {part: tensor.tree for part, tensor in own.items() if part.startswith("weight")}
        made, why[name] = make(layer, trees, batch, activations, formats.get(name))
        if made is not None:
            layers[name] = made.train(layer.training)
    return layers, why


def _left(layer: nn.Module, own: Mapping[str, Tensor], read: bool) -> str:
    """Why a layer is left as it is, or nothing."""
    if read:
        return "its parent reads its weight"
    if layer._forward_hooks or layer._forward_pre_hooks or "parametrizations" in dict(layer.named_children()):
        return "it has hooks or parametrizations"
    if "forward" in vars(layer):
        return "it has a forward of its own"
    kinds = {*(t.dtype for t in own.values()), *(str(p.dtype).removeprefix("torch.") for p in layer.parameters())}
    if kinds != {"float32"}:
        return "it is not float32"
    return ""


Made: TypeAlias = tuple[nn.Module | None, str]
Fixed: TypeAlias = Sequence[int] | None


def _linear(layer: Any, trees: Mapping[str, Tree], batch: int, activations: int, fixed: Fixed) -> Made:
    choice = kernels.choose(trees["weight"], batch, activations, fixed[:2] if fixed else None)
    if choice.form is None:
        return None, choice.why
    weight = PackedWeight(choice.form, choice.why, layer.out_features, layer.in_features)
    return PackedLinear(layer, weight), choice.why


def _conv2d(layer: Any, trees: Mapping[str, Tree], batch: int, activations: int, fixed: Fixed) -> Made:
    if layer.groups > 1 or layer.padding_mode != "zeros":
        return None, "dense: convolutions in groups, or padded by other than zeros, are not executed"
    choice = kernels.convolution(trees["weight"])
    if choice.form is None:
        return None, choice.why
    columns = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    return PackedConv2d(layer, PackedWeight(choice.form, choice.why, layer.out_channels, columns)), choice.why


def _embedding(layer: Any, trees: Mapping[str, Tree], batch: int, activations: int, fixed: Fixed) -> Made:
    tree = trees["weight"]
    if layer.max_norm is not None:
        return None, "dense: it scales its rows to max_norm"
    if isinstance(tree, Uniform) and kernels.scales(tree) is not None:
        return PackedEmbedding(layer, tree, "levels"), "levels, of which rows are looked up"
    if isinstance(tree, Codebook) and len(tree.codewords.shape) == 2:
        return PackedEmbedding(layer, tree, "codewords"), "numbers of codewords, of which rows are looked up"
    return None, "dense: its rows cannot be looked up by themselves"


def _recurrent(layer: Any, trees: Mapping[str, Tree], batch: int, activations: int, fixed: Fixed) -> Made:
    if getattr(layer, "proj_size", 0) or layer.dropout:
        return None, "dense: recurrent layers with projections or dropout are not executed"
    choices = {name: kernels.choose(tree, batch, activations) for name, tree in trees.items()}
    weights, why = {}, "; ".join(f"{name} {choice.why}" for name, choice in choices.items())
    for name, choice in choices.items():
        if choice.form is None:
            return None, f"dense, since one of its matrices is: {why}"
        weights[name] = PackedWeight(choice.form, choice.why, *getattr(layer, name).shape)
    return PackedRecurrent(layer, weights), why


MADE: dict[Any, Any] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Embedding: _embedding,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
}


def _refused(*args: Any, **named: Any) -> Any:
    raise RuntimeError("attach has replaced this layer; call the one that lies in its place in the module")


def replaced(module: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """The module with these layers in place of its own, wherever it holds them; it no longer asks for gradients.

    What it holds elsewhere, as in a tuple, stays the old layer, which has none of the file's weights and is refused.
    """
    made = {id(module.get_submodule(name)): layer for name, layer in layers.items()}
    for name in layers:
        module.get_submodule(name).forward = _refused
    if "" in layers:
        module = layers[""]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                setattr(parent, name, made[id(child)])
    return module.requires_grad_(False)


def attached(
    module: nn.Module, artifact: Artifact, batch: int = 1, activations: int = 24
) -> tuple[nn.Module, dict[str, str]]:
    """`Artifact.attach`, and a sentence for each layer that has a weight."""
    tensors, formats = artifact.tensors, formats_of(artifact)
    state = {n: v for n, v in module.state_dict().items() if n.rpartition(".")[2] != "_extra_state"}
    if wrong := sorted(set(state) ^ set(tensors)):
        where = "the file" if wrong[0] in tensors else "the module"
        raise RuntimeError(f"{wrong[0]}: only {where} has it; attach the file to a module of the same architecture")
    for name, value in state.items():
        if tensors[name].shape != tuple(value.shape):
            raise RuntimeError(f"{name}: the file has {list(tensors[name].shape)}, the module {list(value.shape)}")
    layers, why = packed_layers(module, tensors, batch, activations, formats)
    taken = {
        f"{name}.{part}".lstrip(".")
        for name in layers
        for part, _ in module.get_submodule(name).named_parameters(recurse=False, remove_duplicate=False)
        if part.startswith("weight")
    }
    with torch.no_grad():
        for name, value in state.items():
            if name not in taken:
                value.copy_(Artifact({name: tensors[name]}).state_dict()[name])
    hold(module, folded_norms(tensors))
    return rounding(replaced(module, layers), formats), why

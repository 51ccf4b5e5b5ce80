"""Activations in dynamic fixed point: what layers take and give, rounded to few bits (Gysel et al. 2018, section 4).

The values of a layer share the place of the binary point; b bits with f of them behind it are multiples of 2^-f,
rounded half to even and saturated (`methods/fixed_point.py`). A file has them in its section "activations": JSON, by
the name of each layer [b, f of its inputs, f of its outputs]. Sums within an operation are of the network's own type.
"""

import functools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNCellBase

from tersenet.artifact import Artifact, FormatError
from tersenet.data import mapped
from tersenet.display import progress
from tersenet.draft import ACTIVATIONS
from tersenet.methods.fixed_point import binary_point
from tersenet.task import Task, duplicate, one_thread

Formats: TypeAlias = Mapping[str, Sequence[int]]  # by layer: bits, those behind the binary point of inputs, of outputs
LARGEST = 2.0**128  # value that float32 cannot hold
LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.RNNBase, RNNCellBase)


def rounded(x: Tensor, bits: int, fraction: int) -> Tensor:
    """Floats as multiples of 2^-fraction of so many bits; the gradient of what does not saturate passes straight.

    >>> rounded(torch.tensor([0.3, 0.75, -9.0]), 3, 1)
    tensor([ 0.5000,  1.0000, -2.0000])
    """
    step, last = 2.0**-fraction, 2 ** (bits - 1)
    inside = (x / step).clamp(-last, last - 1)
    return (inside + (inside.round() - inside).detach()) * step


def quantized(model: nn.Module, formats: Formats) -> nn.Module:
    """A copy of a module, some layers of which take and give values in fixed point.

    Raises ValueError where it lacks such a layer.
    """
    return rounding(duplicate(model), formats)


def rounding(model: nn.Module, formats: Formats) -> nn.Module:
    """The module itself, whose layers from now on do so; it can be copied and pickled as before."""
    for name, (bits, taken, given) in formats.items():
        into, out = (functools.partial(_fixed, bits, fraction) for fraction in (taken, given))
        hook(_layer(model, name), into, out)
    return model


def into(artifact: Artifact, module: nn.Module) -> nn.Module:
    """What `Artifact.into` gives, with activations in fixed point where the file says so."""
    filled: nn.Module = artifact.into(module)
    formats = formats_of(artifact)
    return quantized(filled, formats) if formats else filled


def formats_of(artifact: Artifact) -> dict[str, tuple[int, int, int]]:
    """How a file rounds activations; {} where it does not. Raises FormatError for a section that does not say it."""
    if ACTIVATIONS not in artifact.sections:
        return {}
    try:
        read = json.loads(artifact.sections[ACTIVATIONS].data)
        found = {str(name): tuple(told) for name, told in read.items()}
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise FormatError("the section 'activations' is not JSON of three numbers for each layer") from None
    for name, told in found.items():
        if len(told) != 3 or not all(type(n) is int and abs(n) <= 150 for n in told) or not 2 <= told[0] <= 16:
            raise FormatError(f"{name}: its activations have 2 to 16 bits, and binary points of inputs and outputs")
    return found


def calibrated(task: Task, model: nn.Module, weights: Iterable[str], bits: int, samples: int) -> dict[str, list[int]]:
    """The formats in which nothing saturates that layers take or give on training inputs.

    Of linear, convolutional, embedding and recurrent layers that are called. Warns of weights that are in none.
    """
    model = duplicate(model).to(task.device).eval()
    tops: dict[str, list[float]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            hook(layer, _measuring(tops, name, 0), _measuring(tops, name, 1))
    batches = task.calibration(samples)
    with torch.no_grad(), one_thread():
        for inputs in progress(batches, "ranges of activations", len(batches)):
            task.outputs(model, inputs)
    layers = {weight: weight.partition(".parametrizations.")[0].rpartition(".")[0] for weight in weights}
    if left := [weight for weight, name in layers.items() if name not in tops]:
        warnings.warn(f"what these weights take and give is not rounded: {', '.join(left)}", stacklevel=2)
    return {name: [bits, *(binary_point(top, bits) for top in pair)] for name, pair in tops.items()}


def hook(layer: nn.Module, taking: Any, giving: Any) -> None:
    """Change what a layer takes and what it gives, each floating-point tensor of it by itself."""
    layer.register_forward_pre_hook(functools.partial(_before, taking), with_kwargs=True)
    layer.register_forward_hook(functools.partial(_behind, giving))


def _before(taking: Any, _: nn.Module, args: Any, given: Any) -> Any:
    return mapped(args, taking), mapped(given, taking)


def _behind(giving: Any, _: nn.Module, args: Any, out: Any) -> Any:
    return mapped(out, giving)


def _fixed(bits: int, fraction: int, x: Tensor) -> Tensor:
    return rounded(x, bits, fraction) if x.is_floating_point() else x


def _measuring(tops: dict[str, list[float]], name: str, side: int) -> Any:
    def measure(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.numel():
            top = float(x.abs().max())
            if not top < LARGEST:
                raise ValueError(f"{name}: what it takes or gives is not finite; look at the weights before it")
            own = tops.setdefault(name, [0.0, 0.0])
            own[side] = max(own[side], top)
        return x

    return measure


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name}: activations of this layer are to be rounded, but the model lacks it") from None

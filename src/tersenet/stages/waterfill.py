"""Output-aware quantization of a whole network without retraining: one global step in the Fisher metric.

The step of weight (i, j) of a layer is c / (R_ii L_jj): A = L L^T from the layer's inputs in the DCT domain of its
kernels, G = R R^T from its output gradients, both damped. One number, c, sets size and accuracy of the whole network
and so settles what each layer and row gets. BatchNorm is first folded to a scale and a shift, and its scale into the
convolution before it; the shifts and all biases are quantized by the same rule. Weights that were pruned before stay
zero; their layers are not transformed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor as Array
from torch import nn

from tersenet import artifact
from tersenet.calibrate import Moments, moments
from tersenet.methods.feedback import Metric, levels, tree_of, waterfilled
from tersenet.methods.transform import spatial
from tersenet.packed import Sparse, Tree, Uniform, kernel_dct, narrowed
from tersenet.recipe import Draft, dense_array
from tersenet.task import Task, one_thread

SMALL = 64  # tensors with fewer weights stay floats
Halves = tuple[Moments, Moments]


@dataclass(frozen=True)
class Damping:
    """What is added to the diagonals of the shrunk moments, as parts of their means."""

    inputs: float = 1e-3
    rows: float = 0.3


@dataclass(frozen=True)
class Gathered:
    """A draft with BatchNorm folded, its layers' moments, and which bias is added to each weight's output.

    Moments come from each half of the inputs: how far the halves differ says how much to trust them.
    """

    draft: Draft
    found: Mapping[str, Halves]
    biases: Mapping[str, str]


@dataclass(frozen=True)
class Layer:
    """A weight ready to be quantized at any c; `bias` names what takes up the mean of its output's error."""

    name: str
    weight: np.ndarray  # [groups, rows, n], in the DCT domain where `transformed`
    metric: Metric
    means: np.ndarray  # [groups, n] of the inputs
    shape: tuple[int, ...]
    transformed: bool
    bias: str | None
    kept: np.ndarray | None = None  # [groups, rows, n], where the weight was pruned before: the rest stays zero


@dataclass(frozen=True)
class Prepared:
    """All that does not depend on c: layers with their metrics, and biases with the step that one unit of c gives."""

    draft: Draft
    layers: list[Layer]
    shifts: dict[str, float] = field(default_factory=dict)

    @one_thread()
    def at(self, c: float, rate: float = 0.5) -> Draft:
        """The draft quantized with the global step c."""
        trees: dict[str, Tree] = {}
        biases = {name: dense_array(self.draft.tensors[name]).astype(np.float64) for name in self.shifts}
        for layer in self.layers:
            steps = waterfilled(layer.metric, c, math.prod(layer.shape[2:]))
            q = levels(layer.weight, layer.metric, steps.parts(), rate, layer.kept, layer.kept is None)
            trees[layer.name] = tree_of(q, steps, layer.shape, layer.transformed)
            if layer.bias is not None:
                biases[layer.bias] += ((layer.weight - q * steps.dense()) @ layer.means[..., None]).reshape(-1)
        for name, unit in self.shifts.items():
            trees[name] = rounded(biases[name], c * unit)
        return self.draft.with_trees(trees)


@dataclass(frozen=True)
class Waterfill:
    """The stage: quantize at the global step `c`, from the moments of `samples` training inputs."""

    c: float = 0.003
    rate: float = 0.5
    samples: int = 1024
    damping: Damping = field(default_factory=Damping)

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        with one_thread():
            return prepare(gather(draft, task, self.samples), self.damping).at(self.c, self.rate)


def rounded(values: np.ndarray, step: float) -> Tree:
    """Values at multiples of a step, or as fp16 floats where levels would not be fewer bits."""
    step = float(np.float32(step))
    q = np.rint(values / step) if step > 0 else np.full(values.shape, np.inf)
    if not np.abs(q).max(initial=0) < 1 << 15:
        return values.astype(np.float16).astype(np.float32)
    return Uniform(narrowed(q.astype(np.int32)), np.array(step, np.float32))


def gather(draft: Draft, task: Task | None, samples: int = 1024) -> Gathered:
    """Fold BatchNorm and gather the moments; without a task there are none, and every metric is the identity."""
    if task is None or draft.model is None:
        return Gathered(draft, {}, {})
    x = task.calibration(samples)
    draft, biases = folded(draft, x[: min(len(x), 8)])
    labels = min(16, max(4, 4096 // len(x)))  # where there are few inputs, more labels make up for it in part
    one = moments(draft.module(), x[::2], task, labels)
    other = moments(draft.module(), x[1::2], task, labels, seed=len(x)) if len(x) > 1 else one
    return Gathered(draft, {name: (known, other[name]) for name, known in one.items()}, biases)


def prepare(gathered: Gathered, damping: Damping | None = None) -> Prepared:
    """Shrink, damp and factor the moments of every layer."""
    damping = damping or Damping()
    draft, biases = gathered.draft, gathered.biases
    held = {id(draft.tensors[name]): known for name, known in gathered.found.items() if name in draft.tensors}
    found = {name: held[id(t)] for name, t in draft.tensors.items() if id(t) in held}  # by any name of tied weights
    layers, shifts = [], {}
    with one_thread():
        for name in draft.weights():
            if math.prod(draft.tensors[name].tree.shape) >= SMALL:
                bias = biases.get(name) if name in found else None
                layers.append(_layer(name, draft.tensors[name], found.get(name), damping, bias))
    feeding = {bias: weight for weight, bias in biases.items()}
    for name in sorted(draft.trainable & set(draft.tensors)):
        tensor = draft.tensors[name]
        if len(tensor.tree.shape) != 1 or "float" not in tensor.dtype:
            continue
        known = name in feeding and feeding[name] in found
        if known or np.ptp(dense_array(tensor)) > 0:
            shifts[name] = 0.0  # kept as fp16
        if known:
            # A constant input would get c / sqrt(mean G); biases are few, so they get half of that.
            known_g = sum(float(half.outputs.diagonal().mean()) for half in found[feeding[name]]) / 2
            shifts[name] = 0.5 / math.sqrt((1 + damping.rows) * known_g + 1e-60)
    return Prepared(draft, layers, shifts)


def _layer(name: str, tensor: artifact.Tensor, known: Halves | None, damping: Damping, bias: str | None) -> Layer:
    w = torch.from_numpy(dense_array(tensor)).double()
    shape, groups = tuple(w.shape), 1 if known is None else len(known[0].inputs)
    flat = w.reshape(groups, shape[0] // groups, -1)
    n = flat.shape[2]
    kept = tensor.tree.mask.reshape(flat.shape) if isinstance(tensor.tree, Sparse) else None
    transformed = spatial(shape) and kept is None
    t = torch.from_numpy(kernel_dct(*shape[2:]).copy()) if transformed else torch.eye(1, dtype=torch.double)
    k = len(t)
    flat = (flat.reshape(-1, k) @ t.T).reshape(flat.shape)
    if known is None:
        rows = flat.square().mean(2)
        metric = Metric(None, (rows + rows.mean()).clamp_min(1e-30).rsqrt().numpy())
        return Layer(name, flat.numpy(), metric, np.zeros((1, n)), shape, transformed, None)
    a = shrunk(*(_turned(half, bias is not None, t) for half in known))
    means = ((known[0].means + known[1].means) / 2).reshape(-1, k) @ t.T
    # The sums were made of float32 products, so a part of the raw second moment is noise and must be covered too.
    raw = 1e-5 * known[0].inputs.diagonal(dim1=1, dim2=2).mean(1)
    mean = a.diagonal(dim1=1, dim2=2).mean(1)
    a = a + (damping.inputs * (mean + 1e-3 * mean.mean()) + raw + 1e-12)[:, None, None] * torch.eye(n)
    m, whole = shape[0] // groups, shrunk(*(half.outputs[None] for half in known))[0]
    g = torch.stack([whole[at : at + m, at : at + m] for at in range(0, shape[0], m)])
    g = g + (damping.rows * whole.diagonal().mean() + 1e-30) * torch.eye(m)
    metric = Metric(_factor(a).numpy(), _factor(g).numpy())
    return Layer(name, flat.numpy(), metric, means.reshape(groups, n).numpy(), shape, transformed, bias, kept)


def _turned(known: Moments, centred: bool, t: Array) -> Array:
    """A [groups, n, n] with the kernels' axes turned by `t`; the covariance where a bias takes up the error's mean."""
    a, k = known.inputs, len(t)
    if centred:
        a = a - known.means[:, :, None] * known.means[:, None]
    groups, n, _ = a.shape
    a = a.reshape(groups, n // k, k, n // k, k)
    return torch.einsum("pk,gikjl,ql->gipjq", t, a, t).reshape(groups, n, n)


def shrunk(one: Array, other: Array) -> Array:
    """A second moment [groups, n, n] from estimates of two halves of the samples, trusted as far as they agree.

    Correlations are shrunk to none and variances to their mean, each by the share of noise in them (Schäfer and
    Strimmer 2005, Opgen-Rhein and Strimmer 2007). Where we differ: noise is what the halves differ by, since the many
    positions of an image are one sample and not many.
    """
    mean, half = (one + other) / 2, (one - other) / 2
    sizes = mean.diagonal(dim1=1, dim2=2).clamp_min(0)
    level = sizes.mean(1, keepdim=True)
    noise = _noise(half.diagonal(dim1=1, dim2=2), sizes - level)
    root = (sizes + 1e-9 * level + 1e-30).rsqrt()
    unit = root[:, :, None] * root[:, None] * (1 - torch.eye(mean.shape[1], dtype=mean.dtype))
    correlations, scales = mean * unit, (sizes + noise * (level - sizes)).sqrt()
    correlations = (1 - _noise(half * unit, correlations)) * correlations + torch.eye(mean.shape[1], dtype=mean.dtype)
    return correlations * scales[:, :, None] * scales[:, None]


def _noise(half: Array, signal: Array) -> float:
    """The share of noise in a mean of two halves, from half of their difference; 1 where there is nothing else."""
    difference, whole = float(half.square().sum()), float(signal.square().sum())
    return min(1.0, difference / whole) if whole > 0 else 1.0


def _factor(a: Array) -> Array:
    """Lower Cholesky factors, the diagonal raised until there are some."""
    extra = 0.0
    factor: Array
    while True:
        factor, failed = torch.linalg.cholesky_ex(a + extra * torch.eye(a.shape[-1], dtype=a.dtype))
        if not failed.any():
            return factor
        extra = max(10 * extra, 1e-8 * float(a.diagonal(dim1=1, dim2=2).mean()))


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

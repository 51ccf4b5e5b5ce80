"""Output-aware quantization of a whole network without retraining: one global step in the Fisher metric.

The step of weight (i, j) of a layer is c / (R_ii L_jj): A = L L^T from the layer's inputs in the DCT domain of its
kernels, G = R R^T from its output gradients, both damped. One number, c, sets size and accuracy of the whole network
and so settles what each layer and row gets. BatchNorm is first folded to a scale and a shift, and its scale into the
convolution before it; the shifts and all biases are quantized by the same rule. Weights that were pruned before stay
zero; their layers are not transformed.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor as Array

from tersenet import artifact
from tersenet.calibrate import Moments, moments
from tersenet.methods.feedback import Metric, Steps, levels, tree_of, waterfilled
from tersenet.methods.transform import spatial
from tersenet.packed import Sparse, Tree, Uniform, kernel_dct, narrowed
from tersenet.recipe import Draft, dense_array
from tersenet.stages.folding import folded
from tersenet.task import Task, one_thread, progress

SMALL = 64  # tensors with fewer weights stay floats
HELD = 5  # of so many inputs one is not among those that moments are made of
PROBED = 64, 256, 1 << 23  # inputs on which it is seen what errors of each layer cost: least, most, their numbers
Halves = tuple[Moments, Moments]


@dataclass(frozen=True)
class Damping:
    """What is added to the diagonals of the shrunk moments, as parts of their means."""

    inputs: float = 1e-3
    rows: float = 0.3


@dataclass(frozen=True)
class Gathered:
    """A draft with BatchNorm folded, its layers' moments, and which bias is added to each weight's output.

    Moments come from two halves of the inputs: how far the halves differ says how much to trust them. Every fifth input
    is `held` back from them: feedback steers errors to where the others do not see them. `worth` is what errors of a
    layer cost at the network's outputs, in parts of what its moments say.
    """

    draft: Draft
    found: Mapping[str, Halves]
    biases: Mapping[str, str]
    held: Array | None = None
    worth: Mapping[str, float] = field(default_factory=dict)


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

    def at(self, c: float, rate: float) -> tuple[np.ndarray, Steps]:
        """Levels [groups, rows, n] and their steps at c."""
        steps = waterfilled(self.metric, c, math.prod(self.shape[2:]))
        return levels(self.weight, self.metric, steps.parts(), rate, self.kept, self.kept is None), steps


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
            q, steps = layer.at(c, rate)
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
            gathered = gather(draft, task, self.samples)
            return prepare(weighed(gathered, self.c), self.damping).at(self.c, self.rate)


def rounded(values: np.ndarray, step: float) -> Tree:
    """Values at multiples of a step, or as fp16 floats where there is no step or it is far too fine."""
    step = float(np.float32(step))
    q = np.rint(values / step) if step > 0 else np.full(values.shape, np.inf)
    if not np.abs(q).max(initial=0) < 1 << 22:
        return values.astype(np.float16).astype(np.float32)
    return Uniform(narrowed(q.astype(np.int32)), np.array(step, np.float32))


def gather(draft: Draft, task: Task | None, samples: int = 1024) -> Gathered:
    """Fold BatchNorm and gather the moments; without a task there are none, and every metric is the identity."""
    if task is None or draft.model is None:
        return Gathered(draft, {}, {})
    x = task.calibration(samples)
    draft, biases = folded(draft, x[: min(len(x), 8)])
    apart = torch.arange(len(x)) % HELD == HELD - 1
    held = x[apart] if len(x) >= HELD else x
    x = x[~apart]
    labels = min(16, max(4, 4096 // len(x)))  # where there are few inputs, more labels make up for it in part
    one = moments(draft.module(), x[::2], task, labels)
    other = moments(draft.module(), x[1::2], task, labels, seed=len(x)) if len(x) > 1 else one
    for name, known in (*one.items(), *other.items()):
        if not all(bool(part.isfinite().all()) for part in (known.inputs, known.outputs)):
            raise ValueError(
                f"{name}: what the layer sees of the calibration inputs is not finite: check Task(train=...)"
            )
    return Gathered(draft, {name: (known, other[name]) for name, known in one.items()}, biases, held)


def weighed(gathered: Gathered, c: float) -> Gathered:
    """The same with what errors of each layer cost at the outputs, seen by quantizing each alone at c.

    Moments know well which errors of a layer cost less than others; how layers compare, where gradients are summed over
    positions as if these had nothing to do with each other, or where there are few inputs for many weights, they know
    less well.
    """
    least, most, numbers = PROBED
    x = gathered.held
    if x is None:
        return gathered
    x = x[: min(most, max(least, numbers // x[0].numel()))]
    prepared = prepare(replace(gathered, worth={}))
    layers = [layer for layer in prepared.layers if layer.metric.inputs is not None]
    if not layers:
        return gathered
    wanted = outputs(gathered.draft, x)

    def ratio(layer: Layer) -> float:
        q, steps = layer.at(c, 0.5)
        told = layer.metric.cost(layer.weight - q * steps.dense())
        shifts = {name: unit for name, unit in prepared.shifts.items() if name == layer.bias}
        seen = difference(wanted, outputs(replace(prepared, layers=[layer], shifts=shifts).at(c), x))
        return math.log(max(seen, 1e-300) / max(told, 1e-300))

    with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = list(progress(pool.map(ratio, layers), "weighing layers", len(layers)))
    middle = float(np.average(logs, weights=[layer.weight.size for layer in layers]))
    worth = {layer.name: math.exp(min(max(log - middle, -8), 8)) for layer, log in zip(layers, logs, strict=True)}
    return replace(gathered, worth=worth)


def outputs(draft: Draft, x: Array) -> Array:
    """What the draft's network says to the inputs."""
    with torch.no_grad(), one_thread():
        model = draft.module().eval()
        return torch.cat([model(part) for part in x.split(16)])  # type: ignore[no-untyped-call]


def difference(wanted: Array, found: Array) -> float:
    """Mean squared difference; of class scores, what is added to all classes of a sample does not count."""
    error = (wanted - found).double()
    if error.dim() == 2:
        error = error - error.mean(1, keepdim=True)
    return float(error.square().mean())


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
                worth = gathered.worth.get(name, 1.0)
                layers.append(_layer(name, draft.tensors[name], found.get(name), damping, bias, worth))
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
            worth = gathered.worth.get(feeding[name], 1.0)
            shifts[name] = 0.5 / math.sqrt((1 + damping.rows) * worth * known_g + 1e-60)
    return Prepared(draft, layers, shifts)


def _layer(
    name: str, tensor: artifact.Tensor, known: Halves | None, damping: Damping, bias: str | None, worth: float
) -> Layer:
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
    m, whole = shape[0] // groups, worth * shrunk(*(half.outputs[None] for half in known))[0]
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

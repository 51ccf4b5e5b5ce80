"""What a layer's outputs tell of the inputs and of the labels: estimates of mutual information, and their plane.

Chelombiev, Houghton, O'Donnell 2019: bins and noise that follow the spread of each layer at each moment. A layer that
tells N samples apart has I(X;T) = log2 N without noise, whatever it has learned: a smaller number tells of bins or of
noise, and compares with numbers of the same estimator alone (docs/information.md).
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.data import Data, reachable, samples, split_of
from tersenet.task import Task, one_thread, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
BLOCK = 1 << 20  # numbers in one block of distances, or of outputs in double precision: 8 MB
POOLED = 1 << 24  # numbers of a layer that edges are taken from; of larger layers every k-th sample serves
BATCH = 256  # samples in a pass
MARKERS = "os^Dv<>pPX*h"


@dataclass(frozen=True)
class Information:
    """I(X;T) as `inputs` and I(T;Y) as `labels`, in bits."""

    inputs: float
    labels: float


def edges(t: Array, bins: int = 30) -> Array:
    """Where the bins of a layer's outputs [samples, ...] begin: equal numbers of the distinct values of all its units.

    The smallest value lies alone below the first edge, so the zeros of a ReLU take no other's bin; values that occur
    often count once. (The authors' code asks for the activation's bound instead, and gives the largest value a bin of
    its own.) Entropy-based adaptive binning, Chelombiev et al. 2019.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins: give one or more")
    values = np.unique(t[:: -(-t.size // POOLED)])
    values = values[values > t.min()]
    found: Array = values[np.arange(bins if values.size else 0) * values.size // bins]
    return found


def binned(t: Array, y: Array, edges: Array) -> Information:
    """Information of outputs [samples, ...] and labels [samples] where ascending edges part the outputs into bins.

    H(T|X) = 0, so I(X;T) = H(T); I(T;Y) = H(T) + H(Y) - H(T, Y). Frequencies are the probabilities. Memory beside `t`:
    a byte for each of its numbers, two with over 255 edges.
    """
    t, y = _checked(t, y)
    kind, size = np.min_scalar_type(len(edges)), max(1, BLOCK // t.shape[1])
    rows: list[bytes] = []
    for at in range(0, len(t), size):
        rows += [row.tobytes() for row in np.searchsorted(edges, t[at : at + size], "right").astype(kind)]
    labels = y.tolist()
    entropy = _entropy(rows)
    return Information(entropy, entropy + _entropy(labels) - _entropy(zip(rows, labels, strict=True)))


def ebab(t: Array, y: Array, bins: int = 30) -> Information:
    """Information of outputs [samples, ...] and labels [samples] by entropy-based adaptive binning.

    A strictly increasing map of all outputs changes nothing. Memory is that of `binned` and of sorting up to 2^24
    numbers. Chelombiev et al. 2019.
    """
    t, y = _checked(t, y)
    return binned(t, y, edges(t, bins))


def kde(t: Array, y: Array, variance: float) -> tuple[Information, Information]:
    """Information of T' = T + N(0, variance I), lower and upper, of outputs [samples, ...] and labels [samples].

    For N equally likely samples I(X;T') is at least -1/N sum_i ln 1/N sum_j exp(-|t_i - t_j|^2 / 8 variance), and at
    most the same with 2 for 8 (Kolchinsky, Tracey 2017). I(T';Y) = H(T') - sum_y p(y) H(T'|y) has the lower bounds of
    all entropies, or the upper ones, as in Chelombiev et al. 2019: an estimate, no bound, and never over H(Y).
    Each thread holds 64 MB at most for up to 2^20 samples, however wide the layer.
    """
    t, y = _checked(t, y)
    if not 0 < variance < math.inf:
        raise ValueError(f"the noise has the variance {variance}: give a finite one above 0")
    outputs, labels = torch.from_numpy(t), torch.from_numpy(np.unique(y, return_inverse=True)[1])
    peers = labels.bincount()[labels].double()
    count, size = len(t), max(1, BLOCK // len(t))

    def terms(at: int) -> Tensor:
        """What samples from `at` on add to I(X;T') and I(T';Y), lower and upper: [4, samples]."""
        rows, found = slice(at, at + size), list[Tensor]()
        same = labels[rows, None] == labels
        kernel = _squares(outputs, rows, size).div_(-8 * variance).exp_()
        for power in (1, 4):  # the upper bound's kernel is the fourth power of the lower's
            if power == 4:
                kernel.square_().square_()
            whole, own = count / kernel.sum(1), kernel.where(same, 0.0).sum(1) / peers[rows]
            found += [whole.log2(), (own * whole).log2()]
        return torch.stack(found)

    parts = torch.cat(list(spread(terms, range(0, count, size))), 1)
    means = [math.fsum(row) / count for row in parts.tolist()]
    return Information(means[0], means[1]), Information(means[2], means[3])


def akde(t: Array, y: Array, noise: float = 1e-3) -> tuple[Information, Information]:
    """`kde`, lower and upper, where the noise follows the layer: its variance is `noise` times the square of max |t|.

    So scaling a layer changes nothing; where the largest output is 1, as tanh's, this is a fixed variance of `noise`.
    Adaptive kernel density estimation, Chelombiev et al. 2019.
    """
    t, y = _checked(t, y)
    largest = max(float(t.max()), -float(t.min()))
    if largest == 0:
        return Information(0.0, 0.0), Information(0.0, 0.0)
    return kde(t, y, noise * largest**2)


# ---------------------------------------------------------------- the plane


@dataclass(frozen=True)
class Point:
    """Where a layer is in the plane at an epoch: I(X;T) as `inputs` and I(T;Y) as `labels`, in bits."""

    epoch: int
    layer: str
    inputs: float
    labels: float


@dataclass(frozen=True)
class InformationPlane:
    """I(X;T) and I(T;Y) of a network's layers, recorded whenever asked as its training goes on.

    T is what a module returns for the samples of `data`, whose targets are classes. `layers` names modules; without it
    they are all that have no parts. A module that a pass calls again counts as name:2, name:3, ... (Shwartz-Ziv, Tishby
    2017.)
    """

    task: Task
    data: Data
    layers: Sequence[str] = ()
    estimator: Callable[[Array, Array], Information] = ebab
    points: list[Point] = field(default_factory=list)

    def record(self, epoch: int, model: nn.Module | None = None) -> None:
        """Add the points of a model, without one the task's, in evaluation mode.

        Each layer has passes of its own, so outputs of one layer are held at a time. Raises ValueError, naming the
        layer, where the model lacks it or never calls it, or its outputs are no finite numbers for each sample.
        """
        running = self.task.running(self.task.model if model is None else model)
        modules = dict(running.named_modules())
        names = list(self.layers) or [name for name, module in modules.items() if not list(module.children())]
        if missing := [name for name in names if name not in modules]:
            raise ValueError(f"{missing[0]}: the model has no such module: name some of its named_modules()")
        split = split_of(self.data, "the data of the plane")
        inputs, _ = next(iter(split.batches(BATCH)))
        called = self._outputs(running, {name: modules[name] for name in names}, inputs)
        if unused := set(self.layers) - {name for name, _ in called}:
            raise ValueError(f"{min(unused)}: the model never calls this module: name one that it calls")
        for name, number in called:
            layer = name if number == 1 else f"{name}:{number}"
            outputs, labels = [], []
            for inputs, targets in split.batches(BATCH):
                output = self._outputs(running, {name: modules[name]}, inputs).get((name, number))
                if output is None or output.dim() == 0 or len(output) != samples(targets):
                    raise ValueError(f"{layer}: does not return numbers for each sample: name other layers")
                outputs.append(output)
                labels.append(targets.cpu())
            try:
                found = self.estimator(torch.cat(outputs).numpy(), torch.cat(labels).numpy())
            except ValueError as error:
                raise ValueError(f"{layer}, epoch {epoch}: {error}") from error
            self.points.append(Point(epoch, layer, found.inputs, found.labels))

    def _outputs(
        self, model: nn.Module, modules: Mapping[str, nn.Module], inputs: Any
    ) -> dict[tuple[str, int], Tensor]:
        """What modules return in one pass over a batch, by name and number of the call, in the order of calls."""
        found: dict[tuple[str, int], Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            number = 1 + sum(name == other for other, _ in found)
            first = (reachable(output) or [torch.tensor(0.0)])[0]
            found[name, number] = first.float().cpu().clone()  # the next module may change it in place

        hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
        try:
            with one_thread(), torch.no_grad():
                self.task.outputs(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def figure(self) -> "Figure":
        """A picture of the plane: a marker a layer, a colour an epoch, a line through the layers of an epoch.

        Raises ImportError without matplotlib, ValueError before a model was recorded.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a picture needs matplotlib: pip install 'tersenet[report]'") from error
        if not self.points:
            raise ValueError("the plane has no points: record() a model first")
        epochs = sorted({point.epoch for point in self.points})
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.add_subplot(xlabel="I(X;T), bits", ylabel="I(T;Y), bits")
        for epoch in epochs:
            at = [(point.inputs, point.labels) for point in self.points if point.epoch == epoch]
            axes.plot(*zip(*at, strict=True), color="0.75", linewidth=0.6, zorder=1)
        for layer, marker in zip(dict.fromkeys(point.layer for point in self.points), cycle(MARKERS)):
            own = [point for point in self.points if point.layer == layer]
            dots = axes.scatter(
                [point.inputs for point in own],
                [point.labels for point in own],
                c=[epochs.index(point.epoch) for point in own],
                vmin=0,
                vmax=max(1, len(epochs) - 1),
                marker=marker,
                label=layer,
                zorder=2,
            )
        shown = sorted({round(k) for k in np.linspace(0, len(epochs) - 1, 6)})
        figure.colorbar(dots, label="epoch", ticks=shown).set_ticklabels([str(epochs[k]) for k in shown])
        axes.legend(title="layer", fontsize="small")
        return figure


# ---------------------------------------------------------------- parts


def _checked(t: Array, y: Array) -> tuple[Array, Array]:
    """Outputs as [samples, units] and labels, as NumPy's; raises ValueError for what is no sample, number or class."""
    t, y = np.asarray(t), np.asarray(y)
    if not t.size or y.shape != t.shape[:1]:
        raise ValueError(f"outputs {t.shape} with labels {y.shape}: give one output or more and one class a sample")
    if y.dtype.kind not in "iub":
        raise ValueError(f"labels are {y.dtype}: give classes as whole numbers")
    if not np.isfinite(t).all():
        raise ValueError("outputs hold NaN or infinity: look at the weights and the data")
    return np.require(t.reshape(len(t), -1), requirements=("C", "W")), y


def _entropy(things: Iterable[Hashable]) -> float:
    """Bits of the frequencies of equal things.

    >>> _entropy("aabb"), _entropy("aaaa")
    (1.0, 0.0)
    """
    counts = Counter(things).values()
    total = sum(counts)
    return math.fsum(count / total * math.log2(total / count) for count in counts)


def _squares(t: Tensor, rows: slice, size: int) -> Tensor:
    """|t_i - t_j|^2 of some rows i and all j of [samples, units], in double precision, `size` units at a time."""
    found = torch.zeros(len(t[rows]), len(t), dtype=torch.float64)
    for at in range(0, t.shape[1], size):
        part = t[:, at : at + size].double()
        part = part - part[0]  # equal outputs become zeros, and large means lose no digits
        norms = part.square().sum(1)
        found.addmm_(part[rows], part.T, alpha=-2).add_(norms).add_(norms[rows, None])
    found[:, rows].fill_diagonal_(0)
    return found.clamp_(min=0)

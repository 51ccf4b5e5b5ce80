"""Second moments of what each weight multiplies and of the loss gradients at its results, streamed over batches.

For a weight that takes inputs u to results with gradients g: A = E[u u^T] and G = E[sum of g g^T over a sample], the
gradients being of the log-likelihood of labels SAMPLED from the network's own prediction (the true Fisher of K-FAC,
Martens and Grosse 2015). Where a weight is used at many positions or in many calls, A is the mean over all, and G
the sum over those of a sample (the "expand" form of Eschenhagen et al. 2023). For convolutions G is made of the
gradients summed over positions ("reduce"), and a part of the diagonal of the other form, which does not vanish where a
norm behind the convolution makes the sum zero. Sums are float64. Batches are spread over the cores and added in order,
so the number of threads changes nothing.

An embedding's rows are looked up, so its row moments are how often that happens, weighed by the squared gradients
there, and its column moments those of the gradients. A weight of another kind, or one that is hidden in a
parametrization, gets the nearest factors of its own gradient's moments: with D [rows, n] the gradient over a batch of
sampled labels, which on average are independent, A is E[D^T D] and G is E[D D^T], scaled so that their traces' product
is E |D|^2.

Moments that would hold more than `MOST` numbers are kept as diagonal blocks: memory and time are bounded in the widest
layer. A weight that no result depends on has none.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.data import samples
from tersenet.display import progress
from tersenet.likelihood import Likelihood
from tersenet.task import Task, duplicate, one_thread, spread
from tersenet.tracing.operations import Form, Use, Watch

MOST = 1 << 23  # numbers in a moment: 64 MiB
EXPANDED = 0.1  # how much of the other form's diagonal is added to the moments of a convolution's gradients
SURE = 2  # labels drawn for moments over positions, of which there are many in a sample


@dataclass(frozen=True)
class Moments:
    """A as blocks [groups, k, b, b] and means [groups, n] of a weight's inputs, G as blocks [groups, l, d, d].

    Blocks lie side by side along n, and along the rows of a group; the last may go past the end, where it is zero.
    `bias` is the name of what is added to all results of the weight, in its order.
    """

    form: Form
    inputs: Tensor
    means: Tensor
    outputs: Tensor
    bias: str | None = None
    positions: int = 1 << 20  # how many inputs were seen

    @property
    def whole(self) -> bool:
        """Whether A is one block."""
        return self.inputs.shape[1] == 1


def blocks(n: int, groups: int, unit: int = 1) -> int:
    """The width of the diagonal blocks of an [n, n] moment of so many groups, in multiples of `unit`."""
    if groups * n * n <= MOST:
        return n
    most = max(1, MOST // (groups * n) // unit) * unit
    count = -(-n // most)
    return -(-n // (count * unit)) * unit


@dataclass
class Sums:
    """What the uses of one run of a parameter's rows add up to.

    `inputs` holds second moments around the mean of each call, since float32 squares of a large mean would lose what
    varies; `means` these, [groups, n], with how many inputs there were.
    """

    form: Form
    first: int
    inputs: Tensor
    outputs: Tensor
    means: list[tuple[Tensor, int]] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    biases: frozenset[str | None] = frozenset({None})

    def add(self, other: "Sums") -> None:
        self.inputs, self.outputs = self.inputs.double().add_(other.inputs), self.outputs.double().add_(other.outputs)
        self.means, self.biases = self.means + other.means, self.biases | other.biases
        self.extra = {name: part + other.extra[name] for name, part in self.extra.items()}

    def around_zero(self) -> tuple[Tensor, Tensor]:
        """The mean second moment around zero and the mean, over all positions of all calls."""
        if not self.means:
            return self.inputs.double(), torch.zeros(self.form.groups, self.form.columns, dtype=torch.double)
        total = max(1, self.positions)
        between = _gram(torch.stack([mean * math.sqrt(count) for mean, count in self.means], 1), self.unit)
        mean: Tensor = sum(mean * (count / total) for mean, count in self.means)  # type: ignore[assignment]
        return (self.inputs.double() + between) / total, mean

    @property
    def positions(self) -> int:
        return sum(count for _, count in self.means)

    @property
    def unit(self) -> int:
        """How many columns of A belong together: the places of a kernel."""
        return math.prod(self.form.kernel)


Found = dict[tuple[str, int, str], Sums]


def moments(
    task: Task,
    model: nn.Module,
    batches: Sequence[Any],
    likelihood: Likelihood,
    labels: int = 4,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> dict[str, Moments]:
    """Moments by the name of each parameter, over batches of inputs and `labels` sampled labels for each sample.

    The model is read in evaluation mode and left as it was. Tied weights gather what all their uses see, under the
    first of their names. With `only`, moments of other parameters are not made.
    """
    count = sum(map(samples, batches))

    def one(job: tuple[int, Any]) -> Found:
        return _batch_sums(task, model, job[1], likelihood, labels, seed + job[0], only)

    total: Found = {}
    with one_thread():
        for part in progress(spread(one, enumerate(batches)), "calibrating", len(batches)):
            for key, sums in part.items():
                _put(total, key, sums)
        parts: dict[str, list[Moments]] = {}
        for (name, _, kind), sums in total.items():
            made = _scaled(sums, kind, count)
            if all(float(part.diagonal(dim1=2, dim2=3).sum()) > 0 for part in (made.inputs, made.outputs)):
                parts.setdefault(name, []).append(made)
        return {name: _merged(found) for name, found in parts.items()}


def _batch_sums(
    task: Task,
    model: nn.Module,
    inputs: Any,
    likelihood: Likelihood,
    labels: int,
    seed: int,
    only: Collection[str] | None,
) -> Found:
    """The sums over one batch, by parameter, first row and kind of use."""
    generator = torch.Generator().manual_seed(seed)
    own = _free(model).to(task.device).eval()
    with Watch(own) as watch:
        outputs = task.outputs(own, inputs)
    known = {use.name for use in watch.uses}
    uses = [use for use in watch.uses if only is None or use.name in only]
    others = {n: p for n, p in own.named_parameters() if p.dim() > 1 and p.numel() and n not in known}
    others = {n: p for n, p in others.items() if only is None or n in only}
    asked = [use.out for use in uses] + list(others.values())
    if not asked:
        return {}
    collected = [_Collected(use) for use in uses]
    rest: Found = {}
    for turn in range(labels):
        with torch.enable_grad():
            loss = likelihood.sampled_loss(outputs, generator)
        if not loss.requires_grad:
            raise ValueError("the outputs do not depend on any weight: look at what Task(forward=...) returns")
        found = torch.autograd.grad(loss, asked, retain_graph=turn + 1 < labels, allow_unused=True)
        for part, gradient in zip(collected, found[: len(uses)], strict=True):
            if gradient is not None:
                part.take(gradient.detach(), turn)
        for (name, parameter), gradient in zip(others.items(), found[len(uses) :], strict=True):
            if gradient is not None:
                sums = _of_gradient(Form.plain(tuple(parameter.shape)), gradient.detach(), labels)
                _put(rest, (name, 0, "gradient"), sums)
        del found
    for use, part in zip(uses, collected, strict=True):
        kind = "tokens" if use.tokens is not None else "pooled" if use.pooled else "expanded"
        if part.turns:
            _put(rest, (use.name, use.first, kind), part.sums())
    return rest


def across(
    task: Task, models: tuple[nn.Module, nn.Module], batches: Sequence[Any], only: Collection[str]
) -> tuple[Form, int, Tensor, Tensor] | None:
    """E[u v^T] and E[v v^T] [groups, n, n] of what a parameter multiplies in one network, u, and in another, v.

    `only` are its names. Also gives how it lies and how many inputs were seen. None where it is no factor of a product,
    is used in parts, or is wider than one block of moments.
    """

    def one(batch: Any) -> tuple[Form, int, Tensor] | None:
        seen: list[list[Use]] = []
        for model in models:
            with torch.no_grad(), Watch(own := _free(model).to(task.device).eval()) as watch:
                task.outputs(own, batch)
            seen.append([use for use in watch.uses if use.name in only])
        form = seen[0][0].form if seen[0] else Form((), ())
        if not seen[0] or len(seen[0]) != len(seen[1]) or blocks(form.columns, form.groups) < form.columns:
            return None
        sums, count = torch.zeros(2, form.groups, form.columns, form.columns, dtype=torch.double), 0
        for use, other in zip(*seen, strict=True):
            if use.inputs is None or other.inputs is None or use.first or not use.form == other.form == form:
                return None
            u, v = (part.unrolled(part.inputs).double().cpu() for part in (use, other))
            sums, count = sums + torch.stack([u.transpose(1, 2) @ v, v.transpose(1, 2) @ v]), count + u.shape[1]
        return form, count, sums

    with one_thread():
        found = list(spread(one, batches))
        whole = [part for part in found if part is not None]
        if len(whole) < len(found) or not whole:
            return None
        count = sum(part[1] for part in whole)
        both = sum((part[2] for part in whole[1:]), whole[0][2]) / max(1, count)
    return whole[0][0], count, both[0], both[1]


def _free(model: nn.Module) -> nn.Module:
    """The same weights as parameters of their own that take gradients, frozen ones too."""
    fresh = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in model.parameters() if p.is_floating_point()}
    return duplicate(model, fresh)


def _put(found: Found, key: tuple[str, int, str], sums: Sums) -> None:
    if key in found:
        found[key].add(sums)
    else:
        found[key] = sums


class _Collected:
    """One use, and what the gradients of each drawn label add to it."""

    def __init__(self, use: Use) -> None:
        self.use, self.turns = use, 0
        self.outputs: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0
        self.counted = 0
        self.touched: Tensor | None = None

    def take(self, gradient: Tensor, turn: int) -> None:
        self.turns += 1
        use, g = self.use, self.use.results(gradient).float()
        if use.pooled:  # [groups, samples, positions, rows]
            self.squares = self.squares + g.square().sum((1, 2)).double().cpu()
            self.outputs = self.outputs + _gram(g.sum(2), 1)
            self.counted += 1
            return
        energy = g.square().sum(2)  # [groups, positions]
        there = (g != 0).any(2).any(0)
        self.touched = there if self.touched is None else self.touched | there
        if use.tokens is not None:
            self.energy = (
                self.energy + torch.zeros(use.form.rows).index_add_(0, use.tokens.cpu(), energy[0].cpu()).double()
            )
        if turn < SURE or g.shape[1] <= 64:
            self.outputs = self.outputs + _gram(g, 1)
            self.counted += 1

    def sums(self) -> Sums:
        use, form = self.use, self.use.form
        outputs = torch.as_tensor(self.outputs) / self.counted
        if use.tokens is not None:
            seen = torch.bincount(use.tokens.cpu(), minlength=use.form.rows).double()
            rows = torch.as_tensor(self.energy) / self.turns
            return Sums(form, 0, outputs, rows[None, :, None, None], extra={"seen": seen})
        assert use.inputs is not None
        u = use.unrolled(use.inputs)
        if not use.pooled and self.touched is not None and not bool(self.touched.all()):
            u = u[:, self.touched]  # what no gradient reaches, such as padding, says nothing
        extra = {}
        if use.pooled:
            extra["squares"] = torch.as_tensor(self.squares) / self.turns
        mean = (u.new_ones(len(u), 1, u.shape[1]) @ u)[:, 0] / max(1, u.shape[1])
        inputs, means = _gram((u - mean[:, None]).float(), math.prod(form.kernel)), [(mean.double().cpu(), u.shape[1])]
        return Sums(form, use.first, inputs, outputs, means, extra, frozenset({use.bias}))


def _gram(rows: Tensor, unit: int) -> Tensor:
    """Sums of u u^T over rows [groups, positions, n], as diagonal blocks [groups, k, b, b]."""
    groups, count, n = rows.shape
    peak = float(rows.abs().max()) if rows.numel() else 0.0
    if not 1e-12 < peak < 1e12:  # squares that float32 cannot hold
        rows = rows.double()
    width = blocks(n, groups, unit)
    if width == 1:
        return rows.square().sum(1).cpu()[..., None, None]
    number = -(-n // width)
    if number * width > n:
        rows = torch.nn.functional.pad(rows, (0, number * width - n))
    parts = rows.reshape(groups, count, number, width).transpose(1, 2)
    return (parts.transpose(2, 3) @ parts).cpu()


def _of_gradient(form: Form, gradient: Tensor, labels: int) -> Sums:
    """The factors of a parameter's own gradient, of one drawn label of `labels`."""
    d = form.matrix(gradient.to_dense() if gradient.layout != torch.strided else gradient).float()
    across, along = _gram(d, math.prod(form.kernel)) / labels, _gram(d.transpose(1, 2).contiguous(), 1) / labels
    return Sums(form, 0, across, along)


def _scaled(sums: Sums, kind: str, count: int) -> Moments:
    """The moments that sums over `count` samples make."""
    form, bias = sums.form, next(iter(sums.biases)) if len(sums.biases) == 1 else None
    outputs = sums.outputs.double() / count
    inputs, means = sums.around_zero()
    if kind == "gradient":
        size = inputs.diagonal(dim1=2, dim2=3).sum().clamp_min(1e-300)
        return Moments(form, inputs / size * form.columns, means, outputs / form.columns)
    if kind == "tokens":
        return _looked_up(sums, count)
    if "squares" in sums.extra:
        more = EXPANDED * sums.extra["squares"] / count  # [groups, rows]
        width = outputs.shape[-1]
        padded = torch.nn.functional.pad(more, (0, outputs.shape[1] * width - more.shape[1]))
        outputs = outputs + torch.diag_embed(padded.reshape(len(more), -1, width))
    whole = form.rows * form.groups
    if outputs.shape[0] * outputs.shape[1] * outputs.shape[2] < whole and form.groups == 1:
        outputs = _placed(outputs, sums.first, whole)
    return Moments(form, inputs, means, outputs, bias, sums.positions)


def _looked_up(sums: Sums, count: int) -> Moments:
    """An embedding: its rows' moments are how often they are looked up, smoothed for tokens that were not seen.

    Tokens seen once tell how much of what comes is unseen so far (Good 1953); that is shared out evenly.
    """
    seen, energy, size = sums.extra["seen"], sums.outputs[0, :, 0, 0], _trace(sums.inputs)
    unseen = min(0.5, max(0.01, float((seen == 1).sum() / seen.sum().clamp_min(1))))
    often = (1 - unseen) * energy / energy.sum().clamp_min(1e-300) + unseen / len(energy)
    width = sums.form.columns
    outputs = often * (size / count / width)
    means = torch.zeros(1, width, dtype=torch.double)
    return Moments(sums.form, sums.inputs.double() * (width / size), means, outputs[None, :, None, None])


def _placed(outputs: Tensor, first: int, whole: int) -> Tensor:
    """Row moments of a run of rows among those of the whole parameter."""
    size = outputs.shape[1] * outputs.shape[2]
    if outputs.shape[2] == 1 or blocks(whole, 1) < whole:
        found = torch.zeros(1, whole, 1, 1, dtype=outputs.dtype)
        found[0, first : first + size, 0, 0] = outputs.diagonal(dim1=2, dim2=3).reshape(-1)[:size]
        return found
    found = torch.zeros(1, 1, whole, whole, dtype=outputs.dtype)
    found[0, 0, first : first + size, first : first + size] = outputs[0, 0]
    return found


def _merged(found: list[Moments]) -> Moments:
    """The moments of a parameter from those of its kinds of use: the sum's nearest factors.

    A sum of Kronecker products is one where either factor is the same in all; else traces weigh them.
    """
    if len(found) == 1:
        return found[0]
    energies = [_trace(one.inputs) * _trace(one.outputs) for one in found]
    main = found[max(range(len(found)), key=energies.__getitem__)]
    same = [
        k for k, one in enumerate(found)
        if one.form.axes == main.form.axes and one.inputs.shape == main.inputs.shape
        and one.form.ordered == main.form.ordered
    ]  # fmt: skip
    if len({found[k].outputs.shape for k in same}) > 1:
        found = [_diagonal(one) for one in found]
    total = sum(energies[k] for k in same)
    sizes = {k: _trace(found[k].outputs) for k in same}
    inputs = sum(found[k].inputs * (sizes[k] / sum(sizes.values())) for k in same)
    means = sum(found[k].means * (sizes[k] / sum(sizes.values())) for k in same)
    outputs = sum(found[k].outputs * (_trace(found[k].inputs)) for k in same) / _trace(torch.as_tensor(inputs))
    outputs = outputs * (sum(energies) / total)
    biases = {one.bias for one in found}
    alike = len(same) == len(found) and all(torch.allclose(found[k].means, main.means, rtol=1e-4) for k in same)
    bias = biases.pop() if alike and len(biases) == 1 else None  # with other means it would take up other errors
    return Moments(main.form, torch.as_tensor(inputs), torch.as_tensor(means), torch.as_tensor(outputs), bias)


def _trace(blocks_: Tensor) -> float:
    return max(float(blocks_.diagonal(dim1=2, dim2=3).sum()), 1e-300)


def _diagonal(one: Moments) -> Moments:
    rows = one.outputs.diagonal(dim1=2, dim2=3).reshape(len(one.outputs), -1)[:, : one.form.rows]
    return Moments(one.form, one.inputs, one.means, rows[..., None, None], one.bias)

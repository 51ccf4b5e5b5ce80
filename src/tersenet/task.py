"""What a network is for: its model, data, loss and metric; trains it and measures it.

Every sum whose order could depend on the number of threads is kept out: training and measuring run each operation on
one thread, and evaluation spreads whole batches over the cores, so the same seed gives the same bits on any machine of
one kind.
"""

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet import cores
from tersenet.data import (
    Arrays,
    Batch,
    Data,
    Split,
    chunked,
    is_pair,
    mapped,
    reachable,
    samples,
    seeded,
    split_of,
    tensors,
)
from tersenet.display import progress
from tersenet.teacher import Teacher

Item = TypeVar("Item")
Found = TypeVar("Found")
HELD_OUT = 0.1  # the part of the training split that choices are made on, where the task brings no validation split
LARGEST = 1 << 19  # numbers in a batch of calibration inputs, which has fewer samples where these are large
LIKELIHOODS = ("classes", "bernoulli", "gaussian")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch operations on one thread, so that no result depends on how a sum was split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """`function` of each item, in order, on all cores; only a few items are taken ahead, so a stream is never held."""
    threads = cores.usable()
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Found]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is the target's."""
    return (outputs.argmax(1) == targets).double().mean()


@dataclass(frozen=True)
class Metric:
    """How good a network is: `function(outputs, targets)`, a number.

    `over` is "samples", for a mean over samples that is taken batch by batch, or "split", for a function of all outputs
    and targets of a split at once (correlations, perplexity): joined along axis 0, or as lists of the batches' parts
    where these do not join. `better` is "more" or "less".
    """

    function: Callable[[Any, Any], Any]
    over: str = "samples"
    better: str = "more"

    def __post_init__(self) -> None:
        if self.over not in ("samples", "split") or self.better not in ("more", "less"):
            raise ValueError("a Metric is over 'samples' or 'split', and better with 'more' or 'less'")

    def gain(self, found: float, than: float) -> float:
        """By how much `found` is better than `than`: below 0 where it is worse.

        >>> Metric(max, better="less").gain(1.5, 2.0)
        0.5
        """
        return found - than if self.better == "more" else than - found


def duplicate(model: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module without what `shared` holds by id; results that a forward pass left in it lose their graph."""
    memo = dict(shared or {})
    for layer in model.modules():
        memo |= {id(t): t.detach() for part in vars(layer).values() for t in tensors(part) if not t.is_leaf}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Schedule:
    """How the network is trained: SGD with Nesterov momentum, or Adam, the rate divided by ten at each of `drops`.

    `drops` are parts of the training time, e.g. (0.5, 0.75) of `epochs`. With `cosine` the rate falls along half a
    cosine instead (Loshchilov, Hutter 2017).
    """

    epochs: int = 10
    lr: float = 0.05
    batch: int = 128
    drops: tuple[float, ...] = (0.5, 0.75)
    momentum: float = 0.9
    weight_decay: float = 0.0
    adam: bool = False
    cosine: bool = False

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch.

        >>> [Schedule(epochs=4, lr=1.0).rate(e) for e in range(4)]
        [1.0, 1.0, 0.1, 0.01]
        >>> [round(Schedule(epochs=4, lr=1.0, cosine=True).rate(e), 3) for e in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        """
        if self.cosine:
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.lr / 10.0 ** sum(epoch >= drop * self.epochs for drop in self.drops)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """A fresh optimiser over these parameters."""
        if self.adam:
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        nesterov = self.momentum > 0
        return torch.optim.SGD(parameters, self.lr, self.momentum, 0.0, self.weight_decay, nesterov)


@dataclass(frozen=True)
class Task:
    """A model with its data; loss and metric default to classification, a plain metric is a mean where more is better.

    Data are `(inputs, targets)` in memory, a Dataset, a DataLoader or any list of batches; inputs are a tensor, or a
    tuple or dict of them. `forward(model, inputs)` gives the outputs; without it the model is called with the inputs
    (floats in its own type) and the first tensor of what it returns is taken. `valid` is the data that choices are made
    on; without it, a tenth of the training split, drawn by a fixed seed, is held back and never trained on.
    `likelihood` is what outputs parametrize: "classes", "bernoulli" or "gaussian"; without it the loss and the targets
    tell. `snapshots` are earlier weights by epoch, for weight rewinding (`trained` keeps them). `augment(inputs,
    generator)` makes a training batch's random variation. With a `teacher`, a module or a `Teacher`, training is
    towards its outputs instead of the loss. Everything runs on `device`.
    """

    model: nn.Module
    train: Data = None
    test: Data = None
    valid: Data = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metric: Any = accuracy
    schedule: Schedule = field(default_factory=Schedule)
    augment: Callable[[Any, torch.Generator], Any] | None = None
    snapshots: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    teacher: Any = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    device: str = "cpu"
    likelihood: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            object.__setattr__(self, "metric", Metric(self.metric))
        if isinstance(self.teacher, nn.Module):
            object.__setattr__(self, "teacher", Teacher((self.teacher,)))
        if self.likelihood not in (None, *LIKELIHOODS):
            raise ValueError(f"a likelihood is one of {', '.join(LIKELIHOODS)}, not {self.likelihood!r}")
        for name in ("train", "test", "valid"):
            data = getattr(self, name)
            if data is None:
                continue
            split = split_of(data, name)
            if is_pair(data) and isinstance(split, Arrays):
                object.__setattr__(self, name, (split.inputs, split.targets))

    # ------------------------------------------------------------ data

    def _train(self) -> Split:
        if self.train is None:
            raise ValueError("this needs training data, but the task has none: give Task(train=...)")
        split = split_of(self.train, "train")
        return split if self.valid is not None else split.parted(HELD_OUT)[0]

    def batches(self, epoch: int, seed: int, batch: int) -> Generator[Batch, None, None]:
        """One epoch of training batches on the device, shuffled and augmented by seed and epoch; none is held back.

        While they are read the global generators follow the seed too, so that dropout does.
        """
        mixed = seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(mixed)
        with seeded(mixed):
            for inputs, targets in self._train().batches(batch, mixed):
                changed = self.augment(inputs, generator) if self.augment else inputs
                yield self._placed(changed), self._placed(targets)

    def held(self) -> Split:
        """The data that choices are made on: the validation split, or the part held back from the training split."""
        if self.valid is not None:
            return split_of(self.valid, "valid")
        if self.train is None:
            raise ValueError("choices are made on data, but the task has none: give Task(train=...)")
        return split_of(self.train, "train").parted(HELD_OUT)[1]

    def calibration(self, count: int, size: int = 16) -> list[Any]:
        """Batches of training inputs for statistics, `count` samples in all, at most `size` in a batch where possible.

        Batches have fewer samples where these are large. They are drawn by a fixed seed, or read from the loader.
        """
        kept: list[Any] = []
        split, left = self._train(), count
        most = max(1, min(size, LARGEST // split.numbers()))
        for inputs, _ in split.batches(most, 0):
            for part in chunked(inputs, min(most, left), split):
                if left > 0:
                    kept.append(part)
                    left -= samples(part)
            if left <= 0:
                break
        if not kept:
            raise ValueError("this needs inputs, but the task's training data are empty: give Task(train=...)")
        return kept

    def example(self) -> Batch:
        """One batch of training data, inputs and targets."""
        return next(iter(self._train().batches(8)))

    # ------------------------------------------------------------ running

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """What the network says to a batch of inputs, which are put on the device."""
        inputs = self._placed(inputs)
        if self.forward is not None:
            return self.forward(model, inputs)
        floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        if floats is not None:
            inputs = mapped(inputs, lambda t: t.to(floats) if t.is_floating_point() else t)
        if isinstance(inputs, Mapping):
            found = model(**inputs)
        else:
            found = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
        if isinstance(found, Tensor):
            return found
        first = reachable(found)
        if not first:
            raise ValueError(f"the model returns {type(found).__name__}: give Task(forward=...) that picks a tensor")
        return first[0]

    def running(self, model: nn.Module) -> nn.Module:
        """A copy of the module to run on the device, in evaluation mode: it shares its weights, and no other state."""
        if torch.device(self.device).type != "cpu":
            return duplicate(model).to(self.device).eval()
        return duplicate(model, {id(p): p for p in model.parameters()}).eval()

    def score(self, data: Data, model: nn.Module | None = None) -> float:
        """The metric of a model in evaluation mode on a split, every sample counted once.

        Raises ValueError where it is not a finite number.
        """
        return self.measured(data, model)[0]

    def measured(self, data: Data, model: nn.Module | None = None, size: int = 500) -> tuple[float, list[float]]:
        """The metric on a split, and, of a metric over samples, that of each batch of about `size` samples."""
        metric, split, model = self.metric, split_of(data, "the split"), self.model if model is None else model

        def run(batch: Batch) -> tuple[Any, Any]:
            with torch.inference_mode():
                targets = self._placed(batch[1])
                outputs = self.outputs(self.running(model), batch[0])
                if metric.over == "samples":
                    return float(metric.function(outputs, targets)), samples(targets) or samples(batch[0])
                return mapped(outputs, torch.Tensor.cpu), mapped(targets, torch.Tensor.cpu)

        found = list(spread(run, split.batches(max(1, min(size, 8 * LARGEST // split.numbers())))))
        if not found:
            raise ValueError("the metric is measured on data, but the split holds no batch")
        if metric.over == "samples":
            value = math.fsum(v * n for v, n in found) / sum(n for _, n in found)
        else:
            value = float(metric.function(*(_joined(list(part)) for part in zip(*found, strict=True))))
        if not math.isfinite(value):
            raise ValueError(f"the metric is {value}: look at what the network says to the split, and at the metric")
        return value, [part for part, _ in found] if metric.over == "samples" else []

    def loss_of(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """What training lowers for a batch: the loss, or how far the network is from its teacher."""
        if self.teacher is None:
            return self.loss(self.outputs(model, inputs), targets)
        found: Tensor = self.teacher.loss(self, model, inputs, targets)
        return found

    def trained(self, seed: int = 0, keep: Iterable[int] = ()) -> "Task":
        """This task with its model trained by its schedule from where it stands; snapshots of the epochs in `keep`."""
        snapshots, kept = dict(self.snapshots), set(keep)
        model, schedule = self.model.train().to(self.device), self.schedule
        with one_thread():
            optimizer = schedule.optimizer(p for p in model.parameters() if p.requires_grad)
            for epoch in progress(range(schedule.epochs), "training, epochs", schedule.epochs):
                if epoch in kept:
                    state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
                    snapshots[epoch] = {n: t.detach().cpu().clone() for n, t in state.items()}
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(epoch)
                with contextlib.closing(self.batches(epoch, seed, schedule.batch)) as batches:
                    for inputs, targets in batches:
                        optimizer.zero_grad()
                        self.loss_of(model, inputs, targets).backward()  # type: ignore[no-untyped-call]
                        for parameter in model.parameters():  # Adam takes no sparse gradients
                            if parameter.grad is not None and parameter.grad.is_sparse:
                                parameter.grad = parameter.grad.to_dense()
                        optimizer.step()
        return replace(self, model=model.cpu().eval(), snapshots=snapshots)

    def _placed(self, things: Any) -> Any:
        return mapped(things, lambda tensor: tensor.to(self.device))


def _joined(parts: list[Any]) -> Any:
    """Batches' outputs along axis 0, or the list of them where they do not join."""
    if all(isinstance(part, Tensor) for part in parts):
        same = len({(part.dim(), tuple(part.shape[1:])) for part in parts}) == 1
        return torch.cat(parts) if same and parts[0].dim() else parts
    if all(isinstance(part, tuple | list) for part in parts) and len({len(part) for part in parts}) == 1:
        return tuple(_joined(list(part)) for part in zip(*parts, strict=True))
    return parts

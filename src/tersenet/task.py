"""What a network is for: its model, data, loss and metric; trains it and measures it.

Every sum whose order could depend on the number of threads is kept out: training and measuring run each operation on
one thread, and evaluation spreads whole batches over the cores, so the same seed gives the same bits on any machine of
one kind.
"""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data: TypeAlias = Any  # (inputs, targets) as arrays or tensors, or an iterable of such batches (a DataLoader)
Item = TypeVar("Item")
HELD = 0.1  # the part of the training split that choices are made on, where the task brings no validation split


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch operations on one thread, so that no result depends on how a sum was split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on the terminal while they are worked on (nothing where stderr is no terminal)."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, label, total=total, console=Console(stderr=True), transient=True)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is the target's."""
    return (outputs.argmax(1) == targets).double().mean()


def soft_targets(outputs: Tensor, wanted: Tensor, temperature: float = 3.0) -> Tensor:
    """T^2 times the divergence of softmax(outputs / T) from softmax(wanted / T) over axis 1, a mean over samples.

    The factor keeps gradients comparable when the temperature changes (Hinton, Vinyals, Dean 2015, section 2.1).
    """
    found, goal = ((z / temperature).log_softmax(1) for z in (outputs, wanted))
    samples = outputs.numel() / outputs.shape[1]
    return temperature**2 * F.kl_div(found, goal, reduction="sum", log_target=True) / samples


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
    """A model with its data; loss and metric default to classification, the metric is a mean where more is better.

    `valid` is the data that choices are made on; without it, the last tenth of an in-memory training split is held
    back. `snapshots` are earlier weights by epoch, for weight rewinding (`trained` keeps them). `augment(inputs,
    generator)` makes a training batch's random variation. With a `teacher`, stages train towards its outputs
    (`soft_targets`) instead of the loss.
    """

    model: nn.Module
    train: Data = None
    test: Data = None
    valid: Data = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = accuracy
    schedule: Schedule = field(default_factory=Schedule)
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    snapshots: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        for name in ("train", "test", "valid"):
            data = getattr(self, name)
            if _is_pair(data):
                inputs, targets = (torch.as_tensor(part) for part in data)
                if len(inputs) != len(targets) or not len(inputs):
                    raise ValueError(
                        f"{name} has {len(inputs)} inputs and {len(targets)} targets: give as many of both"
                    )
                object.__setattr__(self, name, (inputs, targets))

    def batches(self, epoch: int, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches, shuffled and augmented by seed and epoch; the held-back part is left out."""
        if self.train is None:
            raise ValueError("this stage trains, but the task has no training data: give Task(train=...)")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        if not _is_pair(self.train):
            torch.manual_seed(seed * 1_000_003 + epoch)
            yield from self.train
            return
        inputs, targets = self.train
        order = torch.randperm(len(inputs) - self._held_back, generator=generator)
        for part in order.split(batch):  # type: ignore[no-untyped-call]
            x = inputs[part]
            yield (self.augment(x, generator) if self.augment else x), targets[part]

    @property
    def _held_back(self) -> int:
        return int(len(self.train[0]) * HELD) if self.valid is None and _is_pair(self.train) else 0

    def held(self) -> Data:
        """The data that choices are made on: the validation split, or the held-back end of the training split."""
        if self.valid is not None:
            return self.valid
        if _is_pair(self.train):
            count = max(1, self._held_back)
            return self.train[0][-count:], self.train[1][-count:]
        return self.train

    def calibration(self, count: int) -> Tensor:
        """The first inputs of the training split, for statistics."""
        if _is_pair(self.train):
            return torch.as_tensor(self.train[0][: min(count, len(self.train[0]) - self._held_back)])
        kept: list[Tensor] = []
        for x, _ in self.train if self.train is not None else ():
            kept.append(x)
            if sum(map(len, kept)) >= count:
                break
        if not kept:
            raise ValueError("this needs inputs, but the task has no training data: give Task(train=...)")
        return torch.cat(kept)[:count]

    def loss_of(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """What training lowers: the loss, or how far the outputs are from the teacher's."""
        if self.teacher is None:
            return self.loss(outputs, targets)
        with torch.no_grad():
            wanted = self.teacher(inputs)
        return soft_targets(outputs, wanted)

    def score(self, data: Data, model: nn.Module | None = None) -> float:
        """The metric of a model in evaluation mode on a split, every sample counted once."""
        model = (self.model if model is None else model).eval()
        parts = zip(data[0].split(500), data[1].split(500), strict=True) if _is_pair(data) else data

        def measure(part: tuple[Tensor, Tensor]) -> tuple[float, int]:
            with torch.inference_mode():
                return float(self.metric(model(part[0]), part[1])), len(part[1])

        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
            scores = list(pool.map(measure, parts))
        return math.fsum(s * n for s, n in scores) / sum(n for _, n in scores)

    def samples(self, data: Data) -> int:
        return len(data[1]) if _is_pair(data) else sum(len(y) for _, y in data)

    def trained(self, seed: int = 0, keep: Iterable[int] = ()) -> "Task":
        """This task with its model trained by its schedule from where it stands; snapshots of the epochs in `keep`."""
        snapshots, kept = dict(self.snapshots), set(keep)
        model, schedule = self.model.train(), self.schedule
        with one_thread():
            optimizer = schedule.optimizer(model.parameters())
            for epoch in progress(range(schedule.epochs), "training", schedule.epochs):
                if epoch in kept:
                    snapshots[epoch] = {n: t.detach().clone() for n, t in model.state_dict().items()}
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(epoch)
                for x, y in self.batches(epoch, seed, schedule.batch):
                    optimizer.zero_grad()
                    self.loss(model(x), y).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        return replace(self, model=model.eval(), snapshots=snapshots)

    def digest(self) -> str:
        """A fingerprint of weights, data and schedule: what a kept result depends on."""
        parts = [repr(self.schedule), *(getattr(f, "__qualname__", "") for f in (self.loss, self.metric, self.augment))]
        mark = hashlib.sha256(repr(parts).encode())
        taught = {} if self.teacher is None else self.teacher.state_dict()
        for name, tensor in [*self.model.state_dict().items(), *taught.items()]:
            mark.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            mark.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        for data in (self.train, self.test, self.valid):
            if _is_pair(data):
                mark.update(f"{data[0].shape}{data[1].shape}".encode())
                mark.update(data[0][:64].numpy().tobytes())
                mark.update(data[1].numpy().tobytes())
        return mark.hexdigest()


def _is_pair(data: Data) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(hasattr(part, "shape") for part in data)

"""Train the float leaves of the trees, hold the integers: masked retraining, centroid tuning and scale learning alike.

`TrainLevels` trains the levels of `Uniform` nodes as well: a float weight stands behind each, is rounded on the way
forward, and takes the gradient straight through (Bengio, Leonard, Courville 2013). Steps stay what the quantization
chose, and levels that are zero stay zero, so that the file does not grow.
"""

import contextlib
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn
from torch.func import functional_call

from tersenet.activations import quantized
from tersenet.checkpoint import Checkpoint, Place
from tersenet.contract import DATA, Kind, check
from tersenet.data import Stream, split_of
from tersenet.display import progress
from tersenet.draft import Draft
from tersenet.likelihood import Likelihood
from tersenet.norms import folded_norms
from tersenet.packed import Uniform
from tersenet.running_statistics import warn_of_other_data
from tersenet.stages.network import Levels, Network, Partly, Shared
from tersenet.task import Schedule, Task, duplicate, one_thread
from tersenet.teacher import Teacher


def tune(
    draft: Draft,
    task: Task,
    schedule: Schedule,
    epochs: range,
    seed: int,
    label: str = "tuning",
    mean: bool = False,
    held: Mapping[str, Any] | None = None,
) -> Draft:
    """The draft with its trainable float leaves, biases and norms trained over `epochs` of the schedule.

    Buffers such as BatchNorm's running statistics follow, as in any training, but those of folded norms. What has
    `requires_grad` False is left as it is. With `mean` the gradient of a codeword is the mean of its members'. Places
    of plain weights where a mask in `held`, by name, is set keep their bits. Raises ValueError where the loss stops
    being a number.
    """
    if held is None:
        network = Shared(draft, task.device) if mean else Network(draft, task.device)
    else:
        network = Partly(draft, task.device, held)
    return trained(network, task, schedule, epochs, seed, label)


def trained(network: Network, task: Task, schedule: Schedule, epochs: range, seed: int, label: str) -> Draft:
    """The network's draft after its leaves were trained."""
    before = network.before
    if before.model is None:
        raise ValueError("this stage trains the network, but only arrays were given: use Task(model, ...)")
    if len(epochs) and not network.leaves:
        raise ValueError("this stage trains the network, but all of it is frozen or kept: set requires_grad")
    held = folded_norms(before.tensors)
    if len(epochs) and not isinstance(network, Levels):
        warn_of_other_data(task, schedule.batch)
    with one_thread():
        optimizer = schedule.optimizer(network.leaves)
        whole = _Whole(quantized(before.model, before.activations).to(task.device).train(), task)
        for name, layer in whole.model.named_modules():
            # Folded norms have no statistics to follow, nor have those of a network whose weights are levels, nor those
            # that are not trained.
            norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
            still = norm and (
                isinstance(network, Levels) or (layer.affine and f"{name}.weight" not in before.trainable)
            )
            if name in held or still:
                layer.eval()
        called = whole.model, task.loss, task.augment, task.forward, task.teacher
        course = before.tensors, type(network).__name__, schedule, epochs, seed
        checkpoint = Checkpoint(before.journal, optimizer, course, called)
        place = checkpoint.restored(network.tensors()) or Place(epochs.start)
        if isinstance(split_of(task.train, "train"), Stream):  # a loader may hang on how often it was read
            for epoch in range(epochs.start, place.epoch):
                deque(task.batches(epoch, seed, schedule.batch), 0)
        left = range(place.epoch, epochs.stop)
        for epoch in progress(left, f"{label}, epochs", len(left)):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(epoch)
            done = place.batch
            with contextlib.closing(task.batches(epoch, seed, schedule.batch)) as batches:
                for number, (inputs, targets) in enumerate(batches, 1):
                    if number <= done:  # it was trained on before the stop
                        if number == done:
                            checkpoint.go_on()
                        continue
                    optimizer.zero_grad(set_to_none=True)
                    state = {f"model.{name}": value for name, value in network.state().items()}
                    loss = functional_call(whole, state, (inputs, targets), tie_weights=False)
                    loss.backward()
                    optimizer.step()
                    network.follow({name.removeprefix("model."): value for name, value in state.items()})
                    place = Place(epoch, number, place.total + loss.item(), loss.item())
                    checkpoint.keep(place, network.tensors())
            if not place.batch:
                raise ValueError("this stage trains the network, but the training data hold no batch")
            if not math.isfinite(place.last):
                raise ValueError(
                    f"the loss became {place.last} in epoch {epoch}: lower the learning rate {schedule.lr}"
                )
            mean = round(place.total / place.batch, 6)
            before.journal.write(epoch=epoch, training=label, loss=mean, rate=schedule.rate(epoch))
            place = Place(epoch + 1)
        return network.draft()


class _Whole(nn.Module):
    """The network as the task trains it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs: Any, targets: Any) -> Any:
        return self.task.loss_of(self.model, inputs, targets)


@dataclass(frozen=True)
class Finetune:
    """Train what the trees leave free. Without `lr`, at a hundredth of the task's learning rate.

    The gradient of a codeword is the "sum" over its members, or the "mean".
    """

    epochs: int = 2
    lr: float | None = None
    seed: int = 0
    gradient: str = "sum"
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}

    def __post_init__(self) -> None:
        if self.gradient not in ("sum", "mean"):
            raise ValueError("the gradient of a codeword is the 'sum' over its members, or the 'mean'")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        rate = task.schedule.lr / 100 if self.lr is None else self.lr
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=rate, drops=(0.5,), weight_decay=0.0)
        return tune(draft, task, schedule, range(self.epochs), self.seed, mean=self.gradient == "mean")


@dataclass(frozen=True)
class Distill:
    """Train what the trees leave free towards the task's teacher or, where it has none, the network before compression.

    Of classes, which lie along axis 1, it learns the distribution, of yes or no the probability, else the outputs.
    The temperature and mix are these, whatever the teacher's own; features and the rest are the teacher's.
    The gradient of a codeword is the mean of its members', so that a rate serves clusters of any size.
    """

    epochs: int = 1
    lr: float = 0.01
    temperature: float = 1.0
    mix: float = 1.0
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        return self.tuned(draft, task, "distilling")

    def tuned(self, draft: Draft, task: Task, label: str) -> Draft:
        """The draft with what is trainable of it trained."""
        teacher, likelihood = task.teacher or Teacher((duplicate(task.model).eval(),)), Likelihood.of(task)
        if likelihood.kind == "classes" and likelihood.axis != 1:
            raise ValueError(
                f"distilling needs classes along axis 1 of the outputs, but they lie along axis {likelihood.axis}: "
                "give Task(forward=...) that moves them, with a loss and a metric for that"
            )
        kind = "gaussian" if likelihood.probabilities else likelihood.kind
        taught = replace(task, teacher=replace(teacher, temperature=self.temperature, mix=self.mix), likelihood=kind)
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=self.lr, drops=(0.5,), weight_decay=0.0)
        return tune(draft, taught, schedule, range(self.epochs), self.seed, label, mean=True)


@dataclass(frozen=True)
class TrainLevels:
    """Train a quantized network, its levels with it. Zeros stay zero.

    The rate is `lr`, a tenth of it from the middle on, or it falls along a cosine where the task's schedule does.
    """

    epochs: int = 10
    lr: float = 0.001
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {
        DATA: "trains the network: give a Task with training data",
        Uniform: "finds no levels: quantize first, with Waterfill or Pack(Uniform())",
    }

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        network = Levels(draft, task.device)
        if not network.leaves:
            raise ValueError("TrainLevels finds no levels: quantize first, with Waterfill or Pack(Uniform())")
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=self.lr, drops=(0.5,), weight_decay=0.0)
        return trained(network, task, schedule, range(self.epochs), self.seed, "training levels")

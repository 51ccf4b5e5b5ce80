"""What the zoo's networks are made with: their register, made-up data that can be learnt, and a short training."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import tersenet as tn

TRAIN, TEST = 160, 96  # samples of a task
LEARNT = 480  # samples that a network is trained on, of which the task gets the first


@dataclass(frozen=True)
class Network:
    """One of the zoo, the same at every `make`.

    `classes` is the axis of class scores, to which a constant may be added; `bits` are those of the rounding that it is
    compared with; `ratio` is the budget; where `again`, other runs must give the same bytes; a `blind` network is
    compressed by its state dict alone; `exact` names tensors that must come back bit for bit.
    """

    name: str
    build: Callable[[], Any]
    classes: int | None = 1
    bits: tuple[int, ...] = (4,)
    ratio: float = 8
    again: bool = False
    blind: bool = False
    exact: tuple[str, ...] = ()

    def make(self) -> Any:
        """The task, with its model trained where training says something, or the named arrays."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(self.name.encode()))
                return self.build()
        finally:
            torch.set_num_threads(threads)


NETWORKS: dict[str, Network] = {}


def network(**options: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter a function that makes a task, or named arrays, into the zoo under its own name."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        name = build.__name__
        assert name not in NETWORKS, name
        NETWORKS[name] = Network(name, build, **options)
        return build

    return enter


def less(function: Callable[[Any, Any], Any] = F.mse_loss, over: str = "samples") -> Any:
    """A metric of which less is better."""
    return tn.Metric(function, over=over, better="less")


def labelled(*shape: int, classes: int = 4, samples: int = LEARNT + TEST, noise: float = 0.7) -> tuple[Any, Any]:
    """Noisy copies of one pattern for each class, smooth along all axes but the first; positive in the mean."""
    targets = torch.randint(0, classes, (samples,))
    if len(shape) == 1:
        patterns = torch.randn(classes, *shape)
    else:
        coarse = torch.randn(classes, shape[0], *[max(2, n // 3) for n in shape[1:]])
        patterns = F.interpolate(coarse, shape[1:], mode=("linear", "bilinear", "trilinear")[len(shape) - 2])
    return patterns[targets] + 0.3 + noise * torch.randn(samples, *shape), targets


def taught(inputs: Any, *shape: int) -> tuple[Any, Any]:
    """Inputs with targets of a shape, each a smooth function of all inputs."""
    flat = inputs.flatten(1).float()
    hidden = torch.tanh(flat @ torch.randn(flat.shape[1], 24) / flat.shape[1] ** 0.5 * 1.5)
    size = int(torch.Size(shape).numel())
    return inputs, (hidden @ torch.randn(24, size) / 3).reshape(-1, *shape)


def latents(size: int) -> Any:
    return torch.randn(LEARNT + TEST, size)


def worded(length: int, words: int, classes: int = 4) -> tuple[Any, Any]:
    """Token sequences, of whose words each class prefers others."""
    targets = torch.randint(0, classes, (LEARNT + TEST,))
    liked = (1.5 * torch.randn(classes, words)).softmax(1)
    return torch.multinomial(liked[targets], length, replacement=True), targets


def chained(length: int, words: int) -> tuple[Any, Any]:
    """Token sequences in which each word tells much about the next, which is the target of its place."""
    following = (2.5 * torch.randn(words, words)).softmax(1)
    tokens = [torch.randint(0, words, (LEARNT + TEST,))]
    for _ in range(length):
        tokens.append(torch.multinomial(following[tokens[-1]], 1)[:, 0])
    whole = torch.stack(tokens, 1)
    return whole[:, :-1], whole[:, 1:].contiguous()


def part(data: Any, where: Any) -> Any:
    """The samples `where` of nested inputs, or of inputs and targets."""
    if isinstance(data, Mapping):
        return {name: part(one, where) for name, one in data.items()}
    if isinstance(data, tuple | list):
        return tuple(part(one, where) for one in data)
    return data[where]


def first(outputs: Any) -> Any:
    """The first tensor of a network's outputs."""
    while not isinstance(outputs, torch.Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs))
    return outputs


def called(model: nn.Module, inputs: Any) -> Any:
    """What most networks are called like."""
    if isinstance(inputs, Mapping):
        return first(model(**inputs))
    return first(model(*inputs) if isinstance(inputs, tuple | list) else model(inputs))


def fitted(
    model: nn.Module, data: Any, loss: Any, forward: Any = None, steps: int = 40, lr: float = 6e-3, sgd: bool = False
) -> nn.Module:
    """The model after some steps on batches of 32, in evaluation mode."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, 0.9) if sgd else torch.optim.Adam(parameters, lr)
    for _ in range(steps):
        inputs, targets = part(data, torch.randint(0, len(data[1]), (32,)))
        optimizer.zero_grad()
        loss((forward or called)(model, inputs), targets).backward()
        optimizer.step()
    return model.eval()


def learnt(model: nn.Module, data: Any, loss: Any = F.cross_entropy, **how: Any) -> tuple[nn.Module, Any, Any]:
    """The model, trained on all but the last samples of `data`; the first of these and the last, for the task."""
    seen, test = part(data, slice(0, -TEST)), part(data, slice(-TEST, None))
    return fitted(model, seen, loss, **how), part(seen, slice(0, TRAIN)), test


def task(
    model: nn.Module, data: Any, loss: Any = F.cross_entropy, *, steps: int = 40, lr: float = 6e-3, **options: Any
) -> Any:
    """The task of a model that was trained on the first samples of `data` and is tested on the last."""
    parts = learnt(model, data, loss, forward=options.get("forward"), steps=steps, lr=lr)
    if loss is F.mse_loss:
        options.setdefault("metric", less())
    return tn.Task(*parts, loss=loss, **options)

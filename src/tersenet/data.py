"""Where batches come from: arrays in memory, a Dataset, a DataLoader, or whatever can be iterated again and again.

A batch is (inputs, targets); either may be a tensor, or a tuple or dict of them, nested. Samples lie along the first
axis of arrays in memory; the batches of a loader are taken as they are.
"""

import contextlib
import functools
import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, default_collate

Data: TypeAlias = Any  # what a user gives: (inputs, targets) in memory, a Dataset, a DataLoader, an iterable of batches
Batch: TypeAlias = tuple[Any, Any]
TENTH = 10  # of so many batches of a loader that has no indices, the last is held back


def tensors(things: Any) -> list[Tensor]:
    """The tensors of a nested structure, in order."""
    if isinstance(things, Tensor):
        return [things]
    if isinstance(things, Mapping):
        return [tensor for part in things.values() for tensor in tensors(part)]
    if isinstance(things, tuple | list):
        return [tensor for part in things for tensor in tensors(part)]
    return []


def reachable(things: Any) -> list[Tensor]:
    """The tensors of whatever a model may return: a nested structure, a collection, or an object with attributes."""
    if isinstance(things, Tensor | Mapping | tuple | list):
        return tensors(things)
    if isinstance(things, Collection) and not isinstance(things, str | bytes):
        return tensors(list(things))
    return tensors(list(getattr(things, "__dict__", {}).values()))


def mapped(things: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with `change(tensor)` in place of every tensor; arrays become tensors first."""
    if isinstance(things, np.ndarray | np.generic):
        things = torch.as_tensor(things)
    if isinstance(things, Tensor):
        return change(things)
    if isinstance(things, Mapping):
        plain = {name: mapped(part, change) for name, part in things.items()}
        return plain if type(things) is dict or not hasattr(things, "update") else _refilled(things, plain)
    if isinstance(things, tuple) and hasattr(things, "_fields"):
        return type(things)(*(mapped(part, change) for part in things))
    if isinstance(things, tuple | list):
        return type(things)(mapped(part, change) for part in things)
    return things


def _refilled(things: Any, plain: dict[Any, Any]) -> Any:
    """A mapping of the same kind, such as a tokenizer's BatchEncoding, which models may ask for attributes."""
    try:
        return type(things)(plain)
    except TypeError:
        return plain


def samples(things: Any) -> int:
    """How many samples a batch holds: the first extent of its first tensor that has one."""
    return next((len(tensor) for tensor in tensors(things) if tensor.dim()), 1)


def is_pair(data: Data) -> bool:
    """Whether data are inputs and targets in memory; a list of two batches is not, though it has two parts."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    return isinstance(data, tuple) or all(hasattr(part, "shape") for part in data)


class Split(Protocol):
    """A split's batches, in a fixed order or in that of a seed."""

    @property
    def count(self) -> int | None:
        """Samples, where that is known."""

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """Batches of at most `size` samples; with a seed they are shuffled by it."""

    def parted(self, share: float) -> tuple["Split", "Split"]:
        """The split without a share of its samples, and that share."""

    def numbers(self) -> int:
        """How many numbers the inputs of one sample hold, where batches can be made of any size; else 1."""


@dataclass(frozen=True)
class Arrays:
    """Inputs and targets in memory, or those of them that `order` names."""

    inputs: Any
    targets: Any
    order: Tensor

    @property
    def count(self) -> int:
        return len(self.order)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        for part in _shuffled(self.order, seed).split(size):  # type: ignore[no-untyped-call]
            taken = functools.partial(torch.index_select, dim=0, index=part)
            yield mapped(self.inputs, taken), mapped(self.targets, taken)

    def numbers(self) -> int:
        return _numbers(self)

    def parted(self, share: float) -> tuple["Arrays", "Arrays"]:
        rest, held = _parted(self.order, share)
        return replace(self, order=rest), replace(self, order=held)


@dataclass(frozen=True)
class Indexed:
    """A Dataset with samples by index, and how a loader puts them together."""

    dataset: Any
    order: Tensor
    collate: Callable[[Any], Any] = default_collate
    workers: int = 0

    @property
    def count(self) -> int:
        return len(self.order)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        chosen = Subset(self.dataset, _shuffled(self.order, seed).tolist())
        drawn = torch.Generator().manual_seed(seed or 0)
        source = iter(DataLoader(chosen, size, collate_fn=self.collate, num_workers=self.workers, generator=drawn))
        for at in range(-(-len(chosen) // size)):
            with seeded((seed or 0) + at):  # what samples draw must not be the user's
                batch = next(source)
            yield _checked(batch)

    def numbers(self) -> int:
        return _numbers(self)

    def parted(self, share: float) -> tuple["Indexed", "Indexed"]:
        rest, held = _parted(self.order, share)
        return replace(self, order=rest), replace(self, order=held)


@dataclass(frozen=True)
class Stream:
    """Batches from an iterable, in its own order; `part` is 0 for all, 1 without those held back, 2 for these.

    Every tenth is held back, or the last where there are fewer. Random choices are made with the same seed each time,
    so that the same batches are held back.
    """

    source: Iterable[Any]
    part: int = 0
    every: int = TENTH

    @property
    def count(self) -> None:
        return None

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        with seeded(0):
            source = iter(self.source)
        at, kept = 0, None
        while True:
            with seeded(at):  # what is drawn between two batches, by dropout say, must not change the next
                batch = next(source, None)
            if batch is None:
                break
            held = at % self.every == self.every - 1
            if self.part == 0 or held == (self.part == 2):
                yield _checked(batch)
                kept = True
            elif kept is None:
                kept = False
            at += 1
        if kept is False and self.part == 2:  # a single batch: there is nothing else to choose on
            yield from Stream(self.source).batches(size)

    def numbers(self) -> int:
        return 1

    def parted(self, share: float) -> tuple["Stream", "Stream"]:
        first = sum(1 for _ in itertools.islice(Stream(self.source).batches(1), TENTH))
        every = first if first > 1 else TENTH
        return Stream(self.source, 1, every), Stream(self.source, 2, every)


def split_of(data: Data, name: str) -> Split:
    """The split that data stand for; raises ValueError for what can be read only once or holds no samples."""
    if isinstance(data, Arrays | Indexed | Stream):
        return data
    if is_pair(data):
        given = (torch.as_tensor(part) if isinstance(part, list) and not tensors(part) else part for part in data)
        inputs, targets = (mapped(part, _kept) for part in given)
        counts = {len(tensor) for tensor in tensors((inputs, targets)) if tensor.dim()}
        if samples(inputs) != samples(targets) or not samples(inputs) or len(counts) > 1:
            raise ValueError(
                f"{name} has {samples(inputs)} inputs and {samples(targets)} targets: give as many of both"
            )
        return Arrays(inputs, targets, torch.arange(samples(inputs)))
    if isinstance(data, DataLoader):
        plain = type(data.sampler) in (SequentialSampler, RandomSampler) and hasattr(data.dataset, "__getitem__")
        if not plain or data.batch_size is None or getattr(data.sampler, "replacement", False):
            return Stream(data)
        return Indexed(data.dataset, torch.arange(len(data.dataset)), data.collate_fn, data.num_workers)  # type: ignore[arg-type]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | tuple | Mapping):
        if not len(data):
            raise ValueError(f"{name} holds no samples")
        return Indexed(data, torch.arange(len(data)))
    if not isinstance(data, Iterable):
        raise ValueError(f"{name} is {type(data).__name__}: give (inputs, targets), a Dataset, a DataLoader or batches")
    if iter(data) is data:
        raise ValueError(f"{name} can be read only once: give a list of batches, a DataLoader, or (inputs, targets)")
    return Stream(data)


def chunked(inputs: Any, size: int, split: Split) -> list[Any]:
    """A batch's inputs in parts of at most `size` samples; those of a loader only where it says how many it holds."""
    extents = {len(tensor) if tensor.dim() else -1 for tensor in tensors(inputs)}
    whole = max(extents, default=-1)
    told = isinstance(split, Arrays) or (
        isinstance(split, Stream) and whole == getattr(split.source, "batch_size", None)
    )
    if len(extents) != 1 or whole <= size or not told:
        return [inputs]
    parts = ((at, min(size, whole - at)) for at in range(0, whole, size))
    return [mapped(inputs, functools.partial(torch.narrow, dim=0, start=at, length=length)) for at, length in parts]


def _numbers(split: Split) -> int:
    with seeded(0):
        inputs, _ = next(iter(split.batches(1)))
    return max(1, sum(tensor.numel() for tensor in tensors(inputs)))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every global generator seeded while it lasts, and then as it was."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _kept(tensor: Tensor) -> Tensor:
    return tensor


def _checked(batch: Any) -> Batch:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return mapped(batch[0], _kept), mapped(batch[1], _kept)
    if isinstance(batch, tuple | list) and len(batch) > 2:  # the last is the target, as loaders of triples have it
        return tuple(mapped(part, _kept) for part in batch[:-1]), mapped(batch[-1], _kept)
    if isinstance(batch, Mapping):
        names = [name for name in ("labels", "label", "target", "targets", "y") if name in batch]
        if names:
            rest = {name: mapped(part, _kept) for name, part in batch.items() if name != names[0]}
            return rest, mapped(batch[names[0]], _kept)
    raise ValueError(f"a batch is {type(batch).__name__}: batches are (inputs, targets), or dicts with 'labels'")


def _shuffled(order: Tensor, seed: int | None) -> Tensor:
    if seed is None:
        return order
    return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]


def _parted(order: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The order without a share of it, drawn by a fixed seed, and that share; at least one sample is in each."""
    mixed = _shuffled(order, 0)
    held = min(max(1, math.floor(share * len(mixed))), len(mixed) - 1) if len(mixed) > 1 else 0
    return (mixed[: len(mixed) - held], mixed[len(mixed) - held :]) if held else (mixed, mixed)

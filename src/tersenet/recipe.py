"""From a trained network to an artifact: a recipe is a tuple of stages, a stage takes a draft to a draft.

A draft holds every tensor of the network as a tree, so it is itself a file: each stage's result is kept under the hash
of all that led to it, and running again goes on from there.
"""

import copy
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tersenet.artifact import Artifact, Coding, FormatError, Tensor, load, relative_error
from tersenet.packed import Array, Packed, Tree, map_arrays, unpack
from tersenet.task import Task

FORMAT = 1  # of what is kept between runs: raise it when a stage's meaning changes
KEPT = "dense: no stage packed it"
BUFFER = "dense: a buffer, kept bit for bit"
TYPES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}


class PromiseBroken(RuntimeError):
    """The result is larger, or worse, than the budget allows."""


@dataclass(frozen=True)
class Budget:
    """What the file must keep to: bytes (`size`, e.g. 40000 or "40kB"), a ratio to 32-bit weights, or a drop in points.

    >>> Budget(size="1.5kB").bytes_for(0)
    1500
    >>> Budget(ratio=8).bytes_for(1000)
    500
    """

    size: int | str | None = None
    ratio: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("size", "ratio", "drop") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("a budget is one of size, ratio and drop")
        if isinstance(self.size, str):
            object.__setattr__(self, "size", parse_size(self.size))
        if (getattr(self, given[0]) or 0) < 0 or (given[0] != "drop" and not getattr(self, given[0])):
            raise ValueError(f"a budget's {given[0]} is above 0")

    def bytes_for(self, weights: int) -> int | None:
        """The most bytes that a network of so many weights may take, or None for a budget in accuracy."""
        if self.ratio is not None:
            return int(4 * weights / self.ratio)
        return None if self.size is None else int(self.size)


def parse_size(text: str) -> int:
    """Bytes: a number with B, kB, MB, GB (powers of ten) or KiB, MiB, GiB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kMG]?i?)B?\s*", text, re.IGNORECASE)
    units = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
    try:
        assert match is not None
        return int(float(match[1]) * units[match[2].lower()])
    except (AssertionError, KeyError, ValueError):
        raise ValueError(f"{text!r} is not a size: write 40000, 40kB or 1.5MB") from None


@dataclass(frozen=True)
class Draft:
    """The network under work: its module (None where only arrays were given) and every tensor as a tree."""

    model: nn.Module | None
    tensors: Mapping[str, Tensor]
    trainable: frozenset[str] = frozenset()

    @staticmethod
    def of_model(model: nn.Module) -> "Draft":
        """The draft of a module: tied weights are one tensor, buffers are kept bit for bit.

        Raises ValueError for NaN or infinite weights, naming the layer.
        """
        trainable = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        tensors: dict[str, Tensor] = {}
        first: dict[tuple[Any, ...], str] = {}
        for name, value in model.state_dict().items():
            where = (value.data_ptr(), tuple(value.shape), value.stride())
            if value.numel() and where in first:
                tensors[name] = tensors[first[where]]
                continue
            first[where] = name
            tensors[name] = _dense(name, value, name in trainable)
        return Draft(model, tensors, trainable)

    @staticmethod
    def of_arrays(arrays: Mapping[str, Array]) -> "Draft":
        """The draft of named arrays, which need no module: floats of two or more axes count as weights."""
        state = {n: a if isinstance(a, torch.Tensor) else torch.from_numpy(np.array(a)) for n, a in arrays.items()}
        return Draft(None, {n: _dense(n, t, t.is_floating_point()) for n, t in state.items()}, frozenset(state))

    def weights(self) -> list[str]:
        """The names that methods may pack: trainable floats of two axes or more, not empty, tied ones once."""
        seen, names = set[int](), []
        for name, tensor in self.tensors.items():
            shape = tensor.tree.shape
            fits = name in self.trainable and len(shape) >= 2 and np.prod(shape) > 0 and "float" in tensor.dtype
            if fits and id(tensor) not in seen:
                seen.add(id(tensor))
                names.append(name)
        return names

    def with_trees(self, trees: Mapping[str, Tree], note: str = "") -> "Draft":
        """The draft with new trees for some names; names tied to these follow."""
        renewed = {id(self.tensors[n]): replace(self.tensors[n], tree=t, note=note) for n, t in trees.items()}
        return replace(self, tensors={n: renewed.get(id(t), t) for n, t in self.tensors.items()})

    def with_notes(self, notes: Mapping[str, str]) -> "Draft":
        renewed = {id(self.tensors[n]): replace(self.tensors[n], note=note) for n, note in notes.items()}
        return replace(self, tensors={n: renewed.get(id(t), t) for n, t in self.tensors.items()})

    def module(self) -> nn.Module:
        """A copy of the module with the draft's weights in it."""
        if self.model is None:
            raise ValueError("this stage runs the network, but only arrays were given: use Task(model, ...)")
        return artifact_of(self).into(copy.deepcopy(self.model))  # type: ignore[no-any-return]

    def bias(self, weight: str) -> str | None:
        """The name of the bias that is added to a weight's output, where it has one that may change."""
        name = weight.removesuffix("weight") + "bias"
        held = self.tensors.get(name)
        fits = held is not None and name in self.trainable and held.tree.shape == self.tensors[weight].tree.shape[:1]
        return name if fits else None


def artifact_of(draft: Draft, coding: Coding | None = None, original: Mapping[str, Tensor] | None = None) -> Artifact:
    """The draft's file; with the original tensors, each packed tensor's error is measured and stored."""
    done: dict[int, Tensor] = {}
    for name, tensor in draft.tensors.items():
        error = None
        if original is not None and isinstance(tensor.tree, Packed):
            error = relative_error(tensor.unpack(), original[name].unpack())
        done.setdefault(id(tensor), replace(tensor, error=error))
    return Artifact({name: done[id(t)] for name, t in draft.tensors.items()}, coding or Coding())


def _dense(name: str, value: torch.Tensor, trainable: bool) -> Tensor:
    value = value.detach().cpu()
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise ValueError(f"{name}: {value.dtype} tensors of this layout cannot be stored; convert it to dense floats")
    dtype = TYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    if trainable and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: holds NaN or infinite weights; train it again or repair them before compressing")
    array = (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
    note = KEPT if trainable else BUFFER
    if not value.is_floating_point():
        note = "dense: not a floating-point tensor"
    return Tensor(array, dtype, "dense: empty" if not array.size else note)


class Stage(Protocol):
    """A frozen dataclass whose fields say all that its result depends on."""

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        """The draft after this stage."""


Recipe = Sequence[Stage]
Row = dict[str, Any]  # what a stage did: the stage, the density, the metric on the data for choosing, seconds


@dataclass(frozen=True)
class Result:
    """What compressing gave: the artifact and, where the task has test data, the metric before and after.

    `after` is measured on the file's bytes, opened again. `rows` tell what each stage, and each round of it, reached.
    """

    artifact: Artifact
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.artifact}\n"
        if self.after is not None and self.before is not None:
            text += f"test metric {self.before:.4f} -> {self.after:.4f} (from the reopened file)\n"
        return text + f"{self.seconds:.1f} s"


def run(draft: Draft, task: Task | None, recipe: Recipe, folder: Path | None, log: Callable[[Row], None]) -> Draft:
    """Run the stages and log a row for each; keep each result in `folder` under the hash of what led to it.

    A run that was stopped goes on after the last result that was kept. A stage with `parts`, such as the rounds of
    pruning, is kept part by part.
    """
    mark = hashlib.sha256(f"{FORMAT}{task.digest() if task else ''}".encode())
    if task is None:
        mark.update(artifact_of(draft).to_bytes())
    for stage in itertools.chain.from_iterable(map(_parts, recipe)):
        mark.update(repr(stage).encode())
        kept = None if folder is None else folder / f"{mark.hexdigest()[:24]}.terse"
        begun = time.monotonic()
        earlier = _kept(kept)
        if earlier is not None:
            draft = replace(draft, tensors=earlier.tensors)
            log({**earlier.meta, "kept": True})
            continue
        draft = stage(draft, task)
        row = {"stage": str(stage), **_measured(draft, task), "seconds": round(time.monotonic() - begun, 1)}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            Artifact(artifact_of(draft).tensors, Coding(("bits",)), row).save(kept)
        log(row)
    return draft


def _parts(stage: Stage) -> Sequence[Stage]:
    return stage.parts() if hasattr(stage, "parts") else (stage,)


def _measured(draft: Draft, task: Task | None) -> Row:
    """The part of the weights that is not zero and, with a task, the metric on its data for choosing."""
    dense = [dense_array(draft.tensors[name]) for name in draft.weights()]
    found: Row = {}
    if dense:
        found["density"] = round(float(sum(map(np.count_nonzero, dense)) / sum(w.size for w in dense)), 5)
    if task is not None and draft.model is not None and (task.train is not None or task.valid is not None):
        found["metric"] = round(task.score(task.held(), draft.module()), 5)
    return found


def _kept(path: Path | None) -> Artifact | None:
    """An earlier run's result; a file that is damaged or of another version is as good as none."""
    try:
        return load(path, limit=1 << 40) if path is not None and path.exists() else None
    except FormatError:
        return None


def cache_folder() -> Path:
    """Where stage results are kept unless a caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tersenet"


def round_leaves(tree: Tree, dtype: str = "float16") -> Tree:
    """The tree with each float leaf rounded to values that a narrower type holds exactly (leaves stay float32)."""

    def change(path: str, array: Array) -> Array:
        if "float" not in str(array.dtype):
            return array
        return torch.from_numpy(np.array(array)).to(getattr(torch, dtype)).to(torch.float32).numpy()

    return map_arrays(tree, change)


def dense_array(tensor: Tensor) -> Array:
    """The tensor's dense float32 array."""
    return np.asarray(unpack(tensor.tree), np.float32)

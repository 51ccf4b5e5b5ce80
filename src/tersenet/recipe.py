"""From a trained network to an artifact: a recipe is a tuple of stages, a stage takes a draft to a draft.

A draft holds every tensor of the network as a tree, so it is itself a file: each stage's result is kept under the hash
of all that led to it, and running again goes on from there.
"""

import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tersenet.artifact import FLOATS, Artifact, Coding, FormatError, Tensor, as_stored, load, relative_error
from tersenet.norms import FOLDED
from tersenet.packed import Array, Packed, Tree, map_arrays, unpack
from tersenet.task import Task, duplicate

FORMAT = 2  # of what is kept between runs: raise it when a stage's meaning changes
KEPT = "dense: no stage packed it"
BUFFER = "dense: a buffer, kept bit for bit"
PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
NOT_FINITE = "dense: NaN or infinite values"
EIGHT_BITS = "dense: 8-bit floats, kept bit for bit"
# Last parts of the names of what is no weight, for arrays that come without their module.
BUFFERS = (
    "running_*", "moving_mean", "moving_var*", "mean", "var", "std", "pixel_mean", "pixel_std", "num_batches_tracked",
    "*inv_freq", "freqs_cis", "cos_cached", "sin_cached", "*position_ids", "token_type_ids", "*mask*",
    "anchors", "anchor_grid", "*_index", "relative_coords_table", "zero_point", "betas", "*alphas_cumprod*",
)  # fmt: skip


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
    """The network under work: its module (None where only arrays were given) and every tensor as a tree.

    `folded` has, by the name of a folded norm, the weight that took its scale and, of a transposed convolution, its
    groups (else 0): of those norms for which the order of the tensors does not tell it (`stages/folding.py`).
    """

    model: nn.Module | None
    tensors: Mapping[str, Tensor]
    trainable: frozenset[str] = frozenset()
    folded: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @staticmethod
    def of_model(model: nn.Module) -> "Draft":
        """The draft of a module: tied weights are one tensor, buffers are kept bit for bit, extra state is left out.

        Raises ValueError for NaN or infinite weights, naming the layer.
        """
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        tensors = _dense(state, lambda name, array: name in parameters)
        weights = {name: tensor for name, tensor in tensors.items() if name in parameters and tensor.dtype in FLOATS}
        if broken := [name for name, tensor in weights.items() if tensor.note == NOT_FINITE]:
            raise ValueError(f"{broken[0]}: holds NaN or infinite weights; train it again or repair them first")
        return Draft(model, tensors, frozenset(weights))

    @staticmethod
    def of_arrays(arrays: Mapping[str, Array]) -> "Draft":
        """The draft of named arrays or torch tensors, which need no module: finite floats that are no buffers by name.

        Arrays that share their numbers are one tensor; extra state that is none is left out. Floats of two or more axes
        count as weights.
        """
        state = {n: a for n, a in arrays.items() if hasattr(a, "dtype") or n.rpartition(".")[2] != "_extra_state"}
        tensors = _dense(state, lambda name, array: not _is_buffer(name, array))
        return Draft(None, tensors, frozenset(name for name, tensor in tensors.items() if tensor.note == KEPT))

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
        """The draft with new trees for some names; names tied to these follow, and what is folded stays so."""
        before = {name: (self.tensors[name], tree) for name, tree in trees.items()}
        renewed = {id(b): replace(b, tree=t, note=FOLDED if b.note == FOLDED else note) for b, t in before.values()}
        return replace(self, tensors={n: renewed.get(id(t), t) for n, t in self.tensors.items()})

    def with_notes(self, notes: Mapping[str, str]) -> "Draft":
        renewed = {id(self.tensors[n]): replace(self.tensors[n], note=note) for n, note in notes.items()}
        return replace(self, tensors={n: renewed.get(id(t), t) for n, t in self.tensors.items()})

    def module(self) -> nn.Module:
        """A copy of the module with the draft's weights in it."""
        if self.model is None:
            raise ValueError("this stage runs the network, but only arrays were given: use Task(model, ...)")
        return artifact_of(self).into(duplicate(self.model))  # type: ignore[no-any-return]

    def bias(self, weight: str) -> str | None:
        """The name of the bias that is added to a weight's output, where it has one that may change."""
        name = weight.removesuffix("weight") + "bias"
        held = self.tensors.get(name)
        fits = held is not None and name in self.trainable and held.tree.shape == self.tensors[weight].tree.shape[:1]
        return name if fits else None


def artifact_of(draft: Draft, coding: Coding | None = None, original: Mapping[str, Tensor] | None = None) -> Artifact:
    """The draft's file; with the original tensors, the error of each that is packed or changed is measured and stored.

    Where norms are folded the originals are taken folded alike (`stages.folding.refolded`).
    """
    done: dict[int, Tensor] = {}
    for name, tensor in draft.tensors.items():
        error = None
        if original is not None and id(tensor) not in done and tensor.dtype in FLOATS:
            error = relative_error(tensor.unpack(), original[name].unpack())
            error = None if not error and not isinstance(tensor.tree, Packed) else error
        done.setdefault(id(tensor), replace(tensor, error=error))
    meta = {"folded": dict(draft.folded)} if draft.folded else {}
    return Artifact({name: done[id(t)] for name, t in draft.tensors.items()}, coding or Coding(), meta)


def _dense(state: Mapping[str, Array], is_weight: Callable[[str, Array], bool]) -> dict[str, Tensor]:
    """Every array as it came, with the reason; those that share their numbers are one tensor."""
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        array, dtype = as_stored(name, value)
        known = first.setdefault(_place(name, value), name)
        if known != name:
            tensors[name] = tensors[known]
            continue
        note = KEPT if is_weight(name, array) else BUFFER
        if not array.size:
            note = "dense: empty"
        elif dtype not in FLOATS:
            note = EIGHT_BITS if "float" in dtype else "dense: not a floating-point tensor"
        elif not np.isfinite(array).all():
            note = NOT_FINITE
        tensors[name] = Tensor(array.copy(), dtype, note)
    return tensors


def _place(name: str, value: Array) -> tuple[Any, ...]:
    """Where the numbers lie in memory and how they are laid out: the same for tied tensors, else unique."""
    if isinstance(value, torch.Tensor) and value.numel():
        return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, np.ndarray) and value.size:
        return value.ctypes.data, value.shape, value.strides, value.dtype
    return (name,)


def _is_buffer(name: str, array: Array) -> bool:
    """Whether an array without a module is no weight, as the last part of its name or a triangle of ones tells."""
    last = re.split(r"[./]", name.lower().removesuffix(":0"))[-1]
    square = array.ndim >= 2 and array.shape[-1] == array.shape[-2] > 1
    causal = square and not array[..., 0, 1:].any() and bool((array == np.tri(array.shape[-1], dtype=np.int8)).all())
    return causal or any(fnmatch(last, pattern) for pattern in BUFFERS)


class Stage(Protocol):
    """A frozen dataclass whose fields say all that its result depends on."""

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        """The draft after this stage."""


Recipe = Sequence[Stage]
Row = dict[str, Any]  # what a stage did: the stage, the density, the metric on the data for choosing, seconds


@dataclass(frozen=True)
class Choice:
    """What a drop was kept on: the data for choosing, how many samples of it, and the metric there before and after.

    `error` is the standard error of the difference, where the metric is a mean over samples.
    """

    samples: int | None
    before: float
    after: float
    error: float | None

    @staticmethod
    def of(task: Task, artifact: Artifact) -> "Choice":
        """Measured on the reopened file; the standard error comes from small batches."""
        held, models = task.held(), (task.model, load(artifact.to_bytes()).into(duplicate(task.model)))
        before, after = (task.score(held, model) for model in models)
        one, other = (task.measured(held, model, max(1, (held.count or 1) // 24))[1] for model in models)
        apart = [a - b for a, b in zip(other, one, strict=True)]
        error = float(np.std(apart, ddof=1) / math.sqrt(len(apart))) if len(apart) > 3 else None
        return Choice(held.count, before, after, error)

    def __str__(self) -> str:
        many = "batches" if self.samples is None else f"{self.samples:,} samples"
        spread = "" if self.error is None else f", standard error of the difference {self.error:.4f}"
        return f"metric {self.before:.4f} -> {self.after:.4f} on the {many} held back for choosing{spread}"


@dataclass(frozen=True)
class Result:
    """What compressing gave: the artifact and, where the task has test data, the metric before and after.

    `after` is measured on the file's bytes, opened again. `rows` tell what each stage, and each round of it, reached;
    `choice` tells what a drop was kept on.
    """

    artifact: Artifact
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    choice: Choice | None = None

    def __str__(self) -> str:
        text = f"{self.artifact}\n"
        if self.choice is not None:
            text += f"{self.choice}\n"
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
            draft = replace(draft, tensors=earlier.tensors, folded=earlier.meta.pop("folded", {}))
            log({**earlier.meta, "kept": True})
            continue
        draft = stage(draft, task)
        row = {"stage": str(stage), **_measured(draft, task), "seconds": round(time.monotonic() - begun, 1)}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            whole = artifact_of(draft)
            Artifact(whole.tensors, Coding(("bits",)), {**whole.meta, **row}).save(kept)
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


def precise(values: Array, dtype: str = "float16") -> Array:
    """Values as float32, rounded to a narrower type where each keeps the relative precision of its mantissa.

    Values too small or too large for the type do not.
    """
    single = np.asarray(values, np.float32)
    rounded = np.asarray(round_leaves(single, dtype))
    with np.errstate(invalid="ignore"):
        keeps = np.abs(rounded - single) <= PRECISION[dtype] * np.abs(single)
    return rounded if bool(keeps.all()) else single


def dense_array(tensor: Tensor) -> Array:
    """The tensor's dense float32 array."""
    return np.asarray(unpack(tensor.tree), np.float32)

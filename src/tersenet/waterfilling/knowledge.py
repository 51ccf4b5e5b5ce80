"""What is known of a network before it is quantized: its folded norms, its moments, what errors of each layer cost."""

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from tersenet.calibrate import Moments, moments
from tersenet.data import samples, split_of, tensors
from tersenet.draft import Draft
from tersenet.folding import folded
from tersenet.journal import Journal
from tersenet.likelihood import Likelihood
from tersenet.task import Task, one_thread, spread
from tersenet.tracing.operations import Form
from tersenet.waterfilling.lossless import Lossless, lossless

LONG = 5.0  # seconds from which on moments are kept for a run that goes on after a stop
EVERY = 5  # of so many batches one is not among those that moments are made of
Halves = tuple[Moments, Moments]


@dataclass(frozen=True)
class Knowledge:
    """A draft with BatchNorm folded, its layers' moments, and which bias is added to each weight's output.

    Moments come from two halves of the batches: how far the halves differ says how much to trust them. Every fifth
    batch is `held` back from them: feedback steers errors to where the others do not see them. `sensitivity` is what
    errors of a layer cost at the network's outputs, in parts of what its moments say. `lossless` has trees that lose
    nothing.
    """

    draft: Draft
    task: Task | None = None
    likelihood: Likelihood | None = None
    found: Mapping[str, Halves] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    held: Sequence[Any] = ()
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    lossless: Mapping[str, Lossless] = field(default_factory=dict)

    @staticmethod
    def of(draft: Draft, task: Task | None, count: int = 1024) -> "Knowledge":
        """Fold BatchNorm and gather the moments of `count` samples; without a task there are none."""
        if task is None or draft.model is None:
            return Knowledge(draft, lossless=lossless(_unique(draft)))
        known = split_of(task.train, "train").count or count
        batches = task.calibration(count, max(1, min(16, min(known, count) // (2 * EVERY))))
        likelihood = Likelihood.of(task)
        draft, norms = folded(draft, task, batches[:1])
        held = batches[EVERY - 1 :: EVERY] if len(batches) >= EVERY else batches
        rest = [batch for k, batch in enumerate(batches) if k % EVERY != EVERY - 1 or len(batches) < EVERY]
        seen = sum(map(samples, rest))
        labels = min(16, max(4, 4096 // seen))  # where there are few inputs, more labels make up for it in part
        model = draft.module()
        journal, two = draft.journal, len(rest) > 1
        one = _kept(journal, "moments", lambda: moments(task, model, rest[::2], likelihood, labels))
        drawn = functools.partial(moments, task, model, rest[1::2], likelihood, labels, seed=len(rest))
        other = _kept(journal, "more-moments", drawn) if two else one
        found = {}
        for name in {**one, **other}:
            halves = one.get(name) or other[name], other.get(name) or one[name]
            if not all(bool(part.isfinite().all()) for half in halves for part in (half.inputs, half.outputs)):
                raise ValueError(
                    f"{name}: what the layer sees of the calibration inputs is not finite: check Task(train=...)"
                )
            same = halves[0].form == halves[1].form and halves[0].outputs.shape == halves[1].outputs.shape
            found[name] = halves if same else (halves[0], halves[0])
        biases = {name: a.bias for name, (a, b) in found.items() if a.bias is not None and a.bias == b.bias}
        free = {name: bias for name, bias in biases.items() if bias in draft.trainable and _single(biases, bias)}
        return Knowledge(draft, task, likelihood, found, free | norms, held, lossless=lossless(_unique(draft)))


def _kept(journal: Journal, name: str, make: Callable[[], dict[str, Moments]]) -> dict[str, Moments]:
    """Moments that were made before the run was stopped, or those that are made now, kept where that took long."""
    earlier = journal.kept(name)
    if earlier is not None:
        parts = torch.load(io.BytesIO(earlier), weights_only=True)
        return {n: Moments(Form(*part.pop("form")), **part) for n, part in parts.items()}
    begun = time.monotonic()
    found = make()
    if journal.folder is not None and time.monotonic() - begun > LONG:
        flat = {
            n: {f.name: getattr(m, f.name) for f in fields(m)} | {"form": tuple(vars(m.form).values())}
            for n, m in found.items()
        }
        torch.save(flat, buffer := io.BytesIO())
        journal.keep(name, buffer.getvalue())
    return found


def joined(halves: Halves) -> Moments:
    """The moments of both halves together."""
    one, other = halves
    parts = {n: (getattr(one, n) + getattr(other, n)) / 2 for n in ("inputs", "means", "outputs")}
    return replace(one, **parts)


def _single(biases: Mapping[str, str], bias: str) -> bool:
    return sum(other == bias for other in biases.values()) == 1


def _unique(draft: Draft) -> dict[str, Any]:
    return {name: draft.tensors[name] for name in draft.weights()}


def outputs(task: Task, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """What a module says to batches of inputs."""

    def one(batch: Any) -> Any:
        with torch.no_grad():
            return on_cpu(task.outputs(task.running(model), batch))

    with one_thread():
        return list(spread(one, batches))


def on_cpu(things: Any) -> Any:
    return [tensor.detach().cpu() for tensor in tensors(things)]

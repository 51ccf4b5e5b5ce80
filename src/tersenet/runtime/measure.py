"""How long a network takes on packed weights, dense, and with torch's own 8 bits: what `terse bench` prints."""

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.artifact import Artifact
from tersenet.runtime.attaching import attached
from tersenet.task import Task

ROUNDS, SECONDS = 25, 20.0  # rounds over all networks, fewer where they would take longer
BATCHES = 1, 32


def report(artifact: Artifact, task: Task, threads: int = 1) -> list[str]:
    """Lines: how long each network takes to make and to run, what it holds, and why each layer is as it is.

    Forms are chosen anew for each batch; inputs are the task's. Medians of rounds in which networks take turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        head = f"{'batch':>5} {'network':<22} {'ms':>9} {'x dense':>8} {'made in ms':>11} {'MB held':>8} {'error':>8}"
        lines, reasons = [head], list[str]()
        for batch in BATCHES:
            found, why = _rows(artifact, task, batch)
            lines += found
            told = (f"{name or 'the network'}: {text}" for name, text in why.items())
            reasons += ["", f"for a batch of {batch}:", *told]
        return [*lines, *reasons]
    finally:
        torch.set_num_threads(before)


def _rows(artifact: Artifact, task: Task, batch: int) -> tuple[list[str], dict[str, str]]:
    """A line for each network, and why each layer is as it is."""
    with contextlib.closing(task.batches(0, 0, batch)) as batches:
        inputs = next(batches)[0]
    networks, why = _networks(artifact, task, batch)
    outputs = {name: _said(task, model, inputs) for name, (model, _) in networks.items()}
    spent = in_turn([functools.partial(_said, task, model, inputs) for model, _ in networks.values()])
    lines = []
    for (name, (model, made)), seconds in zip(networks.items(), spent, strict=True):
        error = float((outputs[name] - outputs["dense"]).norm() / outputs["dense"].norm().clamp_min(1e-30))
        lines.append(
            f"{batch:>5} {name:<22} {1e3 * seconds:>9.3f} {spent[0] / seconds:>8.2f} {1e3 * made:>11.1f}"
            f" {held(model) / 1e6:>8.2f} {error:>8.1e}"
        )
    return lines, why


def _networks(artifact: Artifact, task: Task, batch: int) -> tuple[dict[str, tuple[nn.Module, float]], dict[str, str]]:
    """By name, each network and the seconds that it took to make."""
    reasons = dict[str, str]()

    def packed(activations: int) -> nn.Module:
        model, why = attached(copy.deepcopy(task.model), artifact.tensors, batch, activations)
        reasons.update(why)
        return model.eval()

    def eight_bits() -> nn.Module:
        with warnings.catch_warnings(action="ignore"):
            dynamic: Any = torch.ao.quantization.quantize_dynamic  # of linear and recurrent layers
            return dynamic(artifact.into(copy.deepcopy(task.model)).eval(), dtype=torch.qint8)  # type: ignore[no-any-return]

    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: artifact.into(copy.deepcopy(task.model)).eval(),
        "torch's dynamic int8": eight_bits,
        "packed, 8-bit inputs": lambda: packed(8),
        "packed": lambda: packed(24),  # the last, whose reasons stay
    }
    made = dict[str, tuple[nn.Module, float]]()
    for name, make in makers.items():
        begun = time.perf_counter()
        model = make()
        made[name] = model, time.perf_counter() - begun
    return made, reasons


def _said(task: Task, model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = task.outputs(model, inputs)
        return found


def in_turn(actions: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each action: medians of rounds over all of them."""
    spent: list[list[float]] = [[] for _ in actions]
    begun = time.perf_counter()
    while len(spent[0]) < 3 or (len(spent[0]) < ROUNDS and time.perf_counter() - begun < SECONDS):
        for own, action in zip(spent, actions, strict=True):
            action()
            start = time.perf_counter()
            action()
            own.append(time.perf_counter() - start)
    return [float(np.median(own)) for own in spent]


def held(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; torch keeps those of its quantized layers packed in their state."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if callable(weight):
            own: Any = weight()
            tensors[id(layer)] = own
    return sum(t.numel() * t.element_size() for t in tensors.values())

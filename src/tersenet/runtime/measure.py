"""How long a network takes on packed weights, dense, and with torch's own 8 bits: what `terse bench` prints."""

import contextlib
import copy
import functools
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn

from tersenet import activations
from tersenet.artifact import Artifact, load
from tersenet.journal import held_by_process
from tersenet.runtime.attaching import attached
from tersenet.task import Task

Found = TypeVar("Found")
ROUNDS, SECONDS = 25, 20.0  # rounds over all networks, fewer where they would take longer
BATCHES = 1, 32


class Use(NamedTuple):
    """The first use of a network: seconds until it was made and until it had run, and bytes that it took at most."""

    made: float
    ran: float
    memory: float


def first_use(make: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> Use:
    """Make a network and run it once. Memory is by how much this process grows at most, nan where it is not Linux.

    It is told well in a fresh process alone (`alone`): where memory was free already, none is taken.
    """
    before = math.nan
    with contextlib.suppress(OSError):  # a system without it, or one that forbids it
        # From here on VmHWM counts; rusage has the most of the parent in it.
        Path("/proc/self/clear_refs").write_text("5")
        before = held_by_process("VmRSS") or math.nan
    begun = time.perf_counter()
    network = make()
    made = time.perf_counter() - begun
    with torch.inference_mode():
        run(network)
    return Use(made, time.perf_counter() - begun, (held_by_process("VmHWM") or math.nan) - before)


def alone(function: Callable[..., Found], *arguments: Any) -> Found:
    """What a function of a module says in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(file: Path, task: Task, again: Callable[[], Task], threads: int = 1) -> list[str]:
    """Lines: how long each network takes to make and to run, what it holds, and why each layer is as it is.

    Forms are chosen anew for each batch; inputs are the task's. Medians of rounds in which networks take turns. The
    peak is of fresh processes, each with a task that `again` makes there: how much more than with the task alone they
    hold at most while they load the file and run a batch.
    """
    artifact, before = load(file), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        head = f"{'batch':>5} {'network':<22} {'ms':>9} {'x dense':>8} {'made in ms':>11} {'MB held':>8} {'peak MB':>8}"
        lines, reasons = [f"{head} {'error':>8}"], list[str]()
        for batch in BATCHES:
            peaks = {name: alone(_once, name, file, again, batch, threads).memory for name in ("dense", "packed")}
            found, why = _rows(artifact, task, batch, peaks)
            lines += found
            told = (f"{name or 'the network'}: {text}" for name, text in why.items())
            reasons += ["", f"for a batch of {batch}:", *told]
        return [*lines, *reasons]
    finally:
        torch.set_num_threads(before)


def _rows(
    artifact: Artifact, task: Task, batch: int, peaks: Mapping[str, float]
) -> tuple[list[str], Mapping[str, str]]:
    """A line for each network, and why each layer is as it is."""
    inputs, made = _inputs(task, batch), dict[str, tuple[nn.Module, float]]()
    for name, make in MAKERS.items():
        begun = time.perf_counter()
        model, why = make(artifact, copy.deepcopy(task.model), batch)  # of the last, the reasons stay
        made[name] = model.eval(), time.perf_counter() - begun
    outputs = {name: _said(task, model, inputs) for name, (model, _) in made.items()}
    spent = in_turn([functools.partial(_said, task, model, inputs) for model, _ in made.values()])
    lines = []
    for (name, (model, taken)), seconds in zip(made.items(), spent, strict=True):
        error = float((outputs[name] - outputs["dense"]).norm() / outputs["dense"].norm().clamp_min(1e-30))
        peak = f"{peaks[name] / 1e6:.2f}" if name in peaks else ""
        lines.append(
            f"{batch:>5} {name:<22} {1e3 * seconds:>9.3f} {spent[0] / seconds:>8.2f} {1e3 * taken:>11.1f}"
            f" {held(model) / 1e6:>8.2f} {peak:>8} {error:>8.1e}"
        )
    return lines, why


Made: TypeAlias = tuple[nn.Module, Mapping[str, str]]  # a network, and a sentence for each layer


def _dense(artifact: Artifact, model: nn.Module, batch: int) -> Made:
    return activations.into(artifact, model), {}


def _eight_bits(artifact: Artifact, model: nn.Module, batch: int) -> Made:
    with warnings.catch_warnings(action="ignore"):
        dynamic: Any = torch.ao.quantization.quantize_dynamic  # of linear and recurrent layers
        return dynamic(artifact.into(model).eval(), dtype=torch.qint8), {}


def _packed(artifact: Artifact, model: nn.Module, batch: int, bits: int = 24) -> Made:
    return attached(model, artifact, batch, bits)


MAKERS: dict[str, Callable[[Artifact, nn.Module, int], Made]] = {
    "dense": _dense,
    "torch's dynamic int8": _eight_bits,
    "packed, 8-bit inputs": functools.partial(_packed, bits=8),
    "packed": _packed,
}


def _inputs(task: Task, batch: int) -> Any:
    with contextlib.closing(task.batches(0, 0, batch)) as batches:
        return next(batches)[0]


def _once(name: str, file: Path, again: Callable[[], Task], batch: int, threads: int) -> Use:
    """The first use of one of the networks."""
    torch.set_num_threads(threads)
    task = again()
    inputs = _inputs(task, batch)

    def made() -> nn.Module:
        return MAKERS[name](load(file), task.model, batch)[0].eval()

    return first_use(made, lambda model: _said(task, model, inputs))


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

"""Learned step size quantization: weights of few bits trained through rounding, their steps with them.

Esser, McKinstry, Bablani, Appuswamy, Modha (2020): forward s round(clip(w / s)), where rounding passes gradients
straight through; so the step's own gradient sees where in its cell each weight lies. It is scaled by 1 / sqrt(N Q).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.draft import Draft
from tersenet.methods import repack
from tersenet.packed import Array, Packed, Tree, Uniform, narrowed, unpack
from tersenet.stages.finetune import trained
from tersenet.stages.network import Network
from tersenet.structure import is_plain, refilled, support
from tersenet.task import Task
from tersenet.where import Where, chosen

STEPS = 64  # that are tried for a frozen weight, from a tenth of the largest that makes sense


@dataclass(frozen=True)
class LSQ:
    """Train all plain weights at `bits` bits (2 gives -2 to 1), each with one step; rules give other bits, or None.

    At the task's own schedule, its rate a tenth. Zeros of pruned weights stay zero; frozen weights are rounded before.
    """

    bits: int = 4
    rules: tuple[tuple[Where | str, int | None], ...] = ()
    epochs: int = 5
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}
    refuses: ClassVar[Mapping[Kind, str]] = dict.fromkeys(PACKED, "it quantizes itself: train plain weights")
    makes: ClassVar[tuple[Kind, ...]] = (Uniform,)

    def __post_init__(self) -> None:
        if not all(2 <= bits <= 8 for bits in (self.bits, *(b for _, b in self.rules if b is not None))):
            raise ValueError("LSQ takes 2 to 8 bits")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        told = dict.fromkeys(draft.weights(), self.bits) | {n: b for n, (_, b) in chosen(draft, self.rules).items()}
        bits = {n: b for n, b in told.items() if b is not None and is_plain(draft.tensors[n].tree)}
        frozen = bits.keys() & draft.frozen()
        draft = draft.with_trees({n: repack(draft.tensors[n].tree, _Rounded(bits[n])) for n in sorted(frozen)})
        bits = {n: b for n, b in bits.items() if n not in frozen}
        schedule = replace(task.schedule, lr=task.schedule.lr / 10, epochs=max(self.epochs, 1))
        network = _Stepping(draft, task.device, bits)
        return trained(network, task, schedule, range(self.epochs), self.seed, "training at few bits")


class _Stepping(Network):
    """The draft's trees as torch leaves, plain weights behind levels of few bits with steps that are learned."""

    def __init__(self, draft: Draft, device: str, bits: Mapping[str, int]) -> None:
        self.bits = {id(draft.tensors[name].tree): b for name, b in bits.items()}
        super().__init__(draft, device)

    def _tree(self, tree: Tree) -> Tree:
        bits = self.bits.get(id(tree))
        if bits is None:
            return super()._tree(tree)
        dense, there = np.asarray(unpack(tree), np.float32), support(tree)
        last = 2 ** (bits - 1) - 1
        size = float(np.abs(dense[there]).mean()) if there.any() else 0.0
        weight = self._leaf("", dense)
        step = self._leaf("", np.asarray(2 * size / last**0.5 if size else 1.0, np.float32))
        return _Learned(weight, step, self._held("", there), last, tree)

    def _arrays(self, tree: Tree, read: Callable[[str, Array], Array]) -> Tree:
        if not isinstance(tree, _Learned):
            return super()._arrays(tree, read)
        with torch.no_grad():
            q = read("", tree.levels()).astype(np.int32)
        step = np.abs(np.asarray(read("", tree.step), np.float32))
        return repack(refilled(tree.before, q.astype(np.float32)), _Stepped(step))


@dataclass(frozen=True, eq=False)
class _Learned(Packed):
    """Weights through levels from -last - 1 to last."""

    weight: torch.Tensor
    step: torch.Tensor
    mask: torch.Tensor
    last: int
    before: Tree

    def levels(self, step: torch.Tensor | None = None) -> torch.Tensor:
        step = self.step.abs() if step is None else step
        inside = (self.weight / step.clamp(min=1e-30)).clamp(-self.last - 1, self.last)
        return (inside + (inside.round() - inside).detach()) * self.mask

    def unpack(self) -> torch.Tensor:
        part = 1 / (self.weight.numel() * self.last) ** 0.5
        step = self.step.abs()
        step = step * part + (step - step * part).detach()
        dense: torch.Tensor = step * self.levels(step)
        return dense

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


@dataclass(frozen=True)
class _Rounded:
    """Values at the nearest levels, by the step that loses least of STEPS."""

    bits: int
    needs: ClassVar[tuple[str, ...]] = ()

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        w, last = np.asarray(w, np.float32), 2 ** (self.bits - 1) - 1
        best = np.inf, np.zeros(w.shape, np.float32), np.float32(1)
        for part in np.linspace(0.1, 1, STEPS):
            step = np.float32(part * np.abs(w).max() / last) or np.float32(1)
            q = np.rint(np.clip(w / step, -last - 1, last))
            best = min(best, (float(np.square(w - q * step).sum()), q, step), key=lambda found: found[0])
        return Uniform(narrowed(best[1].astype(np.int32)), np.asarray(best[2]))


@dataclass(frozen=True, eq=False)
class _Stepped:
    """Values that are levels, with a step."""

    step: Array
    needs: ClassVar[tuple[str, ...]] = ()

    def pack(self, w: Array, stats: dict[str, Any] | None = None) -> Packed:
        return Uniform(narrowed(np.asarray(w).astype(np.int32)), self.step)

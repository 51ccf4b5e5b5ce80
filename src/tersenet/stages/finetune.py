"""Train the float leaves of the trees, hold the integers: masked retraining, centroid tuning and scale learning alike.

The gradient of a codeword is the SUM over its members, as Deep Compression has it (Han, Mao, Dally 2016, section 3.3):
it falls out of differentiating `unpack`. Pruned weights have no leaf, so no momentum or weight decay can move them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor as Array
from torch.func import functional_call

from tersenet.artifact import Tensor
from tersenet.packed import Packed, Tree, map_arrays, unpack
from tersenet.recipe import Draft
from tersenet.task import Schedule, Task, one_thread, progress


def tune(draft: Draft, task: Task, schedule: Schedule, epochs: range, seed: int, label: str = "tuning") -> Draft:
    """The draft with its trainable float leaves, biases and norms trained over `epochs` of the schedule.

    Buffers such as BatchNorm's running statistics follow, as in any training. Raises ValueError where the loss stops
    being a number.
    """
    if draft.model is None:
        raise ValueError("this stage trains the network, but only arrays were given: use Task(model, ...)")
    with one_thread():
        network = _Network(draft)
        optimizer = schedule.optimizer(network.leaves)
        model = draft.model.train()
        for epoch in progress(epochs, label, len(epochs)):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(epoch)
            for x, y in task.batches(epoch, seed, schedule.batch):
                optimizer.zero_grad(set_to_none=True)
                loss = task.loss(functional_call(model, network.state(), (x,), tie_weights=False), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the loss became {loss.item()} in epoch {epoch}: lower the learning rate {schedule.lr}"
                )
        model.eval()
        return network.draft()


class _Network:
    """The draft's trees as torch leaves, the dense weights they make, and the way back."""

    def __init__(self, draft: Draft) -> None:
        self.before, self.leaves = draft, list[Array]()
        self.trees: dict[int, Tree] = {}
        for name, tensor in draft.tensors.items():
            if id(tensor) not in self.trees:
                leaf = self._leaf if name in draft.trainable else _held
                self.trees[id(tensor)] = map_arrays(tensor.tree, leaf)

    def _leaf(self, path: str, array: object) -> Array:
        made = _held(path, array)
        if made.is_floating_point():
            made = made.float().requires_grad_()
            self.leaves.append(made)
        return made

    def state(self) -> dict[str, Array]:
        dense = {key: unpack(tree) for key, tree in self.trees.items()}
        return {name: dense[id(tensor)] for name, tensor in self.before.tensors.items()}

    def draft(self) -> Draft:
        renewed: dict[int, Tensor] = {}
        for tensor in self.before.tensors.values():
            tree = map_arrays(self.trees[id(tensor)], lambda _, a: a.detach().numpy())
            if not isinstance(tree, Packed) and tree.dtype.kind == "f" and tensor.dtype in ("float16", "float64"):
                tree = tree.astype(tensor.dtype)
            renewed.setdefault(id(tensor), replace(tensor, tree=tree))
        return replace(self.before, tensors={n: renewed[id(t)] for n, t in self.before.tensors.items()})


def _held(path: str, array: object) -> Array:
    return torch.from_numpy(np.array(array))


@dataclass(frozen=True)
class Finetune:
    """Train what the trees leave free. Without `lr`, at a hundredth of the task's learning rate."""

    epochs: int = 2
    lr: float | None = None
    seed: int = 0

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        if task is None:
            raise ValueError("Finetune trains the network: give a Task with training data")
        rate = task.schedule.lr / 100 if self.lr is None else self.lr
        schedule = replace(task.schedule, epochs=max(self.epochs, 1), lr=rate, drops=(0.5,), weight_decay=0.0)
        return tune(draft, task, schedule, range(self.epochs), self.seed)

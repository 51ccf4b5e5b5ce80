"""Differentiable k-means: weights trained through soft assignments to the codewords that they make themselves.

Cho, Alizadeh-Vahid, Adya, Rastegari (2022), section 3: attention A = softmax(-D / tau) of weights over codewords, the
codewords' new places c_j = sum_i a_ij w_i / sum_i a_ij, again until they rest, and the network runs on A C; gradients
reach the weights through all of it. Each step begins with the codewords of the last. In the end every weight takes its
nearest codeword. D are squared distances, and tau is in parts of those between neighbouring codewords at first, so that
one temperature serves layers of any size, values and vectors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from tersenet.contract import DATA, PACKED, Kind, check
from tersenet.draft import Draft
from tersenet.methods import Method
from tersenet.methods.kmeans import KMeans
from tersenet.packed import Array, Codebook, Packed, Reshaped, Sliced, Sparse, Tree, narrowed, places, unpack
from tersenet.stages.finetune import trained
from tersenet.stages.network import Network
from tersenet.stages.pack import Pack, made_by, refused_by
from tersenet.task import Task
from tersenet.where import Where

RESTS = 3e-3  # codewords that move less, in parts of how far they lie apart at first, rest
OWN = "it shares values itself: share plain weights"


@dataclass(frozen=True)
class DKM:
    """Train weights towards the codebooks that `method` begins with, of values, of vectors or for groups of channels.

    KMeans(2) makes palettes of 4 values, Product(6, weighted=False) of 64 vectors; rules say other methods, or None. At
    the task's own schedule, its rate a tenth. At most `steps` of k-means for each of training; a higher `temperature`
    shares each weight among more codewords. Pruned weights stay zero. Training takes memory for `steps` times as many
    shares as there are weights times codewords.
    """

    method: Method = field(default_factory=lambda: KMeans(4))
    rules: tuple[tuple[Where | str, Method | None], ...] = ()
    temperature: float = 0.1
    steps: int = 5
    epochs: int = 5
    seed: int = 0
    requires: ClassVar[Mapping[Kind, str]] = {DATA: "trains the network: give a Task with training data"}

    @property
    def refuses(self) -> Mapping[Kind, str]:
        return {**refused_by(self.method, self.rules), **dict.fromkeys(PACKED, OWN)}

    @property
    def makes(self) -> tuple[Kind, ...]:
        return made_by(self.method, self.rules)

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.steps < 1:
            raise ValueError("DKM takes a temperature above 0 and a step or more")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        assert task is not None
        begin = Pack(self.method, self.rules, seed=self.seed)(draft, task)
        schedule = replace(task.schedule, lr=task.schedule.lr / 10, epochs=max(self.epochs, 1))
        network = _Attending(begin, task.device, draft, self)
        return trained(network, task, schedule, range(self.epochs), self.seed, "training towards codewords")


class _Attending(Network):
    """The draft's trees as torch leaves, with the weights from before behind its codebooks."""

    def __init__(self, draft: Draft, device: str, before: Draft, stage: DKM) -> None:
        self.stage, self.codewords = stage, list[torch.Tensor]()
        self.behind = {
            id(node): values
            for name in draft.weights()
            for node, values in _behind(draft.tensors[name].tree, np.asarray(unpack(before.tensors[name].tree)))
        }
        super().__init__(draft, device)

    def _tree(self, tree: Tree) -> Tree:
        values = self.behind.get(id(tree))
        if values is None:
            return super()._tree(tree)
        assert isinstance(tree, Codebook)
        weight = self._leaf("", values)
        codewords = self._held("", tree.codewords).to(weight)
        apart = _apart(tree)
        node = _Attended(weight, codewords, self.stage.temperature * apart, RESTS * apart**0.5, self.stage.steps)
        self.codewords.append(node.codewords)
        return node

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self.codewords]

    def _arrays(self, tree: Tree, read: Callable[[str, Array], Array]) -> Tree:
        if not isinstance(tree, _Attended):
            return super()._arrays(tree, read)
        with torch.no_grad():
            shares, codewords = tree.settled()
            index = read("", shares.argmax(-1)).reshape(*tree.shape[:-1], -1)
        book = np.ascontiguousarray(read("", codewords).reshape(tree.codewords.shape), np.float32)
        return Codebook(narrowed(index), book)


@dataclass(frozen=True, eq=False)
class _Attended(Packed):
    """Weights as mixtures of codewords."""

    weight: torch.Tensor
    codewords: torch.Tensor  # [k, d] or [groups, k, d]: where they were last
    tau: float
    rests: float
    steps: int

    def settled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares [groups, n, k] of n vectors, and the codewords [groups, k, d] that they make."""
        *_, k, d = self.codewords.shape
        c = self.codewords.reshape(-1, k, d).clone()
        v = self.weight.reshape(len(c), -1, d)
        for _ in range(self.steps):
            before, shares = c, self._shares(v, c)
            mass = shares.sum(1)[..., None]
            c = torch.where(mass > 0, shares.transpose(1, 2) @ v / mass.clamp(min=1e-30), c)
            if float((c - before).detach().abs().max()) <= self.rests:
                break
        return self._shares(v, c), c

    def _shares(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        near = v @ c.transpose(1, 2) - c.square().sum(-1)[:, None] / 2  # less |v|^2 / 2, which all share
        return (2 / self.tau * near).softmax(-1)

    def unpack(self) -> torch.Tensor:
        shares, c = self.settled()
        self.codewords.copy_(c.detach().reshape(self.codewords.shape))
        return (shares @ c).reshape(self.weight.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


def _apart(book: Codebook) -> float:
    """The squared distance of codewords to the nearest others, a mean over vectors; 1 where there are no others."""
    *_, k, d = book.codewords.shape
    groups = np.asarray(book.codewords, np.float64).reshape(-1, k, d)
    squares = (np.square(group - codeword).sum(1) for group in groups for codeword in group)
    far = np.array([square[square > 0].min(initial=np.inf) for square in squares])[np.asarray(book.numbers())]
    return float(far[np.isfinite(far)].mean()) if np.isfinite(far).any() else 1.0


def _behind(tree: Tree, dense: Array) -> Iterator[tuple[Codebook, Array]]:
    """The codebook under a tree's masks, slices and order, and what a dense array has in its places."""
    if isinstance(tree, Sparse):
        yield from _behind(tree.values, dense[np.asarray(tree.mask)])
    elif isinstance(tree, Sliced):
        yield from _behind(tree.child, dense.take(places(tree.kept), tree.axis))
    elif isinstance(tree, Reshaped):
        yield from _behind(tree.child, dense.reshape(tree.split).transpose(tree.axes).reshape(tree.child.shape))
    elif isinstance(tree, Codebook) and not isinstance(tree.codewords, Packed):
        yield tree, np.ascontiguousarray(dense)

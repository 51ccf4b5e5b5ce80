"""Pack weights with a method, or round the floats that are left; say in the ledger what stayed dense and why."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tersenet.artifact import Tensor
from tersenet.contract import PACKED, Kind, check
from tersenet.draft import PRECISION, Draft, precise, round_leaves
from tersenet.methods import STATISTICS, Method
from tersenet.methods.kmeans import KMeans
from tersenet.packed import (
    Array,
    Factored,
    Packed,
    Reshaped,
    Sliced,
    Sparse,
    Tree,
    check_tree,
    check_tree_values,
    float_leaves,
    is_integer,
    map_arrays,
    unpack,
)
from tersenet.statistics import packed, statistics
from tersenet.structure import is_plain, once, refilled
from tersenet.task import Task, one_thread
from tersenet.where import Where, chosen_with_vectors, vectors

NO_GAIN = "dense: smaller than its codebook"
NO_RANK = "dense: no rank that was asked for saves anything"
LEFT_OUT = "dense: left out by the recipe"
UNSEEN = "dense: no result depends on it, so what its method needs is not known"


@dataclass(frozen=True)
class Pack:
    """Rewrite the float leaves of each weight with `method`, or with that of a rule, e.g. (("conv*", KMeans(8)),).

    Biases and norms are packed by rules that fit no weight, e.g. ("*.bias", Uniform(6)) or ("kind:norm", Uniform(8)),
    and all others of them by `vectors`.
    None leaves a weight alone, and so does packing that would not make a tensor smaller (its floats are as many as
    before). Methods get the statistics that they need from `samples` training inputs. Where `method` is None, what the
    rules pack is decided: no later stage changes it.
    """

    method: Method | None = field(default_factory=KMeans)
    rules: tuple[tuple[Where | str, Method | None], ...] = ()
    samples: int = 1024
    seed: int = 0
    vectors: Method | None = None

    @property
    def makes(self) -> tuple[Kind, ...]:
        if self.method is None:  # what is decided is in nobody's way
            return ()
        return made_by(self.method, self.rules)

    @property
    def refuses(self) -> Mapping[Kind, str]:
        return refused_by(self.method, self.rules)

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        check([self], draft, task)
        choices = methods_of(draft, self.method, self.rules)
        if self.vectors is not None:
            choices = dict.fromkeys(vectors(draft), ("", self.vectors)) | dict(choices)
        after = repacked(draft, task, choices, self.samples, self.seed)
        unfit = getattr(self.method, "note", "")
        if unfit and choices and all(after.tensors[name].note == unfit for name in choices):
            first = f"{next(iter(choices))}: {unfit.removeprefix('dense: ')}"
            raise ValueError(f"{first}, nor is any other weight: take another recipe")
        return after if self.method is not None else _decided(draft, after)


def _decided(before: Draft, after: Draft) -> Draft:
    """The draft whose packed weights no later stage changes; their floats are rounded as far as that is harmless."""
    names = [n for n in after.rules if after.tensors[n].tree is not before.tensors[n].tree]
    precisely = once(_precise)
    rounded = after.with_trees({n: map_arrays(after.tensors[n].tree, precisely) for n in names})
    return rounded.leaving({n: after.rules[n] for n in names})


def _precise(path: str, array: Array) -> Array:
    return precise(array) if np.asarray(array).dtype == np.float32 else array


Choices = Mapping[str, tuple[str, Method | None]]  # of each weight: the text of the rule that decides, and the method


def made_by(method: Method | None, rules: Iterable[tuple[object, Method | None]]) -> tuple[Kind, ...]:
    """The kinds of nodes that a method and those of rules make, as far as they say so."""
    methods = (method, *(other for _, other in rules))
    return tuple(dict.fromkeys(kind for one in methods for kind in getattr(one, "makes", ())))


def refused_by(method: Method | None, rules: Sequence[object]) -> Mapping[Kind, str]:
    """What a method cannot take that reads inputs or outputs; with rules it may not have to."""
    reads = method is not None and not rules and {"inputs", "outputs"} & set(method.needs)
    remedy = f"{method} reads what dense layers see: pack with it before other stages"
    return dict.fromkeys((Sparse, Sliced, Reshaped, *PACKED), remedy) if reads else {}


def methods_of(draft: Draft, method: Method | None, rules: tuple[tuple[Where | str, Method | None], ...]) -> Choices:
    """By which method each weight, and vector that a rule names, is to be packed, by which rule ("" for none)."""
    return dict.fromkeys(draft.weights(), ("", method)) | chosen_with_vectors(draft, rules)


def repacked(draft: Draft, task: Task | None, choices: Choices, samples: int, seed: int) -> Draft:
    """The draft with weights packed as chosen; why one stays dense is noted."""
    methods = {name: method for name, (_, method) in choices.items() if method is not None}
    for name, method in methods.items():
        if method.needs and len(draft.tensors[name].tree.shape) < 2:
            raise ValueError(f"{name}: {method} needs the {STATISTICS[method.needs[0]]}, which a vector has none of")
    known = statistics(draft, task, methods, samples, seed)
    trees, notes = dict[str, Tree](), dict[str, str]()
    for name, (rule, _) in choices.items():
        before = draft.tensors[name].tree
        if name not in methods:
            notes |= {name: LEFT_OUT} if rule else {}
        elif methods[name].needs and name not in known:
            notes[name] = UNSEEN
        else:
            try:
                with one_thread():
                    tree = packed(before, methods[name], known.get(name))
            except ValueError as wrong:
                raise ValueError(f"{name}: {wrong}") from None
            _check(name, methods[name], tree)
            if _floats(tree) < _floats(before):
                trees[name] = tree
            else:
                none = NO_RANK if Factored in getattr(methods[name], "makes", ()) else NO_GAIN
                notes[name] = getattr(methods[name], "note", none)
    notes = {name: note for name, note in notes.items() if not isinstance(draft.tensors[name].tree, Packed)}
    rules = {name: choices[name][0] for name in trees if choices[name][0]}
    return replace(draft.with_trees(trees).with_notes(notes), rules={**draft.rules, **rules})


def _check(name: str, method: Method, tree: Tree) -> None:
    try:
        check_tree(tree)
        check_tree_values(tree)
    except ValueError as wrong:
        raise ValueError(f"{name}: {method} made a tree that does not fit together: {wrong}") from None


def _floats(tree: Tree) -> int:
    return sum(np.asarray(leaf).size for leaf in float_leaves(tree).values())


@dataclass(frozen=True)
class Narrow:
    """Round trainable float leaves (codewords, biases, norms) to "float16" or "bfloat16"; buffers keep every bit.

    A vector, as of biases or a norm's gains, stays as it is where one of its values would lose the type's precision,
    and any other leaf where its largest values would: a step of 1e-9 is 0 in half precision.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError("Narrow takes float16 or bfloat16")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        renewed, rounded = dict[int, Tensor](), once(self._rounded)
        for name, tensor in draft.tensors.items():
            if name in draft.trainable and tensor.dtype == "float32":
                tree = map_arrays(tensor.tree, rounded)
                if len(tensor.tree.shape) < 2 and is_plain(tensor.tree):
                    tree = refilled(tensor.tree, precise(unpack(tensor.tree), self.dtype))
                if not all(np.isfinite(np.asarray(leaf)).all() for leaf in float_leaves(tree).values()):
                    raise ValueError(f"{name}: values too large for {self.dtype}; use bfloat16 or leave Narrow out")
                renewed.setdefault(id(tensor), replace(tensor, tree=tree))
        return replace(draft, tensors={n: renewed.get(id(t), t) for n, t in draft.tensors.items()})

    def _rounded(self, path: str, array: Array) -> Array:
        rounded = np.asarray(round_leaves(array, self.dtype))
        if not rounded.size or is_integer(array) or not np.isfinite(rounded).all():
            return rounded
        lost = np.abs(rounded - array).max()
        return array if lost > PRECISION[self.dtype] * np.abs(array).max() else rounded

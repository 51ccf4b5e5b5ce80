"""Rules: which weights something is for, by name, by kind of layer, by size.

A rule is a pair (where, what). Among rules one that gives a weight's exact name comes first, then the first that
matches. A rule that decides about nothing is an error, since it is most likely misspelt.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from tersenet.draft import KEPT_BY_RULE, Draft
from tersenet.norms import FOLDED

What = TypeVar("What")
# By the layer that owns a parameter; one that belongs to none of them goes by its axes.
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear, nn.Bilinear),
    "conv1d": (nn.Conv1d,),
    "conv2d": (nn.Conv2d,),
    "conv3d": (nn.Conv3d,),
    "conv_transpose1d": (nn.ConvTranspose1d,),
    "conv_transpose2d": (nn.ConvTranspose2d,),
    "conv_transpose3d": (nn.ConvTranspose3d,),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "attention": (nn.MultiheadAttention,),
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "vector": (),
    "other": (),
}
BY_AXES = {1: "vector", 2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
SHOWN = 20  # names in an error


@dataclass(frozen=True)
class Where:
    """Weights by patterns of their names and of the kinds of their layers, and by their least number of values.

    One that may be `idle` is no error where it decides about no weight, as in a recipe that fits many networks.

    >>> str(Where("conv*", least=1000)), str(Where(kind="embedding"))
    ('conv* least:1000', 'kind:embedding')
    """

    name: str = "*"
    kind: str = "*"
    least: int = 0
    idle: bool = False

    def __post_init__(self) -> None:
        if not any(fnmatchcase(kind, self.kind) for kind in KINDS):
            raise ValueError(f"Where: no kind {self.kind!r}; there are {', '.join(KINDS)}")

    @staticmethod
    def of(text: str) -> "Where":
        """The value of its text: a pattern of names, and after blanks `kind:` and `least:` where they matter.

        Raises ValueError for an empty text, for two patterns, and for a `least` that is no number.

        >>> Where.of("kind:conv*")
        Where(name='*', kind='conv*', least=0, idle=False)
        """
        kind, least, names = "*", "0", list[str]()
        for part in text.split():
            if part.startswith("kind:"):
                kind = part.removeprefix("kind:")
            elif part.startswith("least:"):
                least = part.removeprefix("least:")
            else:
                names.append(part)
        if not text.strip() or len(names) > 1:
            raise ValueError(f"the rule {text!r}: write one pattern, e.g. 'head.*', and a rule of its own for another")
        if not least.isdecimal():
            raise ValueError(f"the rule {text!r}: least is a number of values, as in 'least:1000'")
        return Where(names[0] if names else "*", kind, int(least))

    def __str__(self) -> str:
        given = [f"kind:{self.kind}"] * (self.kind != "*") + [f"least:{self.least}"] * (self.least > 0)
        return " ".join([self.name] * (self.name != "*" or not given) + given)


def chosen(draft: Draft, rules: Sequence[tuple[Where | str, What]]) -> dict[str, tuple[str, What]]:
    """For each weight that a rule decides about, the text of the rule and what it says.

    Raises ValueError for a rule that decides about none.
    """
    return _chosen(draft, rules, draft.weights())


def chosen_with_vectors(draft: Draft, rules: Sequence[tuple[Where | str, What]]) -> dict[str, tuple[str, What]]:
    """The same, where rules that fit no weight are for the biases and norms that they fit: `*.bias`, `kind:norm`."""
    weights, others = draft.weights(), vectors(draft)
    fits = _fitting(draft)

    def is_for(rule: Where | str, names: Iterable[str]) -> bool:
        return any(fits(rule, name) for name in names)

    for_vectors = [rule for rule in rules if not is_for(rule[0], weights) and is_for(rule[0], others)]
    for_weights = [rule for rule in rules if rule not in for_vectors]
    return _chosen(draft, for_weights, weights) | _chosen(draft, for_vectors, others)


def vectors(draft: Draft) -> list[str]:
    """The names of trainable float vectors, tied ones once."""
    found: dict[int, str] = {}
    for name, tensor in draft.tensors.items():
        fits = name in draft.trainable and len(tensor.tree.shape) == 1 and tensor.note != FOLDED
        if fits and tensor.tree.shape[0] and "float" in tensor.dtype:
            found.setdefault(id(tensor), name)
    return list(found.values())


def kinds(draft: Draft) -> dict[str, str]:
    """The kind of layer that each tensor is of, as rules know it."""
    layers = _layers(draft)
    return {name: _kind(layers, name, tensor.tree.shape) for name, tensor in draft.tensors.items()}


def kept(draft: Draft, patterns: Where | str | Iterable[Where | str]) -> Draft:
    """The draft with what the patterns match kept bit for bit by every stage, vectors such as biases too.

    Raises ValueError for a pattern that matches nothing.
    """
    several = (patterns,) if isinstance(patterns, Where | str) else patterns
    found = _chosen(draft, [(pattern, None) for pattern in several], sorted(draft.trainable & draft.tensors.keys()))
    notes = {name: KEPT_BY_RULE for name in found if draft.tensors[name].note != FOLDED}
    return draft.with_notes(notes).leaving({name: rule for name, (rule, _) in found.items()})


def _chosen(
    draft: Draft, rules: Sequence[tuple[Where | str, What]], names: Sequence[str]
) -> dict[str, tuple[str, What]]:
    fits, alike = _fitting(draft), _alike(draft)
    wheres = [_where(rule, draft.tensors) for rule, _ in rules]
    found, used = dict[str, tuple[str, What]](), set[int]()
    for name in names:
        tied = alike[id(draft.tensors[name])]
        for k in sorted(range(len(rules)), key=lambda k: wheres[k].name not in tied):  # exact names first
            if fits(wheres[k], name):
                found[name] = str(wheres[k]), rules[k][1]
                used.add(k)
                break
    if idle := [str(where) for k, where in enumerate(wheres) if k not in used and not where.idle]:
        there = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise ValueError(f"the rule {idle[0]!r} decides about no weight; there are {there or 'none left'}")
    return found


def _alike(draft: Draft) -> dict[int, list[str]]:
    """The names of each tensor, by its id."""
    found: dict[int, list[str]] = {}
    for name, tensor in draft.tensors.items():
        found.setdefault(id(tensor), []).append(name)
    return found


def _fitting(draft: Draft) -> Callable[[Where | str, str], bool]:
    """Whether a rule's first part fits a tensor, by any of the names that are tied to it."""
    alike, layers = _alike(draft), _layers(draft)

    def fits(rule: Where | str, name: str) -> bool:
        where, tensor = _where(rule, draft.tensors), draft.tensors[name]
        shape, tied = tensor.tree.shape, alike[id(tensor)]
        pattern = where.name not in draft.tensors  # what is a name is no pattern
        named = any(fnmatchcase(one, where.name) for one in tied) if pattern else where.name in tied
        told = {_kind(layers, one, shape) for one in tied}
        return named and any(fnmatchcase(kind, where.kind) for kind in told) and math.prod(shape) >= where.least

    return fits


def _where(rule: Where | str, names: Container[str]) -> Where:
    """A rule's first part as a value; a text that is a name is that name, whatever it looks like."""
    if isinstance(rule, Where):
        return rule
    return Where(rule) if rule in names else Where.of(rule)


def _layers(draft: Draft) -> dict[str, nn.Module]:
    return {} if draft.model is None else dict(draft.model.named_modules(remove_duplicate=False))


def _kind(layers: dict[str, nn.Module], name: str, shape: Sequence[int]) -> str:
    """The kind of a parameter: of the layer that owns it, also through a parametrization, or as its axes tell."""
    before, hidden, _ = name.partition(".parametrizations.")
    layer = layers.get(before if hidden else name.rpartition(".")[0])
    told = (kind for kind, types in KINDS.items() if isinstance(layer, types))
    return next(told, BY_AXES.get(len(shape), "other"))

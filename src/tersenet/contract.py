"""What stages take and make: a recipe is refused before any work, in a line that names layer, stage and remedy.

A stage may say, as attributes of its class, what it `refuses` and what it `requires`, each with the remedy, and what it
`makes`. These are kinds of nodes in weights, folded `NORMS`, `DATA` to train on and activations that are `FIXED`, whose
ranges no longer fit once a stage makes anything of the weights. A stage that says nothing is taken to take everything
and to make nothing that matters to others.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from tersenet.draft import Draft
from tersenet.norms import folded_norms
from tersenet.packed import Bloomier, Codebook, Factored, Hashed, Lattice, Packed, Transformed, Uniform
from tersenet.structure import nodes
from tersenet.task import Task

Kind: TypeAlias = type[Packed] | str
NORMS, DATA, FIXED = "folded norms", "training data", "activations in fixed point"
PACKED: tuple[Kind, ...] = (Codebook, Uniform, Transformed, Factored, Bloomier, Lattice, Hashed)  # not free any more


def check(recipe: Iterable[object], draft: Draft, task: Task | None) -> None:
    """Raises ValueError for the first stage that cannot take what the draft holds or what stages before it make.

    Stages that are called directly ask the same of themselves alone.
    """
    there = facts(draft, task)
    for stage in recipe:
        name = type(stage).__name__
        refused: Mapping[Kind, str] = getattr(stage, "refuses", {})
        required: Mapping[Kind, str] = getattr(stage, "requires", {})
        for kind, remedy in refused.items():
            if kind in there:
                told = kind if isinstance(kind, str) else f"{kind.__name__} nodes"
                raise ValueError(f"{there[kind]}: {name} cannot take {told}; {remedy}")
        for kind, remedy in required.items():
            if kind not in there:
                raise ValueError(f"{name} {remedy}")
        makes: Iterable[Kind] = getattr(stage, "makes", ())
        if FIXED in there and set(makes) - {FIXED}:
            raise ValueError(f"{there[FIXED]}: {name} changes what layers give; fix activations behind it")
        there = dict.fromkeys(makes, f"the result of {name}") | there


def facts(draft: Draft, task: Task | None) -> dict[Kind, str]:
    """What there is, and the first name that has it: kinds of nodes in weights, folded norms, data to train on."""
    found: dict[Kind, str] = {}
    for name in draft.weights():
        for node in nodes(draft.tensors[name].tree):
            found.setdefault(type(node), name)
    if norms := folded_norms(draft.tensors):
        found[NORMS] = min(norms)
    if draft.activations:
        found[FIXED] = min(draft.activations)
    if task is not None and task.train is not None and draft.model is not None:
        found[DATA] = "the task"
    return found

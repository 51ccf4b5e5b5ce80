"""What each weight of a network may become, from any mixture of methods, and the choice among it for a size.

A candidate is a tree with its exact bytes and what its errors cost at the network's outputs, in the unit that all
layers share. `Lagrange` chooses; the bytes of the real file decide how much it may spend.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tersenet.allocators.lagrange import Lagrange, Option
from tersenet.artifact import Artifact, Coding, Tensor
from tersenet.budget import UnmetBudget
from tersenet.display import progress
from tersenet.draft import Draft, artifact_of, round_leaves
from tersenet.methods import Method
from tersenet.packed import Packed, unpack
from tersenet.statistics import packed
from tersenet.task import one_thread, spread
from tersenet.waterfilling.knowledge import Halves, joined
from tersenet.waterfilling.layers import Layer, Packing, Waterfilling

STEPS = tuple(2.0 ** (k / 2) for k in range(-4, 6))  # times c: steps that are offered to each layer
FRONTIER = 256  # points that the allocation keeps for each layer
TRIES, USED = 8, 0.99  # real files that are made, and how much of the size is enough


class Candidate(NamedTuple):
    """A packing of one weight, its bytes in a file of its own, and where it comes from."""

    packing: Packing
    nbytes: int
    method: str


def candidates(
    waterfilling: Waterfilling,
    c: float,
    rate: float,
    methods: Sequence[Method],
    coding: Coding,
    found: Mapping[str, Halves] = MappingProxyType({}),
) -> dict[str, list[Candidate]]:
    """For each layer its trees at steps around c, those of the methods, and what it takes without loss.

    Methods get what they need of the moments that were `found`; where there are none, or a weight is packed already,
    those that need some offer nothing.
    """
    blind = [method for method in methods if not method.needs]
    aware = found if len(blind) < len(methods) else {}  # moments are large: none is put together that nobody reads
    known = {id(waterfilling.draft.tensors[name]): joined(halves) for name, halves in aware.items()}

    def offered(layer: Layer) -> list[Candidate]:
        tensor = waterfilling.draft.tensors[layer.name]
        moments = known.get(id(tensor))
        ready = methods if moments is not None and not isinstance(tensor.tree, Packed) else blind
        found = [(f"step {step:.2g}", waterfilling.packed(layer, c * step, rate)) for step in STEPS]
        kept = waterfilling.lossless.get(layer.name)
        if kept is not None:
            found.append(("without loss", Packing(kept.tree, None, 0.0)))
        for method in ready:
            try:
                tree = round_leaves(packed(tensor.tree, method, moments))
            except ValueError as wrong:
                raise ValueError(f"{layer.name}: {wrong}") from None
            if isinstance(tree, Packed):
                found.append((str(method), _measured(waterfilling, layer, tree)))
        made = [
            Candidate(one, Artifact({"w": Tensor(one.tree, tensor.dtype)}, coding).nbytes, name) for name, one in found
        ]
        return [one for one in made if math.isfinite(one.packing.cost)]

    with one_thread():
        layers = waterfilling.layers
        offers = progress(spread(offered, layers), "trying methods", len(layers))
        return {layer.name: offer for layer, offer in zip(layers, offers, strict=True)}


def _measured(waterfilling: Waterfilling, layer: Layer, tree: Packed) -> Packing:
    """A tree with the mean error of the layer's outputs and what its errors cost."""
    error = layer.weight - layer.matrix(np.asarray(unpack(tree), np.float64))
    lost = None
    if layer.bias is not None:
        lost = layer.lost(error, math.prod(waterfilling.draft.tensors[layer.bias].tree.shape))
    return Packing(tree, lost, layer.metric.cost(error))


def allocated(
    waterfilling: Waterfilling, offers: Mapping[str, Sequence[Candidate]], c: float, most: int, coding: Coding
) -> tuple[Draft, int]:
    """The draft of the candidates that together cost least within `most` bytes of file, and its bytes."""
    options = {name: [Option(8 * one.nbytes, one.packing.cost) for one in offer] for name, offer in offers.items()}
    layers = waterfilling.layers

    def made(chosen: Mapping[str, int]) -> tuple[Draft, int]:
        packings = [offers[layer.name][chosen[layer.name]].packing for layer in layers]
        draft = waterfilling.draft.with_trees(waterfilling.trees(layers, packings, c))
        return draft, artifact_of(draft, coding).nbytes

    lightest = {name: offer.index(min(offer)) for name, offer in options.items()}
    best = made(lightest)
    if best[1] > most:
        raise UnmetBudget(most, best[1])
    budget = 8.0 * (most - best[1]) + sum(options[name][k].bits for name, k in lightest.items())
    allocator = Lagrange(frontier=FRONTIER)
    for _ in range(TRIES):
        draft, size = made(allocator.allocate(options, budget))
        if size <= most and size >= best[1]:
            best = draft, size
        if USED * most <= size <= most:
            break
        budget += 8.0 * ((1 + USED) / 2 * most - size)
    return best

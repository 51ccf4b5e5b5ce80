"""ENC: which rank each layer gets within a budget, without training (Kim, Khan, Kyung 2019).

How much of a layer a rank r keeps is told by its singular values, y(r) = (E(r) - E(1)) / (E(R) - E(1)), where E(r) is
the sum of the first r and R the largest rank that saves anything (section 3.2); a network keeps the product over its
layers. `mapped` gives all layers the same y (ENC-Map), `modelled` the ranks of the largest product (ENC-Model).

Where we differ: where the paper lists ranks on a grid, group by group of equal layers, the product is separable in its
logarithms, so that dynamic programming over the costs finds the best of all, and the best of each cost for ENC-Inf.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LEAST = 0.1  # of the largest rank, below which the metric tells little (section 3.3)
GRID = 1 << 14  # costs that are told apart where they have no common divisor
NOTHING = 1e-12  # what rank 1 keeps


@dataclass(frozen=True, eq=False)
class Curve:
    """What a layer may be: its ranks, rising, their costs and how much they keep; the last, 0, is the whole layer."""

    ranks: Array
    costs: Array
    kept: Array

    @staticmethod
    def of(values: Array, each: float, whole: float, most: int) -> "Curve":
        """Of all singular values, falling, the cost of a rank and of the whole layer, and the largest useful rank."""
        energy = np.cumsum(np.asarray(values, np.float64))
        ranks = np.arange(max(1, math.ceil(LEAST * most)), most)
        span = energy[most - 1] - energy[0] if most > 1 else 0.0
        kept = (energy[ranks - 1] - energy[0]) / span if span > 0 else np.ones(len(ranks))
        return Curve(np.append(ranks, 0), np.append(ranks * each, whole), np.append(kept, 1.0))


def mapped(curves: Sequence[Curve], most: float) -> list[int]:
    """The place of each layer's choice: of all that keep a level, the same for all layers, the least; the level is the
    highest within `most`. Raises ValueError where the least ranks cost more.
    """
    levels = np.unique(np.concatenate([curve.kept for curve in curves]))
    low, high = -1, len(levels)

    def at(level: int) -> list[int]:
        return [int(np.searchsorted(curve.kept, levels[level])) if level >= 0 else 0 for curve in curves]

    _check(curves, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(curves, at(middle)) <= most else (low, middle)
    return at(low)


def modelled(curves: Sequence[Curve], most: float, count: int = 1) -> list[list[int]]:
    """The places of the choices that keep most within `most`, and the next best of other costs, `count` in all.

    Exact where the costs have a divisor that divides the budget into at most `GRID` parts; else costs are rounded up to
    such parts, and what `mapped` gives is among the answers.
    """
    _check(curves, most)
    room = most - cost(curves, [0] * len(curves))
    more = [curve.costs - curve.costs[0] for curve in curves]
    unit = float(math.gcd(*(int(n) for part in more for n in part))) or 1.0
    if any((part % 1).any() for part in more) or room / unit > GRID:
        unit = room / GRID or 1.0
    cells, picks = int(room / unit) + 1, list[Array]()
    best = np.full(cells, -math.inf)
    best[0] = 0.0
    for curve, part in zip(curves, more, strict=True):
        found, pick = np.full(cells, -math.inf), np.zeros(cells, np.int32)
        for k, (steps, gain) in enumerate(zip(np.ceil(part / unit - 1e-9).astype(int), _logs(curve), strict=True)):
            if steps < cells:
                better = best[: cells - steps] + gain > found[steps:]
                found[steps:][better] = (best[: cells - steps] + gain)[better]
                pick[steps:][better] = k
        best = found
        picks.append(pick)
    chosen = [mapped(curves, most)]
    for at in np.argsort(-best, kind="stable")[:count]:
        if best[at] > -math.inf:
            chosen.append(_traced(curves, picks, int(at), unit, more))
    chosen = [list(one) for one in dict.fromkeys(map(tuple, chosen))]
    return sorted(chosen, key=lambda places: -keeps(curves, places))[:count]


def _traced(curves: Sequence[Curve], picks: Sequence[Array], at: int, unit: float, more: Sequence[Array]) -> list[int]:
    """The choices that end in a cell."""
    places = []
    for pick, part in zip(reversed(picks), reversed(more), strict=True):
        places.append(int(pick[at]))
        at -= int(np.ceil(part[places[-1]] / unit - 1e-9))
    return places[::-1]


def cost(curves: Sequence[Curve], places: Sequence[int]) -> float:
    """What the choices cost together."""
    return math.fsum(float(curve.costs[k]) for curve, k in zip(curves, places, strict=True))


def keeps(curves: Sequence[Curve], places: Sequence[int]) -> float:
    """The logarithm of how much the choices keep together."""
    return math.fsum(float(_logs(curve)[k]) for curve, k in zip(curves, places, strict=True))


def _logs(curve: Curve) -> Array:
    logs: Array = np.log(np.maximum(curve.kept, NOTHING))
    return logs


def _check(curves: Sequence[Curve], most: float) -> None:
    least = cost(curves, [0] * len(curves))
    if least > most:
        raise ValueError(f"a cost of {most:,.0f} cannot be met: the least ranks cost {least:,.0f}")

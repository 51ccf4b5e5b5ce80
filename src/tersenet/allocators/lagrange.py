"""A budget in bits over many tensors: equal slopes by bisection over one multiplier (Everett 1963).

`allocate` serves methods whose options are separate per tensor; `step_within` finds the one number, such as the global
step of output-aware quantization, at which the real size just keeps within the budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tersenet.budget import UnmetBudget


class Option(NamedTuple):
    """One way to store a tensor: its exact bits and its estimated loss."""

    bits: int
    loss: float


@dataclass(frozen=True)
class Lagrange:
    """For each tensor the option of least loss + multiplier * bits, at the smallest multiplier that keeps the budget.

    The multiplier alone stops short of the budget, at a corner of the convex hull. What lies between is searched on the
    frontier of bits and loss, kept to its `frontier` best points a tensor: with few tensors that is exact.
    """

    steps: int = 60
    frontier: int = 4096

    def allocate(self, options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
        """The index of each tensor's option; raises ValueError where even the smallest options need more bits."""
        least = sum(min(o.bits for o in listed) for listed in options.values())
        if least > budget:
            raise ValueError(f"the budget of {budget:.0f} bits cannot be met: {least} is the least")
        slope = self._slope(options, budget)
        points: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
        rest = least
        for listed in options.values():
            rest -= min(o.bits for o in listed)
            merged = sorted(
                (bits + o.bits, loss + o.loss, (*chosen, i))
                for bits, loss, chosen in points
                for i, o in enumerate(listed)
                if bits + o.bits + rest <= budget
            )
            points = []
            for point in merged:
                if not points or point[1] < points[-1][1]:
                    points.append(point)
            if len(points) > self.frontier:
                near = sorted(points, key=lambda p: p[1] + slope * p[0])[: self.frontier - 1]
                points = sorted({points[0], *near})
        return dict(zip(options, points[-1][2]))

    def _slope(self, options: Mapping[str, Sequence[Option]], budget: float) -> float:
        low, high = -200.0, 200.0
        for _ in range(self.steps):
            middle = (low + high) / 2
            weight = 2.0**middle
            bits = sum(
                min(listed, key=lambda o: (o.loss + weight * o.bits, o.bits)).bits for listed in options.values()
            )
            low, high = (low, middle) if bits <= budget else (middle, high)
        return float(2.0**high)


def step_within(
    size_at: Callable[[float], int],
    most: int,
    start: float,
    used: float = 0.985,
    tries: int = 16,
    finest: float = 1e-300,
) -> float:
    """The step c at which `size_at(c)`, falling in c, lies within `used`..1 of `most`; else the best found below.

    Secant steps in log c, which sizes follow nearly linearly; below `finest` none is tried. Raises UnmetBudget where no
    step is coarse enough.
    """
    end = math.log(finest)
    aim, seen, at = most * (1 + used) / 2, dict[float, int](), max(math.log(start), end)
    for _ in range(tries):
        size = seen[at] = size_at(math.exp(at))
        if used * most <= size <= most:
            return math.exp(at)
        over = [x for x, s in seen.items() if s > most]
        under = [x for x, s in seen.items() if s <= most]
        near = sorted(seen, key=lambda x: abs(seen[x] - aim))[:2]
        slope = -0.6 * size
        if len(near) == 2 and seen[near[0]] != seen[near[1]]:
            slope = min((seen[near[0]] - seen[near[1]]) / (near[0] - near[1]), -0.05 * size)
        at = near[0] + max(-2.0, min(2.0, (aim - seen[near[0]]) / slope))
        if over and under and not max(over) < at < min(under):
            at = (max(over) + min(under)) / 2
        further = min(2.0, 0.01 * 2 ** len(seen))  # where sizes jump: past what was seen, by ever more
        if not under:
            at = max(at, max(over) + further)
        elif not over:
            at = max(min(at, min(under) - further), end)
            if at == min(under):
                break
    if not under:
        raise UnmetBudget(most, min(seen.values()))
    return math.exp(min(under))

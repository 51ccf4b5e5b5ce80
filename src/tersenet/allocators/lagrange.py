"""A budget in bits over many tensors: equal slopes by bisection over one multiplier (Everett 1963).

`allocate` serves methods whose options are separate per tensor; `from_below` finds the one number, such as the global
step of output-aware quantization, at which the real size just keeps within the budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a tensor: its exact bits and its estimated loss."""

    bits: int
    loss: float


@dataclass(frozen=True)
class Lagrange:
    """For each tensor the option of least loss + multiplier * bits, at the smallest multiplier that keeps the budget.

    What is left over goes to the single changes that buy most loss per bit.
    """

    steps: int = 60

    def allocate(self, options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
        """The index of each tensor's option; raises ValueError where even the smallest options need more bits."""
        least = {name: min(range(len(o)), key=lambda i, o=o: o[i]) for name, o in options.items()}  # type: ignore[misc]
        if _bits(options, least) > budget:
            raise ValueError(f"the budget of {budget:.0f} bits cannot be met: {_bits(options, least)} is the least")
        low, high, best = -200.0, 200.0, least
        for _ in range(self.steps):
            middle = (low + high) / 2
            chosen = {
                name: min(range(len(o)), key=lambda i, o=o: o[i].loss + 2**middle * o[i].bits)  # type: ignore[misc]
                for name, o in options.items()
            }
            if _bits(options, chosen) <= budget:
                high, best = middle, chosen
            else:
                low = middle
        return self._filled(options, best, budget)

    def _filled(self, options: Mapping[str, Sequence[Option]], chosen: dict[str, int], budget: float) -> dict[str, int]:
        while True:
            spare, gains = budget - _bits(options, chosen), []
            for name, o in options.items():
                now = o[chosen[name]]
                for i, other in enumerate(o):
                    if other.loss < now.loss and other.bits - now.bits <= spare:
                        gains.append(((now.loss - other.loss) / max(other.bits - now.bits, 1e-9), name, i))
            if not gains:
                return chosen
            _, name, i = max(gains)
            chosen = {**chosen, name: i}


def _bits(options: Mapping[str, Sequence[Option]], chosen: Mapping[str, int]) -> int:
    return sum(options[name][i].bits for name, i in chosen.items())


def from_below(size_at: Callable[[float], int], most: int, start: float, used: float = 0.985, tries: int = 16) -> float:
    """The step c at which `size_at(c)`, falling in c, lies within `used`..1 of `most`; else the best found below.

    Secant steps in log c, which sizes follow nearly linearly. Raises ValueError where no step is coarse enough.
    """
    aim, seen, at = most * (1 + used) / 2, dict[float, int](), math.log(start)
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
    if not under:
        raise ValueError(f"the budget of {most:,} bytes cannot be met: {min(seen.values()):,} is the least")
    return math.exp(min(under))

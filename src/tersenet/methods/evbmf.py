"""The rank of a matrix in noise that nobody knows: global analytic variational Bayes (Nakajima et al. 2013).

Theorems 2 and 3 of the paper, as Kim et al. (2016) use them to find the ranks of a network's layers.
"""

import math
from collections.abc import Sequence

import numpy as np

from tersenet.packed import Array

GRID, SECTIONS = 256, 60  # noises that are tried, and steps of the golden section around the best of them
NOTHING = 1e-12  # the least noise, as a part of the mean square of the matrix


def evbmf(values: Sequence[float] | Array, shape: tuple[int, int]) -> int:
    """How many of a matrix's singular values, all of them and falling, stand out of the noise; 0 where none does.

    >>> evbmf([9.0, 8.0, 1.2, 1.1, 1.0, 0.9], (6, 12))
    2
    """
    low, high = sorted(shape)
    squares = np.square(np.asarray(values, np.float64)) / high
    mean, alpha = float(squares.sum() / low), low / high
    if mean == 0:
        return 0
    tau = 2.5129 * math.sqrt(alpha)  # where the free energy of a component changes its sign
    bar = (1 + tau) * (1 + alpha / tau)
    rest = min(math.ceil(low / (1 + alpha)) - 1, low - 1)
    least = max(float(squares[rest] / bar), float(squares[rest:].mean()), NOTHING * mean)
    noise = _least(squares, alpha, bar, math.log(min(least, mean)), math.log(mean))
    return int(np.count_nonzero(squares > noise * bar))


def _least(squares: Array, alpha: float, bar: float, low: float, high: float) -> float:
    """The noise between two bounds, given as logarithms, at which the free energy is least."""
    tried = np.linspace(low, high, GRID)
    best = int(np.argmin([_energy(squares, alpha, bar, at) for at in tried]))
    low, high = tried[max(best - 1, 0)], tried[min(best + 1, GRID - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(SECTIONS):
        one, other = high - golden * (high - low), low + golden * (high - low)
        if _energy(squares, alpha, bar, one) < _energy(squares, alpha, bar, other):
            high = other
        else:
            low = one
    return math.exp((low + high) / 2)


def _energy(squares: Array, alpha: float, bar: float, noise: float) -> float:
    """The free energy of a noise, given as its logarithm, up to a constant (theorem 3)."""
    x = squares * math.exp(-noise)
    out = x > bar
    inside, x = x[~out], x[out]
    tau = (x - (1 + alpha) + np.sqrt(np.square(x - (1 + alpha)) - 4 * alpha)) / 2
    terms = x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)
    return float(terms.sum() + (inside - np.log(np.maximum(inside, 1e-300))).sum())

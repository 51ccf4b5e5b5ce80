"""Second moments that can be trusted: shrunk as far as two halves of the samples disagree, damped, and factored.

All moments are batches of diagonal blocks [k, b, b] in float64.
"""

import torch
from torch import Tensor

TRIES = 24  # how often a diagonal is raised, tenfold each time, until there is a Cholesky factor


def shrunk(one: Tensor, other: Tensor, shared: bool = False) -> Tensor:
    """A second moment [k, b, b] from estimates of two halves of the samples, trusted as far as they agree.

    Correlations are shrunk to none and variances to their mean in the block, or in all blocks where these are `shared`,
    each by the share of noise in them (Schäfer and Strimmer 2005, Opgen-Rhein and Strimmer 2007). Where we differ:
    noise is what the halves differ by, since the many positions of an image are one sample and not many.
    """
    mean, half = (one + other) / 2, (one - other) / 2
    sizes = mean.diagonal(dim1=1, dim2=2).clamp_min(0)
    level = sizes.mean().expand(len(sizes), 1) if shared else sizes.mean(1, keepdim=True)
    noise = _noise(half.diagonal(dim1=1, dim2=2), sizes - level)
    root = (sizes + 1e-9 * level).clamp_min(1e-300).rsqrt()
    off = 1 - torch.eye(mean.shape[1], dtype=mean.dtype)
    unit = root[:, :, None] * root[:, None] * off
    correlations, scales = mean * unit, (sizes + noise * (level - sizes)).sqrt()
    correlations = (1 - _noise(half * unit, correlations)) * correlations + torch.eye(mean.shape[1], dtype=mean.dtype)
    return correlations * scales[:, :, None] * scales[:, None]


def _noise(half: Tensor, signal: Tensor) -> float:
    """The share of noise in a mean of two halves, from half of their difference; 1 where there is nothing else."""
    difference, whole = float(half.square().sum()), float(signal.square().sum())
    return min(1.0, difference / whole) if whole > 0 else 1.0


def factored(a: Tensor) -> Tensor:
    """Lower Cholesky factors of [k, b, b], the diagonals raised until there are some; in the end diagonals alone."""
    eye, level = torch.eye(a.shape[-1], dtype=a.dtype), a.diagonal(dim1=1, dim2=2).mean()
    extra = 0.0
    for _ in range(TRIES):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(a + extra * level * eye)
        if not failed.any() and bool(torch.isfinite(factor).all()):
            return factor
        extra = max(10 * extra, 1e-10)
    return torch.diag_embed(a.diagonal(dim1=1, dim2=2).clamp_min(1e-12 * float(level.abs()) + 1e-300).sqrt())

"""From the moments of a layer to the triangular factors in which its errors are measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from tersenet.calibrate import MOST, Moments
from tersenet.methods.shrinkage import factored, shrunk
from tersenet.packed import Array
from tersenet.waterfilling.knowledge import Halves

WIDE = 16.0  # rows and columns of sizes that differ by more are brought nearer before moments are damped
UNSURE, ENOUGH = 0.1, 128  # how much A is damped where hardly any inputs were seen, and how many are enough


@dataclass(frozen=True)
class Damping:
    """What is added to the diagonals of the shrunk moments, as parts of their means."""

    inputs: float = 1e-3
    rows: float = 0.3


def kept_moments(known: Moments, kept: Mapping[int, Array], shape: tuple[int, ...]) -> Moments | None:
    """The moments of the part of a weight that lies in the kept places of its first two axes.

    None where the weight does not lie in its moments as it is, has several groups that lose columns, or where its
    moments' blocks, which are put into one, would hold too many numbers.
    """
    form = known.form
    if not form.straight or form.split != shape or form.lead != 1 or not kept.keys() <= {0, 1}:
        return None
    made = tuple(len(kept.get(axis, range(n))) for axis, n in enumerate(shape))
    rows = torch.from_numpy(kept.get(0, np.arange(shape[0])))
    if form.groups > 1:
        if form.rows > 1 or 1 in kept:
            return None
        own = replace(form, split=made, groups=len(rows))
        return replace(known, form=own, inputs=known.inputs[rows], means=known.means[rows], outputs=known.outputs[rows])
    columns = torch.arange(form.columns).reshape(shape[1], -1)[kept.get(1, np.arange(shape[1]))].reshape(-1)
    inputs, outputs = _part(known.inputs, columns), _part(known.outputs, rows)
    if inputs is None or outputs is None:
        return None
    return replace(known, form=replace(form, split=made), inputs=inputs, means=known.means[:, columns], outputs=outputs)


def _part(blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
    """The moments [1, 1, n, n] of some coordinates of blocks [1, k, b, b], in single blocks where they were."""
    width = blocks.shape[-1]
    if width == 1:
        return blocks[:, places]
    if len(places) ** 2 > MOST:
        return None
    runs = [places[places // width == k] % width for k in range(blocks.shape[1])]
    parts = [block[run][:, run] for block, run in zip(blocks[0], runs, strict=True)]
    found: torch.Tensor = torch.block_diag(*parts)[None, None]  # type: ignore[no-untyped-call]
    return found


def mean_diagonal(moment: torch.Tensor) -> float:
    diagonal = moment.diagonal(dim1=2, dim2=3)
    return float(diagonal.sum()) / max(int((diagonal > 0).sum()), 1)


def _extremes(w: Array, axis: int) -> torch.Tensor:
    """How far rows or columns [groups, m] are from the usual size, beyond `WIDE` times: else 1.

    Damping is the same for all coordinates of a layer. Where their scales differ by orders of magnitude, as two layers
    may share them out, they are first brought near each other.
    """
    sizes = np.sqrt(np.square(w).mean(axis))
    usual = np.median(sizes[sizes > 0]) if sizes.any() else 1.0
    ratio = np.where(sizes > 0, sizes / usual, 1.0)
    return torch.from_numpy(np.maximum(ratio / WIDE, 1.0) * np.minimum(ratio * WIDE, 1.0))


def _scaled(blocks: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Moments [groups, k, b, b] of coordinates that are multiplied by sizes [groups, m]."""
    padded = _in_blocks(sizes, blocks, 1.0)
    return blocks * padded[..., :, None] * padded[..., None, :]


def _factors(moments: torch.Tensor, like: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Factors [groups * k, b, b] of moments whose coordinates were multiplied by sizes, as if they were not."""
    factor = factored(moments).reshape(*like.shape)
    return (factor / _in_blocks(sizes, factor, 1.0)[..., None]).flatten(0, 1)


def _in_blocks(values: torch.Tensor, blocks: torch.Tensor, rest: float) -> torch.Tensor:
    """Values [groups, n] as [groups, k, b], like the coordinates of blocks [groups, k, b, b]; `rest` past the end."""
    groups, count, width, _ = blocks.shape
    padded = torch.nn.functional.pad(values, (0, count * width - values.shape[1]), value=rest)
    return padded.reshape(groups, count, width)


def input_factors(known: Halves, damping: Damping, centred: bool, turn: torch.Tensor, w: Array) -> torch.Tensor:
    """Factors of A as blocks [groups * k, b, b], its kernels' axes turned.

    It is a covariance where a bias takes up the mean. Where few inputs were seen, they are trusted less.
    """
    sizes = _extremes(w, 1)

    def moment(centre: bool) -> torch.Tensor:
        return shrunk(_turned(known[0], centre, turn, sizes), _turned(known[1], centre, turn, sizes))

    a, whole = moment(centred), float(moment(False).diagonal(dim1=1, dim2=2).mean()) if centred else 0.0
    if float(a.diagonal(dim1=1, dim2=2).mean()) < 1e-9 * whole:  # inputs that never change
        a = moment(False)
    mean = a.diagonal(dim1=1, dim2=2).mean(1)
    few = UNSURE * max(0.0, 1 - sum(half.positions for half in known) / ENOUGH)
    more = max(damping.inputs, few) * (mean + 1e-3 * mean.mean()) + 1e-9 * whole
    return _factors(a + more[:, None, None] * torch.eye(a.shape[1], dtype=a.dtype), known[0].inputs, sizes)


def _turned(known: Moments, centred: bool, turn: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    a, k = known.inputs, len(turn)
    groups, count, width, _ = a.shape
    if centred:
        means = _in_blocks(known.means, a, 0.0)
        a = a - means[..., :, None] * means[..., None, :]
    a = a.reshape(groups * count, width // k, k, width // k, k)
    a = torch.einsum("pk,gikjl,ql->gipjq", turn, a, turn).reshape(groups, count, width, width)
    return _scaled(a, sizes).flatten(0, 1)


def output_factors(known: Halves, damping: Damping, w: Array) -> torch.Tensor:
    """Factors of G as blocks [groups * l, d, d]."""
    sizes = _extremes(w, 2)
    halves = [_scaled(half.outputs, sizes) for half in known]
    g = shrunk(halves[0].flatten(0, 1), halves[1].flatten(0, 1), shared=True)
    level = sum(map(mean_diagonal, halves)) / 2
    return _factors(g + damping.rows * level * torch.eye(g.shape[1], dtype=g.dtype), halves[0], sizes)


def band(blocks: torch.Tensor, groups: int, n: int) -> Array:
    """Blocks [groups * k, b, b] as bands [groups, n, b]."""
    return np.ascontiguousarray(blocks.reshape(groups, -1, blocks.shape[-1])[:, :n].numpy())

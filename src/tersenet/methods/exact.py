"""Structure that weights already have: trees that hold an array without loss, likely in fewer bytes than its floats.

Constants, exact zeros, few distinct values, equal rows, and grids: many networks arrive pruned, shared or rounded, and
rounding them again would cost bytes and add an error. A sketch of some thousand values says first what is worth a look
at the whole, so that ordinary dense weights cost next to nothing; what is offered has been unpacked and compared.

A producer may compute scale * level in many ways, so a scale is not guessed: the values themselves bound it. Each value
w = round(q * scale) leaves an interval of scales, the intersection over a group holds all float32 scales that give
exactly these values, and the one whose mantissa ends in the most zeros is taken (a half-precision scale, if one does).
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tersenet.packed import Array, Codebook, Packed, Reshaped, Sparse, Tree, Uniform, narrowed, unpack

LEAST = 32  # values below which a node costs more than it saves
SKETCH = 4096  # values that are looked at first
ALPHABET = 4096  # distinct values of a tensor that may become a codebook
STEPS = 255  # the largest level of a grid with a scale for each group
GROUPS = (256, 128, 64, 32, 16)  # values that share a scale, where they are not a whole row
BLOCK = 1 << 18  # values that are fitted at a time
TIE = 2.0**-48  # far below the gap between float32 scales, far above the rounding of a float64 quotient


def exact(w: Array) -> list[Tree]:
    """At most three trees that unpack, in the type of `w`, to the same bits as this float array, the likely best first.

    Floats of 2, 4 and 8 bytes; an empty list where nothing was found, and for other types and fewer than 32 values.
    """
    w = np.ascontiguousarray(w)
    if w.dtype.kind != "f" or w.itemsize > 8 or w.size < LEAST:
        return []
    w = _single(w.astype(w.dtype.newbyteorder("="), copy=False))
    found = _constant(w) or [*_equal_rows(w), *_by_value(w)]
    return [tree for tree in found if _same(tree, w)]


def _bits(w: Array) -> Array:
    return w.view(f"u{w.itemsize}")


def _single(w: Array) -> Array:
    """A float64 array as float32 where that keeps every bit, as networks that were converted do."""
    if w.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            for part in (w.reshape(-1)[:SKETCH], w):  # most that do not fit show it early
                single = part.astype(np.float32)
                if not _same(single, part):
                    return w
        return single
    return w


def _same(tree: Tree, w: Array) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        dense = unpack(tree).astype(w.dtype, copy=False)
    return bool(dense.shape == w.shape and np.array_equal(_bits(dense), _bits(w)))


def _constant(w: Array) -> list[Tree]:
    """One value everywhere, as levels of 1 or, where float32 does not hold it, as a codebook of one."""
    bits = _bits(w).reshape(-1)
    if (bits[:SKETCH] != bits[0]).any() or (bits != bits[0]).any():
        return []
    one = w.reshape(-1)[:1]
    with np.errstate(over="ignore", invalid="ignore"):
        levels = Uniform(np.ones(w.shape, np.uint8), one.astype(np.float32).reshape(()))
    return [levels if _same(levels, w) else Codebook(np.zeros(w.shape, np.uint8), one[:, None])]


def _by_value(w: Array) -> Iterator[Tree]:
    """Trees that see what each value is: levels, a few shared values, zeros and others."""
    rng, bits = np.random.default_rng(0), _bits(w).reshape(-1)
    sketch = bits if bits.size <= SKETCH else bits[rng.integers(0, bits.size, SKETCH)]
    others = sketch[sketch != 0]
    few = 4 * np.unique(others).size <= 3 * others.size
    levels = _on_grid(_chunks(w, rng))
    shared = _shared(w) if few or (levels and bits is sketch) else None
    plain = shared if isinstance(shared, Uniform) else None
    grid: Packed | None = plain
    if plain is None or _most(plain) > 8:  # rows whose scales are multiples of one number make a grid of many levels
        apart = next(_by_group(w, levels, rng), None)
        grid = apart if apart is not None and (plain is None or 4 * _most(apart) <= _most(plain)) else plain
    if grid is not None:
        yield grid
    if shared is not None and shared is not grid:
        yield shared
    if grid is None and others.size < 0.95 * sketch.size:
        mask = (bits != 0).reshape(w.shape)
        values = w[mask]
        yield Sparse(mask, values if shared is None else _shared(values) or values)


def _most(tree: Packed) -> int:
    """The largest level of a grid."""
    node = tree.child if isinstance(tree, Reshaped) else tree
    return int(np.abs(node.q.astype(np.int64)).max()) if isinstance(node, Uniform) else 0


def _shared(w: Array) -> Packed | None:
    """Levels of one step or, where there is none, codewords, if the values are few and each comes often enough."""
    bits = _bits(w).reshape(-1)
    distinct, counts = np.unique(bits, return_counts=True)
    if distinct.size > ALPHABET:
        return None
    values = distinct.view(w.dtype)
    grid = _grid(values[None], _likely(values)) if np.isfinite(values).all() and w.dtype != np.float64 else None
    if grid is not None:
        levels, scale = grid
        return Uniform(narrowed(levels[0])[np.searchsorted(distinct, bits)].reshape(w.shape), scale.reshape(()))
    if 4 * distinct.size > w.size or not _pays(distinct, counts):
        return None
    order = np.argsort(values, kind="stable")
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    index = narrowed(rank)[np.searchsorted(distinct, bits)]
    return Codebook(index.reshape(w.shape), values[order][:, None])


def _pays(distinct: Array, counts: Array) -> bool:
    """Whether an index says in clearly fewer bits what the bytes of the floats say, each plane of bytes by itself.

    Weights that were only rounded to bfloat16 or float16 have few values too, and nothing to gain.
    """
    if distinct.size <= 256:
        return True
    planes = distinct.view(np.uint8).reshape(distinct.size, -1).T
    floats = sum(_entropy(np.bincount(plane, counts)) for plane in planes)
    table = 8 * distinct.nbytes / counts.sum()
    return bool(_entropy(counts) + table < 0.9 * floats)


def _entropy(counts: Array) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _by_group(w: Array, levels: bool, rng: np.random.Generator) -> Iterator[Tree]:
    """Levels with a scale for each row, column, place before the last axis, or group of values of a row."""
    rows, shape = (w.shape[0] if w.ndim > 1 else 1), w.shape
    row = w.size // rows
    ones = (1,) * (w.ndim - 1)
    if levels:
        for size, scales in ((row, (rows, *ones)), (shape[-1], (*shape[:-1], 1))):
            if 8 <= size < w.size and (grid := _grid(w.reshape(-1, size))) is not None:
                yield Uniform(narrowed(grid[0]).reshape(shape), grid[1].reshape(scales))
                return
    if w.ndim > 1 and w.size // shape[1] >= 8 and _on_grid(_columns(w, rng)):
        columns = np.moveaxis(w, 1, 0)
        if (grid := _grid(columns.reshape(shape[1], -1))) is not None:
            q = np.ascontiguousarray(np.moveaxis(narrowed(grid[0]).reshape(columns.shape), 0, 1))
            yield Uniform(q, grid[1].reshape(1, shape[1], *ones[1:]))
            return
    for size in GROUPS if levels else ():
        if row % size == 0 and row > size and (grid := _grid(w.reshape(-1, size))) is not None:
            split = (rows, row // size, size)
            tree = Uniform(narrowed(grid[0]).reshape(split), grid[1].reshape(*split[:2], 1))
            yield Reshaped(tree, split, (0, 1, 2), shape)
            return


def _chunks(w: Array, rng: np.random.Generator) -> Array:
    """Up to 16 neighbours of a row that share a group, whatever the groups are: [64, neighbours], or none."""
    rows = w.reshape(w.shape[0] if w.ndim > 1 else 1, -1)
    count = min(16, rows.shape[1])
    if count < 8:
        return w.reshape(-1)[:0].reshape(0, 1)
    begin = rng.integers(0, rows.shape[1] // count, 64) * count
    return rows[rng.integers(0, len(rows), (64, 1)), begin[:, None] + np.arange(count)]


def _columns(w: Array, rng: np.random.Generator) -> Array:
    """16 values of each of 64 places along the second axis: [64, 16]."""
    whole = w.reshape(*w.shape[:2], -1)
    place, *others = (rng.integers(0, whole.shape[axis], size) for axis, size in ((1, (64, 1)), (0, 16), (2, 16)))
    return whole[others[0], place, others[1]]


def _on_grid(sketch: Array) -> bool:
    """Whether the four fullest rows of a sketch [groups, values] each lie on a grid."""
    full = np.argsort(-np.count_nonzero(_bits(sketch), axis=1), kind="stable")[:4]
    rows = sketch[full]
    if not rows.size or not np.isfinite(rows).all():
        return False
    size, slack = _relative(rows)
    steps = np.arange(1, STEPS + 1)[:, None, None]
    return bool(_near(size, slack, steps).any(axis=0).all())


def _relative(groups: Array) -> tuple[Array, Array]:
    """Magnitudes over their group's largest, and how far rounding may have moved them: float64 [groups, values]."""
    size = np.abs(groups)
    above = (_bits(size) + 1).view(size.dtype).astype(np.float64)
    size = size.astype(np.float64)
    top = size.max(axis=1, keepdims=True)
    top[top == 0] = 1
    return size / top, 1.5 * (above - size) / top


def _near(size: Array, slack: Array, steps: Array) -> Array:
    """Whether all values of a group are near the integers when the largest is `steps`: the last axis goes."""
    scaled = size * steps
    near: Array = (np.abs(scaled - np.rint(scaled)) <= slack * steps).all(axis=-1)
    return near


def _likely(values: Array) -> list[int]:
    """Which level the largest of few distinct values may be: any small one, or as the two smallest gaps tell."""
    size = np.unique(np.abs(values).astype(np.float64))
    size = size[size > 0]
    found = set(range(1, STEPS + 1))
    for gap in (size[0], np.diff(size).min()) if size.size > 1 else ():
        guess = np.rint(np.arange(1, 5) * (size[-1] / gap))
        found |= {int(g) + off for g in guess[guess <= ALPHABET] for off in range(-2, 3)}
    return sorted(step for step in found if 0 < step <= ALPHABET)


def _grid(groups: Array, steps: Iterable[int] = range(1, STEPS + 1)) -> tuple[Array, Array] | None:
    """Levels [groups, values] and float32 scales [groups, 1] whose products are exactly these floats, or None.

    `steps` are the levels that the largest of a group may be. What the groups so far had is tried first.
    """
    if groups.dtype == np.float64:  # a product of float32 does not give these
        return None
    levels = np.empty(groups.shape, np.int16)
    scales = np.empty((len(groups), 1), np.float32)
    order, begin, count = list(steps), 0, 16  # a few groups first: most arrays that have no grid end there
    while begin < len(groups):
        block = groups[begin : begin + count]
        top = _largest(block, order)
        if top is None:
            return None
        q, scale = _fitted(block, top)
        with np.errstate(over="ignore", invalid="ignore"):
            product = (q.astype(np.float32) * scale).astype(groups.dtype)
        if not np.array_equal(_bits(product), _bits(block)):
            return None
        levels[begin : begin + count], scales[begin : begin + count] = q, scale
        often = np.bincount(top, minlength=max(order) + 1)
        order.sort(key=lambda step: -often[step])
        begin, count = begin + count, max(16, BLOCK // groups.shape[1])
    return levels, scales


def _largest(groups: Array, order: list[int]) -> Array | None:
    """The first of `order` that, as the level of a group's largest value, puts all others on integers; None if none."""
    if not np.isfinite(groups).all():
        return None
    size, slack = _relative(groups)
    some = slice(None, None, max(1, groups.shape[1] // 8))  # most steps fail on eight values
    found, left, at = np.zeros(len(groups), np.int64), np.arange(len(groups)), 0
    while left.size and at < len(order):
        steps = np.array(order[at : at + max(1, SKETCH // left.size)])  # few groups try many steps at once
        fits = _near(size[left, some], slack[left, some], steps[:, None, None])
        for step, fit in zip(steps, fits):
            fitting = left[fit & (found[left] == 0)]
            found[fitting[_near(size[fitting], slack[fitting], step)]] = step
        left, at = left[found[left] == 0], at + steps.size
    return None if left.size else found


def _fitted(groups: Array, top: Array) -> tuple[Array, Array]:
    """Levels and scales of groups [groups, values] whose largest values are the levels `top`."""
    size = np.abs(groups)
    bits = _bits(size)
    below, above = ((bits + step).view(size.dtype).astype(np.float64) for step in (-(bits > 0).astype(bits.dtype), 1))
    size = size.astype(np.float64)
    peak = size.max(axis=1, keepdims=True)
    q = np.rint(size * (top[:, None] / np.where(peak > 0, peak, 1)))
    odd = TIE * (bits & 1)  # halfway between two floats rounds to the even one
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(q > 0, (size + below) / 2 / q * (1 + odd), 0).max(axis=1, keepdims=True)
        high = np.where(q > 0, (size + above) / 2 / q * (1 - odd), np.inf).min(axis=1, keepdims=True)
    scale = np.where(peak > 0, _shortest(low, high), np.float32(1))
    return np.copysign(q, groups).astype(np.int16), scale


def _shortest(low: Array, high: Array) -> Array:
    """The float32 between two positive bounds that ends in the most zero bits; a wrong one where there is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        first, last = low.astype(np.float32), high.astype(np.float32)
    begin = first.view(np.uint32).astype(np.int64) + (first < low)
    end = last.view(np.uint32).astype(np.int64) - (last > high)
    best = begin
    for zeros in range(1, 24):
        rounded = -(-begin >> zeros) << zeros
        best = np.where(rounded <= end, rounded, best)
    return best.astype(np.uint32).view(np.float32)


def _equal_rows(w: Array) -> Iterator[Tree]:
    """A codebook of whole rows, where at least a tenth of them are equal to another."""
    if w.ndim < 2 or 16 * len(w) > w.size:
        return
    rows = _bits(w).reshape(len(w), -1)
    key, slots = np.zeros(len(rows), np.uint64), max(16, (16 * len(rows)).bit_length())
    for place in np.random.default_rng(1).integers(0, rows.shape[1], 3):  # rows that differ here need no other look
        key = (key + rows[:, place]) * np.uint64(3**39)
    taken = np.zeros(1 << slots, bool)
    taken[key >> np.uint64(64 - slots)] = True
    if 10 * np.count_nonzero(taken) > 9 * len(rows):
        return
    number: dict[bytes, int] = {}
    index = np.array([number.setdefault(row.tobytes(), len(number)) for row in rows])
    if 10 * len(number) > 9 * len(w):
        return
    first = np.unique(index, return_index=True)[1]
    codewords = np.ascontiguousarray(w.reshape(rows.shape)[first])
    inner = next(_by_value(codewords), codewords) if codewords.size >= LEAST else codewords
    tree = Codebook(narrowed(index)[:, None], inner)
    yield tree if w.ndim == 2 else Reshaped(tree, rows.shape, (0, 1), w.shape)

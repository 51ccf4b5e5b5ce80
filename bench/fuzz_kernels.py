"""Products of random packed weights against the unpacked ones, with the C core under address and undefined sanitizers.

Run: make bench NAME=fuzz_kernels; bench/fuzz_kernels.py CASES [FIRST] for so many from a number on, with the core as it
is. Every form, on every path that the machine has: shapes of 0, 1, odd, 65,535 and 65,537 columns, inputs that are not
finite, arrays that begin and end anywhere. A case that differs, or that a sanitizer stops, ends all with its number.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import sanitized
from table import write

from tersenet import native
from tersenet.runtime.convolution import Side, convolved
from tersenet.runtime.forms import GROUP, Form, SparseRows, Sum
from tersenet.runtime.layouts import codes, levels, masked_rows, sparse_columns, sparse_rows, vectors

CASES = 6000
EXTENTS = (0, 1, 2, 3, 15, 16, 17, 31, 64, 65, 127, 130, 257)
WIDE = (16_384, 16_385, 65_535, 65_536, 65_537)


def moved(array: Any, rng: np.random.Generator) -> Any:
    """The array a few places behind where memory was given out, and up to its end."""
    ahead = int(rng.integers(0, 4))
    room = np.empty(array.size + ahead, array.dtype)
    room[ahead:] = array.reshape(-1)
    return room[ahead:].reshape(array.shape)


def moved_form(form: Form, rng: np.random.Generator) -> Form:
    if isinstance(form, Sum):
        return dataclasses.replace(form, forms=tuple(moved_form(part, rng) for part in form.forms))
    parts = {f.name: getattr(form, f.name) for f in dataclasses.fields(form)}
    return type(form)(**{n: moved(p, rng) if isinstance(p, np.ndarray) else p for n, p in parts.items()})


def made(rng: np.random.Generator, rows: int, columns: int) -> tuple[Form, Any]:
    """A form of random kind and the weight that it is."""
    kind, dense = rng.integers(0, 6), rng.normal(size=(rows, columns)).astype(np.float32)
    mask = rng.random(dense.shape) < rng.random() ** 3
    size = int(rng.integers(1, 129))
    book, number = rng.normal(size=(256, 3)).astype(np.float32), rng.integers(0, size, dense.shape)
    if kind == 0:
        return sparse_rows(mask, dense[mask]), np.where(mask, dense, 0)
    if kind == 1:
        form = sparse_rows(mask, number[mask], book[:size, 0])
        turned = isinstance(form, SparseRows) and rng.random() < 0.5
        return sparse_columns(form) if turned else form, np.where(mask, book[number, 0], 0)
    if kind == 2:
        return masked_rows(mask, dense[mask]), np.where(mask, dense, 0)
    if kind == 3:
        return codes(number, book[:size, 0]), book[number, 0]
    if kind == 4:
        d = int(rng.integers(1, 4)) if columns < 1000 else 1
        return vectors(number, book[:size, :d]), book[number, :d].reshape(rows, columns * d)
    most = (4, 16, 256)[rng.integers(0, 3)]
    groups = next(g for g in (int(rng.integers(1, 9)), 1) if (columns % g == 0 and columns // g <= GROUP) or g == 1)
    q = rng.integers(0, most, dense.shape) - int(rng.integers(0, most))
    scale, zero = rng.random((rows, groups)).astype(np.float32), rng.integers(-20, 20, (rows, groups))
    factor = rng.random(columns).astype(np.float32) if rng.random() < 0.5 else None
    offset: Any = zero if rng.random() < 0.5 else int(rng.integers(-20, 20))
    weight = (q + np.repeat(np.broadcast_to(offset, zero.shape), columns // groups, 1)) * np.repeat(
        scale, columns // groups, 1
    )
    return levels(q, scale, offset, factor, int(rng.integers(2, 4))), weight * (1 if factor is None else factor)


def case(number: int) -> None:
    """Raises AssertionError where a product differs."""
    rng = np.random.default_rng(number)
    wide = rng.random() < 0.03
    rows, columns = int(rng.choice(EXTENTS)), int(rng.choice(WIDE if wide else EXTENTS))
    form, weight = made(rng, min(rows, 3) if wide else rows, columns)
    form = moved_form(form, rng)
    x = rng.normal(size=(int(rng.choice((0, 1, 2, 4, 5, 9, 16, 33))), weight.shape[1])).astype(np.float32)
    odd = rng.random() < 0.2 and x.size > 0
    if odd:
        x[-1, rng.integers(0, x.shape[1])] = rng.choice([np.nan, np.inf, -np.inf])
    native.simd = lambda: number % 3  # type: ignore[assignment]
    found = form.product(moved(x, rng), int(rng.integers(1, 4)))
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    sizes = np.abs(np.nan_to_num(x)).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
    sizes += np.abs(np.nan_to_num(x)).max(initial=0) * np.abs(weight).max(initial=0) * np.sqrt(columns)
    rest = slice(0, -1) if odd else slice(None)
    assert found.shape == expected.shape
    assert (np.abs(found - expected)[rest] <= 1e-4 * sizes[rest] + 1e-6).all()
    if number % 10 == 0:
        image(rng)


def image(rng: np.random.Generator) -> None:
    """A sparse convolution against sums of shifted images."""
    height, width = (
        Side(*map(int, (rng.integers(1, 4), rng.integers(1, 4), 1, *rng.integers(0, 3, 2)))) for _ in range(2)
    )
    shape = int(rng.integers(1, 5)), int(rng.integers(1, 4)), height.kernel, width.kernel
    weight = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), 0).astype(np.float32)
    images = rng.normal(size=(int(rng.integers(0, 3)), shape[1], *map(int, rng.integers(4, 20, 2)))).astype(np.float32)
    pads = (0, 0), (0, 0), (height.before, height.after), (width.before, width.after)
    padded = np.pad(images, pads)
    tall, wide = height.positions(images.shape[2]), width.positions(images.shape[3])
    expected = np.zeros((len(images), shape[0], tall, wide))
    for y in range(height.kernel):
        for x in range(width.kernel):
            part = padded[:, :, y :: height.stride, x :: width.stride][:, :, :tall, :wide]
            expected += np.einsum("nchw,oc->nohw", part, weight[:, :, y, x])
    flat = weight.reshape(shape[0], -1)
    form = moved_form(sparse_rows(flat != 0, flat[flat != 0]), rng)
    assert isinstance(form, SparseRows)
    assert np.allclose(convolved(form, images, (height, width), 2), expected, 1e-4, 1e-4)


def looked_at(cases: int, first: int) -> dict[str, Any]:
    """All cases; stops with the number of one that differs."""
    for number in range(first, first + cases):
        try:
            case(number)
        except AssertionError:
            sys.exit(f"case {number} differs: bench/fuzz_kernels.py 1 {number}")
        if number % 500 == 0:
            print(f"case {number}", file=sys.stderr, flush=True)
    return {"cases": cases, "first": first}


if __name__ == "__main__":
    if len(sys.argv) == 4:
        opened = native.opened(Path(sys.argv[3]))
        native.library = lambda: opened  # type: ignore[assignment]
        print(json.dumps(looked_at(int(sys.argv[1]), int(sys.argv[2]))))
    elif len(sys.argv) > 1:
        print(json.dumps(looked_at(int(sys.argv[1]), int((*sys.argv, 0)[2]))))
    else:
        write("fuzz_kernels", [{"core": "sanitized"} | sanitized(CASES, 0, __file__)])

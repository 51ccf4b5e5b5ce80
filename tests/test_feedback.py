"""Error feedback: its metric in blocks, its recursion in C and in NumPy, its trellis, its steps."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tersenet.artifact import Artifact, Tensor
from tersenet.codecs import CODECS
from tersenet.codecs.trellis import follows
from tersenet.methods import feedback
from tersenet.methods.feedback import Metric, Overflow, Steps, levels, paths, tree_of, waterfilled


def spread(n, generator, width=None):
    """A band [n, width] of Cholesky factors of blocks of a random second moment."""
    x = generator.normal(size=(n, 3 * n)) * np.linspace(0.2, 3, n)[:, None]
    a, band = x @ x.T / (3 * n) + 0.5 * x.mean() ** 2, np.zeros((n, width or n))
    for at in range(0, n, width or n):
        block = np.linalg.cholesky(a[at : at + band.shape[1], at : at + band.shape[1]])
        band[at : at + len(block), : len(block)] = block
    return band


def whole(band):
    """The factor [groups, n, n] of a band."""
    found = np.zeros((*band.shape[:2], band.shape[1]))
    for i in range(band.shape[1]):
        start = i // band.shape[2] * band.shape[2]
        found[:, i, start : i + 1] = band[:, i, : i + 1 - start]
    return found


def problem(rows=8, n=40, seed=0, widths=(None, None)):
    generator = np.random.default_rng(seed)
    bands = spread(n, generator, widths[0]), spread(rows, generator, widths[1])
    return generator.normal(size=(1, rows, n)), Metric(*(band[None] for band in bands))


def by_rows(metric):
    return replace(metric, outputs=metric.rows()[..., None])


def even(w, step):
    return np.full(w.shape[:2], step), np.ones(w.shape[2])


def test_with_a_diagonal_metric_feedback_is_rounding():
    w, metric = problem()
    flat = Metric(metric.inputs * np.eye(40), metric.outputs * np.eye(8))
    assert np.array_equal(levels(w, flat, even(w, 0.3), 0.0), np.rint(w / 0.3))
    diagonal = Metric(feedback.diagonal(metric.inputs)[..., None], metric.rows()[..., None])
    assert np.array_equal(levels(w, diagonal, even(w, 0.3), 0.0), np.rint(w / 0.3))
    one = np.full(w.shape[:2], 0.3), np.ones(1)
    assert np.array_equal(levels(w, replace(flat, inputs=None), one, 0.0), np.rint(w / 0.3))


def test_feedback_over_columns_and_rows_costs_less_than_over_columns_and_that_less_than_rounding():
    for seed in range(10):
        w, metric = problem(seed=seed)
        both = metric.cost(w - levels(w, metric, even(w, 0.5), 0.0) * 0.5)
        columns = metric.cost(w - levels(w, by_rows(metric), even(w, 0.5), 0.0) * 0.5)
        assert both < columns < metric.cost(w - np.rint(w / 0.5) * 0.5)


WAYS = [(False, False), (True, False), (False, True)]  # whether some are held at zero, whether in a trellis


@pytest.mark.parametrize("widths", [(16, 3), (7, 8), (40, 2), (2, 1), (33, 5)])
def test_blocks_are_the_whole_factor_with_zeros(widths):
    w, metric = problem(n=100, widths=widths)
    dense = Metric(whole(metric.inputs), whole(metric.outputs))
    if widths[1] == 1:  # weights are then not whitened, and may be rounded otherwise
        dense = by_rows(dense)
    error = w - np.rint(w)
    assert metric.cost(error) == pytest.approx(np.square(whole(metric.outputs)[0].T @ error @ dense.inputs[0]).sum())
    assert np.array_equal(metric.rows(), dense.rows())
    kept = np.random.default_rng(1).random(w.shape) < 0.5
    for some, trellis in WAYS:
        found, wanted = (levels(w, m, even(w, 0.2), 0.5, kept if some else None, trellis) for m in (metric, dense))
        assert np.array_equal(found, wanted)


def test_rows_of_other_blocks_do_not_matter():
    w, metric = problem(rows=9, widths=(None, 3))
    other = w.copy()
    other[0, 6:] *= 2
    found, changed = (levels(x, metric, even(w, 0.2), 0.0, None, True)[0] for x in (w, other))
    assert np.array_equal(found[:6], changed[:6]) and not np.array_equal(found[6:], changed[6:])


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("groups,rows,n,widths", [(1, 6, 20, (None, None)), (3, 6, 20, (8, 4)), (1, 37, 70, (33, 18))])
def test_the_twin_finds_the_same_levels(rate, groups, rows, n, widths, monkeypatch):
    problems = [problem(rows, n, seed, widths) for seed in range(groups)]
    w = np.concatenate([w for w, _ in problems])
    metric = Metric(*(np.concatenate([getattr(m, part) for _, m in problems]) for part in ("inputs", "outputs")))
    steps = waterfilled(metric, 0.3, 2, w.shape).parts()
    some = np.random.default_rng(groups).random(w.shape) < 0.4
    for known, (held, trellis) in itertools.product(
        (metric, by_rows(metric), replace(by_rows(metric), inputs=None)), WAYS
    ):
        kept = some if held else None
        native_levels = levels(w, known, steps, rate, kept, trellis)
        with monkeypatch.context() as without:
            without.setattr("tersenet.native.library", lambda: None)
            assert np.array_equal(levels(w, known, steps, rate, kept, trellis), native_levels)


def test_rows_of_a_trellis_are_paths_through_it_at_any_length():
    for n in (1, 2, 3, 31, 32, 33, 64, 65, 100):
        w, metric = problem(rows=5, n=n, seed=n)
        for known in (replace(by_rows(metric), inputs=None), metric):
            q = levels(w, known, even(w, 0.1), 0.0, None, True)
            assert follows(q[0])
        assert metric.cost(w - q * 0.1) <= metric.cost(w - np.rint(w / 0.2) * 0.2)


def both(w, metric, step, trellis):
    """The cost of levels and their number of bytes."""
    q = levels(w, metric, even(w, step), 0.0, None, trellis)
    return metric.cost(w - q * step), len(CODECS["context"].encode(q[0]))


def test_a_trellis_errs_a_decibel_less_in_as_many_bytes():
    w = np.random.default_rng(0).normal(size=(1, 60, 500)) * 4
    metric = Metric(None, np.ones((1, 60, 1)))
    (plain, size), (error, length) = both(w, metric, 1.0, False), both(w, metric, 0.5, True)
    assert length < 1.005 * size
    assert 10 * np.log10(plain / error) > 0.95
    w, metric = problem(rows=20, n=100)
    for step in (0.3, 1.0):
        assert both(w, metric, step / 2, True)[0] < 0.85 * both(w, metric, step, False)[0]
    with pytest.raises(ValueError, match="held at zero"):
        levels(w, metric, even(w, 1.0), 0.5, np.ones(w.shape, bool), True)


def test_short_rows_are_better_off_without_a_trellis():
    """At about two bits a weight, errors at equal bytes (6.02 dB a bit)."""
    for n, better in ((4, False), (6, False), (24, True), (48, True)):
        w = np.random.default_rng(n).normal(size=(1, 9600 // n, n))
        metric = Metric(None, np.ones((1, len(w[0]), 1)))
        (plain, size), (error, length) = both(w, metric, 1.0, False), both(w, metric, 0.5, True)
        gain = 10 * np.log10(plain / error) - 6.02 * 8 * (length - size) / w.size
        assert (gain > 0) == better == paths(n)


def test_levels_that_overflow_are_told():
    w, metric = problem()
    for trellis in (False, True):
        with pytest.raises(Overflow):
            levels(w, metric, even(w, 1e-9), 0.0, None, trellis)
        with pytest.raises(Overflow):
            levels(w * np.nan, metric, even(w, 1.0), 0.0, None, trellis)
        fine = np.linspace(0.5, 1, 64).reshape(1, 1, 64)
        found = levels(fine, Metric(None, np.ones((1, 1, 1))), even(fine, 1e-5), 0.0, None, trellis)
        assert np.abs(found * 1e-5 - fine).max() <= 2.1e-5


def test_waterfilled_steps_cost_what_they_promise_and_pricing_bits_makes_levels_smaller():
    w, metric = problem(rows=30, n=60)
    for known in (metric, problem(30, 60, 0, (25, 7))[1]):
        steps = waterfilled(known, 0.05, 1, w.shape)
        free, priced = (levels(w, known, steps.parts(), rate) for rate in (0.0, 1.0))
        assert known.cost(w - free * steps.dense()) == pytest.approx(0.05**2 / 12 * w.size, rel=0.3)
        assert np.abs(priced).sum() < np.abs(free).sum()


def test_the_others_make_up_for_what_is_held_at_zero():
    w, metric = problem()
    kept = np.random.default_rng(0).random(w.shape) < 0.5
    made_up = metric.cost(w - levels(w, metric, even(w, 0.01), 0.0, kept) * 0.01)
    assert made_up < 0.9 * metric.cost(w - np.where(kept, w, 0))


def test_steps_fall_on_the_grid():
    steps = Steps(0.5, np.zeros((1, 2), np.int8), np.array([[0], [2]], np.int8), np.array([[0, -1]], np.int8))
    assert np.allclose(steps.dense()[0, 0], [0.5, 0.5 / np.sqrt(2), 1.0, 1 / np.sqrt(2)])


def sent(problems, c):
    """The cost of all layers and the bytes of their file."""
    tensors, cost = {}, 0.0
    for k, (w, metric) in enumerate(problems):
        steps = waterfilled(metric, c, 1, w.shape)
        q = levels(w, metric, steps.parts(), 0.5)
        cost += metric.cost(w - q * steps.dense())
        tensors[str(k)] = Tensor(tree_of(q, steps, w.shape[1:], False))
    return cost, len(Artifact(tensors).to_bytes())


@pytest.mark.parametrize("n,count,spans", [(8, 40, 0.3), (16, 10, 0.3), (64, 2, 0.1), (64, 2, 0.6)])
def test_exponents_are_sent_where_they_pay(n, count, spans, monkeypatch):
    generator = np.random.default_rng(0)
    problems = [
        (generator.normal(size=(1, n, n)), Metric(*np.exp(spans * generator.normal(size=(2, 1, n, 1)))))
        for _ in range(count)
    ]
    cost, size = sent(problems, 0.25)
    weights = sum(w.size for w, _ in problems)
    some = feedback._exponents
    found = []
    for least in (-np.inf, np.inf):  # all of them, none of them; at equal cost
        with monkeypatch.context() as forced:
            forced.setattr(feedback, "_exponents", lambda wanted, n, _, least=least: (*some(wanted, n, least)[:2], 0.0))
            other, length = sent(problems, 0.25)
        found.append(length + np.log2(other / cost) / 2 * weights / 8)
    assert size < 1.003 * min(found)
    assert (found[0] < found[1]) == (n * spans > 20)

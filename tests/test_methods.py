"""One contract over the methods, and what each of them promises."""

import itertools

import numpy as np
import pytest
from conftest import floats

from tersenet.artifact import Artifact, Tensor, load
from tersenet.methods import chain
from tersenet.methods.kmeans import KMeans, exact, lloyd
from tersenet.methods.product import Product
from tersenet.methods.sparse import Magnitude, kept_count, largest
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Sparse, arrays, check_tree, check_tree_values, unpack

RATES = {
    "magnitude": [Magnitude(d) for d in (0.05, 0.2, 0.6, 1.0)],
    "kmeans": [KMeans(b) for b in (1, 3, 5, 8)],
    "kmeans-density": [KMeans(b, "density") for b in (2, 4, 6)],
    "kmeans-random": [KMeans(b, "random") for b in (2, 4, 6)],
    "kmeans-exact": [KMeans(b, "exact") for b in (1, 3, 5)],
    "kmeans-group": [KMeans(b, group=5) for b in (1, 2, 4)],
    "product": [Product(b, weighted=False) for b in (2, 4, 5)],
    "uniform": [Uniform(b) for b in (2, 4, 8, 12)],
    "uniform-row": [Uniform(b, by_row=True) for b in (2, 4, 8)],
    "chain": [chain(Magnitude(d), KMeans(4)) for d in (0.1, 0.5, 1.0)],
}


@pytest.mark.parametrize("name", RATES)
def test_a_method_keeps_the_shape_repeats_itself_and_errs_less_at_a_higher_rate(name):
    w = floats(24, 40) * 0.1
    errors = []
    for method in RATES[name]:
        tree = method.pack(w)
        check_tree(tree)
        check_tree_values(tree)
        assert tree.shape == w.shape
        for (_, a), (_, b) in zip(arrays(tree), arrays(method.pack(w)), strict=True):
            assert a.tobytes() == b.tobytes()
        errors.append(float(np.square(unpack(tree) - w).sum()))
        assert eval(repr(method), {**globals(), "Chain": type(chain())}) == method
    assert errors == sorted(errors, reverse=True)


def test_exact_k_means_equals_brute_force_over_all_splits():
    rng = np.random.default_rng(0)
    values, weights = np.sort(rng.normal(size=11)), rng.random(11) + 0.1

    def cost(centroids):
        return (weights * np.square(values[:, None] - centroids[None]).min(1)).sum()

    best = min(
        cost(
            np.array([np.average(v, weights=w) for v, w in zip(np.split(values, c), np.split(weights, c), strict=True)])
        )
        for c in itertools.combinations(range(1, 11), 3)
    )
    assert cost(exact(values, 4, weights)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_groups_of_channels_have_the_codebooks_that_they_have_alone(weighted):
    w, weights = floats(12, 5, 3, 3), 0.1 + floats(12, 5, 3, 3, seed=1) ** 2
    w[:4] = np.sign(w[:4])  # a group of two values, among groups of eight
    tree = KMeans(3, group=5, weighted=weighted).pack(w, {"weights": weights})
    assert tree.codewords.shape == (3, 8, 1) and tree.index.max() == 7
    for at in (0, 4, 8):
        alone = KMeans(3, weighted=weighted).pack(w[at : at + 4], {"weights": weights[at : at + 4]})
        assert np.array_equal(unpack(tree)[at : at + 4], unpack(alone))
    file = Artifact({"w": Tensor(tree)}).to_bytes()
    assert np.array_equal(load(file).unpack()["w"], unpack(tree))
    whole = KMeans(3, weighted=weighted).pack(w, {"weights": weights})
    assert (np.square(unpack(tree) - w) * weights).sum() < (np.square(unpack(whole) - w) * weights).sum()


def test_a_group_is_of_output_channels_or_refused():
    with pytest.raises(ValueError, match="finds no output channels here, as under a mask: leave the group out"):
        chain(Magnitude(0.5), KMeans(3, group=4)).pack(floats(8, 9))
    with pytest.raises(ValueError, match="a group of one output channel or more"):
        KMeans(group=0)


def test_lloyd_ends_where_no_step_improves_and_never_beats_the_exact_optimum():
    values, weights = np.sort(np.random.default_rng(1).laplace(size=3000)), np.ones(3000)

    def cost(centroids):
        return np.square(values[:, None] - centroids[None]).min(1).sum()

    found = lloyd(values, np.linspace(values[0], values[-1], 8), weights)
    assert np.array_equal(lloyd(values, found, weights, 1), found)
    assert cost(exact(values, 8, weights)) <= cost(found) + 1e-9 < cost(np.linspace(values[0], values[-1], 8))


def test_weighted_k_means_moves_towards_the_heavy_values():
    w = np.array([0.0, 1.0, 2.0, 10.0], np.float32)
    light = KMeans(1).pack(w).codewords.flatten()
    stats = {"weights": np.array([1.0, 1, 50, 1])}
    heavy = KMeans(1, weighted=True).pack(w, stats).codewords.flatten()
    assert light[0] == 1.0 and heavy[0] == pytest.approx(101 / 52)
    assert np.array_equal(KMeans(1).pack(w, stats).codewords.flatten(), light)
    with pytest.raises(ValueError, match="KMeans needs the Fisher information of each weight: give a Task"):
        KMeans(1, weighted=True).pack(w)


def test_magnitude_hits_its_density_to_one_weight_and_breaks_ties_by_place():
    w = np.ones((10, 10), np.float32)
    tree = Magnitude(0.333).pack(w)
    assert isinstance(tree, Sparse) and tree.mask.sum() == kept_count(0.333, 100) == 33
    assert tree.mask.reshape(-1)[:33].all()
    assert largest(np.array([2.0, 5, 5, 1]), 2).tolist() == [False, True, True, False]


def test_chaining_nests_nodes():
    tree = chain(Magnitude(0.1), KMeans(3)).pack(floats(30, 30))
    assert isinstance(tree, Sparse) and isinstance(tree.values, Codebook) and tree.values.codewords.shape == (8, 1)


def test_fewer_values_than_clusters_are_kept_exactly():
    w = np.array([[1.0, -1.0, 0.5, 1.0]], np.float32)
    assert np.array_equal(unpack(KMeans(5).pack(w)), w)


@pytest.mark.parametrize("shape", [(16, 24), (6, 12), (9, 35), (10, 8, 1, 1), (7, 11), (16, 8, 3, 3)])
def test_blocks_of_a_matrix_are_transformed_and_keep_squared_errors(shape):
    w, plain = floats(*shape), KernelDCT().pack(floats(*shape))
    tree = KernelDCT(8).pack(w)
    if shape == (7, 11):  # no block of two by two
        assert tree is w
        return
    check_tree(tree)
    assert np.allclose(unpack(tree), w, atol=1e-6) and tree.shape == shape
    (coefficients,) = [array for _, array in arrays(tree)]
    assert np.square(coefficients).sum() == pytest.approx(np.square(w).sum(), rel=1e-5)
    assert coefficients.shape[-2:] == {(16, 24): (8, 8), (6, 12): (6, 6), (9, 35): (3, 7)}.get(
        shape, coefficients.shape[-2:]
    )
    flat = KernelDCT(8).pack(np.ones(shape, np.float32))
    (coefficients,) = [array for _, array in arrays(flat)]
    assert np.allclose(
        np.count_nonzero(np.abs(coefficients) > 1e-5, (-2, -1)), 1
    )  # a block of equal values is one number
    assert np.array_equal(plain, w) == (shape != (16, 8, 3, 3))


def test_a_transform_before_rounding_is_the_same_as_rounding_in_the_other_basis():
    w = floats(16, 16)
    tree = chain(KernelDCT(8), Uniform(6)).pack(w)
    assert np.abs(unpack(tree) - w).max() < 8 * np.abs(unpack(KernelDCT(8).pack(w).child.coefficients)).max() / 31

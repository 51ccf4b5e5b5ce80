"""Dithered lattices for all layers together, and buckets shared by hashing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import floats
from test_stages import make_task

import tersenet as tn
from tersenet.draft import Draft
from tersenet.packed import Codebook, Hashed, Lattice, Sparse, map_arrays, sixteenth, unpack
from tersenet.splitmix import buckets, dither
from tersenet.stages.finetune import Finetune
from tersenet.stages.hashed import Hash
from tersenet.stages.prune import Prune
from tersenet.stages.universal import Universal


@pytest.fixture(scope="module")
def task():
    return make_task()


def lattices(draft):
    trees = [draft.tensors[name].tree for name in draft.weights()]
    return [tree.values if isinstance(tree, Sparse) else tree for tree in trees]


def of_array(w, stage):
    return stage(Draft.of_arrays({"w": w}), None).tensors["w"].tree


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_the_error_is_uniform_and_tells_nothing_of_the_weights(dimension):
    w = np.random.default_rng(0).laplace(size=(300, 200)).astype(np.float32)
    tree = of_array(w, Universal(4, dimension, seed=3))
    assert isinstance(tree, Lattice)
    step = float(sixteenth(tree.step))
    assert step == pytest.approx(np.abs(w).max() / 2**3, rel=0.03)
    error = ((unpack(tree) - w) / step).astype(np.float64)
    assert np.abs(error).max() <= 0.5 + 1e-5
    share = np.histogram(error, 10, (-0.5, 0.5))[0] / error.size
    assert np.allclose(share, 0.1, atol=0.01) and error.var() == pytest.approx(1 / 12, rel=0.02)
    assert abs(np.corrcoef(error.reshape(-1), w.reshape(-1))[0, 1]) < 0.02
    plain = unpack(of_array(w, Universal(4, dithered=False))) - w  # not so without a dither
    assert abs(np.corrcoef(plain.reshape(-1), w.reshape(-1))[0, 1]) > 0.02


def test_the_dither_is_the_same_for_ever_and_shared_by_neighbours():
    assert dither(5, 3).tolist() == [0.47984135150909424, 0.380789577960968, -0.35841578245162964]
    assert np.array_equal(dither(5, 100)[:3], dither(5, 3)) and abs(float(dither(9, 100_000).mean())) < 0.005
    tree = Lattice(np.zeros(7, np.float32), 0, 5, 3, (2, 3))
    assert np.array_equal(unpack(tree).reshape(-1), -np.repeat(dither(5, 2), 3))
    as_torch = unpack(map_arrays(tree, lambda _, array: torch.from_numpy(array)))
    assert np.array_equal(as_torch.numpy(), unpack(tree))


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_layers_share_one_table_and_pruned_zeros_stay_zero(task, dimension, tmp_path):
    pruned = Prune(0.3, 1, retrain="none")(Draft.of_model(task.model), None)
    after = Universal(5, dimension)(pruned, task)
    tables = {id(tree.point.codewords) for tree in lattices(after)}
    assert len(tables) == 1
    used = np.concatenate([tree.point.index for tree in lattices(after)])
    assert np.array_equal(np.unique(used), np.arange(len(lattices(after)[0].point.codewords)))
    tuned = Finetune(1, lr=0.001, gradient="mean")(after, task)
    for name in after.weights():
        was, now, in_the_end = (unpack(d.tensors[name].tree) for d in (pruned, after, tuned))
        assert np.array_equal(was == 0, now == 0) and not in_the_end[was == 0].any()
    assert len({np.asarray(tree.point.codewords).tobytes() for tree in lattices(tuned)}) == 1
    assert not np.array_equal(lattices(tuned)[0].point.codewords, lattices(after)[0].point.codewords)


def test_settings_that_cannot_be_are_refused():
    for wrong, message in (
        (lambda: Universal(1), "2 to 12 bits"),
        (lambda: Universal(4, 2, dithered=False), "takes one dimension"),
        (lambda: Hash(0.0), r"in \(0, 1\]"),
        (lambda: Finetune(gradient="median"), "'sum' over its members"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    zeros = Draft.of_arrays({"w": np.zeros((30, 40), np.float32)})
    assert Universal()(zeros, None) is zeros


def test_a_buckets_gradient_is_the_sum_over_its_places_with_their_signs():
    place, sign = buckets(3, 600, 40)
    assert set(sign) == {1.0, -1.0} and 0 <= place.min() < place.max() < 40
    assert abs(sign.mean()) < 0.15 and np.bincount(place, minlength=40).min() > 3
    tree = Hashed(torch.from_numpy(floats(40)).requires_grad_(), 3, (20, 30))
    pulled = torch.from_numpy(floats(20, 30, seed=2))
    (unpack(tree) * pulled).sum().backward()
    expected = np.bincount(place, sign * pulled.numpy().reshape(-1), 40)
    assert np.allclose(tree.buckets.grad.numpy(), expected, atol=1e-5)
    assert np.array_equal(unpack(Hashed(floats(40), 3, (20, 30))), unpack(tree).detach().numpy())


def test_hashed_networks_learn_from_the_beginning_and_are_small(task, tmp_path):
    result = tn.compress(task, tn.papers.hashed_nets(0.125, epochs=6), folder=tmp_path / "kept")
    trees = [t.tree for t in result.artifact.tensors.values() if isinstance(t.tree, Hashed)]
    assert trees and all(len(tree.buckets) == round(0.125 * np.prod(tree.shape)) for tree in trees)
    result.artifact.save(tmp_path / "w.terse")
    assert tn.verify(tmp_path / "w.terse", task=task)["metric"] == result.after > 0.6
    assert result.artifact.nbytes < 2 * 0.125 * 1.1 * Draft.of_model(task.model).count() + 1000


def test_frozen_weights_are_not_hashed_since_nothing_would_train_them(task):
    model = copy.deepcopy(task.model)
    model.first.weight.requires_grad_(False)
    own = replace(task, model=model)
    after = Hash(0.125, (("first*", 0.5),), epochs=1)(Draft.of_model(model), own).tensors
    assert np.array_equal(unpack(after["first.weight"].tree), model.first.weight.detach().numpy())
    assert isinstance(after["last.weight"].tree, Hashed)


def test_the_paper_of_universal_compression_meets_a_size(task, tmp_path):
    recipe = tn.papers.universal(0.3, 4, 2, rounds=1)
    result = tn.compress(task, recipe, tn.Budget(size=6000), folder=tmp_path)
    assert result.artifact.nbytes <= 6000
    kinds = [type(node) for t in result.artifact.tensors.values() for node in [getattr(t.tree, "values", t.tree)]]
    assert Lattice in kinds and Codebook not in kinds

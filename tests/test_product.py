"""Product quantization: nearest codewords, their metric, vectors in layers, error feedback, tuning by distillation."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import floats
from hypothesis import given
from hypothesis import strategies as st
from test_stages import make_task

import tersenet as tn
from tersenet import cores
from tersenet.draft import Draft
from tersenet.methods.product import Product, length, means, nearest, shared
from tersenet.methods.surgeon import damped
from tersenet.packed import Codebook, Reshaped, map_arrays, unpack
from tersenet.stages.finetune import Distill
from tersenet.stages.layerwise import Layerwise
from tersenet.stages.pack import Pack


@pytest.fixture(scope="module")
def task():
    return make_task()


def moments(n, groups=1, seed=5):
    x = floats(groups, 4 * n, n, seed=seed) @ floats(n, n, seed=seed + 1) + 1
    return np.einsum("gsi,gsj->gij", x, x).astype(np.float64) / (4 * n)


@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 9))
def test_the_nearest_codeword_is_that_of_brute_force_in_c_and_numpy(n, k, d):
    vectors, codewords = floats(n, d), floats(k, d, seed=1)
    codewords[k // 2] = codewords[0]  # the first among equals
    found = nearest(vectors, codewords)
    distance = np.square(vectors[:, None].astype(np.float64) - codewords[None]).sum(2)
    assert np.allclose(distance[np.arange(n), found], distance.min(1), rtol=1e-5, atol=1e-6)
    assert not (found == k // 2).any() or k // 2 == 0


def test_c_and_numpy_find_the_same_codewords_on_any_number_of_threads(both, monkeypatch):
    vectors = floats(70_000, 4)
    expected = 2_195_817  # the sum of all numbers
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cores, "usable", lambda threads=threads: threads)
        found.append(nearest(vectors, vectors[:64]))
    assert all(np.array_equal(found[0], other) for other in found)
    assert int(found[0].sum()) == expected


def test_k_means_lowers_the_error_with_each_step_and_leaves_no_codeword_unused():
    vectors = np.concatenate([floats(500, 3), np.zeros((300, 3), np.float32)])
    errors = []
    for steps in (1, 2, 4, 8, 16, 100):
        codewords, index = shared(vectors, 64, steps, 0)
        assert np.array_equal(np.unique(index), np.arange(len(codewords))) and len(codewords) == 64
        errors.append(float(np.square(vectors - codewords[index]).sum()))
    assert errors == sorted(errors, reverse=True)
    assert np.allclose(codewords, means(vectors, index, 64), atol=1e-5)
    few = np.repeat(floats(5, 3), 40, 0)
    assert len(shared(few, 64, 100, 0)[0]) == 5  # the splitting ends though most clusters stay empty


@pytest.mark.parametrize("groups", [1, 2])
def test_each_vector_has_the_nearest_codeword_by_the_inputs_that_it_multiplies_and_those_are_the_best(groups):
    w, a = floats(48, 20), moments(20, groups) * np.exp(np.random.default_rng(4).normal(size=(groups, 20, 1)) / 2)
    a = a @ a.transpose(0, 2, 1)
    tree = Product(4, feedback=False).pack(w, {"inputs": a})
    assert isinstance(tree, Codebook) and tree.codewords.shape == (16, 4)
    blocks = np.stack([damped(a, 0.01)[:, k : k + 4, k : k + 4] for k in range(0, 20, 4)], 1)  # [groups, 5, 4, 4]
    vectors = w.reshape(groups, -1, 5, 1, 4).astype(np.float64)
    apart = vectors - tree.codewords
    costs = np.einsum("gmbki,gbij,gmbkj->gmbk", apart, blocks, apart)
    index = tree.index.reshape(groups, -1, 5)
    chosen = np.take_along_axis(costs, index[..., None].astype(int), 3)[..., 0]
    assert (chosen <= costs.min(3) * (1 + 1e-4) + 1e-6).all()
    for k, codeword in enumerate(tree.codewords):  # the error of its vectors has no slope
        own = index == k
        pulled = np.einsum("gmbi,gbij->gmbj", vectors[..., 0, :] - codeword, blocks)[own].sum(0)
        assert own.any() and np.abs(pulled).max() < 1e-3 * np.abs(blocks).max() * own.sum()
    plain = unpack(Product(4, weighted=False).pack(w)).reshape(groups, -1, 5, 4)
    lost = np.einsum("gmbi,gbij,gmbj->", vectors[..., 0, :] - plain, blocks, vectors[..., 0, :] - plain)
    assert chosen.sum() < 0.8 * lost


@pytest.mark.parametrize(
    "shape,kernels,columns,expected",
    [
        ((64, 32, 3, 3), 1, 288, 9), ((64, 32, 3, 3), 2, 288, 18), ((64, 32, 1, 1), 1, 32, 4),
        ((64, 32, 1, 1), 2, 32, 8),
        ((16, 3, 3, 3), 2, 27, 9), ((16, 20, 5, 5), 1, 500, 5), ((10, 64), 1, 64, 4), ((10, 27), 1, 27, 3),
        ((32, 1, 3, 3), 1, 9, 9), ((10, 13), 1, 13, 1),
    ],
)  # fmt: skip
def test_vectors_are_kernels_or_runs_of_four_or_the_next_smaller_divisor(shape, kernels, columns, expected):
    assert length(shape, columns, kernels) == expected


def test_a_convolution_has_one_vector_for_each_kernel_and_fewer_codewords_than_a_quarter_of_them(tmp_path):
    w = floats(16, 32, 3, 3)
    tree = Product(8, weighted=False).pack(w)
    assert isinstance(tree, Reshaped) and tree.child.index.shape == (16, 32) and tree.child.codewords.shape == (64, 9)
    alike = w.reshape(512, 9)[tree.child.index.reshape(-1) == tree.child.index[3, 7]]
    assert np.allclose(unpack(tree)[3, 7].reshape(-1), alike.mean(0), atol=1e-6)
    artifact = tn.Artifact({"w": tn.artifact.Tensor(tree)})
    artifact.save(tmp_path / "w.terse")
    assert np.array_equal(tn.load(tmp_path / "w.terse").unpack()["w"], unpack(tree))
    as_torch = map_arrays(tree, lambda _, array: torch.from_numpy(np.array(array)))
    assert np.array_equal(unpack(as_torch).numpy(), unpack(tree))
    bound = 512 * 6 / 8 + 4 * 64 * 9  # the paper's formula, in float32
    assert bound * 0.9 < artifact.nbytes < bound + 80


def test_error_feedback_loses_less_in_the_metric_of_the_whole_layer():
    w, a = floats(2 * 20, 12, 3, 3), moments(108, groups=2)
    lost = {}
    for feedback in (False, True):
        tree = Product(5, feedback=feedback).pack(w, {"inputs": a})
        error = (w - unpack(tree)).reshape(2, 20, 108).astype(np.float64)
        lost[feedback] = np.einsum("gri,gij,grj->", error, a, error)
    assert lost[True] < 0.8 * lost[False]


def test_what_two_codewords_would_be_too_many_for_stays_dense():
    w = floats(2, 8)
    assert Product(weighted=False).pack(w) is w
    with pytest.raises(ValueError, match="Product needs the moments of the layer's inputs: give a Task"):
        Product().pack(floats(64, 64))


def test_distilling_moves_a_codeword_by_the_mean_of_its_members_gradients_and_nothing_else(task):
    draft = Pack(Product(4, weighted=False))(Draft.of_model(task.model), task)
    name = "first.weight"
    own = replace(draft, trainable=frozenset({name}))
    one = replace(task, train=tuple(part[:128] for part in task.train), valid=task.test, augment=None)
    one = replace(one, schedule=replace(task.schedule, batch=128, momentum=0.0, adam=False))
    after = Distill(1, lr=0.5).tuned(own, one, "test")
    for other in (other for other, held in draft.tensors.items() if held is not draft.tensors[name]):
        assert np.array_equal(unpack(after.tensors[other].tree), unpack(draft.tensors[other].tree)), other
    model = draft.module()
    (x, _), teacher = one.train, task.model.eval()
    with torch.no_grad():
        wanted = teacher(x)
    loss = tn.teacher.soft_targets(model.eval()(x), wanted, 1.0)
    (gradient,) = torch.autograd.grad(loss, [dict(model.named_parameters())[name]])
    tree, moved = draft.tensors[name].tree, after.tensors[name].tree
    k, d = tree.codewords.shape
    expected = tree.codewords - 0.5 * means(gradient.numpy().reshape(-1, d), tree.index.reshape(-1), k)
    assert np.array_equal(moved.index, tree.index)
    assert np.allclose(moved.codewords, expected, atol=1e-5)


def test_the_paper_runs_and_distillation_brings_outputs_nearer_to_the_teachers(task, tmp_path):
    recipe = tn.papers.bit_goes_down(5, epochs=1, final=2)
    assert isinstance(recipe[0], Layerwise) and recipe[0].distill == Distill(1)
    tuned = tn.compress(task, recipe, folder=tmp_path)
    plain = tn.compress(task, tn.papers.bit_goes_down(5, epochs=0, final=0), folder=tmp_path)
    assert abs(tuned.artifact.nbytes - plain.artifact.nbytes) < 100
    apart = []
    for result in (tuned, plain):
        with torch.no_grad():
            found = result.artifact.into(tn.task.duplicate(task.model)).eval()(task.test[0])
            apart.append(float(tn.teacher.soft_targets(found, task.model.eval()(task.test[0]), 1.0)))
    assert apart[0] < 0.8 * apart[1]


def test_the_paper_packs_frozen_layers_too_and_trains_the_others(task):
    model = copy.deepcopy(task.model)
    model.second.weight.requires_grad_(False)
    recipe = tn.papers.bit_goes_down(4, epochs=1, final=1)
    after = recipe[0](Draft.of_model(model), replace(task, model=model))
    assert isinstance(after.tensors["second.weight"].tree, Codebook)

"""Compact filters: the nearest of their form, which training keeps, in one file and in layers that are smaller."""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import floats
from torch import nn

import tersenet as tn
from tersenet.artifact import load
from tersenet.container import NOTES
from tersenet.draft import Draft, artifact_of
from tersenet.methods.compact import UNFIT, CReLU, Fire, Grouped, Rotations, Separable
from tersenet.packed import Factored, Sparse, check_tree, check_tree_values, unpack
from tersenet.realise import absorb, realise
from tersenet.stages.finetune import Finetune
from tersenet.stages.pack import Narrow, Pack

METHODS = (Separable(), Fire(), Fire(0.5, 0.25), Grouped(), Grouped(4), CReLU(), Rotations())
KERNEL = floats(16, 8, 3, 3)


def numbers(tree):
    return sum(np.asarray(a).size for a in tn.packed.float_leaves(tree).values())


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (8, 12, 5, 5), (32, 4, 3, 3)])
def test_a_form_is_the_nearest_to_a_kernel_and_holds_fewer_numbers(method, shape):
    """Each form is closed under scaling: at the nearest of it the error is at right angles, and the form is its own."""
    w = floats(*shape)
    tree = method.pack(w)
    check_tree(tree)
    check_tree_values(tree)
    near = np.asarray(unpack(tree), np.float64)
    assert near.shape == w.shape and numbers(tree) < w.size
    assert 0 < np.square(near - w).sum() < np.square(w).sum()
    assert abs(((w - near) * near).sum()) < 1e-5 * np.square(w).sum()
    assert np.allclose(unpack(method.pack(near.astype(np.float32))), near, atol=1e-5)


def test_their_sizes_are_those_of_the_papers_forms():
    counts = {str(m): numbers(m.pack(KERNEL)) for m in METHODS}
    assert counts["Separable()"] == 16 * 8 + 8 * 9
    assert counts["Fire(squeeze=0.25, wide=0.5)"] == 4 * 8 + 8 * 4 + 8 * 4 * 9
    assert counts["Grouped(groups=2)"] == KERNEL.size // 2 and counts["Grouped(groups=4)"] == KERNEL.size // 4
    assert counts["CReLU()"] == KERNEL.size // 2 + 1 and counts["Rotations()"] == KERNEL.size // 4 + 1


def test_no_form_of_a_separable_kernel_drawn_at_random_is_nearer():
    draw, w = np.random.default_rng(0), KERNEL.astype(np.float64)
    least = np.square(unpack(Separable().pack(KERNEL)) - w).sum()
    for _ in range(50):
        depth = draw.normal(size=(8, 3, 3))
        point = np.einsum("oihw,ihw->oi", w, depth) / np.square(depth).sum((1, 2))  # the best for these
        assert np.square(np.einsum("oi,ihw->oihw", point, depth) - w).sum() > least


def test_crelu_pairs_filters_that_are_opposite():
    half = floats(6, 3, 5, 5)
    whole = np.concatenate([half, -half])[np.random.default_rng(0).permutation(12)]
    assert np.allclose(unpack(CReLU().pack(whole)), whole, atol=1e-6)


def test_rotated_filters_say_the_same_of_a_turned_image_turned():
    """p4's equivariance: a quarter turn of the image turns the maps and moves them on by a quarter of the rows."""
    first, second = Rotations().pack(floats(8, 3, 3, 3)), Rotations().pack(floats(12, 8, 3, 3))

    def maps(x):
        y = nn.functional.conv2d(x, torch.from_numpy(unpack(first)), padding=1).relu()
        return nn.functional.conv2d(y, torch.from_numpy(unpack(second)), padding=1)

    x = torch.from_numpy(floats(2, 3, 7, 7))
    wanted = torch.rot90(maps(x), 1, (2, 3)).reshape(2, 4, 3, 7, 7).roll(1, 1).reshape(2, 12, 7, 7)
    assert torch.allclose(maps(torch.rot90(x, 1, (2, 3))), wanted, atol=1e-4)
    assert np.shares_memory(Rotations().pack(floats(4, 8, 3, 3)).factors[1].q, second.factors[1].q)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", [(10, 6), (9, 7, 1, 1), (7, 1, 3, 3), (7, 5, 4, 4)])
def test_what_has_not_the_shape_stays_whole_and_says_so(method, shape):
    w = floats(*shape)
    tree = method.pack(w)
    assert tree is w or numbers(tree) < w.size
    if tree is w and len(shape) > 2:
        layer = nn.Conv2d(shape[1], shape[0], shape[2:])
        draft = Pack(method)(Draft.of_model(nn.Sequential(layer, nn.Conv2d(8, 16, 3))), None)
        assert draft.tensors["0.weight"].note == UNFIT and UNFIT in NOTES
        assert artifact_of(draft).to_bytes()
        with pytest.raises(ValueError, match=r"^0.weight: not of the shape .* nor is any other weight"):
            Pack(method)(Draft.of_model(nn.Sequential(layer)), None)


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, padding_mode="reflect"), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    schedule = tn.Schedule(epochs=12, lr=0.05, batch=32)
    return tn.Task(net, (x[:900], y[:900]), (x[1000:], y[1000:]), schedule=schedule).trained()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_training_keeps_the_form_and_layers_become_really_smaller_and_come_back(method, task):
    draft = Pack(method)(Draft.of_model(task.model), None)
    tuned = Finetune(1, lr=0.02)(draft, task)
    for name in ("3.weight", "5.weight"):
        before, after = (unpack(d.tensors[name].tree) for d in (draft, tuned))
        assert np.abs(after - before).max() > 1e-4, f"{name}: nothing was trained"
        again = method.pack(after) if not isinstance(method, CReLU | Fire) else None  # these choose rows anew
        assert again is None or np.allclose(unpack(again), after, atol=1e-4)
    x = task.test[0][:20]
    if isinstance(method, Rotations):
        with pytest.warns(UserWarning, match=r"stay dense: .*3.weight"):
            small = realise(task.model, tuned.tensors).eval()
    else:
        with warnings.catch_warnings(action="error"):
            small = realise(task.model, tuned.tensors).eval()
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in task.model.parameters())
    assert torch.allclose(small(x), tuned.module().eval()(x), atol=1e-4)
    assert absorb(small, task.model, tuned.tensors)["3.weight"] is tuned.tensors["3.weight"]
    if not isinstance(method, Rotations | Fire):
        with torch.no_grad():
            small[3][0 if isinstance(method, CReLU) else -1].weight.mul_(1.5)
            small[3][-1].bias.add_(1)
        back = absorb(small, task.model, tuned.tensors)
        assert type(back["3.weight"].tree) in (Factored, Sparse)
        assert np.allclose(unpack(back["3.weight"].tree), 1.5 * unpack(tuned.tensors["3.weight"].tree), atol=1e-5)
        assert np.allclose(back["3.bias"].unpack(), tuned.tensors["3.bias"].unpack() + 1)
    file = load(artifact_of(Narrow()(tuned, None)).to_bytes())
    assert (file.into(copy.deepcopy(task.model))(x) - tuned.module().eval()(x)).abs().max() < 0.1


@pytest.mark.parametrize("kind", tn.papers.COMPACT)
def test_the_recipe_distils_them_back(kind, task, tmp_path):
    plain = tn.compress(task, tn.papers.compact_filters(kind, epochs=0), folder=tmp_path)
    done = tn.compress(task, tn.papers.compact_filters(kind, epochs=6), folder=tmp_path)
    assert done.after > max(plain.after, 0.85)
    assert done.artifact.nbytes < 0.75 * artifact_of(Narrow()(Draft.of_model(task.model), None)).nbytes


def test_wrong_settings_are_one_line():
    for wrong in (lambda: Fire(0), lambda: Grouped(1), lambda: tn.papers.compact_filters("small")):
        with pytest.raises(ValueError, match=r"Fire takes|2 groups|one of separable"):
            wrong()

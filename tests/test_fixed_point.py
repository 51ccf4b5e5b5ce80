"""Fixed point, ternary weights, powers of two, and training at few bits."""

import numpy as np
import pytest
import torch
from conftest import floats
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet.draft import Draft
from tersenet.methods.fixed_point import FixedPoint, PowersOfTwo, Ternary, fraction, powers
from tersenet.packed import Sparse, Uniform, unpack
from tersenet.stages.lsq import LSQ, _Learned
from tersenet.stages.prune import Prune


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("size", [1e-4, 0.3, 1.0, 700.0])
def test_fixed_point_has_a_step_of_a_power_of_two_and_saturates(bits, size):
    w = size * floats(30, 40) / 4
    tree = FixedPoint(bits).pack(w)
    step = float(tree.scale)
    assert np.log2(step) == round(np.log2(step)) == -fraction(w, bits)
    assert -(2 ** (bits - 1)) <= tree.q.min() and tree.q.max() < 2 ** (bits - 1)
    last = (2 ** (bits - 1) - 1) * step
    assert np.abs(unpack(tree) - np.clip(w, -last - step, last)).max() <= step / 2 * (1 + 1e-6)
    assert last + step >= np.abs(w).max() > (last + step) / 2 - step  # no bit is wasted


def test_halves_are_rounded_to_even_and_zeros_have_a_step():
    assert FixedPoint(4).pack(np.array([0.5, 1.5, 2.5, -0.5, 7.0], np.float32)).q.tolist() == [0, 2, 2, 0, 7]
    assert not unpack(FixedPoint(4).pack(np.zeros((3, 3), np.float32))).any()


@pytest.mark.parametrize("by_row", [False, True])
def test_ternary_weights_have_the_mean_of_what_is_above_the_threshold(by_row):
    w = floats(8, 50)
    tree = Ternary(by_row).pack(w)
    for k in range(8):
        own = np.abs(w[k] if by_row else w)
        above = own > 0.7 * own.mean()
        expected = np.sign(w[k]) * own[above].mean() * (np.abs(w[k]) > 0.7 * own.mean())
        assert np.allclose(unpack(tree)[k], expected, atol=1e-6)


def test_powers_of_two_are_taken_from_three_quarters_to_three_halves():
    values, cuts = powers(0.9, 4)
    assert values.tolist() == [-1.0, -0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5, 1.0]
    assert cuts[4:].tolist() == [0.0625, 0.1875, 0.375, 0.75]
    w = floats(40, 30) / 4
    dense = unpack(PowersOfTwo(4).pack(w))
    sizes = np.abs(dense[dense != 0])
    assert np.array_equal(np.log2(sizes), np.rint(np.log2(sizes))) and np.unique(dense).size <= 9
    assert (np.abs(w)[dense != 0] / sizes).min() + 1e-9 > 0.5 and (np.abs(w)[dense != 0] / sizes).max() <= 1.5 + 1e-6


def test_a_steps_gradient_is_that_of_the_paper():
    """Equation 3: round(w / s) - w / s inside the range, -Q or Q outside, times 1 / sqrt(N Q)."""
    w, s = torch.from_numpy(floats(50)).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    node = _Learned(w, s, torch.ones(50, dtype=torch.bool), 3, None)
    pulled = torch.from_numpy(floats(50, seed=1))
    (node.unpack() * pulled).sum().backward()
    ratio = (w / s).detach()
    own = torch.where(ratio < -4, -4.0, torch.where(ratio > 3, 3.0, ratio.round() - ratio))
    assert float(s.grad) == pytest.approx(float((own * pulled).sum()) / (50 * 3) ** 0.5, rel=1e-4)
    assert torch.allclose(w.grad, torch.where((ratio >= -4) & (ratio <= 3), pulled, 0.0))


@pytest.mark.parametrize("pruned", [False, True])
def test_training_at_few_bits_gives_levels_of_these_bits_and_is_better_than_rounding(task, pruned):
    draft = Draft.of_model(task.model)
    draft = Prune(0.4, 1, retrain="none")(draft, None) if pruned else draft
    after = LSQ(2, (("conv*", 4),), epochs=4)(draft, task)
    for name in draft.weights():
        tree = after.tensors[name].tree
        assert isinstance(tree, Sparse) == pruned
        levels = tree.values if pruned else tree
        low, high = (-8, 7) if name.startswith("conv") else (-2, 1)
        assert isinstance(levels, Uniform) and low <= levels.q.min() and levels.q.max() <= high
        assert not unpack(tree)[unpack(draft.tensors[name].tree) == 0].any()
    rounded = LSQ(2, (("conv*", 4),), epochs=0)(draft, task)
    assert task.score(task.test, after.module()) > task.score(task.test, rounded.module()) + 0.04


def test_the_paper_of_learned_steps_meets_a_size_and_verifies(task, tmp_path):
    result = tn.compress(task, tn.papers.lsq(8, epochs=1), tn.Budget(size=15_000), folder=tmp_path / "kept")
    assert result.artifact.nbytes <= 15_000
    result.artifact.save(tmp_path / "w.terse")
    assert tn.verify(tmp_path / "w.terse", task=task)["metric"] == result.after


def test_a_network_of_convolutions_alone_takes_fixed_point(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    tensors = tn.compress(tn.Task(model, data), tn.papers.fixed_point(6), folder=tmp_path).artifact.tensors
    assert all(np.abs(tensors[name].tree.q.astype(int)).max() in range(16, 33) for name in ("0.weight", "2.weight"))

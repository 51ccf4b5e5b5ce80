"""Estimates of mutual information: bounds, closed forms, memory, and the plane of a network in training."""

import copy
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fresh_process
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits
from torch import nn

import tersenet as tn
from tersenet import information
from tersenet.information import Information, InformationPlane, akde, binned, ebab, edges, kde

ESTIMATORS = {
    "ebab": ebab,
    "fixed bins": lambda t, y: binned(t, y, np.linspace(-2, 2, 29)),
    "akde, lower": lambda t, y: akde(t, y)[0],
    "akde, upper": lambda t, y: akde(t, y)[1],
}


def entropy(labels):
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log2(shares)).sum())


@st.composite
def layers(draw):
    """Outputs of a layer and labels: repeated and saturated values, zeros, units without spread, classes of one."""
    count, units = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    values = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(-100, 100, width=32)
    t = draw(arrays(np.float32, (count, units), elements=values))
    return t, draw(arrays(np.int64, count, elements=st.integers(0, 3)))


@settings(deadline=None, max_examples=50)
@given(layers())
def test_no_estimate_is_over_log2_of_the_samples_or_the_entropy_of_the_labels(layer):
    t, y = layer
    for estimator in ESTIMATORS.values():
        found = estimator(t, y)
        assert -1e-9 <= found.inputs <= math.log2(len(t)) + 1e-9
        assert found.labels <= entropy(y) + 1e-9
    assert all(-1e-9 <= found.labels <= found.inputs + 1e-9 for found in (ebab(t, y), ESTIMATORS["fixed bins"](t, y)))
    low, high = akde(t, y)
    assert low.inputs <= high.inputs + 1e-9


@settings(deadline=None)
@given(layers(), st.integers(1, 300))
def test_increasing_maps_change_nothing_for_adaptive_bins(layer, bins):
    t, y = layer
    ranks = np.unique(t, return_inverse=True)[1].reshape(t.shape)
    for other in (ranks.astype(float), np.exp(ranks / 8.0), -5.0 + ranks**3):
        assert ebab(other, y, bins) == ebab(t, y, bins)


def test_adaptive_bins_hold_equal_numbers_of_distinct_values_and_zeros_alone():
    values = np.random.default_rng(0).permutation(np.arange(1.0, 301.0))
    t = np.concatenate([np.zeros(900), values, np.full(200, 300.0)])[:, None]
    inside = np.searchsorted(edges(t, 30), t[:1200], "right")
    assert np.bincount(inside.ravel()).tolist() == [900] + 30 * [10]
    assert np.array_equal(edges(np.array([[3.0], [3.0]])), [])
    assert np.array_equal(edges(t[::3], 10), edges(np.repeat(t[::3], 5, axis=1), 10))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_layer_that_says_the_same_to_all_tells_nothing(name):
    y = np.arange(31) % 3
    for value in (0.0, -0.3, 1e6):
        assert ESTIMATORS[name](np.full((31, 7), value, np.float32), y) == Information(0.0, 0.0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_far_clusters_are_counted(name):
    """Eight points, the classes two and six of them: 3 bits of the inputs, all of the labels."""
    corners = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], np.float32)
    found = ESTIMATORS[name](corners, np.array([0, 0, 1, 1, 1, 1, 1, 1]))
    assert found.inputs == pytest.approx(3, abs=1e-9)
    assert found.labels == pytest.approx(entropy([0, 0, 1, 1, 1, 1, 1, 1]), abs=1e-9)


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("variance", [0.1, 1.0])
def test_a_gaussian_lies_between_the_bounds_and_each_bound_where_its_own_closed_form_says(units, variance):
    """T is N(0, I): I(T;T') = d/2 log2(1 + 1/v), and -E log2 E exp(-|t - t'|^2 / 2u) has a closed form for any u."""
    rng = np.random.default_rng(3)
    low, high = kde(rng.normal(size=(4096, units)), rng.integers(0, 2, 4096), variance)
    true = units / 2 * math.log2(1 + 1 / variance)

    def bound(u):
        return units / 2 * (math.log2(1 + 1 / u) + math.log2(math.e) / (u + 1))

    assert low.inputs < true < high.inputs
    assert low.inputs == pytest.approx(bound(4 * variance), rel=0.03)
    assert high.inputs == pytest.approx(bound(variance), rel=0.03)
    # labels by chance: each sample counts among its own class, which is log2(e) 2^I(X;T) / N, and not twice that
    for found in (low, high):
        assert abs(found.labels) < 2 * math.log2(math.e) * 2**found.inputs / 4096


def test_adaptive_bins_of_a_gaussian_and_of_its_sign():
    rng = np.random.default_rng(4)
    t = rng.normal(size=(2 * 15 * 130 + 1, 1))  # a smallest value, and 130 values in each of 30 bins
    found = ebab(t, (t[:, 0] > np.median(t)).astype(int))
    assert found.inputs == pytest.approx(math.log2(30), abs=0.005)
    assert found.labels == pytest.approx(1, abs=0.005)
    noisy = (t[:, 0] + 0.5 * rng.normal(size=len(t)) > 0).astype(int)
    at = np.linspace(-6, 6, 4001)
    right = np.array([(1 + math.erf(x / 0.5 / math.sqrt(2))) / 2 for x in at]).clip(1e-300, 1 - 1e-16)
    wrong = -(right * np.log2(right) + (1 - right) * np.log2(1 - right))
    density = np.exp(-(at**2) / 2)
    assert ebab(t, noisy).labels == pytest.approx(1 - (wrong * density).sum() / density.sum(), abs=0.02)


def test_adaptive_noise_does_not_see_the_scale_of_a_layer():
    rng = np.random.default_rng(5)
    t, y = rng.normal(size=(300, 4)), rng.integers(0, 3, 300)
    assert [akde(1024 * t, y), akde(t / 1024, y)] == [akde(t, y)] * 2
    t /= np.abs(t).max()
    assert akde(t, y) == kde(t, y, 1e-3)
    assert kde(4 * t, y, 0.1)[0].inputs > kde(t, y, 0.1)[0].inputs + 1


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_blocks_do_not_change_the_number(monkeypatch, block):
    """Against the whole matrix of distances, the samples and units in parts that do not fit evenly."""
    rng = np.random.default_rng(6)
    t, y = (rng.normal(size=(233, 45)) + 50).astype(np.float32), rng.integers(0, 4, 233)
    squares = ((t[:, None].astype(float) - t[None]) ** 2).sum(2)
    monkeypatch.setattr(information, "BLOCK", block)
    for found, factor in zip(kde(t, y, 5.0), (8, 2), strict=True):
        near = np.exp(-squares / (factor * 5.0))
        within = np.array([row[y == label].mean() for row, label in zip(near, y, strict=True)])
        assert found.inputs == pytest.approx(-np.log2(near.mean(1)).mean(), abs=1e-9)
        assert found.labels == pytest.approx(np.log2(within / near.mean(1)).mean(), abs=1e-9)
    whole = ebab(t, y)
    monkeypatch.undo()
    assert whole == ebab(t, y)


def test_wide_layers_are_binned_by_every_kth_sample(monkeypatch):
    t = np.random.default_rng(7).normal(size=(1000, 8))
    monkeypatch.setattr(information, "POOLED", 2000)
    some = edges(t, 10)
    assert np.array_equal(some[1:], edges(t[::4], 10)[1:]) and np.isin(some, t[::4]).all()


def test_memory_is_bounded_where_all_distances_would_take_half_a_gigabyte():
    script = (
        "import numpy as np\n"
        "from tersenet.information import kde\n"
        "from tersenet.journal import memory\n"
        "rng = np.random.default_rng(0)\n"
        "t, y = rng.normal(size=(8192, 6)), rng.integers(0, 2, 8192)\n"
        "kde(t[:50], y[:50], 1.0)\n"
        "before = memory()\n"
        "kde(t, y, 1.0)\n"
        "print(memory() - before)\n"
    )
    cores = len(os.sched_getaffinity(0))
    assert float(fresh_process(script)) < 80 * (cores + 1)


def test_the_same_numbers_twice_and_at_any_number_of_threads():
    script = (
        "import sys, torch, numpy as np\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "from tersenet.information import akde, ebab\n"
        "rng = np.random.default_rng(0)\n"
        "t, y = rng.normal(size=(2000, 40)).astype(np.float32), rng.integers(0, 2, 2000)\n"
        "for _ in range(2):\n"
        "    print(akde(t, y), akde(t[:, :2], y), ebab(t[:, :2], y))\n"
    )
    lines = [line for threads in "12" for line in fresh_process(script, threads, OMP_NUM_THREADS=threads).splitlines()]
    assert len(lines) == 4 and len(set(lines)) == 1


def test_wrong_use_is_said_in_a_line():
    t, y = np.zeros((4, 2)), np.zeros(4, int)
    wrong = {
        "give one output or more and one class a sample": (t, y[:3]),
        "one class a sample": (t, np.zeros((4, 2), int)),
        "outputs \\(0, 2\\)": (t[:0], y[:0]),
        "classes as whole numbers": (t, y + 0.5),
        "NaN or infinity": (t + np.nan, y),
    }
    for message, arguments in wrong.items():
        for estimator in (ebab, akde):
            with pytest.raises(ValueError, match=message):
                estimator(*arguments)
    for wrong_noise in (lambda: kde(t, y, 0.0), lambda: akde(t + 1, y, 0.0), lambda: akde(t + 1, y, -1.0)):
        with pytest.raises(ValueError, match="variance"):
            wrong_noise()
    with pytest.raises(ValueError, match="0 bins"):
        ebab(t, y, 0)


# ---------------------------------------------------------------- the plane


class Functional(nn.Module):
    """A layer called twice, one that is never called, a tuple returned, and dropout."""

    def __init__(self):
        super().__init__()
        self.twice, self.unused, self.gru = nn.Linear(8, 8), nn.Linear(8, 8), nn.GRU(8, 5, batch_first=True)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.drop(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return self.last(self.gru(x[:, None])[0][:, 0])


def functional_task():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(600, 8)).astype(np.float32))
    torch.manual_seed(0)
    return tn.Task(Functional(), train=(x, (x[:, 0] > 0).long()))


def test_a_plane_has_what_each_module_says_by_the_order_of_calls_and_leaves_the_model_as_it_was():
    task = functional_task()
    model, (x, y) = task.model, task.train
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plane = InformationPlane(task, task.train)
    plane.record(0)
    assert [point.layer for point in plane.points] == ["twice", "twice:2", "drop", "gru", "last"]
    with torch.no_grad():
        first = model.twice(x)
        expected = [first, model.twice(torch.tanh(first))]
        expected.append(torch.tanh(expected[1]))  # dropout passes on what it gets in evaluation
    for point, outputs in zip(plane.points, expected, strict=False):
        assert Information(point.inputs, point.labels) == ebab(outputs.numpy(), y.numpy())
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plane.record(0)
    assert plane.points[:5] == plane.points[5:]


def test_a_layer_is_read_before_the_next_changes_its_outputs_in_place():
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True))
    task = tn.Task(model, train=(x, (x[:, 0] > 0).long()))
    plane = InformationPlane(task, task.train)
    plane.record(0)
    with torch.no_grad():
        before = model[0](x).numpy()
    told = [ebab(t, task.train[1].numpy()).inputs for t in (before, before.clip(0))]
    assert [point.inputs for point in plane.points] == told
    assert plane.points[0].inputs > plane.points[1].inputs


def test_small_whole_numbers_are_outputs_too():
    t, y = np.random.default_rng(0).integers(1, 9, (40, 3)), np.arange(40) % 2
    for kind in (np.uint8, np.float16):
        assert akde(t.astype(kind), y) == akde(t.astype(float), y) and ebab(t.astype(kind), y) == ebab(t, y)


def test_hooks_are_gone_after_an_error_too():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.hooked = nn.Linear(8, 2), []

        def forward(self, x):
            self.layer(x)
            self.hooked.append(self.layer)
            raise RuntimeError("broken")

    task = functional_task()
    model = Breaks()
    running = task.running(model)
    with pytest.raises(RuntimeError, match="broken"):
        InformationPlane(task, task.train)._outputs(running, {"layer": running.layer}, task.train[0])
    assert not running.layer._forward_hooks


def test_layers_and_outputs_that_do_not_fit_are_named():
    task = functional_task()

    def record(*layers, data=task.train, model=None):
        InformationPlane(task, data, layers).record(3, model)

    with pytest.raises(ValueError, match="nowhere: the model has no such module"):
        record("last", "nowhere")
    with pytest.raises(ValueError, match="unused: the model never calls"):
        record("last", "unused")
    with pytest.raises(ValueError, match=r"last, epoch 3: labels are .*float32"):
        record("last", data=(task.train[0], task.train[0][:, 0]))
    broken = Functional()
    with torch.no_grad():
        broken.last.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="last, epoch 3: outputs hold NaN"):
        record("last", model=broken)

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            return self.layer(x.sum()) + x

    with pytest.raises(ValueError, match="layer: does not return numbers for each sample"):
        record("layer", model=Sums())


def test_what_a_network_tells_of_its_labels_grows_in_training_and_the_picture_shows_it(tmp_path):
    digits = load_digits()
    torch.manual_seed(0)
    task = tn.Task(
        nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)),
        train=(torch.tensor(digits.data[:600] / 16, dtype=torch.float32), torch.tensor(digits.target[:600])),
        schedule=tn.Schedule(epochs=4, lr=0.05, batch=64),
    )
    plane = InformationPlane(task, task.train, estimator=lambda t, y: akde(t, y, noise=0.1)[1])
    trained = task.trained(keep=(1,))
    for epoch, state in [*trained.snapshots.items(), (4, trained.model.state_dict())]:
        model = copy.deepcopy(task.model)
        model.load_state_dict(state)
        plane.record(epoch, model)
    last = [point for point in plane.points if point.layer == plane.points[-1].layer]
    assert [point.epoch for point in last] == [1, 4]
    assert last[-1].labels > last[0].labels
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plane.figure().savefig(tmp_path / "plane.svg")
    picture = (tmp_path / "plane.svg").read_text()
    axes = plane.figure().axes[0]
    assert picture.startswith("<?xml") and [t.get_text() for t in axes.get_legend().get_texts()] == [
        point.layer for point in plane.points if point.epoch == 1
    ]
    dots = axes.collections[-1]
    assert dots.get_offsets().tolist() == [[point.inputs, point.labels] for point in last]
    assert dots.get_array().tolist() == [0, 1]


def test_a_picture_says_what_it_lacks(monkeypatch):
    plane = InformationPlane(functional_task(), None)
    with pytest.raises(ValueError, match=r"record\(\) a model first"):
        plane.figure()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"tersenet\[report\]"):
        plane.figure()


def test_the_python_of_the_page_runs_and_draws_its_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page = (Path(__file__).parents[1] / "docs" / "information.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    fresh_process(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert (tmp_path / "plane.svg").read_text().count("I(X;T), bits") == 1

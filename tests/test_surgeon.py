"""Second-order pruning: exact costs, masks that hit their density, and networks that keep their accuracy longer."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet import calibrate, native
from tersenet.draft import Draft, artifact_of
from tersenet.methods.sparse import largest
from tersenet.methods.surgeon import SparseGPT, refitted, removals, swept
from tersenet.packed import Sparse, unpack
from tersenet.stages.finetune import TrainLevels
from tersenet.stages.obs import OBS, Prunable
from tersenet.stages.prune import Prune
from tersenet.stages.waterfill import Waterfill
from tersenet.structure import support
from tersenet.teacher import soft_targets
from tersenet.tracing.operations import Form


@pytest.fixture(scope="module")
def task():
    return make_task()


def problem(n=24, rows=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 3 * n)) * np.linspace(0.3, 2, n)[:, None]
    return generator.normal(size=(rows, n)), x @ x.T / (3 * n)


def cost(error, moment):
    return float(np.einsum("ri,ij,rj->", error, moment, error))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 20))
def test_the_costs_of_removals_add_up_to_what_the_best_survivors_lose(seed, n):
    w, moment = problem(n, 1, seed)
    order, costs = removals(w[0], np.linalg.inv(moment), n // 2)
    mask = np.ones((1, n), bool)
    mask[0, order] = False
    best = refitted(w, mask, moment)
    assert cost(best - w, moment) == pytest.approx(costs.sum(), rel=1e-6)
    for p in range(n):  # and the first is the cheapest of all
        alone = np.ones((1, n), bool)
        alone[0, p] = False
        assert cost(refitted(w, alone, moment) - w, moment) >= costs[0] * (1 - 1e-9)


def test_the_surgeon_and_its_twin_take_the_same_weights(monkeypatch):
    w, moment = problem()
    found = removals(w[0], np.linalg.inv(moment), 20)
    monkeypatch.setattr(native, "library", lambda: None)
    twin = removals(w[0], np.linalg.inv(moment), 20)
    assert np.array_equal(found[0], twin[0]) and np.array_equal(found[1], twin[1])


def test_surgery_loses_less_than_magnitude_at_one_density():
    w, moment = problem(160, 8)
    kept = largest(np.abs(w), w.size // 4)
    dense, mask = swept(w, moment, 0.25, block=32)
    exact = np.ones(w.shape, bool)
    for i, row in enumerate(w):
        exact[i, removals(row, np.linalg.inv(moment), 120)[0]] = False
    losses = [cost(x - w, moment) for x in (refitted(w, exact, moment), dense, np.where(kept, w, 0))]
    assert losses == sorted(losses)
    assert mask.sum() == w.size // 4 and not dense[~mask].any()
    tree = SparseGPT(0.25).pack(w.astype(np.float32), {"inputs": moment[None]})
    assert tree.mask.sum() == w.size // 4
    with pytest.raises(ValueError, match="needs the moments of the layer's inputs"):
        SparseGPT(0.25).pack(w.astype(np.float32))


def test_with_moments_of_one_the_surgeon_is_magnitude_pruning(task):
    draft = Draft.of_model(task.model)
    layers = []
    for name in draft.weights():
        w = unpack(draft.tensors[name].tree).astype(np.float64)
        rows = w.reshape(1, len(w), -1)
        n = rows.shape[2]
        units = np.eye(n)[None], np.eye(len(w))[None, None]
        layers.append(Prunable(name, Form.plain(w.shape), rows, np.ones(rows.shape, bool), *units, np.zeros((1, n))))
    found = OBS(0.2, "kronecker")._ranked(draft, layers)
    plain = Prune(0.2, 1, retrain="none")(draft, task)
    assert all(np.array_equal(found.tensors[n].tree.mask, plain.tensors[n].tree.mask) for n in draft.weights())


@pytest.mark.parametrize("order", ["kronecker", "exact", "sweep"])
def test_every_order_hits_its_density_and_moves_what_survives(task, order):
    before = Draft.of_model(task.model)
    draft = OBS(0.3, order, samples=256)(before, task)
    masks = {name: support(draft.tensors[name].tree) for name in draft.weights()}
    total, kept = (sum(count(mask) for mask in masks.values()) for count in (np.size, np.count_nonzero))
    assert abs(kept - 0.3 * total) <= (len(masks) if order == "sweep" else 0.5)
    for name, mask in masks.items():
        w = unpack(draft.tensors[name].tree)
        assert not w[~mask].any()
        assert mask.all() or np.abs(w - before.tensors[name].tree)[mask].max() > 0
    assert (draft.tensors["last.bias"].tree != before.tensors["last.bias"].tree).any()
    assert np.array_equal(draft.tensors["first.bias"].tree, before.tensors["first.bias"].tree)  # its weight is tied


def test_what_was_pruned_stays_pruned(task):
    first = Prune(0.5, 1, retrain="none")(Draft.of_model(task.model), task)
    for order in ("kronecker", "exact", "sweep"):
        second = OBS(0.2, order, samples=256)(first, task)
        for name in first.weights():
            free = support(second.tensors[name].tree)
            assert not (free & ~first.tensors[name].tree.mask).any() and not free.all()


def test_mlprune_runs_in_rounds_and_resumes(task, tmp_path):
    recipe = tn.papers.mlprune(0.2, rounds=2, epochs=1)
    whole = tn.compress(task, recipe, folder=tmp_path / "a").artifact
    tn.compress(task, recipe[:3], folder=tmp_path / "b")
    resumed = tn.compress(task, recipe, folder=tmp_path / "b")
    assert resumed.artifact.to_bytes() == whole.to_bytes()
    assert [row.get("kept", False) for row in resumed.rows] == [True, True, True, False, False]
    assert resumed.rows[2]["density"] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("paper", [tn.papers.exact_obs, tn.papers.sparsegpt], ids=lambda p: p.__name__)
def test_surgery_makes_the_same_file_at_any_number_of_threads(task, paper, tmp_path):
    files = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        files.append(tn.compress(task, paper(0.4, samples=256), folder=tmp_path / str(threads)).artifact.to_bytes())
    assert files[0] == files[1]


def test_trained_levels_keep_their_zeros_and_steps_and_lower_the_distance_to_the_teacher(task):
    own = replace(task, model=copy.deepcopy(task.model), teacher=copy.deepcopy(task.model).eval())
    draft = Waterfill(0.03, samples=256)(Draft.of_model(own.model), own)
    assert artifact_of(TrainLevels(0)(draft, own)).to_bytes() == artifact_of(draft).to_bytes()
    with pytest.raises(ValueError, match="no levels: quantize first"):
        TrainLevels(1)(Draft.of_model(own.model), own)
    trained = TrainLevels(3, lr=0.002)(draft, own)
    moved = 0
    for name in draft.weights():
        before, after = (d.tensors[name].tree for d in (draft, trained))
        before, after = (getattr(t, "coefficients", t) for t in (before, after))
        if isinstance(before, np.ndarray):
            continue
        assert not after.q[before.q == 0].any()
        assert np.array_equal(before.scale, after.scale) and len(before.steps) == len(after.steps)
        moved += int((after.q != before.q).sum())
    assert moved
    x = own.train[0][:512]
    with torch.no_grad():
        wanted = own.teacher.models[0](x)
        far = [
            float(soft_targets(artifact_of(d).into(copy.deepcopy(own.model)).eval()(x), wanted))
            for d in (draft, trained)
        ]
    assert far[1] < far[0]


def test_soft_targets_vanish_for_equal_outputs_and_their_gradients_keep_their_size_as_the_temperature_grows():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(32, 10, generator=generator)
    assert float(soft_targets(wanted, wanted)) == pytest.approx(0, abs=1e-6)
    sizes = []
    for temperature in (20.0, 80.0):
        outputs = torch.zeros(32, 10, requires_grad=True)
        soft_targets(outputs, wanted, temperature).backward()
        sizes.append(float(outputs.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_sparse_trees_are_what_pruning_makes(task):
    draft = OBS(0.3, "sweep", samples=128)(Draft.of_model(task.model), task)
    assert all(isinstance(draft.tensors[n].tree, Sparse) for n in draft.weights())
    with pytest.raises(ValueError, match="order among"):
        OBS(0.3, "best")
    with pytest.raises(ValueError, match="give a Task"):
        OBS(0.3)(draft, None)


class Odd(nn.Module):
    """Weights that lie in other settings than rows of inputs."""

    def __init__(self):
        super().__init__()
        self.tokens, self.up = nn.Embedding(9, 8), nn.ConvTranspose1d(8, 12, 2, stride=2, groups=2)
        self.grouped, self.plain = nn.Conv1d(12, 12, 3, groups=3), nn.Parameter(torch.randn(12, 6) / 3)
        self.heads = nn.Parameter(torch.randn(2, 3, 10) / 2)

    def forward(self, tokens):
        x = torch.relu(self.grouped(torch.relu(self.up(self.tokens(tokens).transpose(1, 2)))))
        x = torch.relu(x.mean(2) @ self.plain)
        return torch.einsum("nhc,hcd->nd", x.unflatten(1, (2, 3)), self.heads)


@pytest.mark.parametrize("most", [1 << 23, 60])
@pytest.mark.parametrize(
    "order,update", [("kronecker", "sum"), ("kronecker", "best"), ("exact", "best"), ("sweep", "best")]
)
def test_weights_of_every_form_are_pruned_and_wide_ones_by_blocks(order, update, most, monkeypatch):
    monkeypatch.setattr(calibrate, "MOST", most)
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (128, 5))
    task = tn.Task(Odd(), (tokens, torch.randint(0, 10, (128,))))
    before = Draft.of_model(task.model)
    draft = OBS(0.6, order, update, samples=115)(before, task)
    trees = [draft.tensors[name].tree for name in before.weights()]
    assert all(isinstance(tree, Sparse) for tree in trees) and len(trees) == 5
    kept, total = sum(int(tree.mask.sum()) for tree in trees), sum(tree.mask.size for tree in trees)
    assert kept == pytest.approx(0.6 * total, abs=0.5 if order != "sweep" else 25)
    inputs = task.calibration(115)

    def far(draft):
        with torch.no_grad():
            pairs = [(draft.module().eval()(x), task.model.eval()(x)) for x in inputs]
        return sum(float((a - b).square().sum()) for a, b in pairs)

    plain = Prune(0.6, 1, retrain="none", scope="layer" if order == "sweep" else "global")(before, None)
    if update == "best":
        assert far(draft) < far(plain)


def test_blocks_of_a_layer_are_laid_and_put_back():
    rng = np.random.default_rng(0)
    form = Form((2, 3, 5, 4), (0, 2, 1, 3), 2, 2)
    w = rng.normal(size=(6, 5, 4))
    matrix = form.matrix(w)  # [2, 5, 12]
    units = np.tile(np.eye(5), (6, 1, 1)), np.tile(np.eye(2), (2, 3, 1, 1))
    blank = np.zeros((6, 5, 5))
    layer = Prunable("w", form, blank, blank.astype(bool), *units, np.zeros((6, 5)))
    laid = layer.laid(w)
    assert laid.shape == (6, 5, 5) and layer.widths == [5, 5, 2] * 2 and layer.size == 120
    assert np.array_equal(np.concatenate(list(laid[:3]), 1)[:, :12], matrix[0])
    assert np.array_equal(layer.whole(laid).reshape(w.shape), w)
    assert np.allclose(layer.moved(laid), laid) and np.array_equal(layer.stiffness, np.ones((6, 5, 5)))

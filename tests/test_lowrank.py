"""Low rank: what decompositions give back, which ranks are chosen, and that real layers say the same."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import floats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tersenet as tn
from tersenet.allocators.rank import Curve, cost, keeps, mapped, modelled
from tersenet.artifact import load
from tersenet.draft import Draft, artifact_of
from tersenet.methods import chain
from tersenet.methods.cp import CP
from tersenet.methods.evbmf import evbmf
from tersenet.methods.factorize import DAMPING, SVD, Tucker2, products, tucker2
from tersenet.methods.surgeon import damped
from tersenet.methods.tensor_train import TensorTrain, balanced, numbers, tensor_train
from tersenet.methods.uniform import Uniform
from tersenet.packed import Factored, Sliced, arrays, check_tree, unpack
from tersenet.packed import Uniform as UniformNode
from tersenet.realise import realise
from tersenet.stages.lowrank import ENC, WHOLE, by_accuracy
from tersenet.stages.pack import NO_RANK, Narrow, Pack
from tersenet.structure import nodes, sliced

KERNEL = floats(24, 20, 3, 3)


def mixed(*shape, rank, noise=0.0, seed=0):
    """A matrix of a rank in noise."""
    draw = np.random.default_rng(seed)
    low = draw.normal(size=(shape[0], rank)) @ draw.normal(size=(rank, shape[1])) / math.sqrt(rank)
    return low + noise * draw.normal(size=shape)


def values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 576), (60, 60)])
@pytest.mark.parametrize("rank,noise", [(1, 0.3), (5, 0.3), (12, 0.1), (7, 1e-4)])
def test_evbmf_finds_a_planted_rank_in_noise_of_any_size(shape, rank, noise):
    matrix = mixed(*shape, rank=rank, noise=noise)
    assert evbmf(values(matrix), shape) == rank
    assert evbmf(values(1e6 * matrix), shape) == evbmf(values(1e-6 * matrix.T), shape[::-1]) == rank


def test_evbmf_finds_nothing_in_noise_alone_and_everything_without_noise():
    assert evbmf(values(np.random.default_rng(0).normal(size=(50, 80))), (50, 80)) == 0
    assert evbmf(np.zeros(5), (5, 8)) == 0
    assert evbmf(values(mixed(50, 80, rank=6)), (50, 80)) == 6


# ---------------------------------------------------------------- decompositions


def count(tree):
    """How many numbers a tree holds."""
    return sum(array.size for _, array in arrays(tree))


def test_full_rank_gives_the_weight_back():
    x = torch.from_numpy(KERNEL.astype(np.float64)).reshape(24, 20, 9)
    for w in (KERNEL, KERNEL[:, :, 0, 0], KERNEL[:, :, :1, :1], KERNEL[:, :, 0]):
        found = products(w)
        assert np.allclose(unpack(found.tree(found.values.shape[1])), w, atol=1e-5)
    found = products(KERNEL, spatial=True)
    assert np.allclose(unpack(found.tree(60)), KERNEL, atol=1e-5) and found.equation == "owr,rih->oihw"
    u, core, v = tucker2(x, 24, 20)
    assert torch.allclose(torch.einsum("or,rsk,si->oik", u, core, v), x, atol=1e-10)
    cores, whole = tensor_train(x, 1000), torch.ones(1, 1, dtype=torch.double)
    for one in cores:
        whole = torch.tensordot(whole, one, 1)
    assert torch.allclose(whole.reshape(x.shape), x, atol=1e-10)


def planted(kind):
    """A kernel that is of a low rank of this kind, and the method that finds it."""
    draw = np.random.default_rng(1)
    made = {
        "svd": ("or,rihw->oihw", {"r": 3}, SVD(3, weighted=False)),
        "space": ("orw,rih->oihw", {"r": 4}, SVD(4, spatial=True, weighted=False)),
        "tucker": ("or,rshw,si->oihw", {"r": 5, "s": 4}, Tucker2((5, 4))),
        "evbmf": ("or,rshw,si->oihw", {"r": 5, "s": 4}, Tucker2()),
        "cp": ("or,rh,rw,ri->oihw", {"r": 3}, CP(3, turns=200)),
        "train": ("hwr,raix,xbj->abijhw", {"r": 2, "x": 3, "i": 4}, TensorTrain(3, rows=(4, 6), columns=(4, 5))),
    }[kind]
    equation, extent, method = made
    extent = {"o": 24, "i": 20, "h": 3, "w": 3, "a": 4, "b": 6, "j": 5, **extent}
    factors = [draw.normal(size=[extent[c] for c in term]) for term in equation.split("->")[0].split(",")]
    return np.einsum(equation, *factors).reshape(24, 20, 3, 3).astype(np.float32), method


@pytest.mark.parametrize("kind", ["svd", "space", "tucker", "evbmf", "cp", "train"])
def test_what_is_of_a_low_rank_is_found_exactly_and_told_in_few_numbers(kind):
    w, method = planted(kind)
    tree = method.pack(w)
    check_tree(tree)
    assert np.abs(unpack(tree) - w).max() < 1e-4 * np.abs(w).max()
    assert count(tree) == {
        "svd": 3 * (24 + 180), "space": 4 * (24 * 3 + 20 * 3), "tucker": 24 * 5 + 5 * 4 * 9 + 4 * 20,
        "evbmf": 24 * 5 + 5 * 4 * 9 + 4 * 20, "cp": 3 * (24 + 20 + 3 + 3), "train": numbers((9, 16, 30), 3),
    }[kind]  # fmt: skip
    assert all(array.dtype == np.float32 for _, array in arrays(tree))
    for (_, one), (_, other) in zip(arrays(tree), arrays(method.pack(w)), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("method", [SVD(weighted=False), SVD(spatial=True, weighted=False), CP(), TensorTrain()])
@pytest.mark.parametrize("shape", [(24, 20, 3, 3), (24, 20), (24, 20, 1, 1), (16, 12, 5), (7, 3, 3, 3)])
def test_a_larger_part_errs_less_and_always_saves_something(method, shape):
    w, errors = floats(*shape), []
    for part in (0.2, 0.5, 0.8, 1.0):
        tree = type(method)(**vars(method) | {"part": part}).pack(w)
        check_tree(tree)
        assert tree.shape == shape and isinstance(tree, Factored) and count(tree) < w.size
        errors.append(np.square(unpack(tree) - w).sum())
    assert errors == sorted(errors, reverse=True)


@given(st.integers(1, 400), st.integers(1, 4))
def test_balanced_parts_multiply_to_the_number(n, parts):
    found = balanced(n, parts)
    assert math.prod(found) == n and len(found) == parts and list(found) == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "method",
    [
        SVD(23, weighted=False), SVD(33, spatial=True, weighted=False), Tucker2((24, 20)), CP(90), TensorTrain(60),
        Tucker2(scale=1000.0), TensorTrain(1, rows=(24, 1), columns=(20, 1)), 
    ],
)  # fmt: skip
def test_ranks_that_save_nothing_leave_the_weight_whole_and_say_so(method):
    w = floats(24, 20, 3, 3) if not isinstance(method, TensorTrain) else floats(6, 5)
    method = TensorTrain(60) if isinstance(method, TensorTrain) else method
    assert method.pack(w) is w
    draft = Pack(method)(Draft.of_arrays({"w": w}), None)
    assert draft.tensors["w"].tree is not None and draft.tensors["w"].note == NO_RANK


@pytest.mark.parametrize(
    "make,told",
    [
        (lambda: SVD(3, 0.5), "SVD takes one of rank, part"),
        (lambda: SVD(part=1.5), r"SVD: part is 1\.5"),
        (lambda: CP(0), "CP: rank is 0"),
        (lambda: CP(turns=0), "at least one turn"),
        (lambda: Tucker2((3,)), r"Tucker2: ranks is \(3,\)"),
        (lambda: Tucker2(scale=0.0), "Tucker2: scale is 0"),
        (lambda: TensorTrain(cores=1), "2 to 7 cores"),
        (lambda: TensorTrain(2, rows=(2, 3)), "as many parts of the rows"),
        (lambda: TensorTrain(2, rows=(2, 3), columns=(2, 2)).pack(floats(7, 4)), "do not make up 7 rows and 4 columns"),
        (lambda: ENC(0.5, 0.5), "ENC takes a part"),
        (lambda: ENC(0.0), "ENC takes a part"),
        (lambda: ENC(by="best"), "map, model, inf"),
        (lambda: ENC(metric="loss"), "energy, accuracy"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# ---------------------------------------------------------------- in the metric of the data


def moments(groups, n, seed):
    x = np.random.default_rng(seed).normal(size=(groups, 3 * n, n)) * np.linspace(0.1, 2, n)
    return x.transpose(0, 2, 1) @ x / (3 * n)


@pytest.mark.parametrize("groups", [1, 2])
def test_weighted_svd_loses_what_its_metric_leaves_out_and_plain_svd_loses_more(groups):
    w, rank = floats(12, 10 // groups, 3, 3), 3
    stats = {"inputs": moments(groups, 90 // groups, 1)}
    a = damped(stats["inputs"], DAMPING)

    def lost(tree):
        e = (unpack(tree).astype(np.float64) - w).reshape(groups, 12 // groups, -1)
        return np.einsum("gin,gim,gnm->", e, e, a)

    found = products(w, False, stats["inputs"])
    assert lost(SVD(rank).pack(w, stats)) == pytest.approx(np.square(found.values[:, rank:]).sum(), rel=1e-4)
    assert lost(SVD(rank).pack(w, stats)) < 0.9 * lost(SVD(rank, weighted=False).pack(w))
    assert np.allclose(unpack(found.tree(found.values.shape[1])), w, atol=1e-4)


def test_by_space_the_metric_of_independent_columns_is_met_exactly():
    w, each = floats(8, 6, 3, 3), moments(1, 18, 1)[0]
    whole = np.einsum("ab,wv->awbv", each, np.eye(3)).reshape(1, 54, 54)
    found = products(w, True, whole)
    tree, inner = found.tree(5), damped(each[None], DAMPING)[0]
    e = (unpack(tree) - w).transpose(0, 3, 1, 2).reshape(24, 18)
    assert np.einsum("on,nm,om->", e, inner, e) == pytest.approx(np.square(found.values[0, 5:]).sum(), rel=1e-4)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(24, 24, 3, 1, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(24, 32, (3, 5), (2, 1)), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def task():
    """A network that was trained for a moment on pictures whose pixels hang together."""
    torch.manual_seed(0)
    x = nn.functional.interpolate(torch.randn(300, 3, 4, 4), scale_factor=4, mode="bilinear")
    y = (x[:, 0, :8].mean((1, 2)) > x[:, 1, 8:].mean((1, 2))).long() + 2 * (x[:, 2].mean((1, 2)) > 0)
    schedule = tn.Schedule(epochs=4, lr=0.05, batch=32)
    return tn.Task(Net(), (x[:240], y[:240]), (x[240:], y[240:]), schedule=schedule).trained()


@pytest.mark.parametrize("spatial", [False, True])
def test_weighted_svd_keeps_outputs_closer_than_plain_svd(task, spatial):
    draft, x = Draft.of_model(task.model), task.test[0]
    errors = []
    for weighted in (True, False):
        small = Pack(SVD(part=0.4, spatial=spatial, weighted=weighted))(draft, task).module().eval()
        with torch.no_grad():
            errors.append(float((small(x) - task.model(x)).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_factors_are_packed_further_and_the_file_opens(task):
    draft = Pack(chain(SVD(part=0.5, weighted=False), Uniform(6)))(Draft.of_model(task.model), task)
    tree = draft.tensors["3.weight"].tree
    assert isinstance(tree, Factored) and all(isinstance(factor, UniformNode) for factor in tree.factors)
    data = artifact_of(draft).to_bytes()
    assert np.array_equal(load(data).tensors["3.weight"].unpack(), unpack(tree))
    assert len(data) < 0.35 * len(artifact_of(Draft.of_model(task.model)).to_bytes())


# ---------------------------------------------------------------- real layers

CONVOLUTIONS = {
    "plain": nn.Conv2d(12, 16, 3),
    "stride, padding": nn.Conv2d(12, 16, 3, 2, 1),
    "dilation": nn.Conv2d(12, 16, (3, 5), (1, 2), (2, 1), (2, 1), bias=False),
    "reflected": nn.Conv2d(12, 16, 3, 1, 1, padding_mode="reflect"),
    "same": nn.Conv2d(12, 16, (5, 3), padding="same", dilation=2),
    "one axis": nn.Conv1d(12, 16, 5, 2, 3),
    "three axes": nn.Conv3d(12, 16, 2, 1, 1),
    "1 x 1": nn.Conv2d(12, 16, 1, 2),
    "linear": nn.Linear(12, 16),
}
METHODS = [
    SVD(2, weighted=False), SVD(2, spatial=True, weighted=False), Tucker2((3, 4)), Tucker2(part=0.3), CP(3, turns=5),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_layers_of_a_decomposition_say_what_its_weight_says(kind, method):
    torch.manual_seed(0)
    layer = copy.deepcopy(CONVOLUTIONS[kind])
    draft = Pack(method)(Draft.of_model(layer), None)
    tree = draft.tensors["weight"].tree
    assert isinstance(tree, Factored)
    small = realise(layer, draft.tensors)
    assert isinstance(small, nn.Sequential) and len(small) == len(tree.factors)
    assert sum(p.numel() for n, p in small.named_parameters() if "weight" in n) == count(tree) < layer.weight.numel()
    x = torch.randn(2, 12, *(9, 11, 7)[: layer.weight.dim() - 2])
    with torch.no_grad():
        assert torch.allclose(small(x), draft.module()(x), atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_input_channels_may_still_go_from_a_factored_kernel(method):
    tree = method.pack(floats(16, 12, 3, 3))
    less = sliced(tree, {1: [0, 3, 4, 11]})
    assert isinstance(less, Sliced) and np.array_equal(unpack(less)[:, 3], unpack(tree)[:, 3])


# ---------------------------------------------------------------- which ranks


@st.composite
def curves(draw):
    made = []
    for _ in range(draw(st.integers(1, 4))):
        spectrum = sorted(draw(st.lists(st.floats(0.01, 9), min_size=2, max_size=9)), reverse=True)
        each, most = draw(st.integers(1, 9)), len(spectrum) - 1
        made.append(Curve.of(np.array(spectrum), each, each * most + draw(st.integers(1, each)), most))
    return made


@settings(max_examples=60)
@given(curves(), st.floats(0, 1))
def test_the_model_is_the_best_of_all_choices_and_the_map_is_level(made, part):
    choices = list(itertools.product(*(range(len(curve.ranks)) for curve in made)))
    least, most = (f(cost(made, places) for places in choices) for f in (min, max))
    budget = float(math.floor(least + part * (most - least)))
    flat, (best, *others) = mapped(made, budget), modelled(made, budget, 5)
    assert keeps(made, best) == pytest.approx(max(keeps(made, p) for p in choices if cost(made, p) <= budget))
    assert keeps(made, flat) <= keeps(made, best) + 1e-9
    assert all(cost(made, places) <= budget for places in (flat, best, *others))
    assert len({tuple(places) for places in (best, *others)}) == 1 + len(others)
    level = min(curve.kept[k] for curve, k in zip(made, flat, strict=True))
    for curve, k in zip(made, flat, strict=True):  # one rank less would fall below the level that all keep
        assert k == 0 or curve.kept[k - 1] < level or cost(made, flat) == budget or curve.kept[k - 1] < curve.kept[k]
    with pytest.raises(ValueError, match="cannot be met"):
        mapped(made, least - 1)


def test_costs_without_a_divisor_are_kept_to_and_are_never_worse_than_the_map():
    draw = np.random.default_rng(0)
    made = [Curve.of(np.sort(draw.gamma(1, size=40))[::-1], math.pi * (k + 1), 130.0 * (k + 1), 40) for k in range(8)]
    for budget in (700.0, 1500.0, 3000.0):
        best = modelled(made, budget)[0]
        assert cost(made, best) <= budget and keeps(made, best) >= keeps(made, mapped(made, budget))
        assert cost(made, best) > 0.97 * budget


def macs(model, x):
    """Multiplications for one sample, layer by layer."""
    total, handles = [], []
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            each = layer.weight[0].numel()
            handles.append(layer.register_forward_hook(lambda _, given, out, n=each: total.append(n * out[0].numel())))
    with torch.no_grad():
        model.eval()(x[:1])
    for handle in handles:
        handle.remove()
    return sum(total)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("by", ["map", "model", "inf"])
def test_enc_keeps_to_its_part_of_the_work_where_the_layers_run(task, by, spatial):
    draft, x = Draft.of_model(task.model), task.test[0]
    for part in (0.4, 0.7):
        after = ENC(part, by=by, spatial=spatial, samples=64, candidates=4, scored=100)(draft, task)
        small = realise(task.model, after.tensors)
        assert 0.85 * part < macs(small, x) / macs(task.model, x) <= part
        with torch.no_grad():
            assert torch.allclose(small.eval()(x), after.module().eval()(x), atol=1e-3)
    for name in after.weights():
        tensor = after.tensors[name]
        assert isinstance(tensor.tree, Factored) or tensor.note == WHOLE or name == "5.weight"  # two groups
    with pytest.raises(ValueError, match=r"ENC: 1% of the MACs cannot be met"):
        ENC(0.01, weighted=False, spatial=spatial)(draft, task)


def test_enc_keeps_to_a_part_of_the_weights(task):
    draft = Draft.of_model(task.model)
    whole = sum(count(draft.tensors[name].tree) for name in draft.weights())
    after = ENC(density=0.5, samples=64)(draft, task)
    assert 0.45 * whole < sum(count(after.tensors[name].tree) for name in after.weights()) <= 0.5 * whole
    assert ENC(macs=1.0)(draft, task) is draft


def test_inf_is_never_worse_than_the_model_on_the_data_that_it_looks_at(task):
    draft = Draft.of_model(task.model)
    scores = []
    for by in ("model", "inf"):
        after = ENC(0.4, by=by, weighted=False, candidates=12, scored=1000)(draft, task)
        scores.append(task.score(task.held(), after.module()))
    assert scores[1] >= scores[0]


def test_measured_curves_are_what_the_network_scores_with_one_layer_factored(task):
    draft = Draft.of_model(task.model)
    stage = ENC(0.5, weighted=False, scored=1000, metric="accuracy")
    told = stage.layers(draft, task)
    curves, data, whole = stage.measured(draft, task, told).curves, task.held(), task.score(task.held())
    for name in ("3.weight", list(curves)[-1]):
        curve, least = curves[name], int(curves[name].ranks[0])
        alone = draft.with_trees({name: told.found[name].tree(least)})
        assert curve.kept[0] == pytest.approx(min(1, task.score(data, alone.module()) / whole))
        assert (np.diff(curve.kept) >= 0).all() and curve.kept[-1] == 1
        assert np.array_equal(curve.costs, told.curves[name].costs)
    after = stage(draft, task)
    assert macs(realise(task.model, after.tensors), task.test[0]) <= 0.5 * macs(task.model, task.test[0])
    assert artifact_of(after).to_bytes() != artifact_of(replace(stage, metric="energy")(draft, task)).to_bytes()


def test_a_curve_by_accuracy_rises_between_its_points_whichever_way_the_metric_goes():
    curve = Curve.of(np.ones(20), 2.0, 100.0, 12)
    more = by_accuracy(curve, [0, 5, 9], [0.2, 0.6, 0.5], 0.8, "more")
    less = by_accuracy(curve, [0, 5, 9], [4.0, 4 / 3, 1.6], 1.0, "less")
    for curve in (more, less):
        assert curve.kept[[0, 5, 9, -1]].tolist() == pytest.approx([0.25, 0.75, 0.75, 1.0])
    assert more.kept[1] == pytest.approx(0.35)
    with pytest.raises(ValueError, match="above 0; tell by the energy"):
        by_accuracy(curve, [0], [0.1], 0.0, "more")


def test_the_same_bytes_come_from_any_number_of_threads(task):
    before, files = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draft = Draft.of_model(task.model)
        for stage in (ENC(0.5, samples=64), Pack(CP(part=0.4)), Pack(Tucker2())):
            files.append(artifact_of(stage(draft, task)).to_bytes())
    torch.set_num_threads(before)
    assert files[:3] == files[3:]


@pytest.mark.parametrize(
    "recipe,size",
    [
        (tn.papers.enc(0.6, epochs=1), 30_000),
        (tn.papers.enc(0.6, by="inf", weighted=False, epochs=0), 30_000),
        (tn.papers.tucker_vbmf(epochs=1), 28_000),
        (tn.papers.tensor_train(epochs=1), 25_000),
        ((Pack(CP()), Narrow()), 25_000),
    ],
    ids=["enc", "inf", "tucker", "train", "cp"],
)
def test_every_recipe_meets_a_size_by_its_own_setting(task, recipe, size, tmp_path):
    result = tn.compress(task, recipe, tn.Budget(size=size), folder=tmp_path)
    assert 0.85 * size < result.artifact.nbytes <= size
    assert any(isinstance(node, Factored) for t in result.artifact.tensors.values() for node in nodes(t.tree))

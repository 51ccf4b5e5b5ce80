"""Every stage over every kind of tree: it refuses before any work, or keeps zeros, shared values, slices and bytes."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.allocators.amc import RandomSearch
from tersenet.artifact import load
from tersenet.contract import PACKED, check
from tersenet.draft import Draft, artifact_of
from tersenet.folding import folded
from tersenet.methods import Chain
from tersenet.methods.kmeans import KMeans
from tersenet.methods.product import Product
from tersenet.methods.sparse import Magnitude
from tersenet.methods.surgeon import SparseGPT
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Factored, Hashed, Reshaped, Sliced, Sparse, Transformed, unpack
from tersenet.packed import Uniform as UniformNode
from tersenet.recipe_file import STAGES
from tersenet.run import run
from tersenet.stages.activations import Activations
from tersenet.stages.channels import Channels, DropDead, Plan, SearchChannels
from tersenet.stages.dkm import DKM
from tersenet.stages.finetune import Distill, Finetune, TrainLevels
from tersenet.stages.hashed import Hash
from tersenet.stages.layerwise import Layerwise
from tersenet.stages.levels import INQ, MLQ, SLQ
from tersenet.stages.low_precision import LowPrecision
from tersenet.stages.lowrank import ENC
from tersenet.stages.lsq import LSQ
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.stages.recalibrate import Recalibrate
from tersenet.stages.universal import Universal
from tersenet.stages.waterfill import Waterfill
from tersenet.stages.weightless import Weightless, filtered
from tersenet.structure import kept_places, nodes, sliced, support
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.search import to_size


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 24), nn.ReLU(),
            nn.Linear(24, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def task():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    schedule = tn.Schedule(epochs=30, lr=0.05, batch=32)
    task = tn.Task(Net(), (x[:320], y[:320]), (x[600:1000], y[600:1000]), schedule=schedule).trained(keep=(28, 29))
    early = {epoch - 28: weights for epoch, weights in task.snapshots.items()}
    return replace(task, schedule=replace(schedule, epochs=2, lr=0.02), snapshots=early)


def packed_as(draft, change):
    return draft.with_trees({name: change(np.asarray(unpack(draft.tensors[name].tree))) for name in draft.weights()})


def turned(w, pack=np.ascontiguousarray):
    axes = (1, 0, *range(2, w.ndim))
    return Reshaped(pack(w.transpose(axes)), w.shape, axes, w.shape)


def low_rank(w):
    u, s, v = np.linalg.svd(w.reshape(len(w), -1), full_matrices=False)
    rank = max(1, len(s) // 2)
    factors = (u[:, :rank] * s[:rank]).astype(np.float32), v[:rank].reshape(rank, *w.shape[1:]).astype(np.float32)
    return Factored(f"or,r{'iyx'[: w.ndim - 1]}->o{'iyx'[: w.ndim - 1]}", factors, w.shape)


def drafts(task):
    """A draft of every kind of tree, of the same network."""
    dense, levels = Draft.of_model(copy.deepcopy(task.model)), Uniform(4, by_row=True)
    sparse, cut = Prune(0.4, 1, retrain="none")(dense, None), Channels(0.6, samples=64)(dense, task)
    transformed = Pack(Chain((KernelDCT(), levels)))
    return {
        "dense": dense,
        "Sparse": sparse,
        "Sliced": cut,
        "Sliced(Sparse)": Prune(0.3, 1, retrain="none")(cut, None),
        "Codebook": Pack(KMeans(3))(dense, None),
        "Codebook of groups": Pack(KMeans(2, group=4))(dense, None),
        "Codebook of vectors": Pack(Product(4, weighted=False))(dense, None),
        "Sparse(Codebook)": Pack(KMeans(3))(sparse, None),
        "Sliced(Codebook)": Pack(KMeans(3))(cut, None),
        "Uniform": Pack(levels)(dense, None),
        "Transformed(Uniform)": transformed(dense, None),
        "Sliced(Transformed(Uniform))": transformed(cut, None),
        "Reshaped": packed_as(dense, turned),
        "Reshaped(Sparse)": packed_as(dense, lambda w: turned(w, Magnitude(0.5).pack)),
        "Reshaped(Uniform)": packed_as(dense, lambda w: turned(w, levels.pack)),
        "Factored": packed_as(dense, low_rank),
        "Bloomier": packed_as(sparse, lambda w: filtered(Sparse(w != 0, w[w != 0]), 3, 8)),
        "Lattice": Universal(4)(sparse, None),
        "Hashed": packed_as(dense, lambda w: Hashed(np.ones(5, np.float32), 3, w.shape)),
        "folded": folded(dense, task, task.calibration(32))[0],
        "waterfilled": Waterfill(0.01, samples=64)(dense, task),
    }  # fmt: skip


@pytest.fixture(scope="module")
def kinds(task):
    return drafts(task)


# Each stage at work, and where it has one at zero strength.
WORK = {
    "prune": (Prune(0.25, 2, 1), Prune(1.0, 1, retrain="none")),
    "retrain": (Retrain(), Retrain(epochs=0)),
    "rewind": (Retrain("weights", 1), None),
    "restart": (Retrain("random"), None),
    "obs": (OBS(0.25, samples=64), OBS(1.0)),
    "sweep": (OBS(0.25, "sweep", samples=64), None),
    "saliency": (OBS(0.25, "kronecker", "sum", samples=64), None),
    "channels": (Channels(0.5, samples=64), Channels(1.0)),
    "search-channels": (SearchChannels(0.6, RandomSearch(3), samples=64, scored=100), None),
    "drop-dead": (DropDead(), DropDead()),
    "pack": (Pack(KMeans(2)), Pack(None)),
    "layerwise": (Layerwise(Uniform(5), samples=64), Layerwise(None, samples=64)),
    "finetune": (Finetune(1, lr=0.01), Finetune(0)),
    "distill": (Distill(1), Distill(0)),
    "slq": (SLQ(3, 2), None),
    "mlq": (MLQ(2, 2), None),
    "inq": (INQ(4, (0.5, 1.0)), None),
    "lsq": (LSQ(3, epochs=1), None),
    "dkm": (DKM(KMeans(2), epochs=1), None),
    "activations": (Activations(6, samples=64), None),
    "low-precision": (LowPrecision(8, epochs=1), None),
    "universal": (Universal(5, 2), None),
    "hash": (Hash(0.25, epochs=1), None),
    "weightless": (Weightless(2, 6), None),
    "train-levels": (TrainLevels(1), TrainLevels(0)),
    "narrow": (Narrow(), Narrow()),
    "waterfill": (Waterfill(0.01, samples=64), None),
    "recalibrate": (Recalibrate(64), None),
    "enc": (ENC(0.7, samples=64), ENC(1.0)),
}
KINDS = (
    "dense", "Sparse", "Sliced", "Sliced(Sparse)", "Codebook", "Codebook of groups", "Codebook of vectors",
    "Sparse(Codebook)", "Sliced(Codebook)", "Uniform",
    "Transformed(Uniform)", "Sliced(Transformed(Uniform))", "Reshaped", "Reshaped(Sparse)", "Reshaped(Uniform)",
    "Factored", "Bloomier", "Lattice", "Hashed", "folded", "waterfilled",
)  # fmt: skip


def test_every_stage_that_is_listed_is_tested():
    assert set(STAGES) <= set(WORK)
    assert {type(stage) for stage, _ in WORK.values()} >= set(STAGES.values())


def kinds_of(tree):
    return {type(node) for node in nodes(tree)}


def distinct(tree):
    """How many values there are, but for the rounding of products."""
    values = np.unique(unpack(tree))
    return 1 + np.count_nonzero(np.diff(values) > 1e-6 * np.abs(values).max())


def bytes_of(draft):
    """The bytes of a draft's file, reasons left out."""
    return artifact_of(replace(draft.with_notes(dict.fromkeys(draft.tensors, "")), rules={})).to_bytes()


def added(after, before):
    """The bytes that may be added for naming the places of new slices."""
    count = [sum(isinstance(n, Sliced) for t in d.tensors.values() for n in nodes(t.tree)) for d in (after, before)]
    return 8 * (count[0] - count[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WORK)
def test_a_stage_refuses_a_tree_before_any_work_or_keeps_what_it_is(task, kinds, name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert set(kinds) == set(KINDS)
    before, (stage, none) = kinds[kind], WORK[name]
    try:
        after = stage(before, task)
    except ValueError as refusal:
        with pytest.raises(ValueError) as early:  # it is in the table, so a recipe is refused before its first stage
            check([stage], before, task)
        assert str(early.value) == str(refusal) and "\n" not in str(refusal)
        assert type(stage).__name__ in str(refusal) and (";" in str(refusal) or ":" in str(refusal))
        return
    for one in before.weights():
        was, now = before.tensors[one].tree, after.tensors[one].tree
        if name != "weightless":  # whose false positives are its nature
            assert not unpack(now)[~support(was)].any(), f"{one}: zeros are filled"
        for axis in range(len(was.shape)):
            assert np.isin(kept_places(now, axis), kept_places(was, axis)).all(), f"{one}: slices are forgotten"
        assert (kinds_of(was) & set(PACKED)) <= kinds_of(now), f"{one}: is dense again"
        if kinds_of(was) & {Codebook, UniformNode} and Transformed not in kinds_of(was):
            assert distinct(now) <= distinct(was) + 1, f"{one}: values are shared no more"
    assert bytes_of(stage(before, task)) == bytes_of(after)
    assert load(artifact_of(after).to_bytes()).tensors.keys() == before.tensors.keys()
    if none is not None:
        same = none(before, task)
        assert len(bytes_of(same)) <= len(bytes_of(before)) + added(same, before)
        if not isinstance(none, Narrow | DropDead):
            for one, tensor in before.tensors.items():
                assert np.array_equal(unpack(same.tensors[one].tree), unpack(tensor.tree), equal_nan=True)


@pytest.mark.parametrize("name", ["prune", "rewind", "obs", "channels", "search-channels"])
@pytest.mark.parametrize("kind", ["Codebook", "Sparse(Codebook)", "Reshaped(Uniform)", "Factored", "waterfilled"])
def test_stages_that_set_weights_free_refuse_what_is_packed(task, kinds, name, kind):
    with pytest.raises(ValueError, match=r"cannot take .*; .* before (quantizing|packing)"):
        WORK[name][0](kinds[kind], task)


def zeros(draft):
    return {name: unpack(draft.tensors[name].tree) == 0 for name in draft.weights()}


def test_channels_keep_what_pruning_set_to_zero_and_fit_the_rest(task, kinds):
    pruned = kinds["Sparse"]
    draft = Channels(0.5, samples=256)(pruned, task)
    plan = Plan.of(pruned, task, 64)
    assert all((now | ~was).all() for was, now in zip(zeros(pruned).values(), zeros(draft).values(), strict=True))
    assert not np.array_equal(unpack(draft.tensors["4.weight"].tree), unpack(pruned.tensors["4.weight"].tree))
    cut = replace(plan, found={}).pruned(plan.uniform(0.5))
    x = task.train[0]
    with torch.no_grad():
        wanted, fitted, plain = (d.module().eval()(x) for d in (pruned, draft, cut))
    assert (fitted - wanted).square().mean() < 0.8 * (plain - wanted).square().mean()


def test_channels_that_are_gone_stay_gone_and_count_as_gone(task, kinds):
    first = kinds["Sliced"]
    plan, again = Plan.of(kinds["dense"], task, 64), Plan.of(first, task, 64)
    assert plan.before == frozenset() and len(again.before) > 0
    assert again.macs() == plan.macs() and again.macs([1.0] * len(plan.spaces)) <= 0.6 * plan.macs()
    assert bytes_of(Channels(0.6, samples=64)(first, task)) == bytes_of(first)
    less = Channels(0.3, samples=64)(first, task)
    assert again.macs([1.0] * len(plan.spaces)) > Plan.of(less, task, 64).macs([1.0] * len(plan.spaces))
    assert Plan.of(less, task, 64).macs([1.0] * len(plan.spaces)) <= 0.3 * plan.macs()


def slices(draft):
    return {
        name: [kept_places(tensor.tree, axis).tolist() for axis in range(len(tensor.tree.shape))]
        for name, tensor in draft.tensors.items()
        if "running" not in name
    }


@pytest.mark.parametrize("size", [900, 1400])
def test_quantizing_keeps_slices_and_is_closer_at_a_size_than_what_forgets_them(task, kinds, size):
    cut = kinds["Sliced"]
    forgotten = cut.with_trees({name: unpack(cut.tensors[name].tree) for name in cut.weights()})
    draft, other = (to_size(Knowledge.of(before, task, 256), size) for before in (cut, forgotten))
    assert slices(draft) == slices(cut)
    assert Transformed in kinds_of(draft.tensors["4.weight"].tree)
    x = task.test[0]
    with torch.no_grad():
        wanted, now, before = (d.module().eval()(x) for d in (cut, draft, other))
    assert (now - wanted).square().mean() < (before - wanted).square().mean()


def test_a_budget_on_a_sliced_network_keeps_its_slices_with_and_without_loss(task, kinds):
    cut = kinds["Sliced"]
    for size in (1500, 40000):
        draft = to_size(Knowledge.of(cut, task, 256), size)
        assert slices(draft) == slices(cut) and len(artifact_of(draft).to_bytes()) <= size
    dense = {name: unpack(t.tree) for name, t in cut.tensors.items()}
    assert all(np.array_equal(unpack(t.tree), dense[name]) for name, t in draft.tensors.items())


def test_moments_in_blocks_are_put_together_or_the_whole_is_quantized_and_sliced(task, kinds, monkeypatch):
    from tersenet import calibrate
    from tersenet.waterfilling import factors

    cut = kinds["Sliced"]
    monkeypatch.setattr(calibrate, "MOST", 2000)
    together = Waterfill(0.005, samples=128)(cut, task)
    monkeypatch.setattr(factors, "MOST", 0)
    apart = Waterfill(0.005, samples=128)(cut, task)
    assert slices(together) == slices(apart) == slices(cut)
    assert bytes_of(together) != bytes_of(apart)
    for draft in (together, apart):
        assert task.score(task.test, draft.module()) > task.score(task.test, cut.module()) - 0.03


@pytest.mark.parametrize("kind", ["Sparse(Codebook)", "waterfilled", "Codebook", "Factored"])
def test_dead_channels_go_from_any_tree_and_the_file_does_not_grow(task, kinds, kind):
    """Nothing reads channels 2, 4 and 5 of the first layer any more."""
    model, left = copy.deepcopy(task.model), [0, 1, 3, 6, 7]
    with torch.no_grad():
        model[4].weight[:, [2, 4, 5]] = 0
    dense = Draft.of_model(model)
    draft = {
        "Sparse(Codebook)": lambda: Pack(KMeans(3))(Prune(0.5, 1, retrain="none")(dense, None), None),
        "waterfilled": lambda: Waterfill(0.005, samples=64)(dense, task),
        "Codebook": lambda: Pack(KMeans(3))(dense, None),
        "Factored": lambda: packed_as(dense, low_rank),
    }[kind]()
    if unpack(draft.tensors["4.weight"].tree)[:, [2, 4, 5]].any():  # a shared value or a product need not be 0
        draft = draft.with_trees({"4.weight": sliced(dense.tensors["4.weight"].tree, {1: left})})
    after = DropDead()(draft, task)
    for name in ("1.weight", "2.weight"):
        assert set(kept_places(after.tensors[name].tree, 0)) <= set(left)
    assert len(bytes_of(after)) <= len(bytes_of(draft)) + added(after, draft)
    x = task.test[0]
    with torch.no_grad():
        assert torch.allclose(draft.module().eval()(x), after.module().eval()(x), atol=1e-5)


def test_channels_stay_in_trees_that_cannot_lose_them(task, kinds):
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        model[4].weight[:, 2] = 0
    draft = Draft.of_model(model)
    w = unpack(draft.tensors["1.weight"].tree)
    odd = Reshaped(Codebook(np.arange(72, dtype=np.uint8), w.reshape(-1, 1)), (72,), (0,), w.shape)
    after = DropDead()(draft.with_trees({"1.weight": odd}), task)
    assert after.tensors["1.weight"].tree is odd
    assert load(artifact_of(after).to_bytes()).tensors["1.weight"].note.startswith("packed so that its dead channels")
    assert kept_places(after.tensors["2.weight"].tree, 0).tolist() == list(range(8))


@pytest.mark.parametrize("kind", ["weights", "random"])
def test_earlier_weights_come_under_slices_and_masks(task, kinds, kind):
    for name in ("Sliced", "Sliced(Sparse)"):
        before = kinds[name]
        after = Retrain(kind, 1)(before, task)
        assert slices(after) == slices(before)
        assert all(
            np.array_equal(support(after.tensors[n].tree), support(before.tensors[n].tree)) for n in before.weights()
        )
        assert len(bytes_of(after)) < 1.05 * len(bytes_of(before))


def test_training_after_quantizing_keeps_what_the_network_knows(task, kinds):
    quantized = Waterfill(0.005)(kinds["dense"], task)
    held = task.score(task.test, quantized.module())
    for stage in (Retrain(epochs=3), Finetune(2, lr=task.schedule.lr)):
        trained = stage(quantized, task)
        assert task.score(task.test, trained.module()) > held - 0.02
        assert len(bytes_of(trained)) < 1.02 * len(bytes_of(quantized)) + 8


@dataclass(frozen=True)
class Wrong:
    """A stranger's method: a transform of its palette, which is longer than a transform may be."""

    needs: tuple[str, ...] = ()

    def pack(self, w, stats=None):
        return Codebook(np.zeros(w.shape, np.uint8), Transformed(np.zeros((100, 1), np.float32)))


def test_a_method_whose_tree_does_not_fit_is_named_at_once(task, kinds):
    with pytest.raises(ValueError, match=r"8.weight: Wrong.* made a tree that does not fit .* at most 64 x 64"):
        Pack(None, rules=(("8.weight", Wrong()),))(kinds["dense"], task)


class Counting:
    """A stranger's stage, which says nothing of what it takes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, draft, task):
        self.calls += 1
        return draft


def test_recipes_are_refused_before_any_work(task, kinds):
    first = Counting()
    refused = {
        "the result of Pack: Prune cannot take Codebook nodes; prune before packing": (Pack(KMeans(3)), Prune(0.5, 1)),
        "the result of Waterfill: Channels cannot take Codebook nodes; take out channels": (
            Waterfill(1),
            Channels(0.5),
        ),
        "the result of Waterfill: Retrain cannot take folded norms": (Waterfill(1), Retrain("weights")),
        "the result of Layerwise: OBS cannot take Uniform nodes": (
            Layerwise(Chain((KernelDCT(), Uniform()))),
            OBS(0.5),
        ),
        "TrainLevels finds no levels: quantize first": (Finetune(1), TrainLevels(1)),
        "the result of Prune: Pack cannot take Sparse nodes; SparseGPT": (Prune(0.5, 1), Pack(SparseGPT())),
        "the result of Channels: Layerwise cannot take Sliced nodes; SparseGPT": (Channels(), Layerwise(SparseGPT())),
    }
    for message, stages in refused.items():
        with pytest.raises(ValueError, match=message):
            run(kinds["dense"], task, (first, *stages), None, lambda _: None)
    for stage in (Finetune(1), Retrain(), Prune(0.5), OBS(0.5), Channels(0.5), DropDead()):
        for without in (None, replace(task, train=None)):
            with pytest.raises(ValueError, match=f"{type(stage).__name__} .*give a Task with training data"):
                run(kinds["dense"], without, (first, stage), None, lambda _: None)
    assert first.calls == 0
    check((first, Pack(Uniform(4)), TrainLevels(1), Narrow()), kinds["dense"], task)
    with pytest.raises(ValueError, match=r"1.weight: Prune cannot take Uniform nodes; prune before packing"):
        run(kinds["Uniform"], task, (first, Prune(0.5, 1)), None, lambda _: None)

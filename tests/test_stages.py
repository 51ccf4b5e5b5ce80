"""Stages on a small trained network: what they hold still, what they hit, and what they refuse."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.artifact import Artifact, load
from tersenet.budget import Budget, PromiseBroken, parse_size
from tersenet.draft import Draft, artifact_of
from tersenet.methods.kmeans import KMeans
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Sparse, unpack
from tersenet.promise import compress
from tersenet.run import run
from tersenet.stages.channels import Channels, DropDead
from tersenet.stages.finetune import Finetune, tune
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain


class Net(nn.Module):
    """Convolution, BatchNorm, a tied pair of linear layers and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.second, self.last = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 10)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.reshape(-1, 1, 8, 8))))
        x = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def make_task():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    task = tn.Task(Net(), (x[train], y[train]), (x[test], y[test]), schedule=tn.Schedule(epochs=6, lr=0.05, batch=64))
    return task.trained(keep=(4,))


@pytest.fixture(scope="module")
def task():
    return make_task()


def arrays_of(draft):
    return {name: np.asarray(unpack(t.tree)) for name, t in draft.tensors.items()}


@pytest.mark.parametrize(
    "stage",
    [
        Prune(1.0, rounds=2, retrain="none"),
        Finetune(epochs=0),
        Retrain(epochs=0),
        OBS(1.0),
        Channels(1.0),
        DropDead(),
        Pack(None),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_stage_at_zero_strength_changes_nothing(task, stage):
    draft = Draft.of_model(task.model)
    after = arrays_of(stage(draft, task))
    assert all(np.array_equal(array, after[name]) for name, array in arrays_of(draft).items())


@pytest.mark.parametrize("retrain", ["learning-rate", "finetune", "weights", "none"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_hits_its_density_to_one_weight_and_leaves_norms_and_biases(task, retrain, scope):
    draft = Prune(0.15, rounds=2, epochs=2, retrain=retrain, scope=scope)(Draft.of_model(task.model), task)
    names = draft.weights()
    assert names == ["conv.weight", "first.weight", "last.weight"]
    total = sum(np.prod(draft.tensors[n].tree.shape) for n in names)
    kept = sum(int(draft.tensors[n].tree.mask.sum()) for n in names)
    assert abs(kept - 0.15 * total) <= (0.5 if scope == "global" else 0.5 * len(names))
    assert not isinstance(draft.tensors["norm.weight"].tree, Sparse)
    assert not isinstance(draft.tensors["first.bias"].tree, Sparse)
    assert draft.tensors["first.weight"] is draft.tensors["second.weight"]


def test_layers_may_have_their_own_density(task):
    draft = Prune(0.1, 1, retrain="none", rules=(("conv*", 0.5),))(Draft.of_model(task.model), task)
    assert draft.tensors["conv.weight"].tree.mask.sum() == 36
    with pytest.raises(ValueError, match=r"the rule 'nope' decides about no weight; there are conv.weight, first"):
        Prune(rules=(("nope", 0.5),))(Draft.of_model(task.model), task)


def test_masked_weights_stay_exactly_zero_and_masks_only_grow(task):
    first = Prune(0.3, 1, 1)(Draft.of_model(task.model), task)
    second = Prune(0.1, 1, 1)(first, task)
    for name in first.weights():
        before, after = first.tensors[name].tree, second.tensors[name].tree
        assert not (after.mask & ~before.mask).any()
        assert not np.asarray(unpack(after))[~after.mask].any()


def test_weight_rewinding_restores_the_snapshot_and_replays_the_schedules_tail(task, monkeypatch):
    from tersenet.stages import prune

    seen = {}

    def record(draft, task, schedule, epochs, seed, label):
        seen["rates"] = [schedule.rate(e) for e in epochs]
        seen["weights"] = unpack(draft.tensors["last.weight"].tree)
        return draft

    monkeypatch.setattr(prune, "tune", record)
    Prune(0.5, 1, epochs=2, retrain="weights")(Draft.of_model(task.model), task)
    assert seen["rates"] == [task.schedule.rate(4), task.schedule.rate(5)]
    kept = seen["weights"] != 0
    assert np.array_equal(seen["weights"][kept], task.snapshots[4]["last.weight"].numpy()[kept])
    with pytest.raises(ValueError, match="needs the weights of epoch 3"):
        Prune(0.5, 1, epochs=3, retrain="weights")(Draft.of_model(task.model), task)


def test_the_random_control_keeps_the_masks_and_replays_the_whole_schedule_from_fresh_weights(task, monkeypatch):
    from tersenet.stages import prune

    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    draft = Prune(0.3, 1, retrain="none")(Draft.of_model(task.model), task)
    fresh, other = prune.reinitialized(draft, 1), prune.reinitialized(draft, 2)
    assert artifact_of(prune.reinitialized(draft, 1)).to_bytes() == artifact_of(fresh).to_bytes()
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    for name in draft.weights():
        masks = [one.tensors[name].tree.mask for one in (draft, fresh, other)]
        assert np.array_equal(masks[0], masks[1]) and np.array_equal(masks[0], masks[2])
        assert not np.array_equal(fresh.tensors[name].tree.values, draft.tensors[name].tree.values)
        assert not np.array_equal(fresh.tensors[name].tree.values, other.tensors[name].tree.values)
    seen = []
    monkeypatch.setattr(prune, "tune", lambda draft, task, schedule, epochs, *rest: seen.append(epochs) or draft)
    Prune(0.3, 2, epochs=1, retrain="random")(Draft.of_model(task.model), task)
    assert seen == [range(task.schedule.epochs)] * 2


def test_rewinding_papers_prune_a_fifth_each_round(task, tmp_path):
    prune, _ = tn.papers.lr_rewinding(0.8**3)
    assert prune.rounds == 3 and prune.retrain == "learning-rate"
    assert tn.papers.lottery_ticket(0.5, 2)[0] == Prune(0.5, 2, 10, retrain="weights")
    for recipe in (tn.papers.lr_rewinding(0.2, 2, 1), tn.papers.lottery_ticket(0.2, 2, 2)):
        artifact = compress(task, recipe, folder=tmp_path).artifact
        trees = [t.tree for t in {id(t): t for t in artifact.tensors.values()}.values() if isinstance(t.tree, Sparse)]
        kept, size = sum(int(t.mask.sum()) for t in trees), sum(t.mask.size for t in trees)
        assert kept == round(0.2 * size)


def test_tuning_holds_the_integers_and_moves_the_floats(task):
    draft = Pack(KMeans(3))(Prune(0.3, 1, retrain="none")(Draft.of_model(task.model), task), task)
    tuned = Finetune(1, lr=0.001)(draft, task)
    for name in draft.weights():
        before, after = draft.tensors[name].tree, tuned.tensors[name].tree
        assert np.array_equal(before.mask, after.mask) and np.array_equal(before.values.index, after.values.index)
        assert not np.array_equal(before.values.codewords, after.values.codewords)
    assert tuned.tensors["norm.num_batches_tracked"].tree > draft.tensors["norm.num_batches_tracked"].tree


def test_training_is_the_same_at_any_number_of_threads(task):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draft = tune(Draft.of_model(task.model), task, task.schedule, range(1), seed=0)
        found.append(artifact_of(draft).to_bytes())
    assert found[0] == found[1]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(task, tmp_path):
    recipe = (Prune(0.3, 1, 1), Pack(KMeans(3)), Finetune(1), Narrow())
    whole = artifact_of(run(Draft.of_model(task.model), task, recipe, None, lambda _: None)).to_bytes()
    run(Draft.of_model(task.model), task, recipe[:2], tmp_path, lambda _: None)
    rows = []
    resumed = run(Draft.of_model(task.model), task, recipe, tmp_path, rows.append)
    assert artifact_of(resumed).to_bytes() == whole
    assert sum("kept" in row for row in rows) == 2
    other = replace(task, schedule=replace(task.schedule, lr=0.01))
    assert run(Draft.of_model(task.model), other, recipe[:1], tmp_path, rows.append) is not None
    assert len(list(tmp_path.glob("*.terse"))) == 5


def test_pruning_goes_on_with_its_next_round_to_the_same_bytes(task, tmp_path):
    recipe = (Prune(0.2, 3, 1), Narrow())
    model = copy.deepcopy(task.model)
    whole = artifact_of(run(Draft.of_model(model), task, recipe, None, lambda _: None)).to_bytes()
    rows = []

    def stop(row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Draft.of_model(model), task, recipe, tmp_path, stop)
    resumed = run(Draft.of_model(model), task, recipe, tmp_path, rows.append)
    assert artifact_of(resumed).to_bytes() == whole
    assert ["kept" in row for row in rows[2:]] == [True, True, False, False]
    assert [row["density"] for row in rows[2:5]] == pytest.approx([0.2 ** (k / 3) for k in (1, 2, 3)], abs=1e-4)
    assert all(0 < row["metric"] <= 1 for row in rows)


def test_packing_says_why_a_tensor_stayed_dense(task):
    draft = Pack(KMeans(8), rules=(("last*", Uniform(4)),))(Draft.of_model(task.model), task)
    artifact = artifact_of(draft)
    notes = {row.name: row.note for row in artifact.ledger()}
    assert isinstance(draft.tensors["first.weight"].tree, Codebook)
    assert type(draft.tensors["last.weight"].tree).__name__ == "Uniform"
    assert notes["conv.weight"] == "dense: smaller than its codebook"
    assert notes["norm.running_mean"] == "dense: a buffer, kept bit for bit"
    assert notes["steps"] == "dense: not a floating-point tensor"
    assert notes["second.weight"].startswith("tied to first.weight")


def test_compress_proves_the_reopened_file_and_leaves_the_model_alone(task, tmp_path):
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    result = compress(task, tn.papers.deep_compression(0.2, 4, rounds=2, epochs=2), Budget(drop=5), folder=tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in task.model.state_dict().items())
    assert result.after == task.score(task.test, load(result.artifact.to_bytes()).into(Net()))
    assert result.before - result.after < 0.05
    assert result.artifact.nbytes < 0.1 * 4 * 20000
    buffers = load(result.artifact.to_bytes()).unpack()
    assert buffers["steps"] == 3 and buffers["steps"].dtype == np.int64


def test_a_kept_result_that_cannot_be_read_is_made_again(task, tmp_path):
    recipe = (Prune(0.2, 1, 1), Narrow())
    first = compress(task, recipe, folder=tmp_path).artifact.to_bytes()
    for kept in tmp_path.glob("*.terse"):
        kept.write_bytes(kept.read_bytes()[:-3])
    assert compress(task, recipe, folder=tmp_path).artifact.to_bytes() == first


def test_three_runs_make_the_same_file_native_or_not(task, tmp_path, monkeypatch):
    recipe = tn.papers.deep_compression(0.05, 3, rounds=1, epochs=1)
    first = compress(task, recipe, folder=tmp_path / "a").artifact.to_bytes()
    assert compress(task, recipe, folder=tmp_path / "b").artifact.to_bytes() == first
    from tersenet import native

    monkeypatch.setattr(native, "library", lambda: None)
    assert compress(task, recipe, folder=tmp_path / "a").artifact.to_bytes() == first
    again = load(first)
    assert Artifact(again.tensors, meta=again.meta).to_bytes() == first


def test_budgets_that_cannot_be_met_are_said_so(task, tmp_path):
    recipe = (Pack(KMeans(4)),)
    with pytest.raises(PromiseBroken, match=r"budget of 100 bytes cannot be met: .* of the recipe's bits"):
        compress(task, recipe, Budget(size="100B"), folder=tmp_path)
    with pytest.raises(ValueError, match="drop needs a task"):
        compress({"w": np.ones((50, 50), np.float32)}, recipe, Budget(drop=1), folder=tmp_path)
    with pytest.raises(PromiseBroken, match="the metric went from"):
        compress(task, (Prune(0.001, 1, retrain="none"),), Budget(drop=0.5), folder=tmp_path)
    with pytest.raises(ValueError, match="one of size, ratio and drop"):
        Budget(size=10, ratio=2)
    assert [parse_size(t) for t in ("40000", "40kB", "1.5MB", "2KiB")] == [40000, 40000, 1500000, 2048]
    with pytest.raises(ValueError, match="not a size"):
        parse_size("small")


def test_bad_weights_are_named(task):
    net = Net()
    net.last.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"last.weight: holds NaN"):
        Draft.of_model(net)
    with pytest.raises(ValueError, match="complex"):
        Draft.of_arrays({"w": np.ones(3, np.complex64)})
    big = Draft.of_arrays({"w": np.full((4, 4), 1e6, np.float32)})
    with pytest.raises(ValueError, match="w: values too large for float16"):
        Narrow()(big, None)


def test_arrays_alone_can_be_packed_but_not_trained(tmp_path):
    state = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "b": np.zeros(3, np.float32)}
    result = compress(state, (Pack(KMeans(4)), Narrow()), Budget(ratio=6), folder=tmp_path)
    assert result.after is None and result.artifact.nbytes < 64 * 64 * 4 / 6
    with pytest.raises(ValueError, match="give a Task"):
        compress(state, (Finetune(1),), folder=tmp_path)


def test_types_other_than_float32_come_back_as_they_were():
    state = {"h": torch.randn(8, 8).half(), "b": torch.randn(8, 8).bfloat16(), "d": torch.randn(8, 8).double()}
    back = load(artifact_of(Draft.of_arrays(state)).to_bytes())
    assert {n: t.dtype for n, t in back.tensors.items()} == {"h": "float16", "b": "bfloat16", "d": "float64"}
    dense = back.unpack()
    assert all(torch.equal(torch.from_numpy(dense[n]).to(t.dtype), t) for n, t in state.items())


def test_a_diverging_loss_is_an_error_with_its_remedy(task):
    with pytest.raises(ValueError, match="lower the learning rate"):
        Finetune(2, lr=1e6)(Draft.of_model(task.model), task)

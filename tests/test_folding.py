"""Folding: exact or not done, remembered by draft and file, and left alone by whoever trains on."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet.artifact import errors_against, load
from tersenet.draft import Draft, artifact_of
from tersenet.folding import feeders, folded, folded_norms, refolded
from tersenet.packed import Sparse
from tersenet.run import run
from tersenet.stages.channels import Channels
from tersenet.stages.finetune import Finetune, TrainLevels
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow
from tersenet.stages.prune import Prune, Retrain
from tersenet.stages.waterfill import Waterfill


class Every(nn.Module):
    """Norms of every kind behind layers of every kind, declared in another order than they are used."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.up, self.three = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.BatchNorm2d(8, eps=1e-3)
        self.line, self.four = nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)
        self.bare, self.five = nn.Conv1d(6, 6, 1, bias=False), nn.BatchNorm1d(6, affine=False)
        self.full, self.six = nn.Linear(6, 10), nn.BatchNorm1d(10, bias=False)
        self.space, self.seven = nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4)
        self.last = nn.Linear(14, 5)

    def forward(self, x):
        volume = F.relu(self.seven(self.space(x[:, None]))).mean((2, 3, 4))
        x = F.relu(self.one(self.first(x)), inplace=True)
        x = F.relu(self.three(self.up(F.relu(self.two(self.second(x))))))
        x = F.relu(self.five(self.bare(F.relu(self.four(self.line(x.flatten(2)))))))
        x = F.relu(self.six(self.full(x.mean(2))))
        return self.last(torch.cat([x, volume], 1))


FED = {
    "one": "first.weight", "two": "second.weight", "three": "up.weight", "four": "line.weight", "five": "bare.weight",
    "six": "full.weight", "seven": "space.weight",
}  # fmt: skip


def lived(model):
    """A module whose norms have seen something."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_var is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.2, 3)
            for parameter in layer.parameters():
                parameter.data.normal_()
    return model.eval()


def task_of(model, *shape, samples=24, targets=5, dtype=torch.float32):
    x = torch.randn(samples, *shape, dtype=dtype)
    return tn.Task(model, (x, torch.randint(0, targets, (samples,))))


def folds(task):
    draft = Draft.of_model(copy.deepcopy(task.model))
    return draft, *folded(draft, task, task.calibration(16)[:2])


def both(task, draft):
    with torch.no_grad():
        x = task.train[0]
        return task.outputs(task.model, x), task.outputs(draft.module().eval(), x)


@pytest.fixture
def every():
    torch.manual_seed(0)
    return task_of(lived(Every()), 3, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_norm_behind_every_layer_is_folded_and_nothing_but_rounding_changes(dtype):
    torch.manual_seed(0)
    task = task_of(lived(Every()).to(dtype), 3, 6, 6, dtype=dtype)
    before, after, shifts = folds(task)
    assert folded_norms(after.tensors) == FED.keys()
    wanted, found = both(task, after)
    least = max(torch.finfo(dtype).eps, 1e-8)
    assert (wanted - found).abs().max() < 30 * least * wanted.abs().max()
    assert shifts == {
        "first.weight": "one.bias", "second.weight": "second.bias", "up.weight": "three.bias",
        "line.weight": "four.bias", "full.weight": "full.bias", "space.weight": "seven.bias",
    }  # fmt: skip
    assert {n: t.dtype for n, t in before.tensors.items()} == {n: t.dtype for n, t in after.tensors.items()}


def test_the_file_knows_which_weight_took_each_scale_and_the_original_is_folded_alike(every):
    before, after, _ = folds(every)
    artifact = load(artifact_of(after).to_bytes())
    assert folded_norms(artifact.tensors) == FED.keys()
    assert feeders(artifact.tensors, artifact.meta) == FED
    assert set(artifact.meta["folded"]) == {"one", "two", "three"}  # of the others the order of tensors tells
    for source in (after, artifact):
        alike = refolded(before.tensors, source)
        for name, tensor in artifact.tensors.items():
            assert np.allclose(alike[name].unpack(), tensor.unpack(), rtol=1e-6, atol=1e-7), name
            assert alike[name].dtype == tensor.dtype
    assert max(errors_against(artifact, every.model.state_dict()).values()) > 0.5  # which do not compare like with like


def test_folding_again_changes_nothing_and_still_tells_the_shifts(every):
    _, once, shifts = folds(every)
    twice, again = folded(once, every, every.calibration(16)[:2])
    assert again == shifts and artifact_of(twice).to_bytes() == artifact_of(once).to_bytes()


class Odd(nn.Module):
    """Norms that must not be folded, each for its own reason, and one that may."""

    def __init__(self):
        super().__init__()
        layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("good", "read", "twice", "shared", "other", "plain")}
        self.layers = nn.ModuleDict(layers | {"left": nn.Conv2d(4, 4, 1), "zero": nn.Conv2d(4, 4, 1)})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in self.layers})
        self.layers["other"].weight = self.layers["shared"].weight
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        def block(name, x):
            return F.relu(self.norms[name](self.layers[name](x)))

        x = block("good", x)
        between = self.layers["read"](x)
        x = F.relu(self.norms["read"](between)) + 0.1 * between
        x = block("twice", block("twice", x))
        x = block("other", block("shared", x))
        x = F.relu(self.norms["plain"](F.relu(self.layers["plain"](x))))
        self.kept = self.layers["left"](x)
        x = block("zero", F.relu(self.norms["left"](self.kept)))
        return self.last(x.mean((2, 3)))


def test_what_somebody_else_reads_or_shares_or_that_has_no_scale_is_not_folded():
    torch.manual_seed(0)
    model = lived(Odd())
    model.norms["zero"].weight.data[1] = 0
    task = task_of(model, 4, 6, 6)
    _, after, shifts = folds(task)
    assert folded_norms(after.tensors) == {"norms.good"}
    assert shifts == {"layers.good.weight": "norms.good.bias"}
    wanted, found = both(task, after)
    assert torch.allclose(wanted, found, atol=1e-4)


class Functional(nn.Module):
    """A convolution and a norm of which only the operations tell, and a linear layer over positions."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(6, 3, 3, 3) / 5), nn.BatchNorm2d(6)
        self.line, self.places = nn.Linear(9, 6), nn.BatchNorm1d(6)  # which normalises positions, not features
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        own = self.inner
        x = F.conv2d(x, self.weight)
        x = F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, self.training, eps=1e-4)
        return self.last(F.relu(self.places(self.line(F.relu(x).flatten(2)))).mean(2))


def test_functional_calls_are_seen_and_a_norm_over_another_axis_is_not_taken_for_one():
    torch.manual_seed(0)
    task = task_of(lived(Functional()), 3, 5, 5)
    _, after, _ = folds(task)
    assert folded_norms(after.tensors) == {"inner"}
    wanted, found = both(task, after)
    assert torch.allclose(wanted, found, atol=1e-5)


def test_a_fold_that_is_not_exact_is_given_up_alone_though_the_networks_outputs_would_hide_it():
    torch.manual_seed(0)
    model = lived(nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5),
    ))  # fmt: skip
    model[3].bias.data[:] = model[4].running_mean[:] = 1e6  # float32 keeps a sixteenth there, and nothing when folded
    model[-1].bias.data += 1e4
    task = task_of(model, 3, 5, 5)
    _, after, _ = folds(task)
    assert folded_norms(after.tensors) == {"1", "7"}


def test_norms_that_hardly_ever_vary_are_left_alone():
    torch.manual_seed(0)
    model = lived(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0), nn.Flatten(), nn.Linear(54, 5)))
    model[1].running_var[2] = 1e-30
    task = task_of(model, 3, 5, 5)
    assert not folded_norms(folds(task)[1].tensors)


def test_pruned_weights_stay_pruned_and_quantized_ones_as_they_are(every):
    draft = Prune(0.4, 1, retrain="none")(Draft.of_model(copy.deepcopy(every.model)), None)
    after, _ = folded(draft, every, every.calibration(16)[:1])
    assert folded_norms(after.tensors) == FED.keys()
    for name in draft.weights():
        assert isinstance(after.tensors[name].tree, Sparse)
        assert np.array_equal(after.tensors[name].tree.mask, draft.tensors[name].tree.mask)


class Digits(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(192, 40), nn.BatchNorm1d(40, affine=False), nn.ReLU(), nn.Linear(40, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    task = make_task()
    return replace(task, model=Digits(), snapshots={}, schedule=replace(task.schedule, epochs=4)).trained(keep=(2,))


@pytest.fixture(scope="module")
def quantized(task):
    return Waterfill(0.0005, samples=256)(Draft.of_model(task.model), task)


@pytest.mark.parametrize(
    "stage", [Finetune(1), Retrain("learning-rate", 1), TrainLevels(1)], ids=lambda s: type(s).__name__
)
def test_training_after_quantizing_does_not_normalise_again(task, quantized, stage):
    before = task.score(task.test, quantized.module())
    trained = stage(quantized, task)
    assert before > 0.9 and task.score(task.test, trained.module()) > before - 0.02
    assert folded_norms(trained.tensors) == {"2", "5", "10"}
    artifact = load(artifact_of(trained).to_bytes())
    for norm in ("2", "5", "10"):
        assert np.ptp(artifact.unpack()[f"{norm}.running_var"]) == 0
        assert not artifact.unpack().get(f"{norm}.weight", np.ones(1)).std()


def test_whoever_loads_the_file_and_trains_on_has_norms_that_stay_as_they_are(task, quantized):
    artifact = load(artifact_of(quantized).to_bytes())
    model = artifact.into(Digits())
    assert isinstance(model[2], nn.BatchNorm2d) and model.state_dict().keys() == Digits().state_dict().keys()
    own = replace(task, model=model, schedule=tn.Schedule(1, 0.001, 64))
    before = task.score(task.test, model)
    after = own.trained().score(task.test)
    assert after > before - 0.02
    assert not model.train()[2].training and not copy.deepcopy(model).train()[5].training and model[3].training
    again = pickle.loads(pickle.dumps(model))
    assert type(again[2]) is type(model[2]) and not again.train()[2].training
    assert torch.equal(again(task.test[0][:4]), model(task.test[0][:4]))
    plain = load(artifact_of(Draft.of_model(task.model)).to_bytes()).into(model)
    assert type(plain[2]) is nn.BatchNorm2d and plain.train()[2].training


@pytest.mark.parametrize("kind", ["weights", "random"])
def test_earlier_weights_are_refused_on_a_folded_draft_before_any_work(task, quantized, kind, monkeypatch):
    from tersenet.stages import prune

    monkeypatch.setattr(prune, "tune", lambda *_: pytest.fail("it trains"))
    for stage in (Retrain(kind, 2), Prune(0.5, 1, 2, retrain=kind)):
        with pytest.raises(ValueError, match=r"10: [A-Z][a-z]+ cannot take folded norms; the weights from before"):
            stage(quantized, task)


def test_stages_after_folding_keep_what_is_folded(task):
    draft, shifts = folded(Draft.of_model(copy.deepcopy(task.model)), task, task.calibration(16)[:1])
    base = task.score(task.test, draft.module())
    for stage in (OBS(0.7, "sweep", samples=128), Channels(0.9, samples=128), Narrow("bfloat16"), Prune(0.7, 1, 1)):
        after = stage(draft, task)
        assert folded_norms(after.tensors) == {"2", "5", "10"}, stage
        assert task.score(task.test, after.module()) > base - 0.05, stage
        assert folded(after, task, task.calibration(16)[:1])[1] == shifts, stage


def test_a_run_that_goes_on_knows_what_was_folded(tmp_path):
    torch.manual_seed(0)
    task = task_of(lived(Every()), 3, 6, 6, samples=64)
    recipe = (Waterfill(0.001, samples=32), Finetune(1, 1e-4))
    whole = run(Draft.of_model(task.model), task, recipe, None, lambda _: None)
    run(Draft.of_model(task.model), task, recipe[:1], tmp_path, lambda _: None)
    rows = []
    resumed = run(Draft.of_model(task.model), task, recipe, tmp_path, rows.append)
    assert rows[0]["kept"] and "folded" not in rows[0]
    assert artifact_of(resumed).to_bytes() == artifact_of(whole).to_bytes()
    assert feeders(resumed.tensors, {"folded": resumed.folded}) == FED

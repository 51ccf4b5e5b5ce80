"""Statistics of norms that are taken again: the right numbers, and nobody else's."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersenet as tn
from tersenet.draft import Draft, artifact_of
from tersenet.folding import folded
from tersenet.methods.factorize import SVD
from tersenet.packed import unpack
from tersenet.realise import realise
from tersenet.running_statistics import Moments, followed, warn_of_other_data
from tersenet.running_statistics import of_batches as taken
from tersenet.stages.channels import Channels
from tersenet.stages.finetune import Finetune
from tersenet.stages.pack import Pack
from tersenet.stages.recalibrate import AGAIN, Recalibrate
from tersenet.structure import kept_places


class Net(nn.Module):
    """A norm that is used, one that is not, and one without statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24)
        self.unused, self.plain = nn.BatchNorm1d(24), nn.BatchNorm1d(24, track_running_stats=False)
        self.last = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x))).mean((2, 3))
        return self.last(self.plain(x) if x.shape[0] > 1 else x)


@pytest.fixture
def task():
    torch.manual_seed(0)
    x = torch.randn(400, 3, 8, 8) * torch.tensor([1.0, 2.0, 0.5])[:, None, None] + 1
    net = Net()
    with torch.no_grad():
        net.unused.running_mean += 3
        for _ in range(60):
            net.train()(x)
    return tn.Task(net.eval(), (x, torch.randint(5, (400,))), (x[:50], torch.zeros(50, dtype=torch.long)))


def statistics(draft, part):
    return np.asarray(unpack(draft.tensors[f"norm.{part}"].tree))


def of_batches(conv, task):
    seen = [conv(batch).detach().transpose(0, 1).reshape(24, -1) for batch in task.calibration(300, 128)]
    assert len(seen) == 3
    return np.mean([s.mean(1).numpy() for s in seen], 0), np.mean([s.var(1).numpy() for s in seen], 0)


def test_statistics_move_as_those_of_batches_and_nothing_else_changes(task):
    whole = Draft.of_model(task.model)
    draft = Pack(SVD(2, weighted=False))(whole, None)
    after = Recalibrate(300)(draft, task)
    (mean, variance), (mean_now, variance_now) = (of_batches(d.module().first, task) for d in (whole, draft))
    assert np.abs(mean_now - mean).max() > 0.01
    moved = (
        statistics(whole, "running_mean") + mean_now - mean,
        statistics(whole, "running_var") * variance_now / variance,
    )
    assert np.allclose(statistics(after, "running_mean"), moved[0], atol=1e-5)
    assert np.allclose(statistics(after, "running_var"), moved[1], rtol=1e-4)
    changed = {name for name, tensor in after.tensors.items() if tensor is not draft.tensors[name]}
    assert changed == {"norm.running_mean", "norm.running_var"}
    assert after.tensors["norm.running_mean"].note == AGAIN
    assert artifact_of(after).to_bytes() == artifact_of(Recalibrate(300)(draft, task)).to_bytes()


def test_a_factored_resnet20_gains_points_from_its_norms_alone(data):
    datasets, models = data
    parts = [datasets.load("cifar10", part, count) for part, count in (("train", 600), ("test", 400))]
    train, test = ((models.inputs("resnet20", x), torch.from_numpy(y).long()) for x, y in parts)
    task = tn.Task(models.load("resnet20"), train, test)
    draft = Pack(SVD(part=0.5, spatial=True, weighted=False))(Draft.of_model(task.model), task)
    again = Recalibrate(500)(draft, task)
    before, after = (task.score(test, d.module()) for d in (draft, again))
    assert after > before + 0.03
    anew = draft.module()
    taken(anew, task, task.calibration(500, 128))
    assert after > task.score(test, anew) + 0.005  # the training images lack the black borders of its training


def test_a_network_that_nothing_changed_keeps_its_norms_whatever_the_data(data, task):
    datasets, models = data
    images, labels = datasets.load("cifar10", "train", 300)
    resnet = tn.Task(models.load("resnet20"), (models.inputs("resnet20", images), torch.from_numpy(labels).long()))
    other = replace(task, train=(5 * task.train[0] - 2, task.train[1]))
    for it in (resnet, other):
        draft = Draft.of_model(it.model)
        after = Recalibrate(200)(draft, it)
        assert all(np.array_equal(unpack(after.tensors[n].tree), unpack(t.tree)) for n, t in draft.tensors.items())


def test_channels_that_said_nothing_get_what_they_say_now():
    own, before, after = (Moments(*(torch.tensor(a) for a in part)) for part in (
        ([1.0, 7.0], [4.0, 0.0]), ([0.5, 0.0], [2.0, 0.0]), ([1.5, -1.0], [1.0, 9.0])
    ))  # fmt: skip
    moved = followed(own, before, after)
    assert moved.mean.tolist() == [2.0, -1.0] and moved.variance.tolist() == [2.0, 9.0]


def black_borders(images, generator):
    return F.pad(images[:, :, 4:, 4:] + 2, (4, 0, 4, 0)) - 2


def test_training_on_other_data_than_the_norms_hold_is_told(data, task):
    datasets, models = data
    images, labels = datasets.load("cifar10", "train", 300)
    train = models.inputs("resnet20", images), torch.from_numpy(labels).long()
    given = tn.Task(models.load("resnet20"), train)
    few = tuple(part[:128] for part in train)
    with pytest.warns(UserWarning, match=r"bn1: the training data give it variances that are 2\d% off .*augment="):
        Finetune(1)(Draft.of_model(given.model), replace(given, train=few, valid=few))
    fresh = replace(task, model=Net())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*task.train), 50, shuffle=True)
    with warnings.catch_warnings(action="error"):
        warn_of_other_data(replace(given, augment=black_borders), 64)
        warn_of_other_data(task, 64)
        warn_of_other_data(fresh, 64)
        warn_of_other_data(replace(given, train=list(loader)), 64)


def test_what_is_folded_kept_or_sliced_stays_so(task):
    draft, _ = folded(Draft.of_model(task.model), task, task.calibration(32))
    assert Recalibrate()(draft, task).tensors == draft.tensors
    kept = Draft.of_model(task.model).leaving({"norm.running_mean": "norm.running_mean"})
    assert Recalibrate()(kept, task).tensors["norm.running_mean"] is kept.tensors["norm.running_mean"]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(task.model.first, task.model.norm, nn.ReLU(), pool, task.model.last)
    cut = Channels(0.5, samples=64)(Draft.of_model(model), replace(task, model=model))
    after = Recalibrate()(cut, task)
    assert len(kept_places(cut.tensors["1.weight"].tree, 0)) < 24
    assert all(after.tensors[name] is cut.tensors[name] for name in cut.trainable)
    small = realise(model, after.tensors).eval()
    assert torch.allclose(small(task.test[0]), after.module().eval()(task.test[0]), atol=1e-5)


def test_a_statistic_that_is_no_number_names_its_norm(task):
    draft = Draft.of_model(task.model)
    broken = tn.Task(task.model, (torch.full((40, 3, 8, 8), 3e38), torch.zeros(40, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"norm.running_mean: is not finite"):
        Recalibrate()(draft, broken)
    with pytest.raises(ValueError, match="2 samples"):
        Recalibrate(1)

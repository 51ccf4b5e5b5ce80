"""Tasks: what may come in, what is held back, what is measured, and that nothing of the user's is disturbed."""

import copy
import math
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import tersenet as tn
from tersenet.data import samples, split_of, tensors
from tersenet.draft import Draft, artifact_of
from tersenet.likelihood import Likelihood
from tersenet.stages.finetune import Finetune
from tersenet.task import Metric


class Two(nn.Module):
    """Two inputs, called by position or by name; the second may be nested."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(3, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, a, b):
        b = b["part"] if isinstance(b, dict) else b
        return self.last(torch.relu(self.left(a) + self.right(b)))


def numbered(count, width=4):
    """Inputs whose first place is their number, and targets."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(count)
    return x, torch.arange(count) % 2


def numbers_of(batches):
    return [int(n) for inputs, _ in batches for n in tensors(inputs)[0][:, 0]]


class Numbered(Dataset):
    def __init__(self, count):
        self.x, self.y = numbered(count)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        return self.x[at], self.y[at]


class Streamed(IterableDataset):
    """Samples in an order drawn anew at each reading."""

    def __iter__(self):
        x, y = numbered(60)
        for at in torch.randperm(60):
            yield x[at], y[at]


class Lines:
    """A re-iterable of batches of uneven sizes."""

    def __iter__(self):
        x, y = numbered(60)
        yield from zip(x.split(7), y.split(7), strict=True)


def data(kind):
    x, y = numbered(60)
    return {
        "arrays": (x, y),
        "numpy": (x.numpy(), y.numpy()),
        "dataset": Numbered(60),
        "loader": DataLoader(TensorDataset(x, y), batch_size=7),
        "shuffling": DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True),
        "drawn": DataLoader(TensorDataset(x, y), batch_size=7, sampler=WeightedRandomSampler(torch.ones(60), 60)),
        "stream": DataLoader(Streamed(), batch_size=5),
        "batches": list(zip(x.split(7), y.split(7), strict=True)),
        "re-iterable": Lines(),
    }[kind]


KINDS = ["arrays", "numpy", "dataset", "loader", "shuffling", "stream", "batches", "re-iterable"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_back_is_never_trained_on_nor_calibrated_with(kind):
    torch.manual_seed(5)
    task = tn.Task(nn.Linear(4, 2), data(kind))
    held = numbers_of(task.held().batches(8))
    trained = [numbers_of(task.batches(epoch, 0, 16)) for epoch in range(2)]
    seen = numbers_of((inputs, None) for inputs in task.calibration(1000))
    assert held and sorted(held + trained[0]) == list(range(60)) == sorted(held + seen)
    assert set(trained[0]) == set(trained[1])
    assert numbers_of(tn.Task(nn.Linear(4, 2), data(kind)).held().batches(8)) == held  # the same at every run
    if kind in ("arrays", "numpy", "dataset", "loader", "shuffling"):
        assert len(held) == 6 and max(held) - min(held) > 20  # drawn from all of it, not its end
        assert trained[0] != trained[1] != sorted(trained[1])


def test_a_validation_split_is_what_choices_are_made_on():
    task = tn.Task(nn.Linear(4, 2), data("arrays"), valid=data("batches")[:2])
    assert numbers_of(task.held().batches(8)) == list(range(14))
    assert sorted(numbers_of(task.batches(0, 0, 16))) == list(range(60))


def test_a_loader_that_draws_with_replacement_is_read_as_it_is():
    task = tn.Task(nn.Linear(4, 2), data("drawn"))
    first, again = (numbers_of(task.held().batches(8)) for _ in range(2))
    assert first == again and len(first) < 60
    assert len(numbers_of(task.batches(0, 0, 16))) + len(first) == 60


def test_what_can_be_read_only_once_is_refused_in_one_line():
    batches = data("batches")
    for once in (iter(batches), (batch for batch in batches), map(tuple, batches), zip(*data("arrays"), strict=True)):
        with pytest.raises(ValueError, match="train can be read only once"):
            tn.Task(nn.Linear(4, 2), once)
    with pytest.raises(ValueError, match="train is int"):
        tn.Task(nn.Linear(4, 2), 7)
    with pytest.raises(ValueError, match="60 inputs and 59 targets"):
        tn.Task(nn.Linear(4, 2), (torch.zeros(60, 4), torch.zeros(59)))
    with pytest.raises(ValueError, match="holds no samples"):
        tn.Task(nn.Linear(4, 2), TensorDataset(torch.zeros(0, 4), torch.zeros(0)))
    with pytest.raises(ValueError, match="a batch is dict"):
        tn.Task(nn.Linear(4, 2), [{"x": torch.zeros(2, 4)}]).example()


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("form", ["tuple", "list", "named", "dict", "nested", "dict batches", "triples"])
def test_inputs_may_be_tuples_and_dicts(form):
    torch.manual_seed(0)
    a, b = torch.randn(50, 4), torch.randn(50, 3)
    y = (a.sum(1) > b.sum(1)).long()
    given = {
        "tuple": ((a, b), y), "list": ([a, b], y), "named": (Pair(a, b), y), "dict": ({"a": a, "b": b}, y),
        "nested": ({"a": a, "b": {"part": b}}, y),
        "dict batches": [{"a": a[k : k + 10], "b": b[k : k + 10], "labels": y[k : k + 10]} for k in range(0, 50, 10)],
        "triples": [(a[k : k + 10], b[k : k + 10], y[k : k + 10]) for k in range(0, 50, 10)],
    }[form]  # fmt: skip
    task = tn.Task(Two(), given, given, schedule=tn.Schedule(20, 0.1, 10))
    before = task.score(task.test)
    with torch.no_grad():
        assert before == pytest.approx(float((task.model(a, b).argmax(1) == y).double().mean()))
    assert task.trained().score(task.test) > max(0.8, before)
    tuned = Finetune(1)(Draft.of_model(task.model), task)
    assert 12 <= sum(map(samples, task.calibration(12))) <= 20  # batches that are given are not taken apart
    assert len(tuned.tensors) == 6


def test_inputs_of_float64_meet_a_network_of_another_type():
    x, y = numbered(40)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        task = tn.Task(nn.Linear(4, 2).to(dtype), (x.double().numpy(), y.numpy()), (x.double().numpy(), y.numpy()))
        assert 0 <= task.score(task.test) <= 1
        assert task.outputs(task.model, task.calibration(4)[0]).dtype == dtype
        Finetune(1)(Draft.of_model(task.model), task)


class Moody(nn.Module):
    """Dropout by torch, and noise by the global generators of NumPy and Python."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = F.dropout(self.first(x), 0.5, self.training)
        if self.training:
            x = x + np.random.random() + random.random()
        return self.last(torch.relu(x))


@pytest.mark.parametrize("kind", ["arrays", "shuffling", "stream"])
def test_randomness_follows_the_seed_and_the_users_generators_are_left_alone(kind):
    torch.manual_seed(1)
    model = Moody()

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    def run(seed):
        task = tn.Task(copy.deepcopy(model), data(kind), data(kind), schedule=tn.Schedule(2, 0.01, 16))
        tuned = artifact_of(Finetune(1, 0.01, seed)(Draft.of_model(task.model), task)).to_bytes()
        return tuned, artifact_of(Draft.of_model(task.trained(seed).model)).to_bytes(), task.score(task.test)

    before = state()
    found = [run(0), run(0), run(1)]
    assert state() == before
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert run(0) == found[0] == found[1]
    assert found[2][0] != found[0][0] and found[2][1] != found[0][1]


def test_generators_are_the_users_again_where_training_breaks_off():
    model = nn.Linear(4, 2)
    task = tn.Task(model, data("arrays"), loss=lambda outputs, targets: 1 / 0)
    before = torch.get_rng_state()
    for broken in (task.trained, lambda: Finetune(1)(Draft.of_model(model), task)):
        with pytest.raises(ZeroDivisionError):
            broken()
        assert torch.equal(torch.get_rng_state(), before)


class Stateful(nn.Module):
    """Keeps what it computes in itself, as hand-written U-Nets and recurrent networks do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("state", torch.zeros(0))

    def forward(self, x):
        self.skip = self.first(x)
        self.state = self.skip.detach() * 2
        x = torch.relu(self.skip @ torch.eye(4))
        return self.last(x + self.skip + self.state)


def test_modules_that_keep_state_are_scored_right_on_any_number_of_threads():
    torch.manual_seed(0)
    model = Stateful()
    x = torch.randn(6000, 4)
    task = tn.Task(model, (x, torch.zeros(6000).long()), metric=lambda outputs, targets: outputs.sum() / len(outputs))
    with torch.no_grad():
        wanted = float(model(x).sum() / 6000)
    model.state = torch.zeros(0)
    assert task.score(task.train) == pytest.approx(wanted, rel=1e-4)
    assert model.state.numel() == 0 and model.training


def spearman(outputs, targets):
    ranks = [t.flatten().argsort().argsort().double() for t in (outputs, targets)]
    return torch.corrcoef(torch.stack(ranks))[0, 1]


def test_metrics_are_over_samples_or_over_the_split_and_better_with_more_or_less():
    torch.manual_seed(0)
    x = torch.randn(1234, 3)
    model = nn.Linear(3, 1)
    y = x.sum(1, keepdim=True) + torch.randn(1234, 1)
    with torch.no_grad():
        outputs = model(x)
    whole = tn.Task(model, (x, y), loss=F.mse_loss, metric=Metric(spearman, over="split"))
    assert whole.score(whole.train) == pytest.approx(float(spearman(outputs, y)))
    mean = tn.Task(model, (x, y), loss=F.mse_loss, metric=Metric(F.mse_loss, better="less"))
    assert mean.score(mean.train) == pytest.approx(float(F.mse_loss(outputs, y)), rel=1e-6)
    assert mean.metric.gain(1.0, 3.0) == 2.0 and whole.metric.gain(1.0, 3.0) == -2.0
    uneven = [(x[:100], y[:100]), (x[100:103], y[100:103]), (x[103:], y[103:])]
    assert mean.score(uneven) == pytest.approx(float(F.mse_loss(outputs, y)), rel=1e-6)
    ragged = [(torch.randn(2, n, 3), torch.zeros(2, n, 1)) for n in (5, 7)]
    shapes = []
    lists = Metric(lambda outputs, targets: shapes.append([t.shape for t in outputs]) or 1.0, over="split")
    assert tn.Task(model, (x, y), metric=lists).score(ragged) == 1.0
    assert shapes == [[(2, 5, 1), (2, 7, 1)]]
    with pytest.raises(ValueError, match="over 'samples' or 'split'"):
        Metric(spearman, over="batch")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_finite_number_is_refused(value):
    task = tn.Task(nn.Linear(4, 2), data("arrays"), metric=lambda outputs, targets: value)
    with pytest.raises(ValueError, match=f"the metric is {value}: look at what the network says"):
        task.score(task.train)


def reshaped(*shape):
    return nn.Sequential(nn.Linear(4, math.prod(shape)), nn.Unflatten(1, shape))


CLASSES = torch.randint(0, 3, (20,))
LIKELY = {
    "cross entropy": (reshaped(3), CLASSES, F.cross_entropy, ("classes", 1)),
    "its module": (reshaped(3), CLASSES, nn.CrossEntropyLoss(label_smoothing=0.1), ("classes", 1)),
    "soft targets": (reshaped(3), torch.rand(20, 3).softmax(1), F.cross_entropy, ("classes", 1)),
    "a lambda": (reshaped(3), CLASSES, lambda z, t: 2 * F.cross_entropy(z, t), ("classes", 1)),
    "of places": (reshaped(3, 5, 5), torch.randint(0, 3, (20, 5, 5)), F.cross_entropy, ("classes", 1)),
    "classes last": (
        reshaped(6, 3), torch.randint(0, 3, (20, 6)), lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()),
        ("classes", 2),
    ),
    "flattened targets": (
        reshaped(6, 3), torch.randint(0, 3, (20, 6)), lambda z, t: F.cross_entropy(z.reshape(-1, 3), t.reshape(-1)),
        ("classes", 2),
    ),
    "one output": (reshaped(1), torch.randn(20, 1), F.mse_loss, ("gaussian", 1)),
    "a distance": (reshaped(2), torch.randn(20, 2), lambda z, t: (z - t).abs().mean(), ("gaussian", 1)),
    "yes or no": (reshaped(4), (torch.rand(20, 4) > 0.5).float(), nn.BCEWithLogitsLoss(), ("bernoulli", 1)),
    "a lambda of it": (
        reshaped(4), (torch.rand(20, 4) > 0.5).float(), lambda z, t: 2 * F.binary_cross_entropy_with_logits(z, t),
        ("bernoulli", 1),
    ),
    "triplets": (reshaped(5), torch.zeros(20), lambda z, t: z.square().mean(), ("gaussian", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKELY)
def test_what_outputs_say_is_told_by_the_loss_or_the_targets(name):
    model, targets, loss, wanted = LIKELY[name]
    found = Likelihood.of(tn.Task(model, (torch.randn(20, 4), targets), loss=loss))
    assert (found.kind, found.axis if found.kind == "classes" else 1) == wanted
    assert found.why


def test_the_likelihood_can_be_set():
    model, targets, loss, _ = LIKELY["a distance"]
    task = tn.Task(model, (torch.randn(20, 4), targets), loss=loss, likelihood="bernoulli")
    assert Likelihood.of(task).kind == "bernoulli"
    with pytest.raises(ValueError, match="a likelihood is one of"):
        tn.Task(model, loss=loss, likelihood="poisson")


@pytest.mark.parametrize("shape", [(40000, 3), (20000, 3, 2), (20000, 2, 3)])
def test_drawn_labels_give_the_fishers_gradients(shape):
    """Squared gradients of drawn labels are, in the mean, the Fisher's: p (1 - p) on the diagonal for classes."""
    axis = shape[1:].index(3) + 1
    logits = torch.tensor([2.0, 0.0, -1.0]).reshape([3 if k == axis else 1 for k in range(len(shape))])
    z = logits.expand(shape).clone().requires_grad_()
    Likelihood("classes", axis).sampled_loss(z, torch.Generator().manual_seed(0)).backward()
    p = logits.flatten().softmax(0)
    mean = z.grad.square().movedim(axis, -1).reshape(-1, 3).mean(0)
    assert torch.allclose(mean, p * (1 - p), rtol=0.1)
    z = torch.full((40000, 1), 1.0, requires_grad=True)
    Likelihood("bernoulli").sampled_loss(z, torch.Generator().manual_seed(0)).backward()
    p = torch.tensor(1.0).sigmoid()
    assert float(z.grad.square().mean()) == pytest.approx(float(p * (1 - p)), rel=0.03)
    z = torch.full((40000, 1), 1.0, requires_grad=True)
    Likelihood("gaussian").sampled_loss(z, torch.Generator().manual_seed(0)).backward()
    assert float(z.grad.square().mean()) == pytest.approx(1.0, rel=0.03)


def test_a_constant_added_to_class_scores_is_no_difference_but_an_error_of_a_single_output_is():
    z = torch.randn(4, 5, 3)
    moved = z + torch.randn(4, 5, 1)
    assert Likelihood("classes", 2).difference([z], [moved]) < 1e-12 < Likelihood("classes", 1).difference([z], [moved])
    one = torch.randn(4, 1)
    assert Likelihood("gaussian").difference([one], [one + 1]) == pytest.approx(1)
    masked = z.clone()
    masked[..., 0] = -math.inf
    assert Likelihood("gaussian").difference([masked], [masked]) == 0


def test_calibration_batches_are_small_where_samples_are_large():
    big = torch.zeros(12, 3, 300, 300)
    task = tn.Task(nn.Flatten(), (big, torch.zeros(12).long()))
    assert {len(part) for part in task.calibration(4)} <= {1, 2}
    assert sum(map(samples, task.calibration(5))) == 5
    loader = DataLoader(Numbered(64), batch_size=64)
    assert all(len(part) <= 16 for part in tn.Task(nn.Linear(4, 2), loader).calibration(40))
    assert split_of(loader, "x").count == 64

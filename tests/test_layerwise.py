"""Layer by layer: the order, statistics of what is packed already, and that it pays."""

import numpy as np
import pytest
import torch
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet.draft import Draft, artifact_of, dense_array
from tersenet.methods.kmeans import KMeans
from tersenet.methods.sparse import Magnitude
from tersenet.methods.surgeon import SparseGPT
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Packed, Sparse, unpack
from tersenet.stages.layerwise import Layerwise, fitted, in_order
from tersenet.stages.pack import Pack
from tersenet.statistics import packed, statistics
from tersenet.tracing.operations import Watch


@pytest.fixture(scope="module")
def task():
    return make_task()


def apart(draft, task):
    with torch.no_grad():
        x = task.test[0]
        return float((draft.module().eval()(x) - task.model.eval()(x)).square().mean())


@pytest.mark.parametrize("method", [SparseGPT(0.3), KMeans(2)], ids=lambda m: type(m).__name__)
def test_outputs_err_less_than_with_statistics_of_the_original_network(task, method):
    draft = Draft.of_model(task.model)
    after, at_once = (stage(draft, task) for stage in (Layerwise(method, samples=512), Pack(method, samples=512)))
    assert apart(after, task) < 0.8 * apart(at_once, task)


def test_each_layer_sees_the_inputs_that_the_packed_ones_before_it_make(task):
    draft, method = Draft.of_model(task.model), SparseGPT(0.3)
    after = Layerwise(method, samples=256)(draft, task)
    assert artifact_of(Layerwise(method, samples=256)(draft, task)).to_bytes() == artifact_of(after).to_bytes()
    assert in_order(draft, task) == ["conv.weight", "first.weight", "last.weight"]
    so_far, original = draft, draft.module()
    for name in in_order(draft, task):
        if name != "conv.weight":
            so_far = fitted(so_far, original, task, name, 256)
        known = statistics(so_far, task, {name: method}, 256)[name]
        tree = packed(so_far.tensors[name].tree, method, known)
        assert np.array_equal(unpack(tree), unpack(after.tensors[name].tree)), name
        so_far = so_far.with_trees({name: tree})
    of_original = statistics(draft, task, {"last.weight": method}, 256)["last.weight"]
    assert not torch.allclose(known.inputs, of_original.inputs, rtol=0.01)


class Odd(nn.Module):
    """A product with rows on another axis, groups, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.own = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 32) / 4)
        self.grouped = nn.Conv2d(32, 16, 1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=2)

    def forward(self, x):
        x = torch.relu(torch.relu(self.first(x)) @ self.own)[..., None, None]
        return self.up(torch.relu(self.grouped(x))).flatten(1)


@pytest.mark.parametrize("name", ["own", "grouped.weight", "up.weight"])
def test_a_layer_is_fitted_to_the_inputs_that_it_gets(name):
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    task = tn.Task(Odd(), (x, torch.randn(512, 32)), loss=nn.MSELoss(), metric=tn.Metric(lambda o, t: o[:, 0]))
    draft = Draft.of_model(task.model)
    before = Pack(SparseGPT(0.5), rules=((name, None),))(draft, task)
    after = fitted(before, task.model, task, name, 512)
    seen = {}
    for label, made in (("original", draft), ("before", before), ("after", after)):
        with torch.no_grad(), Watch(model := made.module()) as watch:
            model(x)
        seen[label] = next(use.out.detach() for use in watch.uses if use.name == name)
    errors = [float((seen[label] - seen["original"]).square().sum()) for label in ("before", "after")]
    assert 0 < errors[1] < 0.9 * errors[0]
    assert after.tensors[name].note == before.tensors[name].note
    again = fitted(draft, task.model, task, name, 512)  # nothing was lost before it
    assert np.allclose(unpack(again.tensors[name].tree), unpack(draft.tensors[name].tree), atol=1e-6)


class Backwards(nn.Module):
    """Layers that are used in another order than they are written in, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.unused, self.last, self.middle, self.first = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def test_layers_come_in_the_order_of_their_use():
    torch.manual_seed(0)
    task = tn.Task(Backwards(), (torch.randn(64, 8), torch.randint(0, 8, (64,))))
    names = ["first.weight", "middle.weight", "last.weight", "unused.weight"]
    draft = Draft.of_model(task.model)
    assert in_order(draft, task) == names
    after = Layerwise(SparseGPT(0.5), samples=64)(draft, task)
    assert [isinstance(after.tensors[name].tree, Sparse) for name in names] == [True, True, True, False]


def test_tuning_moves_what_is_still_dense_and_nothing_else(task):
    draft = Draft.of_model(task.model)
    rules = (("first*", KMeans(3)), ("last*", None))
    plain = Layerwise(Magnitude(0.3), rules)(draft, task)
    tuned = Layerwise(Magnitude(0.3), rules, tune=1)(draft, task)
    assert isinstance(tuned.tensors["first.weight"].tree, Codebook) and tuned.trainable == draft.trainable
    assert np.array_equal(unpack(tuned.tensors["conv.weight"].tree), unpack(plain.tensors["conv.weight"].tree))
    for name in ("first.weight", "last.weight", "last.bias", "norm.weight"):
        assert not np.array_equal(dense_array(tuned.tensors[name]), dense_array(plain.tensors[name])), name
    assert not isinstance(tuned.tensors["last.weight"].tree, Packed)
    assert artifact_of(tuned).meta["rules"] == {"first.weight": "first*"}


def test_where_all_is_packed_there_is_nothing_to_tune():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    task = tn.Task(model, (torch.randn(64, 12), torch.randint(4, (64,))))
    shared = Pack(KMeans(3))(Draft.of_model(model), None)
    tuned, plain = (Layerwise(Uniform(4), tune=tune, samples=64)(shared, task) for tune in (1, 0))
    assert artifact_of(tuned).to_bytes() == artifact_of(plain).to_bytes()


def test_it_asks_for_data(task):
    with pytest.raises(ValueError, match="Layerwise runs the network: give a Task with training data"):
        Layerwise(KMeans())(Draft.of_model(task.model), None)

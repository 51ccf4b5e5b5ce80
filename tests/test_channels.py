"""Channels: what goes together is found by tracing, layers really shrink, and the search keeps its budget."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet.allocators.amc import AMC, Problem, RandomSearch, walled
from tersenet.artifact import load
from tersenet.draft import Draft, artifact_of
from tersenet.journal import Journal, read
from tersenet.methods.kmeans import KMeans
from tersenet.packed import Sliced, unpack
from tersenet.realise import realise
from tersenet.stages.channels import Channels, DropDead, Plan, SearchChannels
from tersenet.stages.pack import Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.task import Metric
from tersenet.tracing.coupling import Coupling


def small(draft):
    return realise(draft.model, draft.tensors)


class Branches(nn.Module):
    """A residual sum, a concatenation, a depthwise and a grouped convolution, and a shortcut that pads channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1)
        self.depthwise, self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 12, 1)
        self.grouped, self.last = nn.Conv2d(12, 12, 3, groups=2), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner(x)))
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        x = self.grouped(self.mix(F.relu6(self.depthwise(x))))
        return self.last(F.pad(x, (0, 0, 0, 0, 2, 2)).mean((2, 3)))


class Digits(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return replace(make_task(), model=Digits(), snapshots={}).trained()


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    model = Branches()
    model.norm.running_mean.uniform_(-1, 1)
    x = torch.randn(64, 3, 8, 8)
    return tn.Task(model.eval(), (x, torch.randint(0, 5, (64,))))


def test_coupling_follows_sums_concatenations_depthwise_layers_and_freezes_what_code_fixes(branches):
    coupling = Coupling.of(branches, branches.model, branches.train[0][:2])
    places = {
        frozenset(p for p in coupling.axes if set(roots) & {coupling.root(n) for n in coupling.axes[p]})
        for roots in coupling.spaces()
    }
    residual = {("stem.weight", 0), ("norm.weight", 0), ("norm.bias", 0), ("inner.weight", 1), ("back.weight", 0)}
    residual |= {("back.bias", 0), ("left.weight", 1), ("right.weight", 1)}
    side = {("depthwise.weight", 0), ("depthwise.bias", 0), ("mix.weight", 1)}
    assert places == {
        frozenset(residual),
        frozenset({("inner.weight", 0), ("inner.bias", 0), ("back.weight", 1)}),
        frozenset({("left.weight", 0), ("left.bias", 0)} | side),
        frozenset({("right.weight", 0), ("right.bias", 0)} | side),
    }
    macs = 64 * (3 * 8 * 9 + 8 * 12 + 12 * 8 * 9 + 8 * 6 + 8 * 10 + 16 * 9 + 16 * 12) + 36 * (12 * 6 * 9) + 16 * 5
    assert coupling.macs(set()) == macs


@pytest.fixture(scope="module")
def plan(branches):
    return Plan.of(Draft.of_model(branches.model), branches, 32)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0.05, 1), min_size=4, max_size=4))
def test_the_small_module_says_what_the_file_with_zeros_says(branches, plan, ratios):
    draft = plan.pruned(ratios)
    x = branches.train[0]
    whole = load(artifact_of(draft).to_bytes()).into(Branches()).eval()
    less = small(draft).eval()
    with torch.no_grad():
        assert torch.allclose(whole(x), less(x), atol=1e-4)
    assert Coupling.of(branches, less, x[:2]).macs(set()) == plan.macs(ratios)
    assert sum(p.numel() for p in less.parameters()) <= sum(p.numel() for p in Branches().parameters())


def test_layers_that_read_what_is_left_are_fitted_again(branches):
    plan = Plan.of(Draft.of_model(branches.model), branches, 64)
    draft = plan.pruned([1, 0.5, 1, 1])
    x = branches.train[0]
    with torch.no_grad():
        cut = copy.deepcopy(branches.model)
        inner = unpack(draft.tensors["inner.weight"].tree)
        gone = torch.from_numpy(np.abs(inner).sum((1, 2, 3)) == 0)
        cut.back.weight[:, gone] = 0
        wanted, plain = branches.model(x), cut(x)
        fitted = artifact_of(draft).into(copy.deepcopy(branches.model)).eval()(x)
    assert gone.sum() == 6
    assert (fitted - wanted).square().mean() < 0.7 * (plain - wanted).square().mean()


def test_channels_meet_the_macs_and_survive_retraining_as_zeros(task):
    own = copy.deepcopy(task.model)
    draft = Channels(0.5)(Draft.of_model(own), task)
    plan = Plan.of(Draft.of_model(own), task, 64)
    assert isinstance(draft.tensors["1.weight"].tree, Sliced)
    trained = Retrain(epochs=1)(draft, task)
    before, after = small(draft), small(trained)
    x = task.test[0][:2]
    assert Coupling.of(task, before, x).macs(set()) == Coupling.of(task, after, x).macs(set()) <= 0.5 * plan.macs()
    assert Channels(1.0)(draft, task) is draft
    with pytest.raises(ValueError, match="of the MACs cannot be met"):
        Channels(0.0001)(Draft.of_model(own), task)
    with pytest.raises(ValueError, match=r"Channels got 9 ratios; this network has"):
        Channels(0.5, ratios=(0.5,) * 9)(Draft.of_model(own), task)


def test_dead_channels_go_with_all_that_fed_them(branches):
    draft = Prune(0.9999, 1, retrain="none")(Draft.of_model(branches.model), None)
    w = unpack(draft.tensors["mix.weight"].tree).copy()
    w[:, 3] = 0  # nothing reads channel 3 of the concatenation any more, which `left` makes
    draft = Prune(1.0, 1, retrain="none")(draft.with_trees({"mix.weight": w}), None)
    found = DropDead()(draft, branches)
    with torch.no_grad():
        x = branches.train[0]
        before, after = (artifact_of(d).into(Branches()).eval()(x) for d in (draft, found))
    assert torch.allclose(before, after, atol=1e-6)
    assert not unpack(found.tensors["left.weight"].tree)[3].any()
    assert not unpack(found.tensors["depthwise.weight"].tree)[3].any()
    assert unpack(found.tensors["left.bias"].tree)[3] == 0
    assert unpack(found.tensors["left.weight"].tree)[2].any()


def network(sizes, part):
    """Costs of a chain in which each layer's cost is its inputs times its outputs."""

    def cost(ratios):
        kept = [3, *(max(1, round(r * n)) for r, n in zip(ratios, sizes, strict=True)), 10]
        return float(sum(a * b for a, b in itertools.pairwise(kept)))

    features = tuple((k / len(sizes), n / max(sizes)) for k, n in enumerate(sizes))
    return Problem(tuple(sizes), features, cost, part * cost([1.0] * len(sizes)), min)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_every_sequence_of_actions_keeps_the_budget(sizes, actions):
    problem = network(sizes, 0.6)
    try:
        problem.check(0.2)
    except ValueError:
        return
    ratios = []
    for action in actions[: len(sizes)]:
        ratios.append(walled(action, ratios, problem, 0.2))
        assert 0 < ratios[-1] <= 1
    assert problem.cost(ratios) <= problem.most


@pytest.mark.parametrize("search", [RandomSearch(12), AMC(12, 4), AMC(12, 4, guarantee=True)], ids=str)
def test_searches_repeat_themselves_and_resume_without_asking_twice(search, tmp_path):
    problem = network([16, 32, 32], 0.5)
    whole = search.allocate(problem)
    assert problem.cost(whole) <= problem.most
    asked = []

    def counted(ratios):
        asked.append(ratios)
        return min(ratios)

    counting = Problem(problem.sizes, problem.features, problem.cost, problem.most, counted)
    journal = Journal()
    journal.open(tmp_path)
    assert search.allocate(counting, journal, "a search") == whole
    first, lines = len(asked), journal.path.read_text().splitlines()
    journal.path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:7])  # stopped while the sixth was written
    again = Journal()
    again.open(tmp_path)
    assert search.allocate(counting, again, "a search") == whole
    assert len(asked) == first + len(lines) - 5
    assert [row["score"] for row in read(journal.path)] == [json.loads(line)["score"] for line in lines]
    assert search.allocate(counting, again, "another") == whole and len(asked) == first + 2 * len(lines) - 5


def test_a_budget_under_the_least_of_every_layer_is_refused():
    with pytest.raises(ValueError, match="cannot be met: 20% of every layer cost"):
        AMC(2, 1).allocate(network([16, 16], 0.0001))


def test_the_agent_learns_what_the_score_asks_for():
    plain, scores = network([40, 40], 0.9), []

    def score(ratios):
        scores.append(ratios[0] - 0.5 * ratios[1])
        return scores[-1]

    AMC(120, 20, seed=1).allocate(Problem(plain.sizes, plain.features, plain.cost, plain.most, score))
    assert np.mean(scores[-30:]) > np.mean(scores[:20]) + 0.1


def test_amc_prunes_a_network_within_its_budget(task):
    own = copy.deepcopy(task.model)
    plan = Plan.of(Draft.of_model(own), task, 64)
    begin = Draft.of_model(own)
    draft = SearchChannels(0.6, AMC(6, 2), samples=64)(begin, task)
    assert Coupling.of(task, small(draft), task.test[0][:2]).macs(set()) <= 0.6 * plan.macs()
    assert 0 < len(begin.journal.rows) <= 6 and all("score" in row for row in begin.journal.rows)
    assert tn.papers.amc(0.4, 8)[0].search.episodes == 8


class Reader(nn.Module):
    """Channels that somebody else needs: a second output, a weight that is read again, a scale for each."""

    def __init__(self):
        super().__init__()
        self.free, self.out, self.again = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1, bias=False)
        self.bare, self.norm, self.wide = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8, affine=False), nn.Conv1d(8, 8, 1)
        self.shapes, self.last = nn.PReLU(8), nn.Linear(8, 5)

    def forward(self, x, scale):
        features = self.out(F.relu(self.free(x)))
        x = self.again(F.relu(features))
        x = x + 0.01 * torch.matmul(self.again.weight[:, :, 0], F.relu(x))
        x = self.wide(F.relu(self.norm(self.bare(F.relu(x)))))
        return {"scores": self.last(self.shapes(x).mean(2) * scale), "features": features}


def test_channels_stay_that_another_output_or_reader_needs():
    torch.manual_seed(0)
    x = {"x": torch.randn(64, 3, 9), "scale": torch.rand(64, 1)}
    task = tn.Task(Reader(), (x, torch.randint(0, 5, (64,))))
    plan = Plan.of(Draft.of_model(task.model), task, 32)
    places = [
        {place for place in plan.coupling.axes if set(plan.coupling.axes[place]) & set(roots)} for roots in plan.spaces
    ]
    bare = {("bare.weight", 0), ("bare.bias", 0), ("norm.running_mean", 0), ("wide.weight", 1)}
    assert places == [{("free.weight", 0), ("free.bias", 0), ("out.weight", 1)}, bare]
    draft = plan.pruned([0.5, 0.5])
    with torch.no_grad():
        whole, less = (task.model.__class__.forward(made.eval(), **x) for made in (draft.module(), small(draft)))
    assert all(torch.allclose(whole[name], less[name], atol=1e-5) for name in whole)


@pytest.mark.parametrize("dims", [1, 3])
def test_channels_of_convolutions_over_any_number_of_axes_go(dims):
    torch.manual_seed(0)
    conv, norm = (nn.Conv1d, None, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, None, nn.BatchNorm3d)[dims - 1]
    model = nn.Sequential(
        conv(2, 12, 2), norm(12), nn.ReLU(), conv(12, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 2**dims, 4)
    )
    task = tn.Task(model, (torch.randn(64, 2, *[3] * dims), torch.randint(0, 4, (64,))))
    draft = Channels(0.4, samples=32)(Draft.of_model(model), task)
    x = task.train[0]
    with torch.no_grad():
        assert torch.allclose(draft.module().eval()(x), small(draft).eval()(x), atol=1e-4)
    assert sum(p.numel() for p in small(draft).parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_wide_layers_are_fitted_again_block_by_block(branches, monkeypatch):
    from tersenet import calibrate

    x = branches.train[0]

    def error(plan):
        with torch.no_grad():
            pruned = plan.pruned([1, 0.5, 1, 1]).module().eval()
            return float((pruned(x) - branches.model(x)).square().mean())

    whole = Plan.of(Draft.of_model(branches.model), branches, 64)
    monkeypatch.setattr(calibrate, "MOST", 700)
    blocks = Plan.of(Draft.of_model(branches.model), branches, 64)
    assert all(one.whole for one in whole.found.values()) and not blocks.found["back.weight"].whole
    assert error(whole) < error(blocks) < 0.9 * error(replace(whole, found={}))


def test_a_search_makes_less_of_a_metric_that_is_better_with_less(task):
    metric = Metric(F.cross_entropy, better="less")
    own = replace(task, metric=metric, model=copy.deepcopy(task.model))
    draft = Draft.of_model(own.model)
    found = SearchChannels(0.6, RandomSearch(8), samples=64, scored=100)(draft, own)
    scores = [row["score"] for row in draft.journal.rows]
    assert max(scores) < 0
    part = list(own.held().batches(100))[:1]
    assert own.score(part, found.module()) == pytest.approx(-max(scores), rel=1e-5)


def test_dropping_dead_channels_leaves_other_weights_as_they_are_packed(task):
    draft = Pack(KMeans(3))(Draft.of_model(copy.deepcopy(task.model)), task)
    after = DropDead()(draft, task)
    assert all(after.tensors[name].tree is draft.tensors[name].tree for name in draft.weights())


def test_statistics_of_norms_without_weights_follow_training_where_channels_are_gone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3))
    x = 2 + torch.randn(64, 6)
    task = tn.Task(model.eval(), (x, torch.randint(0, 3, (64,))))
    draft = Channels(0.5, samples=32)(Draft.of_model(model), task)
    trained = Retrain(epochs=3)(draft, task)
    before, after = (made.tensors["1.running_mean"].tree for made in (draft, trained))
    assert np.array_equal(before.kept, after.kept) and np.abs(before.child - after.child).min() > 0.01
    with torch.no_grad():
        assert torch.allclose(trained.module().eval()(x), small(trained).eval()(x), rtol=1e-5, atol=1e-5)

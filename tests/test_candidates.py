"""Candidates of every method for each weight, and the choice among them for a size."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.draft import QUICK, Draft, artifact_of
from tersenet.methods import chain
from tersenet.methods.factorize import SVD
from tersenet.methods.kmeans import KMeans
from tersenet.methods.product import Product
from tersenet.methods.uniform import Uniform
from tersenet.packed import unpack
from tersenet.stages.waterfill import Waterfill
from tersenet.waterfilling.candidates import allocated, candidates
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.layers import Waterfilling


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    x = torch.randn(600, 1, 8, 8)
    y = (x[:, 0, :4].sum((1, 2)) > x[:, 0, 4:].sum((1, 2))).long()
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 24), nn.ReLU(), nn.Linear(24, 2))
    return tn.Task(net, (x[:500], y[:500]), (x[500:], y[500:]), schedule=tn.Schedule(epochs=3)).trained()


def offered(task, c=0.02):
    waterfilling = Waterfilling.of(Knowledge.of(Draft.of_model(task.model), task, 256))
    return waterfilling, candidates(waterfilling, c, 0.5, (KMeans(3), Uniform(4, by_row=True)), QUICK)


def test_each_weight_is_offered_steps_methods_and_what_loses_nothing_with_true_bytes_and_errors(task):
    waterfilling, offers = offered(task)
    assert list(offers) == [layer.name for layer in waterfilling.layers]
    for layer in waterfilling.layers:
        offer = offers[layer.name]
        names = [one.method for one in offer]
        assert "without loss" in names and str(KMeans(3)) in names and names[0].startswith("step")
        lost = {one.method: one.packing.cost for one in offer}
        assert lost["without loss"] == 0 < lost[str(KMeans(3))]
        steps = [one for one in offer if one.method.startswith("step") and one.packing.cost > 0]
        assert steps[0].nbytes > steps[-1].nbytes and steps[0].packing.cost < steps[-1].packing.cost
        whole = np.asarray(unpack(waterfilling.draft.tensors[layer.name].tree), np.float64)
        for one in offer:  # the cost is that of the tree's own error, in whatever domain it was found
            error = layer.weight - layer.matrix(np.asarray(unpack(one.packing.tree), np.float64))
            assert one.packing.cost == pytest.approx(layer.metric.cost(error), rel=1e-3, abs=1e-9 * layer.energy)
            assert unpack(one.packing.tree).shape == whole.shape


def test_methods_read_the_moments_of_the_layers_and_offer_nothing_without(task):
    """Ranks and blocks that lose least by what the layers read, beside those by the weights alone."""
    knowledge = Knowledge.of(Draft.of_model(task.model), task, 256)
    waterfilling = Waterfilling.of(knowledge)
    aware, blind = (chain(SVD(part=0.5, weighted=w), Uniform(8, by_row=True)) for w in (True, False))
    offers = candidates(waterfilling, 0.02, 0.5, (aware, blind, Product(4)), QUICK, knowledge.found)
    lost = {one.method: one.packing.cost for one in offers["3.weight"]}
    assert 0 < lost[str(aware)] < lost[str(blind)] and lost[str(Product(4))] > 0
    offers = candidates(waterfilling, 0.02, 0.5, (aware, blind), QUICK)
    assert {one.method for one in offers["3.weight"]} & {str(aware), str(blind)} == {str(blind)}


def test_a_method_that_needs_data_says_so_where_there_are_none(task):
    recipe = (Waterfill(methods=(chain(SVD(part=0.5), Uniform(8)),)),)
    with pytest.raises(ValueError, match="Chain needs the moments of the layer's inputs: give a Task with training"):
        tn.compress(tn.Task(task.model), recipe, tn.Budget(size=4000))


def test_what_is_chosen_keeps_the_size_and_costs_no_more_than_one_step_for_all(task):
    waterfilling, offers = offered(task)
    single = waterfilling.at(0.02)
    most = artifact_of(single, QUICK).nbytes
    draft, size = allocated(waterfilling, offers, 0.02, most, QUICK)
    assert size == artifact_of(draft, QUICK).nbytes <= most
    assert waterfilling.loss(draft) <= 1.02 * waterfilling.loss(single)
    with pytest.raises(ValueError, match="cannot be met"):
        allocated(waterfilling, offers, 0.02, 40, QUICK)


def test_weights_that_suit_another_method_get_it():
    """Rows of a few values each at random places: clusters hold them in a bit or two, levels at one step do not."""
    generator = np.random.default_rng(0)
    state = {"free.weight": generator.standard_normal((64, 64)).astype(np.float32)}
    values = np.array([-3.1, -0.4, 0.9, 7.7], np.float32)
    noise = 1e-3 * generator.standard_normal((128, 128)).astype(np.float32)
    state["few.weight"] = values[generator.integers(0, 4, (128, 128))] + noise
    mixed = tn.compress(state, tn.papers.mixed(), tn.Budget(size="8kB")).artifact
    plain = tn.compress(state, budget=tn.Budget(size="8kB")).artifact
    assert mixed.nbytes <= 8000 and plain.nbytes <= 8000

    def error(artifact):
        found = artifact.unpack()
        return sum(float(np.square(found[n] - w).sum() / np.square(w).sum()) for n, w in state.items())

    assert type(mixed["few.weight"]).__name__ == "Codebook"
    assert error(mixed) < 0.7 * error(plain)


def test_mixing_is_no_worse_at_the_outputs_and_the_same_twice(task, tmp_path):
    budget, held = tn.Budget(size=4000), task.train[0][:200]
    files = [tn.compress(task, tn.papers.mixed(samples=256), budget, folder=tmp_path / str(k)).artifact for k in (0, 1)]
    assert files[0].to_bytes() == files[1].to_bytes() and files[0].nbytes <= 4000
    plain = tn.compress(task, tn.papers.output_aware(samples=256), budget, folder=tmp_path / "2").artifact
    with torch.no_grad():
        wanted = task.model(held)
        one, other = (float((f.into(copy.deepcopy(task.model))(held) - wanted).norm()) for f in (files[0], plain))
    assert one <= 1.1 * other


def test_methods_are_for_sizes():
    with pytest.raises(ValueError, match="for a size or a ratio"):
        Waterfill(budget=tn.Budget(drop=1), methods=(KMeans(3),))

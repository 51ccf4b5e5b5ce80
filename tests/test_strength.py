"""The recipe's own setting that meets a size: what is tried, when the search ends, what cannot be met."""

import numpy as np
import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.budget import UnmetBudget
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Transformed
from tersenet.stages.channels import Channels
from tersenet.stages.levels import MLQ, SLQ
from tersenet.stages.lowrank import ENC
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune
from tersenet.strength import keeping, meeting, setting, stronger


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(432, 10)
    )
    data = torch.randn(120, 1, 8, 8), torch.randint(10, (120,))
    return tn.Task(model, data, data)


def search(recipe, most, size_of):
    """The bytes that are met, and how often the whole recipe and its quick part ran."""
    runs, quick = [], []

    def run(stages):
        runs.append(size_of(stages))
        return runs[-1], runs[-1]

    def quickly(stages):
        quick.append(size_of(stages))
        return quick[-1]

    return meeting(recipe, most, run, quickly), len(runs), len(quick)


def test_where_no_setting_makes_more_of_a_size_the_recipe_runs_no_more():
    found, runs, _ = search((Prune(0.1),), 10_000, lambda stages: round(500 + 5000 * min(stages[0].density, 0.9)))
    assert found == 5000 and runs == 1


def test_settings_that_a_network_cannot_have_bound_the_search():
    def size_of(stages):
        if stages[0].macs < 0.2:
            raise ValueError("cannot be met")
        return round(10_000 * stages[0].macs)

    for most in (2100, 2500, 9000):
        assert 0.95 * most < search((Channels(0.5),), most, size_of)[0] <= most
    with pytest.raises(UnmetBudget, match="of the recipe's macs"):
        search((Channels(0.5),), 1000, size_of)
    with pytest.raises(ValueError, match=r"^cannot be met"):  # the recipe itself
        search((Channels(0.1),), 1000, size_of)


def test_settings_that_a_stage_does_not_take_bound_the_search_at_the_weak_end_too():
    def size_of(stages):
        if stages[0].bits > 8:
            raise ValueError("takes at most 8 bits")
        return 1000 * stages[0].bits

    for most, bits in ((8500, 8), (7900, 7), (20_000, 8)):
        assert search((Uniform(8),), most, size_of)[0] == 1000 * bits


def test_what_a_stage_with_a_budget_of_its_own_chooses_among_is_no_setting_of_the_recipe():
    settled = tn.papers.mixed(tn.Budget(size=4000))
    with pytest.raises(ValueError, match="no setting of this recipe"):
        setting(settled)
    assert stronger((Prune(0.5), *settled), 2.0) == (Prune(0.25), *settled)


def test_searched_channels_meet_a_size_or_say_so(task, tmp_path):
    recipe = (*tn.papers.amc(0.5, episodes=4), Narrow())
    result = tn.compress(task, recipe, tn.Budget(size=2500), folder=tmp_path)
    assert result.artifact.nbytes <= 2500
    with pytest.raises(UnmetBudget, match="of the recipe's macs"):
        tn.compress(task, recipe, tn.Budget(size=150), folder=tmp_path)


def test_a_drop_is_kept_at_the_strongest_setting_found():
    def tried(least, recipe, name="density"):
        seen = []

        def run(stages):
            seen.append(getattr(stages[0], name))
            return seen[-1] >= least, seen[-1]

        return keeping(recipe, run), seen

    found, seen = tried(0.3, (Prune(0.5),))
    assert seen[0] == 0.5 and len(seen) == 4 and found == min(s for s in seen if s >= 0.3) < 0.5
    found, seen = tried(0.9, (Prune(0.5),))  # not even the weakest that was tried
    assert found == max(seen) < 0.9
    found, seen = tried(0.6, (Prune(0.5),))
    assert 0.6 <= found == min(s for s in seen if s >= 0.6)
    found, seen = tried(5, (Uniform(8),), "bits")
    assert len(seen) == len(set(seen)) and found == min(b for b in seen if b >= 5)


def test_settings_that_stages_do_not_take_end_no_search_for_a_drop():
    """SLQ takes 3 bits and no fewer; parts of the MACs may be less than the least ranks need."""
    assert keeping((SLQ(5),), lambda stages: (True, stages[0].bits)) == 3
    seen = []

    def run(stages):
        if stages[0].macs < 0.3:
            raise ValueError("cannot be met")
        seen.append(stages[0].macs)
        return True, stages[0].macs

    assert 0.3 <= keeping((ENC(0.5),), run) == min(seen) < 0.4
    with pytest.raises(ValueError, match="cannot be met"):
        keeping((ENC(0.2),), run)


def test_a_recipe_and_a_drop_end_in_a_smaller_file_than_the_recipe_alone(task, tmp_path):
    """Rounding to 8 bits loses nothing that a drop of 60 points of a random network would not allow."""
    recipe = (Pack(Uniform(8)), Narrow())
    whole = tn.compress(task, recipe, folder=tmp_path)
    less = tn.compress(task, recipe, tn.Budget(drop=60), folder=tmp_path)
    assert less.artifact.nbytes < 0.6 * whole.artifact.nbytes
    assert less.choice is not None and less.choice.before - less.choice.after <= 0.6


def test_transform_coding_clusters_biases_and_searches_its_bits_for_a_drop(task, tmp_path):
    result = tn.compress(task, tn.papers.transform_coding(8, clusters=2), tn.Budget(drop=60), folder=tmp_path)
    trees = {name: tensor.tree for name, tensor in result.artifact.tensors.items()}
    assert isinstance(trees["0.weight"], Transformed) and isinstance(trees["5.weight"].child, Transformed)
    assert isinstance(trees["2.bias"], Codebook) and len(trees["2.bias"].codewords) == 4
    levels = max(int(np.abs(trees[n].coefficients.q.astype(int)).max()) for n in ("0.weight", "2.weight"))
    assert levels < 127  # fewer than the 8 bits that the recipe begins with


def test_a_recipe_whose_size_no_setting_decides_is_held_to_a_size_as_it_is(task, tmp_path):
    recipe = (MLQ(1, epochs=1), Narrow())
    whole = tn.compress(task, recipe, folder=tmp_path).artifact
    held = tn.compress(task, recipe, tn.Budget(size=whole.nbytes + 40), folder=tmp_path).artifact
    assert held.nbytes == whole.nbytes
    trained = []

    def run(stages):
        trained.append(stages)
        return 1000, stages

    assert meeting(recipe, 1000, run, lambda stages: 1001) == recipe == trained.pop()
    for most, quick in ((999, 990), (100, 1000)):
        with pytest.raises(UnmetBudget, match=r"of this recipe \(MLQ, Narrow\), of which no setting decides the size"):
            meeting(recipe, most, run, lambda stages, quick=quick: quick)
    assert trained == [recipe]  # what is far too large without training is not trained

"""The recipe's own setting that meets a size: what is tried, when the search ends, what cannot be met."""

import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.budget import UnmetBudget
from tersenet.stages.channels import Channels
from tersenet.stages.pack import Narrow
from tersenet.stages.prune import Prune
from tersenet.strength import meeting, setting, stronger


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

"""A plan says what a run does to each tensor, and about how many bytes it takes."""

import numpy as np
import pytest
import torch
from conftest import floats

import tersenet as tn
from tersenet.methods import chain
from tersenet.methods.kmeans import KMeans
from tersenet.methods.sparse import Magnitude
from tersenet.plan import plan
from tersenet.stages.pack import Narrow, Pack
from tersenet.where import Where

ARRAYS = {
    "conv.weight": floats(16, 8, 3, 3), "mid.weight": floats(64, 64, seed=1), "head.weight": floats(10, 64, seed=2),
    "head.bias": floats(10), "bn.running_var": np.ones(16, np.float32), "steps": np.array(7),
}  # fmt: skip
PRUNED = chain(Magnitude(0.25), KMeans(3))


def told(found):
    return {line.name: line for line in found.lines}


def test_every_tensor_has_its_kind_rule_stage_and_reason():
    found = plan(ARRAYS, budget=tn.Budget(size=6000), keep=["head.*"], rules=[("kind:conv2d", KMeans(4))])
    lines = told(found)
    assert {name: line.kind for name, line in lines.items()} == {
        "conv.weight": "conv2d", "mid.weight": "linear", "head.weight": "linear", "head.bias": "vector",
        "bn.running_var": "vector", "steps": "other",
    }  # fmt: skip
    assert [lines[name].rule for name in ARRAYS] == ["kind:conv2d", "", "head.*", "head.*", "", ""]
    assert lines["conv.weight"].does == (f"packed by Pack with {KMeans(4)}",)
    assert lines["mid.weight"].does == ("packed by Waterfill",)
    assert lines["head.weight"].does == lines["head.bias"].does == ("kept",)
    assert lines["bn.running_var"].does == ("a buffer, kept bit for bit",)
    assert lines["steps"].does == ("not a floating-point tensor",)
    assert str(found).splitlines()[0] == "the recipe: Pack, then Waterfill"


@pytest.mark.parametrize(
    "recipe,budget",
    [
        ((Pack(KMeans(4)), Narrow()), None),
        ((Pack(PRUNED, rules=(("head*", None), (Where(kind="conv2d"), KMeans(6)))), Narrow()), None),
        ((Pack(PRUNED), Narrow()), tn.Budget(size=2000)),
        (None, tn.Budget(ratio=10)),
        (tn.papers.mixed(), tn.Budget(size=3000)),
    ],
    ids=["k-means", "rules", "to a size", "by itself", "mixed"],
)
def test_the_estimate_is_near_the_file(recipe, budget):
    found = plan(ARRAYS, recipe, budget)
    artifact = tn.compress(ARRAYS, recipe, budget).artifact
    rows = {row.name: row.total for row in artifact.ledger()}
    assert sum(found.bytes) == pytest.approx(artifact.nbytes, rel=0.3)
    for line, size in zip(found.lines, found.bytes):
        if line.weights > 500:
            assert size == pytest.approx(rows[line.name], rel=0.6), line.name


def test_what_cannot_be_met_or_run_is_said_before_any_work():
    with pytest.raises(ValueError, match="OBS needs"):
        plan(ARRAYS, tn.papers.exact_obs())
    with pytest.raises(ValueError, match="decides about no weight"):
        plan(ARRAYS, keep=["tail*"])
    text = str(plan(ARRAYS, budget=tn.Budget(size=2500), keep=["head*"]))
    assert "the budget allows 2,500; what is settled leaves no room for the rest" in text


def test_a_drop_is_planned_with_what_is_assumed_and_runs_nothing():
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    net.register_forward_hook(lambda *given: pytest.fail("the network ran"))
    data = torch.randn(40, 20), torch.zeros(40, dtype=torch.long)
    found = plan(tn.Task(net, data, data))
    assert "4 bits a weight are assumed, a drop of 0.5 points decides" in str(found)
    assert told(found)["0.weight"].bytes == pytest.approx(64 * 20 / 2, abs=50)


def test_tied_tensors_count_once():
    shared = floats(30, 30)
    found = plan({"a": shared, "b": shared})
    assert told(found)["b"].does == ("tied to a",) and sum(found.bytes) < 900

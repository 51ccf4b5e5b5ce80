"""Rules: what they match, which comes first, what the ledger says of them, and what they leave alone."""

import copy
import re

import numpy as np
import pytest
import torch
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet.artifact import load
from tersenet.draft import Draft, artifact_of
from tersenet.methods.kmeans import KMeans
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Packed, Sliced, Sparse, unpack
from tersenet.packed import Uniform as UniformNode
from tersenet.promise import compress
from tersenet.run import run
from tersenet.stages.channels import Channels, DropDead
from tersenet.stages.finetune import Finetune
from tersenet.stages.layerwise import Layerwise
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune
from tersenet.stages.waterfill import Waterfill
from tersenet.where import Where, chosen, kept


@pytest.fixture(scope="module")
def task():
    return make_task()


class Mixed(nn.Module):
    """A layer of each kind, a tied pair, a parameter of its own, a parametrization."""

    def __init__(self):
        super().__init__()
        self.table, self.cell = nn.Embedding(40, 8), nn.LSTM(8, 8)
        self.conv, self.up = nn.Conv2d(1, 4, 3), nn.ConvTranspose1d(4, 4, 2)
        self.mix, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 40, bias=False)
        self.head.weight = self.table.weight
        self.turned = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.own = nn.Parameter(torch.randn(3, 8))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return Draft.of_model(Mixed())


def matched(draft, *rules):
    return {name: what for name, (_, what) in chosen(draft, rules).items()}


def test_kinds_are_those_of_the_layers_that_own_the_weights(mixed):
    kinds = ["embedding", "recurrent", "conv2d", "conv_transpose1d", "attention", "linear"]
    found = {kind: set(matched(mixed, (Where(kind=kind), 0))) for kind in kinds}
    hidden = "turned.parametrizations.weight.original"
    assert found == {
        "embedding": {"table.weight"},
        "recurrent": {"cell.weight_ih_l0", "cell.weight_hh_l0"},
        "conv2d": {"conv.weight"},
        "conv_transpose1d": {"up.weight"},
        "attention": {"mix.in_proj_weight"},
        "linear": {"mix.out_proj.weight", "table.weight", "own", f"{hidden}0", f"{hidden}1"},
    }


def test_arrays_alone_go_by_their_axes():
    shapes = {"a": (4, 4), "b": (4, 4, 3), "c": (4, 4, 3, 3), "d": (2, 2, 2, 2, 2)}
    draft = Draft.of_arrays({name: np.ones(shape, np.float32) * 0.5 for name, shape in shapes.items()})
    for name, kind in zip("abcd", ("linear", "conv1d", "conv2d", "conv3d"), strict=True):
        assert set(matched(draft, (Where(kind=kind), 0))) == {name}
    assert set(matched(draft, (Where(kind="conv*"), 0))) == set("bcd")


def test_exact_names_come_first_then_rules_in_their_order(mixed):
    rules = (("c*", "pattern"), ("*", "rest"), (Where("conv.weight"), "exact"))
    found = matched(mixed, *rules)
    assert found["conv.weight"] == "exact" and found["cell.weight_ih_l0"] == "pattern" and found["own"] == "rest"
    assert matched(mixed, ("head.weight", 1)) == {"table.weight": 1}  # tied: either name will do


def test_the_least_number_of_weights_counts(mixed):
    assert set(matched(mixed, (Where("c*", least=200), 0))) == {"cell.weight_ih_l0", "cell.weight_hh_l0"}


def test_a_rule_has_a_text_which_is_read_back_and_names_may_look_like_patterns():
    for where in (Where("a*"), Where(kind="conv*"), Where("a*", "linear", 10), Where(), Where(least=3)):
        assert Where.of(str(where)) == where
    draft = Draft.of_arrays({"w[0]": np.ones((3, 4), np.float32) * 0.5, "w0": np.ones((3, 4), np.float32) * 0.3})
    assert matched(draft, ("w[0]", 1), ("w?", 2)) == {"w[0]": 1, "w0": 2}
    with pytest.raises(ValueError, match="no kind 'conv9'; there are linear"):
        Where(kind="conv9")
    with pytest.raises(ValueError, match="least is a number"):
        Where.of("a* least:many")


def test_a_rule_that_decides_about_nothing_is_an_error_with_the_names(mixed):
    with pytest.raises(
        ValueError, match=r"the rule 'heads\*' decides about no weight; there are own, table.weight,"
    ) as e:
        chosen(mixed, (("conv*", 1), ("heads*", 2)))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"'conv.weight' decides about no weight"):  # the first took it
        chosen(mixed, (("conv.weight", 1), ("conv.weight", 2)))
    with pytest.raises(ValueError, match="'tail' decides about no weight"):
        kept(mixed, ["tail"])


@pytest.mark.parametrize("rule", ["", " ", "conv* last*", "conv* kind:linear last*"])
def test_a_rule_is_one_pattern(mixed, rule):  # of two the last would win, and nothing would match everything
    with pytest.raises(ValueError, match=f"the rule {re.escape(repr(rule))}: write one pattern"):
        kept(mixed, [rule])


def test_packing_by_rules_is_told_in_the_ledger(task, tmp_path):
    recipe = (Pack(None, rules=((Where("last*", least=100), KMeans(4)), ("first.weight", None))),)
    result = compress(task, recipe, folder=tmp_path)
    for file in (result.artifact, compress(task, recipe, folder=tmp_path).artifact):  # the second from what was kept
        opened = load(file.to_bytes())
        notes = {row.name: row.note for row in opened.ledger()}
        assert isinstance(opened["last.weight"], Codebook) and notes["last.weight"] == "by the rule 'last* least:100'"
        assert notes["first.weight"] == "dense: left out by the recipe"
        assert notes["conv.weight"] == "dense: no stage packed it"
        assert opened.meta["rules"] == {"last.weight": "last* least:100"}
    assert "rules" not in artifact_of(Pack(KMeans(4))(Draft.of_model(task.model), task)).meta


def test_what_a_rule_packs_is_decided_whatever_the_recipe_does(task, tmp_path):
    rules = (("first.weight", KMeans(2)),)
    alone = Pack(None, rules)(Draft.of_model(task.model), task).tensors["first.weight"]
    recipe = tn.papers.deep_compression(0.2, 3, rounds=1)
    for _ in range(2):  # made, and taken up from what was kept
        result = compress(task, recipe, rules=rules, folder=tmp_path)
        assert np.array_equal(result.artifact.tensors["first.weight"].unpack(), alone.unpack())
        assert isinstance(result.artifact["conv.weight"], Sparse)
        assert "by the rule 'first.weight'" in str(result.artifact)
    assert result.rows[-1]["kept"]


def test_the_rule_that_pruned_a_weight_is_told(task):
    draft = Prune(0.3, 1, retrain="none", rules=(("conv*", 0.5), ("last*", 1.0)))(Draft.of_model(task.model), task)
    notes = {row.name: row.note for row in artifact_of(draft).ledger()}
    assert notes["conv.weight"] == "by the rule 'conv*'" and notes["first.weight"] == ""
    with pytest.raises(ValueError, match=r"density in \(0, 1\]"):
        Prune(rules=(("conv*", 0.0),))


KEEP = ["conv.*", "second.weight", "last.bias", "norm.*"]
STAGES = [
    Prune(0.3, 1, 1),
    OBS(0.5, samples=64),
    Pack(KMeans(3)),
    Finetune(1),
    Narrow(),
    Waterfill(0.01, samples=64),
    Layerwise(KMeans(3), samples=64),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_what_is_kept_stays_as_it_is_whatever_the_stage(task, stage):
    before = kept(Draft.of_model(copy.deepcopy(task.model)), KEEP)
    names = ["conv.weight", "first.weight", "second.weight", "last.bias", "norm.weight", "norm.bias"]
    assert before.weights() == ["last.weight"] and sorted(before.left) == sorted(names)
    after = load(artifact_of(stage(before, task)).to_bytes())
    for name in names:
        assert np.array_equal(after.unpack()[name], unpack(before.tensors[name].tree)), name
    assert not np.array_equal(after.unpack()["last.weight"], unpack(before.tensors["last.weight"].tree))
    notes = {row.name: row.note for row in after.ledger()}
    assert notes["conv.weight"] == "dense: kept by the rule 'conv.*'"
    assert notes["first.weight"] == "dense: kept by the rule 'second.weight'"
    assert notes["last.bias"] == "dense: kept by the rule 'last.bias'"


def test_one_pattern_alone_is_kept_as_a_list_of_one_is(task):
    draft = Draft.of_model(task.model)
    for pattern in ("last.*", tn.Where("last.*")):
        assert (
            kept(draft, pattern).left
            == kept(draft, [pattern]).left
            == dict.fromkeys(("last.weight", "last.bias"), "last.*")
        )


def test_channels_of_what_is_kept_stay():
    torch.manual_seed(0)
    layers = [
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    ]
    task = tn.Task(nn.Sequential(*layers), (torch.randn(200, 12), torch.randint(0, 3, (200,))))
    before = kept(Draft.of_model(task.model), ["2.*", "6.bias"])
    for stage, start in ((Channels(0.8), before), (DropDead(), Prune(0.05, 1, retrain="none")(before, task))):
        after = stage(start, task)
        shapes = {name: np.count_nonzero(unpack(after.tensors[name].tree).any(1)) for name in ("0.weight", "4.weight")}
        assert shapes["0.weight"] == np.count_nonzero(unpack(start.tensors["0.weight"].tree).any(1))
        assert isinstance(after.tensors["4.weight"].tree, Sliced)
        for name in ("2.weight", "2.bias", "6.bias"):
            assert np.array_equal(unpack(after.tensors[name].tree), unpack(before.tensors[name].tree))
            assert after.tensors[name].note == "dense: kept by a rule"


def test_keeping_goes_through_a_run_that_was_stopped(task, tmp_path):
    draft = kept(Draft.of_model(copy.deepcopy(task.model)), KEEP)
    recipe = (Prune(0.3, 1, 1), Pack(KMeans(3), rules=(("last*", Uniform(4)),)))
    whole = artifact_of(run(draft, task, recipe, tmp_path, lambda _: None)).to_bytes()
    again = run(draft, task, recipe, tmp_path, lambda _: None)
    assert artifact_of(again).to_bytes() == whole
    tree = again.tensors["last.weight"].tree
    assert isinstance(tree, Sparse) and isinstance(tree.values, UniformNode)


def test_rules_that_fit_no_weight_are_for_biases_and_norms(task):
    draft = Draft.of_model(task.model)
    rules = (("*.bias", Uniform(6)), (Where(kind="norm"), Uniform(8)), ("conv*", KMeans(3)), ("last.bias", None))
    packed = Pack(None, rules=rules)(draft, task)
    kinds = {name: type(tensor.tree).__name__ for name, tensor in packed.tensors.items()}
    assert kinds["conv.weight"] == "Codebook" and kinds["first.bias"] == kinds["norm.weight"] == "Uniform"
    assert kinds["norm.running_mean"] == kinds["first.weight"] == kinds["last.bias"] == "ndarray"
    assert packed.rules["norm.weight"] == "kind:norm" and packed.rules["first.bias"] == "*.bias"
    assert packed.tensors["last.bias"].note == "dense: left out by the recipe"
    step = packed.tensors["first.bias"].tree.scale
    before = np.asarray(draft.tensors["first.bias"].tree)
    assert 0 < np.abs(unpack(packed.tensors["first.bias"].tree) - before).max() <= step * 0.51
    assert artifact_of(packed).nbytes < artifact_of(Pack(None, rules=rules[2:3])(draft, task)).nbytes
    for names in (("*.weight", "conv.*"), ("*",)):  # these fit weights, so that they leave vectors alone
        packed = Pack(None, rules=tuple((name, Uniform(4)) for name in names[::-1]))(draft, task)
        assert not any(isinstance(t.tree, Packed) for t in packed.tensors.values() if len(t.tree.shape) < 2)
    with pytest.raises(ValueError, match=r"'\*.gain' decides about no weight; there are conv.weight"):
        Pack(rules=(("*.gain", None),))(draft, task)
    with pytest.raises(ValueError, match="decides about no weight"):
        Prune(0.5, 1, retrain="none", rules=(("*.bias", 0.5),))(draft, task)
    with pytest.raises(ValueError, match=r"first.bias: .* which a vector has none of"):
        Pack(None, rules=(("first.bias", KMeans(2, weighted=True)),))(draft, task)


def test_packed_vectors_are_narrowed_trained_and_packed_by_layers_as_weights_are(task):
    rules = (("*.bias", Uniform(4)),)
    for first in (Pack(KMeans(4), rules=rules), Layerwise(KMeans(4), rules=rules)):
        draft = first(Draft.of_model(task.model), task)
        held = draft.tensors["first.bias"].tree
        assert isinstance(held, UniformNode)
        tuned = Narrow()(Finetune(1)(draft, task), None)
        after = tuned.tensors["first.bias"].tree
        assert np.array_equal(after.q, held.q) and after.scale != held.scale
        opened = load(artifact_of(tuned).to_bytes())
        assert np.array_equal(opened["first.bias"].unpack(), after.unpack())


def test_a_step_that_half_precision_has_not_stays_as_it_is():
    w = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32) * np.float32(1e-7)
    for values in (w, w[0]):
        tree = Uniform(8).pack(values)
        draft = Draft.of_arrays({"w": values}).with_trees({"w": tree})
        after = unpack(Narrow()(draft, None).tensors["w"].tree)
        assert np.abs(after - values).max() < 0.01 * np.abs(values).max()
    large = Draft.of_arrays({"w": w}).with_trees({"w": Uniform(8).pack(w * 1e12)})
    with pytest.raises(ValueError, match="too large"):
        Narrow()(large.with_trees({"w": UniformNode(np.ones((20, 30), np.int8), np.array(1e6, np.float32))}), None)

"""Budgets are met by good files: any size, any scale of the outputs, any network of odd weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.artifact import Artifact, Tensor, load
from tersenet.budget import PromiseBroken
from tersenet.codecs import FormatError
from tersenet.draft import Draft, precise
from tersenet.promise import verify
from tersenet.stages.prune import Prune
from tersenet.stages.waterfill import Waterfill
from tersenet.waterfilling.lossless import lossless


def error(artifact, state):
    dense = artifact.unpack()
    lost = sum(float(np.square(dense[n].astype(np.float64) - state[n]).sum()) for n in state)
    return lost / sum(float(np.square(state[n].astype(np.float64)).sum()) for n in state)


def test_more_bytes_never_make_a_worse_file_up_to_one_without_loss():
    rng = np.random.default_rng(0)
    state = {"a": rng.normal(size=(96, 96)).astype(np.float32), "b": rng.normal(size=(40, 64)).astype(np.float32)}
    weights, last = 4 * sum(w.size for w in state.values()), np.inf
    for ratio in (50, 20, 8, 4, 3, 2, 1.5, 1.2, 1.0, 0.5):
        artifact = tn.compress(state, budget=tn.Budget(ratio=ratio)).artifact
        now = error(load(artifact.to_bytes()), state)
        assert artifact.nbytes <= weights / ratio and now <= max(last, 1e-11)  # levels of 22 bits leave about so much
        last = now
    assert last == 0


@pytest.mark.parametrize("size", [5_800, 12_000, 30_000])
def test_a_ternary_matrix_is_held_exactly_where_that_fits(size):
    w = (np.random.default_rng(0).integers(-1, 2, (160, 160)) * 0.05).astype(np.float32)
    artifact = tn.compress({"w": w}, budget=tn.Budget(size=size)).artifact
    assert np.array_equal(artifact.unpack()["w"], w) and artifact.nbytes < 5_600


def test_what_weights_are_is_looked_at_first():
    rng = np.random.default_rng(1)
    dense = rng.normal(size=(64, 64)).astype(np.float32)
    kinds = {
        "constant": (np.full((64, 64), 0.3, np.float32), 0.02),
        "sparse": (dense * (rng.random(dense.shape) < 0.1), 0.2),
        "equal rows": (np.repeat(dense[:1], 64, 0), 0.05),
        "bits": (np.rint(dense * 3).clip(-7, 7).astype(np.float32) / 3, 0.14),
        "dense": (dense, 1.0),
    }
    for name, (w, share) in kinds.items():
        kept = lossless({name: Tensor(w)})[name]
        assert kept.bits <= share * 32 * w.size, name
        assert np.array_equal(Tensor(kept.tree).unpack(), w), name


def test_small_tensors_and_vectors_alone_are_compressed_too():
    rng = np.random.default_rng(2)
    for state in (
        {f"layer.{k}.weight": rng.normal(size=(8, 8)).astype(np.float32) for k in range(200)},
        {f"layer.{k}.bias": rng.normal(size=300).astype(np.float32) for k in range(20)},
    ):
        assert error(tn.compress(state, budget=tn.Budget(ratio=8)).artifact, state) < 0.03


def test_values_that_half_precision_cannot_hold_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(3)
    state = {
        "w": rng.normal(size=(64, 64)).astype(np.float32),
        "bn.weight": np.float32([1e5, 1.0, 1e-9]),
        "bn.running_var": np.float32([1e5, 1e-9, 1.0]),
        "counts": np.float32([1e6, 3.0]),
        "fine": np.float32([0.1, -0.7]),
    }
    tn.compress(state, budget=tn.Budget(ratio=8)).artifact.save(tmp_path / "f.terse")
    found = load(tmp_path / "f.terse")
    for name in ("bn.weight", "bn.running_var", "counts"):
        assert np.array_equal(found.unpack()[name], state[name])
    assert 0 < found.tensors["fine"].error < 2.0**-11
    assert verify(tmp_path / "f.terse", state)["errors"]["fine"] == pytest.approx(found.tensors["fine"].error, rel=1e-2)
    assert np.array_equal(precise(state["fine"]), state["fine"].astype(np.float16).astype(np.float32))


def test_a_drop_does_not_depend_on_the_scale_of_the_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 6))
    x, sizes = torch.randn(600, 12), []

    def unexplained(outputs, targets):
        return (outputs - targets).square().mean() / targets.square().mean()

    for scale in (1.0, 100.0, 1e4):
        own = copy.deepcopy(net)
        own[2].weight.data *= scale
        own[2].bias.data *= scale
        y = own(x).detach()
        task = tn.Task(own, (x, y), (x, y), loss=nn.MSELoss(), metric=tn.Metric(unexplained, "split", "less"))
        result = tn.compress(task, budget=tn.Budget(drop=0.5))
        assert result.choice.after <= 0.005 and result.after < 0.01
        sizes.append(result.artifact.nbytes)
    assert max(sizes) < 1.1 * min(sizes)  # it doubled once


def test_a_drop_of_nothing_is_met_and_says_what_it_was_kept_on():
    torch.manual_seed(1)
    x = torch.randn(400, 10)
    task = tn.Task(nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3)), (x, x[:, :3].argmax(1))).trained()
    result = tn.compress(task, budget=tn.Budget(drop=0))
    assert result.choice.samples == 40 and result.choice.after >= result.choice.before
    assert "on the 40 samples held back for choosing" in str(result)
    assert next(r["likelihood"] for r in result.rows if "likelihood" in r) == "classes along axis 1, told by the loss"


def test_a_drop_that_an_earlier_stage_has_spent_is_a_broken_promise():
    torch.manual_seed(1)
    x = torch.randn(400, 10)
    task = tn.Task(nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3)), (x, x[:, :3].argmax(1))).trained()
    with pytest.raises(PromiseBroken, match="on the data for choosing, the budget allows 1 points"):
        tn.compress(task, (Prune(0.02, 1, retrain="none"), Waterfill()), tn.Budget(drop=1))


@pytest.mark.parametrize("huge", [1e3, 1e6, 1e30])
def test_one_huge_weight_spoils_neither_its_layer_nor_the_others(huge):
    rng = np.random.default_rng(4)
    state = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in ("w", "v")}
    state["w"][3, 5] = huge
    found = load(tn.compress(state, budget=tn.Budget(ratio=6)).artifact.to_bytes()).unpack()
    assert found["w"][3, 5] == pytest.approx(huge, rel=1e-2)
    assert error_of(found["v"], state["v"]) < 0.06
    assert huge > 1e9 or error_of(found["w"][4:], state["w"][4:]) < 0.15


def error_of(array, original):
    return np.linalg.norm(array - original) / np.linalg.norm(original)


def test_weights_at_the_end_of_what_float32_holds_do_not_become_infinite():
    rng = np.random.default_rng(5)
    w, v = rng.normal(size=(32, 32)).astype(np.float32), rng.normal(size=(200, 200)).astype(np.float32)
    w *= np.float32(3.4e38) / np.abs(w).max()
    found = tn.compress({"w": w, "v": v}, budget=tn.Budget(ratio=3)).artifact.unpack()
    assert np.array_equal(found["w"], w) and error_of(found["v"], v) < 0.01


@pytest.mark.parametrize("size", range(820, 1100, 60))
def test_small_sizes_are_kept_to_the_byte(size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    assert tn.compress(net.state_dict(), budget=tn.Budget(size=size)).artifact.nbytes <= size


def test_what_cannot_be_met_for_buffers_says_so():
    net = nn.Sequential(nn.Linear(16, 64), nn.utils.parametrizations.orthogonal(nn.Linear(64, 64)), nn.Linear(64, 4))
    task = tn.Task(net, (torch.randn(60, 16), torch.randint(0, 4, (60,))))
    with pytest.raises(ValueError, match="16,384 bytes of it are buffers and what"):
        tn.compress(task, budget=tn.Budget(ratio=8))


def test_extra_state_of_a_state_dict_is_left_out(tmp_path):
    state = {"w": torch.randn(64, 64), "layer._extra_state": {"step": 3}}
    tn.compress(state, budget=tn.Budget(ratio=6)).artifact.save(tmp_path / "f.terse")
    assert set(verify(tmp_path / "f.terse", state)["errors"]) == {"w"}


def test_verifying_a_file_leaves_the_tasks_model_as_it_was(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(60, 16), torch.randint(0, 4, (60,))
    one, other = (nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)) for _ in range(2))
    task = tn.Task(one, test=data)
    Artifact(dict(Draft.of_model(other).tensors)).save(tmp_path / "f.terse")
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    found = verify(tmp_path / "f.terse", task=task)
    assert found["metric"] == task.score(data, load(tmp_path / "f.terse").into(copy.deepcopy(task.model)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert task.model.training


def test_a_file_that_claims_no_number_as_its_metric_is_no_promise_kept(tmp_path):
    task = tn.Task(nn.Linear(16, 4), test=(torch.randn(60, 16), torch.randint(0, 4, (60,))))
    Artifact(dict(Draft.of_model(task.model).tensors), meta={"metric": float("nan")}).save(tmp_path / "f.terse")
    with pytest.raises(PromiseBroken, match="the file says nan"):
        verify(tmp_path / "f.terse", task=task)
    Artifact(dict(Draft.of_model(task.model).tensors), meta={"metric": "good"}).save(tmp_path / "f.terse")
    with pytest.raises(FormatError, match="the file's metric is no number: 'good'"):
        verify(tmp_path / "f.terse", task=task)

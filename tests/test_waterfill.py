"""Output-aware quantization: its moments, its allocator and its budgets."""

import copy
import itertools
import weakref
from dataclasses import fields, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import floats
from test_stages import Net, make_task
from torch import nn

import tersenet as tn
from tersenet.allocators.lagrange import Lagrange, Option, step_within
from tersenet.artifact import Artifact, load, relative_error
from tersenet.budget import Budget, PromiseBroken
from tersenet.calibrate import moments
from tersenet.draft import QUICK, Draft, artifact_of
from tersenet.folding import folded
from tersenet.likelihood import Likelihood
from tersenet.methods.shrinkage import shrunk
from tersenet.methods.transform import KernelDCT
from tersenet.packed import Packed, Transformed, Uniform, unpack
from tersenet.promise import compress, output_errors
from tersenet.stages.prune import Prune
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.layers import Waterfilling, rounded
from tersenet.waterfilling.search import Search, to_size
from tersenet.waterfilling.sensitivity import with_sensitivities


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def knowledge(task):
    own = replace(task, model=copy.deepcopy(task.model))
    return Knowledge.of(Draft.of_model(own.model), own, 256)


def test_moments_are_the_same_at_any_number_of_threads(task, monkeypatch):
    found = []
    for cores in (1, 2):
        monkeypatch.setattr("tersenet.cores.usable", lambda cores=cores: cores)
        torch.set_num_threads(cores)
        found.append(moments(task, task.model, task.calibration(100), Likelihood.of(task)))
    for name, one in found[0].items():
        two = found[1][name]
        assert torch.equal(one.inputs, two.inputs) and torch.equal(one.outputs, two.outputs)
    assert set(found[0]) == {"conv.weight", "first.weight", "last.weight"}  # the second is the first, used again


def test_every_fifth_batch_is_held_back_from_the_moments(task):
    """What errors cost is seen on inputs that no level was chosen by."""
    held = Knowledge.of(Draft.of_model(task.model), task, 60).held
    batches = task.calibration(60, 6)
    assert len(held) == 2 and all(torch.equal(one, batches[k]) for one, k in zip(held, (4, 9), strict=True))
    seen = [part for k, part in enumerate(batches) if k % 5 != 4]
    halves = [moments(task, task.model, seen[k::2], Likelihood.of(task), 16, k * len(seen)) for k in (0, 1)]
    for name, found in Knowledge.of(Draft.of_model(task.model), task, 60).found.items():
        if name != "conv.weight":  # which is folded
            for one, other in zip(found, halves, strict=True):
                assert torch.allclose(one.inputs, other[name].inputs, rtol=1e-3, atol=1e-6)


class Tagger(nn.Module):
    """Tokens through a tied embedding, attention and a recurrent layer: weights that no linear layer holds."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.attend, self.rnn = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 16, batch_first=True)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(self.rnn(x)[0]).movedim(-1, 1)


def test_recurrent_and_attention_weights_have_moments_and_are_quantized_by_them():
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (120, 12))
    task = tn.Task(Tagger(), (tokens, tokens.roll(1, 1)))
    knowledge = Knowledge.of(Draft.of_model(task.model), task)
    free = {"attend.in_proj_weight", "attend.out_proj.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert free | {"embed.weight"} == set(knowledge.found)
    assert knowledge.biases["attend.in_proj_weight"] == "attend.in_proj_bias"
    assert knowledge.biases["rnn.weight_hh_l0"] == "rnn.bias_hh_l0" and "embed.weight" not in knowledge.biases
    for name in free:
        known, _ = knowledge.found[name]
        assert torch.linalg.eigvalsh(known.inputs).min() > -1e-6 and known.outputs.diagonal(dim1=2, dim2=3).min() > 0
        assert known.outputs.shape[2:] == (len(task.model.get_parameter(name)),) * 2
    assert knowledge.found["embed.weight"][0].outputs.shape == (1, 40, 1, 1)  # looked up, and so by token
    assert all(layer.metric.inputs is not None for layer in Waterfilling.of(knowledge).layers)
    draft = to_size(knowledge, 4_000)
    assert artifact_of(draft).nbytes <= 4_000


def test_moments_are_shrunk_as_far_as_their_halves_disagree():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, dtype=torch.double, generator=generator) * torch.logspace(
        0, -1, 24, dtype=torch.double
    )
    true = mixing @ mixing.T
    for samples in (6, 20, 2000):
        u = torch.randn(2, samples, 24, dtype=torch.double, generator=generator) @ mixing.T
        one, other = u.transpose(1, 2) @ u / samples
        found, plain = shrunk(one[None], other[None])[0], (one + other) / 2
        assert (found - true).norm() < 1.001 * (plain - true).norm()
        assert samples < 50 or torch.allclose(found, plain, atol=0.05 * float(true.max()))
        assert torch.linalg.eigvalsh(found).min() > 0
    assert torch.allclose(shrunk(true[None], true[None])[0], true)
    unequal = torch.diag(torch.arange(1.0, 5, dtype=torch.double))
    assert torch.allclose(shrunk(2 * unequal[None], 0 * unequal[None])[0], torch.eye(4, dtype=torch.double) * 2.5)


def test_constants_of_folded_norms_take_no_bytes_of_their_own():
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))])
    x = torch.randn(20, 32, 12, 12)
    model(x)  # now the norms have seen something
    task = tn.Task(model.eval(), (x, torch.zeros(20)), loss=torch.nn.functional.mse_loss)
    draft, biases = folded(Draft.of_model(model), task, [x[:8]])
    assert biases["2.weight"] == "3.bias"  # and not its own, which the norm's takes up
    assert torch.allclose(draft.module().eval()(x), model(x), atol=1e-4)
    rows = {row.name: row for row in artifact_of(draft).ledger()}
    assert rows["1.running_var"].total < 24  # 128 as floats
    assert [rows[f"{k}.{part}"].kind for k in (3, 5) for part in ("weight", "num_batches_tracked")] == ["tied"] * 4
    assert rows["2.bias"].kind == "tied"  # to the means and the first bias, all zero


def test_what_was_pruned_stays_zero(task):
    pruned = Prune(0.3, 1, retrain="none")(Draft.of_model(copy.deepcopy(task.model)), task)
    quantized = Waterfilling.of(Knowledge.of(pruned, task)).at(0.003)
    for name in pruned.weights():
        mask, q = pruned.tensors[name].tree.mask, quantized.tensors[name].tree.q
        assert q[mask].any() and not q[~mask].any()


def test_the_kernel_transform_keeps_squared_errors():
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    tree = KernelDCT().pack(w)
    assert isinstance(tree, Transformed)
    assert np.square(tree.coefficients).sum() == pytest.approx(np.square(w).sum(), rel=1e-5)
    assert np.allclose(unpack(tree), w, atol=1e-5)
    assert KernelDCT().pack(w[:, :, :1, :1]).shape == (4, 3, 1, 1)


def test_folding_keeps_the_outputs_and_the_norms_become_constants(task):
    x = task.test[0][:50]
    before = task.model.eval()(x)
    draft, biases = folded(Draft.of_model(copy.deepcopy(task.model)), task, [x[:8]])
    after = load(artifact_of(draft).to_bytes()).into(Net()).eval()(x)
    assert torch.allclose(before, after, atol=1e-4)
    assert biases == {"conv.weight": "norm.bias"}
    assert (unpack(draft.tensors["norm.weight"].tree) == 1).all()


def test_a_finer_step_errs_less_and_takes_more(knowledge, task):
    waterfilling = Waterfilling.of(knowledge)
    sizes, errors = [], []
    for c in (0.02, 0.005, 0.001):
        artifact = artifact_of(waterfilling.at(c), original=waterfilling.draft.tensors)
        sizes.append(artifact.nbytes)
        errors.append(artifact.tensors["first.weight"].error)
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_a_size_is_met_exactly_from_below_and_nearly_used_up(task):
    for size in (4_000, 9_000):
        result = compress(task, budget=Budget(size=size))
        assert 0.97 * size <= result.artifact.nbytes <= size
        again = load(result.artifact.to_bytes())
        assert result.after == task.score(task.test, again.into(Net()))
        assert again.meta["metric"] == round(result.after, 6)
    with pytest.raises(ValueError, match="cannot be met"):
        compress(task, budget=Budget(size=300))


def test_a_drop_is_met_on_the_data_for_choosing(task):
    result = compress(task, budget=Budget(drop=1.0))
    model = load(result.artifact.to_bytes()).into(Net())
    assert task.score(task.held(), model) >= task.score(task.held()) - 0.01
    assert result.artifact.nbytes < 0.2 * 4 * 19_000


def test_weighing_makes_up_for_moments_that_overrate_a_layer(knowledge, task):
    """What a layer's errors cost is seen at the outputs, so it does not matter what moments say of all of it."""
    right = with_sensitivities(knowledge, Waterfilling.of(knowledge), 0.002).sensitivity
    assert set(right) == {layer.name for layer in Waterfilling.of(knowledge).layers}
    overrated = tuple(replace(half, outputs=8 * half.outputs) for half in knowledge.found["last.weight"])
    other = replace(knowledge, found={**knowledge.found, "last.weight": overrated})
    wrong = with_sensitivities(other, Waterfilling.of(other), 0.002).sensitivity
    ratios = {name: right[name] / wrong[name] for name in right}
    assert 4 < ratios["last.weight"] / ratios["conv.weight"] < 16


def test_output_errors_are_those_of_the_layers_outputs(task):
    fine, coarse = (compress(task, budget=Budget(size=size)).artifact for size in (12_000, 5_000))
    errors = [output_errors(artifact, task) for artifact in (fine, coarse)]
    assert set(errors[0]) == {"conv.weight", "first.weight", "last.weight"}
    assert all(0 < errors[0][name] < errors[1][name] < 1 for name in errors[0])
    assert max(output_errors(Artifact(dict(Draft.of_model(task.model).tensors)), task).values()) == 0


def test_arrays_alone_are_quantized_to_a_ratio():
    rng = np.random.default_rng(0)
    state = {f"{i}.weight": (rng.normal(size=(90, 80)) * 10.0**-i).astype(np.float32) for i in range(3)}
    state["0.bias"] = rng.normal(size=80).astype(np.float32)
    result = compress(state, budget=Budget(ratio=8))
    assert 7.9 < 4 * (3 * 7200 + 80) / result.artifact.nbytes < 8.4
    errors = [t.error for t in result.artifact.tensors.values() if t.error is not None]
    assert max(errors) < 0.2
    with pytest.raises((ValueError, PromiseBroken)):
        compress(state, budget=Budget(drop=1.0))


def test_the_same_network_makes_the_same_file_at_any_number_of_threads(task, monkeypatch):
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        monkeypatch.setattr("tersenet.cores.usable", lambda threads=threads: threads)
        own = replace(task, model=copy.deepcopy(task.model))
        draft = to_size(Knowledge.of(Draft.of_model(own.model), own, 200), 8_000)
        found.add(artifact_of(draft).to_bytes())
    assert len(found) == 1


def test_a_ratio_is_to_the_weights_that_were_given_though_folding_ties_the_norms():
    torch.manual_seed(0)
    blocks = [m for _ in range(5) for m in (nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.Flatten(), nn.Linear(16 * 36, 4))
    x, y = torch.randn(120, 3, 8, 8), torch.randint(0, 4, (120,))
    result = compress(tn.Task(net, (x, y)), budget=Budget(ratio=9))
    given = sum(t.numel() for t in net.state_dict().values())
    assert 0.97 * 4 * given / 9 <= result.artifact.nbytes <= 4 * given / 9


def test_the_allocator_keeps_the_budget_and_equals_brute_force_on_four_tensors():
    rng = np.random.default_rng(3)
    for _ in range(20):
        options = {}
        for name in "abcd":
            bits = np.sort(rng.choice(np.arange(10, 200), 4, replace=False))
            slopes = np.sort(rng.random(3))[::-1]
            losses = 10 - np.concatenate([[0], np.cumsum(slopes * np.diff(bits) / 50)])
            options[name] = [Option(int(b), float(v)) for b, v in zip(bits, losses, strict=True)]
        least, most = (sum(pick(o.bits for o in os) for os in options.values()) for pick in (min, max))
        for budget in np.linspace(least, most, 5):
            chosen = Lagrange().allocate(options, budget)
            total = [sum(getattr(options[n][i], f) for n, i in chosen.items()) for f in ("bits", "loss")]
            best = min(
                sum(options[n][i].loss for n, i in zip("abcd", picks, strict=True))
                for picks in itertools.product(range(4), repeat=4)
                if sum(options[n][i].bits for n, i in zip("abcd", picks, strict=True)) <= budget
            )
            assert total[0] <= budget and total[1] == pytest.approx(best)
            few = Lagrange(frontier=8).allocate(options, budget)
            assert sum(options[n][i].bits for n, i in few.items()) <= budget
    with pytest.raises(ValueError, match="cannot be met"):
        Lagrange().allocate({"a": [Option(10, 1.0)]}, 5)


def test_the_search_for_a_step_ends_below_the_budget():
    for most in (500, 5_000, 50_000):
        sizes = []

        def size_at(c, sizes=sizes):
            sizes.append(int(8_000 * max(0.1, 3 - np.log(c))))
            return sizes[-1]

        if most < 800:
            with pytest.raises(ValueError, match="cannot be met"):
                step_within(size_at, most, 0.01)
        else:
            c = step_within(size_at, most, 0.01)
            assert 0.985 * most <= size_at(c) <= most and len(sizes) < 10
    for edge in (0.012, 0.3):  # sizes that hardly move and then jump
        c = step_within(lambda c, edge=edge: 4_071 - int(10 * c) if c < edge else 3_900, 4_000, 0.01)
        assert edge <= c < 1.5 * edge
    tried = []
    c = step_within(lambda c: tried.append(c) or 3_000 - int(10 * c), 4_000, 0.01, finest=0.005)
    assert c == pytest.approx(0.005) and len(set(tried)) == len(tried) < 8


def test_a_size_that_no_levels_fill_is_not_searched_at_ever_finer_steps():
    rng = np.random.default_rng(2)
    w, v = rng.normal(size=(96, 64)).astype(np.float32), rng.normal(0, 1e-6, (64, 64, 3, 3)).astype(np.float32)
    plain = Waterfilling.of(Knowledge.of(Draft.of_arrays({"w": w, "v": v}), None), aware=False)
    search = Search(140_000, QUICK)
    draft, size = search.finest(plain, 0.0, "all")
    assert len(search.tried) < 8 and 100_000 < size < 0.985 * 140_000
    assert relative_error(unpack(draft.tensors["w"].tree), w) < 1e-5
    assert relative_error(unpack(draft.tensors["v"].tree), v) < 1e-5


def test_without_a_recipe_the_command_quantizes(tmp_path):
    from test_cli import terse

    np.savez(tmp_path / "net.npz", w=np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32))
    terse("compress", tmp_path / "net.npz", "--ratio", 8, "-o", tmp_path / "n.terse")
    assert 4800 < (tmp_path / "n.terse").stat().st_size <= 5000
    assert isinstance(tn.load(tmp_path / "n.terse")["w"].q, np.ndarray)


def test_fine_steps_keep_their_levels():
    values = np.linspace(-1, 1, 9)
    tree = rounded(values, 1e-5)
    assert isinstance(tree, Uniform) and np.abs(tree.unpack() - values).max() <= 0.51e-5


def test_the_search_for_a_size_holds_one_draft_beside_the_one_it_makes():
    class Counted(Waterfilling):
        made: ClassVar = []
        most = 0

        def at(self, c, rate=0.5):
            found = super().at(c, rate)
            Counted.made.append(weakref.ref(found))
            Counted.most = max(Counted.most, sum(one() is not None for one in Counted.made))
            return found

    draft = Draft.of_arrays({f"w{k}": floats(40, 60, seed=k) for k in range(3)})
    plain = Waterfilling.of(Knowledge.of(draft, None), aware=False)
    counted = Counted(**{f.name: getattr(plain, f.name) for f in fields(plain)})
    search = Search.of(3000, QUICK, draft.journal)
    found, size = search.finest(counted, 0.0, "small", used=0.9999, tries=8)
    assert len(Counted.made) > 3 and Counted.most <= 2
    assert artifact_of(found, QUICK).nbytes <= size <= 3000
    again = artifact_of(plain.at(search.c, 0.0), QUICK)
    assert artifact_of(found, QUICK).to_bytes() == again.to_bytes()


def test_vectors_of_which_nothing_is_known_are_quantized_where_the_size_is_small_and_stay_floats_where_it_is_not():
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(64, 256)).astype(np.float32), "b": rng.normal(size=256).astype(np.float32)}
    arrays |= {"few": rng.normal(size=8).astype(np.float32), "tiny": arrays["b"] * np.float32(1e-9)}
    arrays["twin"] = arrays["tiny"]
    small, large = (tn.compress(arrays, budget=tn.Budget(size=size)).artifact for size in (5000, 30000))
    assert {n for n in arrays if isinstance(small[n], Packed)} == {"w", "b", "tiny", "twin"}
    assert {n for n in arrays if isinstance(large[n], Packed)} == {"w"}
    assert small.tensors["twin"] is small.tensors["tiny"]
    for name in ("b", "tiny"):  # as finely as weights, but for how few they are
        assert relative_error(small.unpack()[name], arrays[name]) < relative_error(small.unpack()["w"], arrays["w"]) / 8
        assert relative_error(large.unpack()[name], arrays[name]) < 2**-11


def test_vectors_stay_floats_where_moments_are_known_but_theirs_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 4, bias=False))
    nn.init.normal_(model[1].weight)
    x = torch.randn(256, 16)
    artifact = tn.compress(tn.Task(model, train=(x, (x[:, 0] > 0).long())), budget=tn.Budget(size=1400)).artifact
    assert isinstance(artifact["0.weight"], Packed) and not isinstance(artifact["1.weight"], Packed)
    assert relative_error(artifact.unpack()["1.weight"], model[1].weight.detach().numpy()) < 2**-11

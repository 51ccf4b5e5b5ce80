"""Activations in fixed point: what is calibrated, stored, measured and trained on; and training in few bits."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet import FormatError
from tersenet.activations import formats_of, into, quantized, rounded
from tersenet.artifact import Artifact, Section, load
from tersenet.draft import Draft, artifact_of
from tersenet.methods.fixed_point import FixedPoint
from tersenet.methods.kmeans import KMeans
from tersenet.packed import Sparse, Uniform, unpack
from tersenet.stages.activations import Activations
from tersenet.stages.finetune import Finetune
from tersenet.stages.low_precision import LowPrecision, stochastic
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune
from tersenet.stages.waterfill import Waterfill
from tersenet.task import duplicate


@pytest.fixture(scope="module")
def task():
    return make_task()


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 16), st.integers(-3, 12), st.integers(0, 1000))
def test_rounding_is_that_of_the_weights(bits, fraction, seed):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (bits - 1 - fraction) / 2
    last = 2 ** (bits - 1)
    levels = np.clip(np.rint(x.numpy().astype(np.float64) * 2.0**fraction), -last, last - 1)
    assert np.array_equal(rounded(x, bits, fraction).numpy(), (levels * 2.0**-fraction).astype(np.float32))


def test_the_gradient_passes_where_nothing_saturates():
    x = torch.tensor([0.3, -0.8, 5.0, -5.0], requires_grad=True)
    rounded(x, 4, 1).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_a_layer_takes_and_gives_what_its_format_says_and_the_module_itself_does_not(task):
    draft = Activations(5, samples=200)(Draft.of_model(task.model), task)
    model = quantized(task.model, draft.activations)
    seen = {}
    for name in ("conv", "first", "last"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    x = task.test[0][:50]
    with torch.no_grad():
        out, floats = model.eval()(x), task.model.eval()(x)
    for name, pair in seen.items():
        bits, *fractions = draft.activations[name]
        assert bits == 5
        for values, fraction in zip(pair, fractions, strict=True):
            levels = values * 2.0**fraction
            assert torch.equal(levels, levels.round()) and levels.min() >= -16 and levels.max() <= 15
    assert not torch.equal(out, floats) and not task.model.conv._forward_hooks


def test_ranges_are_the_largest_that_calibration_saw(task):
    draft = Activations(8, samples=100)(Draft.of_model(task.model), task)
    inputs = torch.cat(task.calibration(100))
    with torch.no_grad():
        given = task.model.eval().conv(inputs.reshape(-1, 1, 8, 8))
    for x, fraction in ((inputs, draft.activations["conv"][1]), (given, draft.activations["conv"][2])):
        top = float(x.abs().max())
        assert 2.0 ** (7 - fraction) >= top > 2.0 ** (6 - fraction)


def test_the_file_says_it_and_its_metric_is_that_of_the_rounded_network(task, tmp_path):
    recipe = (Pack(FixedPoint(8)), Activations(3), Narrow())
    result = tn.compress(task, recipe, folder=tmp_path / "kept")
    result.artifact.save(tmp_path / "w.terse")
    opened = load(tmp_path / "w.terse")
    assert formats_of(opened).keys() == {"conv", "first", "second", "last"}
    floats, few = opened.into(duplicate(task.model)), into(opened, duplicate(task.model))
    assert task.score(task.test, few) == result.after != task.score(task.test, floats)
    assert tn.verify(tmp_path / "w.terse", task=task)["metric"] == result.after
    again = tn.compress(task, recipe, folder=tmp_path / "kept")  # from what the stages kept
    assert again.artifact.to_bytes() == result.artifact.to_bytes()
    assert any(row.name == "(activations)" and row.payload > 0 for row in opened.ledger())


def test_fewer_bits_err_more_and_eight_cost_next_to_nothing(task):
    x = task.test[0]
    with torch.no_grad():
        wanted, errors = task.model.eval()(x), []
        for width in (3, 5, 8, 12):
            draft = Activations(width)(Draft.of_model(task.model), task)
            errors.append(float((quantized(task.model, draft.activations).eval()(x) - wanted).square().mean()))
    assert errors == sorted(errors, reverse=True)
    draft = Activations(8)(Draft.of_model(task.model), task)
    assert task.score(task.test, into(artifact_of(draft), duplicate(task.model))) > task.score(task.test) - 0.01


def test_training_behind_it_learns_the_rounded_network(task):
    draft = Activations(3)(Draft.of_model(task.model), task)
    tuned = Finetune(3, lr=0.02)(draft, task)
    assert tuned.activations == draft.activations
    before, after = (task.score(task.test, into(artifact_of(d), duplicate(task.model))) for d in (draft, tuned))
    assert after > before


class Parts(nn.Module):
    """An embedding and a recurrent layer, tuples between them, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.gru, self.last = nn.Embedding(10, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)
        self.turn = nn.Parameter(torch.eye(5))

    def forward(self, x):
        return self.last(input=self.gru(self.words(x))[0][:, -1] @ self.turn)


def test_what_packs_or_folds_behind_it_is_refused_before_any_work_and_in_a_draft(task):
    for later in (Pack(KMeans(3)), Waterfill(c=0.01)):
        with pytest.raises(ValueError, match=r"result of Activations: .* changes what layers give; fix act"):
            tn.compress(task, (Activations(8), later))
    fixed = Activations(8, 64)(Draft.of_model(task.model), task)
    with pytest.raises(ValueError, match="changes what layers give"):
        Pack(KMeans(3))(fixed, task)


def test_embeddings_recurrent_layers_and_keywords_are_rounded_and_what_is_not_is_named():
    torch.manual_seed(0)
    x = torch.randint(0, 10, (64, 7))
    task = tn.Task(Parts(), train=(x, x[:, 0] % 3))
    with pytest.warns(UserWarning, match=r"what these weights take and give is not rounded: turn$"):
        draft = Activations(4)(Draft.of_model(task.model), task)
    assert draft.activations.keys() == {"words", "gru", "last"}
    model, seen = quantized(task.model, draft.activations), []
    model.last.register_forward_pre_hook(lambda _, args, given: seen.append(given["input"]), with_kwargs=True)
    model(x)
    levels = seen[0] * 2.0 ** draft.activations["last"][1]
    assert torch.equal(levels, levels.round())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"conv": 3}', b'{"conv": [8, 1]}', b'{"conv": [8, 1, 1e9]}', b'{"conv": [1, 2, 3]}',
             b'{"conv": [8, true, 1]}', b'{"conv": [8, 151, 1]}', b"\xff", b"[" * 100_000],
)  # fmt: skip
def test_sections_that_say_nothing_sensible_are_refused_in_a_line(data, task):
    plain = artifact_of(Draft.of_model(task.model))
    file = load(Artifact(plain.tensors, sections={"activations": Section(data)}).to_bytes())
    with pytest.raises(FormatError) as refusal:
        into(file, duplicate(task.model))
    assert "\n" not in str(refusal.value)
    file.into(duplicate(task.model))


def test_a_layer_that_is_not_there_is_named(task):
    file = replace(artifact_of(Draft.of_model(task.model)), sections={"activations": Section(b'{"conv9": [8, 1, 1]}')})
    with pytest.raises(ValueError, match="conv9: activations of this layer are to be rounded, but the model lacks it"):
        into(file, duplicate(task.model))


def test_values_that_are_not_finite_have_no_range(task):
    broken = replace(task, model=duplicate(task.model))
    with torch.no_grad():
        broken.model.conv.weight *= 1e38
    with pytest.raises(ValueError, match=r"\w+: what it takes or gives is not finite"):
        Activations(8)(Draft.of_model(broken.model), broken)


# ------------------------------------------------------------ training in few bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_right_in_the_mean_and_leaves_what_fits(bits):
    torch.manual_seed(0)
    x = torch.tensor([1.0, -0.9, 0.3, 0.11, -0.02, 0.0])
    last = 2 ** (bits - 1)
    drawn = torch.stack([stochastic(x, bits) for _ in range(20_000)])
    levels = drawn * last  # the largest value is 1, so a step is 1 / last
    assert torch.equal(levels, levels.round()) and -last <= levels.min() and levels.max() <= last - 1
    assert (drawn - x).abs().max() <= 1 / last
    error = (drawn[:, 1:].mean(0) - x[1:]).abs().max()  # the first saturates
    assert error < 5 / last * 0.5 / 20_000**0.5
    kept = torch.arange(-last, last - 1).float() / last  # whose largest is 1
    assert all(torch.equal(stochastic(kept, bits), kept) for _ in range(100))


def test_low_precision_learns_from_nothing_in_eight_bits_and_repeats_itself(task):
    stage = LowPrecision(8, epochs=8, lr=0.3)
    draft = stage(Draft.of_model(task.model), task)
    for name in ("conv.weight", "first.weight", "last.weight", "last.bias", "norm.weight"):
        tree = draft.tensors[name].tree
        assert isinstance(tree, Uniform) and tree.q.min() >= -128 and tree.q.max() <= 127
        assert float(np.log2(tree.scale)) == round(float(np.log2(tree.scale)))
    assert {bits for bits, *_ in draft.activations.values()} == {8}
    assert draft.model is task.model and not task.model.conv._forward_hooks
    assert task.score(task.test, into(artifact_of(draft), duplicate(task.model))) > 0.85
    again = stage(Draft.of_model(task.model), task)
    assert artifact_of(again).to_bytes() == artifact_of(draft).to_bytes()
    other = replace(stage, seed=1)(Draft.of_model(task.model), task)
    assert artifact_of(other).to_bytes() != artifact_of(draft).to_bytes()


def test_every_value_and_gradient_is_on_a_grid_while_it_trains(task, monkeypatch):
    from tersenet.stages import low_precision

    seen = []

    def watched(self, state):
        before = [leaf.clone() for leaf in self.leaves]
        grads = [leaf.grad.clone() for leaf in self.leaves]
        follow(self, state)
        seen.append((before, grads, [leaf.clone() for leaf in self.leaves]))

    follow = low_precision._Few.follow
    monkeypatch.setattr(low_precision._Few, "follow", watched)
    LowPrecision(4, epochs=1, lr=0.3)(Draft.of_model(task.model), task)
    assert len(seen) > 5
    for before, grads, after in seen:
        for raw, grad, leaf in zip(before, grads, after, strict=True):
            for values in (grad, leaf):
                assert torch.unique(values).numel() <= 16
            assert (leaf - raw).abs().max() <= 2.0 ** np.ceil(
                np.log2(float(raw.detach().abs().max()))
            ) / 8  # less than a step


def test_pruned_weights_stay_zero_in_low_precision(task):
    pruned = Prune(0.3, 1, retrain="none")(Draft.of_model(task.model), None)
    after = LowPrecision(8, epochs=1)(pruned, task)
    for name in pruned.weights():
        was, now = pruned.tensors[name].tree, after.tensors[name].tree
        assert isinstance(now, Sparse) and np.array_equal(now.mask, was.mask) and not unpack(now)[~was.mask].any()


def test_the_papers_meet_a_size_and_verify(task, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tn.compress(task, tn.papers.fixed_point(), tn.Budget(size=14_000), folder=tmp_path / "kept")
    assert result.artifact.nbytes <= 14_000 and formats_of(result.artifact)["conv"][0] == 8
    result.artifact.save(tmp_path / "w.terse")
    assert tn.verify(tmp_path / "w.terse", task=task)["metric"] == result.after
    low = tn.compress(task, tn.papers.low_precision(8, epochs=2), folder=tmp_path / "kept")
    assert load(low.artifact.to_bytes()).sections.keys() == {"activations"}

"""Stages that train, on networks of every type and kind: what they hold still, what follows, what they leave alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import tersenet as tn
from tersenet.artifact import load
from tersenet.draft import Draft, artifact_of
from tersenet.methods.kmeans import KMeans
from tersenet.methods.uniform import Uniform
from tersenet.packed import Codebook, Sparse, unpack
from tersenet.stages.dkm import DKM
from tersenet.stages.finetune import Finetune, TrainLevels
from tersenet.stages.levels import INQ, MLQ, SLQ
from tersenet.stages.lsq import LSQ
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain, reinitialized, rewound

WORDS = 24


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.tokens, self.core = nn.Embedding(WORDS, 12, **options), kind(12, 24, batch_first=True)
        self.last = nn.Linear(24, WORDS)

    def forward(self, tokens):
        return self.last(self.core(self.tokens(tokens))[0]).transpose(1, 2)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
        self.core, self.last = nn.TransformerEncoder(layer, 1), nn.Linear(16, WORDS)

    def forward(self, tokens):
        return self.last(self.core(self.tokens(tokens))).transpose(1, 2)


class Norms(nn.Module):
    """A convolution with a norm that follows its data, for tokens as well as the others."""

    def __init__(self):
        super().__init__()
        self.tokens, self.conv, self.norm = nn.Embedding(WORDS, 12), nn.Conv1d(12, 24, 1), nn.BatchNorm1d(24)
        self.last = nn.Conv1d(24, WORDS, 1)

    def forward(self, tokens):
        return self.last(F.relu(self.norm(self.conv(self.tokens(tokens).transpose(1, 2)))))


NETWORKS = {
    "lstm": lambda: Recurrent(nn.LSTM), "gru": lambda: Recurrent(nn.GRU), "rnn": lambda: Recurrent(nn.RNN),
    "transformer": Transformer, "norms": Norms, "sparse": lambda: Recurrent(nn.GRU, sparse=True),
}  # fmt: skip
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def right(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean()


def make(name, dtype=torch.float32, adam=False, epochs=6):
    """A task whose network says the next word of its token, already trained."""
    torch.manual_seed(0)
    tokens = torch.randint(0, WORDS, (192, 6))
    data = tokens, (7 * tokens + 1) % WORDS
    rate = 0.01 if adam else 0.3
    schedule = tn.Schedule(epochs, rate, 16, adam=adam)
    task = tn.Task(NETWORKS[name]().to(dtype), data, data, metric=right, schedule=schedule)
    return task.trained(keep=(epochs - 2,))


def lost(task, draft):
    with torch.no_grad():
        return float(task.loss(task.outputs(draft.module().eval(), task.test[0]).float(), task.test[1]))


def density(draft):
    masks = [draft.tensors[name].tree.mask for name in draft.weights()]
    return sum(map(np.count_nonzero, masks)) / sum(mask.size for mask in masks)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_prunes_shares_and_trains_in_its_own_type(name, dtype):
    task = make(name, dtype)
    draft = Draft.of_model(task.model)
    assert task.score(task.test) > 0.6
    pruned = Prune(0.3, 1, retrain="none", scope="layer")(draft, task)
    trained = Retrain("learning-rate", 3)(pruned, task)
    assert density(trained) == pytest.approx(0.3, abs=1e-3)
    assert lost(task, trained) < lost(task, pruned)
    shared = Pack(KMeans(3))(trained, task)
    tuned = Narrow("bfloat16")(Finetune(1)(shared, task), task)
    for weight in draft.weights():
        tree, packed = tuned.tensors[weight].tree, shared.tensors[weight].tree
        assert isinstance(tree, Sparse) and isinstance(tree.values, Codebook)
        assert np.array_equal(tree.mask, packed.mask) and np.array_equal(tree.values.index, packed.values.index)
    levels = TrainLevels(1)(Pack(Uniform(4))(draft, task), task)
    for made in (trained, tuned, levels, Retrain("weights", 2)(pruned, task)):
        back = load(artifact_of(made).to_bytes())
        assert {n: t.dtype for n, t in back.tensors.items()} == {n: t.dtype for n, t in draft.tensors.items()}
        assert {p.dtype for p in back.into(copy.deepcopy(task.model)).parameters()} == {dtype}
        assert all(np.isfinite(dense.astype(np.float64)).all() for dense in back.unpack().values())


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("stage", [SLQ(4, 2), MLQ(2, 1), INQ(4), LSQ(3, epochs=1), DKM(KMeans(3), epochs=1)], ids=repr)
def test_few_values_are_trained_in_every_type_and_end_as_those_that_were_measured(stage, dtype):
    task = make("norms", dtype)
    draft = Draft.of_model(task.model)
    after = stage(draft, task)
    back = load(artifact_of(after).to_bytes())
    for name in draft.weights():
        dense, before = (tensors[name].unpack().astype(np.float64) for tensors in (back.tensors, draft.tensors))
        assert np.unique(dense).size <= 9 and np.array_equal(dense, after.tensors[name].unpack())
        assert np.corrcoef(dense.ravel(), before.ravel())[0, 1] > 0.5  # each weight has a value near its own
    assert back.tensors["conv.weight"].dtype == draft.tensors["conv.weight"].dtype
    assert task.score(task.test, after.module()) > 0.5


@pytest.mark.parametrize("name", ["lstm", "gru", "transformer"])
def test_what_is_known_of_the_inputs_helps_to_prune_recurrent_networks_and_transformers(name):
    task = make(name)
    draft = Draft.of_model(task.model)
    plain = task.score(task.test, Prune(0.3, 1, retrain="none")(draft, task).module())
    for order in ("kronecker", "exact", "sweep"):
        pruned = OBS(0.3, order, samples=128)(draft, task)
        assert density(pruned) == pytest.approx(0.3, abs=2e-3)
        if order == "exact":
            assert task.score(task.test, pruned.module()) >= plain


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_stages_at_zero_strength_change_nothing_in_any_type(dtype):
    task = make("norms", dtype)
    draft = Draft.of_model(task.model)
    packed = Pack(Uniform(4))(draft, task)
    for stage, start in (
        (Finetune(0), draft), (Finetune(0), packed), (TrainLevels(0), packed), (Prune(1.0, 1, retrain="none"), draft)
    ):  # fmt: skip
        assert artifact_of(stage(start, task)).to_bytes() == artifact_of(start).to_bytes(), stage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_too_small_for_a_type_add_up(dtype):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    data = torch.ones(400, 1), torch.zeros(400)
    schedule = tn.Schedule(1, 1.0, 4, momentum=0)
    task = tn.Task(model, data, valid=data, loss=lambda outputs, targets: outputs.float().mean(), schedule=schedule)
    rate = torch.finfo(dtype).eps / 16  # one such step from 1 is lost to rounding, a hundred are not
    tuned = Finetune(1, rate)(Draft.of_model(model), task)
    moved = float(tuned.tensors["weight"].unpack()[0, 0])
    assert moved == pytest.approx(1 - 100 * rate, abs=torch.finfo(dtype).eps)


def test_frozen_parameters_are_left_as_they_are():
    task = make("norms")
    task.model.tokens.requires_grad_(False)
    task.model.last.bias.requires_grad_(False)
    draft = Draft.of_model(task.model)
    pruned = Prune(0.5, 1, retrain="none")(draft, task)
    for start, stage in (
        (draft, Finetune(1, 0.1)), (pruned, Retrain("learning-rate", 1)), (pruned, Retrain("random", 1)),
        (Pack(Uniform(8))(draft, task), TrainLevels(1, 0.1)), (Pack(KMeans(2))(draft, task), Finetune(1, 0.1)),
    ):  # fmt: skip
        after = stage(start, task)
        for name in ("tokens.weight", "last.bias"):
            assert np.array_equal(after.tensors[name].unpack(), start.tensors[name].unpack()), stage
        assert not np.array_equal(after.tensors["conv.weight"].unpack(), start.tensors["conv.weight"].unpack()), stage
    assert not task.model.tokens.weight.requires_grad and task.model.conv.weight.requires_grad
    with pytest.raises(ValueError, match="all of it is frozen"):
        task.model.requires_grad_(False)
        Finetune(1)(draft, task)


def test_training_leaves_the_users_module_and_its_mode_alone():
    task = make("transformer")
    before = copy.deepcopy(task.model.state_dict())
    task.model.core.train()
    Finetune(1, 0.1)(Draft.of_model(task.model), task)
    assert task.model.core.training and not task.model.last.training
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_sparse_embeddings_train_as_dense_ones_do(adam):
    found = []
    for sparse in (False, True):
        torch.manual_seed(1)
        tokens = torch.randint(0, WORDS, (64, 6))
        model = Recurrent(nn.GRU, sparse=sparse)
        task = tn.Task(model, (tokens, tokens), metric=right, schedule=tn.Schedule(2, 0.01, 16, adam=adam)).trained()
        tuned = Finetune(1, 0.01)(Prune(0.5, 1, retrain="none")(Draft.of_model(task.model), task), task)
        found.append([tensor.unpack() for tensor in tuned.tensors.values()])
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


class Counting(nn.Module):
    """A spectral norm, and buffers that are changed in place and put anew."""

    def __init__(self):
        super().__init__()
        self.first, self.last = parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 2)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(8, dtype=torch.bfloat16))
        self.register_buffer("still", torch.tensor(float("inf")))

    def forward(self, x):
        x = self.first(x)
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0).to(torch.bfloat16)
        return self.last(torch.relu(x))


def test_buffers_follow_those_of_parametrizations_too():
    torch.manual_seed(0)
    x = torch.randn(60, 4) + 1
    task = tn.Task(Counting(), (x, (x.sum(1) > 4).long()), schedule=tn.Schedule(2, 0.1, 9))
    draft = Draft.of_model(task.model)
    tuned = Finetune(2, 0.1)(draft, task)
    assert tuned.tensors["steps"].tree == 12 and tuned.tensors["steps"].dtype == "int64"
    assert tuned.tensors["mean"].dtype == "bfloat16" and tuned.tensors["mean"].unpack().any()
    assert np.isinf(tuned.tensors["still"].unpack())
    pairs = ((tuned.tensors[n].unpack(), t.unpack()) for n, t in draft.tensors.items() if n.endswith(("_u", "_v")))
    assert all(not np.array_equal(one, other) for one, other in pairs)
    assert not task.model.steps


def test_earlier_and_fresh_weights_come_in_every_type():
    for dtype in TYPES:
        task = make("norms", dtype)
        draft = Prune(0.4, 1, retrain="none")(Draft.of_model(task.model), task)
        for made in (rewound(draft, task, 4), reinitialized(draft, 3)):
            assert {n: t.dtype for n, t in made.tensors.items()} == {n: t.dtype for n, t in draft.tensors.items()}
            assert made.tensors["norm.running_var"].note == draft.tensors["norm.running_var"].note
            assert np.array_equal(made.tensors["conv.weight"].tree.mask, draft.tensors["conv.weight"].tree.mask)
        early = task.snapshots[4]["conv.weight"].double().numpy()
        kept = draft.tensors["conv.weight"].tree.mask
        assert np.array_equal(unpack(rewound(draft, task, 4).tensors["conv.weight"].tree)[kept], early[kept])
        other = tn.Task(nn.Linear(2, 2), snapshots=task.snapshots)
        with pytest.raises(ValueError, match="lack this tensor"):
            rewound(Draft.of_model(other.model), other, 4)


def test_steps_that_many_levels_share_are_trained_no_faster_than_weights_are():
    task = make("norms")
    packed = Pack(Uniform(8))(Draft.of_model(task.model), task)
    before = task.score(task.test, packed.module())
    tuned = Retrain("learning-rate", 4)(packed, task)  # from a rate of 0.03, with a hundred levels
    assert task.score(task.test, tuned.module()) > before - 0.02
    assert any(packed.tensors[n].tree.scale != tuned.tensors[n].tree.scale for n in packed.weights())
    assert all(np.array_equal(packed.tensors[n].tree.q, tuned.tensors[n].tree.q) for n in packed.weights())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["norms", "lstm", "transformer"])
def test_training_runs_on_the_tasks_device_and_comes_back(name):
    from dataclasses import replace

    task = make(name)
    own = replace(task, device="cuda")
    draft = Draft.of_model(task.model)
    pruned = Prune(0.5, 1, 1)(draft, own)
    for made in (
        pruned,
        Finetune(1)(Pack(KMeans(3))(pruned, own), own),
        TrainLevels(1)(Pack(Uniform(4))(draft, own), own),
    ):
        assert all(p.device.type == "cpu" for p in made.module().parameters())
        score = task.score(task.test, load(artifact_of(made).to_bytes()).into(copy.deepcopy(task.model)))
        assert abs(score - own.score(task.test, made.module())) < 0.02


def test_vectors_are_narrowed_only_where_every_value_keeps_its_precision():
    values = {"gain": np.float32([1.0, 1e-9]), "bias": np.float32([1.0, 0.1, 0.0]), "w": np.ones((4, 4), np.float32)}
    draft = Draft.of_arrays(values)
    half, brain = (Narrow(kind)(draft, None).tensors for kind in ("float16", "bfloat16"))
    assert np.array_equal(half["gain"].tree, values["gain"]) and half["bias"].tree[1] == np.float16(0.1)
    assert 0 < abs(brain["gain"].tree[1] / 1e-9 - 1) < 2**-8


def test_learned_steps_round_frozen_weights_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    model[0].weight.requires_grad_(False)
    task = tn.Task(model, (torch.randn(64, 6), torch.arange(64) % 3))
    after = LSQ(bits=3, epochs=1)(Draft.of_model(model), task)
    levels = after.tensors["0.weight"].tree
    assert levels.q.min() >= -4 and levels.q.max() <= 3
    w, near = model[0].weight.numpy(), levels.unpack()
    assert len(np.unique(near)) > 5 and np.square(near - w).mean() < 0.05 * np.square(w).mean()

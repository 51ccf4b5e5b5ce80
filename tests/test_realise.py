"""Trees become modules that say what the dense network with zeros says, and the way back is exact."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tersenet as tn
from tersenet.artifact import Artifact, Tensor, load
from tersenet.draft import Draft, artifact_of
from tersenet.methods import factorize
from tersenet.norms import FOLDED
from tersenet.packed import Factored, Sparse, Uniform
from tersenet.realise import absorb, realise
from tersenet.structure import sliced, unsliced


def shaken(model):
    """The model with statistics and shifts that are not what they begin as."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.3, 1.5)
    return model.eval()


def tensors_of(model, kept):
    """A model's tensors, of which only the places in `kept` (name: {axis: places}) are left."""
    tensors = dict(Draft.of_model(model).tensors)
    for name, along in kept.items():
        tensors[name] = replace(tensors[name], tree=sliced(tensors[name].tree, along))
    return tensors


def same(model, tensors, x):
    """The realised module, once it has said what the dense one says."""
    whole, small = Artifact(tensors).into(copy.deepcopy(model)).eval(), realise(model, tensors).eval()
    with torch.no_grad():
        assert torch.allclose(whole(x), small(x), rtol=1e-5, atol=1e-5)
    assert count(small) < count(whole)
    exported = torch.export.export(small, (x,)).module()
    assert torch.allclose(exported(x), small(x), rtol=1e-5, atol=1e-5)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    return small.eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def seq(*layers):
    return nn.Sequential(*layers)


HALF, FOUR, PAIRS = [1, 2, 5], [0, 3, 4, 7], [2, 3, 6, 7]


def gone(places, read, *made):
    """What is left of the tensors that make some channels, and of the weight that reads them."""
    return {name: {0: places} for name in made} | {read: {1: places}}


FIRST, SECOND = ("0.weight", "0.bias"), ("1.weight", "1.bias")
SLICED = {
    "linear": (seq(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), (4, 5), gone(HALF, "2.weight", *FIRST)),
    "linear without bias": (
        seq(nn.Linear(5, 6, bias=False), nn.Linear(6, 3)), (4, 5), gone(HALF, "1.weight", "0.weight"),
    ),
    "conv, norm, prelu": (
        seq(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 2, 1, bias=False)), (2, 3, 7, 7),
        gone(FOUR, "3.weight", *FIRST, *SECOND, "2.weight"),
    ),
    "conv1d, norm without weights": (
        seq(nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8, affine=False), nn.Conv1d(8, 2, 1)), (2, 3, 7),
        gone(FOUR, "2.weight", "0.weight", "1.running_mean"),
    ),
    "conv3d, instance norm": (
        seq(nn.Conv3d(1, 8, 2), nn.InstanceNorm3d(8, affine=True), nn.Conv3d(8, 2, 1)), (2, 1, 4, 4, 4),
        gone(FOUR, "2.weight", *FIRST, *SECOND),
    ),
    "depthwise conv1d": (
        seq(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv1d(8, 2, 1)), (2, 3, 9),
        gone(FOUR, "3.weight", *FIRST, *SECOND),
    ),
    "one depthwise channel is left": (
        seq(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)), (2, 3, 9, 9),
        gone([5], "2.weight", *FIRST, *SECOND),
    ),
    "depthwise with two rows for each input": (
        seq(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)), (2, 3, 5, 5),
        gone(PAIRS, "2.weight", *SECOND) | {name: {0: [1, 3]} for name in FIRST},
    ),
    "whole groups": (
        seq(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, groups=4), nn.Conv2d(8, 2, 1)), (2, 3, 5, 5),
        gone(PAIRS, "2.weight", *SECOND) | {name: {0: [3, 4, 5, 9, 10, 11]} for name in FIRST},
    ),
    "as many rows and inputs of each group": (
        seq(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1)), (2, 3, 5, 5),
        gone([1, 2, 4, 7], "2.weight", "1.bias") | {name: {0: [0, 2, 3, 5]} for name in FIRST}
        | {"1.weight": {0: [1, 2, 4, 7], 1: [0, 2]}},
    ),
    "transposed": (
        seq(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 3, 2), nn.Conv2d(8, 2, 1)), (2, 3, 5, 5),
        gone(FOUR, "2.weight", "1.bias") | {name: {0: HALF} for name in FIRST} | {"1.weight": {0: HALF, 1: FOUR}},
    ),
    "transposed in groups": (
        seq(nn.Conv1d(3, 6, 1), nn.ConvTranspose1d(6, 12, 3, groups=3), nn.Conv1d(12, 2, 1)), (2, 3, 5),
        gone([1, 2, 9, 10], "2.weight", "1.bias") | {name: {0: [0, 1, 4, 5]} for name in FIRST}
        | {"1.weight": {0: [0, 1, 4, 5], 1: [1, 2]}},
    ),
    "group norm": (
        seq(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1)), (2, 3, 5, 5),
        gone(PAIRS, "2.weight", *FIRST, *SECOND),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SLICED)
def test_layers_lose_the_channels_that_are_gone(case):
    torch.manual_seed(0)
    model, shape, kept = SLICED[case]
    model = shaken(copy.deepcopy(model))
    tensors = tensors_of(model, kept)
    small = same(model, tensors, torch.randn(shape))
    for name in kept:
        assert small.state_dict()[name].shape == unsliced(tensors[name].tree)[0].shape
    assert count(model) == count(SLICED[case][0]), "the given module is left as it was"


def test_embeddings_get_narrower_and_keep_their_rows():
    model = seq(nn.Embedding(9, 6), nn.Linear(6, 3))
    tensors = tensors_of(model, {"0.weight": {1: HALF}, "1.weight": {1: HALF}})
    assert same(model, tensors, torch.arange(9)).get_submodule("0").embedding_dim == 3
    tensors = tensors_of(model, {"0.weight": {0: HALF}})
    with pytest.warns(UserWarning, match=r"stay dense: 0\.weight$"):
        assert realise(model, tensors).get_submodule("0").num_embeddings == 9


def rng(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


SVD, TUCKER, CP = "or,ri->oi", "or,rshw,si->oihw", "or,rh,rw,ri->oihw"


def factored(equation, size, **extents):
    terms = equation.split("->")[0].split(",")
    return Factored(equation, tuple(rng(*(extents[c] for c in term)) for term in terms), size)


LEVELS = Uniform(np.ones((3, 20), np.int8), np.array(0.1, np.float32))
ONE = {"o": 12, "i": 20, "r": 3}
FACTORED = {
    "svd of linear": (nn.Linear(20, 12), (3, 20), factored(SVD, (12, 20), **ONE), 2),
    "svd, other letters and order": (nn.Linear(20, 12), (3, 20), factored("xa,bx->ba", (12, 20), x=3, a=20, b=12), 2),
    "four matrices": (
        nn.Linear(20, 12), (3, 7, 20), factored("ob,bc,cd,di->oi", (12, 20), o=12, b=2, c=3, d=2, i=20), 4,
    ),
    "svd of a 1x1 convolution with a stride": (
        nn.Conv2d(20, 12, 1, 2), (2, 20, 5, 6), factored(SVD, (12, 20, 1, 1), **ONE), 2,
    ),
    "svd of a convolution": (
        nn.Conv2d(4, 12, 3, 2, 1, 2), (2, 4, 9, 9), factored(SVD, (12, 4, 3, 3), o=12, r=3, i=36), 2,
    ),
    "rows and columns of a kernel": (
        nn.Conv2d(4, 12, (3, 5), (1, 2), (1, 2), padding_mode="reflect"), (2, 4, 9, 9),
        factored("orh,riw->oihw", (12, 4, 3, 5), o=12, r=3, i=4, h=3, w=5), 2,
    ),
    "tucker": (
        nn.Conv2d(8, 12, 3, 2, 1), (2, 8, 9, 9), factored(TUCKER, (12, 8, 3, 3), o=12, r=3, s=2, h=3, w=3, i=8), 3,
    ),
    "tucker, kernel in one letter": (
        nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 9, 9),
        factored("or,srk,is->oik", (12, 8, 3, 3), o=12, r=3, s=2, k=9, i=8), 3,
    ),
    "cp": (
        nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 2)), (2, 8, 9, 9),
        factored(CP, (12, 8, 3, 5), o=12, r=4, h=3, w=5, i=8), 4,
    ),
    "cp of three axes": (
        nn.Conv3d(3, 8, 3), (2, 3, 5, 5, 5), factored("or,kr,ri->oik", (8, 3, 3, 3, 3), o=8, r=2, k=27, i=3), 3,
    ),
    "cp of one axis": (
        nn.Conv1d(6, 8, 3, bias=False), (2, 6, 9), factored("or,kr,ri->oik", (8, 6, 3), o=8, r=2, k=3, i=6), 3,
    ),
    "embedding": (nn.Embedding(30, 12, padding_idx=0), None, factored(SVD, (30, 12), o=30, r=3, i=12), 2),
    "quantized factors": (nn.Linear(20, 12), (3, 20), Factored(SVD, (rng(12, 3), LEVELS), (12, 20)), 2),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORED)
def test_factored_weights_become_chains_of_layers(case):
    layer, shape, tree, steps = FACTORED[case]
    x = torch.arange(30) if shape is None else torch.randn(shape)
    tensors = tensors_of(layer, {}) | {"weight": Tensor(tree)}
    small = same(layer, tensors, x)
    assert isinstance(small, nn.Sequential) and len(small) == steps
    inside = same(seq(layer), {f"0.{name}": tensor for name, tensor in tensors.items()}, x)
    assert isinstance(inside[0], nn.Sequential) and type(inside[0][0]) in (type(layer), nn.Embedding)


@pytest.mark.parametrize("nested", [True, False])
def test_transformers_of_torch_run_with_chains_in_evaluation_and_in_training(nested):
    """Their fast paths, which are taken without gradients alone, read the weights of the layers within."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    tensors = {**Draft.of_model(model).tensors}
    for name in ("layers.0.linear2.weight", "layers.1.linear1.weight"):
        tensors[name] = replace(tensors[name], tree=factorize.SVD(4, weighted=False).pack(tensors[name].tree))
    whole, small = Artifact(tensors).into(copy.deepcopy(model)).eval(), realise(model, tensors).eval()
    assert type(small.layers[1].linear1) is nn.Sequential and count(small) < count(whole)
    x, padded = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        for mask in (None, padded):
            found, wanted = (m(x, src_key_padding_mask=mask) for m in (small, whole))
            there = slice(None) if mask is None else ~mask
            assert torch.allclose(found[there], wanted[there], atol=1e-5)
    assert torch.allclose(small.train()(x), whole.train()(x), atol=1e-5)
    with torch.no_grad():
        small.layers[1].linear1[0].weight.mul_(2)
    assert not np.array_equal(
        absorb(small, model, tensors)["layers.1.linear1.weight"].unpack(), tensors["layers.1.linear1.weight"].unpack()
    )


def test_factors_may_lie_under_slices():
    torch.manual_seed(0)
    model = shaken(seq(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3)))
    tensors = tensors_of(model, {"0.weight": {0: FOUR}, "0.bias": {0: FOUR}})
    tree = factored(TUCKER, (12, 8, 3, 3), o=12, r=3, s=2, h=3, w=3, i=8)
    tensors["2.weight"] = Tensor(sliced(tree, {1: FOUR}))
    small = same(model, tensors, torch.randn(2, 3, 6, 6))
    assert [layer.in_channels for layer in small[2]] == [4, 2, 3]


DENSE = {
    "a tensor train": (nn.Linear(6, 4), factored("ar,bsr,sc->abc", (4, 6), a=2, b=2, c=6, r=2, s=2)),
    "two paths": (nn.Linear(6, 4), factored("or,ri,os,si->oi", (4, 6), o=4, i=6, r=2, s=2)),
    "a scale between two matrices": (nn.Linear(6, 4), factored("or,r,ri->oi", (4, 6), o=4, i=6, r=2)),
    "a letter that is summed away": (nn.Linear(6, 4), factored("or,rx,ri->oi", (4, 6), o=4, i=6, r=2, x=5)),
    "a kernel in two factors": (nn.Conv1d(6, 4, 3), factored("ork,rik->oik", (4, 6, 3), o=4, i=6, r=2, k=3)),
    "groups": (nn.Conv1d(6, 4, 1, groups=2), factored(SVD, (4, 3, 1), o=4, i=3, r=2)),
    "a transposed convolution": (nn.ConvTranspose1d(6, 4, 1), factored(SVD, (6, 4, 1), o=6, i=4, r=2)),
    "a bilinear layer": (nn.Bilinear(3, 2, 4), factored(SVD, (4, 3, 2), o=4, i=6, r=2)),
}


@pytest.mark.parametrize("case", DENSE)
def test_what_is_no_chain_stays_dense_and_is_named(case):
    layer, tree = DENSE[case]
    model = nn.ModuleDict({"layer": layer})
    tensors = tensors_of(model, {}) | {"layer.weight": Tensor(tree)}
    with pytest.warns(UserWarning, match=r"stay dense: layer\.weight$"):
        small = realise(model, tensors)
    assert type(small["layer"]) is type(layer)
    assert np.allclose(small["layer"].weight.detach().numpy(), tree.unpack(), rtol=1e-6)


def test_tied_weights_stay_dense_and_tied():
    model = seq(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    weight = Tensor(Factored(SVD, (rng(8, 2), rng(2, 8)), (8, 8)))
    tensors = tensors_of(model, {}) | {"0.weight": weight, "1.weight": weight}
    with pytest.warns(UserWarning, match=r"stay dense: 0\.weight, 1\.weight"):
        small = realise(model, tensors)
    assert small[0].weight is small[1].weight


def test_what_does_not_fit_is_refused():
    model = shaken(seq(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 1, groups=2)))
    with pytest.raises(ValueError, match=r"0\.bias: keeps other channels than weight does"):
        realise(model, tensors_of(model, {"0.weight": {0: FOUR}, "0.bias": {0: PAIRS}}))
    with pytest.raises(ValueError, match=r"0\.bias: has values in channels that are gone"):
        realise(model, tensors_of(model, {"0.weight": {0: FOUR}}))
    with pytest.raises(ValueError, match=r"0\.weight: keeps no channel"):
        realise(model, tensors_of(model, {"0.weight": {0: []}, "0.bias": {0: []}}))
    with pytest.warns(UserWarning, match=r"stay dense: 2\.weight"):  # two rows of one group, three of the other
        realise(model, tensors_of(model, {"2.weight": {0: [0, 1, 3, 4, 5]}}))
    norm = nn.Sequential(nn.GroupNorm(4, 8), nn.LayerNorm(8))
    with pytest.warns(UserWarning, match=r"stay dense: 0\.weight, 1\.weight"):  # statistics would be of other numbers
        realise(norm, tensors_of(norm, {"0.weight": {0: HALF}, "1.weight": {0: FOUR}}))


def test_folded_norms_stay_in_evaluation_form_when_they_get_smaller():
    model = shaken(seq(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)))
    tensors = tensors_of(model, gone(FOUR, "2.weight", *FIRST, *SECOND))
    tensors["1.weight"] = replace(tensors["1.weight"], note=FOLDED)
    small = realise(model, tensors).train()
    assert not small[1].training and small[1].num_features == 4 and small[2].training


def tuned(small):
    """Every parameter and running statistic moved."""
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.add_(torch.ones_like(tensor))
    return small


@pytest.mark.parametrize("case", [*SLICED, *(name for name in FACTORED if name != "quantized factors")])
def test_absorbing_what_was_tuned_gives_the_same_trees_with_its_values(case):
    if case in SLICED:
        model, _, kept = SLICED[case]
        tensors = tensors_of(model, kept)
    else:
        model, _, tree, _ = FACTORED[case]
        tensors = tensors_of(model, {}) | {"weight": Tensor(tree)}
    small = realise(model, tensors)
    back = absorb(small, model, tensors)
    assert all(back[name] is tensors[name] for name in tensors) and back.keys() == tensors.keys()
    back = absorb(tuned(small), model, tensors)
    again = realise(model, back).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in small.state_dict().items())
    kinds = lambda known: [(type(t.tree), t.tree.shape, t.dtype) for t in known.values()]  # noqa: E731
    assert kinds(back) == kinds(tensors)


def test_absorbing_refuses_what_trees_cannot_hold():
    model = seq(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    mask = np.eye(4, dtype=bool)
    levels = Uniform(np.ones((4, 4), np.int8), np.array(0.5, np.float32))
    tensors = tensors_of(model, {}) | {"1.weight": Tensor(Sparse(mask, rng(4))), "2.weight": Tensor(levels)}
    small = realise(model, tensors)
    with torch.no_grad():
        small[1].weight += 2 * torch.eye(4)
        back = absorb(small, model, tensors)
        assert back["2.weight"] is tensors["2.weight"] and isinstance(back["1.weight"].tree, Sparse)
        assert np.array_equal(back["1.weight"].tree.values, rng(4) + 2)
        small[1].weight[0, 1] = 1
        with pytest.raises(ValueError, match=r"1\.weight: tuning filled places"):
            absorb(small, model, tensors)
        small[1].weight[0, 1] = 0
        small[2].weight[0, 1] = 1
        with pytest.raises(ValueError, match=r"2\.weight: its values are quantized"):
            absorb(small, model, tensors)
    with pytest.raises(ValueError, match=r"0\.weight: is not as `realise` makes it"):
        absorb(seq(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)), model, tensors)
    train = tensors | {"1.weight": Tensor(Factored("ij,kl->ikjl", (rng(2, 2), rng(2, 2)), (4, 4)))}
    with pytest.warns(UserWarning, match="stay dense"):
        small = realise(model, train)
    with torch.no_grad():
        small[1].weight += 1
    with pytest.raises(ValueError, match=r"1\.weight: stays dense, and its factors cannot follow"):
        absorb(small, model, train)
    tied = tensors | {"2.bias": tensors["1.bias"]}
    small = realise(model, tied)
    with torch.no_grad():
        small[1].bias += 1
    with pytest.raises(ValueError, match=r"2\.bias: stored once with 1\.bias"):
        absorb(small, model, tied)


def test_a_file_realises_itself(tmp_path):
    torch.manual_seed(0)
    model, shape, kept = SLICED["conv, norm, prelu"]
    model = shaken(copy.deepcopy(model))
    draft = replace(Draft.of_model(model), tensors=tensors_of(model, kept))
    artifact_of(draft).save(tmp_path / "f.terse")
    small = load(tmp_path / "f.terse").realise(copy.deepcopy(model))
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.allclose(small(x), draft.module()(x), rtol=1e-5, atol=1e-5)
    assert small[0].out_channels == 4 and tn.load(tmp_path / "f.terse")["0.weight"].shape == (8, 3, 3, 3)

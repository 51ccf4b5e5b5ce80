"""Moments against what layers say: for results y = W u + b, the mean of y y^T is W A W^T and that of y is W mean."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersenet as tn
from tersenet import calibrate
from tersenet.calibrate import moments
from tersenet.likelihood import Likelihood

GAUSSIAN = Likelihood("gaussian")


def known(model, x, labels=2, forward=None, likelihood=GAUSSIAN, size=5):
    """The moments of a model on inputs, read in batches."""
    count = len(next(iter(x.values())) if isinstance(x, dict) else x)
    task = tn.Task(model, (x, torch.zeros(count)), loss=F.mse_loss, forward=forward)
    parts = [{n: t[k : k + size] for n, t in x.items()} if isinstance(x, dict) else x[k : k + size]
             for k in range(0, count, size)]  # fmt: skip
    return moments(task, model, parts, likelihood, labels)


def assert_right(found, weight, y, rtol=1e-4):
    """`y` are the results without their bias, [groups, positions, rows]; rows are many enough to determine A."""
    w, y = found.form.matrix(weight.detach().double()), y.detach().double()
    assert y.shape[0] == len(w) and y.shape[2] == w.shape[1] and found.whole
    second = y.transpose(1, 2) @ y / y.shape[1]
    told = w @ found.inputs[:, 0] @ w.transpose(1, 2)
    assert torch.allclose(told, second, rtol=rtol, atol=rtol * float(second.abs().max()))
    mean = (w @ found.means[..., None])[..., 0]
    assert torch.allclose(mean, y.mean(1), rtol=rtol, atol=rtol * float(second.diagonal(dim1=1, dim2=2).sqrt().max()))


def positions(y, groups=1):
    """Results [samples, channels, ...] as [groups, positions, rows]."""
    y = y.flatten(2) if y.dim() > 2 else y[..., None]
    return y.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


LAYERS = {
    "linear": (nn.Linear(5, 9), (5,)),
    "linear without a bias": (nn.Linear(5, 9, bias=False), (5,)),
    "conv1d": (nn.Conv1d(3, 16, 5, stride=2, padding=3), (3, 17)),
    "conv2d": (nn.Conv2d(2, 20, 3, padding=1), (2, 6, 7)),
    "conv3d": (nn.Conv3d(2, 20, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (2, 4, 5, 3)),
    "grouped": (nn.Conv2d(6, 40, 3, groups=2), (6, 7, 7)),
    "depthwise": (nn.Conv1d(4, 32, 3, groups=4, padding=1), (4, 9)),
    "dilated": (nn.Conv2d(2, 14, (3, 2), dilation=(2, 3), padding=2), (2, 8, 9)),
    "same": (nn.Conv2d(2, 20, (4, 3), padding="same", dilation=(1, 2)), (2, 7, 8)),
    "valid": (nn.Conv1d(2, 10, 3, padding="valid"), (2, 8)),
    "reflect": (nn.Conv2d(2, 20, 3, padding=2, padding_mode="reflect"), (2, 6, 7)),
    "circular": (nn.Conv1d(3, 16, 3, padding=2, padding_mode="circular"), (3, 9)),
    "transposed 1d": (nn.ConvTranspose1d(2, 8, 3, stride=2), (2, 7)),
    "transposed 2d": (nn.ConvTranspose2d(2, 20, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(1, 9, 2, stride=2, bias=False), (1, 2, 3, 2)),
    "transposed grouped": (
        nn.ConvTranspose2d(4, 40, (3, 2), stride=(2, 3), output_padding=(1, 0), groups=2, dilation=(1, 2)), (4, 4, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_layers_are_exact(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(13, *shape) + 0.5
    found = known(layer, x)["weight"]
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (len(shape) - 1))
    assert_right(found, layer.weight, positions(layer(x) - bias, found.form.groups))
    assert found.bias == (None if layer.bias is None else "bias")


def test_a_linear_layer_over_positions_takes_each_as_an_input():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 9), torch.randn(13, 4, 3, 5) + 0.5
    found = known(layer, x)["weight"]
    assert_right(found, layer.weight, (layer(x) - layer.bias).reshape(1, -1, 9))


def test_unbatched_convolutions_are_seen():
    torch.manual_seed(0)
    layer, x = nn.Conv1d(3, 16, 5), torch.randn(13, 3, 9)
    task = tn.Task(
        layer, (x, torch.zeros(13)), loss=F.mse_loss, forward=lambda m, x: torch.stack([m(one) for one in x])
    )
    found = moments(task, layer, [x], GAUSSIAN)["weight"]
    assert_right(found, layer.weight, positions(layer(x) - layer.bias[:, None]))


class Product(nn.Module):
    def __init__(self, function, *shape, bias=None):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.b = None if bias is None else nn.Parameter(torch.randn(bias))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.b)


PRODUCTS = {
    "x @ W": (lambda x, w, b: x @ w, (4, 9), (4,), lambda y: y.reshape(1, -1, 9)),
    "x @ W over positions": (lambda x, w, b: x @ w, (4, 9), (3, 4), lambda y: y.reshape(1, -1, 9)),
    "x @ W.T": (lambda x, w, b: torch.matmul(x, w.T), (9, 4), (4,), lambda y: y.reshape(1, -1, 9)),
    "W @ x": (lambda x, w, b: w @ x, (9, 4), (4, 3), lambda y: y.transpose(1, 2).reshape(1, -1, 9)),
    "W.T @ x": (lambda x, w, b: w.t() @ x, (4, 9), (4, 3), lambda y: y.transpose(1, 2).reshape(1, -1, 9)),
    "mm": (lambda x, w, b: torch.mm(x, w), (4, 9), (4,), lambda y: y.reshape(1, -1, 9)),
    "linear of a part": (
        lambda x, w, b: F.linear(x, w.view(9, 4)), (36,), (4,), lambda y: y.reshape(1, -1, 9)
    ),
    "einsum": (lambda x, w, b: torch.einsum("nlc,hcd->nhld", x, w), (2, 4, 9), (3, 4), lambda y: y),
    "einsum of four axes": (
        lambda x, w, b: torch.einsum("nchw,ocab->noabhw", x, w), (5, 4, 2, 2), (4, 3, 3), lambda y: y
    ),
    "einsum in groups": (
        lambda x, w, b: torch.einsum("ngc,gcd->ngd", x, w), (3, 4, 9), (3, 4), lambda y: y.transpose(0, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_moments_of_products_are_exact(name):
    function, shape, given, rows = PRODUCTS[name]
    torch.manual_seed(0)
    model = Product(function, *shape)
    x = torch.randn(12, *given) + 0.3
    found, y = known(model, x)["w"], model(x)
    if name == "einsum":
        y = y.permute(0, 2, 1, 3).reshape(1, -1, 18)
    elif name == "einsum of four axes":
        y = y.permute(0, 4, 5, 1, 2, 3).reshape(1, -1, 20)
    else:
        y = rows(y)
    assert_right(found, model.w, y)


def test_addmm_as_hugging_face_has_it():
    torch.manual_seed(0)
    model = Product(lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], 9), 4, 9, bias=9)
    x = torch.randn(12, 3, 4) + 0.3
    found = known(model, x)["w"]
    assert found.bias == "b"
    assert_right(found, model.w, (model(x) - model.b).reshape(1, -1, 9))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_moments_of_attentions_projections_are_those_of_what_they_see(cross):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    x = {"query": torch.randn(12, 3, 6) + 0.3, "key": torch.randn(12, 4, 6) - 0.5}
    if not cross:
        x = {"query": x["query"]}

    def forward(model, given):
        other = given.get("key", given["query"])
        return model(given["query"], other, other)[0]

    found = known(model, x, labels=8, forward=forward)
    whole = found["in_proj_weight"]
    assert whole.form.rows == 18 and whole.outputs.shape == (1, 1, 18, 18)
    if cross:  # queries and what is looked at have moments of their own, which their gradients weigh
        assert whole.bias is None
    else:
        u = x["query"].reshape(-1, 6).double()
        assert torch.allclose(whole.inputs[0, 0], u.T @ u / len(u), rtol=1e-4, atol=1e-4)
        assert whole.bias == "in_proj_bias"
    assert float(whole.outputs[0, 0].diagonal()[6:12].min()) > 0  # keys do not look free
    assert found["out_proj.weight"].bias == "out_proj.bias"


def test_a_bias_that_serves_several_weights_is_the_bias_of_none():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True)
    x = {"q": torch.randn(12, 3, 6), "k": torch.randn(12, 4, 5), "v": torch.randn(12, 4, 4)}
    found = known(model, x, forward=lambda model, x: model(x["q"], x["k"], x["v"])[0])
    assert [found[f"{name}_proj_weight"].bias for name in "qkv"] == [None] * 3


def test_moments_of_recurrent_weights_are_means_over_steps():
    torch.manual_seed(0)
    model = nn.LSTM(5, 7, batch_first=True)
    x = torch.randn(12, 6, 5) + 0.3
    found = known(model, x)
    u = x.reshape(-1, 5).double()
    assert torch.allclose(found["weight_ih_l0"].inputs[0, 0], u.T @ u / len(u), rtol=1e-4, atol=1e-4)
    outs = model(x)[0].detach().double()
    h = torch.cat([torch.zeros(12, 1, 7).double(), outs[:, :-1]], 1).reshape(-1, 7)
    assert torch.allclose(found["weight_hh_l0"].inputs[0, 0], h.T @ h / len(h), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found["weight_hh_l0"].means[0], h.mean(0), rtol=1e-4, atol=1e-4)
    assert [found[f"weight_{part}_l0"].bias for part in ("ih", "hh")] == ["bias_ih_l0", "bias_hh_l0"]


class Thrice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 5)

    def forward(self, x):
        return self.one(torch.tanh(self.one(torch.tanh(self.one(x)))))


def test_a_layer_that_is_called_three_times_has_the_mean_of_its_inputs_moments():
    torch.manual_seed(0)
    model, x = Thrice(), torch.randn(12, 5) + 0.3
    a = x
    with torch.no_grad():
        u = [a := torch.tanh(model.one(a)) if k else a for k in range(3)]
    u = torch.cat(u).double()
    found = known(model, x)["one.weight"]
    assert torch.allclose(found.inputs[0, 0], u.T @ u / len(u), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.means[0], u.mean(0), rtol=1e-4, atol=1e-5)
    assert found.bias == "one.bias"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu_(self.one(x)))


def test_tied_weights_gather_what_all_their_uses_see_and_what_changes_results_in_place_is_no_harm():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(12, 5) + 0.3
    with torch.no_grad():
        u = torch.cat([x, torch.relu(model.one(x))]).double()
    found = known(model, x)
    assert [name for name in found if "weight" in name] == ["one.weight"]
    assert torch.allclose(found["one.weight"].inputs[0, 0], u.T @ u / len(u), rtol=1e-4, atol=1e-5)
    assert found["one.weight"].bias is None


class Parts(nn.Module):
    """A part that runs without gradients, one that is frozen, tokens, and a weight that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.tokens, self.still, self.first = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 8)
        self.unused, self.last = nn.Linear(3, 3), nn.Linear(8, 4)
        self.tokens.weight.requires_grad_(False)
        self.first.requires_grad_(False)

    def forward(self, tokens):
        with torch.no_grad():
            x = torch.relu(self.still(self.tokens(tokens)))
        return self.last(F.relu(self.first(x), inplace=True).mean(1))


def test_parts_without_gradients_and_frozen_ones_have_moments_and_the_module_is_left_as_it_was():
    torch.manual_seed(0)
    model, x = Parts(), torch.randint(0, 11, (20, 7))
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = known(model, x, labels=4)
    assert {n for n in found if "weight" in n} == {"tokens.weight", "still.weight", "first.weight", "last.weight"}
    u = model.tokens(x).reshape(-1, 6).double()
    assert torch.allclose(found["still.weight"].inputs[0, 0], u.T @ u / len(u), rtol=1e-4, atol=1e-5)
    assert model.training and not model.first.weight.requires_grad and model.still.weight.requires_grad
    assert model.first.weight.grad is None and model.still.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_of_an_embedding_weigh_as_much_as_they_are_looked_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 6), nn.Flatten(), nn.Linear(30, 30))
    x = torch.randint(0, 4, (200, 5)) ** 3  # 0, 1, 8 and 27
    x[0, 0] = 39
    found = known(model, x, labels=16)["0.weight"]
    rows = found.outputs[0, :, 0, 0]
    counts = torch.bincount(x.flatten(), minlength=40).double()
    often = counts > 10
    assert torch.allclose(rows[often] / rows[often].sum(), counts[often] / counts[often].sum(), rtol=0.15)
    assert float(rows.min()) > 0 and float(rows[39]) < float(rows[often].min())
    assert len(set(rows[counts == 0].tolist())) == 1
    assert float(found.inputs[0, 0].diagonal().mean()) == pytest.approx(1)


def test_the_gradients_of_drawn_labels_are_summed_over_positions_or_not():
    """With Gaussian outputs of a single layer, G is 1 for each row at each position."""
    torch.manual_seed(0)
    found = known(nn.Linear(3, 4), torch.randn(400, 5, 3), labels=8, size=50)["weight"].outputs[0, 0]
    assert torch.allclose(found, 5 * torch.eye(4).double(), atol=0.6)
    found = known(nn.Conv1d(3, 4, 1), torch.randn(400, 3, 5), labels=8, size=50)["weight"].outputs[0, 0]
    assert torch.allclose(found, 5 * (1 + calibrate.EXPANDED) * torch.eye(4).double(), atol=0.6)


@pytest.mark.parametrize("scale,offset", [(1e-20, 0), (1e20, 0), (1, 1e5), (1e-3, 1e3)])
def test_moments_keep_their_precision_whatever_the_inputs_are(scale, offset):
    torch.manual_seed(0)
    x = scale * torch.randn(64, 6, dtype=torch.double) + offset
    layer = nn.Linear(6, 3).double()
    found = known(layer, x)["weight"]
    u = x.double()
    centred = found.inputs[0, 0] - found.means[0][:, None] * found.means[0]
    wanted = (u - u.mean(0)).T @ (u - u.mean(0)) / len(u)
    assert torch.allclose(centred, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_wide_layers_have_diagonal_blocks_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    layers = [(nn.Linear(50, 7), (50,)), (nn.Conv2d(6, 8, 3), (6, 5, 5)), (nn.Conv2d(8, 6, 3, groups=2), (8, 5, 5))]
    for layer, shape in layers:
        x = torch.randn(12, *shape)
        whole = known(layer, x)["weight"]
        with monkeypatch.context() as patch:
            patch.setattr(calibrate, "MOST", 600)
            parts = known(layer, x)["weight"]
        assert not parts.whole and parts.inputs.numel() <= 2 * 600 and torch.allclose(parts.means, whole.means)
        groups, count, width, _ = parts.inputs.shape
        n = whole.inputs.shape[-1]
        for g in range(groups):
            blocks = torch.block_diag(*parts.inputs[g])
            assert not blocks[n:].any() and torch.allclose(
                blocks[:n, :n][blocks[:n, :n] != 0], whole.inputs[g, 0][blocks[:n, :n] != 0]
            )
        assert width % max(1, int(np.prod(whole.form.kernel))) == 0 and count > 1


def test_moments_do_not_depend_on_threads_or_the_users_generator(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3))
    x, found = torch.randn(64, 6), []
    state = torch.get_rng_state()
    for threads in (1, 3):
        monkeypatch.setattr("tersenet.cores.usable", lambda threads=threads: threads)
        found.append(known(model, x))
    assert torch.equal(torch.get_rng_state(), state)
    for name in found[0]:
        assert all(torch.equal(getattr(found[0][name], p), getattr(found[1][name], p)) for p in ("inputs", "outputs"))

"""Watched operations: a model says the same while it is watched, and all its weights are seen."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tersenet.tracing.operations import Watch


def runs_alike(model, *inputs, **named):
    """Whether a model says the same while it is watched; gives the uses."""
    plain = model(*inputs, **named)
    with Watch(model) as watch:
        seen = model(*inputs, **named)
    for one, other in zip(flat(plain), flat(seen), strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-5)
    return watch.uses


def flat(things):
    if isinstance(things, torch.Tensor):
        return [things]
    return [tensor for part in things if part is not None for tensor in flat(part)]


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}, {"batch_first": True}], ids=str
)
def test_attention_is_taken_apart_and_says_the_same(options):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, **options).eval()
    q = torch.randn(4, 4, 8)
    uses = runs_alike(model, q, q, q) if "kdim" not in options else []
    k, v = torch.randn(4, 4, options.get("kdim", 8)), torch.randn(4, 4, options.get("vdim", 8))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 3] = True
    uses += runs_alike(model, q, k, v, key_padding_mask=mask)
    names = {use.name for use in uses}
    projections = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if "kdim" in options else {"in_proj_weight"}
    assert names == projections | {"out_proj.weight"}


@pytest.mark.parametrize("turned", ["channels last", "transposed"])
def test_weights_that_lie_otherwise_in_memory_are_seen_as_those_in_order_are(turned):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, (1, 3)), nn.Flatten(), nn.Linear(48, 5))
    x, plain = torch.randn(2, 3, 8, 6), copy.deepcopy(model)
    if turned == "channels last":
        model.to(memory_format=torch.channels_last)
    else:
        model[4].weight = nn.Parameter(model[4].weight.detach().t().contiguous().t())
    seen, wanted = runs_alike(model, x), runs_alike(plain, x)
    assert [use.name for use in seen] == [use.name for use in wanted] == ["0.weight", "2.weight", "4.weight"]
    for one, other in zip(seen, wanted, strict=True):
        assert one.form == other.form
        assert torch.allclose(one.unrolled(one.inputs), other.unrolled(other.inputs), atol=1e-6)


def test_a_transposed_view_of_another_weight_is_a_use_of_that():
    model = nn.ModuleDict({"in": nn.Embedding(9, 4), "out": nn.Linear(9, 4, bias=False)})
    model["out"].weight = nn.Parameter(model["in"].weight.detach().t())
    with Watch(model) as watch:
        model["out"](torch.randn(3, 9)), model["in"](torch.arange(3))
    assert [use.name for use in watch.uses] == ["in.weight", "in.weight"]


RECURRENT = {
    "lstm": (nn.LSTM, {}), "gru": (nn.GRU, {}), "rnn": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "two layers": (nn.LSTM, {"num_layers": 2}), "both directions": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "projected": (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    "no bias": (nn.LSTM, {"bias": False, "bidirectional": True}), "batch first": (nn.GRU, {"batch_first": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_say_the_same_while_they_are_watched(name):
    kind, options = RECURRENT[name]
    torch.manual_seed(0)
    model = kind(5, 7, **options)
    first = options.get("batch_first", False)
    x = torch.randn(4, 6, 5) if first else torch.randn(6, 4, 5)
    uses = runs_alike(model, x)
    assert {use.name for use in uses} == {n for n, _ in model.named_parameters() if "weight" in n}
    begin = model(x)[1]
    begin = tuple(torch.randn_like(part) for part in begin) if kind is nn.LSTM else torch.randn_like(begin)
    runs_alike(model, x, begin)
    for lengths in ([6, 4, 4, 1], [2, 6, 1, 3]):
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=first, enforce_sorted=False)
        plain, ends = model(packed, begin)
        with Watch(model):
            seen, final = model(packed, begin)
        for one, other in zip(pad_packed_sequence(plain), pad_packed_sequence(seen), strict=True):
            assert torch.allclose(one.float(), other.float(), atol=1e-5)
        for one, other in zip(flat(ends), flat(final), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    runs_alike(model, x[:, 0] if not first else x[0])  # without a batch


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_say_the_same_while_they_are_watched(kind, bias):
    torch.manual_seed(0)
    model, x = kind(5, 7, bias=bias), torch.randn(4, 5)
    state = torch.randn(4, 7)
    runs_alike(model, x)
    runs_alike(model, x, (state, state) if kind is nn.LSTMCell else state)
    runs_alike(model, x[0])

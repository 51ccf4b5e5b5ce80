"""Watched operations: a model says the same while it is watched, and all its weights are seen."""

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

"""State dicts without data. Where a network goes with them, it is asked what their errors do to its outputs."""

import math

import numpy as np
import torch
from torch import nn

from networks.attention import Encoder, Language, chained, padded, perplexity, words_lost
from networks.data import perceptron, resized
from networks.layers import convolved, pooled
from networks.recurrent import Recurrent, series
from networks.zoo import labelled, network, task


@network(bits=(4, 3), blind=True, exact=("*running*", "*tracked"), again=True)
def norm_variances():
    """BatchNorm variances of 1e5 and 1e-9, neither of which fp16 holds."""
    net = nn.Sequential(convolved(3, 24), nn.Conv2d(24, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(), pooled(24))
    one = task(net, labelled(3, 10, 10))
    with torch.no_grad():
        net[2].eps = 1e-14
        size = torch.where(torch.arange(24) % 2 == 0, 1e5, 1e-9) / net[2].running_var
        net[1].weight *= size.sqrt()[:, None, None, None]
        net[2].running_var *= size
        net[2].running_mean *= size.sqrt()
    return one


@network(bits=(4, 3), blind=True)
def convolutions_without_data():
    net = nn.Sequential(convolved(3, 24), convolved(24, 32, stride=2), convolved(32, 32, groups=32), pooled(32))
    return task(net, labelled(3, 12, 12))


@network(bits=(4, 3), blind=True)
def lstm_without_data():
    return task(Recurrent(nn.LSTM(8, 40, batch_first=True), 40), series())


@network(bits=(4, 3), blind=True, again=True)
def encoder_without_data():
    return task(Encoder(True), padded())


@network(classes=-1, bits=(4, 3), blind=True, exact=("*mask",))
def causal_transformer_without_data():
    return task(Language(), chained(16, 48), words_lost, metric=perplexity(), likelihood="classes")


@network(bits=(4, 3), blind=True)
def rows_of_all_sizes_without_data():
    """Rows from 1e-4 to 1, which a layer after them makes equal again."""
    one = task(perceptron(), labelled(24))
    resized(one.model, torch.logspace(-4, 0, 72))
    return one


@network(bits=(4, 3), blind=True)
def perceptron_without_data():
    return task(perceptron(), labelled(24))


@network(bits=(4, 3), exact=("head.counts", "seen"))
def counts_of_tokens():
    """Counts up to millions as floats, beside an embedding."""
    counts = torch.randint(0, 5_000_000, (300,)).float()
    return {"embed.weight": torch.randn(300, 24), "head.counts": counts, "seen": torch.tensor(1_234_567)}


@network(bits=(), ratio=4)
def vectors_alone():
    """No matrix at all, as a file of gains and biases."""
    return {f"{k}.bias": torch.randn(400) for k in range(10)}


@network()
def three_hundred_small_tensors():
    """8 x 8 each: headers weigh."""
    return {f"{k}.weight": torch.randn(8, 8) / 8 for k in range(300)}


@network(bits=(4, 3), exact=("fp16.count", "flags", "index", "zero"), again=True)
def types():
    """Every type of number, matrices and vectors, no axes at all, none inside."""
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    state = {f"{name}.weight": torch.randn(64, 48).to(kind) for name, kind in kinds.items()}
    state |= {f"{name}.bias": torch.randn(64).to(kind) for name, kind in kinds.items()}
    state |= {"fp16.count": torch.tensor(3.5, dtype=torch.float16), "index": torch.arange(-40, 40).view(8, 10)}
    state |= {"flags": torch.rand(9, 9) > 0.5, "scalar": torch.tensor(0.1), "zero": torch.zeros(0, 4)}
    return state


@network(exact=("eight", "whole"))
def eight_bits():
    """float8 and int8 tensors as quantized checkpoints have them: kept bit for bit."""
    eight = torch.randn(24, 24).to(torch.float8_e4m3fn)
    whole = torch.randint(-128, 128, (24, 24), dtype=torch.int8)
    return {"eight": eight, "whole": whole, "scale": torch.rand(24), "w": torch.randn(96, 96)}


@network(bits=(4, 3), exact=("mask", "table", "inv_freq", "bn.running_var"))
def buffers_by_name_and_value():
    """-inf in a causal mask, NaN in a table, frequencies, variances: no buffer is touched."""
    table = torch.randn(8, 8)
    table[3, 3] = math.nan
    state = {"mask": torch.full((24, 24), -math.inf).triu(1), "table": table, "w": torch.randn(128, 96)}
    return state | {"inv_freq": 1e4 ** -(torch.arange(16) / 16), "bn.running_var": 1e-9 * torch.rand(32)}


@network(bits=(4, 3), again=True)
def tiny_denormal_and_constant():
    """Weights of 1e-30, of 1e-41 (denormal), and all the same."""
    return {
        "tiny": 1e-30 * torch.randn(64, 64),
        "denormal": 1e-41 * torch.randn(64, 64),
        "same": torch.full((64, 64), 0.3),
    }


@network(bits=(4, 3))
def numpy_arrays():
    """As `np.load` gives them: big-endian and not in order among them."""
    draws = np.random.default_rng(5)
    return {
        "w": draws.normal(size=(96, 64)).astype(np.float32),
        "fp64": draws.normal(size=(64, 64)),
        "turned": np.asfortranarray(draws.normal(size=(64, 48)).astype(np.float32)),
        "big": draws.normal(size=(64, 48)).astype(">f4"),
    }

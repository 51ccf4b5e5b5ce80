"""Recurrent networks, layers used many times, reparametrized weights, and embeddings of every kind."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import tersenet as tn
from networks.attention import Pooled, perplexity, words_lost
from networks.zoo import (
    TEST,
    TRAIN,
    chained,
    fitted,
    labelled,
    network,
    part,
    task,
    worded,
)


def series(channels=8, length=16, classes=4):
    """Class patterns along time: inputs [samples, length, channels]."""
    x, y = labelled(channels, length, classes=classes)
    return x.transpose(1, 2).contiguous(), y


class Recurrent(nn.Module):
    """The last state of a recurrent layer of torch, to classes."""

    def __init__(self, layer, size, first=False):
        super().__init__()
        self.layer, self.head, self.first = layer, nn.Linear(size, 4), first

    def forward(self, x):
        if self.first:
            return self.head(self.layer(x.transpose(0, 1))[0][-1])
        return self.head(self.layer(x)[0][:, -1])


@network(classes=-1, again=True)
def character_lstm():
    class Characters(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm, self.head = (
                nn.Embedding(40, 16),
                nn.LSTM(16, 40, batch_first=True),
                nn.Linear(40, 40),
            )

        def forward(self, tokens):
            return self.head(self.lstm(self.embed(tokens))[0])

    return task(Characters(), chained(12, 40), words_lost, metric=perplexity(), lr=1e-2)


@network(bits=(4, 3))
def gru_in_both_directions():
    return task(Recurrent(nn.GRU(8, 20, 2, batch_first=True, bidirectional=True, dropout=0.1), 40), series(), steps=40)


@network(again=True)
def sequence_first():
    return task(Recurrent(nn.LSTM(8, 40), 40, True), series())


class Cells(nn.Module):
    """nn.LSTMCell, step by step."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


@network(bits=(4, 3))
def lstm_cell():
    return task(Cells(), series())


class Gated(nn.Module):
    """A recurrent cell by hand: one linear layer, used at each step."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(8 + 40, 80), nn.Linear(40, 4)

    def forward(self, x):
        state = x.new_zeros(len(x), 40)
        for now in x.unbind(1):
            gate, new = self.step(torch.cat([now, state], 1)).chunk(2, 1)
            state = torch.lerp(state, torch.tanh(new), torch.sigmoid(gate))
        return self.head(state)


@network(again=True)
def recurrent_cell():
    return task(Gated(), series())


class Repeated(nn.Module):
    """One convolution, used five times."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 4)

    def forward(self, x):
        x = start = self.stem(x)
        for _ in range(5):
            x = torch.relu(self.again(x)) + start
        return self.head(x.mean((2, 3)))


@network(again=True)
def repeated_convolution():
    return task(Repeated(), labelled(3, 10, 10), lr=2e-3)


class Causal(nn.Module):
    """Dilated causal convolutions whose weights are a direction and a length (weight_norm), with a gate."""

    def __init__(self, channels, dilation):
        super().__init__()
        self.left = 2 * dilation
        self.inner = parametrizations.weight_norm(nn.Conv1d(channels, 2 * channels, 3, dilation=dilation))
        self.out = parametrizations.weight_norm(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        return x + self.out(F.glu(self.inner(F.pad(x, (self.left, 0))), 1))


@network(again=True)
def temporal_convolution():
    body = nn.Conv1d(4, 24, 1), *(Causal(24, 2**k) for k in range(3))
    return task(nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 4)), labelled(4, 24))


@network(bits=(4, 3))
def spectral_norm():
    normed = parametrizations.spectral_norm
    body = normed(nn.Conv2d(3, 24, 3)), nn.LeakyReLU(0.2), normed(nn.Conv2d(24, 24, 3, 2)), nn.LeakyReLU(0.2)
    return task(nn.Sequential(*body, nn.Flatten(), normed(nn.Linear(216, 4))), labelled(3, 10, 10))


@network()
def orthogonal():
    turned = parametrizations.orthogonal(nn.Linear(48, 48))
    net = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), turned, nn.ReLU(), nn.Linear(48, 4))
    return task(net, labelled(24), steps=30)


def read(embedding, size=16, hidden=64):
    return nn.Sequential(embedding, Pooled(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 4))


@network(again=True)
def frozen():
    """Every parameter frozen, as networks are loaded for use, and tokens for inputs: no gradient finds a way."""
    task_of = task(read(nn.Embedding(200, 16)), worded(10, 200))
    task_of.model.requires_grad_(False)
    return task_of


@network(again=True)
def large_embedding():
    """More rows than most layers have, hardly any of them read by the task's samples."""
    return task(read(nn.Embedding(5000, 8), 8), worded(16, 5000))


@network(bits=(4, 3))
def embedding_bag():
    net = nn.Sequential(nn.EmbeddingBag(300, 16, mode="mean"), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    return task(net, worded(12, 300))


@network()
def sparse_gradients():
    tokens, kinds = worded(10, 300)
    net = fitted(read(nn.Embedding(300, 16, sparse=True)), (tokens, kinds), F.cross_entropy, lr=0.1, sgd=True)
    return task(net, (tokens, kinds), steps=0)


class Ragged:
    """Batches of sequences of other lengths each time one goes on, the same at every reading."""

    def __init__(self, data, lengths):
        self.data, self.lengths = data, lengths

    def __iter__(self):
        for at, length in enumerate(self.lengths):
            x, y = part(self.data, slice(16 * at, 16 * at + 16))
            yield x[:, :length], y


@network(again=True)
def sequences_of_many_lengths():
    data = series()
    net = fitted(Recurrent(nn.GRU(8, 40, batch_first=True), 40), data, F.cross_entropy)
    lengths = [9 + (3 * k) % 8 for k in range(TRAIN // 16)]
    return tn.Task(net, Ragged(data, lengths), Ragged(part(data, slice(-TEST, None)), [16, 12, 14]))

"""Data of every form, losses and metrics of every kind, and the types that networks compute in."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tersenet as tn
from networks.layers import convolved, pooled
from networks.zoo import LEARNT, TEST, TRAIN, labelled, latents, learnt, less, network, part, task, taught, worded


def resized(net, size):
    """The network with hidden channels so many times as large, undone by the next layer: ReLU does not mind."""
    with torch.no_grad():
        net[0].weight *= size[:, None]
        net[0].bias *= size
        net[2].weight /= size
    return net


def perceptron(inputs=24, outputs=4, hidden=72):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


@network(classes=None, again=True)
def regression():
    """One output."""
    return task(perceptron(outputs=1), taught(latents(24), 1), F.mse_loss)


@network(classes=None)
def regression_without_an_axis():
    """One output, targets and outputs [samples]."""
    net = nn.Sequential(perceptron(outputs=1), nn.Flatten(0))
    inputs, wanted = taught(latents(24), 1)
    return task(net, (inputs, wanted[:, 0]), nn.SmoothL1Loss(), metric=less(correlation, over="split"))


def correlation(outputs, targets):
    """One less the correlation over a whole split, which no mean over batches gives."""
    return 1 - torch.corrcoef(torch.stack([outputs.double(), targets.double()]))[0, 1]


def pinball(outputs, targets):
    """The loss of the quantiles 0.1, 0.5 and 0.9."""
    error = targets - outputs
    share = torch.tensor([0.1, 0.5, 0.9], dtype=outputs.dtype)
    return torch.maximum(share * error, (share - 1) * error).mean()


@network(classes=None, bits=(4, 3))
def quantiles():
    inputs, wanted = taught(latents(24), 1)
    noisy = wanted + 0.3 * torch.randn(len(wanted), 1)
    return task(perceptron(outputs=3), (inputs, noisy), pinball, metric=less(pinball))


@network(classes=None, again=True)
def several_labels():
    inputs, wanted = taught(latents(24), 6)
    metric = tn.Metric(lambda outputs, targets: ((outputs > 0) == (targets > 0.5)).double().mean())
    return task(perceptron(outputs=6), (inputs, (wanted > 0.3).float()), nn.BCEWithLogitsLoss(), metric=metric)


@network(bits=(4, 3))
def lambda_loss():
    """A loss that nobody can look into, and training data in the order of their classes."""
    net, seen, test = learnt(perceptron(), labelled(24))
    ordered = part(seen, torch.argsort(seen[1], stable=True))
    return tn.Task(net, ordered, test, loss=lambda outputs, targets: 2 * F.cross_entropy(outputs, targets))


@network(again=True)
def dropout():
    """Left in training mode, as after a training loop; the loss is an object that smooths labels."""
    body = nn.Linear(24, 96), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, 64), nn.ReLU(), nn.Dropout(0.3)
    one = task(nn.Sequential(*body, nn.Linear(64, 4)), labelled(24), nn.CrossEntropyLoss(label_smoothing=0.1))
    one.model.train()
    return one


def typed(net, data, dtype):
    """A network and the inputs of its task in another type than they were trained in."""
    _, (inputs, targets), (seen, wanted) = learnt(net, data)
    return tn.Task(net.to(dtype), (inputs.to(dtype), targets), (seen.to(dtype), wanted))


@network()
def float64():
    return typed(
        nn.Sequential(convolved(3, 24), pooled(24), nn.ReLU(), perceptron(4)), labelled(3, 8, 8), torch.float64
    )


@network(again=True)
def bfloat16():
    return typed(nn.Sequential(nn.Linear(24, 64), nn.LayerNorm(64), perceptron(64)), labelled(24), torch.bfloat16)


@network(bits=(4, 3))
def numpy_of_float64():
    """As NumPy makes arrays unless told otherwise, for a model of float32."""
    net, (inputs, targets), (seen, wanted) = learnt(perceptron(), labelled(24))
    train, test = (inputs.double().numpy(), targets.numpy()), (seen.double().numpy(), wanted.numpy())
    return tn.Task(net, train, test)


class Samples(Dataset):
    """A map-style data set; its items are not tensors throughout."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[1])

    def __getitem__(self, at):
        return self.data[0][at].numpy(), int(self.data[1][at])


class Batches:
    """An iterable of batches that can be read again."""

    def __init__(self, data, size=32):
        self.data, self.size = data, size

    def __iter__(self):
        for at in range(0, len(self.data[1]), self.size):
            yield part(self.data, slice(at, at + self.size))


def served(train, test, net=None, loss=F.cross_entropy):
    """A task whose splits come in another form than arrays."""
    net, seen, other = learnt(net or perceptron(), labelled(24), loss)
    return tn.Task(net, train(seen), test(other), loss=loss)


@network(again=True)
def dataset():
    """A Dataset, for a network that gives logarithms of probabilities."""
    return served(Samples, Samples, nn.Sequential(perceptron(), nn.LogSoftmax(1)), F.nll_loss)


@network(again=True)
def shuffling_loader():
    def loader(pair):
        return DataLoader(TensorDataset(*pair), 32, shuffle=True)

    return served(loader, lambda pair: DataLoader(TensorDataset(*pair), 40))


@network()
def batches_that_can_be_read_again():
    return served(Batches, Batches)


@network()
def loader_of_dicts():
    """A loader whose batches are dicts with "labels", as of tokenized text, with a part in memory to choose by."""
    tokens, kinds = worded(10, 60)
    inputs = {"tokens": tokens, "weight": torch.rand(LEARNT + TEST, 10)}
    net, (inputs, targets), test = learnt(Named(), (inputs, kinds))
    samples = [{name: x[at] for name, x in inputs.items()} | {"labels": targets[at]} for at in range(TRAIN)]
    return tn.Task(net, DataLoader(samples, 32, shuffle=True), test, valid=part(test, slice(0, 48)))


@network()
def loader_of_triples():
    """Two inputs and a target in each batch."""
    inputs, kinds = labelled(24)
    net, ((one, other), targets), test = learnt(Halves(), ((inputs[:, :12], inputs[:, 12:]), kinds))
    return tn.Task(net, DataLoader(TensorDataset(one, other, targets), 32), test)


class Halves(nn.Module):
    """Two inputs, each through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.deep = nn.Linear(12, 16), nn.Linear(12, 16), perceptron(16)

    def forward(self, one, other):
        return self.deep(self.left(one) * torch.tanh(self.right(other)))


class Named(nn.Module):
    """Weighted words, each input by its name."""

    def __init__(self):
        super().__init__()
        self.embed, self.deep = nn.Embedding(60, 24), perceptron()

    def forward(self, tokens, weight):
        return self.deep((self.embed(tokens) * weight[..., None]).sum(1) / math.sqrt(10))

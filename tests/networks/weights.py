"""Weights that training or rounding left in an unusual state: sparse, on a grid, tiny, huge, equal."""

import torch
import torch.nn.functional as F
from torch import nn

import tersenet as tn
from networks.data import perceptron, resized
from networks.layers import convolved, pooled
from networks.zoo import labelled, latents, learnt, less, network, task, taught


def changed(net, data, change, loss=F.cross_entropy):
    """The task of a trained network whose weights of two axes and more were changed."""
    one = task(net, data, loss)
    with torch.no_grad():
        for weight in one.model.parameters():
            if weight.dim() > 1:
                weight.copy_(change(weight))
    return one


def by_row(values, weight):
    return values.reshape(-1, *[1] * (weight.dim() - 1))


@network(again=True)
def already_sparse():
    """Nine of ten weights are zero."""

    def pruned(weight):
        least = weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values
        return torch.where(weight.abs() > least, weight, 0)

    return changed(perceptron(hidden=96), labelled(24), pruned)


@network(bits=(4, 3))
def already_ternary():
    """Each row holds -a, 0 and a, with an a that fp16 holds."""

    def ternary(weight):
        scale = by_row(weight.flatten(1).abs().mean(1), weight).half().float()
        return scale * (weight / scale).round().clamp(-1, 1)

    return changed(perceptron(hidden=96), labelled(24), ternary)


@network()
def already_in_four_bits():
    """Rows are whole multiples, up to 7, of a scale that fp16 holds."""

    def four_bits(weight):
        scale = by_row(weight.flatten(1).abs().amax(1) / 7, weight).half().float()
        return scale * (weight / scale).round().clamp(-7, 7)

    return changed(perceptron(hidden=96), labelled(24), four_bits)


@network()
def dead_channels():
    """Half of the filters were set to zero, norms and all, as channel pruning leaves them."""
    one = task(nn.Sequential(convolved(3, 32), convolved(32, 32), pooled(32)), labelled(3, 10, 10))
    with torch.no_grad():
        for block in one.model[:2]:
            for values in (block[0].weight, block[1].weight, block[1].bias):
                values[::2] = 0
    return one


@network(classes=None, bits=(4, 3))
def outputs_of_ten_thousand():
    net, *splits = learnt(perceptron(outputs=3), taught(latents(24), 3), F.mse_loss)
    with torch.no_grad():
        net[-1].weight *= 1e4
        net[-1].bias *= 1e4
    return tn.Task(net, *[(x, 1e4 * y) for x, y in splits], loss=F.mse_loss, metric=less())


class Scaled(nn.Module):
    """Multiplies by a number."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


@network(again=True)
def tiny_weights():
    """Weights scaled to 1e-20, with what makes up for it after them."""
    net, *splits = learnt(perceptron(), labelled(24))
    first, relu, second, _, last = net
    with torch.no_grad():
        second.weight *= 1e-20
        second.bias *= 1e-20
    return tn.Task(nn.Sequential(first, relu, second, Scaled(1e20), nn.ReLU(), last).eval(), *splits)


@network()
def large_constants():
    """A convolution's bias and its norm's running mean of 1e5, which cancel."""
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), convolved(24, 24), pooled(24))
    one = task(net, labelled(3, 10, 10))
    with torch.no_grad():
        one.model[0].bias += 1e5
        one.model[1].running_mean += 1e5
    return one


@network(classes=None)
def one_column():
    """A network of one input, as time or a level of noise is embedded: matrices of one column."""
    net = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 24), nn.SiLU(), nn.Linear(24, 1))
    x = torch.rand(576, 1) * 4 - 2
    return task(net, (x, torch.sin(3 * x)), F.mse_loss, lr=1e-2, steps=120)


@network(bits=(4, 3))
def equal_rows():
    """All rows of the second layer but four are the same."""
    one = task(perceptron(), labelled(24))
    with torch.no_grad():
        one.model[2].weight[4:] = one.model[2].weight[4]
    return one


@network(bits=(4, 3))
def constant_layer():
    """A layer that averages: every weight the same."""
    one = task(perceptron(), labelled(24))
    with torch.no_grad():
        one.model[2].weight.fill_(1 / 72)
    return one


@network(bits=(4, 3))
def the_same_twice():
    """Two layers that are not tied but hold the same, as a student that starts from its teacher."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = perceptron(), perceptron()

        def forward(self, x):
            return self.one(x) + self.other(x.flip(1))

    one = task(Pair(), labelled(24))
    one.model.other.load_state_dict(one.model.one.state_dict())
    return one


@network(bits=(4, 3))
def rows_of_all_sizes():
    """Channels from a thousandth to a thousand times as large, undone by the next layer (ReLU does not mind)."""
    one = task(perceptron(), labelled(24))
    resized(one.model, torch.logspace(-3, 3, 72))
    return one

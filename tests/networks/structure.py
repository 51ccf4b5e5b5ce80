"""Networks of unusual structure: parts that run for some inputs only, state, several outputs, functional use."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from networks.layers import Residual, convolved, pooled
from networks.zoo import LEARNT, TEST, labelled, latents, network, task, taught, worded


class Graph(nn.Module):
    """Messages along edges [samples, 2, edges] between the nodes of each graph, added up where they arrive."""

    def __init__(self, inputs=8, size=32):
        super().__init__()
        self.embed, self.head = nn.Linear(inputs, size), nn.Linear(size, 4)
        self.sent = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.kept = nn.ModuleList(nn.Linear(size, size) for _ in range(2))

    def forward(self, nodes, edges):
        samples, count = nodes.shape[:2]
        offset = count * torch.arange(samples, device=edges.device)[:, None]
        start, end = ((edges[:, k] + offset).flatten() for k in range(2))
        x = self.embed(nodes).flatten(0, 1)
        for sent, kept in zip(self.sent, self.kept, strict=True):
            x = torch.relu(kept(x) + torch.zeros_like(x).index_add(0, end, sent(x)[start]) / 3)
        return self.head(x.view(samples, count, -1).mean(1))


@network(again=True)
def graph():
    nodes, kinds = labelled(8, 12)
    edges = torch.randint(0, 12, (LEARNT + TEST, 2, 36))
    edges[:, 1] = torch.where(torch.rand(len(edges), 36) < 0.2, edges[:, 0], edges[:, 1])
    return task(Graph(), ((nodes.transpose(1, 2).contiguous(), edges), kinds))


class Experts(nn.Module):
    """Each sample goes to one expert of four: the third is for rare samples, the last is never chosen."""

    def __init__(self, rare):
        super().__init__()
        self.rare = rare
        self.stem, self.route = nn.Linear(24, 32), nn.Linear(24, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(4))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        gates = self.route(x).softmax(1)
        chosen = torch.where(x[:, 0] > self.rare, 2, gates.argmax(1))
        x = torch.relu(self.stem(x))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            at = torch.nonzero(chosen == number)[:, 0]
            if len(at):
                y = y.index_copy(0, at, expert(x[at]) * gates[at, min(number, 1)][:, None])
        return self.head(x + y)


@network(again=True)
def experts():
    inputs, kinds = labelled(24)
    return task(Experts(float(inputs[:, 0].quantile(0.97))), (inputs, kinds))


class EarlyExit(nn.Module):
    """Batches without a hard sample leave before the deep part."""

    def __init__(self, hard):
        super().__init__()
        self.hard = hard
        self.stem = nn.Sequential(nn.Linear(24, 48), nn.ReLU())
        self.early, self.late = nn.Linear(48, 4), nn.Linear(48, 4)
        self.deep = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU())

    def forward(self, x):
        hard = bool((x[:, 0] > self.hard).any())
        x = self.stem(x)
        return self.late(self.deep(x)) if hard else self.early(x)


@network(again=True)
def early_exit():
    inputs, kinds = labelled(24)
    return task(EarlyExit(float(inputs[:, 0].quantile(0.96))), (inputs, kinds))


class Keywords(nn.Module):
    """Layers called by keyword, attention too."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Embedding(60, 32), nn.MultiheadAttention(32, 2, batch_first=True)
        self.wide, self.head = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, tokens):
        x = self.embed(input=tokens)
        x = x + self.attend(query=x, key=x, value=x, need_weights=False)[0]
        return self.head(input=torch.relu(self.wide(input=x)).mean(1))


@network(bits=(4, 3))
def keywords():
    return task(Keywords(), worded(10, 60))


class Backbone(nn.Module):
    """Features under no_grad, as where only the head is trained."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(convolved(3, 16, stride=2), convolved(16, 32), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(32 * 25, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        with torch.no_grad():
            x = self.features(x)
        return self.head(x)


@network(bits=(4, 3))
def part_without_gradients():
    return task(Backbone(), labelled(3, 10, 10))


class Stateful(nn.Module):
    """Keeps what it will add later on itself while it runs."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = convolved(3, 24), convolved(24, 24), pooled(24)
        self.skip = None

    def start(self, x):
        self.skip = self.stem(x)
        return self.skip

    def forward(self, x):
        y = self.body(self.start(x))
        return self.head(y + self.skip)


@network(again=True)
def state_while_it_runs():
    return task(Stateful(), labelled(3, 12, 12))


class Extra(nn.Linear):
    """A layer with state of its own in the state dict (get_extra_state), which its outputs hang on."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.scale = 1.5

    def get_extra_state(self):
        return torch.tensor([self.scale, 7.0], dtype=torch.float64)

    def set_extra_state(self, state):
        self.scale = float(state[0])

    def forward(self, x):
        return self.scale * super().forward(x)


@network(exact=("*_extra_state",), bits=(4, 3))
def extra_state():
    return task(nn.Sequential(Extra(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), Extra(64, 4)), labelled(24))


class Heads(nn.Module):
    """Classes and a value from one body, as a tuple."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.policy, self.value = nn.Linear(64, 5), nn.Linear(64, 3)

    def forward(self, x):
        x = self.body(x)
        return self.policy(x), self.value(x)


@network(classes=None, bits=(4, 3))
def several_heads():
    """All heads count, since the task's forward says so."""
    inputs, wanted = taught(latents(24), 8)
    return task(Heads(), (inputs, wanted), F.mse_loss, forward=lambda model, x: torch.cat(model(x), 1))


@network()
def tuple_of_outputs():
    """The first of the outputs is what counts where nothing is said."""
    return task(Heads(), labelled(24))


class Functional(nn.Module):
    """Parameters used by functions, without layers of their own; one of them is the sum of two (LoRA)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(64, 24) / 5)
        self.base, self.down = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.randn(4, 64) / 8)
        self.up, self.last = nn.Parameter(torch.randn(64, 4) / 8), nn.Parameter(torch.randn(4, 64) / 8)
        self.shift = nn.Parameter(torch.zeros(64))

    def forward(self, x):
        x = torch.relu(F.linear(x, self.first, self.shift))
        x = torch.relu(F.linear(x, self.base) + F.linear(F.linear(x, self.down), self.up))
        return x @ self.last.T


@network(bits=(4, 3))
def functional():
    return task(Functional(), labelled(24))


@network()
def bilinear():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.pair = nn.Linear(12, 16), nn.Linear(12, 16), nn.Bilinear(16, 16, 20)
            self.head = nn.Linear(20, 4)

        def forward(self, x):
            return self.head(torch.relu(self.pair(torch.tanh(self.one(x[:, :12])), torch.tanh(self.other(x[:, 12:])))))

    return task(Pairs(), labelled(24))


@network()
def prototypes():
    """Distances to learnt points: a weight that no linear operation holds."""

    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.centres = nn.Linear(24, 32), nn.Parameter(torch.randn(48, 32))
            self.head = nn.Linear(48, 4)

        def forward(self, x):
            return self.head(torch.exp(-torch.cdist(torch.tanh(self.body(x)), self.centres) / math.sqrt(32)))

    return task(Distances(), labelled(24), lr=1e-2)


@network()
def sixty_layers():
    """Many tiny layers: cost and headers are linear in them."""
    blocks = [Residual(nn.Linear(12, 12), nn.Tanh(), nn.BatchNorm1d(12)) for _ in range(60)]
    for one in blocks:
        nn.init.constant_(one.body[2].weight, 0.15)
    return task(nn.Sequential(nn.Linear(24, 12), *blocks, nn.Linear(12, 4)), labelled(24), steps=20)

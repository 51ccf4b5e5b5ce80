"""Networks for images: dense connections, segmentation, detection, generation."""

import torch
import torch.nn.functional as F
from torch import nn

import tersenet as tn
from networks.layers import Residual, convolved, pooled
from networks.zoo import labelled, latents, less, network, task, taught


class Dense(nn.Module):
    """Norm, activation, convolution; the result beside what came in (DenseNet): norms that follow no convolution."""

    def __init__(self, channels, grown):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, grown, 3, padding=1))

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


@network()
def dense_connections():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Dense(16, 16), Dense(32, 16), nn.BatchNorm2d(48), nn.ReLU(), pooled(48))
    return task(net, labelled(3, 10, 10))


class Excited(nn.Module):
    """Channels scaled by what they hold all over the image."""

    def __init__(self, channels, few):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, few, 1), nn.Conv2d(few, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(self.pool(x)))))


@network()
def squeeze_excitation():
    inner = nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.SiLU()
    depth = nn.Conv2d(48, 48, 5, padding=2, groups=48, bias=False), nn.BatchNorm2d(48), nn.SiLU(), Excited(48, 8)
    block = Residual(*inner, *depth, nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16))
    return task(nn.Sequential(convolved(3, 16, stride=2), block, convolved(16, 64, 1), pooled(64)), labelled(3, 12, 12))


class UNet(nn.Module):
    """Down and up again with a shortcut; class scores [samples, classes, height, width]."""

    def __init__(self):
        super().__init__()
        self.top, self.low = convolved(3, 16), convolved(16, 24)
        self.up, self.out = nn.ConvTranspose2d(24, 12, 2, 2), nn.Sequential(convolved(28, 12), nn.Conv2d(12, 3, 1))

    def forward(self, x):
        top = self.top(x)
        return self.out(torch.cat([top, self.up(self.low(F.max_pool2d(top, 2)))], 1))


@network(again=True)
def segmentation():
    images, _ = labelled(3, 12, 12)
    smooth = F.avg_pool2d(images, 3, 1, 1)
    return task(UNet(), (images, smooth.argmax(1)), metric=mean_intersection())


def mean_intersection():
    """Mean intersection over union of a whole split."""

    def score(outputs, targets):
        found = outputs.argmax(1)
        shares = [((found == k) & (targets == k)).sum() / ((found == k) | (targets == k)).sum() for k in range(3)]
        return sum(shares) / 3

    return tn.Metric(score, over="split")


@network(classes=None)
def generator():
    body = nn.Linear(12, 160, bias=False), nn.BatchNorm1d(160), nn.ReLU(), nn.Unflatten(1, (40, 2, 2))
    up = nn.ConvTranspose2d(40, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    net = nn.Sequential(*body, *up, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())
    noise, image = taught(latents(12), 3, 8, 8)
    return task(net, (noise, image.tanh()), F.mse_loss)


@network(classes=None)
def autoencoder():
    _, x = taught(latents(4), 48)
    encoder, decoder = (
        (nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 6)),
        (nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 48)),
    )
    return task(nn.Sequential(*encoder, *decoder), (x, x), F.mse_loss)


class Variational(nn.Module):
    """An encoder of means and spreads, noise in training only, and a decoder."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48))

    def forward(self, x):
        mean, spread = self.encode(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * torch.exp(spread) if self.training else mean
        return self.decode(code), mean, spread


@network(classes=None)
def variational():
    _, x = taught(latents(4), 48)
    return task(Variational(), (x, x), F.mse_loss)


class Siamese(nn.Module):
    """One body for two images: how alike they are."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(convolved(3, 16, stride=2), convolved(16, 32), pooled(32, 24))

    def forward(self, one, other):
        return 5 * F.cosine_similarity(self.body(one), self.body(other))


@network(classes=None, again=True)
def siamese():
    images, kinds = labelled(3, 10, 10, classes=2)
    order = torch.randperm(len(images))
    same = (kinds == kinds[order]).float()
    metric = less(lambda outputs, targets: ((outputs > 0) != (targets > 0.5)).double().mean())
    data = (images, images[order]), same
    return task(Siamese(), data, F.binary_cross_entropy_with_logits, metric=metric)


class Triplet(nn.Module):
    """One body for three images: whether the second or the third is more like the first."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 16))

    def forward(self, anchor, one, other):
        a, b, c = map(self.body, (anchor, one, other))
        return torch.stack([-(a - b).square().sum(1), -(a - c).square().sum(1)], 1)


@network()
def triplet():
    images, kinds = labelled(3, 8, 8)
    order, other = torch.randperm(len(images)), torch.randperm(len(images))
    same, else_same = kinds == kinds[order], kinds == kinds[other]
    decided = torch.nonzero(same != else_same)[:, 0]
    anchors, one, two = (images[at[decided]] for at in (torch.arange(len(images)), order, other))
    return task(Triplet(), ((anchors, one, two), else_same[decided].long()))


class Detector(nn.Module):
    """Boxes and classes at two scales: a list of (classes [samples, c, h, w], boxes [samples, 4, h, w])."""

    def __init__(self):
        super().__init__()
        self.stem, self.low = convolved(3, 16, stride=2), convolved(16, 24, stride=2)
        self.heads = nn.ModuleList([nn.Conv2d(c, 3 + 4, 3, padding=1) for c in (16, 24)])

    def forward(self, x):
        top = self.stem(x)
        found = [head(y) for head, y in zip(self.heads, (top, self.low(top)), strict=True)]
        return [(y[:, :3], y[:, 3:]) for y in found]


@network(classes=None, bits=(4, 3))
def detector():
    images, _ = labelled(3, 12, 12)
    _, wanted = taught(images, 7 * (36 + 9))

    def flat(model, inputs):
        return torch.cat([y.flatten(1) for pair in model(inputs) for y in pair], 1)

    return task(Detector(), (images, wanted), F.mse_loss, forward=flat)

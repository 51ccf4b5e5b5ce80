"""Layers of every kind: linear and convolutional, grouped, transposed, with kernels of all sizes, with every norm."""

import torch
import torch.nn.functional as F
from torch import nn

from networks.zoo import labelled, latents, less, network, task, taught


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


def convolved(inputs, outputs, kernel=3, **options):
    """A convolution, BatchNorm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def pooled(channels, classes=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@network(again=True)
def feed_forward():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    return task(net, labelled(32, classes=6))


@network(again=True)
def convolution_1d():
    body = nn.Conv1d(4, 24, 7, stride=2), nn.ReLU(), nn.Conv1d(24, 32, 5), nn.ReLU()
    return task(nn.Sequential(*body, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(64, 4)), labelled(4, 40))


@network(bits=(4, 3))
def convolution_2d():
    body = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()
    return task(nn.Sequential(*body, nn.Flatten(), nn.Linear(288, 4)), labelled(3, 12, 12))


@network(bits=(4, 3))
def convolution_3d():
    body = nn.Conv3d(1, 12, 3), nn.ReLU(), nn.Conv3d(12, 16, 3, stride=2), nn.ReLU()
    return task(nn.Sequential(*body, nn.Flatten(), nn.Linear(128, 4)), labelled(1, 8, 8, 8))


def inverted(channels, wide):
    inner = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
    depth = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
    return Residual(*inner, *depth, nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))


@network(bits=(4, 3))
def depthwise():
    net = nn.Sequential(convolved(3, 16, stride=2), inverted(16, 64), inverted(16, 64), pooled(16))
    return task(net, labelled(3, 12, 12))


@network(bits=(4, 3))
def grouped():
    net = nn.Sequential(convolved(3, 32), Residual(convolved(32, 32, groups=4), convolved(32, 32, 1)), pooled(32))
    return task(net, labelled(3, 10, 10))


@network(classes=None, bits=(4, 3))
def transposed_1d():
    body = nn.Linear(8, 128), nn.ReLU(), nn.Unflatten(1, (32, 4)), nn.ConvTranspose1d(32, 20, 5, 2), nn.ReLU()
    return task(nn.Sequential(*body, nn.ConvTranspose1d(20, 2, 4, 2)), taught(latents(8), 2, 24), F.mse_loss)


@network(classes=None, again=True)
def transposed_2d():
    body = nn.Linear(8, 144), nn.ReLU(), nn.Unflatten(1, (16, 3, 3))
    up = nn.ConvTranspose2d(16, 24, 3, 2, padding=1, output_padding=1), nn.ReLU(), nn.ConvTranspose2d(24, 3, 4, 2, 1)
    return task(nn.Sequential(*body, *up), taught(latents(8), 3, 12, 12), F.mse_loss)


@network(classes=None, bits=(4, 3))
def transposed_3d():
    body = nn.Linear(8, 96), nn.ReLU(), nn.Unflatten(1, (12, 2, 2, 2)), nn.ConvTranspose3d(12, 16, 3), nn.ReLU()
    return task(nn.Sequential(*body, nn.ConvTranspose3d(16, 2, 2, 2)), taught(latents(8), 2, 8, 8, 8), F.mse_loss)


@network(classes=None, bits=(4, 3))
def transposed_grouped():
    body = nn.Linear(8, 144), nn.ReLU(), nn.Unflatten(1, (16, 3, 3))
    up = nn.ConvTranspose2d(16, 32, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(32, 6, 4, 2, groups=2)
    return task(nn.Sequential(*body, *up), taught(latents(8), 6, 12, 12), F.mse_loss)


class SamePadded(nn.Conv2d):
    """TensorFlow's SAME padding, as ported networks have it: more at the end than at the start, in its own forward."""

    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@network(again=True)
def same_padded():
    body = SamePadded(3, 16, 3, 2), nn.ReLU(), SamePadded(16, 16, 5, 2, groups=16), nn.ReLU(), SamePadded(16, 48, 3)
    return task(nn.Sequential(*body, nn.BatchNorm2d(48), nn.ReLU(), pooled(48)), labelled(3, 12, 12))


@network(classes=None, again=True)
def pitch_tracker():
    pitch = torch.rand(576)
    wave = torch.sin(torch.arange(640) * (0.02 + 0.2 * pitch[:, None])) + 0.1 * torch.randn(576, 640)
    bins = (-((torch.linspace(0, 1, 24) - pitch[:, None]) ** 2) / 0.005).exp()
    body = nn.ZeroPad2d((0, 0, 254, 254)), nn.Conv2d(1, 12, (512, 1), (16, 1)), nn.ReLU(), nn.BatchNorm2d(12)
    deep = nn.MaxPool2d((2, 1)), nn.Conv2d(12, 8, (16, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(40, 24)
    metric = less(lambda outputs, targets: (outputs.argmax(1) - targets.argmax(1)).abs().double().mean())
    return task(
        nn.Sequential(*body, *deep), (wave[:, None, :, None], bins), F.binary_cross_entropy_with_logits, metric=metric
    )


@network()
def large_kernels():
    big = nn.Conv2d(6, 6, 31, padding=15, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU()
    return task(nn.Sequential(convolved(3, 6, 1), Residual(*big), pooled(6)), labelled(3, 10, 10), steps=20)


@network(again=True)
def residual():
    block = convolved(16, 16), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    down = nn.ReLU(), convolved(16, 24, stride=2)
    return task(nn.Sequential(convolved(3, 16), Residual(*block), *down, pooled(24)), labelled(3, 12, 12))


@network(bits=(4, 3))
def norm_without_affine():
    body = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24, affine=False), nn.ReLU(), nn.Conv2d(24, 24, 3)
    rest = nn.BatchNorm2d(24, affine=False), nn.ReLU(), pooled(24)
    return task(nn.Sequential(*body, *rest), labelled(3, 10, 10))


class Beside(nn.Module):
    """A convolution whose output goes to a norm and elsewhere, so that its norm may not be folded into it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.second, self.after, self.head = nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), pooled(24)

    def forward(self, x):
        x = self.first(x)
        return self.head(torch.relu(self.after(self.second(torch.relu(self.norm(x))))) + torch.sigmoid(x))


@network(again=True)
def norm_beside():
    return task(Beside(), labelled(3, 10, 10))


@network(bits=(4, 3))
def group_norm():
    body = nn.Conv2d(3, 24, 3, bias=False), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.GroupNorm(1, 24)
    return task(nn.Sequential(*body, nn.ReLU(), pooled(24)), labelled(3, 10, 10))


@network()
def instance_norm():
    norms = nn.InstanceNorm2d(24, affine=True), nn.InstanceNorm2d(24, affine=True, track_running_stats=True)
    body = nn.Conv2d(3, 24, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), norms[1], nn.ReLU()
    return task(nn.Sequential(*body, nn.Conv2d(24, 8, 3, 2), nn.Flatten(), nn.Linear(128, 4)), labelled(3, 10, 10))


@network(bits=(4, 3))
def layer_norm():
    wide = nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)
    return task(nn.Sequential(nn.Linear(24, 48), Residual(*wide), nn.LayerNorm(48), nn.Linear(48, 5)), labelled(24))

"""How training images are varied, as those who trained the networks varied them."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLACK = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])  # as the CIFAR networks see it


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of digits moved by up to two pixels."""
    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    return F.pad(x, (2, 2, 2, 2))[..., 2 + dy : 30 + dy, 2 + dx : 30 + dx]


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [3, n, n] moved by up to four pixels over black, half of them mirrored.

    The black matters: the running statistics of the networks' norms hold it, and training without it moves them by a
    third, which costs two to three points of accuracy.
    """
    count, _, height, width = images.shape
    padded = BLACK.to(images).view(1, 3, 1, 1).expand(count, 3, height + 8, width + 8).clone()
    padded[:, :, 4:-4, 4:-4] = images
    moved = torch.randint(0, 9, (2, count, 1), generator=generator)
    rows, columns = moved[0] + torch.arange(height), moved[1] + torch.arange(width)
    mirror = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    every = torch.arange(count)[:, None, None]
    return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

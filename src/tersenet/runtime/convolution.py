"""Sparse convolutions without a copy of the image for each weight."""

from typing import NamedTuple

import numpy as np

from tersenet.runtime.forms import Array, SparseRows


class Side(NamedTuple):
    """One axis of a convolution."""

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    def positions(self, n: int) -> int:
        """How many outputs n inputs have."""
        return (n + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def rooms(self, n: int) -> int:
        """How many inputs each of the strides' places has, padding and all."""
        return -(-(n + self.before + self.after) // self.stride)


def convolved(form: SparseRows, images: Array, sides: tuple[Side, Side], threads: int = 1) -> Array:
    """A convolution of images [n, channels, height, width] without groups or a bias: [n, rows, height, width].

    Pixels whose places differ by a stride lie side by side, so that each weight is multiplied by one window that holds
    all outputs, and what lies between their lines.
    """
    count, channels, height, width = images.shape
    (down, across), rows = sides, len(form.starts) - 1
    if channels * down.kernel * across.kernel != form.width:
        raise ValueError(f"images have {channels} channels, which the weight's {form.width} columns are not for")
    tall, wide = down.positions(height), across.positions(width)
    if tall < 1 or wide < 1:
        raise ValueError(f"images of {height} x {width} are smaller than the kernel")
    lines, places = down.rooms(height), across.rooms(width)
    plane = count * lines * places
    if channels * plane * down.stride * across.stride >= 1 << 31:  # places have 32 bits
        if count < 2:
            raise ValueError(f"an image of {channels} x {height} x {width} is too large for a sparse convolution")
        return np.concatenate([convolved(form, part, sides, threads) for part in np.array_split(images, 2)])
    room: Array = np.zeros((channels, count, lines * down.stride, places * across.stride), np.float32)
    room[:, :, down.before : down.before + height, across.before : across.before + width] = images.transpose(1, 0, 2, 3)
    if down.stride > 1 or across.stride > 1:
        split = room.reshape(channels, count, lines, down.stride, places, across.stride)
        room = np.ascontiguousarray(split.transpose(0, 3, 5, 1, 2, 4))
    y_at, x_at = (side.dilation * np.arange(side.kernel) for side in sides)
    tap_y = y_at % down.stride * across.stride * plane + y_at // down.stride * places
    tap_x = x_at % across.stride * plane + x_at // across.stride
    taps = tap_y[:, None] + tap_x
    block = down.stride * across.stride * plane
    place = (np.arange(channels)[:, None, None] * block + taps).reshape(-1).astype(np.int32)
    last = int(y_at[-1] // down.stride * places + x_at[-1] // across.stride)
    sums: Array = np.empty((rows, plane), np.float32)
    if count:
        form.windows(room, place, plane - last, threads, sums)
    found = sums.reshape(rows, count, lines, places)[:, :, :tall, :wide]
    return np.ascontiguousarray(found.transpose(1, 0, 2, 3))

"""Dense arrays: how a file holds those of NumPy and torch, and how far two of them are apart."""

import math
import sys
from typing import Any

import numpy as np

from tersenet.container import DTYPES, FLOATS, STAND_IN
from tersenet.packed import Array

CHUNK = 1 << 20  # values that are compared at a time


def as_stored(name: str, value: Any) -> tuple[Array, str]:
    """A NumPy array or torch tensor as a `Tensor` holds it, and its type's name; may share memory with the value.

    Raises ValueError, naming the tensor, for what is no dense array of a type that a file knows.
    """
    if hasattr(value, "data_ptr"):
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_meta or hasattr(value, "materialize"):  # the second: a lazy layer that never ran
            raise ValueError(f"{name}: holds no data (a meta tensor or an unused lazy layer); load its weights first")
        if value.layout != sys.modules["torch"].strided:
            kind = f"{value.layout} {kind}".removeprefix("torch.")
        value = value.detach().cpu() if kind in DTYPES else value
        if kind in STAND_IN:
            value = value.view(sys.modules["torch"].int16 if kind == "bfloat16" else sys.modules["torch"].uint8)
        array: Array = value.numpy() if kind in DTYPES else None
    else:
        array = np.asarray(value)
        kind = array.dtype.newbyteorder("=").name
    if kind not in DTYPES:
        raise ValueError(f"{name}: cannot store {kind}; convert it to dense numbers of up to 64 bits, or leave it out")
    if kind == "bfloat16":
        return np.asarray(np.left_shift(array.view(np.uint16), 16, dtype=np.uint32)).view(np.float32), kind
    return array.view(np.uint8) if kind in STAND_IN else array.astype(kind, copy=False), kind


def place(value: Array) -> Any:
    """Where the numbers lie in memory and how they are laid out, as tied tensors share it; None without numbers."""
    if hasattr(value, "data_ptr"):
        return (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if value.numel() else None
    known = isinstance(value, np.ndarray) and value.size
    return (value.ctypes.data, value.shape, value.strides, value.dtype) if known else None


def relative_error(array: Array, original: Array) -> float:
    """||original - array|| / ||original|| in float64; nothing is too small or too large to be seen.

    Values that are equal, NaN too, or become so in the type of `array`, differ by 0. Infinite where zeros came back as
    something else, and where one of the two alone is NaN or infinite.
    """
    lost, whole = [], []
    for begin in range(0, array.size, CHUNK):
        now, was = (values.reshape(-1)[begin : begin + CHUNK] for values in (array, original))
        with np.errstate(all="ignore"):
            difference = now.astype(np.float64) - was.astype(np.float64)
            difference[same(now, was.astype(now.dtype))] = 0
        lost.append(_norm(difference))
        whole.append(_norm(was[np.isfinite(was)].astype(np.float64)))
    error, norm = math.hypot(*lost), math.hypot(*whole)
    if not error:
        return 0.0
    return error / norm if norm and error < math.inf else math.inf


def _norm(values: Array) -> float:
    """The L2 norm, taken of values over their largest, whose squares neither vanish nor overflow."""
    largest = float(np.abs(values).max(initial=0))
    if not 0 < largest < math.inf:
        return 0.0 if largest == 0 else math.inf
    return largest * math.sqrt(np.square(values / largest).sum())


def same(array: Array, other: Array) -> Array:
    """Where two arrays are equal, NaN to NaN too."""
    return (array == other) | (np.isnan(array) & np.isnan(other))


def numbers(array: Array, dtype: str) -> Array:
    """What the stored array stands for: 8-bit floats lie there as bytes, which torch can read."""
    if dtype in FLOATS or dtype not in STAND_IN:
        return array
    import torch

    return torch.from_numpy(np.array(array)).view(getattr(torch, dtype)).float().numpy()

"""3LC's codec (Lim, Andersen, Kaminsky, "3LC: Lightweight and Effective Traffic Compression", MLSys 2019).

Three-value quantization with sparsity multiplication, error accumulation, quartic and zero-run encoding: float32 values
to a scale and bytes. Two choices that the paper leaves open: |B| = M/2 becomes 0, and padding counts as zero.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersenet import native
from tersenet.codecs.stream import FormatError

Floats = NDArray[np.float32]
HEADER = 4  # M, float32
ZEROS, LONGEST = 121, 14  # the byte of five zeros, and how many of them one byte may stand for
LOWEST = 2.0**-100  # with less, what is carried over might be no normal number, which some processors round to 0
POWERS = np.array([81, 27, 9, 3, 1], np.int32)


def encode(values: Floats, residual: Floats, sparsity: float) -> bytes:
    """B = values + residual as M = s max|B| and digits q of B/M in {-1, 0, 1}; the residual becomes B - M q, in place.

    B = M q + residual holds exactly: where q is not 0, B lies between M/2 and M, and their difference is a float
    (Sterbenz). At most 1.6 bits a value, rounded up to a byte, and `HEADER`, which is all that zeros cost. Both arrays
    are [n] float32, C order. Raises ValueError, with the residual as it was, where B is not finite or M would not be.
    """
    scale, out = np.array([sparsity], np.float32), np.empty(-(-values.size // 5), np.uint8)
    if not 1 <= scale[0] < 2:
        raise ValueError(f"the sparsity multiplier is at least 1 and less than 2, not {sparsity}")
    if residual.shape != values.shape:
        raise ValueError(f"has {values.size} values, and {residual.size} were left out before")
    done = native.call("threelc_encode", values, residual, values.size, scale, out, out.size)
    if done is None:
        done = _encode(values, residual, scale, out)
    if done < 0:
        raise ValueError("holds NaN, infinity, or values whose scale would be infinite")
    return scale.astype("<f4").tobytes() + out[:done].tobytes()


def decode(data: bytes, size: int) -> Floats:
    """M q of `size` values; raises FormatError for all but what `encode` makes of so many."""
    if len(data) < HEADER:
        raise FormatError("a 3LC payload ends before its scale")
    scale = np.frombuffer(data, "<f4", 1).astype(np.float32)
    coded, out = np.frombuffer(data, np.uint8, offset=HEADER), np.empty(size, np.float32)
    done = native.call("threelc_decode", coded, coded.size, scale, size, out)
    if done is None:
        done = _decode(coded, scale, out)
    if done < 0:
        raise FormatError("a 3LC payload is damaged or of another number of values")
    return out


def _encode(values: Floats, residual: Floats, scale: Floats, out: Any) -> int:
    with np.errstate(all="ignore"):
        whole = values + residual
        largest = np.abs(whole).max(initial=0)
        scale *= largest
    if not np.isfinite(scale[0]):
        return -1
    if largest < LOWEST:
        residual[:], scale[:] = whole, 0
        return 0
    half = scale / 2
    q = (whole > half).astype(np.int32) - (whole < -half)
    residual[:] = whole - scale * q.astype(np.float32)
    codes = POWERS @ (np.pad(q, (0, -q.size % 5)).reshape(5, -1) + 1)
    starts = np.flatnonzero(np.diff(codes == ZEROS, prepend=False))
    coded, at = bytearray(), 0
    for begin, end in zip(starts[::2], [*starts[1::2], codes.size], strict=False):
        coded += codes[at:begin].astype(np.uint8).tobytes()
        whole_runs, rest = divmod(int(end - begin), LONGEST)
        coded += b"\xff" * whole_runs + (bytes([ZEROS if rest == 1 else 241 + rest]) if rest else b"")
        at = end
    coded += codes[at:].astype(np.uint8).tobytes()
    out[: len(coded)] = np.frombuffer(coded, np.uint8)
    return len(coded)


def _decode(coded: Any, scale: Floats, out: Floats) -> int:
    if not math.isfinite(scale[0]) or np.signbit(scale[0]):
        return -1
    if scale[0] == 0:
        out[:] = 0
        return -1 if coded.size else 0
    zeros = (coded == ZEROS) | (coded >= 243)
    runs = np.where(coded >= 243, coded.astype(np.int64) - 241, 1)
    partition = -(-out.size // 5)
    if runs.sum() != partition or (zeros[:-1] & zeros[1:] & (coded[:-1] != 255)).any():
        return -1
    codes = np.repeat(np.where(zeros, ZEROS, coded).astype(np.int32), runs)
    q = (codes // POWERS[:, None] % 3 - 1).reshape(-1)
    if q[out.size :].any():
        return -1
    out[:] = scale * q[: out.size].astype(np.float32) + np.float32(0)  # no -0.0
    return out.size

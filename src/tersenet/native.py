"""The C core, loaded with ctypes; where there is none that fits, every caller falls back to its NumPy twin."""

import ctypes
import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
ABI = 6  # TERSE_ABI in native/terse.h, which goes up with every change there


class Model(ctypes.Structure):
    """terse_model: how the context coder walks a matrix, and its settings."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "width")],
        ("column", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("kernel_rows", "kernel_columns")],
        *[(name, ctypes.c_int32) for name in ("places", "low", "high", "slow", "blend", "memory", "settle")],
        *[(name, ctypes.c_int32) for name in ("signs", "trellis")],
        ("prior", ctypes.c_void_p),
    ]


ARRAY = 12  # int64 of a terse_array: a stream of the context coder, and where its integers go


class Steps(ctypes.Structure):
    """terse_feedback_steps: what error feedback goes by."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("lines", "values", "line_width", "value_width")],
        *[(name, ctypes.c_void_p) for name in ("line", "value", "edge", "profile", "bits")],
        ("contexts", ctypes.c_int32),
        ("highest", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("kept", "weight")],
    ]


def opened(path: Path) -> ctypes.CDLL:
    """The C core in a file; raises OSError where there is none that may be called from here."""
    if not path.exists():
        raise OSError("tersenet was installed without its C core")
    core = ctypes.CDLL(str(path))
    found = core.terse_abi() if hasattr(core, "terse_abi") else "none"
    if found == 0:
        raise OSError(f"the C core in {path} was compiled so that it rounds or orders bytes as no other does")
    if found != ABI:
        raise OSError(f"the C core in {path} belongs to another tersenet (ABI {found}, not {ABI}); install it again")
    sizes, expected = (ctypes.c_int64 * 3)(), [ctypes.sizeof(Model), 8 * ARRAY, ctypes.sizeof(Steps)]
    core.terse_sizes(sizes)
    if list(sizes) != expected:
        raise OSError(f"the C core in {path} has structs of {list(sizes)} bytes, not {expected}; install it again")
    return core


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C core, or None where this installation has none that fits, which is said once."""
    try:
        return opened(Path(__file__).with_name(f"_terse{SUFFIX}"))
    except OSError as wrong:
        warnings.warn(f"{wrong}. NumPy does its work: the same bytes, slower.", RuntimeWarning, stacklevel=2)
        return None


@functools.cache
def simd() -> int:
    """What rANS may use here: 2 AVX-512, 1 AVX2, 0 the portable path."""
    found = library()
    if found is None:
        return 0
    flags = int(found.terse_simd())
    return 2 if flags & 2 else flags & 1


def call(name: str, *arguments: Any) -> int | None:
    """Call `terse_<name>`: arrays and None go as pointers, integers as int64 or, where NumPy typed them, as that type.

    Returns what C returned (a count, or a negative error), or None where there is no library.
    """
    found = library()
    return None if found is None else int(_function(found, name)(*[_argument(a) for a in arguments]))


@functools.cache
def _function(core: ctypes.CDLL, name: str) -> Any:
    function = getattr(core, f"terse_{name}")
    function.restype = ctypes.c_int64
    return function


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, np.int32):
        return ctypes.c_int32(int(value))
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value

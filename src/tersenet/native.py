"""The C core, loaded with ctypes; where no library was built, every caller falls back to its NumPy twin."""

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C core, or None where this installation has none."""
    path = Path(__file__).with_name(f"_terse{SUFFIX}")
    return ctypes.CDLL(str(path)) if path.exists() else None


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
    if library() is None:
        return None
    return int(_function(name)(*[_argument(a) for a in arguments]))


@functools.cache
def _function(name: str) -> Any:
    function = getattr(library(), f"terse_{name}")
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

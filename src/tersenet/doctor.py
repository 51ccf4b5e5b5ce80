"""What this installation has and lacks: versions, the C core, cores that the process may use, the extras."""

import importlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import numpy as np

from tersenet import cores, native

SIMD = {0: "no vector instructions", 1: "AVX2", 2: "AVX-512"}
EXTRAS = ("torch", "report", "demo", "all")


def diagnosis() -> list[str]:
    """Lines of 'what: how it is'."""
    found = [
        f"tersenet: {_version('tersenet')} in {Path(__file__).parent}",
        f"Python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"NumPy: {np.__version__}",
        f"torch: {_torch()}",
        f"core: {_core()}",
        f"cores: {cores.usable()} of {os.cpu_count()} may be used",
    ]
    return [*found, *(f"[{extra}]: {_extra(extra)}" for extra in EXTRAS)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> str:
    if _version("torch") is None:
        return "not there; loading and unpacking do without, the rest needs pip install 'tersenet[torch]'"
    try:
        torch = importlib.import_module("torch")
    except Exception as wrong:  # a broken installation raises almost anything
        return f"{_version('torch')}, which cannot be imported: {wrong}"
    return f"{torch.__version__}, {'CUDA' if torch.cuda.is_available() else 'without CUDA'}"


def _core() -> str:
    path = Path(native.__file__).with_name(f"_terse{native.SUFFIX}")
    try:
        native.opened(path)
    except OSError as wrong:
        return f"{wrong}; the NumPy twins serve: the same bytes, slower"
    return f"{path}, ABI {native.ABI}, {SIMD[native.simd()]}"


def _extra(extra: str) -> str:
    """Whether the packages of an extra are there, or which are not."""
    wanted = _packages(extra)
    missing = sorted(package for package in wanted if _version(package) is None)
    return f"missing {', '.join(missing)}; pip install 'tersenet[{extra}]'" if missing else "all there"


def _packages(extra: str) -> set[str]:
    """The packages that an extra asks for, and the extras in it."""
    found = set[str]()
    for line in metadata.requires("tersenet") or ():
        wanted, _, marker = line.partition(";")
        package = re.match(r"[\w.-]+", wanted)
        if package and re.search(rf"extra\s*==\s*['\"]{extra}['\"]", marker):
            inner = re.search(r"\[(.*)\]", wanted)
            found |= _packages(inner[1]) if package[0] == "tersenet" and inner else {package[0]}
    return found

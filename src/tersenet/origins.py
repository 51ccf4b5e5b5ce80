"""Where code and data come from: the names that code reads, installed packages, our own sources, files under a path."""

import contextlib
import dis
import functools
import hashlib
import importlib.util
import os
import platform
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any


def globals_read(code: types.CodeType) -> Iterator[list[str]]:
    """The global names that some code reads, each with the attributes that it takes of it at once."""
    name: list[str] = []
    for step in dis.get_instructions(code):
        if name and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name.append(step.argval)
        elif step.opname != "EXTENDED_ARG":
            if name:
                yield name
            name = [step.argval] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
    if name:
        yield name


def imported(code: types.CodeType, package: str) -> Iterator[str]:
    """The modules that some code imports while it runs."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for k, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level, names = steps[k - 2].argval, steps[k - 1].argval
            module = importlib.util.resolve_name("." * level + step.argval, package) if level else step.argval
            yield module
            yield from (f"{module}.{name}" for name in names or ())


def named(module: str, qualname: str) -> Any:
    """What a loaded module has under a name with dots, or None."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def spec_of(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def installed(top: str) -> str | None:
    """The version of a package of the standard library (empty), of tersenet (empty) or installed; else None."""
    if top in ("tersenet", "builtins"):
        return ""  # its sources are in every key
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None) if module is not None else getattr(spec_of(top), "origin", None)
    if top in sys.stdlib_module_names and (file in (None, "built-in", "frozen") or _beside_os(file)):
        return ""
    if file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return None
    return _released(top) or getattr(module, "__version__", None)


def versions() -> dict[str, str]:
    """What results are made with: versions of tersenet and of what it stands on, and the kind of machine."""
    found = {"machine": platform.machine(), "python": ".".join(map(str, sys.version_info[:2]))}
    return found | {name: _released(name) or "" for name in ("tersenet", "torch", "numpy")}


@functools.cache
def _released(top: str) -> str | None:
    """The version under which a package was installed, which may have another name than it is imported by."""
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(top)
        return metadata.version(names[0]) if names else None


def _beside_os(file: str) -> bool:
    """Whether a file lies in the standard library's folder."""
    folder = Path(os.__file__).resolve().parent
    return folder in Path(file).resolve().parents and "site-packages" not in Path(file).parts


@functools.cache
def sources() -> bytes:
    """A hash of tersenet's own sources and of its native library."""
    mark, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.glob("_terse.*")]):
        mark.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return mark.digest()


def files_of(path: str, most: int) -> list[str] | None:
    """Name, size and time of the file at a path or of all under a folder, sorted; None where there are too many.

    None are found where the text is no path.
    """
    if "\0" in path or not os.path.exists(path):
        return []
    found = list[str]()
    for name in (
        [path] if os.path.isfile(path) else (os.path.join(at, n) for at, _, names in os.walk(path) for n in names)
    ):
        with contextlib.suppress(OSError):  # a link to nothing
            known = os.stat(name)
            found.append(f"{name} {known.st_size} {known.st_mtime_ns}")
        if len(found) > most:
            return None
    return sorted(found)

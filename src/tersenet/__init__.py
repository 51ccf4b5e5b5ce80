"""tersenet turns a trained network into the smallest file that still does its job, proves it, and runs it.

Loading needs NumPy alone; what needs torch is imported when it is first asked for.
"""

from importlib import import_module
from typing import Any

from tersenet.artifact import Artifact, Coding, load
from tersenet.codecs import FormatError

__all__ = [
    "Artifact",
    "Budget",
    "Coding",
    "FormatError",
    "Metric",
    "Schedule",
    "Task",
    "Teacher",
    "Where",
    "compress",
    "load",
    "papers",
    "verify",
]

_LATER = {
    "Budget": "budget",
    "Metric": "task",
    "Schedule": "task",
    "Task": "task",
    "Teacher": "teacher",
    "Where": "where",
    "compress": "promise",
    "verify": "promise",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tersenet")
    if name == "papers":
        return import_module("tersenet.papers")
    if name in _LATER:
        return getattr(import_module(f"tersenet.{_LATER[name]}"), name)
    raise AttributeError(f"module 'tersenet' has no attribute {name!r}")

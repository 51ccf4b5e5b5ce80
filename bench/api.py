"""Writes the page of Python names from signatures and docstrings.

Run: python bench/api.py docs/api.md (`make docs` does)
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import tersenet
from tersenet import information, papers, recipe_file, run, sequence
from tersenet.runtime import attaching, kernels, measure, modules

PLACE = re.compile(r"<function (\w+) at 0x\w+>")  # a default, with where it lies in memory
MODULES = re.compile(r"\b(?:[a-z_]+\d*\.)+(?=[A-Za-z])")  # before a type's name
WIDTH = 100
WHOLE = (information, sequence, attaching, modules, kernels, measure)  # whose public names are all listed


def signature(name: str, what: Callable[..., Any]) -> str:
    """How it is called, on one line or a parameter a line."""
    found = inspect.signature(what)
    kept = [p for p in found.parameters.values() if p.name != "self"]
    returned = f" -> {inspect.formatannotation(found.return_annotation)}" if inspect.isfunction(what) else ""
    if found.return_annotation is found.empty:
        returned = ""
    text = f"{name}{found.replace(parameters=kept, return_annotation=found.empty)}{returned}"
    if len(MODULES.sub("", text)) > WIDTH:
        star = next((k for k, p in enumerate(kept) if p.kind is p.KEYWORD_ONLY), len(kept))
        lines = [*map(str, kept[:star]), *(["*"] if star < len(kept) else []), *map(str, kept[star:])]
        text = f"{name}(\n    " + ",\n    ".join(lines) + f",\n){returned}"
    return MODULES.sub("", PLACE.sub(r"\1", text))


def prose(what: Any) -> str:
    """Its docstring as Markdown: marks of Markdown that are not meant so are escaped, examples are blocks."""
    parts = []
    for part in (inspect.getdoc(what) or "").split("\n\n"):
        if part.startswith(">>>"):
            parts.append(f"```pycon\n{part}\n```")
        else:
            pieces = re.split(r"(`[^`]*`)", part)
            parts.append("".join(p if p.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", p) for p in pieces))
    return "\n\n".join(parts)


def entry(name: str, what: Any, level: int = 3) -> Iterator[str]:
    """A name with its signature and docstring, a class with its public methods."""
    yield f"{'#' * level} {name}\n"
    if callable(what) and not (inspect.isclass(what) and issubclass(what, Exception)):
        yield f"```py\n{signature(what.__name__, what)}\n```\n"
    yield f"{prose(what)}\n"
    if inspect.isclass(what):
        for key, member in vars(what).items():
            member = member.__func__ if isinstance(member, staticmethod) else member
            if key.startswith("_") or not member.__doc__:  # its own: torch has others for modules
                continue
            if inspect.isfunction(member):
                yield f"```py\n{what.__name__}.{signature(key, member)}\n```\n\n{prose(member)}\n"
            elif isinstance(member, property):
                yield f"```py\n{what.__name__}.{key}\n```\n\n{prose(member)}\n"


def page() -> Iterator[str]:
    """The whole page."""
    yield "# Python names\n\nMade from the docstrings. `import tersenet as tn` gives all names of the first part.\n"
    yield "## tersenet\n"
    for name in sorted(tersenet.__all__, key=str.lower):
        if name != "papers":
            yield from entry(name, getattr(tersenet, name))
    yield from entry("Result", run.Result)
    yield "## tersenet.papers\n\nEach gives a recipe, a tuple of stages. `--recipe` takes the name in brackets.\n"
    for name, what in papers.PAPERS.items():
        yield from entry(f"{what.__name__} ({name})", what)
    tables = {
        "Stages": (recipe_file.STAGES, "A recipe is a tuple of these; in YAML they have the names in brackets."),
        "Methods": (recipe_file.METHODS, "What a weight may become, for rules and the stages that pack."),
        "Searches": (recipe_file.SEARCHES, "For the stage `SearchChannels`."),
    }
    for heading, (table, said) in tables.items():
        yield f"## {heading}\n\n{said}\n"
        for name, what in table.items():
            yield from entry(f"{what.__name__} ({name})", what)
            yield f"`from {what.__module__} import {what.__name__}`\n"
    for module in WHOLE:
        yield from public(module)


def public(module: ModuleType) -> Iterator[str]:
    """A module with the classes and functions that it makes public, in its order."""
    yield f"## {module.__name__}\n\n{prose(module)}\n"
    for name, what in vars(module).items():
        own = (inspect.isclass(what) or inspect.isfunction(what)) and what.__module__ == module.__name__
        if own and not name.startswith("_"):
            yield from entry(name, what)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(page()))

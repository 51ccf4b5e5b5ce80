"""The user's own Python file with a function `task() -> tersenet.Task`, and blame for what goes wrong in it."""

import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from tersenet.task import Task


def task_of(path: Path) -> Task:
    """Run the file and its `task()`; raises ValueError or OSError with one line for whatever else it does than that."""
    path.stat()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)  # where dataclasses and pickles look for it
    with blamed(path):
        try:
            spec.loader.exec_module(module)
        except SyntaxError as wrong:
            raise ValueError(f"{wrong.filename or path}, line {wrong.lineno}: {wrong.msg}") from None
        if not callable(getattr(module, "task", None)):
            raise ValueError(f"{path}: has no function task() -> tersenet.Task")
        try:
            inspect.signature(module.task).bind()
        except TypeError as wrong:
            raise ValueError(f"{path}: task() is called without arguments: {wrong}") from None
        task = module.task()
    if not isinstance(task, Task):
        raise ValueError(f"{path}: task() returned {type(task).__name__}, not a tersenet.Task")
    return task


@contextlib.contextmanager
def blamed(path: Path | None) -> Iterator[None]:
    """Turn what goes wrong in the user's file into a ValueError that names file, line and kind of error.

    Where a package is missing that tersenet needs too, the ImportError is left as it is.
    """
    try:
        yield
    except (Exception, SystemExit) as wrong:
        frames = traceback.extract_tb(wrong.__traceback__)
        lines = [frame.lineno for frame in frames if path and frame.filename == os.path.abspath(path)]
        if not lines or (isinstance(wrong, ImportError) and wrong.name == "torch"):
            raise
        raise ValueError(f"{path}, line {lines[-1]}: {type(wrong).__name__}: {wrong}") from wrong

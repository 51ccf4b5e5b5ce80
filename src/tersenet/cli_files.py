"""What commands read and write: refused before any work where it cannot be, and named where it is bad."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tersenet.artifact import Artifact
from tersenet.codecs import FormatError
from tersenet.replacing import write_atomically
from tersenet.sources import Checkpoint

TASK = Annotated[Path | None, typer.Option("--task", help="Your Python file with a function task() -> tersenet.Task")]
METADATA_CAP = 30_000  # bytes of a checkpoint's own text that are kept; a file's notes hold 64 KiB in all


def check_output(output: Path, *inputs: Path | None) -> None:
    """Refuse before any work what could not be written in the end, or would replace what was read."""
    try:
        folder = output.resolve().parent
    except RuntimeError:
        raise ValueError(f"{output}: is a link that leads to itself; give another name") from None
    if not folder.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write to")
    if output.exists() and not output.is_file():
        raise ValueError(f"{output}: is there and is no file; give another name")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: you may not write to this folder; give another one with -o")
    if output.exists() and any(path and path.exists() and output.samefile(path) for path in inputs):
        raise ValueError(f"{output}: is what is read; give another name with -o")


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Name the file that is bad."""
    try:
        yield
    except FormatError as wrong:
        raise FormatError(f"{path}: {wrong}") from None


@contextlib.contextmanager
def running(path: Path | None) -> Iterator[Any]:
    """The task of the user's file, None without one; what its code raises is told with its line."""
    if path is None:
        yield None
        return
    from tersenet.task_file import blamed, task_of

    job = task_of(path)
    with blamed(path):
        yield job


def metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The notes that carry a checkpoint's own text; what is too long is left out with a word."""
    notes = {"metadata": checkpoint.metadata} if checkpoint.metadata else {}
    if len(json.dumps(notes)) <= METADATA_CAP:
        return notes
    checkpoint.words.append(f"left out its metadata, which is over {METADATA_CAP:,} bytes")
    return {}


def write_dense(artifact: Artifact, output: Path) -> None:
    """Write the dense weights in the format that the output's name ends in."""
    from tersenet.targets import dense_file

    try:
        data = dense_file(artifact, output.suffix.lower())
    except ValueError as wrong:
        raise ValueError(f"{output}: {wrong}") from None
    write_atomically(output, data)

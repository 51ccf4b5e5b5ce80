"""A file replaced as a whole, under many hands: whoever reads it finds the old bytes or the new ones."""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

PART, STALE = ".terse-part", 86_400  # how temporaries end, and after how many seconds one is nobody's


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Put `data` where `path`, or the link there, leads: a temporary beside it, fsync, rename, fsync of the folder.

    What is there keeps its permissions. Temporaries over a day old are removed. Raises OSError, which names the file,
    where it cannot be written; then, and where making the pieces of `data` raises, what was there is untouched and
    nothing else is left.
    """
    with _naming(path):
        _replace(Path(os.path.realpath(path)), [data] if isinstance(data, bytes) else data)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[BinaryIO]:
    """A file without a name, in the folder where `path` leads, for what is too large for memory until it is written."""
    with _naming(path):
        file = tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path)), prefix=".", suffix=PART)  # noqa: SIM115
    with file:
        try:
            yield file
        except OSError as wrong:
            if wrong.filename is None:  # a full disk
                wrong.filename = str(path)
            raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that the caller knows, not the temporary."""
    try:
        yield
    except OSError as wrong:
        raise OSError(wrong.errno, wrong.strerror or str(wrong), str(path)) from None


def _replace(target: Path, data: Iterable[bytes]) -> None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):  # a rename would put a file in place of a device
        raise OSError(errno.EEXIST, "is there and is no file; give another name")
    _sweep(target.parent)
    part = target.parent / f".{secrets.token_hex(8)}{PART}"  # its own name in any process, container or host
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(part, flags, 0o666 if mode is None else mode & 0o777)
        with os.fdopen(descriptor, "wb") as file:
            for piece in data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            part.chmod(mode & 0o777)  # which the umask has narrowed
        os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some file systems cannot; a crash then leaves the old file, whole
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove the temporaries that nobody has written to for a day: by age, since a pid means nothing elsewhere."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") and entry.name.endswith(PART):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < time.time() - STALE:
                        os.unlink(entry.path)

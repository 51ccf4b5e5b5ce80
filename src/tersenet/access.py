"""Random access to the bytes of a file, in memory or where it lies, and their checksum."""

import os
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersenet.codecs.stream import FormatError
from tersenet.container import MAGIC, SMALL_VERSION


class Source:
    """Random access to the file's bytes."""

    size: int
    whole: bool  # whether it has all bytes, or those of the head alone

    def read(self, offset: int, length: int) -> bytes:
        raise TypeError("a source says how it is read")


class Memory(Source):
    """Bytes; of a file that was written and let go the head alone."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data, self.size = data, len(data) if size is None else size
        self.whole = len(data) == self.size

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class File(Source):
    """A file that stays open until it is closed or nobody holds it. Threads may read it together."""

    whole = True

    def __init__(self, path: Path) -> None:
        self._file, self._lock = path.open("rb", buffering=0), threading.Lock()
        self.close = weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length and (part := self._part(offset, length)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def _part(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):  # which leaves alone the place that a forked process shares
            return os.pread(self._file.fileno(), length, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)

    def __reduce__(self) -> Any:  # a copy, or what is sent to another process, is the bytes
        return Memory, (self.read(0, self.size),)


def checked(data: Source) -> Iterator[bytes]:
    """All bytes, some at a time. Raises `FormatError` behind the last of them unless their checksum fits."""
    check, at = 0, 0
    while at < data.size - 4:
        chunk = data.read(at, min(1 << 24, data.size - 4 - at))
        if not chunk:
            raise FormatError("the file ended while it was read")
        check, at = zlib.crc32(chunk, check), at + len(chunk)
        yield chunk
    length = b"" if data.read(len(MAGIC), 1)[0] == SMALL_VERSION else struct.pack("<Q", data.size)
    end = length + struct.pack("<I", check)
    if data.read(data.size - len(end), len(end)) != end:
        raise FormatError("the file is damaged: its checksum does not fit")
    yield end[-4:]

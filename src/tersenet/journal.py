"""What a run did, row by row, in memory and in its folder, beside what is kept there until a stage is done."""

import contextlib
import filecmp
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersenet.display import say
from tersenet.replacing import write_atomically

Row = dict[str, Any]
NAME, RESULT = "run.jsonl", "result.terse"
SHOWN = ("bytes", "loss", "metric", "error", "score")  # of a row, to who waits


@dataclass
class Journal:
    """The rows of a run; those of earlier tries in the same folder are `earlier`. Without a folder nothing is kept."""

    rows: list[Row] = field(default_factory=list)
    folder: Path | None = None
    earlier: list[Row] = field(default_factory=list)

    @property
    def path(self) -> Path | None:
        """The file of rows, where there is one."""
        return None if self.folder is None else self.folder / NAME

    def open(self, folder: Path | None) -> None:
        """Go on in a folder: read its rows, and write there from now on (None: in memory alone)."""
        self.folder, self.earlier = folder, [] if folder is None else read(folder / NAME)

    def write(self, **row: Any) -> None:
        """Add a row; in the file it has the time, in seconds since 1970, too. What it has come to is shown."""
        self.rows.append(row)
        if text := _come_to(row):
            say(text)
        if self.folder is None:
            return
        line = json.dumps({"time": round(time.time(), 2), **row}, default=_plain).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _add(self.folder / NAME, line)
        except OSError as wrong:
            self.give_up(str(wrong))

    def find(self, **fields: Any) -> list[Row]:
        """The rows, of this try and earlier ones, that have these values."""
        rows = [*self.earlier, *self.rows]
        return [row for row in rows if all(k in row and row[k] == value for k, value in fields.items())]

    def keep(self, name: str, data: bytes) -> None:
        """Keep bytes under a name until the stage is done."""
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / f"{name}.kept", hashlib.sha256(data).digest() + data)
            except OSError as wrong:
                self.give_up(str(wrong))

    def kept(self, name: str) -> bytes | None:
        """What was kept under a name; None where nothing was, or where it is damaged."""
        path = None if self.folder is None else self.folder / f"{name}.kept"
        if path is None or not path.exists():
            return None
        whole = path.read_bytes()
        return whole[32:] if hashlib.sha256(whole[32:]).digest() == whole[:32] else None

    def keep_result(self, save: Callable[[Path], None]) -> None:
        """Keep the run's file beside its rows: `save` writes it."""
        if self.folder is not None:
            try:
                save(self.folder / RESULT)
            except OSError as wrong:
                self.give_up(str(wrong))

    def give_up(self, reason: str) -> None:
        """Keep nothing from now on, and say so: a folder that cannot be written to must not end a run."""
        self.folder = None
        self.rows.append({"unkept": reason})
        print(f"tersenet: nothing is kept between runs: {reason}", file=sys.stderr)

    def clear(self) -> None:
        """Remove what was kept."""
        for path in [] if self.folder is None else self.folder.glob("*.kept"):
            path.unlink(missing_ok=True)


def _add(path: Path, line: bytes) -> None:
    """Add a line to a file by one write at its end, so that two processes may share it."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        torn = size and os.pread(file, 1, size - 1) != b"\n"  # by a process that was killed
        os.write(file, b"\n" + line if torn else line)
    finally:
        os.close(file)


def read(path: Path) -> list[Row]:
    """The rows of a file; lines that were torn are left out."""
    rows: list[Row] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # brackets in brackets
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def run_of(file: Path, folder: Path | None) -> Path | None:
    """The run, of those in a folder, whose result is this file byte for byte; the last one of several."""
    results = [] if folder is None else folder.glob(f"*/{RESULT}")
    same = [found.parent for found in results if filecmp.cmp(found, file, shallow=False)]
    return max(same, key=lambda run: (run / RESULT).stat().st_mtime, default=None)


def cache_folder() -> Path | None:
    """Where stage results are kept unless a caller says otherwise; None where the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "tersenet"
    except RuntimeError:
        return None


def held_by_process(kind: str) -> int | None:
    """Bytes of this process by Linux's word for them, "VmRSS" for now and "VmHWM" for the most; None elsewhere."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1])
    return None


def memory() -> float | None:
    """The most megabytes of memory that this process has held, where the system says."""
    if (held := held_by_process("VmHWM")) is not None:  # on Linux rusage begins at what the parent held
        return round(held / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (1e6 if sys.platform == "darwin" else 1e3), 1)


def _come_to(row: Row) -> str:
    """The numbers of a row that are shown.

    >>> _come_to({"candidate": "rows 0.5", "bytes": 12345, "error": 0.0312})
    'bytes 12,345, error 0.0312'
    """
    found = {name: row[name] for name in SHOWN if isinstance(row.get(name), int | float)}
    return ", ".join(f"{name} {v:,}" if isinstance(v, int) else f"{name} {v:.5g}" for name, v in found.items())


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch as JSON has them, anything else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

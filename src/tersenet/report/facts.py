"""What a page says of a file and of the run that made it, as plain data."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tersenet.artifact import Artifact, LedgerRow, load, printable
from tersenet.container import STAND_IN, Tensor
from tersenet.journal import RESULT, cache_folder, run_of
from tersenet.report.told import Told, number


@dataclass(frozen=True)
class Line:
    """A row of the ledger as a page shows it, of the tensor `key`.

    `before` are the bytes of the tensor in its own type, `outputs` the error of what it gives.
    """

    key: str
    name: str
    form: str
    shape: str
    axes: int
    codec: str
    weights: int
    before: int
    bytes: int
    error: float | None
    outputs: float | None
    note: str

    @property
    def bits(self) -> float | None:
        return 8 * self.bytes / self.weights if self.weights else None


class Peer(NamedTuple):
    """What others made of the same network: its bytes and its metric on the test data, as they tell them."""

    name: str
    bytes: float
    metric: float


def peers_of(path: Path) -> tuple[Peer, ...]:
    """The peers of a JSON file: a list of {"name": ..., "bytes": ..., "metric": ...}. Raises ValueError for others."""
    example = '[{"name": "theirs", "bytes": 51200, "metric": 0.971}]'
    wrong = ValueError(f"{path}: is no JSON list of peers, as {example}")
    try:
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list):
            raise wrong
        return tuple(peer(*(row[name] for name in Peer._fields)) for row in rows)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise wrong from None


def peer(name: object, size: Any, metric: Any) -> Peer:
    """A peer with its name made fit to be read. Raises ValueError for a size or a metric that is none."""
    found = Peer(printable(str(name)), float(size), float(metric))
    if not (math.isfinite(found.metric) and 0 < found.bytes < math.inf):
        raise ValueError(f"{found.name}: a peer has a size above 0 and a metric, not {size} and {metric}")
    return found


@dataclass(frozen=True)
class Facts:
    """A file (None where a run has not made one), its ledger, and the run that made it, where that is known.

    `peers` are what others made of the network.
    """

    title: str
    artifact: Artifact | None
    lines: tuple[Line, ...] = ()
    told: Told = field(default_factory=Told)
    parts: Mapping[str, int] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()

    @staticmethod
    def of(source: Path) -> "Facts":
        """The facts of a file, or of a run's folder. A file's run is found by the result that lies in its folder.

        Raises ValueError where there is no run in a folder, `FormatError` for a damaged file. A file whose run's
        journal is gone or damaged is told without it.
        """
        if source.is_dir():
            told, file = Told.of_folder(source), source / RESULT
            artifact = load(file) if file.exists() else None
        else:
            artifact, run, told = load(source), run_of(source, cache_folder()), Told()
            if run is not None:
                try:
                    told = Told.of_folder(run)
                except ValueError:
                    told = Told(words=("The journal of the run that made this file is gone or damaged.",))
        return Facts.made(source.name, artifact, told)

    @staticmethod
    def made(title: str, artifact: Artifact | None, told: Told, outputs: Mapping[str, float] | None = None) -> "Facts":
        """The facts of a file and a run; `outputs` are errors at the outputs by weight (`promise.output_errors`)."""
        if artifact is None:
            return Facts(printable(title), None, told=told)
        rows = artifact.ledger()
        lines = tuple(_line(row, artifact.tensors.get(row.name), outputs or {}) for row in rows)
        names = {"whole numbers": "payload", "floats": "tables", "names, shapes and trees": "header"}
        tensors = [row for row in rows[:-1] if row.kind != "section"]
        parts = {said: sum(getattr(row, part) for row in tensors) for said, part in names.items()}
        if held := sum(row.total for row in rows if row.kind == "section"):
            parts["sections"] = held
        return Facts(printable(title), artifact, lines, told, parts | {"the file's own": rows[-1].total})

    @property
    def before(self) -> int:
        """Bytes of all tensors, tied ones once, each in its own type."""
        return sum(line.before for line in self.lines)

    @property
    def bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def weights(self) -> int:
        return sum(line.weights for line in self.lines)

    @property
    def metric(self) -> float | None:
        """The test metric, measured from the reopened file."""
        claimed = None if self.artifact is None else number(self.artifact.meta, "metric")
        return self.told.after if claimed is None else claimed

    @property
    def matrices(self) -> list[Line]:
        """The lines of tensors of two axes or more."""
        return [line for line in self.lines if line.weights and line.axes > 1]


def _line(row: LedgerRow, tensor: Tensor | None, outputs: Mapping[str, float]) -> Line:
    return Line(
        key=row.name,
        name=printable(row.name),
        form=row.kind,
        shape=" x ".join(map(str, row.shape)),
        axes=len(row.shape),
        codec=row.codec,
        weights=row.weights,
        before=row.weights * _width(tensor.dtype) if tensor is not None else 0,
        bytes=row.total,
        error=row.error,
        outputs=outputs.get(row.name),
        note=printable(row.note),
    )


def _width(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(STAND_IN.get(dtype, dtype)).itemsize

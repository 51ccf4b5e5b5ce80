"""What the journal of a run tells, as plain data: stages, trainings, candidates, and what came out."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tersenet.artifact import printable
from tersenet.journal import NAME, Row, read


@dataclass(frozen=True)
class Step:
    """A stage, or a round of one, that was done."""

    stage: str
    density: float | None
    metric: float | None
    bytes: float | None
    seconds: float | None


@dataclass(frozen=True)
class Training:
    """The mean loss and the rate of each epoch of one training."""

    label: str
    losses: tuple[float, ...]
    rates: tuple[float | None, ...]


@dataclass(frozen=True)
class Candidate:
    """A file that was made and looked at: its metric, or its error at the outputs, on data held back for choosing."""

    label: str
    bytes: float
    metric: float | None
    error: float | None
    chosen: bool


@dataclass(frozen=True)
class Told:
    """A run as its journal tells it; what it does not tell is None or empty. `words` are what a reader should know.

    `offers` has, by weight, the bytes and the cost at the outputs of what it could have become, by size and without
    what another beats or what loses nothing; `scores` what a search of channels scored, in its order. `before`, `after`
    and `seconds` are those of the whole run.
    """

    recipe: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    trainings: tuple[Training, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    offers: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    before: float | None = None
    after: float | None = None
    seconds: float | None = None
    words: tuple[str, ...] = ()

    @staticmethod
    def of_folder(folder: Path) -> "Told":
        """The run of a folder. Raises ValueError where no line of its journal can be read, or there is none."""
        path = folder / NAME
        if not path.is_file():
            raise ValueError(f"{folder}: is no run: there is no {NAME} in it")
        rows, lines = read(path), sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        if not rows:
            raise ValueError(f"{path}: no line of it can be read; run the recipe again")
        torn = lines - len(rows)
        told = Told.of(rows)
        if not torn:
            return told
        said = f"{torn} of {lines} lines of the journal cannot be read and are left out: a stopped run tears its last."
        return replace(told, words=(said, *told.words))

    @staticmethod
    def of(rows: Sequence[Row]) -> "Told":
        """The run that rows tell of, whatever of it stands in rows of earlier tries."""
        begins = [k for k, row in enumerate(rows) if "run" in row]
        last = rows[begins[-1] :] if begins else rows
        recipe = last[0].get("run") if begins else None
        results = [row for row in rows if "result" in row] or [row for row in last if "end" in row] or [{}]
        words = [f"Nothing was kept from here on: {_text(row['unkept'])}" for row in last if "unkept" in row]
        words += [f"Outputs were taken for {_text(row['likelihood'])}." for row in last if "likelihood" in row]
        if begins and not any("end" in row for row in last):
            words.append("The run has not ended; this is what it did so far.")
        return Told(
            recipe=tuple(map(_text, recipe)) if isinstance(recipe, list) else (),
            steps=tuple(_step(row) for row in last if "stage" in row),
            trainings=_trainings(rows),
            candidates=_candidates(rows),
            offers=_offers(rows),
            scores=tuple(score for row in rows if "search" in row and (score := number(row, "score")) is not None),
            before=number(results[-1], "before"),
            after=number(results[-1], "metric"),
            seconds=number(results[-1], "seconds"),
            words=tuple(words),
        )


def _text(value: Any) -> str:
    return printable(str(value))


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row; None where there is none, as in a row that was damaged."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def _step(row: Row) -> Step:
    parts = {name: number(row, name) for name in ("density", "metric", "bytes", "seconds")}
    return Step(stage=_text(row["stage"]), **parts)


def _trainings(rows: Sequence[Row]) -> tuple[Training, ...]:
    """Trainings in their order. An epoch that a later try trained again, to the same loss, is told once."""
    found, seen, before = list[tuple[str, list[float], list[float | None]]](), set[tuple[Any, ...]](), -1.0
    for row in rows:
        epoch, loss, rate = (number(row, name) for name in ("epoch", "loss", "rate"))
        if "training" not in row or epoch is None or loss is None:
            continue
        label, mark = _text(row["training"]), (str(row["training"]), epoch, loss, rate)
        if mark in seen:
            continue
        seen.add(mark)
        if not found or found[-1][0] != label or epoch <= before:
            found.append((label, [], []))
        found[-1][1].append(loss)
        found[-1][2].append(rate)
        before = epoch
    return tuple(Training(label, tuple(losses), tuple(rates)) for label, losses, rates in found)


def _candidates(rows: Sequence[Row]) -> tuple[Candidate, ...]:
    chosen = {_text(row["chosen"]) for row in rows if "chosen" in row}
    found = dict[str, Candidate]()
    for row in rows:
        size = number(row, "bytes")
        if "candidate" in row and size is not None:
            label = _text(row["candidate"])
            found[label] = Candidate(label, size, number(row, "metric"), number(row, "error"), label in chosen)
    return tuple(found.values())


def _offers(rows: Sequence[Row]) -> dict[str, tuple[tuple[float, float], ...]]:
    found = dict[str, tuple[tuple[float, float], ...]]()
    for row in rows:
        offers = row.get("offers")
        if "layer" not in row or not isinstance(offers, list):
            continue
        pairs = [dict(zip(("bytes", "cost"), offer)) for offer in offers if isinstance(offer, list)]
        both = [(number(pair, "bytes"), number(pair, "cost")) for pair in pairs]
        edge = list[tuple[float, float]]()
        for size, cost in sorted((size, cost) for size, cost in both if size is not None and cost is not None):
            if cost > 0 and (not edge or cost < edge[-1][1]):
                edge.append((size, cost))
        if len(edge) > 1:
            found[_text(row["layer"])] = tuple(edge)
    return found

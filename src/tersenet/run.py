"""Run a recipe: stages take a draft to a draft, and each one's result is kept under the key of all that led to it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tersenet.activations import into
from tersenet.artifact import Artifact, Coding, FormatError, Section, load
from tersenet.container import at_hand
from tersenet.contract import check
from tersenet.data import is_pair
from tersenet.display import working
from tersenet.draft import QUICK, Draft, artifact_of, dense_array
from tersenet.journal import Row, memory
from tersenet.key import Uncacheable, key_of
from tersenet.notebook import ledger_html
from tersenet.origins import versions
from tersenet.replacing import write_atomically
from tersenet.task import Task, duplicate

FACTS = ("folded", "rules", "left", "activations")  # of a draft, that its trees do not tell


class Stage(Protocol):
    """A frozen dataclass whose fields say all that its result depends on."""

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        """The draft after this stage."""


Recipe = Sequence[Stage]


@dataclass(frozen=True)
class Choice:
    """What a drop was kept on: the data for choosing, how many samples of it, and the metric there before and after.

    `error` is the standard error of the difference, where the metric is a mean over samples.
    """

    samples: int | None
    before: float
    after: float
    error: float | None

    @staticmethod
    def of(task: Task, artifact: Artifact) -> "Choice":
        """Measured on the reopened file; the standard error comes from small batches."""
        held, models = task.held(), (task.model, into(load(artifact.to_bytes()), duplicate(task.model)))
        before, after = (task.score(held, model) for model in models)
        one, other = (task.measured(held, model, max(1, (held.count or 1) // 24))[1] for model in models)
        apart = [a - b for a, b in zip(other, one, strict=True)]
        error = float(np.std(apart, ddof=1) / math.sqrt(len(apart))) if len(apart) > 3 else None
        return Choice(held.count, before, after, error)

    def __str__(self) -> str:
        many = "batches" if self.samples is None else f"{self.samples:,} samples"
        spread = "" if self.error is None else f", standard error of the difference {self.error:.4f}"
        return f"metric {self.before:.4f} -> {self.after:.4f} on the {many} held back for choosing{spread}"


@dataclass(frozen=True)
class Result:
    """What compressing gave: the artifact and, where the task has test data, the metric before and after.

    `after` is measured on the file's bytes, opened again. `rows` tell what each stage, and each round of it, reached;
    `choice` tells what a drop was kept on. All that the run did stands in its `journal`, a file of JSON lines.
    """

    artifact: Artifact
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    choice: Choice | None = None
    journal: Path | None = None

    def __str__(self) -> str:
        return "\n".join([str(self.artifact), *self._words()])

    def _repr_html_(self) -> str:
        return ledger_html(self.artifact.ledger(), "; ".join(self._words()))

    def _words(self) -> list[str]:
        words = [] if self.choice is None else [str(self.choice)]
        if self.after is not None and self.before is not None:
            words.append(f"test metric {self.before:.4f} -> {self.after:.4f} (from the reopened file)")
        return [*words, f"{self.seconds:.1f} s"]

    def report(self, path: str | Path, peers: Sequence[tuple[str, int, float]] = ()) -> None:
        """Write a page that shows the file and the run that made it; needs `tersenet[report]`.

        `peers` are what others made of the network: for each its name, its bytes and its metric.
        """
        from tersenet.report.facts import Facts, peer
        from tersenet.report.page import report
        from tersenet.report.told import Told

        told = Told.of(self.rows) if self.journal is None else Told.of_folder(self.journal.parent)
        told = replace(told, before=self.before, after=self.after, seconds=self.seconds)
        facts = Facts.made(Path(path).stem, self.artifact, told)
        write_atomically(Path(path), report(replace(facts, peers=tuple(peer(*other) for other in peers))).encode())


def run(draft: Draft, task: Task | None, recipe: Recipe, folder: Path | None, log: Callable[[Row], None]) -> Draft:
    """Run the stages and log a row for each; keep each result in `folder` under the key of all that led to it.

    A run that was stopped goes on after the last result that was kept, and in the middle of a training. A stage with
    `parts`, such as the rounds of pruning, is kept part by part. What the run does is written into the draft's journal,
    which lies in a folder of its own in `folder`. Where something cannot be looked into, or changes as it is used, or
    the folder cannot be written to, nothing is kept, which is said on stderr.
    """
    check(recipe, draft, task)
    begun, journal = time.monotonic(), draft.journal
    stages = [part for stage in recipe for part in _parts(stage)]
    marks, moving = [""] * (1 + len(stages)), ""
    try:
        if folder is not None:
            marks, moving = _marks(draft, task, stages), key_of(_moving(task))
            journal.open(folder / marks[-1])
    except (Uncacheable, OSError) as reason:
        folder = None
        journal.give_up(str(reason))
    journal.write(run=[str(stage) for stage in recipe], key=marks[-1], **versions())
    for number, (stage, mark) in enumerate(zip(stages, marks[1:], strict=True), 1):
        kept = None if folder is None else folder / f"{mark}.terse"
        since = time.monotonic()
        earlier = _kept(kept)
        if earlier is not None:
            facts = json.loads(earlier.sections["facts"].data)
            trainable = draft.trainable - facts["left"].keys()
            draft = replace(draft, tensors=at_hand(earlier.tensors), trainable=trainable, **facts)
            row = {n: v for n, v in earlier.meta.items() if n not in ("folded", "rules")} | {"kept": True}
        else:
            with working(f"stage {number} of {len(stages)}: {type(stage).__name__}"):
                draft = stage(draft, task)
            whole = artifact_of(draft)
            row = {"stage": str(stage), **_measured(draft, task), "bytes": Artifact(whole.tensors, QUICK).nbytes}
            row |= {"seconds": round(time.monotonic() - since, 1), "memory": memory()}
            if folder is not None and key_of(_moving(task)) != moving:
                folder = kept = None
                journal.give_up("the task's data or functions change as they are used")
            if kept is not None and journal.folder is not None:
                try:
                    facts = {name: dict(getattr(draft, name)) for name in FACTS}
                    sections = {"facts": Section(json.dumps(facts).encode())}
                    Artifact(whole.tensors, Coding(("bits",)), {**whole.meta, **row}, sections).save(kept)
                except OSError as reason:
                    folder = None
                    journal.give_up(str(reason))
            journal.clear()
        journal.write(**row)
        log(row)
    journal.write(end=True, seconds=round(time.monotonic() - begun, 1), memory=memory())
    return draft


def _marks(draft: Draft, task: Task | None, stages: Recipe) -> list[str]:
    """The key of what a run begins with, and of that with the first stage, the first two, and so on.

    Raises Uncacheable where something cannot be looked into.
    """
    facts = {part.name: getattr(draft, part.name) for part in fields(draft) if part.name != "journal"}
    mark = hashlib.sha256((key_of(task) + key_of(facts, "draft")).encode())
    marks = [mark.hexdigest()[:24]]
    for stage in stages:
        mark.update(key_of(stage, type(stage).__name__).encode())
        marks.append(mark.hexdigest()[:24])
    return marks


def _moving(task: Task | None) -> Task | None:
    """The part of a task that may change as it is used: all but arrays in memory."""
    still: dict[str, Any] = {name: None for name in ("train", "test", "valid") if is_pair(getattr(task, name, None))}
    return task and replace(task, **still)


def _parts(stage: Stage) -> Sequence[Stage]:
    return stage.parts() if hasattr(stage, "parts") else (stage,)


def _measured(draft: Draft, task: Task | None) -> Row:
    """The part of the weights that is not zero and, with a task, the metric on its data for choosing."""
    dense = [dense_array(draft.tensors[name]) for name in draft.weights()]
    found: Row = {}
    if dense:
        found["density"] = round(float(sum(map(np.count_nonzero, dense)) / sum(w.size for w in dense)), 5)
    if task is not None and draft.model is not None and (task.train is not None or task.valid is not None):
        found["metric"] = round(task.score(task.held(), into(artifact_of(draft), duplicate(draft.model))), 5)
    return found


def _kept(path: Path | None) -> Artifact | None:
    """An earlier run's result; a file that is damaged, of another version or closed to us is as good as none."""
    try:
        return load(path, limit=1 << 40) if path is not None and path.exists() else None
    except (FormatError, OSError):
        return None

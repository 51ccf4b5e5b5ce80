"""Output-aware quantization to a budget: the global step, the damping of rows and the price of bits that keep it best.

Files made with each of two dampings and two prices are compared, and one made as if nothing were known of the inputs;
what stays closest to the float network's outputs wins, on inputs that the moments have not seen: on the others feedback
hides part of its errors (half of them on MobileNetV2 with 200 images). Closeness is the squared difference of the
outputs: on inputs that the network was trained on it says how a file does on others (correlation 0.98 with the
divergence on ResNet-20's test images), where the divergence itself, which hardly sees inputs that the network is sure
of, does not (0.6). Where the network fits without any loss, that is what is taken.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from tersenet.allocators.lagrange import step_within
from tersenet.artifact import Coding, load
from tersenet.budget import UnmetBudget
from tersenet.display import best_so_far, progress
from tersenet.draft import ERROR, QUICK, Draft, artifact_of
from tersenet.journal import Journal
from tersenet.likelihood import Likelihood
from tersenet.methods import Method
from tersenet.packed import Packed, Tree
from tersenet.task import Task
from tersenet.waterfilling.candidates import allocated, candidates
from tersenet.waterfilling.factors import Damping
from tersenet.waterfilling.knowledge import Halves, Knowledge, outputs
from tersenet.waterfilling.layers import Waterfilling
from tersenet.waterfilling.sensitivity import with_sensitivities

DAMPINGS = (Damping(), Damping(rows=1.0))
RATES = (0.3, 0.5)  # how much a bit weighs against distortion
FALL = 5  # by experience: the difference falls with about this power of the size
CLEARLY = 0.75  # by so much less a file made without moments must err: held back inputs are few
ALIKE = 0.5  # of the outputs' variation, the most that may be lost, whatever the metric says
MANY = 1 << 20  # weights from which on files are made with one price of a bit alone, to save time
NAME = "search"  # under which the journal keeps what was tried
LOOSE = 0.8  # files that use less of the budget are looked at again


@dataclass
class Search:
    """The files of one network at one size: `most` bytes, with the step that met it last as the next one's start.

    What was `tried` before a run was stopped is kept in its journal, and not tried again.
    """

    most: int
    coding: Coding
    journal: Journal = field(default_factory=Journal)
    c: float | None = None
    tried: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(most: int, coding: Coding, journal: Journal) -> "Search":
        """The search with what was tried before the run was stopped."""
        return Search(most, coding, journal, tried=json.loads(journal.kept(NAME) or b"{}"))

    def once(self, label: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: numbers, texts, and lists and dicts of them."""
        if label not in self.tried:
            self.tried[label] = make()
            self.journal.keep(NAME, json.dumps(self.tried).encode())
        return self.tried[label]

    def finest(
        self, waterfilling: Waterfilling, rate: float, label: str, used: float = 0.985, tries: int = 16
    ) -> tuple[Draft, int]:
        """The draft at the finest step found whose file keeps the size, and that file's bytes."""
        fits: dict[float, Draft] = {}  # the finest that keeps the size, and no other: networks are large

        def measured(c: float) -> int:
            draft = waterfilling.at(c, rate)
            size = artifact_of(draft, self.coding).nbytes + errors
            if size <= self.most and c < min(fits, default=math.inf):
                fits.clear()
                fits[c] = draft
            return size

        def size_at(c: float) -> int:
            size: int = self.once(f"{label}: {c!r}", lambda: measured(c))
            return size

        tensors, names = waterfilling.draft.tensors, waterfilling.draft.trainable
        kept = {id(t): t.tree for n, t in tensors.items() if n not in names and not isinstance(t.tree, Packed)}
        held = sum(np.asarray(tree).nbytes for tree in kept.values())
        errors = ERROR * len({id(tensors[n]) for n in names})
        start = waterfilling.guess(max(self.most - held, self.most // 16)) if self.c is None else self.c
        try:
            self.c = step_within(size_at, self.most, start, used, tries, waterfilling.finest)
        except UnmetBudget as wrong:
            why = f"; {held:,} bytes of it are buffers and what `keep` names" if held > self.most / 4 else ""
            raise UnmetBudget(wrong.most, wrong.least, why) from None
        return fits[self.c] if self.c in fits else waterfilling.at(self.c, rate), size_at(self.c)


def without_loss(knowledge: Knowledge) -> Draft:
    """The draft with each weight in the smallest tree that holds it without loss."""
    trees: dict[str, Tree] = {name: kept.tree for name, kept in knowledge.lossless.items()}
    return knowledge.draft.with_trees(trees)


def _fits(knowledge: Knowledge, most: int, coding: Coding) -> Draft | None:
    """The draft without loss, where its file keeps the size."""
    bits = sum(kept.bits for kept in knowledge.lossless.values())
    if bits > 8.8 * most:  # an estimate, which saves coding all floats for nothing
        return None
    draft = without_loss(knowledge)
    return draft if artifact_of(draft, coding).nbytes + ERROR * len(knowledge.lossless) <= most else None


def to_size(knowledge: Knowledge, most: int, coding: Coding | None = None, methods: Sequence[Method] = ()) -> Draft:
    """The draft whose file takes at most `most` bytes and nearly all of them.

    With moments, files are made with each of `DAMPINGS` and `RATES`, and the one whose outputs on the inputs that were
    held back stay closest to the unquantized network's is taken. With `methods` their trees are offered for each
    weight beside those of the best file's steps (`candidates.py`), and the file they make is one more to choose from.
    """
    whole = _fits(knowledge, most, coding or Coding())
    if whole is not None:
        return whole
    journal, task, likelihood = knowledge.draft.journal, knowledge.task, knowledge.likelihood
    search = Search.of(most, coding or QUICK, journal)
    if task is None or likelihood is None or not knowledge.found:
        return _blind(knowledge, search, methods)
    knowledge = _with_sensitivities(knowledge, search)
    wanted = outputs(task, knowledge.draft.module(), knowledge.held)

    def error(draft: Draft, size: int) -> float:
        """What the draft's outputs lack, as if its file had just the size that is asked for."""
        found = likelihood.difference(wanted, outputs(task, draft.module(), knowledge.held)) * (size / most) ** FALL
        return found if math.isfinite(found) else math.inf

    def tried(label: str, make: Callable[[], tuple[Draft, int, float]], again: Callable[[float], Draft]) -> Tried:
        """A file and its error; a draft that was made before the run was stopped is made `again` if it is the best."""
        made: list[Draft] = []

        def measured() -> list[float]:
            draft, size, c = make()
            made.append(draft)
            journal.write(candidate=label, bytes=size, error=(found := error(draft, size)), c=c)
            return [c, found]

        c, found = search.once(label, measured)
        return Tried(label, c, found, lambda: made[0] if made else again(c))

    many = sum(math.prod(knowledge.draft.tensors[name].tree.shape) for name in knowledge.found) > MANY
    settings = [(damping, rate) for damping in DAMPINGS for rate in (RATES[-1:] if many else RATES)]
    best: tuple[Tried, Damping, float] | None = None
    for damping, rate in progress(settings, "quantizing", len(settings)):
        at, label = functools.partial(Waterfilling.of, knowledge, damping), f"rows {damping.rows}, rate {rate}"
        made = functools.partial(_finest, search, at, rate, label)
        one = tried(label, made, lambda c, at=at, rate=rate: at().at(c, rate))  # type: ignore[misc]
        search.c = one.c
        best_so_far(one.error, f"error {one.error:.5g} with {label}")
        if best is None or one.error < best[0].error:
            best = one, damping, rate
    assert best is not None
    chosen, blind = best[0], functools.partial(Waterfilling.of, knowledge, aware=False)
    rough = search.once("without moments, roughly", lambda: _rough(blind(), most, search.coding, error))
    if rough < 2 * chosen.error:  # else it is not worth a search
        own = Search(most, search.coding, journal, None, search.tried)
        made = functools.partial(_finest, own, blind, 0.0, "without moments")
        one = tried("without moments", made, lambda c: blind().at(c, 0.0))
        chosen = one if one.error < CLEARLY * chosen.error else chosen
    if methods:
        first, damping, rate = best
        given = Waterfilling.of(knowledge, damping), first.c, rate, search, methods, knowledge.found
        mixed = functools.partial(_mixed, *given)
        one = tried("a mixture of methods", mixed, lambda c: mixed()[0])
        chosen = one if one.error < chosen.error else chosen
    journal.write(chosen=chosen.label)
    return chosen.draft()


class Tried(NamedTuple):
    """A file that was made: the step, its error at the outputs, and how to get the draft."""

    label: str
    c: float
    error: float
    draft: Callable[[], Draft]


def _finest(search: Search, at: Callable[[], Waterfilling], rate: float, label: str) -> tuple[Draft, int, float]:
    draft, size = search.finest(at(), rate, label)
    return draft, size, search.c or 0.0


def _rough(plain: Waterfilling, most: int, coding: Coding, error: Callable[[Draft, int], float]) -> float:
    draft = plain.at(plain.guess(most), 0.0)
    return error(draft, artifact_of(draft, coding).nbytes)


def _mixed(
    waterfilling: Waterfilling,
    c: float,
    rate: float,
    search: Search,
    methods: Sequence[Method],
    found: Mapping[str, Halves],
) -> tuple[Draft, int, float]:
    offers = candidates(waterfilling, c, rate, methods, search.coding, found)
    for name, offer in offers.items():
        search.journal.write(layer=name, offers=[[one.nbytes, one.packing.cost] for one in offer])
    errors = ERROR * len({id(waterfilling.draft.tensors[name]) for name in waterfilling.draft.trainable})
    draft, size = allocated(waterfilling, offers, c, search.most - errors, search.coding)
    return draft, size + errors, c


def _with_sensitivities(knowledge: Knowledge, search: Search) -> Knowledge:
    """What errors of each layer cost at the outputs, seen at the step that meets the size."""

    def make() -> list[Any]:
        first = Waterfilling.of(knowledge)
        search.finest(first, RATES[0], "first", 0.9)
        return [search.c, dict(with_sensitivities(knowledge, first, search.c or first.unit).sensitivity)]

    search.c, found = search.once("sensitivities", make)
    return replace(knowledge, sensitivity=found)


def _blind(knowledge: Knowledge, search: Search, methods: Sequence[Method]) -> Draft:
    """The draft at a size where nothing is known but the weights."""
    plain = Waterfilling.of(knowledge, aware=False)
    draft, size = search.finest(plain, 0.0, "without data")
    found = [draft]
    if size <= LOOSE * search.most:
        # Weights kept without loss, and zeros that are held, leave too few sizes to choose from.
        free = replace(Waterfilling.of(knowledge, aware=False, hold=False), lossless={})
        other = Search(search.most, search.coding, search.journal, None, search.tried)
        found.append(other.finest(free, 0.0, "without data, nothing held")[0])
    if methods:
        found.append(_mixed(plain, search.c or plain.unit, 0.0, search, methods, {})[0])
    return min(found, key=plain.loss) if len(found) > 1 else draft


def to_drop(knowledge: Knowledge, points: float, task: Task, coding: Coding | None = None) -> Draft:
    """The smallest file found whose metric, on the task's data for choosing, falls by at most `points`.

    A metric on few samples may hold by chance, so at least half of what the outputs vary must be kept as well. Where
    even fine steps lose more, the network is kept without loss.
    """
    journal = knowledge.draft.journal
    search = Search.of(0, coding or QUICK, journal)
    before = search.once("before", lambda: task.score(task.held()))
    wanted = outputs(task, knowledge.draft.module(), knowledge.held)
    likelihood = knowledge.likelihood or Likelihood.of(task)
    most = ALIKE * likelihood.difference(wanted, [[part * 0 for part in parts] for parts in wanted])

    def keeps(draft: Draft, label: str) -> bool:
        artifact = artifact_of(draft, QUICK)
        model = load(artifact.to_bytes()).into(draft.module())
        try:
            after = task.score(task.held(), model)
        except ValueError:  # a metric that is no number
            return False
        alike = likelihood.difference(wanted, outputs(task, model, knowledge.held)) <= most
        journal.write(candidate=label, bytes=artifact.nbytes, metric=after)
        kept = bool(alike and 100 * task.metric.gain(after, before) >= -points)
        if kept:
            best_so_far(artifact.nbytes, f"{artifact.nbytes:,} bytes, metric {after:.5g}")
        return kept

    def coarsest(at: Waterfilling, name: str) -> tuple[Draft, float] | None:
        return _coarsest(
            at, lambda c, make: search.once(f"{name}, c {c!r}", lambda: keeps(make(), f"{name}, c {c:.4g}"))
        )

    first = Waterfilling.of(knowledge)
    begun = coarsest(first, "first")
    if begun is None:
        return without_loss(knowledge)
    found = search.once("sensitivities", lambda: dict(with_sensitivities(knowledge, first, begun[1]).sensitivity))
    knowledge = replace(knowledge, sensitivity=found)
    rows = dict[str, tuple[Draft, float] | None]()
    for damping in progress(DAMPINGS, "quantizing", len(DAMPINGS)):
        label = f"rows {damping.rows}"
        rows[label] = coarsest(Waterfilling.of(knowledge, damping), label)
    coarse = {f"{name}, c {one[1]:.4g}": one[0] for name, one in ({"first": begun} | rows).items() if one}
    drafts = coarse | {"without loss": without_loss(knowledge)}
    chosen = min(drafts, key=lambda label: artifact_of(drafts[label], coding or QUICK).nbytes)
    journal.write(chosen=chosen)
    return drafts[chosen]


def _coarsest(
    waterfilling: Waterfilling, keeps: Callable[[float, Callable[[], Draft]], bool]
) -> tuple[Draft, float] | None:
    """The draft at the coarsest step found that keeps what it must, and the step."""
    made: dict[float, Draft] = {}

    def at(c: float) -> Draft:
        if c not in made:
            made.clear()
            made[c] = waterfilling.at(c)
        return made[c]

    best, low, high = None, waterfilling.unit * 2.0**-16, waterfilling.unit * 8.0
    kept: Draft | None = None
    for _ in range(10):
        c = math.sqrt(low * high)
        if keeps(c, functools.partial(at, c)):
            best, low, kept = c, c, made.get(c)
        else:
            high = c
    return None if best is None else (kept or at(best), best)

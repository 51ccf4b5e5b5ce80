"""Output-aware quantization to a budget: the global step, the damping of rows and the price of bits that keep it best.

Files made with each of two dampings and two prices are compared, and one made as if nothing were known of the inputs;
what stays closest to the float network's outputs wins, on inputs that the moments have not seen: on the others feedback
hides part of its errors (half of them on MobileNetV2 with 200 images). Closeness is the squared difference of the
outputs: on inputs that the network was trained on it says how a file does on others (correlation 0.98 with the
divergence on ResNet-20's test images), where the divergence itself, which hardly sees inputs that the network is sure
of, does not (0.6). Where the network fits without any loss, that is what is taken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tersenet.allocators.lagrange import step_within
from tersenet.artifact import Coding, load
from tersenet.draft import Draft, artifact_of
from tersenet.likelihood import Likelihood
from tersenet.packed import Packed, Tree
from tersenet.task import Task, progress
from tersenet.waterfilling.factors import Damping
from tersenet.waterfilling.knowledge import Knowledge, outputs
from tersenet.waterfilling.layers import Waterfilling
from tersenet.waterfilling.sensitivity import with_sensitivities

DAMPINGS = (Damping(), Damping(rows=1.0))
RATES = (0.3, 0.5)  # how much a bit weighs against distortion
QUICK = Coding(("bits", "context"))  # nearly as small as the best of all codecs, and never smaller
FALL = 5  # by experience: the difference falls with about this power of the size
CLEARLY = 0.75  # by so much less a file made without moments must err: held back inputs are few
ALIKE = 0.5  # of the outputs' variation, the most that may be lost, whatever the metric says
MANY = 1 << 20  # weights from which on files are made with one price of a bit alone, to save time
LOOSE = 0.8  # files that use less of the budget are looked at again
ERROR = 3  # bytes that a measured error will add to each tensor


@dataclass
class Search:
    """The files of one network at one size: `most` bytes, with the step that met it last as the next one's start."""

    most: int
    coding: Coding
    c: float | None = None

    def finest(
        self, waterfilling: Waterfilling, rate: float, used: float = 0.985, tries: int = 16
    ) -> tuple[Draft, int]:
        """The draft at the finest step found whose file keeps the size, and that file's bytes."""
        drafts: dict[float, tuple[Draft, int]] = {}

        def size_at(c: float) -> int:
            draft = waterfilling.at(c, rate)
            drafts[c] = draft, artifact_of(draft, self.coding).nbytes + errors
            return drafts[c][1]

        tensors, names = waterfilling.draft.tensors, waterfilling.draft.trainable
        kept = {id(t): t.tree for n, t in tensors.items() if n not in names and not isinstance(t.tree, Packed)}
        held = sum(np.asarray(tree).nbytes for tree in kept.values())
        errors = ERROR * len({id(tensors[n]) for n in names})
        start = waterfilling.guess(max(self.most - held, self.most // 16)) if self.c is None else self.c
        try:
            self.c = step_within(size_at, self.most, start, used, tries)
        except ValueError as wrong:
            more = f"; {held:,} bytes of it are buffers, which are kept bit for bit" if held > self.most / 4 else ""
            raise ValueError(f"{wrong}{more}") from None
        return drafts[self.c]


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


def to_size(knowledge: Knowledge, most: int, coding: Coding | None = None) -> Draft:
    """The draft whose file takes at most `most` bytes and nearly all of them.

    With moments, files are made with each of `DAMPINGS` and `RATES`, and the one whose outputs on the inputs that were
    held back stay closest to the unquantized network's is taken.
    """
    whole = _fits(knowledge, most, coding or Coding())
    if whole is not None:
        return whole
    task, likelihood, search = knowledge.task, knowledge.likelihood, Search(most, coding or QUICK)
    if task is None or likelihood is None or not knowledge.found:
        return _blind(knowledge, search)
    knowledge = _weighed(knowledge, search)
    wanted = outputs(task, knowledge.draft.module(), knowledge.held)

    def error(draft: Draft, size: int) -> float:
        """What the draft's outputs lack, as if its file had just the size that is asked for."""
        found = likelihood.difference(wanted, outputs(task, draft.module(), knowledge.held)) * (size / most) ** FALL
        return found if math.isfinite(found) else math.inf

    best, least = knowledge.draft, math.inf
    many = sum(math.prod(knowledge.draft.tensors[name].tree.shape) for name in knowledge.found) > MANY
    settings = [(damping, rate) for damping in DAMPINGS for rate in (RATES[-1:] if many else RATES)]
    for damping, rate in progress(settings, "quantizing", len(settings)):
        draft, size = search.finest(Waterfilling.of(knowledge, damping), rate)
        if (found := error(draft, size)) < least:
            best, least = draft, found
    plain, own = Waterfilling.of(knowledge, aware=False), Search(most, search.coding)
    draft = plain.at(plain.guess(most), 0.0)
    if error(draft, artifact_of(draft, search.coding).nbytes) < 2 * least:  # else it is not worth a search
        draft, size = own.finest(plain, 0.0)
        best = draft if error(draft, size) < CLEARLY * least else best
    return best


def _weighed(knowledge: Knowledge, search: Search) -> Knowledge:
    """The layers with_sensitivities at the step that meets the size."""
    first = Waterfilling.of(knowledge)
    search.finest(first, RATES[0], 0.9)
    return with_sensitivities(knowledge, first, search.c or first.unit)


def _blind(knowledge: Knowledge, search: Search) -> Draft:
    """The draft at a size where nothing is known but the weights."""
    draft, size = search.finest(Waterfilling.of(knowledge, aware=False), 0.0)
    if size > LOOSE * search.most:
        return draft
    # Weights kept without loss, and zeros that are held, leave too few sizes to choose from.
    free = replace(Waterfilling.of(knowledge, aware=False, hold=False), lossless={})
    return min(draft, Search(search.most, search.coding).finest(free, 0.0)[0], key=free.loss)


def to_drop(knowledge: Knowledge, points: float, task: Task, coding: Coding | None = None) -> Draft:
    """The smallest file found whose metric, on the task's data for choosing, falls by at most `points`.

    A metric on few samples may hold by chance, so at least half of what the outputs vary must be kept as well. Where
    even fine steps lose more, the network is kept without loss.
    """
    before = task.score(task.held(), knowledge.draft.module())
    wanted = outputs(task, knowledge.draft.module(), knowledge.held)
    likelihood = knowledge.likelihood or Likelihood.of(task)
    most = ALIKE * likelihood.difference(wanted, [[part * 0 for part in parts] for parts in wanted])

    def keeps(draft: Draft) -> bool:
        model = load(artifact_of(draft, QUICK).to_bytes()).into(draft.module())
        try:
            after = task.score(task.held(), model)
        except ValueError:  # a metric that is no number
            return False
        alike = likelihood.difference(wanted, outputs(task, model, knowledge.held)) <= most
        return alike and 100 * task.metric.gain(after, before) >= -points

    first = Waterfilling.of(knowledge)
    begun = _coarsest(first, keeps)
    if begun is None:
        return without_loss(knowledge)
    knowledge = with_sensitivities(knowledge, first, begun[1])
    tried = progress(DAMPINGS, "quantizing", len(DAMPINGS))
    found = [begun, *(_coarsest(Waterfilling.of(knowledge, damping), keeps) for damping in tried)]
    drafts = [one[0] for one in found if one] + [without_loss(knowledge)]
    return min(drafts, key=lambda draft: artifact_of(draft, coding or QUICK).nbytes)


def _coarsest(waterfilling: Waterfilling, keeps: Callable[[Draft], bool]) -> tuple[Draft, float] | None:
    """The draft at the coarsest step found that keeps what it must, and the step."""
    best, low, high = None, waterfilling.unit * 2.0**-16, waterfilling.unit * 8.0
    for _ in range(10):
        c = math.sqrt(low * high)
        draft = waterfilling.at(c)
        if keeps(draft):
            best, low = (draft, c), c
        else:
            high = c
    return best

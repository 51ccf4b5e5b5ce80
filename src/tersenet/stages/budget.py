"""Output-aware quantization to a budget: the global step, the damping of rows and the price of bits that keep it best.

Files made with each of two dampings and two prices are compared, and what stays closest to the float network's outputs
wins, on inputs that the moments have not seen: on the others feedback hides part of its errors (half of them on
MobileNetV2 with 200 images). Closeness is the squared difference of the outputs: on inputs that the network was trained
on it says how a file does on others (correlation 0.98 with the divergence on ResNet-20's test images), where the
divergence itself, which hardly sees inputs that the network is sure of, does not (0.6).
"""

import math
from dataclasses import dataclass

from tersenet.allocators.lagrange import from_below
from tersenet.artifact import Coding, load
from tersenet.recipe import Draft, artifact_of
from tersenet.stages.waterfill import Damping, Gathered, Prepared, difference, outputs, prepare, weighed
from tersenet.task import Task, progress

DAMPINGS = (Damping(), Damping(rows=1.0))
RATES = (0.3, 0.5)  # how much a bit weighs against distortion
QUICK = Coding(("bits", "context"))  # nearly as small as the best of all codecs, and never smaller
FALL = 5  # by experience: the difference falls with about this power of the size


@dataclass
class Search:
    """The files of one network at one size: `most` bytes, with the step that met it last as the next one's start."""

    gathered: Gathered
    most: int
    coding: Coding
    c: float

    def met(self, prepared: Prepared, rate: float, used: float = 0.985, tries: int = 16) -> tuple[Draft, int]:
        """The draft at the finest step found whose file keeps the size, and that file's bytes."""
        drafts: dict[float, tuple[Draft, int]] = {}

        def size_at(c: float) -> int:
            draft = prepared.at(c, rate)
            errors = 3 * (len(prepared.layers) + len(prepared.shifts))  # bytes that the measured errors will add
            drafts[c] = draft, artifact_of(draft, self.coding).nbytes + errors
            return drafts[c][1]

        self.c = from_below(size_at, self.most, self.c, used, tries)
        return drafts[self.c]


def to_size(gathered: Gathered, most: int, coding: Coding | None = None) -> Draft:
    """The draft whose file takes at most `most` bytes and nearly all of them.

    With moments, files are made with each of `DAMPINGS` and `RATES`, and the one whose outputs on the inputs that were
    held back stay closest to the unquantized network's is taken.
    """
    x = gathered.held
    search = Search(gathered, most, coding or QUICK, 0.1 if x is None else 0.003)
    if x is None:
        return search.met(prepare(gathered), 0.0)[0]
    search.met(prepare(gathered), RATES[0])
    gathered = weighed(gathered, search.c)
    wanted = outputs(gathered.draft, x)
    found: list[tuple[float, Draft]] = []
    ways = [(prepare(gathered, damping), rate) for damping in DAMPINGS for rate in RATES]
    for prepared, rate in progress(ways, "quantizing", len(ways)):
        draft, size = search.met(prepared, rate)
        found.append((difference(wanted, outputs(draft, x)) * (size / most) ** FALL, draft))
    return min(found, key=lambda pair: pair[0])[1]


def to_drop(gathered: Gathered, points: float, task: Task, coding: Coding | None = None) -> Draft:
    """The smallest file found whose metric, on the task's data for choosing, falls by at most `points`."""
    floor = task.score(task.held(), gathered.draft.module()) - points / 100
    begun = _coarsest(prepare(gathered), floor, task)
    if begun is None:
        raise ValueError(f"a drop of {points} points cannot be met: the finest step that was tried loses more")
    gathered = weighed(gathered, begun[1])
    tried = progress(DAMPINGS, "quantizing", len(DAMPINGS))
    found = [begun, *(_coarsest(prepare(gathered, damping), floor, task) for damping in tried)]
    return min((one[0] for one in found if one), key=lambda draft: artifact_of(draft, coding or QUICK).nbytes)


def _coarsest(prepared: Prepared, floor: float, task: Task) -> tuple[Draft, float] | None:
    """The draft at the coarsest step found that keeps the floor, and the step."""
    best, low, high = None, 1e-6, 0.1
    for _ in range(9):
        c = math.sqrt(low * high)
        draft = prepared.at(c)
        if task.score(task.held(), load(artifact_of(draft, QUICK).to_bytes()).into(draft.model)) >= floor:
            best, low = (draft, c), c
        else:
            high = c
    return best

"""Output-aware quantization to a budget: the global step, the damping and the price of bits that keep it best.

How much the moments must be damped differs between networks more than anything else: MobileNetV2 with 200 calibration
images needs a hundred times what ResNet-20 needs with 1,024. So the damping is chosen on a quarter of the inputs that
the moments have not seen, and the price of a bit by the files made with it; what stays closest to the float network's
outputs wins. Closeness is the squared difference of the outputs: on inputs that the network was trained on it says how
a file does on others (correlation 0.98 with the divergence on ResNet-20's test images), where the divergence itself,
which hardly sees inputs that the network is sure of, does not (0.6).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor as Array

from tersenet.allocators.lagrange import from_below
from tersenet.artifact import Coding, load
from tersenet.recipe import Draft, artifact_of
from tersenet.stages.waterfill import Damping, Gathered, Prepared, prepare
from tersenet.task import Task, one_thread, progress

RATES = (0.5, 1.0)  # how much a bit weighs against distortion
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

    def dampings(self) -> list[Damping]:
        """The two dampings whose files stay closest on the inputs that were held back from the moments, best first."""
        part = replace(self.gathered, found=self.gathered.part)
        x = self.gathered.held
        wanted = outputs(self.gathered.draft, x)

        def distance(damping: Damping) -> float:
            draft, size = self.met(prepare(part, damping), 0.5, used=0.95, tries=8)
            return difference(wanted, outputs(draft, x)) * (size / self.most) ** FALL

        found = descended(distance)
        return sorted(found, key=lambda damping: found[damping])[:2]


def descended(distance: Callable[[Damping], float]) -> dict[Damping, float]:
    """The distances of all dampings on the way: on in a direction while it helps, first the inputs', then the rows'."""
    best = Damping()
    seen = {best: distance(best)}
    for name, factors in (("inputs", (10, 0.1)), ("rows", (3, 1 / 3))):
        for factor in factors:
            begun = best
            for _ in range(3):
                tried = replace(best, **{name: getattr(best, name) * factor})
                seen[tried] = distance(tried)
                if seen[tried] >= seen[best]:
                    break
                best = tried
            if best != begun:
                break
    return seen


def to_size(gathered: Gathered, most: int, task: Task | None, coding: Coding | None = None) -> Draft:
    """The draft whose file takes at most `most` bytes and nearly all of them.

    With a task, two dampings are chosen first; then files are made with both for each of `RATES`, and the one whose
    outputs on training inputs stay closest to the unquantized network's is taken.
    """
    search = Search(gathered, most, coding or QUICK, 0.003 if task else 0.1)
    if task is None:
        return search.met(prepare(gathered), 0.0)[0]
    x = task.calibration(1024)
    wanted = outputs(gathered.draft, x)
    found: list[tuple[float, Draft]] = []
    for damping in progress(search.dampings(), "quantizing", 2):
        prepared = prepare(gathered, damping)
        for rate in RATES:
            draft, size = search.met(prepared, rate)
            found.append((difference(wanted, outputs(draft, x)) * (size / most) ** FALL, draft))
    return min(found, key=lambda pair: pair[0])[1]


def to_drop(gathered: Gathered, points: float, task: Task, coding: Coding | None = None) -> Draft:
    """The smallest file found whose metric, on the task's data for choosing, falls by at most `points`."""
    floor = task.score(task.held(), gathered.draft.module()) - points / 100
    draft, c = _coarsest(prepare(gathered), floor, task)
    if draft is not None:
        size = artifact_of(draft, coding or QUICK).nbytes
        better, _ = _coarsest(prepare(gathered, Search(gathered, size, coding or QUICK, c).dampings()[0]), floor, task)
        files = [d for d in (draft, better) if d is not None]
        return min(files, key=lambda d: artifact_of(d, coding or QUICK).nbytes)
    raise ValueError(f"a drop of {points} points cannot be met: the finest step that was tried loses more")


def _coarsest(prepared: Prepared, floor: float, task: Task) -> tuple[Draft | None, float]:
    best, low, high = None, 1e-6, 0.1
    for _ in range(9):
        c = math.sqrt(low * high)
        draft = prepared.at(c)
        if task.score(task.held(), load(artifact_of(draft, QUICK).to_bytes()).into(draft.model)) >= floor:
            best, low = draft, c
        else:
            high = c
    return best, low


def outputs(draft: Draft, x: Array) -> Array:
    """What the draft's network says to the inputs."""
    with torch.no_grad(), one_thread():
        model = draft.module().eval()
        return torch.cat([model(part) for part in x.split(64)])  # type: ignore[no-untyped-call]


def difference(wanted: Array, found: Array) -> float:
    """Mean squared difference; of class scores, what is added to all classes of a sample does not count."""
    error = (wanted - found).double()
    if error.dim() == 2:
        error = error - error.mean(1, keepdim=True)
    return float(error.square().mean())

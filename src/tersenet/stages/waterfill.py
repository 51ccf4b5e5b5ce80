"""Output-aware quantization as a stage: at a given global step, or at the step that meets a budget.

What happens to a weight: `Knowledge.of` folds norms and gathers the moments of what the weight multiplies and of the
gradients behind it; `Waterfilling.of` makes of them a step for each row and column; `with_sensitivities` sees what
errors of each layer cost at the outputs; `to_size` and `to_drop` look for the one number c that sets all steps.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from tersenet.artifact import Coding
from tersenet.budget import Budget
from tersenet.contract import NORMS, Kind
from tersenet.draft import Draft
from tersenet.methods import Method, needed
from tersenet.packed import Codebook, Reshaped, Sparse, Transformed, Uniform
from tersenet.task import Task, one_thread
from tersenet.waterfilling.factors import Damping
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.layers import Waterfilling
from tersenet.waterfilling.search import to_drop, to_size
from tersenet.waterfilling.sensitivity import with_sensitivities


@dataclass(frozen=True)
class Waterfill:
    """Quantize at the global step `c`, or to a `budget`, from the moments of `samples` training inputs.

    With a budget, `rate` and `damping` are chosen too, and `coding` says how its bytes are counted. With `methods` and
    a budget in bytes each weight may also become what one of these makes of it by the same moments, e.g.
    `chain(SVD(part=0.5), Uniform(8))`. Without training data nothing is known but the weights. Raises UnmetBudget where
    the budget cannot be met, and ValueError where a method needs data and there are none.
    """

    c: float | None = None
    budget: Budget | None = None
    rate: float = 0.5
    samples: int = 1024
    damping: Damping = field(default_factory=Damping)
    coding: Coding | None = None
    methods: tuple[Method, ...] = ()
    makes: ClassVar[tuple[Kind, ...]] = (Uniform, Transformed, Reshaped, Codebook, Sparse, NORMS)

    def __post_init__(self) -> None:
        if self.c is not None and (self.budget is not None or not self.c > 0):
            raise ValueError("Waterfill takes a step c above 0, or a budget")
        if self.methods and (self.c is not None or (self.budget is not None and self.budget.drop is not None)):
            raise ValueError("Waterfill chooses among methods for a size or a ratio, not for a step or a drop")

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        if self.c is None and self.budget is None:
            raise ValueError("Waterfill needs a step or a budget: Waterfill(c=0.003), or compress(..., budget=...)")
        usable = task if task is not None and task.train is not None else None
        asking = next((method for method in self.methods if method.needs), None)
        if usable is None and asking is not None:
            needed(asking, asking.needs[0], None)
        most = None if self.budget is None else self.budget.bytes_for(draft.count())
        if self.budget is not None and most is None and usable is None:
            raise ValueError("a drop is measured on data: give Task(train=...), or a size or ratio")
        with one_thread():
            knowledge = Knowledge.of(draft, usable, self.samples)
            if (known := knowledge.likelihood) is not None:
                kind = f"{known.kind} along axis {known.axis}" if known.kind == "classes" else known.kind
                draft.journal.write(likelihood=f"{kind}, told {known.why}", layers=len(knowledge.found))
            if most is not None:
                return to_size(knowledge, most, self.coding, self.methods)
            if self.budget is not None and self.budget.drop is not None and usable is not None:
                return to_drop(knowledge, self.budget.drop, usable, self.coding)
            c = self.c or 1.0
            knowledge = with_sensitivities(knowledge, Waterfilling.of(knowledge, self.damping), c)
            return Waterfilling.of(knowledge, self.damping).at(c, self.rate)

"""Output-aware quantization as a stage: at a given global step."""

from dataclasses import dataclass, field

from tersenet.draft import Draft
from tersenet.task import Task, one_thread
from tersenet.waterfilling.factors import Damping
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.layers import Waterfilling
from tersenet.waterfilling.sensitivity import with_sensitivities


@dataclass(frozen=True)
class Waterfill:
    """The stage: quantize at the global step `c`, from the moments of `samples` training inputs."""

    c: float = 0.003
    rate: float = 0.5
    samples: int = 1024
    damping: Damping = field(default_factory=Damping)

    def __call__(self, draft: Draft, task: Task | None) -> Draft:
        with one_thread():
            knowledge = Knowledge.of(draft, task, self.samples)
            knowledge = with_sensitivities(knowledge, Waterfilling.of(knowledge, self.damping), self.c)
            return Waterfilling.of(knowledge, self.damping).at(self.c, self.rate)

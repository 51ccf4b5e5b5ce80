"""What outputs say: classes, yes or no, or a mean with unit variance; labels drawn from that, and distances.

Second moments of gradients are those of the Fisher information only where the labels are drawn from the network's own
distribution, which is not in the outputs alone: it is told by the loss, else by the targets.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.data import tensors
from tersenet.task import Task, one_thread

FLATTER = 2.0  # temperature of the distribution that classes are drawn from
CLASSES = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)
CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
BERNOULLI = (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)
BERNOULLI_LOSSES = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
GAUSSIAN = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
GAUSSIAN_LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.CosineEmbeddingLoss)
PROBABILITIES = (F.binary_cross_entropy,)


@dataclass(frozen=True)
class Likelihood:
    """What outputs parametrize: "classes" along `axis`, "bernoulli" by logits or `probabilities`, or "gaussian"."""

    kind: str
    axis: int = 1
    probabilities: bool = False
    why: str = ""

    @staticmethod
    def of(task: Task) -> "Likelihood":
        """What the task says, or its loss, or its targets, seen on one batch."""
        inputs, targets = task.example()
        with torch.no_grad(), one_thread():
            outputs = task.outputs(task.running(task.model), inputs)
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else ()
        goals = tensors(targets)
        goal = goals[0] if len(goals) == 1 else None
        told, why = (
            task.likelihood or _told_by(task.loss),
            "by Task(likelihood=...)" if task.likelihood else "by the loss",
        )
        if isinstance(task.loss, nn.BCELoss) or task.loss in PROBABILITIES:
            return Likelihood("bernoulli", probabilities=True, why=why)
        axis = _class_axis(shape, goal, told is not None and task.likelihood is None)
        if told is None:
            told, why = "gaussian", "by the targets"
            if goal is not None and axis is not None and not goal.is_floating_point():
                told = "classes"
            elif goal is not None and shape and goal.numel() == outputs.numel():
                yes_or_no = bool(((goal == 0) | (goal == 1)).all())
                told = "bernoulli" if yes_or_no else "gaussian"
        if told == "classes" and (not shape or axis is None):
            axis = 1 if len(shape) > 1 else 0
        if told != "gaussian" and not shape:
            raise ValueError(
                f"a likelihood of {told} needs one tensor of outputs: give Task(forward=...) that picks it"
            )
        return Likelihood(told, 1 if axis is None else axis, why=why)

    def sampled_loss(self, outputs: Any, generator: torch.Generator) -> Tensor:
        """Minus the log-likelihood of outputs drawn from the model, a sum over samples.

        Classes are drawn from the flatter softmax(z / 2) and weighted back by the root of the ratio of the two (squared
        gradients then have the right mean): a network that is sure of its training data would hardly ever draw the rare
        classes that carry most of its Fisher information.
        """
        if self.kind == "gaussian":
            floats = [part for part in tensors(outputs) if part.is_floating_point()]
            drawn = [torch.randn(part.shape, generator=generator).to(part) for part in floats]
            sums = [(part * noise).double().sum() for part, noise in zip(floats, drawn, strict=True)]
            return torch.stack(sums).sum()
        if self.kind == "bernoulli":
            logits: Tensor = outputs.float()
            if self.probabilities:
                logits = torch.logit(logits, 1e-6)
            drawn_ones = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=generator).to(logits)
            total: Tensor = F.binary_cross_entropy_with_logits(logits, drawn_ones, reduction="sum")
            return total
        scores: Tensor = outputs.movedim(self.axis, -1).reshape(-1, outputs.shape[self.axis]).float()
        sure, flat = scores.detach().log_softmax(1).cpu(), (scores.detach() / FLATTER).softmax(1).cpu()
        classes = torch.multinomial(flat, 1, generator=generator)
        weight: Tensor = (0.5 * (sure - flat.log()).gather(1, classes)[:, 0]).exp().to(scores.device)
        losses: Tensor = F.cross_entropy(scores, classes[:, 0].to(scores.device), reduction="none")
        return (weight * losses).sum()

    def difference(self, wanted: list[Any], found: list[Any]) -> float:
        """Mean squared difference of batches' outputs; what is added to all classes of a sample does not count."""
        total, count = 0.0, 0
        for one, other in zip(wanted, found, strict=True):
            for a, b in zip(tensors(one), tensors(other), strict=True):
                if not a.is_floating_point():
                    continue
                error = a.double() - b.double()
                if self.kind == "classes":
                    error = error - error.mean(self.axis, keepdim=True)
                error = error[torch.isfinite(a)]  # scores of what cannot be, such as -inf, are the same in both
                total, count = total + float(error.square().sum()), count + error.numel()
        return total / max(count, 1)


def _told_by(loss: Any) -> str | None:
    for kind, functions, losses in (
        ("classes", CLASSES, CLASS_LOSSES),
        ("bernoulli", BERNOULLI, BERNOULLI_LOSSES),
        ("gaussian", GAUSSIAN, GAUSSIAN_LOSSES),
    ):
        if loss in functions or isinstance(loss, losses):
            return kind
    return None


def _class_axis(shape: tuple[int, ...], goal: Tensor | None, by_loss: bool) -> int | None:
    """The axis of the classes: that which targets of class numbers have not; losses of torch fix it as the second."""
    if by_loss or goal is None or len(shape) < 1:
        return 1 if len(shape) > 1 else 0 if shape else None
    fits = [k for k in range(len(shape)) if shape[:k] + shape[k + 1 :] == tuple(goal.shape)]
    if fits:
        return fits[-1] if len(shape) - 1 in fits else fits[0]
    return len(shape) - 1 if goal.numel() * shape[-1] == torch.Size(shape).numel() else None

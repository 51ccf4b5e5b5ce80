"""3LC for distributed data-parallel training (Lim, Andersen, Kaminsky, MLSys 2019), as a DDP communication hook.

    model = DistributedDataParallel(net)
    exchange = threelc.register(model, ThreeLC(sparsity=1.75))

Each worker sends the three-value codes of its gradients to all others (`codecs/ternary.py`) and keeps what they left
out for the next step. All decode the same messages in the same order, so workers stay equal bit for bit. The paper has
a server, which compresses once more what it sends back; here is none, and one error less.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from tersenet.codecs import ternary
from tersenet.codecs.stream import FormatError

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTH = 4  # bytes, before each payload


@dataclass(frozen=True)
class ThreeLC:
    """s of the paper, 1 <= s < 2: the larger, the more zeros. Without `accumulate` what was left out is lost.

    Tensors of fewer than `least` values go as float32.
    """

    sparsity: float = 1.75
    accumulate: bool = True
    least: int = 256

    def __post_init__(self) -> None:
        if not 1 <= np.float32(self.sparsity) < 2:
            raise ValueError(f"sparsity is at least 1 and less than 2, not {self.sparsity}; the paper takes 1 to 1.9")


@dataclass
class Exchange:
    """One worker's part: what its messages have left out so far, by parameter, and what they have cost.

    `sent` are bytes of messages, each of which goes to every other worker, `plain` those of the gradients, `seconds`
    the time in the hook, waiting for others included.
    """

    settings: ThreeLC
    names: dict[Tensor, str]
    group: Any
    residuals: dict[str, Tensor] = field(default_factory=dict)
    sent: int = 0
    plain: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """What was left out, by parameter: to be saved beside the checkpoint, by each worker its own."""
        return {name: residual.clone() for name, residual in self.residuals.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`. Raises ValueError, naming the parameter, where it belongs to another network."""
        sizes = {name: parameter.numel() for parameter, name in self.names.items()}
        for name, residual in state.items():
            if sizes.get(name) != residual.numel():
                raise ValueError(
                    f"{name}: {residual.numel()} values were left out, but the model has {sizes.get(name)}"
                )
        self.residuals = {name: residual.to("cpu", torch.float32).clone() for name, residual in state.items()}

    def message(self, gradients: dict[str, Tensor]) -> bytes:
        """This worker's message for some parameters. Raises `NotFinite` for a gradient that cannot be sent."""
        parts = []
        for place, (name, gradient) in enumerate(gradients.items()):
            values = gradient.detach().to("cpu", torch.float32).contiguous().view(-1)
            if values.numel() < self.settings.least:
                if not values.isfinite().all():
                    raise NotFinite(place)
                parts.append(values.numpy().astype("<f4", copy=False).tobytes())
                continue
            payload = self._payload(name, values, place)
            parts += [len(payload).to_bytes(LENGTH, "little"), payload]
        return b"".join(parts)

    def _payload(self, name: str, values: Tensor, place: int) -> bytes:
        if (
            not values.any()
        ):  # of a worker that has joined, or a parameter that nobody used: DDP may throw the mean away
            return bytes(ternary.HEADER)
        residual = self.residuals.get(name)
        if residual is None:
            residual = torch.zeros_like(values)
        try:
            payload = ternary.encode(values.numpy(), residual.numpy(), self.settings.sparsity)
        except ValueError:
            raise NotFinite(place) from None
        if self.settings.accumulate:
            self.residuals[name] = residual
        return payload

    def values(self, message: bytes, sizes: list[int]) -> list[Tensor]:
        """What a message says, for parameters of these sizes. Raises FormatError for all but what `message` makes."""
        found, at = [], 0
        for size in sizes:
            if size < self.settings.least:
                begin, at = at, at + 4 * size
                if at > len(message):
                    raise FormatError("a message of 3LC ends early")
                raw = np.frombuffer(message[begin:at], "<f4").astype(np.float32)
            else:
                begin = at + LENGTH
                at = begin + int.from_bytes(message[at:begin], "little")
                if at > len(message):
                    raise FormatError("a message of 3LC ends early")
                raw = ternary.decode(message[begin:at], size)
            found.append(torch.from_numpy(raw))
        if at != len(message):
            raise FormatError("a message of 3LC is too long")
        return found


class NotFinite(ValueError):
    """The gradient of the parameter at this place in its bucket holds NaN or infinity."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def register(model: DistributedDataParallel, settings: ThreeLC) -> Exchange:
    """Have the model's workers exchange their gradients by 3LC; every worker calls this before its first step.

    The mean is over all workers, also those that have joined. Raises ValueError for parameters that it cannot send.
    """
    names = {parameter: name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    if wrong := [name for parameter, name in names.items() if parameter.dtype not in TYPES]:
        raise ValueError(f"{wrong[0]}: 3LC sends float32, float16 and bfloat16; convert it with .float()")
    exchange = Exchange(settings, names, model.process_group)
    model.register_comm_hook(exchange, averaged)
    return exchange


def averaged(exchange: Exchange, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """The hook: the mean of what all workers' messages say, in the order of their ranks."""
    begun = time.perf_counter()
    if bucket.buffer().layout != torch.strided:
        name = exchange.names[bucket.parameters()[0]]
        raise ValueError(f"{name}: its gradient is sparse, which 3LC does not send; make the layer with sparse=False")
    names = [exchange.names[parameter] for parameter in bucket.parameters()]
    gradients = dict(zip(names, bucket.gradients(), strict=True))
    try:
        message, length = exchange.message(gradients), None
    except NotFinite as wrong:
        message, length = b"", -1 - wrong.place
    everyone = _gathered(message, length, names, exchange.group, bucket.buffer().device)
    sizes = [gradient.numel() for gradient in gradients.values()]
    totals = [torch.zeros(size) for size in sizes]
    for data in everyone:
        for total, part in zip(totals, exchange.values(data, sizes), strict=True):
            total += part
    for name, total, gradient in zip(names, totals, gradients.values(), strict=True):
        gradient.copy_((total / len(everyone)).view(gradient.shape))
        if not gradient.sum(dtype=torch.float64).isfinite():  # the same on every worker
            raise ValueError(f"{name}: the mean of its gradients is too large for {gradient.dtype}; clip them")
    exchange.sent += len(message)
    exchange.plain += bucket.buffer().nbytes
    exchange.seconds += time.perf_counter() - begun
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


def _gathered(message: bytes, length: int | None, names: list[str], group: Any, device: torch.device) -> list[bytes]:
    """Every worker's message by rank: their lengths first, or what is wrong with them, so that all stop together."""
    workers = dist.get_world_size(group)
    own = torch.tensor([len(message) if length is None else length], device=device)
    lengths = [torch.empty_like(own) for _ in range(workers)]
    try:
        dist.all_gather(lengths, own, group)
        told = [int(other) for other in lengths]
        for rank, bad in enumerate(told):
            if bad < 0:
                raise ValueError(
                    f"{names[-1 - bad]}: its gradient on worker {rank} holds NaN or infinity, or is too large to scale;"
                    " lower the learning rate or clip it. A GradScaler makes such gradients: take bfloat16 without one"
                )
        padded = torch.zeros(max(told), dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [torch.empty(max(told), dtype=torch.uint8, device=device) for _ in range(workers)]
        dist.all_gather(parts, padded.to(device), group)
    except RuntimeError as wrong:
        raise RuntimeError(
            f"{names[0]}: the gradients of other workers did not come: one has died, or takes longer than the group's"
            f" timeout; start again from the last checkpoint ({str(wrong).splitlines()[0]})"
        ) from wrong
    return [part.cpu().numpy()[:n].tobytes() for part, n in zip(parts, told, strict=True)]

"""Where a training stands, kept now and then, so that one that was killed goes on to the very same bytes."""

import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.journal import Journal
from tersenet.key import Uncacheable, key_of

SECONDS = 20.0  # between two that are kept


@dataclass
class Place:
    """What was trained on: all epochs before `epoch` and `batch` batches of it; the sum of its losses and the last."""

    epoch: int = 0
    batch: int = 0
    total: float = 0.0
    last: float = 0.0


class Checkpoint:
    """Keeps a training's place, tensors, optimiser and random numbers under what it began with.

    `begun` is all that tells this training from others of the run. `watched` is what the training calls: where its
    state moves, beside the tensors, nothing is kept, since it could not be restored.
    """

    def __init__(self, journal: Journal, optimizer: torch.optim.Optimizer, begun: Any, watched: Any) -> None:
        self.journal, self.optimizer, self.watched = journal, optimizer, watched
        self.name, self.since, self.random = "", time.monotonic(), dict[str, Any]()
        if journal.folder is not None:
            self.still = _seen(watched)
            self.name = "" if self.still is None else f"training-{key_of(begun, 'training')[:24]}"

    def restored(self, tensors: Sequence[Tensor]) -> Place | None:
        """The place that was kept, its values put into the tensors and the optimiser; None where there is none."""
        data = self.journal.kept(self.name) if self.name else None
        if data is None:
            return None
        kept = torch.load(io.BytesIO(data), weights_only=True)
        for tensor, value in zip(tensors, kept["tensors"], strict=True):
            tensor.data = value
        self.optimizer.load_state_dict(kept["optimizer"])
        self.random, place = kept["random"], Place(**kept["place"])
        self.journal.write(resumed="training", epoch=place.epoch, batch=place.batch)
        return place

    def go_on(self) -> None:
        """Draw random numbers as the training did after the place that was restored."""
        torch.set_rng_state(self.random["torch"])
        version, state, gauss = self.random["python"]
        random.setstate((version, tuple(state), gauss))
        np.random.set_state(tuple(self.random["numpy"]))
        if "cuda" in self.random:
            torch.cuda.set_rng_state_all(self.random["cuda"])

    def keep(self, place: Place, tensors: Sequence[Tensor]) -> None:
        """Keep the place, if the last time is long enough ago."""
        if not self.name or time.monotonic() - self.since < SECONDS:
            return
        if _seen(self.watched) != self.still:
            self.journal.write(unkept="the training cannot go on after a stop: what it calls changes as it runs")
            self.name = ""
            return
        kind, keys, *rest = tuple(np.random.get_state())
        drawn: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        drawn["numpy"] = kind, np.asarray(keys).tolist(), *rest
        if torch.cuda.is_available():
            drawn["cuda"] = torch.cuda.get_rng_state_all()
        buffer = io.BytesIO()
        optimizer = self.optimizer.state_dict()
        held = [tensor.detach() for tensor in tensors]
        torch.save({"place": vars(place), "tensors": held, "optimizer": optimizer, "random": drawn}, buffer)
        self.journal.keep(self.name, buffer.getvalue())
        self.since = time.monotonic()


def _seen(thing: Any) -> str | None:
    try:
        return key_of(thing)
    except Uncacheable:
        return None

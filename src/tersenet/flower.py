"""An adapter to Flower (flwr): what clients send back after training, by 3LC (Lim, Andersen, Kaminsky, MLSys 2019).

    app = ClientApp(mods=[compressing(sparsity=1.75)])        # the client's side

    class Averaging(Decoding, FedAvg):                        # the server's: before any strategy of flwr.serverapp
        pass

A client sends the codes of what its training has changed; what they leave out it keeps in its context's state for the
next round. Arrays that are not float32, or small, go as they are.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod

from tersenet.codecs import ternary
from tersenet.codecs.stream import FormatError

LEAST = 256  # values
RESIDUALS = "3LC residuals"  # the record of a context's state


def compressing(sparsity: float = 1.75) -> Mod:
    """A mod that compresses the arrays of a client's replies to messages that train; 1 <= sparsity < 2."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        if reply.has_error() or message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return reply
        sent, key, learned = _only(message), *_named(reply)
        residuals = context.state.array_records.setdefault(RESIDUALS, ArrayRecord())
        reply.content.array_records[key] = encoded(learned, sent, residuals, sparsity)
        return reply

    return mod


class Decoding:
    """What a strategy needs to average such replies."""

    _sent: ArrayRecord

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """Keep what clients are sent."""
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[misc, no-any-return]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Decode the replies, then go on. Raises FormatError, naming the array, for one that is damaged."""
        taken = list(replies)
        for reply in taken:
            if not reply.has_error():
                key, arrays = _named(reply)
                reply.content.array_records[key] = decoded(arrays, self._sent)
        return super().aggregate_train(server_round, taken)  # type: ignore[misc]


def encoded(learned: ArrayRecord, sent: ArrayRecord, residuals: ArrayRecord, sparsity: float) -> ArrayRecord:
    """A client's arrays as payloads (uint8) of their differences from what it was sent; changes the residuals.

    Raises ValueError, naming the array, where it holds NaN or infinity; the residuals stay then.
    """
    found, left = ArrayRecord(), dict[str, Array]()
    for name, array in learned.items():
        found[name] = array
        if not _coded(name, sent) or array.dtype != "float32" or array.shape != sent[name].shape:
            continue
        difference = (array.numpy() - sent[name].numpy()).reshape(-1)
        residual = residuals[name].numpy().copy() if name in residuals else np.zeros_like(difference)
        try:
            payload = ternary.encode(difference, residual, sparsity)
        except ValueError as wrong:
            raise ValueError(f"{name}: {wrong}") from None
        left[name] = Array(residual)
        found[name] = Array(np.frombuffer(payload, np.uint8))
    for name, rest in left.items():
        residuals[name] = rest
    return found


def decoded(arrays: ArrayRecord, sent: ArrayRecord) -> ArrayRecord:
    """What `encoded` stands for: what was sent and the differences. Raises FormatError, naming the array."""
    found = ArrayRecord()
    for name, array in arrays.items():
        found[name] = array
        if _coded(name, sent) and array.dtype == "uint8":
            base = sent[name].numpy()
            try:
                difference = ternary.decode(array.numpy().tobytes(), base.size)
            except FormatError as wrong:
                raise FormatError(f"{name}: {wrong}") from None
            found[name] = Array(base + difference.reshape(base.shape))
    return found


def _coded(name: str, sent: ArrayRecord) -> bool:
    return name in sent and sent[name].dtype == "float32" and sent[name].numpy().size >= LEAST


def _named(message: Message) -> tuple[str, ArrayRecord]:
    records = message.content.array_records
    if len(records) != 1:
        raise ValueError(f"3LC takes messages with one record of arrays, and this one has {len(records)}")
    key, arrays = next(iter(records.items()))
    return str(key), arrays


def _only(message: Message) -> ArrayRecord:
    return _named(message)[1]

"""The adapter to Flower; skipped where flwr is not installed."""

import numpy as np
import pytest
from conftest import floats

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from tersenet.codecs.stream import FormatError
from tersenet.flower import Decoding, compressing, decoded, encoded


def record(**named):
    return ArrayRecord({name: Array(value) for name, value in named.items()})


SENT = {"w": floats(40, 30), "b": floats(30), "n": np.array([7])}
LEARNED = {"w": floats(40, 30) + floats(40, 30, seed=1) / 10, "b": floats(30) + 1, "n": np.array([8])}


def test_what_was_sent_and_what_was_left_out_are_the_difference():
    residuals = ArrayRecord()
    coded = encoded(record(**LEARNED), record(**SENT), residuals, 1.0)
    assert coded["w"].numpy().nbytes <= 4 + 240 and list(residuals) == ["w"]
    found = decoded(coded, record(**SENT))
    difference = (LEARNED["w"] - SENT["w"]).reshape(-1)
    sent = found["w"].numpy() - SENT["w"]
    assert np.allclose(sent.reshape(-1) + residuals["w"].numpy(), difference, atol=1e-6)
    assert all(np.array_equal(found[name].numpy(), LEARNED[name]) for name in "bn")
    before = residuals["w"].numpy().copy()
    broken = LEARNED | {"z": np.full(1000, np.nan, np.float32)}
    with pytest.raises(ValueError, match="z: "):
        encoded(record(**broken), record(**SENT, z=np.zeros(1000, np.float32)), residuals, 1.0)
    assert np.array_equal(residuals["w"].numpy(), before)


def test_rounds_of_a_client_and_a_server_carry_the_rest_forward():
    """A client whose training goes a twentieth of the way to an optimum: the server's network comes near to it."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    errors = []

    class Whole:
        def configure_train(self, server_round, arrays, config, grid):
            return [Message(RecordDict({"arrays": arrays}), 1, MessageType.TRAIN)]

        def aggregate_train(self, server_round, replies):
            return replies[0].content["arrays"]

    class Strategy(Decoding, Whole):
        pass

    def learn(message, context):
        w = message.content["arrays"]["w"].numpy()
        step = (LEARNED["w"] - w) / 20
        return Message(RecordDict({"arrays": record(**LEARNED | {"w": w + step})}), reply_to=message)

    arrays, strategy, mod = record(**SENT), Strategy(), compressing(1.5)
    context = Context(1, 1, {}, RecordDict(), {})
    for server_round in range(150):
        (message,) = strategy.configure_train(server_round, arrays, None, None)
        arrays = strategy.aggregate_train(server_round, [mod(message, context, learn)])
        errors.append(np.linalg.norm(arrays["w"].numpy() - LEARNED["w"]))
    assert errors[-1] < 0.1 * errors[0]
    assert set(context.state.array_records["3LC residuals"]) == {"w"}


def test_what_cannot_be_coded_or_decoded_is_refused_by_name():
    bad = LEARNED | {"w": np.full((40, 30), np.nan, np.float32)}
    with pytest.raises(ValueError, match="w: holds NaN"):
        encoded(record(**bad), record(**SENT), ArrayRecord(), 1.5)
    coded = encoded(record(**LEARNED), record(**SENT), ArrayRecord(), 1.5)
    coded["w"] = Array(coded["w"].numpy()[:-1])
    with pytest.raises(FormatError, match="w: "):
        decoded(coded, record(**SENT))

"""3LC: its codec bit for bit, and workers that train by it, stop by it, and go on."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet import native
from tersenet.codecs import ternary
from tersenet.codecs.stream import FormatError
from tersenet.threelc import Exchange, ThreeLC

WORKERS = Path(__file__).with_name("workers.py")
WAYS = ["join", "no_sync", "bfloat16", "half_module", "unused", "rebuilt", "view"]
REFUSED = {
    "double": r"ValueError: 0.weight: 3LC sends float32",
    "sparse": r"ValueError: 0.weight: its gradient is sparse",
    "nan": r"ValueError: \S+: its gradient on worker 1 holds NaN or infinity",
    "large": r"ValueError: 0.weight: the mean of its gradients is too large for torch.float16",
    "scaler": r"ValueError: \S+: .*A GradScaler makes such gradients",
}
LENGTHS = [0, 1, 2, 4, 5, 6, 9, 10, 11, 69, 70, 71, 999, 5119, 5120, 5121, 5130, 40_003]


def gradients(n, seed=0):
    return np.random.default_rng(seed).laplace(0, 0.1, n).astype(np.float32)


def encoded(values, sparsity=1.0):
    residual = np.zeros_like(values)
    return ternary.encode(values, residual, sparsity), residual


def digits(*runs):
    """Values whose bytes are runs of five zeros, and between them one byte with a one in the first partition."""
    codes = [z for run in runs for z in [0] * run + [1]][:-1]
    values = np.zeros(5 * len(codes), np.float32)
    values[: len(codes)] = codes
    return values


@pytest.mark.parametrize("sparsity", [1.0, 1.5, 1.75, 1.999])
@pytest.mark.parametrize("n", LENGTHS)
def test_what_was_sent_and_what_was_left_out_are_the_values_exactly(n, sparsity, both):
    values, residual = gradients(n), gradients(n, 1)
    whole = values + residual
    data = ternary.encode(values, residual, sparsity)
    sent = ternary.decode(data, n)
    assert np.array_equal(sent.astype(np.float64) + residual.astype(np.float64), whole.astype(np.float64))
    scale = np.float32(sparsity) * np.abs(whole).max(initial=0)
    assert set(np.unique(sent)) <= {-scale, np.float32(0), scale} and (n == 0 or sent.any())
    assert len(data) <= ternary.HEADER + -(-n // 5)  # 1.6 bits a value


@given(st.integers(0, 3000), st.floats(1, 1.99), st.integers(0, 2**32 - 1), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_the_core_and_its_twin_make_the_same_bytes_and_floats(n, sparsity, seed, magnitude):
    if native.library() is None:
        pytest.skip("no C core was built")
    values = (gradients(n, seed) * 2.0**magnitude).astype(np.float32)
    ours, twins = gradients(n, seed + 1), gradients(n, seed + 1)
    data = ternary.encode(values, ours, sparsity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        assert ternary.encode(values, twins, sparsity) == data
        back = ternary.decode(data, n)
    assert ours.tobytes() == twins.tobytes() and ternary.decode(data, n).tobytes() == back.tobytes()


@pytest.mark.parametrize("run,coded", [(1, [121]), (2, [243]), (13, [254]), (14, [255]), (15, [255, 121]),
                                       (16, [255, 243]), (28, [255, 255]), (2100, [255] * 150)])  # fmt: skip
def test_runs_of_zeros_take_a_byte_for_fourteen(run, coded, both):
    values = digits(0, run, 0)
    data, _ = encoded(values)
    assert list(data[ternary.HEADER :]) == [202, *coded, 202]
    assert np.array_equal(ternary.decode(data, values.size), values)


def test_partitions_are_contiguous_and_ties_are_zeros(both):
    values = np.array([1, 0.5, -1, -0.5, 0.51, -0.51, 0, 0, -0.75], np.float32)
    data, residual = encoded(values)
    assert list(data) == [*np.float32(1).tobytes(), 81 * 2 + 27 * 0 + 9 * 2 + 3 * 1 + 0, 81 + 27 + 0 + 3 + 1]
    assert residual.tolist() == pytest.approx([0, 0.5, 0, -0.5, -0.49, 0.49, 0, 0, 0.25])


def test_zeros_cost_a_header(both):
    for values in (np.zeros(10_000, np.float32), np.full(10_000, 1e-38, np.float32)):
        data, residual = encoded(values, 1.75)
        assert data == bytes(ternary.HEADER) and np.array_equal(residual, values)
        assert not ternary.decode(data, values.size).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.float32(3.4e38)])
def test_what_is_not_finite_is_refused_and_nothing_is_forgotten(bad, both):
    values, residual = gradients(300), gradients(300, 1)
    values[7], kept = bad, residual.copy()
    with pytest.raises(ValueError, match="NaN, infinity"):
        ternary.encode(values, residual, 1.75)
    assert np.array_equal(residual, kept)


def test_what_was_left_out_of_another_number_of_values_is_refused(both):
    for n in (10, 299, 301):
        with pytest.raises(ValueError, match=f"has 300 values, and {n} were left out"):
            ternary.encode(gradients(300), np.zeros(n, np.float32), 1.5)


@pytest.mark.parametrize("sparsity", [0.99, 2, float("nan"), 1.99999999])
def test_a_sparsity_outside_of_one_to_two_is_refused(sparsity, both):
    with pytest.raises(ValueError, match="less than 2"):
        encoded(gradients(9), sparsity)
    with pytest.raises(ValueError, match="less than 2"):
        ThreeLC(sparsity)


def test_damaged_payloads_are_refused(both):
    values = digits(3, 20, 0, 1, 14)[:-2]
    data, n = encoded(values)[0], values.size
    assert np.array_equal(ternary.decode(data, n), values)
    head, body = data[: ternary.HEADER], data[ternary.HEADER :]
    for end in range(len(data)):
        with pytest.raises(FormatError):
            ternary.decode(data[:end], n)
    for bad in [
        data + b"\0", data + b"\xff", head + body.replace(b"\xff", b"\xfe"), head[:3] + b"\xff" + body,
        np.float32(np.nan).tobytes() + body, np.float32(-1).tobytes() + body, np.float32(-0.0).tobytes(),
        np.float32(0).tobytes() + body, head + b"\x79\x79" + body[1:], head + b"\xf3\xf3" + body[1:],
        head + body[:-1] + b"\0",
    ]:  # fmt: skip
        with pytest.raises(FormatError):
            ternary.decode(bad, n)
    for other in (n - 8, n + 4, 0, 10 * n):
        with pytest.raises(FormatError):
            ternary.decode(data, other)


@given(st.binary(max_size=40), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_or_are_what_encode_makes(data, n):
    try:
        values = ternary.decode(data, n)
    except FormatError:
        return
    scale = np.frombuffer(data, "<f4", 1)[0]
    assert set(np.unique(values)) <= {-scale, np.float32(0), scale}
    if values.any() and np.float32(2.0**-100) < scale < 1e38:
        assert encoded(values)[0] == data


def test_error_feedback_gets_everything_across(both):
    values, residual = gradients(2000), np.zeros(2000, np.float32)
    total, steps = np.zeros(2000), 60
    for _ in range(steps):
        total += ternary.decode(ternary.encode(values, residual, 1.75), values.size)
    assert np.abs(total + residual - steps * values.astype(np.float64)).max() < 1e-4  # float32 sums, not what was sent
    assert np.linalg.norm(total / steps - values) < 0.2 * np.linalg.norm(values)


def test_messages_are_of_whole_payloads():
    weights = {"small": torch.randn(3, 5), "large": torch.randn(40, 30), "half": torch.randn(900).bfloat16()}
    exchange = Exchange(ThreeLC(1.0), {}, None)
    data, sizes = exchange.message(weights), [15, 1200, 900]
    found = exchange.values(data, sizes)
    assert torch.equal(found[0], weights["small"].view(-1))
    for name, part in zip(("large", "half"), found[1:]):
        assert torch.equal(part + exchange.residuals[name], weights[name].float().view(-1))
    for bad in (data[:-1], data + b"\0", data[:40], data[:62]):
        with pytest.raises(FormatError):
            exchange.values(bad, sizes)


def test_a_state_of_another_network_is_refused():
    weight = torch.nn.Parameter(torch.zeros(30, 30))
    exchange = Exchange(ThreeLC(), {weight: "fc.weight"}, None)
    for wrong in ({"fc.weight": torch.zeros(10)}, {"conv.weight": torch.zeros(900)}):
        with pytest.raises(ValueError, match="values were left out, but the model has"):
            exchange.load_state_dict(wrong)


def workers(scenarios, folder, count=2):
    """What each of several processes of workers.py tells of some scenarios, by rank; all must end in four minutes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKERS), scenarios, str(folder), str(count)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    begun = [subprocess.Popen([*command, str(rank)], **how) for rank in range(count)]
    end = time.monotonic() + 240
    try:
        told = [process.communicate(timeout=max(1, end - time.monotonic())) for process in begun]
    finally:
        for process in begun:
            process.kill()
    assert not any(process.returncode for process in begun), told
    return [dict(map(json.loads, out.splitlines())) for out, _ in told]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return workers(" ".join(["training", "convex", *WAYS]), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return workers(" ".join(REFUSED), tmp_path_factory.mktemp("refused"))


def test_two_hundred_steps_leave_workers_equal_bit_for_bit(trained):
    """Half of them after a stop, too; the residuals come back with the checkpoint."""
    (whole, resumed, loss, begun, mean), second = trained[0]["training"], trained[1]["training"]
    assert whole == resumed == second[0] == second[1]
    assert loss < 0.75 * begun
    assert mean and second[4]  # the gradients are the mean of what the messages say


def test_a_convex_problem_is_solved(trained):
    (first, distance), (second, _) = (told["convex"] for told in trained)
    assert first == second and distance < 0.02  # of the optimum, which was at 1


@pytest.mark.parametrize("way", WAYS)
def test_what_else_ddp_can_do_works(way, trained):
    assert trained[0][way] == trained[1][way]


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_sent_stops_every_worker_with_its_name(way, refused):
    for told in refused:
        assert re.match(REFUSED[way], told[way])


@pytest.mark.parametrize("way", ["death", "silence"])
def test_a_worker_that_is_gone_stops_the_others(way, tmp_path):
    first, _, third = workers(way, tmp_path, 3)
    for told in (first[way], third[way]):
        assert re.match(r"RuntimeError: \S+: the gradients of other workers did not come", told)

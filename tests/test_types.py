"""Types of tensors in a file, and errors that are measured in them."""

import numpy as np
import pytest
import torch
from conftest import floats

from tersenet import load
from tersenet.artifact import Artifact, Tensor, errors_against, relative_error
from tersenet.packed import Uniform, unpack


def test_errors_against_the_original_are_measured():
    tensor = Tensor(Uniform(np.array([1, 2], np.int8), np.array(0.5, np.float32)))
    found = errors_against(Artifact({"w": tensor}), {"w": np.array([0.5, 1.5], np.float32)})
    assert found["w"] == pytest.approx(0.5 / np.sqrt(2.5))
    with pytest.raises(ValueError, match="w: shape"):
        errors_against(Artifact({"w": tensor}), {"w": np.zeros(3)})


@pytest.mark.parametrize(
    "array,original,error",
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([0, 0], [0, 0], 0),
        ([], [], 0),
        ([0, 1e-9], [0, 0], np.inf),
        ([np.nan, np.inf, 1], [np.nan, np.inf, 1], 0),
        ([np.nan, np.inf, -np.inf, 3], [np.nan, np.inf, -np.inf, 4], 0.25),
        ([np.nan, 1], [1, 1], np.inf),
        ([np.inf, 1], [-np.inf, 1], np.inf),
        ([0, 0], [3e-30, 4e-30], 1),
        ([3e-30, 0], [3e-30, 4e-30], 0.8),
        ([0, 1.4e-45], [1.4e-45, 1.4e-45], 0.5**0.5),
        ([1, 1e-20], [1, 0], 1e-20),
        ([3e38, 0], [3e38, 3e38], 0.5**0.5),
    ],
)
def test_an_error_is_seen_however_small_or_large_the_values(array, original, error):
    for kind in (np.float32, np.float64):
        found = relative_error(np.array(array, kind), np.array(original, kind))
        assert found == pytest.approx(error, rel=1e-6, abs=0)


def test_what_is_equal_once_rounded_to_the_tensors_type_has_no_error():
    original = floats(5000)
    for kind in ("float16", "bfloat16"):
        tensor = Tensor(original, kind)
        assert errors_against(Artifact({"w": tensor}), {"w": original}) == {"w": 0}
        moved = Tensor(original * np.float32(1.02), kind)
        assert errors_against(Artifact({"w": moved}), {"w": original})["w"] == pytest.approx(0.02, rel=0.02)
    assert relative_error(original.astype(np.float16), original) == 0
    assert errors_against(Artifact({"w": Tensor(original)}), {"w": original.astype(">f8")}) == {"w": 0}


def test_a_stored_error_is_never_less_than_the_error():
    for error in (1e-12, 1e-7, 3.1e-5, 0.1, 0.123456, 1.0, 70000.0, np.inf):
        stored = load(Artifact({"w": Tensor(floats(3), error=error)}).to_bytes()).tensors["w"].error
        assert error <= stored and (stored <= error * 1.002 + 1e-7 or error > 65504)
    assert load(Artifact({"w": Tensor(floats(3), error=0.0)}).to_bytes()).tensors["w"].error == 0


def test_what_is_packed_comes_back_in_its_own_type():
    values = Uniform(np.arange(-120, 120, dtype=np.int16), np.array(0.123, np.float32))
    exact = unpack(values)
    for kind in ("float16", "float64"):
        assert np.array_equal(load(Artifact({"w": Tensor(values, kind)}).to_bytes()).unpack()["w"], exact.astype(kind))
    dense = Tensor(values, "bfloat16").unpack()
    assert dense.dtype == np.float32 and not (dense.view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(dense, torch.from_numpy(exact).bfloat16().float().numpy())
    large = Tensor(Uniform(np.array([-2, 2], np.int8), np.array(40000, np.float32)), "float16").unpack()
    assert large.tolist() == [-65504, 65504]
    odd = np.array([1.00390625, 1.01171875, np.inf, -0.0, np.nan, 1e-40, 3.4e38], np.float32)  # two ties
    ours, theirs = Tensor(odd, "bfloat16").unpack(), torch.from_numpy(odd).bfloat16().float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True) and np.signbit(ours[3])
    payload = np.array([0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(Tensor(payload, "bfloat16").unpack()).all()


def test_a_bare_array_is_stored_in_the_tensors_type():
    for kind in ("float16", "bfloat16", "float64"):
        tensor = Tensor(floats(30, 30), kind)
        assert np.array_equal(load(Artifact({"w": tensor}).to_bytes()).unpack()["w"], tensor.unpack())
    big = Tensor(np.arange(5, dtype=">i4"), "int32")
    assert load(Artifact({"w": big}).to_bytes()).unpack()["w"].tolist() == [0, 1, 2, 3, 4]

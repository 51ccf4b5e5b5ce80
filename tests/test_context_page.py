"""docs/format.md is enough to decode the context codec: a decoder written from it gives what the C core gives."""

import math

import numpy as np
import pytest
from conftest import path_levels
from context_from_the_page import decode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_golden import GOLDEN, HASHES

from tersenet.access import Memory
from tersenet.codecs import CODECS
from tersenet.codecs.context import encode_levels
from tersenet.codecs.context_model import CHOICES, MODELS, Model, value_range, walked
from tersenet.codecs.trellis import follows
from tersenet.container import CODED, INTEGERS
from tersenet.header import Header

CONTEXT = CODED.index("context")
WIDE = -(1 << 31), (1 << 31) - 1
SHAPES = [(1,), (7,), (2048,), (1, 9), (9, 130), (4, 2048), (6, 5, 3, 3), (4, 120, 3, 3), (8, 16, 9), (3, 1, 70)]
SHAPES += [(5, 2, 9, 8)]  # of more places in a kernel than have means of their own


def agrees(values, model, origin=0):
    data = encode_levels(values, model, origin)
    found = CODECS["context"].decode(data, values.shape, np.dtype(np.int32))
    assert np.array_equal(found, values + origin)
    assert decode(data, values.shape, *WIDE) == found.reshape(-1).tolist()


def test_golden_streams_decode_from_the_page():
    seen = 0
    for name in HASHES:
        data = (GOLDEN / f"{name}.terse").read_bytes()
        header = Header.read(Memory(data), None)
        for promise in [p for entry in header.entries.values() for p in entry.promises] + header.pools:
            if promise.codec == CONTEXT:
                whole = promise.dtype.kind != "f"
                shape = promise.shape if whole else (promise.size * INTEGERS[promise.form],)
                dtype = promise.dtype if whole else np.dtype(np.uint8)
                stream = data[promise.offset : promise.offset + promise.length]
                expected = CODECS["context"].decode(stream, shape, dtype).reshape(-1).tolist()
                assert decode(stream, shape, *value_range(dtype)) == expected
                seen += 1
    assert seen >= 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.2, 3, 4000])
def test_every_shape_and_choice_decodes_from_the_page(shape, scale):
    rng = np.random.default_rng(math.prod(shape))
    values = np.rint(rng.laplace(0, scale, shape)).astype(np.int32)
    columns = values.reshape(walked(shape)[:2])
    columns[:, rng.random(columns.shape[1]) < 0.3] = 0
    columns[0, 0] = 1
    rates = [int(rng.integers(len(CHOICES[name]))) for name in ("slow", "blend", "memory", "settle")]
    for model in (Model(), Model(signs=1), Model(1, *rates, signs=1, skip=1)):
        agrees(values, model)
    agrees(-np.abs(values), Model(1, skip=1), 5)
    agrees(np.abs(values), Model(signs=1), -5)


@pytest.mark.parametrize("shape", [(5, 7), (9, 130), (12, 20, 3, 3)])
def test_trellises_decode_from_the_page(shape):
    values = path_levels(*shape).astype(np.int32)
    values.reshape(len(values), -1)[:, -9:] = 0
    assert follows(values.reshape(len(values), -1))
    for model in (Model(trellis=1), Model(1, 1, 2, 3, 1, 1, 1, 1)):
        agrees(values, model)


@given(arrays(np.int32, st.sampled_from(SHAPES), elements=st.integers(-(2**22), 2**22)), st.integers(0, MODELS - 1))
@settings(deadline=None, max_examples=40)
def test_any_array_by_any_model_decodes_from_the_page(values, number):
    agrees(values, Model.of_number(number)._replace(trellis=0))


def test_what_is_damaged_is_refused_by_both():
    values = np.rint(np.random.default_rng(1).laplace(0, 2, (9, 130))).astype(np.int32)
    data, refused = encode_levels(values, Model(signs=1)), 0
    for at in range(0, len(data), 7):
        garbled = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        try:
            expected = CODECS["context"].decode(garbled, values.shape, values.dtype).reshape(-1).tolist()
        except ValueError:
            refused += 1
            with pytest.raises(AssertionError):
                decode(garbled, values.shape, *WIDE)
        else:
            assert decode(garbled, values.shape, *WIDE) == expected
    assert refused > 50

"""One contract over the table of codecs, and each codec's own promises."""

import lzma
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tersenet import codecs, native
from tersenet.artifact import Artifact, Tensor
from tersenet.codecs import CODECS, filters, huffman, literals, rans
from tersenet.codecs.context import _Sizes, choose, encode_levels, sign_shares
from tersenet.codecs.context_model import LANES, SMALL, Model
from tersenet.codecs.stream import FormatError, Reader, Unsuited, put_number, spread, unzigzag, zigzag
from tersenet.codecs.trellis import NEXT, follows
from tersenet.packed import Uniform

RNG = np.random.default_rng(0)
TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_]
CASES = {
    "empty": np.zeros((0, 3), np.int32),
    "one": np.array([3], np.int8),
    "scalar": np.array(-9, np.int32),
    "constant": np.full((4, 5), -7, np.int16),
    "ternary": RNG.integers(-1, 2, (33, 7)).astype(np.int8),
    "skewed": RNG.choice([0] * 60 + [1, -1, 4], (40, 25)).astype(np.int8),
    "laplace": np.rint(RNG.laplace(0, 3, (16, 4, 3, 3))).astype(np.int16),
    "alphabet": RNG.integers(0, 3000, 700).astype(np.uint16),
    "wide": RNG.integers(-(2**29), 2**29, 50).astype(np.int32),
    "extremes": np.array([-(2**63), 0, 2**63 - 1], np.int64),
    "unsigned": np.array([0, 2**64 - 1, 5], np.uint64),
    "mask": RNG.random((30, 30)) < 0.1,
    "zeros": np.zeros(2000, np.uint8),
    "transposed": np.rint(RNG.laplace(0, 1, (20, 30))).astype(np.int32).T,
    "long": RNG.choice([0, 0, 0, 1, 2, 15], 40_001).astype(np.uint8),
}


def suited(codec, values):
    try:
        CODECS[codec].encode(values)
    except Unsuited:
        return False
    return True


PAIRS = [(codec, case) for codec in CODECS for case in CASES if suited(codec, CASES[case])]


def test_every_array_has_a_codec_and_every_codec_an_array():
    assert {case for _, case in PAIRS} == set(CASES) and {codec for codec, _ in PAIRS} == set(CODECS)


@pytest.mark.parametrize("codec,case", PAIRS)
def test_every_codec_gives_back_what_it_took(codec, case, both):
    values = CASES[case]
    data = CODECS[codec].encode(values)
    back = CODECS[codec].decode(data, values.shape, values.dtype)
    assert back.dtype == values.dtype and back.shape == values.shape
    assert np.array_equal(back, values)


@pytest.mark.parametrize("codec,case", PAIRS)
def test_the_twin_makes_the_same_bytes(codec, case, monkeypatch):
    first = CODECS[codec].encode(CASES[case])
    monkeypatch.setattr(native, "library", lambda: None)
    assert CODECS[codec].encode(CASES[case]) == first


@pytest.mark.parametrize("codec", CODECS)
@given(values=arrays(st.sampled_from(TYPES), st.integers(1, 60)))
@settings(max_examples=60, deadline=None)
def test_any_integers_of_any_type(codec, values):
    try:
        data = CODECS[codec].encode(values)
    except Unsuited:
        return
    assert np.array_equal(CODECS[codec].decode(data, values.shape, values.dtype), values)


@pytest.mark.parametrize("codec", CODECS)
def test_short_long_and_garbled_streams_are_refused_or_decode(codec, both):
    values = CASES["ternary" if codec == "trits" else "skewed"]
    values = values[:12] if both == "twin" else values
    data = CODECS[codec].encode(values)
    for cut in range(len(data)):
        assert _other_or_refused(codec, data[:cut], values)
    assert _other_or_refused(codec, data + b"\1", values)
    for at in range(len(data)):
        garbled = bytearray(data)
        garbled[at] ^= int(RNG.integers(1, 256))
        assert _decoded_or_refused(codec, bytes(garbled), values)


def _decoded_or_refused(codec, data, values):
    try:
        back = CODECS[codec].decode(data, values.shape, values.dtype)
    except FormatError:
        return True
    return back.shape == values.shape and back.dtype == values.dtype


def _other_or_refused(codec, data, values):
    """Of another length only the context coder's pass, whose states run down to 0 there too: the checksum tells."""
    try:
        back = CODECS[codec].decode(data, values.shape, values.dtype)
    except FormatError:
        return True
    return codec == "context" and not np.array_equal(back, values)


def test_the_smallest_codec_wins_and_speed_costs_at_most_five_per_cent():
    values = CASES["skewed"]
    name, data = codecs.encode(values)
    assert len(data) == min(len(CODECS[c].encode(values)) for c in codecs.DEFAULT if c not in ("trits",))
    fast_name, fast = codecs.encode(values, prefer="speed")
    assert len(fast) <= 1.05 * len(data) + 16
    assert CODECS[fast_name].pace >= CODECS[name].pace


def laplace(scale, shape):
    return np.clip(np.rint(np.random.default_rng(13).laplace(0, scale, shape)), -128, 127).astype(np.int8)


PLANES = np.random.default_rng(12).normal(0, 0.05, 20_000).astype("<f4").view(np.uint8).reshape(-1, 4).T.reshape(-1)
LARGE = {
    "wide": laplace(20, (64, 64, 3, 3)),
    "narrow": laplace(0.5, (300, 100)),
    "columns": np.rint(laplace(20, (128, 200)) * np.geomspace(0.01, 1, 200)).astype(np.int8),
    "head of zeros": np.concatenate([np.zeros((100, 100), np.int8), laplace(9, (200, 100))]),
    "head of noise": np.concatenate([RNG.integers(-128, 128, (40, 100)), np.zeros((400, 100))]).astype(np.int8),
    "strings": np.tile(laplace(30, 300), 100),
    "sparse": np.where(RNG.random((400, 100)) < 0.03, 5, 0).astype(np.uint8),
    "planes of floats": PLANES,
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_tried_on_a_part_comes_as_small_as_what_is_tried_whole(name):
    _, data = codecs.encode(LARGE[name])
    assert len(data) <= 1.003 * min(
        len(CODECS[c].encode(LARGE[name])) for c in codecs.DEFAULT if suited(c, LARGE[name])
    )


def test_a_value_that_the_part_lacks_is_coded_by_what_can_hold_it():
    values = RNG.integers(0, 3, 100_000).astype(np.int32)
    values[777] = 1 << 26  # too far for all but the general compressors
    name, data = codecs.encode(values)
    assert len(data) <= 1.01 * min(len(CODECS[c].encode(values)) for c in codecs.GENERAL[:3])
    assert np.array_equal(codecs.decode(name, data, values.shape, values.dtype), values)


@pytest.mark.parametrize("shape", [(5000,), (64 * 1024,), (1, 700, 9), (64, 20, 3, 3), (5, 4000), (7,)])
@pytest.mark.parametrize("most", [64, 4096])
def test_a_part_comes_from_all_over_an_array(shape, most):
    values = np.arange(math.prod(shape)).reshape(shape)
    part = spread(values, most)
    assert np.unique(part).size == part.size and np.isin(part, values).all()
    assert part.size <= max(2 * most, values.size // 5)
    assert part.size == values.size or {0, 1, 2, 3} <= {int(k) * 4 // values.size for k in part.flat} or len(part) < 4


@pytest.mark.parametrize("context", range(5))
@pytest.mark.parametrize("kind", ["floats", "zeros", "noise", "mixed", "ones", "one"])
def test_literals_are_lzma2_and_the_twin_makes_the_same_bytes(kind, context, monkeypatch):
    noise = RNG.integers(0, 256, 9000, np.uint8)
    some = {"floats": PLANES[: 4 * 2500], "zeros": np.zeros(70_000, np.uint8), "noise": noise, "one": noise[:1]}
    some |= {"mixed": np.where(np.arange(9000) // 1300 % 2, noise, noise // 16), "ones": np.full(3000, 255, np.uint8)}
    data = some[kind].astype(np.uint8).tobytes()
    coded = literals.encode(data, context)
    assert lzma.decompress(coded, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 12}]) == data
    assert len(coded) <= len(data) + 3 * (len(data) // 1024 + 1) + 1
    monkeypatch.setattr(native, "library", lambda: None)
    assert literals.encode(data, context) == coded


def test_literals_code_planes_of_floats_smaller_than_lzma_with_its_matches():
    usual = lzma.compress(PLANES.tobytes(), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    assert len(literals.encode(PLANES.tobytes(), 0)) < 0.995 * len(usual)
    assert len(CODECS["lzma"].encode(np.tile(RNG.integers(0, 256, 5000, np.uint8), 8))) < 5500  # here they are worth it


@pytest.mark.parametrize("model", [Model(), Model(1, 1, 2, 3, 1, 0), Model(skip=1), Model(trellis=1)])
def test_what_a_model_is_compared_by_is_what_it_takes(model, both):
    sizes = np.abs(path(9, (24, 40), 0.3))
    bits = _Sizes(sizes, model, int(sizes.max())).bits(model)
    names = 40 * model.skip
    assert abs(bits / 8 - len(encode_levels(sizes, model))) < 30 + names


def test_any_number_of_threads_makes_the_same_file(monkeypatch):
    tensors = {f"w{k}": Tensor(Uniform(laplace(k + 1, (64, 80 + k)), np.array(0.5, np.float32))) for k in range(5)}
    tensors |= {f"f{k}": Tensor(np.random.default_rng(k).normal(size=(50, 60)).astype(np.float32)) for k in range(3)}
    files = set()
    for cores in (1, 2, 5):
        monkeypatch.setattr("tersenet.container.CORES", cores)
        files.add(Artifact(tensors).to_bytes())
    assert len(files) == 1


@given(st.integers(-(2**70), 2**70))
def test_zigzag_is_a_bijection(value):
    assert zigzag(value) >= 0 and unzigzag(zigzag(value)) == value


@given(st.integers(0, 2**63 - 1))
def test_numbers_have_one_form(value):
    reader = Reader(put_number(value))
    assert reader.number() == value and reader.left == 0


def test_a_number_in_a_longer_form_is_refused():
    with pytest.raises(FormatError):
        Reader(b"\x80\x00").number()


@given(arrays(np.int32, st.integers(1, 200), elements=st.sampled_from([0, 0, 0, 0, 5])), st.integers(1, 12))
def test_relative_indices_find_the_non_zeros_across_fillers(values, limit):
    gaps = filters.relative_index(values, limit)
    found = np.flatnonzero(values)
    assert gaps.size == 0 or (gaps.min() >= 0 and gaps.max() <= limit)
    assert np.array_equal(filters.positions(gaps, limit, found.size, values.size), found)


@given(arrays(np.int32, st.integers(0, 300), elements=st.sampled_from([0, 0, 0, 1, 9])))
def test_zero_runs_come_back(values):
    tokens = filters.zero_runs(values)
    assert tokens.size <= values.size
    assert np.array_equal(filters.undo_zero_runs(tokens, values.size), values)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(lambda c: sum(x > 0 for x in c) > 1))
def test_huffman_lies_within_one_bit_of_the_entropy(counts):
    lengths, total = huffman.code_lengths(counts), sum(counts)
    mean = sum(c * int(n) for c, n in zip(counts, lengths, strict=True)) / total
    entropy = -sum(c / total * np.log2(c / total) for c in counts if c)
    assert entropy - 1e-9 <= mean < entropy + 1
    assert sum(2.0 ** -int(n) for n in lengths if n) == 1


def test_huffman_codes_stay_within_fifteen_bits():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert huffman.code_lengths(fibonacci).max() == 15


def test_rans_comes_within_half_a_per_cent_of_the_entropy():
    values = np.clip(np.rint(np.random.default_rng(3).laplace(0, 14, 400_000)), -128, 127).astype(np.int8)
    share = np.unique(values, return_counts=True)[1] / values.size
    entropy = -(share * np.log2(share)).sum() * values.size / 8
    assert len(CODECS["rans"].encode(values)) < 1.005 * entropy


@pytest.mark.parametrize("simd", [0, 1, 2])
def test_every_simd_path_decodes_the_same(simd):
    if simd > native.simd():
        pytest.skip("this machine has no such instructions")
    for size in (1 << 15, (1 << 15) + 1, 100_003):
        values = np.minimum(np.random.default_rng(size).geometric(0.3, size), 200).astype(np.uint8)
        assert np.array_equal(rans.decode_bytes(Reader(rans.encode_bytes(values)), size, simd), values)


def decoded(data, shape):
    return CODECS["context"].decode(data, shape, np.dtype(np.int32))


def test_context_coding_beats_the_entropy_of_one_table_where_columns_differ():
    rng = np.random.default_rng(4)
    values = np.rint(rng.laplace(0, 1, (64, 400)) * rng.choice([0.2, 3], 400)).astype(np.int32)
    share = np.unique(values, return_counts=True)[1] / values.size
    assert len(CODECS["context"].encode(values)) < 0.9 * -(share * np.log2(share)).sum() * values.size / 8


def test_context_models_say_how_they_lay_out_an_array(both):
    values = np.rint(np.random.default_rng(5).laplace(0, 2, (6, 5, 3, 3))).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    for model in (Model(0), Model(1), Model(1, 3, 4, 3, 3, 1), choose(values, low, high)):
        assert Model.of_number(model.number()) == model
        assert np.array_equal(decoded(encode_levels(values, model), values.shape), values)


@pytest.mark.parametrize("scale", [0.05, 0.5, 3, 300])
@pytest.mark.parametrize("shape", [(64, 200), (20, 20, 3, 3), (64, 200, 1, 1), (600, 4), (3, SMALL), (3 * SMALL,)])
def test_four_rows_at_once_make_the_bytes_of_the_twin(scale, shape, monkeypatch):
    values = np.rint(np.random.default_rng(6).laplace(0, scale, shape)).astype(np.int32)
    values.reshape(len(values), -1)[:, ::3] = 0
    for model in (Model(0), Model(1, 1, 2, 3, 1, 1), Model(1, skip=1)):
        data = encode_levels(values, model)
        assert np.array_equal(decoded(data, shape), values)
        with monkeypatch.context() as without:
            without.setattr(native, "library", lambda: None)
            assert encode_levels(values, model) == data
            assert np.array_equal(decoded(data, shape), values)


def path(scale, shape, empty=0.0):
    """Levels whose rows are paths through the trellis, a part of the columns empty."""
    numbers = np.rint(np.random.default_rng(9).laplace(0, scale, (shape[0], math.prod(shape[1:])))).astype(np.int32)
    numbers[:, np.random.default_rng(11).random(numbers.shape[1]) < empty] = 0
    for row in numbers:
        state = 0
        for j, number in enumerate(row):
            row[j] = np.sign(number) * (2 * abs(number) - (state & 1))
            state = NEXT[state][number & 1]
    assert follows(numbers)
    return numbers.reshape(shape)


@pytest.mark.parametrize("scale", [0.05, 0.5, 3, 300])
@pytest.mark.parametrize("shape", [(64, 200), (20, 20, 3, 3), (600, 4), (5, 7)])
def test_paths_through_the_trellis_are_coded_by_their_numbers(scale, shape, monkeypatch):
    values = path(scale, shape, 0.3)
    low, high = min(int(values.min()), 0), max(int(values.max()), 0)
    assert choose(values, low, high).trellis
    for model in (choose(values, low, high), Model(1, 1, 2, 3, 1, 1, 1), Model(trellis=1, skip=1)):
        data = encode_levels(values, model)
        assert np.array_equal(decoded(data, shape), values)
        with monkeypatch.context() as without:
            without.setattr(native, "library", lambda: None)
            assert encode_levels(values, model) == data
            assert np.array_equal(decoded(data, shape), values)


def test_the_numbers_of_a_path_cost_no_more_than_plain_levels_of_their_size():
    plain = np.rint(np.random.default_rng(9).laplace(0, 3, (200, 300))).astype(np.int32)
    values = path(3, (200, 300))
    assert len(CODECS["context"].encode(values)) < 1.01 * len(CODECS["context"].encode(plain))
    values[100, 150] += 1 if values[100, 150] else 2  # no path any more
    assert np.array_equal(
        CODECS["context"].decode(CODECS["context"].encode(values), values.shape, values.dtype), values
    )


def test_columns_that_hold_nothing_are_left_out(both):
    values = np.rint(np.random.default_rng(10).laplace(0, 1, (64, 30, 5))).astype(np.int32)
    values[:, 7:20] = 0
    low, high = int(values.min()), int(values.max())
    model = choose(values, low, high)
    data = encode_levels(values, model)
    assert model.skip and len(data) < len(encode_levels(values, model._replace(skip=0)))
    assert np.array_equal(decoded(data, values.shape), values)
    first = np.zeros((2000, 60), np.int32)
    first[-30:, :9] = values[:30, 0, 0, None]  # the rows that the model is chosen by are all zero
    assert np.array_equal(decoded(CODECS["context"].encode(first), first.shape), first)


@pytest.mark.parametrize("width", [1024, 2048, 5120])
def test_the_names_of_any_number_of_columns_are_one_row(width, monkeypatch):
    values = np.zeros((20, width), np.int8)
    values[:, ::3] = np.random.default_rng(12).integers(-2, 3, (20, len(range(0, width, 3))))
    data = CODECS["context"].encode(values)
    assert len(data) < len(encode_levels(values.astype(np.int32), Model()))
    assert np.array_equal(CODECS["context"].decode(data, values.shape, values.dtype), values)
    plain = encode_levels(values.astype(np.int32), Model(skip=1))
    monkeypatch.setattr(native, "library", lambda: None)
    assert np.array_equal(CODECS["context"].decode(data, values.shape, values.dtype), values)
    assert encode_levels(values.astype(np.int32), Model(skip=1)) == plain


def test_lanes_that_have_little_to_code_come_back():
    assert Model().matrix((LANES, SMALL)).lanes == LANES
    for some in ([0], [0, 3 * SMALL], range(5), range(0, LANES * SMALL, 7)):
        values = np.zeros(LANES * SMALL, np.int32)
        values[list(some)] = 5
        for sign in (1, -1):
            values[next(iter(some))] *= sign
            data = encode_levels(values.reshape(LANES, SMALL), Model())
            assert np.array_equal(decoded(data, (LANES, SMALL)), values.reshape(LANES, SMALL))


def test_rows_of_one_place_in_the_kernel_predict_each_other():
    rng = np.random.default_rng(7)
    values = np.rint(rng.laplace(0, 1, (64, 64, 3, 3)) * np.linspace(0.1, 3, 9).reshape(3, 3)).astype(np.int32)
    shuffled = rng.permuted(values.reshape(64, 64, 9), axis=2).reshape(values.shape)
    assert len(encode_levels(values, Model(1))) < 0.95 * len(encode_levels(shuffled, Model(1)))


def test_signs_that_follow_their_neighbours_cost_less():
    rng = np.random.default_rng(8)
    smooth = np.repeat(rng.choice([-1, 1], (40, 40, 1, 1)), 9, axis=1).reshape(40, 40, 3, 3)
    values = (smooth * np.where(rng.random(smooth.shape) < 0.1, -1, 1)).astype(np.int32)
    assert sign_shares(values, (3, 3)) == 0x8233  # after two that differ either is as likely
    plain, known = (len(encode_levels(values, Model(signs=signs))) for signs in (0, 1))
    assert known < 0.8 * plain


def test_signs_that_never_occur_are_refused(both):
    values = np.array([[3, -1, 2], [-2, 0, 1]], np.int32)
    data = encode_levels(values, Model(signs=1))
    assert np.array_equal(decoded(data, values.shape), values)
    head, (one, two), rest = data[:5], data[5:7], data[7:]
    for shares in (b"\0\0", bytes([one & 0xF0, two]), bytes([one, two & 0x0F])):
        with pytest.raises(FormatError):
            decoded(head + shares + rest, values.shape)


@pytest.mark.parametrize("shape", [((1 << 20) + 1,), (1 << 10, 1 << 10)])
def test_large_arrays_come_back(shape):
    values = np.random.default_rng(7).choice(np.array([0, 0, 0, 0, 0, -1, 1, 9], np.int8), shape)
    data = CODECS["context"].encode(values)
    assert np.array_equal(CODECS["context"].decode(data, shape, values.dtype), values)


@given(arrays(np.int32, st.integers(1, 40), elements=st.integers(-(2**22), 2**22)))
@settings(deadline=None)
def test_the_context_coder_keeps_magnitudes_of_any_size(values):
    data = CODECS["context"].encode(values)
    assert np.array_equal(CODECS["context"].decode(data, values.shape, values.dtype), values)

"""Products of packed weights against those of the unpacked ones, on every path that this machine has."""

import numpy as np
import pytest
from conftest import floats, fresh_process, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet import native
from tersenet.packed import Codebook, Factored, Reshaped, Sliced, Sparse, Uniform, unpack
from tersenet.runtime import forms, kernels
from tersenet.runtime.convolution import Side, convolved
from tersenet.runtime.forms import Chain, Codes, Levels, MaskedRows, SparseColumns, SparseRows, Sum, Vectors
from tersenet.runtime.layouts import codes, levels, masked_rows, sparse_columns, sparse_rows, vectors

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C core was built")
PATHS = range(native.simd() + 1)


@pytest.fixture
def forced(monkeypatch):
    """A form for every tree that has one, however small it is."""
    monkeypatch.setattr(kernels, "CALL", dict.fromkeys(kernels.CALL, 0.0))
    monkeypatch.setattr(kernels, "MANY", 1e6)


@pytest.fixture(params=PATHS, ids=["portable", "AVX2", "AVX-512"][: len(PATHS)])
def path(request, monkeypatch):
    monkeypatch.setattr(native, "simd", lambda: request.param)
    return request.param


def inputs(count, columns):
    return floats(count, columns, seed=7)


def integers(rng, low, high, *shape):
    return rng.integers(low, high, shape).astype(np.int16)


def sparse(rng, rows, columns, part, shared=0):
    mask = rng.random((rows, columns)) < part
    n = int(mask.sum())
    book = Codebook(rng.integers(0, max(shared, 1), n).astype(np.uint8), floats(shared, 1))
    return Sparse(mask, book if shared else floats(n))


def weights():
    """By name, a weight and the form that it is executed in."""
    rng = np.random.default_rng(5)
    wide = np.rint(rng.normal(0, 3, (50, 112))).astype(np.int16)
    steps = tuple(rng.integers(-3, 4, shape).astype(np.int8) for shape in ((50, 1), (1, 112)))
    kernel = np.zeros((6, 4, 3, 3), bool)
    kernel[:, 1, ::2] = True
    return {
        "sparse": (sparse(rng, 37, 90, 0.1), SparseRows),
        "sparse, shared": (sparse(rng, 37, 90, 0.1, 30), SparseColumns),
        "sparse, 256 shared": (sparse(rng, 37, 90, 0.2, 256), SparseColumns),
        "sparse, of levels": (Sparse(kernel, Uniform(integers(rng, -9, 9, 36), np.float32([0.5]))), SparseRows),
        "sparse, empty rows": (Sparse(np.eye(20, 33, k=-9) > 0, floats(11)), SparseRows),
        "mask": (sparse(rng, 37, 90, 0.5), MaskedRows if native.simd() == 2 else SparseRows),
        "8 bits": (Uniform(integers(rng, -128, 128, 35, 83), floats(35, 1)), Levels),
        "8 bits, unsigned": (Uniform(integers(rng, 0, 256, 35, 83), floats(35, 1), np.int16([-100])), Levels),
        "4 bits": (Uniform(integers(rng, -8, 8, 35, 83), floats(35, 1)), Levels),
        "4 bits in groups": (
            Uniform(integers(rng, 0, 16, 35, 96), floats(35, 3), integers(rng, -15, 1, 35, 3)),
            Levels,
        ),
        "2 bits": (Uniform(integers(rng, -2, 2, 35, 83), floats(1)), Levels),
        "ternary, over blocks": (Uniform(integers(rng, -1, 2, 3, 16_385 * 2), floats(3, 1)), Levels),
        "levels with steps": (Uniform(np.clip(wide, -7, 8), np.float32(0.1)[()] * np.ones(()), None, steps), Levels),
        "few levels outside": (Uniform(wide, floats(50, 1)), Sum),
        "few levels, in groups with steps": (Uniform(wide, floats(50, 7), None, steps), Sum),
        "levels, mostly zero": (Uniform((wide == 9).astype(np.int8), floats(50, 1)), SparseRows),
        "16 values": (Codebook(rng.integers(0, 16, (35, 83)).astype(np.uint8), floats(16, 1)), Codes),
        "17 values": (Codebook(rng.integers(0, 17, (35, 83)).astype(np.uint8), floats(17, 1)), Codes),
        "100 values": (Codebook(rng.integers(0, 100, (35, 83)).astype(np.uint8), floats(100, 1)), Codes),
        "vectors": (Codebook(rng.integers(0, 200, (35, 21)).astype(np.uint8), floats(200, 4)), Vectors),
        "factors": (Factored("or,ri->oi", (floats(35, 8), floats(8, 83)), (35, 83)), Chain),
        "factors the other way": (
            Factored("ro,rs,is->oi", (floats(8, 35), floats(8, 5), floats(83, 5)), (35, 83)),
            Chain,
        ),
        "rows": (Sliced(np.arange(0, 70, 2), sparse(rng, 35, 83, 0.1), 0, 70), forms.Part),
        "columns": (Sliced(np.arange(5, 88), Uniform(integers(rng, -8, 8, 35, 83), floats(35, 1)), 1, 90), forms.Part),
        "another order": (Reshaped(sparse(rng, 35, 83, 0.1), (83, 35), (1, 0), (83, 35)), SparseRows),
    }


@pytest.mark.parametrize("name", weights())
@pytest.mark.parametrize("count", [0, 1, 3, 8, 37])
def test_a_product_is_that_of_the_unpacked_weight(name, count, forced, path):
    tree, kind = weights()[name]
    form = kernels.choose(tree).form
    assert isinstance(form, kind) or (kind is MaskedRows and path < 2)
    weight = np.asarray(unpack(tree)).reshape(tree.shape[0], -1)
    x = inputs(count, weight.shape[1])
    expected = x @ weight.T
    for threads in (1, 3):
        found = form.product(x, threads)
        assert found.shape == expected.shape and found.dtype == np.float32
        assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", [name for name, (_, kind) in weights().items() if kind is Levels])
@pytest.mark.parametrize("activations", [8, 16, 24])
def test_integers_are_the_same_to_the_last_bit_on_every_path(name, activations, forced, monkeypatch):
    tree, _ = weights()[name]
    x, found = inputs(11, tree.shape[1]), []
    for path in PATHS:
        monkeypatch.setattr(native, "simd", lambda path=path: path)
        form = kernels.choose(tree, activations=activations).form
        found.append(form.product(x))
        assert np.array_equal(form.product(x, 2), found[0])
        assert all(np.array_equal(form.product(one[None])[0], own) for one, own in zip(x, found[0], strict=True))
    assert all(np.array_equal(other, found[0]) for other in found)


@pytest.mark.parametrize(("activations", "error"), [(8, 1e-2), (16, 4e-5), (24, 4e-7)])
def test_inputs_of_more_bits_say_more_exactly_what_floats_say(activations, error, forced, path):
    tree = Uniform(integers(np.random.default_rng(0), -128, 128, 64, 512), np.ones((), np.float32))
    x = inputs(4, 512)
    expected = x.astype(np.float64) @ unpack(tree).T.astype(np.float64)
    found = kernels.choose(tree, activations=activations).form.product(x)
    assert np.linalg.norm(found - expected) < error * np.linalg.norm(expected)


@pytest.mark.parametrize("name", weights())
def test_inputs_in_fixed_point_are_multiplied_as_they_are(name, forced, path):
    tree, _ = weights()[name]
    form = kernels.choose(tree, fixed=(8, 5)).form
    weight = np.asarray(unpack(tree)).reshape(tree.shape[0], -1)
    x = np.random.default_rng(1).integers(-128, 128, (9, weight.shape[1])).astype(np.float32) / 32
    found, expected = form.product(x, 2), x @ weight.T
    assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)
    if isinstance(form, Levels) and not form.factor.size:
        assert form.planes == 1
        x[2, -1], x[4, 0] = 128 / 32, np.nan  # which are not of eight bits
        other = form.product(x)
        assert np.isnan(other[[2, 4]]).all() and np.array_equal(
            np.delete(other, [2, 4], 0), np.delete(found, [2, 4], 0)
        )


@settings(max_examples=60)
@given(st.integers(0, 900), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_columns_say_what_rows_say_and_pass_over_zeros(rows, columns, part, kept, seed):
    rng = np.random.default_rng(seed)
    mask, book = rng.random((rows, columns)) < part, floats(20, 1)[:, 0]
    by_row = sparse_rows(mask, rng.integers(0, 20, int(mask.sum())), book)
    form, x = sparse_columns(by_row), inputs(6, columns) * (rng.random((6, columns)) < kept)
    assert np.allclose(form.product(x), by_row.product(x), rtol=1e-4, atol=1e-4)
    assert np.array_equal(form.product(x, 3), form.product(x))
    # a column of NaN is not read where its input is zero
    other = sparse_columns(sparse_rows(np.ones((rows, 2), bool), np.tile([0, 1], rows), np.float32([np.nan, 2])))
    assert np.array_equal(other.product(np.float32([[0, 3]])), np.full((1, rows), 6, np.float32))


def test_columns_of_several_blocks_are_the_same_on_any_number_of_threads():
    rng = np.random.default_rng(0)
    mask = rng.random((70_000, 12)) < 0.5
    by_row = sparse_rows(mask, rng.integers(0, 250, int(mask.sum())), floats(250))
    form, x = sparse_columns(by_row), inputs(2, 12)
    assert len(form.starts) > 4 and form.block < 1 << 16
    assert np.allclose(form.product(x), by_row.product(x), rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(form.product(x, threads), form.product(x)) for threads in (2, 5, 40))


def test_levels_times_integers_are_exact(path):
    rng = np.random.default_rng(3)
    for low, high, n in ((0, 256, 16_384), (0, 16, 300), (0, 4, 31)):
        q = rng.integers(low, high, (17, n)).astype(np.int16)
        x = rng.integers(-127, 128, (3, n)).astype(np.float32)
        x[:, 0] = 127  # so that a step is 1
        form = levels(q, np.ones((17, 1), np.float32), 0, None, 1)
        expected = x.astype(np.int64) @ q.T.astype(np.int64)
        assert np.array_equal(form.product(x), expected.astype(np.float32))


@pytest.mark.parametrize("extreme", [-1, 1])
def test_no_sum_overflows(extreme, path):
    """All levels and inputs at their ends, in the widest group there is."""
    q = np.full((1, forms.GROUP + 1), 255, np.int16)
    x = np.full((1, forms.GROUP + 1), extreme, np.float32)
    for planes in (1, 2, 3):
        form = levels(q, np.ones((1, 1), np.float32), 0, None, planes)
        assert form.product(x)[0, 0] == pytest.approx(extreme * 255 * (forms.GROUP + 1), rel=1e-6)


@pytest.mark.parametrize("far", [300, 100_000, 2**31 - 40, -(2**31) + 40])
@pytest.mark.parametrize("by_zero", [True, False])
def test_levels_far_from_zero_overflow_no_sum(far, by_zero, forced):
    """Whose sums with inputs of one sign 32 bits would not hold."""
    near = np.random.default_rng(0).integers(-8, 8, (20, 400))
    scale = np.float32(1 / abs(far)).reshape(1, 1)
    tree = (
        Uniform(near.astype(np.int8), scale, np.full((1, 1), far, np.int32))
        if by_zero
        else Uniform((near + far).astype(np.int32), scale)
    )
    form, x = kernels.choose(tree).form, np.abs(inputs(3, 400))
    found = x @ unpack(tree).T if form is None else form.product(x)
    assert np.allclose(found, x @ unpack(tree).astype(float).T, rtol=1e-5)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 18), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_shape_is_multiplied(rows, columns, count, part, seed):
    rng = np.random.default_rng(seed)
    mask, dense = rng.random((rows, columns)) < part, rng.normal(size=(rows, columns)).astype(np.float32)
    x = rng.normal(size=(count, columns)).astype(np.float32)
    book, number = floats(13, 1), rng.integers(0, 13, (rows, columns))
    q = rng.integers(-3, 4, (rows, columns))
    some = np.where(mask, dense, 0)
    for form, weight in (
        (sparse_rows(mask, dense[mask]), some),
        (masked_rows(mask, dense[mask]), some),
        (codes(number, book[:, 0]), book[number, 0]),
        (levels(q, dense[:, :1], 0, None, 3), q * dense[:, :1]),
        (vectors(number, np.hstack([book, book])), np.repeat(book[number, 0], 2, 1)),
    ):
        own = np.repeat(x, weight.shape[1] // columns, 1)
        assert np.allclose(form.product(own, 2), own @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [65_535, 65_536, 65_537])
def test_positions_of_16_bits_reach_every_column(columns, forced, path):
    mask = np.zeros((3, columns), bool)
    mask[0, -1] = mask[1, 0] = mask[2, 65_534] = True
    tree, x = Sparse(mask, np.float32([2, 3, 4])), inputs(6, columns)
    expected = x @ tree.unpack().T
    form = kernels.choose(tree).form
    assert np.allclose(form.product(x), expected) and np.allclose(form.product(x[:1]), expected[:1])
    q = Uniform(mask.astype(np.int8) - 1, floats(3, 1))
    assert np.allclose(kernels.choose(q).form.product(x), x @ q.unpack().T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_goes_in_and_comes_out(odd, forced, path):
    """An input that is not finite leaves no row finite in which a dense product would have met it."""
    for name, (tree, _) in weights().items():
        if name in ("rows", "columns"):
            continue
        weight = np.asarray(unpack(tree)).reshape(tree.shape[0], -1)
        x = inputs(2, weight.shape[1])
        x[1, 1] = odd
        found = kernels.choose(tree).form.product(x)
        assert np.isfinite(found[0]).all()
        assert not np.isfinite(found[1][weight[:, 1] != 0]).any()


def test_zeros_and_tiny_inputs_are_no_trouble(path):
    form = levels(np.arange(32).reshape(2, 16), np.ones((2, 1), np.float32), 0, None, 3)
    for value in (0, 1e-45, 1e-38, 1e38):
        x = np.full((1, 16), value, np.float32)
        with np.errstate(over="ignore"):
            expected = (x.astype(np.float64) @ np.arange(32).reshape(2, 16).T).astype(np.float32)
        assert np.allclose(form.product(x), expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (Side(3, 1, 1, 1, 1), Side(3, 1, 1, 1, 1)),
        (Side(1, 1, 1, 0, 0), Side(1, 2, 1, 0, 0)),
        (Side(5, 2, 1, 2, 1), Side(3, 3, 2, 0, 4)),
        (Side(2, 4, 3, 0, 0), Side(11, 4, 1, 2, 2)),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_sparse_convolution_is_that_of_the_dense_weight(height, width, count, path):
    import torch

    rng = np.random.default_rng(0)
    weight = np.where(
        rng.random((7, 5, height.kernel, width.kernel)) < 0.3, floats(7, 5, height.kernel, width.kernel), 0
    )
    images = floats(count, 5, 23, 19)
    pads = width.before, width.after, height.before, height.after
    padded = torch.nn.functional.pad(torch.from_numpy(images), pads)
    strides = {"stride": (height.stride, width.stride), "dilation": (height.dilation, width.dilation)}
    expected = torch.nn.functional.conv2d(padded, torch.from_numpy(weight), **strides).numpy()
    rows = weight.reshape(7, -1)
    for threads in (1, 2):
        found = convolved(sparse_rows(rows != 0, rows[rows != 0]), images, (height, width), threads)
        assert found.shape == expected.shape
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_image_that_is_smaller_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="2 x 9 are smaller"):
        convolved(sparse_rows(np.ones((1, 9), bool), floats(9)), floats(1, 1, 2, 9), (Side(3, 1, 1, 0, 0),) * 2)


def test_small_or_dense_weights_stay_dense_and_it_is_said_why():
    assert kernels.choose(floats(9, 9)).form is None
    assert "no form" in kernels.choose(floats(9, 9)).why
    small = kernels.choose(Uniform(np.ones((3, 3), np.int8), np.float32([1])))
    assert small.form is None and small.why.startswith("dense: ") and " us for a batch of 1, dense " in small.why
    large = kernels.choose(sparse(np.random.default_rng(0), 1000, 1000, 0.05))
    assert isinstance(large.form, SparseRows) and "5.0% not zero" in large.why
    with pytest.raises(ValueError, match="8, 16 or 24 bits, not 4"):
        kernels.choose(floats(2, 2), activations=4)


def test_every_node_is_executed_or_said_to_be_dense(forced, path):
    for tree in trees().values():
        choice = kernels.choose(tree)
        assert choice.why.startswith("dense: ") == (choice.form is None)
        if choice.form is not None:
            weight = np.asarray(unpack(tree)).reshape(tree.shape[0], -1)
            assert np.allclose(
                choice.form.product(inputs(2, weight.shape[1])), inputs(2, weight.shape[1]) @ weight.T, 1e-4, 1e-5
            )


def test_without_a_core_all_stays_dense(forced, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert kernels.choose(weights()["sparse"][0]).form is None


def test_forms_take_about_the_bytes_that_they_should():
    rng = np.random.default_rng(0)
    sizes = {"sparse": 6 * 0.1, "4 bits": 0.5, "2 bits": 0.25, "shared": 0.5}
    q = rng.integers(0, 16, (1024, 1024))
    mask = rng.random(q.shape) < 0.1
    found = {
        "sparse": sparse_rows(mask, floats(int(mask.sum()))),
        "4 bits": levels(q, floats(1024, 1), 0, None, 3),
        "2 bits": levels(q % 4, floats(1024, 1), 0, None, 3),
        "shared": codes(q, floats(16)),
    }
    for name, form in found.items():
        assert form.nbytes == pytest.approx(sizes[name] * q.size, rel=0.03)


def test_products_need_no_torch():
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from tersenet.packed import Sparse\n"
        "from tersenet.runtime import convolution, kernels\n"
        "mask = np.random.default_rng(0).random((2000, 2000)) < 0.02\n"
        "form = kernels.choose(Sparse(mask, np.ones(int(mask.sum()), np.float32))).form\n"
        "print(int(form.product(np.ones((1, 2000), np.float32)).sum()) == mask.sum())\n"
    )
    assert fresh_process(script).strip() == "True"


def test_inputs_of_other_shapes_are_refused_and_of_other_types_converted(path):
    rng = np.random.default_rng(0)
    mask, q = rng.random((9, 20)) < 0.5, rng.integers(0, 9, (9, 20))
    weight = np.where(mask, q, 0).astype(np.float32)
    whole = levels(q * mask, np.ones((9, 1), np.float32), 0, None, 3)
    for form in (sparse_rows(mask, weight[mask]), masked_rows(mask, weight[mask]), whole):
        with pytest.raises(ValueError, match=r"\[count, 20\], not \[2, 19\]"):
            form.product(inputs(2, 19))
        x = np.asfortranarray(inputs(3, 40).astype(np.float64))[:, ::2]
        assert np.allclose(form.product(x), x @ weight.T, rtol=1e-5, atol=1e-4)


def test_many_inputs_go_in_parts(monkeypatch):
    tree = sparse(np.random.default_rng(0), 9, 20, 0.5)
    monkeypatch.setattr(forms, "MOST", 7)
    form = sparse_rows(tree.mask, tree.values)
    for count in (7, 8, 21, 23):
        assert np.allclose(form.product(inputs(count, 20)), inputs(count, 20) @ tree.unpack().T, rtol=1e-5, atol=1e-5)

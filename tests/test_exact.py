"""Structure that weights already have is found, and no bit of them is lost."""

import numpy as np
import pytest
import torch
from conftest import floats

from tersenet import load
from tersenet.artifact import Artifact, Tensor
from tersenet.budget import Budget
from tersenet.draft import Draft
from tersenet.methods.exact import exact
from tersenet.packed import Codebook, Reshaped, Sparse, Uniform, check_tree, check_tree_values, map_arrays, unpack
from tersenet.promise import compress


def dense_like(*shape, seed=0):
    return floats(*shape, seed=seed) * np.float32(0.05)


def rounded(w, top, axis=None, scale_type=np.float32):
    """Levels of -top..top times a scale, by tensor or along axes; no -0.0."""
    scale = (np.abs(w).max(axis=axis, keepdims=axis is not None) / top).astype(scale_type).astype(np.float32)
    return np.rint(w / scale).astype(np.int32).astype(np.float32) * scale


def pruned(w, density=0.1, seed=3):
    return np.where(np.random.default_rng(seed).random(w.shape) < density, w, np.float32(0)).astype(w.dtype)


def bfloat16(w):
    return torch.from_numpy(w).bfloat16().float().numpy()


def ternary(*shape, step=0.0371):
    return np.random.default_rng(5).integers(-1, 2, shape).astype(np.float32) * np.float32(step)


def nbytes(tree, dtype):
    return Artifact({"w": Tensor(tree, dtype)}).nbytes


def offers(w, dtype=None):
    """What `exact` offers, every bit of it compared: in NumPy, in torch and from a file."""
    found, dtype = exact(w), dtype or str(w.dtype)
    assert len(found) <= 3
    for tree in found:
        check_tree(tree)
        check_tree_values(tree)
        for dense in (unpack(tree), unpack(map_arrays(tree, lambda path, a: torch.from_numpy(np.array(a)))).numpy()):
            assert dense.shape == w.shape and dense.astype(w.dtype).tobytes() == w.tobytes()
        back = load(Artifact({"w": Tensor(tree, dtype)}).to_bytes(), limit=1 << 30).unpack()["w"]
        assert back.dtype == w.dtype and back.tobytes() == w.tobytes()
    return found


def smaller(w, kind, part, dtype=None):
    """The first offer, which is of a kind and takes at most a part of the bytes of the floats."""
    first = offers(w, dtype)[0]
    assert isinstance(first, kind)
    assert nbytes(first, dtype or str(w.dtype)) <= part * nbytes(w, dtype or str(w.dtype))
    return first


def test_a_ternary_matrix_takes_its_entropy():
    tree = smaller(ternary(256, 256), Uniform, 0.4)
    assert set(np.unique(tree.q)) == {-1, 0, 1} and nbytes(tree, "float32") <= 13_200


@pytest.mark.parametrize("step", [2.0**-7, 1.0, 1e-30, 3e4])
def test_ternary_at_any_scale(step):
    smaller(ternary(100, 100, step=step), Uniform, 1.01)


def test_a_constant_is_two_bytes_of_levels():
    for value in (np.float32(0.1), np.float32(-3), np.float64(0.1), np.float16(0.1), np.float32(np.nan)):
        (tree,) = offers(np.full((300, 300), value))
        assert nbytes(tree, str(value.dtype)) < 80
    (tree,) = offers(np.full(1000, -0.0, np.float32))
    offers(np.full((40, 2, 2), 1e300))


def test_zeros_are_a_mask_and_what_is_left():
    w = pruned(dense_like(120, 200))
    tree = smaller(w, Sparse, 0.75)
    assert np.array_equal(tree.values, w[w != 0])
    smaller(pruned(dense_like(50, 30, 3, 3), 0.9), Sparse, 0.99)
    smaller(pruned(dense_like(20_000)), Sparse, 0.75)
    assert not offers(pruned(dense_like(120, 200), 0.99))


def test_clustered_survivors_are_a_sparse_codebook():
    w = pruned(floats(31)[np.random.default_rng(1).integers(0, 31, (120, 200))])
    found = offers(w)
    assert [type(tree) for tree in found] == [Codebook, Sparse] and isinstance(found[1].values, Codebook)
    assert all(nbytes(tree, "float32") < 0.3 * nbytes(w, "float32") for tree in found)


@pytest.mark.parametrize("top", [1, 7, 15, 100, 127, 255, 2047])
def test_a_grid_of_the_whole_tensor(top):
    w = rounded(dense_like(120, 200), top)
    tree = smaller(w, Uniform, 0.6)
    assert tree.scale.shape == () and np.abs(tree.q.astype(int)).max() <= top


@pytest.mark.parametrize("scale", [0.0123, 1 / 3, 2.0**-9, 1e-30])
@pytest.mark.parametrize("shape", [(64, 65), (4000,), (8, 16, 3, 3)])
def test_a_grid_is_found_when_its_largest_level_is_not_a_usual_one(shape, scale):
    q = np.random.default_rng(0).integers(-93, 60, shape)
    assert np.array_equal(smaller(q.astype(np.float32) * np.float32(scale), Uniform, 0.9).q, q)


@pytest.mark.parametrize("top", [1, 7, 8, 127])
@pytest.mark.parametrize(
    "shape,axis",
    [
        ((120, 200), 1),
        ((24, 32, 3, 3), (1, 2, 3)),
        ((64, 1, 5, 5), (1, 2, 3)),
        ((120, 200), 0),
        ((24, 16, 3, 3), (0, 2, 3)),
        ((4, 32, 100), 2),
    ],
)
def test_a_grid_with_a_scale_for_each_row_column_or_last_axis(shape, axis, top):
    w = rounded(dense_like(*shape), top, axis)
    places = (axis,) if isinstance(axis, int) else axis
    scales = tuple(1 if at in places else n for at, n in enumerate(shape))
    assert smaller(w, Uniform, 0.9).scale.shape == scales


def test_a_grid_by_row_with_levels_around_a_zero_point():
    w = dense_like(120, 200)
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(w / scale) + zero, 0, 255) - zero + np.float32(0)
    smaller(q * scale, Uniform, 0.4)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_grid_by_group_of_a_row(size):
    w = rounded(dense_like(64, 512 // size, size), 7, 2, np.float16).reshape(64, 512)
    tree = smaller(w, Reshaped, 0.5)
    assert tree.child.scale.shape == (64, 512 // size, 1)
    assert np.array_equal(tree.child.scale, tree.child.scale.astype(np.float16)), "the half-precision scale is found"


def test_half_precision_weights_of_levels():
    w = dense_like(100, 320).astype(np.float16)
    scale = (np.abs(w).max(1, keepdims=True) / np.float16(127)).astype(np.float16)
    w = np.rint(w / scale) * scale + np.float16(0)
    assert w.dtype == np.float16
    smaller(w, Uniform, 0.7)
    smaller(w.astype(np.float32).astype(np.float16).astype(np.float64).astype(np.float16), Uniform, 0.7)


def test_by_row_levels_of_a_pruned_layer():
    smaller(pruned(rounded(dense_like(120, 200), 7, 1), 0.2), Uniform, 0.4)


@pytest.mark.parametrize("k,part", [(2, 0.25), (32, 0.35), (1000, 0.6)])
def test_few_distinct_values_are_a_codebook(k, part):
    w = floats(k)[np.random.default_rng(1).integers(0, k, (120, 200))]
    tree = smaller(w, Codebook, part)
    assert tree.codewords.shape == (k, 1) and (np.diff(tree.codewords[:, 0]) > 0).all()


def test_an_alphabet_may_be_large_but_not_huge():
    rng = np.random.default_rng(1)
    assert isinstance(offers(floats(4000)[rng.integers(0, 4000, (200, 300))])[0], Codebook)
    assert not offers(floats(5000)[rng.integers(0, 5000, (200, 300))])
    assert not offers(floats(4000)[rng.integers(0, 4000, (100, 100))]), "a table of codewords as large as the floats"


def test_a_codebook_keeps_signs_of_zeros_and_what_is_no_number():
    values = np.array([0.0, -0.0, np.nan, np.inf, 0.3, -np.inf, 1.7, 1e-42], np.float32)
    assert isinstance(offers(values[np.random.default_rng(1).integers(0, 8, (50, 50))])[0], Codebook)
    w = rounded(dense_like(100, 100), 7)
    signed = np.where(w == 0, np.copysign(w, dense_like(100, 100)), w)
    assert isinstance(offers(signed)[0], Codebook)


def test_equal_rows_are_stored_once():
    which = np.random.default_rng(1).integers(0, 10, 300)
    tree = smaller(dense_like(10, 400)[which], Codebook, 0.92)
    assert tree.index.shape == (300, 1) and tree.codewords.shape == (10, 400)
    kernels = smaller(dense_like(10, 40, 3, 3)[which], Reshaped, 0.92)
    assert isinstance(kernels.child, Codebook)
    coarse = offers(rounded(dense_like(10, 400), 127)[which])[0]
    assert isinstance(coarse.codewords, Uniform)
    third = np.concatenate([dense_like(200, 64), np.repeat(dense_like(1, 64, seed=1), 100, 0)])
    assert offers(third)[0].codewords.shape == (201, 64)


@pytest.mark.parametrize("shape", [(120, 200), (64, 64, 3, 3), (32, 1, 3, 3), (8, 8), (5000,), (3, 40), (2000, 5)])
def test_nothing_is_offered_for_ordinary_weights(shape):
    w = dense_like(*shape)
    for array in (w, w.astype(np.float64) + 1e-12, w.astype(np.float16), w.astype(np.float16).astype(np.float32)):
        assert offers(array) == []
    assert offers(bfloat16(w), "bfloat16") == [] == offers(w * np.float32(1e-30)) == offers(w * np.float32(1e-37))
    assert offers(bfloat16(np.random.default_rng(0).random(shape, np.float32) - np.float32(0.5)), "bfloat16") == []


def test_denormals_keep_every_bit():
    q = np.random.default_rng(0).integers(-7, 8, (100, 100)).astype(np.float32)
    assert isinstance(offers(q * np.float32(3e-44))[0], Uniform)
    offers(dense_like(100, 100) * np.float32(1e-41))
    offers(pruned(dense_like(100, 100) * np.float32(1e-38)))


def test_double_precision_offers_only_what_keeps_its_bits():
    rng = np.random.default_rng(1)
    assert isinstance(offers(rng.normal(size=30)[rng.integers(0, 30, (100, 100))])[0], Codebook)
    assert isinstance(offers(np.where(rng.random((100, 100)) < 0.2, rng.normal(size=(100, 100)), 0))[0], Sparse)
    assert isinstance(offers(rounded(dense_like(100, 100), 7, 1).astype(np.float64))[0], Uniform)
    offers(rng.integers(-7, 8, (100, 100)) * 0.1)
    offers(rng.choice([1e300, -1e-300, 0.0], (100, 100)))


def test_odd_shapes_and_types_are_taken():
    for array in (
        np.zeros((0, 3), np.float32),
        np.array(1.5, np.float32),
        np.ones(5, np.float32),
        np.arange(1000),
        np.zeros(100, bool),
        np.zeros((100, 2), np.longdouble),
    ):
        assert exact(array) == []
    assert exact(ternary(64, 64).astype(">f4")) and exact(ternary(64, 64).T) and exact(ternary(64, 64)[::2, ::2])
    assert exact(ternary(1, 4096)) and exact(ternary(4096, 1)) and exact(ternary(2, 2, 2, 2, 2, 2, 2, 64))
    offers(np.arange(100_000, dtype=np.float32))
    offers(np.arange(3000, dtype=np.float32))
    offers(np.full((64, 64), np.finfo(np.float32).max) * np.sign(dense_like(64, 64)))


def test_the_same_array_gives_the_same_trees():
    w = rounded(dense_like(120, 200), 7, 1)
    first, second = (Artifact({str(i): Tensor(tree) for i, tree in enumerate(exact(w))}).to_bytes() for _ in range(2))
    assert first == second


def test_any_scale_that_a_producer_took_is_found():
    rng = np.random.default_rng(9)
    for seed in range(60):
        top = int(rng.choice([1, 3, 7, 8, 100, 127]))
        scale = np.float32(np.exp(rng.normal() * 5))
        w = rng.integers(-top, top + 1, (8, 16)).astype(np.float32) * scale
        assert isinstance(offers(w)[0], Uniform), (seed, top, scale)


def test_twins_have_the_type_shape_and_bits_of_an_earlier_array():
    a = floats(30, 40)
    changed = a.copy()
    changed[5, 5] = np.nextafter(changed[5, 5], np.float32(9))
    given = {
        "a": a,
        "b": a.copy(),
        "turned": a.reshape(40, 30),
        "strided": np.asfortranarray(a),
        "changed": changed,
        "changed again": changed.copy(),
        "integers": a.view(np.int32),
        "zero": np.zeros(9, np.float32),
        "signed zero": -np.zeros(9, np.float32),
        "nan": np.full(4, np.nan),
        "nan again": np.full(4, np.nan),
        "empty": np.zeros(0),
        "empty again": np.zeros(0),
        "one": np.ones(1),
        "one again": np.ones(1),
        "scalar": np.array(3),
        "scalar again": np.array(3),
    }
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(tensor), name) for name, tensor in Draft.of_arrays(given).tensors.items()}
    twins = {name: other for name, other in found.items() if name != other}
    assert twins == {"b": "a", "strided": "a", "changed again": "changed", "nan again": "nan"}
    assert Draft.of_arrays({}).tensors == {}


def test_equal_arrays_of_a_checkpoint_are_stored_once():
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    state = {"embed.weight": w, "head.weight": w.copy(), "other.weight": w + 1, "half.weight": w.astype(np.float16)}
    tensors = Draft.of_arrays(state).tensors
    assert tensors["embed.weight"] is tensors["head.weight"] is not tensors["other.weight"]
    result = compress(state, budget=Budget(ratio=4)).artifact
    alone = compress({n: a for n, a in state.items() if n != "head.weight"}, budget=Budget(ratio=4)).artifact
    assert result.nbytes < alone.nbytes + 40 and load(result.to_bytes()).unpack().keys() == state.keys()

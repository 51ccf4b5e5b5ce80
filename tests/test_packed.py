"""One contract over the table of nodes."""

import math

import numpy as np
import pytest
import torch
from conftest import floats, trees

from tersenet.artifact import Artifact, Tensor, load
from tersenet.packed import (
    NODES,
    Codebook,
    Factored,
    Reshaped,
    Sliced,
    Sparse,
    Transformed,
    Uniform,
    arrays,
    check_tree,
    check_tree_values,
    dct,
    float_leaves,
    map_arrays,
    narrowed,
    unpack,
)
from tersenet.structure import sliced, taken

TREES = trees()


def in_torch(tree, grad=False):
    def convert(path, array):
        made = torch.from_numpy(np.array(array))
        return made.requires_grad_() if grad and made.is_floating_point() else made

    return map_arrays(tree, convert)


def test_every_node_is_tried_here():
    assert {type(tree).__name__ for tree in TREES.values()} >= set(NODES)


@pytest.mark.parametrize("name", TREES)
def test_numpy_and_torch_unpack_the_same(name):
    tree = TREES[name]
    dense = unpack(tree)
    assert dense.shape == tuple(tree.shape) and dense.dtype == np.float32
    assert np.allclose(unpack(in_torch(tree)).numpy(), dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TREES)
def test_a_gradient_reaches_every_float_leaf(name):
    tree = in_torch(TREES[name], grad=True)
    (unpack(tree) * torch.from_numpy(floats(*tree.shape))).sum().backward()
    leaves = float_leaves(tree)
    assert leaves
    for path, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0, path


@pytest.mark.parametrize("name", TREES)
def test_every_tree_survives_the_file_bit_for_bit(name):
    back = load(Artifact({"w": Tensor(TREES[name])}).to_bytes())["w"]
    for (path, before), (same, after) in zip(arrays(TREES[name]), arrays(back), strict=True):
        assert path == same and before.dtype == after.dtype and before.tobytes() == after.tobytes()
    assert unpack(back).tobytes() == unpack(TREES[name]).tobytes()


@pytest.mark.parametrize("name", TREES)
def test_printing_a_tree_names_every_part(name):
    if hasattr(TREES[name], "unpack"):
        text = str(TREES[name])
        assert "bits/w" in text and all(path.split(".")[0] in text for path, _ in arrays(TREES[name]))


def test_a_codeword_gets_the_sum_of_its_members_gradients():
    tree = in_torch(Codebook(np.array([0, 1, 1, 0, 1], np.uint8), floats(2, 1)), grad=True)
    (unpack(tree) * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
    assert tree.codewords.grad.flatten().tolist() == [5.0, 10.0]


def test_the_transform_is_orthonormal():
    for n in (1, 2, 3, 5, 8):
        assert np.allclose(dct(n) @ dct(n).T, np.eye(n), atol=1e-12)
    w = floats(4, 3, 3, 3)
    coefficients = np.einsum("ka,oiab,lb->oikl", dct(3), w, dct(3)).astype(np.float32)
    assert np.allclose(unpack(Transformed(coefficients)), w, atol=1e-5)


def test_six_nodes_are_deep_enough():
    kernel = Transformed(Sparse(np.ones((3, 3), bool), Codebook(np.zeros(9, np.uint8), floats(1, 1))))
    turned = Reshaped(kernel, (3, 3), (1, 0), (3, 3))
    deep = Sliced(np.array([0, 2, 3]), Sliced(np.array([1, 2, 4]), turned, 0, 5), 1, 4)
    check_tree(deep)
    back = unpack(load(Artifact({"w": Tensor(deep)}).to_bytes())["w"])
    assert np.array_equal(back[np.ix_([1, 2, 4], [0, 2, 3])], unpack(kernel).T) and np.count_nonzero(back) == 9
    with pytest.raises(ValueError, match="nodes deep"):
        check_tree(Reshaped(deep, (20,), (0,), (20,)))


def test_a_reshaped_child_holds_the_dense_array_with_its_axes_in_another_order():
    w = floats(6, 2, 3, 3)
    for split, axes in (
        (w.shape, (1, 0, 2, 3)),
        ((2, 3, 2, 3, 3), (0, 2, 1, 3, 4)),
        ((12, 9), (1, 0)),
        ((108,), (0,)),
    ):
        child = w.reshape(split).transpose(axes)
        for flat in (child, child.reshape(4, -1)):
            tree = Reshaped(np.ascontiguousarray(flat), split, axes, w.shape)
            check_tree(tree)
            assert np.array_equal(unpack(tree), w)
    assert unpack(Reshaped(floats(1, 1), (), (), ())).shape == ()
    assert unpack(Reshaped(floats(0, 3), (3, 0), (1, 0), (0, 7))).shape == (0, 7)


@pytest.mark.parametrize(
    "split,axes,size",
    [
        ((2, 3), (0, 1), (2, 4)),
        ((2, 4), (0, 1), (2, 3)),
        ((2, 3), (0, 0), (2, 3)),
        ((2, 3), (1,), (2, 3)),
        ((2, 3), (-1, 0), (2, 3)),
        ((2, 3), (1, 2), (2, 3)),
        ((2, 3), (1.0, 0.0), (2, 3)),
        ((2, 3), [1, 0], (2, 3)),
        ([2, 3], (1, 0), (2, 3)),
        ((2, 3), (1, 0), [2, 3]),
        ((2, 3), (1, 0), (2.0, 3.0)),
        ((-2, -3), (1, 0), (2, 3)),
        ((2, 3), (1, 0), (-2, -3)),
        ((2, 3) + (1,) * 7, tuple(range(9)), (2, 3)),
        ((2, 3), (1, 0), (2, 3) + (1,) * 7),
        (6, (0,), (2, 3)),
        ((2, 3), None, (2, 3)),
        ("23", (1, 0), (2, 3)),
    ],
)
def test_a_reshaped_node_that_does_not_fit_is_refused(split, axes, size):
    with pytest.raises(ValueError):
        check_tree(Reshaped(floats(2, 3), split, axes, size))


def test_hostile_shapes_are_refused_before_anything_is_allocated():
    empty, huge = floats(0, 3), 1 << 62
    for tree in (
        Reshaped(floats(1, 1), (huge,), (0,), (huge,)),
        Reshaped(empty, (0, huge), (0, 1), (0,)),
        Reshaped(empty, (0,), (0,), (0, huge)),
        Reshaped(np.zeros((2, 3), np.int8), (2, 3), (1, 0), (3, 2)),
        Factored("ab->ab", (empty,), (0, huge)),
        Factored("ab->ab", (floats(1, 1),), (1,) * 9),
    ):
        with pytest.raises(ValueError):
            check_tree(tree)
        with pytest.raises(ValueError):
            Artifact({"w": Tensor(tree)}).to_bytes()


BROKEN = {
    "scale does not broadcast": Uniform(np.zeros((2, 3), np.int8), floats(2)),
    "levels are floats": Uniform(floats(2, 3), floats(1)),
    "codewords are flat": Codebook(np.zeros(3, np.uint8), floats(3)),
    "index past the codewords": Codebook(np.array([0, 3], np.uint8), floats(3, 1)),
    "negative index": Codebook(np.array([0, -1], np.int8), floats(3, 1)),
    "groups that do not come out even": Codebook(np.zeros((3, 2), np.uint8), floats(2, 3, 1)),
    "no groups": Codebook(np.zeros((0, 2), np.uint8), floats(0, 3, 1)),
    "index past a group's codewords": Codebook(np.array([[0], [3]], np.uint8), floats(2, 3, 1)),
    "mask and values differ": Sparse(np.array([True, False, True]), floats(3)),
    "mask is no mask": Sparse(np.array([1, 0, 1]), floats(2)),
    "kept twice": Sliced(np.array([1, 1]), floats(2, 2), 0, 5),
    "kept outside": Sliced(np.array([1, 5]), floats(2, 2), 0, 5),
    "a mask of another length": Sliced(np.array([True, True, False]), floats(2, 2), 0, 5),
    "a mask of more": Sliced(np.array([True, True, True, False]), floats(2, 2), 0, 4),
    "no such axis": Sliced(np.array([1, 2]), floats(2, 2), 2, 5),
    "unknown letter": Factored("or,ri->oz", (floats(2, 2), floats(2, 2)), (2, 2)),
    "two extents": Factored("or,ri->oi", (floats(2, 2), floats(3, 2)), (2, 2)),
    "wrong size": Factored("or,ri->oi", (floats(2, 2), floats(2, 2)), (2, 3)),
    "a vector has no kernel": Transformed(floats(5)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_trees_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError):
        check_tree(BROKEN[name])
        check_tree_values(BROKEN[name])


def test_kept_places_are_a_mask_or_numbers():
    child = floats(2, 3)
    mask, numbers = (Sliced(kept, child, 0, 5) for kept in (np.array([0, 1, 0, 0, 1], bool), np.array([1, 4])))
    for tree in (mask, numbers):
        back = load(Artifact({"w": Tensor(tree)}).to_bytes())["w"]
        dense = unpack(back)
        assert dense.shape == (5, 3) and np.array_equal(dense[[1, 4]], child) and np.count_nonzero(dense) == 6
        assert torch.equal(unpack(in_torch(tree)), torch.from_numpy(unpack(tree)))


def test_integers_are_narrowed_without_loss():
    for values in ([0, 255], [-1, 127], [-1, 128], [0, 70000], []):
        array = np.array(values, np.int64)
        assert np.array_equal(narrowed(array), array) and narrowed(array).dtype.itemsize <= 4


def blocks(layout):
    """A tree of blocks of a kernel or of input channels, and the weight that they make, put together one by one."""
    rng = np.random.default_rng(6)
    shape, d = {"3x3": ((16, 32, 3, 3), 9), "1x1": ((16, 32, 1, 1), 4), "linear": ((16, 32), 8)}.get(
        layout, ((16, 32), 8)
    )
    index = rng.integers(0, 20, (16, math.prod(shape[1:]) // d)).astype(np.uint8)
    codewords = floats(20, d)
    dense = np.array([np.concatenate([codewords[k] for k in row]) for row in index]).reshape(shape)
    if layout == "blocks first":  # index [input blocks, outputs]
        index = np.ascontiguousarray(index.T)
        return Reshaped(Codebook(index, codewords), (16, 4, 8), (1, 0, 2), shape), dense
    tree = Codebook(index, codewords)
    return tree if layout == "linear" else Reshaped(tree, shape, tuple(range(4)), shape), dense


LAYOUTS = ["3x3", "1x1", "linear", "blocks first"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_quantization_shares_blocks_of_kernels_and_of_input_channels(layout):
    """As "And the Bit Goes Down" (Stock et al. 2020): blocks of 9 in 3x3 kernels, else of input channels."""
    tree, dense = blocks(layout)
    check_tree(tree)
    check_tree_values(tree)
    made = in_torch(tree, grad=True)
    assert tree.shape == dense.shape and np.array_equal(tree.unpack(), dense)
    assert np.array_equal(made.unpack().detach().numpy(), dense)
    made.unpack().sum().backward()
    (codewords,) = float_leaves(made).values()
    index = next(array for path, array in arrays(tree) if path.endswith("index"))
    counts = np.bincount(index.reshape(-1), minlength=20)
    assert np.array_equal(codewords.grad.numpy(), np.repeat(counts[:, None], codewords.shape[1], 1))
    again = load(Artifact({"w": Tensor(tree)}).to_bytes())["w"]
    assert np.array_equal(again.unpack(), dense) and type(again) is type(tree)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_are_taken_of_shared_blocks(layout):
    tree, dense = blocks(layout)
    outputs, inputs = np.array([1, 2, 7, 15]), np.array([0, 5, 31])
    if layout != "3x3":  # whole blocks of input channels
        d = 4 if layout == "1x1" else 8
        inputs = (np.array([0, 3])[:, None] * d + np.arange(d)).reshape(-1)
    assert np.array_equal(taken(tree, 0, outputs).unpack(), dense[outputs])
    if layout == "blocks first":  # whose axis of inputs is none of the split's
        return
    found = taken(taken(tree, 1, inputs), 0, outputs)
    assert np.array_equal(found.unpack(), dense[outputs][:, inputs])
    whole = sliced(tree, {0: outputs, 1: inputs})
    assert np.array_equal(load(Artifact({"w": Tensor(whole)}).to_bytes())["w"].unpack(), whole.unpack())


def test_a_published_product_quantized_network_keeps_its_blocks(data):
    import published

    layers, _ = published.product_quantized(18)
    state = published.PQResNet.load(18).state_dict()
    tensors = {}
    for name, (index, codewords) in layers.items():
        shape = tuple(state[f"{name}.weight"].shape)
        tree = Codebook(narrowed(index), codewords)
        tensors[f"{name}.weight"] = Tensor(Reshaped(tree, shape, tuple(range(len(shape))), shape))
    file = Artifact(tensors).to_bytes()
    assert len(file) < sum(i.size * (2 if "fc" in n else 1) + 2 * c.size for n, (i, c) in layers.items())
    for name, dense in load(file).unpack().items():
        assert np.array_equal(dense, state[name].numpy())

"""Structure of trees: places are taken, zeros held and slices kept for every node, in any nest."""

import numpy as np
import pytest
from conftest import floats, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet.packed import (
    NODES,
    Codebook,
    Factored,
    Reshaped,
    Sliced,
    Sparse,
    Transformed,
    Uniform,
    check_tree,
    unpack,
)
from tersenet.structure import (
    is_plain,
    kept_places,
    nodes,
    placed,
    refilled,
    sliced,
    support,
    taken,
    thinned,
    unsliced,
)


def nests():
    """Trees of every kind of node, with others inside and around them."""
    rng = np.random.default_rng(5)
    mask = rng.random((6, 4, 3, 3)) < 0.4
    count = int(mask.sum())
    steps = tuple(rng.integers(-4, 5, shape).astype(np.int8) for shape in ((6, 1, 1, 1), (1, 4, 1, 1), (1, 1, 3, 3)))
    levels = Uniform(rng.integers(-3, 4, (6, 4, 3, 3)).astype(np.int8), np.array(0.3, np.float32), None, steps)
    shared = Codebook(rng.integers(0, 5, (6, 4, 3, 3)).astype(np.uint8), floats(5, 1))
    plain = {
        "sparse": Sparse(mask, floats(count)),
        "sliced": Sliced(np.array([0, 2, 5]), floats(3, 4, 3, 3), 0, 6),
        "sliced-sparse": Sliced(np.array([1, 3]), Sparse(mask[:, :2], floats(int(mask[:, :2].sum()))), 1, 4),
        "reshaped": Reshaped(floats(24, 9), (6, 4, 9), (1, 0, 2), (6, 4, 3, 3)),
        "reshaped-apart": Reshaped(floats(4, 6, 9), (6, 4, 9), (1, 0, 2), (6, 4, 9)),
        "reshaped-sparse": Reshaped(Sparse(mask[:4], floats(int(mask[:4].sum()))), (24, 6), (0, 1), (6, 4, 6)),
    }
    return plain | trees() | {
        "levels": levels,
        "levels-odd": Uniform(levels.q[:3, :3], floats(3, 1, 3, 1), floats(3, 1, 1, 1).astype(np.int8), (steps[2][0],)),
        "levels-one-row": Uniform(levels.q[:1], np.array(0.3, np.float32), None, (steps[1], steps[2])),
        "sparse-shared": Sparse(mask, Codebook(rng.integers(0, 5, count).astype(np.uint8), floats(5, 1))),
        "sparse-levels": Sparse(mask, Uniform(rng.integers(1, 5, count).astype(np.uint8), np.array(0.3, np.float32))),
        "sliced-shared": Sliced(np.array([0, 2, 3, 5, 6, 7]), shared, 0, 9),
        "sliced-twice": Sliced(np.array([1, 2]), Sliced(np.array([0, 2, 5]), floats(3, 2), 0, 6), 1, 4),
        "reshaped-levels": Reshaped(levels, (4, 6, 3, 3), (1, 0, 2, 3), (4, 6, 3, 3)),
        "sparse-in-sparse": Sparse(mask, Sparse(np.arange(count) % 3 == 0, floats(-(-count // 3)))),
        "shared-levels": Codebook(shared.index, Uniform(np.arange(5, dtype=np.uint8)[:, None], floats(5, 1))),
    }  # fmt: skip


NESTS = nests()
MIXED = ("Factored", "Transformed")  # sums, whose order may differ with the number of rows


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(NESTS)), st.integers(0, 4), st.randoms(use_true_random=False))
def test_the_places_of_a_tree_are_those_of_its_dense_array(name, axis, random):
    tree = NESTS[name]
    dense, axis = unpack(tree), axis % len(tree.shape)
    d = tree.codewords.shape[-1] if name.startswith("Codebook") and axis == 1 else 1
    blocks = sorted(random.sample(range(dense.shape[axis] // d), random.randint(1, dense.shape[axis] // d)))
    places = np.array([block * d + k for block in blocks for k in range(d)])
    try:
        found = taken(tree, axis, places)
    except ValueError:
        assert name in ("Transformed", "Reshaped", "reshaped", "reshaped-sparse", "Bloomier", "Lattice", "Hashed")
        assert name != "Transformed" or axis > 1
        return
    check_tree(found)
    wanted = dense.take(places, axis)
    assert found.shape == wanted.shape
    if any(type(node).__name__ in MIXED for node in nodes(found)):
        assert np.allclose(unpack(found), wanted, rtol=1e-6, atol=1e-7)
    else:
        assert np.array_equal(unpack(found), wanted)
    whole = sliced(tree, {axis: places})
    check_tree(whole)
    masked = np.zeros_like(dense)
    at = (slice(None),) * axis + (places,)
    masked[at] = dense[at]
    assert np.allclose(unpack(whole), masked, rtol=1e-6, atol=1e-7)
    assert np.array_equal(kept_places(whole, axis), np.intersect1d(places, kept_places(tree, axis)))


def test_every_kind_of_node_is_taken_from():
    assert {type(node) for tree in NESTS.values() for node in nodes(tree)} == set(NODES.values())


def test_places_that_a_node_mixes_are_refused():
    shared = Codebook(np.zeros((6, 4), np.uint8), floats(1, 3))
    with pytest.raises(ValueError, match="shares vectors of 3"):
        taken(shared, 1, np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="mixes the places"):
        taken(Transformed(floats(2, 3, 3)), 2, np.array([0]))
    with pytest.raises(ValueError, match=r"axis 0 of \(6, 2\) is none of"):
        taken(Reshaped(floats(3, 4), (2, 3, 2), (1, 0, 2), (6, 2)), 0, np.array([0]))
    with pytest.raises(ValueError, match="is none of"):
        taken(Factored("ab->ab", (floats(4, 3),), (6, 2)), 0, np.array([0]))


@pytest.mark.parametrize("name", [name for name, tree in NESTS.items() if is_plain(tree)])
def test_plain_trees_take_other_values_and_more_zeros(name):
    tree, rng = NESTS[name], np.random.default_rng(3)
    free, other = support(tree), rng.normal(size=tree.shape).astype(np.float32)
    assert not unpack(tree)[~free].any() and unpack(tree)[free].all()
    changed = refilled(tree, other)
    check_tree(changed)
    assert [type(node) for node in nodes(changed)] == [type(node) for node in nodes(tree)]
    assert np.array_equal(unpack(changed), np.where(free, other, 0))
    mask = rng.random(tree.shape) < 0.5
    less = thinned(tree, mask)
    check_tree(less)
    assert np.array_equal(unpack(less), np.where(mask, unpack(tree), 0))
    assert np.array_equal(support(less), free & mask)
    assert thinned(tree, np.ones(tree.shape, bool)) is tree or isinstance(tree, Sliced | Reshaped)


def test_shared_values_and_levels_take_no_others_but_lose_places_under_a_mask():
    shared, rng = NESTS["sparse-shared"], np.random.default_rng(4)
    with pytest.raises(ValueError, match="Codebook node are not floats"):
        refilled(shared, unpack(shared))
    with pytest.raises(ValueError, match="Uniform node holds no zeros"):
        thinned(NESTS["levels"], np.zeros((6, 4, 3, 3), bool))
    mask = rng.random(shared.shape) < 0.5
    assert np.array_equal(unpack(thinned(shared, mask)), np.where(mask, unpack(shared), 0))


def test_slices_of_slices_on_one_axis_are_one():
    inner = sliced(floats(8, 6), {0: np.array([1, 2, 5, 7]), 1: np.array([0, 3])})
    twice = Sliced(np.array([0, 2, 3, 4, 6, 7, 8, 9]), inner, 0, 10)
    child, kept = unsliced(twice)
    assert kept[0].tolist() == [2, 3, 7, 9] and kept[1].tolist() == [0, 3] and child.shape == (4, 2)
    assert np.array_equal(unpack(placed(child, kept, (10, 6))), unpack(twice))
    assert sliced(child, {0: np.arange(4)}) is child

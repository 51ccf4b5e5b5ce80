"""Bloomier filters and Weightless: keys are exact, false positives fall as chance has it, C and NumPy agree."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import floats
from hypothesis import given
from hypothesis import strategies as st
from test_stages import make_task

import tersenet as tn
from tersenet import native
from tersenet.bloomier import built, queried
from tersenet.draft import Draft
from tersenet.packed import Bloomier, Sparse, unpack
from tersenet.splitmix import mixed
from tersenet.stages.prune import Prune
from tersenet.stages.weightless import Weightless, filtered


@pytest.fixture(scope="module")
def task():
    return make_task()


def test_the_mixer_is_splitmix64():
    """The first outputs of the generator with seed 1234567, as its authors publish them."""
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mixed(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(0, 300), st.integers(1, 16), st.integers(0, 2**40))
def test_every_key_has_its_value_whatever_the_number_of_keys(n, bits, seed):
    rng = np.random.default_rng(n)
    keys, values = np.sort(rng.choice(900, n, False)), rng.integers(0, 1 << bits, n)
    cells, found, length = built(keys, values, bits, seed)
    assert np.array_equal(queried(cells, 900, found, length, bits)[keys], values)
    assert not (cells >> bits).any() and len(cells) >= 3 * length


@pytest.mark.parametrize("windows", [None, 1])
def test_false_positives_fall_as_often_as_chance_has_it_and_c_and_numpy_agree(windows, monkeypatch):
    rng, bits, values, most = np.random.default_rng(0), 7, 6, 400_000
    keys = np.sort(rng.choice(most, 8_000, False))
    numbers = rng.integers(0, values, len(keys))
    cells, seed, length = built(keys, numbers, bits, windows=windows)
    said = queried(cells, most, seed, length, bits)
    others = np.delete(said, keys)
    rate, share = values / 2**bits, np.mean(others < values)
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / len(others))  # four standard deviations of a binomial
    assert len(cells) < 1.27 * len(keys)
    monkeypatch.setattr(native, "library", lambda: None)
    again = built(keys, numbers, bits, windows=windows)
    assert np.array_equal(again[0], cells) and again[1:] == (seed, length)
    assert np.array_equal(queried(cells, most, seed, length, bits), said)


def test_segments_in_a_row_take_fewer_cells_than_three_blocks_where_there_are_many_keys():
    keys = np.arange(100_000) * 7
    row, blocks = (built(keys, keys % 8, 5, windows=windows)[0] for windows in (None, 1))
    assert len(row) < 1.17 * len(keys) < 1.2 * len(keys) < len(blocks) < 1.24 * len(keys)


def test_a_filter_gives_survivors_their_shared_values_and_goes_through_a_file(tmp_path):
    w = floats(60, 50)
    mask = np.abs(w) > 1.6
    tree = filtered(Sparse(mask, w[mask]), 3, 9)
    assert isinstance(tree, Bloomier) and tree.shape == (60, 50) and len(tree.codewords) == 8
    dense = unpack(tree)
    nearest = tree.codewords[np.abs(w[mask][:, None] - tree.codewords).argmin(1)]
    assert np.array_equal(dense[mask], nearest)
    assert 0 < np.mean(dense[~mask] != 0) < 3 * 8 / 2**9
    tn.Artifact({"w": tn.artifact.Tensor(tree)}).save(tmp_path / "w.terse")
    assert np.array_equal(tn.load(tmp_path / "w.terse").unpack()["w"], dense)
    assert tn.Artifact({"w": tn.artifact.Tensor(tree)}).nbytes < 1.3 * 9 / 8 * mask.sum() + 120


def test_layers_are_encoded_in_order_and_later_ones_trained_around_them(task):
    pruned = Prune(0.2, 1, retrain="none")(Draft.of_model(task.model), None)
    after = Weightless(2, 5, rules=(("last*", None),))(pruned, task)
    assert {n for n, t in after.tensors.items() if isinstance(t.tree, Bloomier)} == {
        n for n in ("conv.weight", "first.weight", "second.weight") if n in after.tensors
    }
    own = filtered(pruned.tensors["conv.weight"].tree, 2, 5)
    assert np.array_equal(unpack(after.tensors["conv.weight"].tree), unpack(own))  # the first, which nothing moves
    assert isinstance(after.tensors["last.weight"].tree, Sparse)
    before, now = (unpack(d.tensors["last.weight"].tree) for d in (pruned, after))
    assert not np.array_equal(before, now) and np.array_equal(before == 0, now == 0)
    assert after.trainable == pruned.trainable


def test_within_a_loss_cells_take_the_fewest_bits(task):
    pruned = Prune(0.3, 1, retrain="none")(Draft.of_model(task.model), None)
    sizes = {}
    for within in (None, 1.0, 0.0):
        after = Weightless(2, 9, within=within, tune=0)(pruned, task)
        sizes[within] = [t.tree.bits for t in after.tensors.values() if isinstance(t.tree, Bloomier)]
    assert set(sizes[None]) == {9} and set(sizes[1.0]) == {3}
    assert all(3 <= bits <= 9 for bits in sizes[0.0])
    least = Weightless(2, 2, within=0.0, tune=0)(pruned, task)  # no fewer bits are there to be tried
    assert [t.tree.bits for t in least.tensors.values() if isinstance(t.tree, Bloomier)] == [2] * len(sizes[None])


def test_the_paper_meets_a_size_by_itself_and_its_file_verifies(task, tmp_path):
    recipe = tn.papers.weightless(0.3, cells=7, rounds=1)
    result = tn.compress(replace(task, test=task.test), recipe, tn.Budget(size=8000), folder=tmp_path / "kept")
    result.artifact.save(tmp_path / "w.terse")
    assert result.artifact.nbytes <= 8000
    assert any(isinstance(t.tree, Bloomier) for t in result.artifact.tensors.values())
    assert tn.verify(tmp_path / "w.terse", task=task)


def test_settings_that_cannot_be_are_refused(task):
    for wrong in (lambda: Weightless(9), lambda: Weightless(4, 3), lambda: Weightless(3, 8, (("a", 17),))):
        with pytest.raises(ValueError, match="Weightless takes 1 to 8 bits for values"):
            wrong()
    with pytest.raises(ValueError, match="Weightless cannot take Bloomier nodes"):
        pruned = Prune(0.2, 1, retrain="none")(Draft.of_model(task.model), None)
        Weightless(2, 5, tune=0)(Weightless(2, 5, tune=0)(pruned, task), task)

"""Single- and multi-level quantization: how many values there are, and that what is shared keeps its bits."""

import numpy as np
import pytest
from test_stages import make_task

import tersenet as tn
from tersenet.draft import Draft
from tersenet.packed import Codebook, Sparse, unpack
from tersenet.stages import levels
from tersenet.stages.levels import INQ, MLQ, SLQ, powers
from tersenet.stages.prune import Prune


@pytest.fixture(scope="module")
def task():
    return make_task()


def followed(monkeypatch):
    """The dense weights after each training, with what was held in it."""
    seen, tune = [], levels.tune

    def follow(draft, task, schedule, epochs, seed, label, held):
        after = tune(draft, task, schedule, epochs, seed, label, held=held)
        seen.append(
            {name: (mask, *(unpack(d.tensors[name].tree) for d in (draft, after))) for name, mask in held.items()}
        )
        return after

    monkeypatch.setattr(levels, "tune", follow)
    return seen


@pytest.mark.parametrize("stage,values", [(SLQ(3, 3), 5), (SLQ(5, 5), 17), (MLQ(2, 3), 3), (INQ(4), 9)], ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_what_is_shared_keeps_its_bits_to_the_end_and_a_layer_has_few_values(task, stage, values, pruned, monkeypatch):
    seen = followed(monkeypatch)
    draft = Draft.of_model(task.model)
    draft = Prune(0.4, 1, retrain="none")(draft, None) if pruned else draft
    after = stage(draft, task)
    shares = []
    for name in draft.weights():
        tree = after.tensors[name].tree
        assert isinstance(tree.values if pruned else tree, Codebook) and isinstance(tree, Sparse) == pruned
        dense = unpack(tree)
        assert np.unique(dense).size <= values + pruned
        for state in seen:
            mask, before, trained = state[name]
            assert np.array_equal(before[mask], trained[mask]) and np.array_equal(trained[mask], dense[mask])
        shares.append([state[name][0].mean() for state in seen])
        assert any(not np.array_equal(before, now) for _, before, now in (state[name] for state in seen))
    assert all(list(share) == sorted(share) for share in shares)  # more and more is shared
    if isinstance(stage, INQ):
        assert len(seen) == 3 and (pruned or shares[0] == pytest.approx([0.5, 0.75, 0.875], abs=0.02))
        return
    assert len(seen) == (stage.rounds if isinstance(stage, SLQ) else stage.rounds * 3) - 1


def test_the_first_centroids_are_powers_of_two_and_zero_stays_one_of_them(task):
    assert powers(np.array([0.3, -0.7]), 5).tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    after = SLQ(4, 1)(Draft.of_model(task.model), task)
    assert all(0.0 in unpack(after.tensors[name].tree) for name in after.weights())


def test_training_around_what_is_shared_is_better_than_sharing_all_at_once(task):
    at_once, in_rounds = (stage(Draft.of_model(task.model), task) for stage in (MLQ(1, 1), MLQ(2, 4, 2)))
    assert task.score(task.test, in_rounds.module()) > task.score(task.test, at_once.module()) + 0.01


@pytest.mark.parametrize("paper", [tn.papers.slq, tn.papers.mlq, tn.papers.inq], ids=lambda paper: paper.__name__)
def test_the_papers_end_in_files_that_verify(task, paper, tmp_path):
    result = tn.compress(task, paper(), folder=tmp_path / "kept")
    result.artifact.save(tmp_path / "w.terse")
    assert tn.verify(tmp_path / "w.terse", task=task)["metric"] == result.after
    assert result.artifact.nbytes < 0.3 * 4 * Draft.of_model(task.model).count()


def test_two_bits_are_for_the_other_stage():
    with pytest.raises(ValueError, match="MLQ is for 2 bits"):
        SLQ(2)

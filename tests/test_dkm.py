"""Differentiable k-means: its attention, its codebooks, and that training through it beats sharing and tuning."""

import numpy as np
import pytest
import torch
from conftest import floats
from test_stages import make_task

import tersenet as tn
from tersenet.draft import Draft, artifact_of
from tersenet.methods.kmeans import KMeans, lloyd
from tersenet.methods.product import Product
from tersenet.packed import Codebook, Reshaped, Sparse, unpack
from tersenet.stages.dkm import DKM, _Attended
from tersenet.stages.pack import Pack
from tersenet.stages.prune import Prune


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.mark.parametrize("groups, d", [(1, 1), (1, 3), (2, 1)])
def test_attention_and_new_codewords_are_those_of_the_paper(groups, d):
    w, c, tau = torch.from_numpy(floats(8, 6)), torch.from_numpy(floats(groups, 4, d)), 0.7
    shares, found = _Attended(w, c if groups > 1 else c[0], tau, 0.0, 1).settled()
    for group, (part, own) in enumerate(zip(w.reshape(groups, -1, d).double(), c.double(), strict=True)):
        a = (-(part[:, None] - own[None]).square().sum(2) / tau).softmax(1)
        moved = (a.T @ part) / a.sum(0)[:, None]
        assert torch.allclose(found[group].double(), moved, atol=1e-5)
        last = (-(part[:, None] - moved[None]).square().sum(2) / tau).softmax(1)
        assert torch.allclose(shares[group].double(), last, atol=1e-4)


def test_gradients_reach_weights_through_every_step_and_a_cold_attention_is_k_means():
    w, c = torch.from_numpy(floats(40)).requires_grad_(), torch.from_numpy(floats(3, 1))
    pulled = torch.from_numpy(floats(40, seed=1))
    (_Attended(w, c.clone(), 0.5, 0.0, 4).unpack() * pulled).sum().backward()
    step, found = 1e-3, []
    for k in (0, 7, 31):
        moved = [w.detach().clone() for _ in range(2)]
        moved[0][k] += step
        moved[1][k] -= step
        up, down = (float((_Attended(v, c.clone(), 0.5, 0.0, 4).unpack() * pulled).sum()) for v in moved)
        found.append((up - down) / (2 * step))
    assert np.allclose(w.grad[[0, 7, 31]].numpy(), found, atol=2e-2)
    start = np.sort(floats(3), 0)[:, None]
    cold = _Attended(w.detach(), torch.from_numpy(start.copy()), 1e-6, 0.0, 200).settled()[1].numpy().reshape(-1)
    values = np.sort(w.detach().numpy().astype(np.float64))
    assert np.allclose(np.sort(cold), lloyd(values, start[:, 0].astype(np.float64), np.ones(40)), atol=1e-5)


METHODS = {"values": KMeans(1), "groups": KMeans(1, group=4), "vectors": Product(3, weighted=False)}


@pytest.mark.parametrize("name, pruned", [("values", False), ("values", True), ("groups", False), ("vectors", False)])
def test_it_ends_in_codebooks_like_those_it_began_with_and_is_better(task, name, pruned):
    method = METHODS[name]
    draft = Draft.of_model(task.model)
    draft = Prune(0.4, 1, retrain="none")(draft, None) if pruned else draft
    begin = Pack(method)(draft, task)
    after = DKM(method, epochs=4)(draft, task)
    for weight in draft.weights():
        was, now = begin.tensors[weight].tree, after.tensors[weight].tree
        assert type(was) is type(now) and was.shape == now.shape
        if isinstance(now, Sparse | Reshaped):
            was, now = (tree.values if isinstance(tree, Sparse) else tree.child for tree in (was, now))
        if isinstance(now, Codebook):
            assert now.codewords.shape == was.codewords.shape and now.index.shape == was.index.shape
        if pruned:
            assert not unpack(after.tensors[weight].tree)[unpack(draft.tensors[weight].tree) == 0].any()
    assert after.tensors["first.weight"] is after.tensors["second.weight"]
    assert task.score(task.test, after.module()) > task.score(task.test, begin.module()) + 0.03
    assert artifact_of(DKM(method, epochs=4)(draft, task)).to_bytes() == artifact_of(after).to_bytes()


def test_without_training_it_is_the_methods_own_codebook_at_a_low_temperature(task):
    draft = Draft.of_model(task.model)
    begin, after = Pack(KMeans(3))(draft, task), DKM(KMeans(3), temperature=1e-3, epochs=0)(draft, task)
    for weight in draft.weights():
        was, now = (unpack(d.tensors[weight].tree) for d in (begin, after))
        assert np.abs(was - now).max() < 0.01 * np.abs(was).max()
        assert np.array_equal(begin.tensors[weight].tree.index, after.tensors[weight].tree.index)


def test_the_paper_meets_a_size_and_verifies(task, tmp_path):
    result = tn.compress(task, tn.papers.dkm(4, epochs=1), tn.Budget(size=9_000), folder=tmp_path / "kept")
    assert result.artifact.nbytes <= 9_000
    result.artifact.save(tmp_path / "w.terse")
    assert tn.verify(tmp_path / "w.terse", task=task)["metric"] == result.after

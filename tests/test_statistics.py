"""Statistics that methods declare: who gets what, that it is right in every layer, and what is said without data."""

import numpy as np
import pytest
import torch
from test_stages import make_task
from torch import nn

import tersenet as tn
from tersenet import calibrate
from tersenet.calibrate import moments
from tersenet.draft import Draft, artifact_of, dense_array
from tersenet.likelihood import Likelihood
from tersenet.methods import chain
from tersenet.methods.kmeans import KMeans
from tersenet.methods.sparse import Magnitude
from tersenet.methods.surgeon import SparseGPT, damped, swept
from tersenet.methods.transform import KernelDCT
from tersenet.packed import Reshaped, Sparse, unpack
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Pack
from tersenet.stages.prune import Prune
from tersenet.statistics import packed, statistics


@pytest.fixture(scope="module")
def task():
    return make_task()


class Odd(nn.Module):
    """Weights whose rows lie on other axes, groups, and a layer that no input reaches; biases nowhere."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 16) / 4)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=2, bias=False)
        self.last, self.unused = nn.Linear(8, 4, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        x = torch.relu(x @ self.first).T.reshape(1, 16, 8, -1)
        x = torch.relu(self.up(torch.relu(self.grouped(x)))).mean((2, 3))
        return self.last(x)


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    x = [torch.randn(64, 16) * torch.linspace(0.2, 3, 16) for _ in range(16)]
    return tn.Task(Odd(), [(one, torch.tensor([k % 4])) for k, one in enumerate(x)])


def test_packing_with_sparsegpt_is_the_sweep_of_obs_where_there_are_no_biases(odd):
    draft = Draft.of_model(odd.model)
    mine, sweep = Pack(SparseGPT(0.4))(draft, odd), OBS(0.4, "sweep")(draft, odd)
    for name in ("first", "grouped.weight", "up.weight", "last.weight"):
        one, other = (unpack(made.tensors[name].tree) for made in (mine, sweep))
        assert one.shape == other.shape and np.array_equal(one, other), name
        assert not np.array_equal(one, unpack(Pack(Magnitude(0.4))(draft, odd).tensors[name].tree))
    assert isinstance(mine.tensors["first"].tree, Reshaped) and isinstance(mine.tensors["last.weight"].tree, Sparse)
    notes = {row.name: row.note for row in artifact_of(mine).ledger()}
    assert notes["unused.weight"] == "dense: no result depends on it, so what its method needs is not known"


def test_rows_are_found_where_the_axes_lie_otherwise(odd):
    draft = Draft.of_model(odd.model)
    known = statistics(draft, odd, {"first": SparseGPT()}, 1024)["first"]
    w = dense_array(draft.tensors["first"]).astype(np.float64)
    right, mask = swept(w.T, damped(known.inputs[:, 0].numpy(), 0.01)[0], 0.5)
    assert np.array_equal(unpack(packed(w.astype(np.float32), SparseGPT(), known)), right.T.astype(np.float32))
    ruled = chain(SparseGPT(), KMeans(2, weighted=True))
    values = packed(w.astype(np.float32), ruled, known).child.values
    fisher = known.outputs.diagonal(dim1=2, dim2=3)[0, 0, :, None] * known.inputs.diagonal(dim1=2, dim2=3)[0]
    by_hand = KMeans(2, weighted=True).pack(right[mask].astype(np.float32), {"weights": fisher.numpy()[mask]})
    assert np.array_equal(unpack(values), unpack(by_hand))


class Shown:
    """A method that shows what it was given."""

    needs = ("inputs", "outputs", "weights")

    def pack(self, w, stats):
        self.stats = stats
        return w


def test_moments_in_blocks_are_whole_with_zeros_between(odd, monkeypatch):
    draft, method = Draft.of_model(odd.model), Shown()
    w = dense_array(draft.tensors["last.weight"])
    packed(w, method, statistics(draft, odd, {"last.weight": method}, 64)["last.weight"])
    whole = method.stats
    assert [whole[need].shape for need in method.needs] == [(1, 8, 8), (1, 4, 4), (4, 8)]
    assert np.allclose(whole["weights"], np.outer(np.diag(whole["outputs"][0]), np.diag(whole["inputs"][0])))
    monkeypatch.setattr(calibrate, "MOST", 24)
    packed(w, method, statistics(draft, odd, {"last.weight": method}, 64)["last.weight"])
    blocks = np.kron(np.eye(3), np.ones((3, 3)))[:8, :8]
    assert np.allclose(method.stats["inputs"][0], whole["inputs"][0] * blocks)
    assert np.allclose(method.stats["weights"], whole["weights"])


def test_moments_of_some_weights_are_those_that_all_have(task):
    args = (task, task.model, task.calibration(128), Likelihood.of(task))
    whole, some = moments(*args), moments(*args, only={"last.weight"})
    assert list(some) == ["last.weight"]
    assert torch.equal(some["last.weight"].inputs, whole["last.weight"].inputs)
    assert torch.equal(some["last.weight"].outputs, whole["last.weight"].outputs)
    assert moments(*args, only={"none"}) == {}


def fisher(draft, task, names):
    known = statistics(draft, task, dict.fromkeys(names, KMeans(weighted=True)), 1024)
    parts = {n: [m.diagonal(dim1=2, dim2=3).flatten(1) for m in (k.outputs, k.inputs)] for n, k in known.items()}
    return {n: (g[..., None] * a[:, None]).reshape(draft.tensors[n].tree.shape).numpy() for n, (g, a) in parts.items()}


def test_weighted_k_means_errs_less_in_the_fisher_metric_and_at_the_outputs(task):
    draft = Draft.of_model(task.model)
    names = draft.weights()
    metric = fisher(draft, task, names)
    found = {}
    for weighted in (False, True):
        after = Pack(KMeans(2, weighted=weighted))(draft, task)
        errors = {n: dense_array(after.tensors[n]) - dense_array(draft.tensors[n]) for n in names}
        x = task.test[0]
        with torch.no_grad():
            apart = (after.module().eval()(x) - task.model.eval()(x)).square().mean()
        found[weighted] = {n: float((metric[n] * np.square(e)).sum()) for n, e in errors.items()}, float(apart)
    for name in names:
        assert found[True][0][name] < found[False][0][name], name
    assert found[True][1] < found[False][1]


def test_values_under_a_mask_get_the_statistics_of_their_places(task):
    draft = Draft.of_model(task.model)
    pruned = Prune(0.3, 1, retrain="none")(draft, task)
    packed_later = Pack(KMeans(2, weighted=True))(pruned, task)
    for name, weights in fisher(pruned, task, draft.weights()).items():
        tree = pruned.tensors[name].tree
        by_hand = KMeans(2, weighted=True).pack(tree.values, {"weights": weights[tree.mask]})
        assert np.array_equal(unpack(packed_later.tensors[name].tree.values), unpack(by_hand))


def test_all_who_ask_are_served_by_one_pass(task):
    seen = []

    def forward(model, x):
        seen.append(len(x))
        return model(x)

    own = tn.Task(task.model, task.train, forward=forward)
    runs = []
    for method in (KMeans(2, weighted=True), chain(SparseGPT(), KMeans(2, weighted=True))):
        seen.clear()
        Pack(method, samples=64)(Draft.of_model(task.model), own)
        runs.append(list(seen))
    assert runs[0] == runs[1] and 64 <= sum(runs[0]) < 128
    seen.clear()
    Pack(KMeans(2))(Draft.of_model(task.model), own)
    assert not seen


def test_what_cannot_be_known_is_said_in_one_line(task):
    draft = Draft.of_model(task.model)
    arrays = Draft.of_arrays({"w": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)})
    for start, given in ((arrays, None), (draft, None), (draft, tn.Task(task.model, test=task.test))):
        with pytest.raises(
            ValueError, match=r"SparseGPT\(.*\) needs the moments of the layer's inputs: give a Task"
        ) as e:
            Pack(chain(SparseGPT(), KMeans()))(start, given)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"conv.weight: KMeans needs the Fisher information .* before other methods"):
        Pack(chain(KernelDCT(), KMeans(2, weighted=True)))(draft, task)
    with pytest.raises(ValueError, match=r"conv.weight: Pack cannot take Sparse nodes; SparseGPT.* dense layers see"):
        Pack(SparseGPT())(Prune(0.5, 1, retrain="none")(draft, task), task)


def test_the_same_bytes_at_any_number_of_threads(task):
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draft = Pack(chain(SparseGPT(0.5), KMeans(3, weighted=True)), samples=128)(Draft.of_model(task.model), task)
        found.add(artifact_of(draft).to_bytes())
    assert len(found) == 1

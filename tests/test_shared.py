"""Arrays that several trees share: stored once, shared again after loading, kept or split by what rewrites trees."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import floats
from test_artifact import parts, rebuilt

import tersenet as tn
from tersenet import FormatError, load
from tersenet.artifact import Artifact, Tensor
from tersenet.codecs.stream import put_number
from tersenet.container import SHARED, SMALL
from tersenet.draft import Draft, artifact_of
from tersenet.packed import Codebook, Sparse, Uniform
from tersenet.stages.finetune import Finetune, TrainLevels, tune
from tersenet.stages.pack import Narrow
from tersenet.structure import taken


def indices(rows, columns, seed, k=256):
    return np.random.default_rng(seed).integers(0, k, (rows, columns)).astype(np.uint8)


def layers(rows=40, k=256):
    """Three layers of one codebook, a mask that two trees share, and the codebook by itself."""
    codewords, mask = floats(k, 9), np.random.default_rng(3).random((30, 50)) < 0.4
    trees = {f"w{i}": Codebook(indices(rows + i, 16, i, k), codewords) for i in range(3)}
    trees |= {f"s{i}": Sparse(mask, floats(int(mask.sum()), seed=i)) for i in range(2)}
    return trees | {"codewords": codewords}


@pytest.mark.parametrize("rows", [40, 1600])  # a small file and a large one
def test_a_shared_codebook_is_stored_once_and_shared_after_loading(rows):
    trees = layers(rows)
    artifact = Artifact({name: Tensor(tree) for name, tree in trees.items()})
    file = artifact.to_bytes()
    assert (len(file) > SMALL) == (rows == 1600)
    apart = {n: Codebook(t.index, t.codewords.copy()) if n in ("w1", "w2") else t for n, t in trees.items()}
    apart["s1"] = Sparse(trees["s1"].mask.copy(), trees["s1"].values)
    assert len(Artifact({n: Tensor(t) for n, t in apart.items()}).to_bytes()) - len(file) > 2 * 256 * 9 * 3
    again = load(file)
    assert again["w1"].codewords is again["w0"].codewords is again["w2"].codewords is again["codewords"]
    assert again["s0"].mask is again["s1"].mask and again["s0"].values is not again["s1"].values
    assert Artifact(again.tensors).to_bytes() == file
    for name, dense in again.unpack().items():
        assert np.array_equal(dense, artifact.unpack()[name])
    rows_of = again.ledger()
    assert sum(row.total for row in rows_of) == len(file)
    tables = {row.name: row.tables for row in rows_of}
    assert tables["w0"] > 5000 and tables["w1"] == tables["w2"] == tables["codewords"] == 0


def test_small_arrays_are_shared_in_their_pool():
    scale = np.array(0.25, np.float32)
    several = {f"w{i}": Tensor(Uniform(indices(9, 9, i), scale)) for i in range(4)}
    again = load(Artifact(several).to_bytes())
    assert all(again[name].scale is again["w0"].scale for name in several)
    alone = load(Artifact(several).to_bytes(), tensors=["w3"])
    assert np.array_equal(alone["w3"].unpack(), several["w3"].unpack())


def test_one_tensor_finds_and_checks_what_it_shares(tmp_path):
    path, trees = tmp_path / "shared.terse", layers(1600)
    artifact = Artifact({name: Tensor(tree) for name, tree in trees.items()})
    artifact.save(path)
    for name, dense in artifact.unpack().items():
        assert np.array_equal(load(path, tensors=[name]).unpack()[name], dense)
    file = bytearray(path.read_bytes())
    own = next(row for row in artifact.ledger() if row.name == "w0")
    begin = len(file) - len(parts(bytes(file))[1]) - 12
    file[begin + own.payload + own.tables - 50] ^= 1  # among the codewords, which lie with w0
    path.write_bytes(file)
    with pytest.raises(FormatError, match="w0: its bytes are damaged"):
        load(path, tensors=["w2"])
    assert np.array_equal(load(path, tensors=["s1"])["s1"].values, trees["s1"].values)


def test_numbers_that_are_no_earlier_array_are_refused():
    plain, streams = parts(Artifact({n: Tensor(t) for n, t in layers().items()}).to_bytes())
    at = plain.index(bytes([SHARED, 1]))
    for number in (3, 8, 200, 1 << 40):  # three are described before
        with pytest.raises(FormatError):
            load(rebuilt(plain[: at + 1] + put_number(number) + plain[at + 2 :], streams, small=True))
    with pytest.raises(FormatError, match="w1: the tree does not fit together"):  # the levels of w0 are no codewords
        load(rebuilt(plain[: at + 1] + b"\0" + plain[at + 2 :], streams, small=True))


def test_an_array_that_is_used_often_counts_as_often():
    array = np.zeros(1 << 16, np.float32)
    many = Artifact({f"w{i}": Tensor(array) for i in range(3000)})  # 786 MB of tensors in some kilobytes
    assert many.nbytes < 1 << 16
    with pytest.raises(FormatError, match="over the limit"):
        load(many.to_bytes())


def network():
    """Two layers of one codebook, a third of levels, and the task that they learn."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    task = tn.Task(model, train=(x, (x[:, 0] > 0).long()), schedule=tn.Schedule(epochs=1, lr=0.5, batch=64))
    codewords = floats(5, 2, seed=4)
    trees = {f"{k}.weight": Codebook(indices(8, 4, k, 5), codewords) for k in (0, 2)}
    levels = np.random.default_rng(1).integers(-3, 4, (4, 8)).astype(np.int8)
    return Draft.of_model(model).with_trees(trees | {"3.weight": Uniform(levels, np.array(0.1, np.float32))}), task


def shared_codewords(draft):
    assert draft.tensors["0.weight"].tree.codewords is draft.tensors["2.weight"].tree.codewords
    return draft.tensors["0.weight"].tree.codewords


def test_the_mean_of_the_gradients_is_that_of_each_groups_own_members():
    draft, task = network()
    index = np.random.default_rng(2).integers(0, 3, (8, 4)).astype(np.uint8)
    index[:4][index[:4] == 2] = 0  # of the first group none has the third codeword
    apart = {k: Codebook(index[4 * k : 4 * k + 4], floats(3, 2, seed=k)) for k in (0, 1)}
    grouped = draft.with_trees({"0.weight": Codebook(index, np.stack([a.codewords for a in apart.values()]))})
    rate = 0.5
    after = Finetune(1, lr=rate, gradient="mean")(grouped, task).tensors["0.weight"].tree
    free = draft.with_trees({"0.weight": grouped.tensors["0.weight"].tree.unpack()})
    step = Finetune(1, lr=rate)(free, task).tensors["0.weight"].tree - free.tensors["0.weight"].tree
    for k, part in apart.items():
        pulled = step[4 * k : 4 * k + 4].reshape(4, 4, 2)
        for number in range(3):
            own = pulled[part.index == number]
            moved = after.codewords[k, number] - part.codewords[number]
            assert np.allclose(moved, own.mean(0) if len(own) else 0, atol=1e-6)


def test_training_moves_a_shared_codebook_once_by_the_sum_of_its_gradients():
    draft, task = network()
    before = shared_codewords(draft)
    moved = shared_codewords(Finetune(1, lr=0.5)(draft, task)) - before
    apart = draft.tensors["2.weight"].tree
    apart = draft.with_trees({"2.weight": Codebook(apart.index, apart.codewords.copy())})
    ways = [Finetune(1, lr=0.5)(apart, task).tensors[f"{k}.weight"].tree.codewords - before for k in (0, 2)]
    assert np.abs(ways[0]).max() > 1e-4 and np.abs(ways[1]).max() > 1e-4
    assert np.allclose(moved, ways[0] + ways[1], atol=1e-6)  # one step of plain descent


def test_what_rewrites_trees_keeps_arrays_shared_down_to_the_file():
    draft, task = network()
    trained = TrainLevels(1)(Finetune(1)(draft, task), task)
    narrow = shared_codewords(Narrow()(trained, None))
    assert np.array_equal(narrow, shared_codewords(trained).astype(np.float16).astype(np.float32))
    file = load(artifact_of(Narrow()(trained, None)).to_bytes())
    assert file["0.weight"].codewords is file["2.weight"].codewords
    part = taken(file["0.weight"], 0, np.arange(3))
    assert part.codewords is file["2.weight"].codewords and part.shape == (3, 8)
    other = replace(file.tensors["0.weight"], tree=Codebook(part.index, part.codewords + 1))
    assert np.array_equal(file["2.weight"].codewords, narrow) and other.tree.codewords is not narrow


def test_a_shared_codebook_moves_by_the_mean_over_the_members_of_all_trees():
    draft, task = network()
    before = shared_codewords(draft)
    schedule = tn.Schedule(epochs=1, lr=0.5, batch=64)
    summed, mean = (
        shared_codewords(tune(draft, task, schedule, range(1), 0, mean=way)) - before for way in (False, True)
    )
    members = sum(np.bincount(draft.tensors[f"{k}.weight"].tree.index.reshape(-1), minlength=5) for k in (0, 2))
    assert np.allclose(mean, summed / members[:, None], atol=1e-7) and np.abs(mean).max() > 1e-6

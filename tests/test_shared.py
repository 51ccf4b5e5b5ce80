"""Arrays that several trees share: stored once, shared again after loading, kept or split by what rewrites trees."""

import numpy as np
import pytest
from conftest import floats
from test_artifact import parts, rebuilt

from tersenet import FormatError, load
from tersenet.artifact import Artifact, Tensor
from tersenet.codecs.stream import put_number
from tersenet.container import SHARED, SMALL
from tersenet.packed import Codebook, Sparse, Uniform


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

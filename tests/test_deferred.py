"""Files that stay open: what is decoded when, what is read of the file, what is held, and what is damaged meanwhile."""

import copy
import gc
import os
import pickle
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import floats, small_files, trees

from tersenet import FormatError, load
from tersenet.access import File
from tersenet.artifact import Artifact, Coding, Tensor, errors_against
from tersenet.container import PREAMBLE
from tersenet.deferred import Deferred
from tersenet.header import Header
from tersenet.packed import Packed
from tersenet.replacing import write_atomically

FILES = small_files()
PARTS = [load(FILES[name]).tensors for name in ("odd", "shared", "small")]
# with checks of its own for each tensor, which only files over 64 KiB have and which are read by place
FILES["large"] = Artifact(PARTS[0] | PARTS[1] | PARTS[2] | {"large": Tensor(floats(150, 150))}).to_bytes()
posix = pytest.mark.skipif(os.name != "posix", reason="a file that is open is replaced as POSIX allows it")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Write a file's bytes and open it as a large one: nothing of it is decoded before it is asked for."""

    def opened(file, name="w.terse"):
        (tmp_path / name).write_bytes(file)
        with monkeypatch.context() as as_large:
            as_large.setattr("tersenet.container.GROUP", -1)
            return load(tmp_path / name)

    return opened


@pytest.fixture
def reads(monkeypatch):
    """Every (offset, length) that is read of open files."""
    told, part = [], File._part

    def counted(file, offset, length):
        data = part(file, offset, length)
        told.append((offset, len(data)))
        return data

    monkeypatch.setattr(File, "_part", counted)
    return told


def deferred(tensor):
    return isinstance(vars(tensor)["tree"], Deferred)


def same(one, other):
    """Whether two trees are the same node for node and bit for bit."""
    if isinstance(one, Packed):
        return type(one) is type(other) and all(same(a, vars(other)[name]) for name, a in vars(one).items())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return one == other


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("group", [-1, 1 << 25])
def test_a_file_that_stays_open_is_the_file_that_is_decoded_at_once(opened, monkeypatch, name, group):
    lazy, eager = opened(FILES[name]), load(FILES[name])
    monkeypatch.setattr("tersenet.container.GROUP", group)
    monkeypatch.setattr("tersenet.container.THREADS", 2)
    assert all(map(deferred, lazy.tensors.values())) and not any(map(deferred, eager.tensors.values()))
    assert list(lazy) == list(eager) and len(lazy) == len(eager) and "no" not in lazy and next(iter(lazy)) in lazy
    for key, one in lazy.tensors.items():
        tree, other = one.tree, eager.tensors[key]
        assert same(tree, other.tree) and lazy[key] is tree
        assert (one.dtype, one.note, one.error, one.shape) == (other.dtype, other.note, other.error, other.tree.shape)
    dense = lazy.unpack()
    assert all(same(dense[key], array) for key, array in eager.unpack().items())
    if name == "odd":
        assert lazy.tensors["tied.a"] is lazy.tensors["tied.b"] and dense["tied.a"] is dense["tied.b"]
    assert lazy.to_bytes() == FILES[name] and lazy.nbytes == len(FILES[name]) and lazy.ledger() == eager.ledger()
    assert (lazy.meta, lazy.sections) == (eager.meta, eager.sections)
    codec = (name.removeprefix("codec-"),) if name.startswith("codec-") else Coding().codecs
    assert replace(lazy, coding=Coding(codec)).to_bytes() == FILES[name]


def test_the_state_of_a_module_comes_from_a_file_that_stays_open(opened):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 30)).bfloat16()
    file = Artifact.of_arrays(net.state_dict()).to_bytes()
    lazy = opened(file)
    for made in (lazy.into(copy.deepcopy(net)), lazy.realise(net)):
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in made.state_dict().items())
    assert all(map(deferred, lazy.tensors.values()))
    assert errors_against(lazy, net.state_dict()) == dict.fromkeys(net.state_dict(), 0.0)


def test_one_tensor_is_read_without_the_rest(opened, reads, tmp_path):
    tensors = {f"w{k}": Tensor(floats(60, 50, seed=k)) for k in range(9)} | {f"b{k}": Tensor(floats(9)) for k in (1, 2)}
    file = Artifact(tensors, Coding(("bits",))).to_bytes()
    lazy = opened(file)
    assert sum(length for _, length in reads) >= len(file)  # the check of all bytes
    header = Header.read(File(tmp_path / "w.terse"), None)
    before = header.entries["w4"].promises[0].offset
    length = header.entries["w4"].promises[0].length
    reads.clear()
    assert np.array_equal(lazy["w4"], floats(60, 50, seed=4)) and reads == [(before, length)]
    reads.clear()
    assert np.array_equal(lazy["b2"], tensors["b2"].tree) and np.array_equal(lazy["b1"], tensors["b1"].tree)
    (pool,) = header.pools
    assert reads == [(pool.offset, pool.length)]
    reads.clear()
    assert np.array_equal(load(tmp_path / "w.terse", tensors=["w4"])["w4"], floats(60, 50, seed=4))
    coded = header.coded + PREAMBLE
    assert sum(n for _, n in reads) == coded + length and Counter(reads)[before, length] == 1


def test_nothing_is_decoded_for_names_types_notes_errors_shapes_and_the_ledger(opened, monkeypatch):
    lazy = opened(FILES["odd"])
    monkeypatch.setattr("tersenet.decoding._arrays", lambda jobs: pytest.fail("decoded"))
    assert len(list(lazy)) == len(lazy.tensors) and str(lazy) and lazy.nbytes
    assert [t.shape for t in lazy.tensors.values()][:2] == [(3, 4), (3, 4)]
    assert {t.dtype for t in lazy.tensors.values()} >= {"bool", "float16"}


def test_a_tree_is_kept_while_someone_holds_it_and_no_longer(opened):
    lazy = opened(FILES["node-Uniform"])
    tree = lazy["layer.weight"]
    assert lazy["layer.weight"] is tree and lazy.tensors["layer.weight"].tree is tree
    seen = weakref.ref(tree)
    del tree
    gc.collect()
    assert seen() is None and lazy["layer.weight"].q.shape == (6, 8)


def test_what_is_damaged_after_opening_is_told_when_it_is_touched(opened, tmp_path):
    file = Artifact({name: Tensor(floats(90, 90, seed=k)) for k, name in enumerate("abc")}).to_bytes()
    lazy, path = opened(file), tmp_path / "w.terse"
    header = Header.read(File(path), None)
    at = header.entries["b"].promises[0].offset
    with path.open("r+b") as other:
        other.seek(at + 7)
        other.write(bytes([file[at + 7] ^ 1]))
    assert np.array_equal(lazy["a"], floats(90, 90)) and np.array_equal(lazy["c"], floats(90, 90, seed=2))
    for touch in (lambda: lazy["b"], lazy.unpack, lambda: list(lazy.values())):
        with pytest.raises(FormatError, match="b: its bytes are damaged"):
            touch()
    with pytest.raises(FormatError, match="damaged"):
        lazy.to_bytes()
    with pytest.raises(FormatError, match="damaged"):
        lazy.save(tmp_path / "copy.terse")
    with pytest.raises(FormatError, match="damaged"):
        opened(path.read_bytes())
    with path.open("r+b") as other:
        other.truncate(at + 5)
    with pytest.raises(FormatError, match=r"b: its bytes are damaged"):
        lazy["b"]
    with pytest.raises(FormatError, match="ended while it was read"):
        lazy.to_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["w.terse"]


def test_a_tree_with_right_checksums_that_does_not_fit_is_told_when_it_is_touched(opened):
    tree = trees()["Codebook"]
    wrong = replace(tree, index=tree.index + np.uint8(200))
    lazy = opened(Artifact({"good": Tensor(floats(5, 5)), "bad": Tensor(wrong)}).to_bytes())
    assert np.array_equal(lazy["good"], floats(5, 5))
    with pytest.raises(FormatError, match="bad: an index is past the codewords"):
        lazy["bad"]


def test_large_bytes_are_decoded_when_they_are_asked_for_too(monkeypatch):
    monkeypatch.setattr("tersenet.container.GROUP", -1)
    lazy = load(FILES["odd"])
    lazy.check()
    assert all(map(deferred, lazy.tensors.values())) and lazy.to_bytes() is FILES["odd"]
    assert np.array_equal(lazy["half"], [1.5, 2.5])


def test_the_command_decodes_all_of_a_large_file_before_it_calls_it_whole(monkeypatch, tmp_path, capsys):
    cli = pytest.importorskip("tersenet.cli")
    monkeypatch.setattr("tersenet.container.GROUP", -1)
    tree = trees()["Codebook"]
    for name, shift in (("good", 0), ("bad", 200)):
        tensors = {"a": Tensor(floats(5, 5)), "b": Tensor(replace(tree, index=tree.index + np.uint8(shift)))}
        (tmp_path / name).write_bytes(Artifact(tensors).to_bytes())
    cli.main(["verify", str(tmp_path / "good")])
    assert "whole and undamaged" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(tmp_path / "bad")])
    said = capsys.readouterr()
    assert end.value.code == 2 and "bad: b: an index is past the codewords" in said.err and not said.out


@posix
def test_a_file_that_is_replaced_stays_what_was_opened(opened, tmp_path):
    first, second = (Artifact({"w": Tensor(k * np.abs(floats(150, 150)) + k)}) for k in (np.float32(1), np.float32(-1)))
    lazy = opened(first.to_bytes())
    write_atomically(tmp_path / "w.terse", second.to_bytes())
    assert lazy["w"].min() >= 1 and load(tmp_path / "w.terse")["w"].max() <= -1
    lazy.save(tmp_path / "w.terse")
    assert lazy["w"].min() >= 1 and (tmp_path / "w.terse").read_bytes() == first.to_bytes()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted as Linux tells them")
def test_files_are_closed_when_nobody_holds_their_tensors(opened, tmp_path):
    def count():
        held = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        return sum(path.startswith(str(tmp_path)) for path in held)

    lazy = opened(FILES["large"])
    tensor = lazy.tensors["nan"]
    assert count() == 1
    del lazy
    assert count() == 1 and np.isnan(tensor.unpack()[0])
    del tensor
    assert count() == 0
    load(tmp_path / "w.terse"), load(tmp_path / "w.terse", ["nan"])
    assert count() == 0
    (tmp_path / "w.terse").write_bytes(FILES["large"][:-1])
    with pytest.raises(FormatError) as held:
        load(tmp_path / "w.terse")
    assert count() == 0 and held.value


def test_copies_and_what_is_sent_elsewhere_have_their_trees_with_them(opened, tmp_path):
    lazy = opened(FILES["odd"])
    copies = [copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))]
    os.unlink(tmp_path / "w.terse") if os.name == "posix" else None
    for made in copies:
        assert not any(map(deferred, made.tensors.values())) and made.to_bytes() == FILES["odd"]
        assert made.tensors["tied.a"] is made.tensors["tied.b"]
        assert same(made["wide"], lazy["wide"])


@pytest.mark.parametrize("name", ["shared", "large"])
def test_what_tensors_share_is_one_array_whoever_asks_first_and_in_what_order(opened, name):
    for names in (("w0", "w1"), ("w1", "w0")):
        lazy = opened(FILES[name])
        first, second = (lazy[one] for one in names)
        assert first.codewords is second.codewords and np.array_equal(
            first.unpack(), load(FILES[name])[names[0]].unpack()
        )
    lazy = opened(FILES[name])
    with ThreadPoolExecutor(16) as pool:
        trees = list(pool.map(lazy.__getitem__, ["w0", "w1"] * 40))
    assert len({id(tree.codewords) for tree in trees}) == 1


def test_many_threads_read_one_open_file(opened):
    tensors = {f"w{k}": Tensor(floats(90, 90, seed=k)) for k in range(12)}
    lazy = opened(Artifact(tensors).to_bytes())
    names = list(tensors) * 16
    with ThreadPoolExecutor(16) as pool:
        for name, tree in zip(names, pool.map(lazy.__getitem__, names), strict=True):
            assert np.array_equal(tree, tensors[name].tree)


def test_a_file_that_is_small_but_takes_much_is_decoded_when_it_is_asked_for(tmp_path):
    path = tmp_path / "zeros.terse"
    tensors = {"w": Tensor(np.zeros((6000, 6000), np.uint8), "uint8"), "b": Tensor(floats(9))}
    Artifact(tensors, Coding(("bits",))).save(path, limit=1 << 29)
    assert path.stat().st_size < 1000
    lazy = load(path, limit=1 << 29)
    assert all(map(deferred, lazy.tensors.values())) and np.array_equal(lazy["b"], floats(9))

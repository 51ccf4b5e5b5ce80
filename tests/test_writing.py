"""Writing a network that is larger than what may be in memory: the same bytes, nothing left behind, little held."""

import errno
import gc
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
from conftest import floats, fresh_process, small_files

from tersenet import load
from tersenet.artifact import Artifact, Coding, Tensor
from tersenet.deferred import Deferred
from tersenet.packed import Uniform

FILES = small_files()
OLD = Artifact({"old": Tensor(floats(3))}).to_bytes()


@pytest.fixture
def as_large(monkeypatch):
    """Every network is written as a large one: one tensor at a time, through a scratch file."""
    monkeypatch.setattr("tersenet.container.GROUP", -1)


class Fresh(Mapping):
    """Arrays that are made anew at every look, as those are that are read from a file; it counts how many live."""

    def __init__(self, make, count):
        self.make, self.count, self.alive, self.most = make, count, weakref.WeakSet(), 0

    def __getitem__(self, name):
        array = self.make(int(name)).view(Counted)
        self.alive.add(Key(array))
        self.most = max(self.most, len(self.alive))
        return array

    def __iter__(self):
        return iter(map(str, range(self.count)))

    def __len__(self):
        return self.count


class Counted(np.ndarray):
    """An array that holds its key, which so lives as long as it."""


class Key:
    def __init__(self, array):
        array.key = self


@pytest.mark.parametrize("name", FILES)
def test_a_large_network_makes_the_bytes_that_a_small_one_makes(as_large, tmp_path, name):
    first = load(FILES[name])
    codec = (name.removeprefix("codec-"),) if name.startswith("codec-") else Coding().codecs
    again = Artifact(first.tensors, Coding(codec), first.meta, first.sections)
    again.save(tmp_path / "w.terse")
    assert (tmp_path / "w.terse").read_bytes() == FILES[name]
    assert again.nbytes == len(FILES[name]) and again.ledger() == first.ledger() and str(again) == str(first)
    again.save(tmp_path / "v.terse")
    assert again.to_bytes() == (tmp_path / "v.terse").read_bytes() == FILES[name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.terse", "w.terse"]


def test_arrays_that_are_coded_ahead_are_not_taken_for_later_ones(as_large, tmp_path, monkeypatch):
    """Streams that are ready go by the ids of arrays, and ids are given again."""
    monkeypatch.setattr("tersenet.container.THREADS", 2)
    monkeypatch.setattr("tersenet.container.WORTH_A_THREAD", 100)

    def make(k):
        levels = np.random.default_rng(k).integers(-9, 9, (40, 50)).astype(np.int8)
        return Uniform(levels, np.full((40, 1), 1.0 + k, np.float32), levels[:, :1] + np.int8(k % 3))

    tensors = {f"w{k}": Tensor(Deferred((40, 50), lambda k=k: make(k))) for k in range(60)}
    for size in (1, 1 << 13):
        monkeypatch.setattr("tersenet.container.GROUP", size)
        Artifact(tensors, Coding(("bits", "rans"))).save(tmp_path / "w.terse")
        found = load(tmp_path / "w.terse")
        for k in range(60):
            assert np.array_equal(found[f"w{k}"].q, make(k).q), k
            assert np.array_equal(found[f"w{k}"].unpack(), make(k).unpack()), k


@pytest.mark.parametrize("wrong", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "no", "source")])
def test_what_stops_the_writing_leaves_the_old_file_and_nothing_else(as_large, tmp_path, wrong):
    def stop():
        raise wrong

    (tmp_path / "w.terse").write_bytes(OLD)
    tensors = {"a": Tensor(floats(90, 90)), "b": Tensor(Deferred((3, 3), stop))}
    with pytest.raises(type(wrong)) as told:
        Artifact(tensors).save(tmp_path / "w.terse")
    assert told.value is wrong and getattr(wrong, "filename", "source") == "source"
    assert (tmp_path / "w.terse").read_bytes() == OLD and [p.name for p in tmp_path.iterdir()] == ["w.terse"]


def test_a_limit_and_a_missing_folder_are_told_and_leave_nothing(as_large, tmp_path):
    with pytest.raises(ValueError, match=r"w\.terse: .*over the limit of 10,000: .* for save"):
        Artifact({"w": Tensor(floats(90, 90))}).save(tmp_path / "w.terse", limit=10_000)
    with pytest.raises(FileNotFoundError) as told:
        Artifact({"w": Tensor(floats(90, 90))}).save(tmp_path / "none" / "w.terse")
    assert told.value.filename == str(tmp_path / "none" / "w.terse") and not list(tmp_path.iterdir())


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    script = (
        "import resource, signal, sys, numpy as np, tersenet.container\n"
        "from tersenet.artifact import Artifact, Tensor\n"
        "tersenet.container.GROUP = -1\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    Artifact({'w': Tensor(np.random.rand(5000))}).save(sys.argv[1])\n"
        "except OSError as wrong:\n    print('refused', wrong.errno, wrong.filename)\n"
    )
    path = tmp_path / "w.terse"
    assert fresh_process(script, path).strip() == f"refused {errno.EFBIG} {path}" and not list(tmp_path.iterdir())


def test_arrays_are_kept_bit_for_bit_and_tied_ones_once():
    torch = pytest.importorskip("torch")
    bits = torch.randint(-(2**15), 2**15, (40, 30), dtype=torch.int16)
    shared = torch.randn(7, 5)
    state = {
        "bf16": bits.view(torch.bfloat16),
        "half": bits.view(torch.float16),
        "a": shared,
        "b": shared.detach(),  # another object for the same numbers, as in every state_dict
        "turned": shared.T,
        "int": torch.arange(5),
        "e5m2": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2),
        "numpy": np.array([np.nan, -0.0]),
        "empty": torch.zeros(0, 3),
        "none": torch.zeros(0, 3),
    }
    back = load(Artifact.of_arrays(state).to_bytes())
    for name, value in back.state_dict().items():
        given = torch.as_tensor(state[name]).contiguous()
        assert value.dtype == given.dtype and value.shape == given.shape
        assert not given.numel() or torch.equal(value.view(torch.uint8), given.view(torch.uint8)), name
    assert back.tensors["a"] is back.tensors["b"] and len({id(t) for t in back.tensors.values()}) == len(state) - 1
    for name, value in {"complex64": torch.zeros(3, dtype=torch.complex64), "sparse": torch.eye(3).to_sparse()}.items():
        with pytest.raises(ValueError, match=f"z: cannot store .*{name}"):
            Artifact.of_arrays({"z": value})
    assert load(Artifact.of_arrays({"n": np.float32(3), "m": np.float32(3)}).to_bytes())["m"] == 3


def test_arrays_that_come_from_elsewhere_are_looked_at_one_by_one_and_never_tied(as_large, tmp_path, monkeypatch):
    monkeypatch.setattr("tersenet.container.THREADS", 1)
    state = Fresh(lambda k: np.full((50, 60), k // 2, np.float32), 40)
    artifact = Artifact.of_arrays(state)
    assert len({id(t) for t in artifact.tensors.values()}) == 40
    artifact.save(tmp_path / "w.terse")
    gc.collect()
    assert state.most <= 3 and not state.alive
    found = load(tmp_path / "w.terse")
    assert [int(found[name][0, 0]) for name in found] == [k // 2 for k in range(40)]


def test_writing_and_reading_take_the_memory_of_some_tensors_and_not_of_all(tmp_path):
    """48 tensors of 1 million float32 values are 192 MB."""
    script = (
        "import sys, numpy as np, tersenet.container\n"
        "from tersenet.artifact import Artifact, Coding, Tensor, load\n"
        "from tersenet.deferred import Deferred\n"
        "from tersenet.journal import memory\n"
        "tersenet.container.GROUP = 1 << 20\n"
        "def make(k):\n    return np.random.default_rng(k).normal(size=(1024, 1024)).astype(np.float32)\n"
        "def once(count):\n"
        "    tensors = {str(k): Tensor(Deferred((1024, 1024), lambda k=k: make(k))) for k in range(count)}\n"
        "    Artifact(tensors, Coding(('bits',))).save(sys.argv[1], limit=1 << 40)\n"
        "    assert all(np.array_equal(t, make(int(k))) for k, t in load(sys.argv[1], limit=1 << 40).items())\n"
        "once(2)\nbefore = memory()\nonce(48)\nprint(memory() - before)\n"
    )
    assert float(fresh_process(script, tmp_path / "w.terse")) < 40

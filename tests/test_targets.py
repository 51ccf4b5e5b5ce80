"""Names from a file are keys of what is unpacked, whatever they look like: no paths, attributes or other names."""

import io
import json
import struct
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from conftest import floats
from safetensors.torch import load_file
from torch import nn

from tersenet import load
from tersenet.artifact import Artifact, Tensor
from tersenet.sources import read
from tersenet.targets import ENDS, dense_file

PATHS = ["../x", "a/../../b", "/etc/x", "C:\\x", "c:x", "..\\x", "..", "a\0b"]
ODD = ["", ".", "CON", "nul.txt", "w" * 300, "W", "w", "x/", "a//b", "x\ny", "\u202eabc", "ключ", "a\x1b[31m", "file"]
CLASSES = ["__class__", "__dict__", "self", "forward", "load_state_dict", "__reduce__", "x.__init__.__globals__"]


def named(names):
    """A file whose tensors hold the places of their names."""
    return load(Artifact({name: Tensor(np.full(3, at, np.float32)) for at, name in enumerate(names)}).to_bytes())


@pytest.mark.parametrize("end", ENDS)
def test_odd_names_come_back_as_they_are(tmp_path, end):
    names = ODD + CLASSES + (PATHS if end != ".npz" else [])
    path = tmp_path / f"back{end}"
    path.write_bytes(dense_file(named(names), end))
    theirs = {".npz": np.load, ".pt": lambda p: torch.load(p, weights_only=True), ".safetensors": load_file}[end](path)
    for found in (dict(theirs), read(path).tensors):
        assert {name: int(value[0]) for name, value in found.items()} == {name: at for at, name in enumerate(names)}
    if end != ".safetensors":
        with zipfile.ZipFile(path) as archive:
            assert all(".." not in PurePosixPath(n).parts and n[0] != "/" for n in archive.namelist())
            assert archive.testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", PATHS)
def test_an_npz_refuses_names_that_it_would_hold_as_paths(name):
    with pytest.raises(ValueError, match=r"would hold this name as a path; unpack to \.safetensors or \.pt"):
        dense_file(named(["w", name]), ".npz")


def test_names_that_a_kind_of_file_keeps_for_itself_are_refused():
    with pytest.raises(ValueError, match=r"cannot tell it from 'x\.npy'"):  # np.load would give one for the other
        dense_file(named(["x", "x.npy"]), ".npz")
    with pytest.raises(ValueError, match=r"__metadata__.*unpack to \.npz or \.pt"):
        dense_file(named(["__metadata__"]), ".safetensors")
    assert np.load(io.BytesIO(dense_file(named(["x.npy", "__metadata__"]), ".npz"))).files == ["x.npy", "__metadata__"]


def test_names_never_become_attributes_of_a_module():
    net = nn.Linear(3, 3)
    state = {n: Tensor(v.numpy()) for n, v in net.state_dict().items()}
    for name in CLASSES + PATHS:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            Artifact({**state, name: Tensor(floats(3))}).into(net)
    assert type(net) is nn.Linear and callable(net.forward) and net(torch.ones(1, 3)).shape == (1, 3)


def test_the_zip_member_that_stands_for_another_name_is_read_as_its_own(tmp_path):
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for at, name in enumerate(("x.npy", "x.npy.npy")):
            archive.writestr(name, saved(np.full(2, at, np.float32)))
    assert {name: value[0] for name, value in read(path).tensors.items()} == {"x": 0, "x.npy": 1}


def saved(array, after=b""):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue() + after


def test_stray_and_doubled_members_and_bytes_after_an_array_never_come_in(tmp_path):
    path = tmp_path / "m.npz"

    def archived(*members):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
        return path

    found = read(archived(("w.npy", saved(np.ones(3))), ("notes.txt", b"secret"), ("code.pkl", b"x")))
    assert set(found.tensors) == {"w"} and np.array_equal(found.tensors["w"], np.ones(3))
    assert found.words == ["left out notes.txt, which is no array", "left out code.pkl, which is no array"]
    with pytest.raises(ValueError, match=r"m\.npz: w: bytes follow the array"):
        read(archived(("w.npy", saved(np.ones(3), b"tail"))))
    with pytest.warns(UserWarning, match="Duplicate name"), pytest.raises(ValueError, match="two arrays of one name"):
        read(archived(("w.npy", saved(np.ones(3))), ("w.npy", saved(np.zeros(3)))))
    with pytest.raises(ValueError, match=r"m\.npz"):
        read(archived(("w.npy", b"not an array")))
    whole = archived(("w.npy", saved(np.ones(3)))).read_bytes()
    for before, after in ((b"", b"tail" * 99), (b"head" * 99, b"")):
        path.write_bytes(before + whole + after)
        try:
            assert np.array_equal(read(path).tensors["w"], np.ones(3))
        except ValueError as wrong:
            assert "m.npz" in str(wrong)
    path.write_bytes(whole.replace(np.ones(3).tobytes(), np.full(3, 2.0).tobytes()))
    with pytest.raises(ValueError, match=r"m\.npz.*CRC"):
        read(path)


@pytest.mark.parametrize(
    "places,data",
    [
        ([(0, 8), (8, 16)], bytes(16) + b"tail"),
        ([(0, 8), (4, 12)], bytes(12)),
        ([(0, 8), (0, 8)], bytes(8)),
        ([(0, 8), (12, 20)], bytes(20)),
        ([(0, 8), (8, 24)], bytes(24)),
    ],
    ids=["after the end", "overlapping", "twice", "a hole", "more than its shape"],
)
def test_a_safetensors_file_with_other_bytes_than_its_tensors_is_refused(tmp_path, places, data):
    header = {f"t{k}": {"dtype": "F32", "shape": [2], "data_offsets": list(at)} for k, at in enumerate(places)}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(ValueError, match=r"m\.safetensors: not a whole safetensors file"):
        read(tmp_path / "m.safetensors")


def test_bytes_after_a_pytorch_file_never_reach_the_output(tmp_path):
    for zipped in (True, False):
        torch.save({"w": torch.arange(3.0)}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes() + b"SECRET" * 50)
        found = read(tmp_path / "m.pt").tensors
        assert set(found) == {"w"} and torch.equal(found["w"], torch.arange(3.0))
        for end in ENDS:
            assert b"SECRET" not in dense_file(Artifact({"w": Tensor(found["w"].numpy())}), end)

"""The command as a user runs it: exit codes, one-line errors, files."""

import json
import subprocess
import sys

import numpy as np
import pytest

TASK = """
import torch, tersenet as tn
def task():
    torch.manual_seed(0)
    x = torch.randn(400, 20); y = (x[:, :10].sum(1) > x[:, 10:].sum(1)).long()
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    schedule = tn.Schedule(epochs=4, lr=0.1, batch=32)
    return tn.Task(net, (x[:300], y[:300]), (x[300:], y[300:]), schedule=schedule).trained()
"""


def terse(*arguments, code=0, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "tersenet.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "net.npz", w=rng.normal(size=(60, 60)).astype(np.float32), b=np.zeros(60, np.float32))
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "pack.yaml").write_text("stages: [pack, narrow]")
    return tmp_path


def test_a_network_goes_through_every_command(home):
    out = terse("compress", "--task", home / "task.py", "--recipe", "deep-compression", "-o", home / "a.terse")
    assert "test metric" in out and "wrote" in out
    assert "Sparse(Codebook)" in terse("inspect", home / "a.terse")
    ledger = json.loads(terse("inspect", home / "a.terse", "--json"))
    assert sum(t["bytes"] for t in ledger["tensors"]) == ledger["bytes"] == (home / "a.terse").stat().st_size
    assert "error of the outputs" in terse("inspect", home / "a.terse", "--task", home / "task.py")
    assert "test metric" in terse("verify", home / "a.terse", "--task", home / "task.py")
    for name in ("a.npz", "a.safetensors"):
        terse("unpack", home / "a.terse", "-o", home / name)
    from safetensors.numpy import load_file

    with np.load(home / "a.npz") as npz:
        assert all(np.array_equal(npz[n], a) for n, a in load_file(home / "a.safetensors").items())
    assert "deep-compression" in terse("recipes")


def test_arrays_alone_are_packed_and_verified_against_the_source(home):
    terse("compress", home / "net.npz", "--recipe", home / "pack.yaml", "--ratio", 5, "-o", home / "n.terse")
    assert "largest error" in terse("verify", home / "n.terse", "--against", home / "net.npz")
    assert "undamaged" in terse("verify", home / "n.terse")
    terse("unpack", home / "n.terse", "-o", home / "back.npz")
    other = dict(np.load(home / "net.npz"))
    other["w"] = other["w"] + 1
    np.savez(home / "other.npz", **other)
    assert "w: the error is" in terse("verify", home / "n.terse", "--against", home / "other.npz", code=1)


def errors(home):
    np.savez(home / "nan.npz", w=np.full((9, 9), np.nan, np.float32))
    (home / "bad.terse").write_bytes(b"TERSE\1 not a file at all........")
    (home / "new.terse").write_bytes(b"TERSE\7" + bytes(100))
    (home / "text.npz").write_text("hello")
    (home / "empty.py").write_text("x = 1")
    pack = ("--recipe", home / "pack.yaml")
    return [
        (("compress", *pack, "-o", home / "x.terse"), 2, "nothing to compress"),
        (("compress", home / "nan.npz", *pack, "-o", home / "x.terse"), 2, "w: holds NaN"),
        (("compress", home / "text.npz", *pack, "-o", home / "x.terse"), 2, "not an .npz file"),
        (("compress", home / "gone.npz", *pack, "-o", home / "x.terse"), 2, "No such file"),
        (("compress", home / "net.npz", *pack, "-o", home / "no" / "x.terse"), 2, "no such folder"),
        (("compress", home / "net.npz", *pack, "--ratio", 500, "-o", home / "x.terse"), 1, "the budget allows"),
        (("compress", home / "net.npz", "--recipe", "best", "-o", home / "x.terse"), 2, "no 'best'"),
        (("compress", home / "net.npz", *pack, "--size", "tiny", "-o", home / "x.terse"), 2, "is not a size"),
        (("compress", "--task", home / "empty.py", *pack, "-o", home / "x.terse"), 2, "no function task()"),
        (("inspect", home / "bad.terse"), 2, "damaged"),
        (("inspect", home / "new.terse"), 2, "format version 7"),
        (("inspect", home / "gone.terse"), 2, "No such file"),
        (("inspect",), 2, "Missing argument"),
        (("unpack", home / "bad.terse", "-o", home / "x.txt"), 2, "damaged"),
    ]


def test_bad_input_gets_one_line_its_exit_code_and_no_file(home):
    for arguments, code, message in errors(home):
        said = terse(*arguments, code=code)
        assert message in said and len(said.strip().splitlines()) == 1, said
        assert not (home / "x.terse").exists()


def test_help_teaches():
    said = terse("--help")
    assert all(word in said for word in ("compress", "inspect", "verify", "unpack", "recipes"))
    assert "--drop" in terse("compress", "--help")

"""The command as a user runs it: exit codes, one-line errors, files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tersenet import load

TASK = """
import torch, tersenet as tn
def task():
    torch.manual_seed(0)
    x = torch.randn(400, 20); y = (x[:, :10].sum(1) > x[:, 10:].sum(1)).long()
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    schedule = tn.Schedule(epochs=4, lr=0.1, batch=32)
    return tn.Task(net, (x[:300], y[:300]), (x[300:], y[300:]), schedule=schedule).trained()
"""


class Code:
    def __reduce__(self):
        return print, ("this ran",)


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
    for name in ("a.npz", "a.safetensors", "a.pt"):
        terse("unpack", home / "a.terse", "-o", home / name)
    state = load_file(home / "a.safetensors")
    with np.load(home / "a.npz") as npz:
        assert all(np.array_equal(npz[n], a) for n, a in state.items())
    assert all(torch.equal(a, state[n]) for n, a in torch.load(home / "a.pt").items())
    assert "deep-compression" in terse("recipes")


FLOATS = ["float16", "bfloat16", "float32", "float64"]
TYPES = [*FLOATS, "float8_e4m3fn", "float8_e5m2", "uint8", "uint16", "int64", "bool"]


def test_types_shapes_and_metadata_go_through_every_command(home):
    torch.manual_seed(0)
    state = {}
    for kind in TYPES:
        for shape in ((40, 40), (70,), (), (0, 3)):
            state[f"{kind}{len(shape)}"] = (torch.randn(shape) > 0).to(getattr(torch, kind))
        if kind in FLOATS:
            state[f"{kind}2"] = torch.randn(40, 40).to(getattr(torch, kind))
    save_file(state, home / "m.safetensors", {"format": "pt", "trained by": "Łukasz"})
    torch.save({"model": state, "epoch": 3}, home / "m.pt")
    terse("compress", home / "m.safetensors", "--recipe", home / "pack.yaml", "-o", home / "a.terse")
    terse("compress", home / "m.pt", "--recipe", home / "pack.yaml", "-o", home / "b.terse")
    for file in ("a.terse", "b.terse"):
        for source in ("m.safetensors", "m.pt"):
            assert "no worse" in terse("verify", home / file, "--against", home / source)
    terse("unpack", home / "a.terse", "-o", home / "back.safetensors")
    terse("unpack", home / "a.terse", "-o", home / "back.pt")
    with safe_open(home / "back.safetensors", "pt") as back:
        assert back.metadata() == {"format": "pt", "trained by": "Łukasz"}
        pairs = [(value, back.get_tensor(n), torch.load(home / "back.pt")[n]) for n, value in state.items()]
    for value, *found in pairs:
        for other in found:
            assert other.dtype == value.dtype and other.shape == value.shape
            if value.dim() < 2 or value.dtype in (torch.uint8, torch.bool, torch.float8_e5m2):
                assert torch.equal(other.float(), value.float())
    other = state | {"bfloat162": -state["bfloat162"]}
    save_file(other, home / "other.safetensors")
    assert "bfloat162: the error is 1.9" in terse(
        "verify", home / "a.terse", "--against", home / "other.safetensors", code=1
    )


def test_metadata_counts_towards_the_size_and_is_left_out_where_it_is_too_long(home):
    state = {"w": torch.randn(60, 60, generator=torch.Generator().manual_seed(0))}
    save_file(state, home / "m.safetensors", {"format": "pt", "note": "x" * 100})
    for budget in (("--size", 2000), ("--ratio", "7.2")):
        terse("compress", home / "m.safetensors", *budget, "-o", home / "m.terse")
        assert load(home / "m.terse").meta["metadata"]["format"] == "pt" and (home / "m.terse").stat().st_size <= 2000
    save_file(state, home / "m.safetensors", {"note": "x" * 70_000})
    terse("compress", home / "m.safetensors", "--size", 2000, "-o", home / "m.terse")
    assert load(home / "m.terse").meta == {}


def test_a_task_takes_its_weights_from_a_checkpoint(home):
    exec(TASK, space := {})
    model = space["task"]().model
    torch.save({"state_dict": model.state_dict()}, home / "m.pt")
    job = ("--task", home / "task.py", "--recipe", home / "pack.yaml", "-o", home / "m.terse")
    assert "test metric" in terse("compress", home / "m.pt", *job)
    torch.save({f"module.{n}": v for n, v in model.state_dict().items()}, home / "m.pt")
    said = terse("compress", home / "m.pt", *job, code=2)
    assert "does not fit the task's model" in said and len(said.splitlines()) == 1
    terse("compress", home / "net.npz", "--recipe", home / "pack.yaml", "-o", home / "n.terse")
    said = terse("verify", home / "n.terse", "--task", home / "task.py", code=2)
    assert "Error(s) in loading state_dict" in said and len(said.splitlines()) == 1


def test_names_of_tensors_are_no_arguments(home):
    np.savez(home / "odd.npz", **{"allow_pickle/w": np.ones(3), "a.b": np.ones(2)})
    save_file({"file": torch.ones(3), "self": torch.ones(2), "": torch.ones(1)}, home / "odd.safetensors")
    for source in ("odd.npz", "odd.safetensors"):
        terse("compress", home / source, "--recipe", home / "pack.yaml", "-o", home / "odd.terse")
        terse("unpack", home / "odd.terse", "-o", home / "back.npz")
        with np.load(home / "back.npz") as back:
            assert set(back.files) == set(load(home / "odd.terse").tensors)


def test_unpacking_that_fails_leaves_the_old_file_alone(home):
    terse("compress", home / "net.npz", "--recipe", home / "pack.yaml", "-o", home / "n.terse")
    (home / "out").mkdir()
    (home / "out" / "back.npz").write_text("old")
    (home / "out" / "folder.npz").mkdir()
    script = (
        "import resource, signal, sys; from tersenet import cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "cli.main()\n"
    )
    for end in ("npz", "safetensors", "pt"):
        command = [sys.executable, "-c", script, "unpack", home / "n.terse", "-o", home / "out" / f"back.{end}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "folder.npz" in terse("unpack", home / "n.terse", "-o", home / "out" / "folder.npz", code=2)
    assert "no such folder" in terse("unpack", home / "n.terse", "-o", home / "no" / "b.npz", code=2)
    assert "ends in .safetensors, .pt or .npz" in terse("unpack", home / "n.terse", "-o", home / "out" / "b.h5", code=2)
    assert sorted(p.name for p in (home / "out").iterdir()) == ["back.npz", "folder.npz"]
    assert (home / "out" / "back.npz").read_text() == "old"


def test_arrays_alone_are_packed_and_verified_against_the_source(home):
    terse("compress", home / "net.npz", "--recipe", home / "pack.yaml", "--ratio", 5, "-o", home / "n.terse")
    assert "largest error" in terse("verify", home / "n.terse", "--against", home / "net.npz")
    assert "undamaged" in terse("verify", home / "n.terse")
    terse("unpack", home / "n.terse", "-o", home / "back.npz")
    other = dict(np.load(home / "net.npz"))
    other["w"] = other["w"] + 1
    np.savez(home / "other.npz", **other)
    assert "w: the error is" in terse("verify", home / "n.terse", "--against", home / "other.npz", code=1)


def test_weights_are_kept_and_packed_by_rules_and_the_rest_meets_the_budget(home):
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (16, 8, 3, 3), "mid.weight": (64, 64), "head.weight": (10, 64), "head.bias": (10,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(home / "some.npz", **arrays)
    rules = ("--keep", "head.*", "--rule", "kind:conv2d=magnitude:density=0.5+kmeans:bits=2")
    out = terse("compress", home / "some.npz", "--size", "6kB", *rules, "-o", home / "s.terse")
    assert "dense: kept by the rule 'head.*'" in out and "by the rule 'kind:conv2d'" in out
    assert 5_500 < (home / "s.terse").stat().st_size <= 6_000
    artifact = load(home / "s.terse")
    for name in ("head.weight", "head.bias"):
        assert np.array_equal(artifact.unpack()[name], arrays[name])
    notes = {t["name"]: t["note"] for t in json.loads(terse("inspect", home / "s.terse", "--json"))["tensors"]}
    assert notes["head.bias"] == "dense: kept by the rule 'head.*'" and notes["mid.weight"] == ""
    assert artifact.meta["rules"] == {"conv.weight": "kind:conv2d", "head.bias": "head.*", "head.weight": "head.*"}
    conv = artifact["conv.weight"]
    assert np.count_nonzero(conv.unpack()) == 576 and len(conv.values.codewords) == 4
    terse("verify", home / "s.terse", "--against", home / "some.npz")
    task = ("--task", home / "task.py", "--recipe", "deep-compression", "--keep", "2.*", "-o", home / "t.terse")
    assert "dense: kept by the rule '2.*'" in terse("compress", *task)


def errors(home):
    np.savez(home / "odd.npz", w=np.ones(3), dates=np.array(["2024-01-01"], "datetime64[D]"))
    torch.save({"w": torch.ones(2), "x": Code()}, home / "code.pt")
    torch.save({"net": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, home / "two.pt")
    (home / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    (home / "folder").mkdir()
    (home / "bad.terse").write_bytes(b"TERSE\1 not a file at all........")
    (home / "new.terse").write_bytes(b"TERSE\7" + bytes(100))
    (home / "text.npz").write_text("hello")
    (home / "empty.py").write_text("x = 1")
    recipes = {
        "a.yaml": "bits is 4.5: input should be a valid integer",
        "b.yaml": "stage 2 (prune): rounds is 2.5",
        "c.yaml": "paper: write one name",
        "d.yaml": "no setting 'other'; there are method, rules",
    }
    (home / "a.yaml").write_text("paper: deep-compression\nbits: 4.5\n")
    (home / "b.yaml").write_text("stages: [narrow, prune: {rounds: 2.5}]")
    (home / "c.yaml").write_text("paper: [a]")
    (home / "d.yaml").write_text("stages: [pack: {other: 5}]")
    pack = ("--recipe", home / "pack.yaml")
    return [
        (("compress", *pack, "-o", home / "x.terse"), 2, "nothing to compress"),
        (
            ("compress", home / "odd.npz", *pack, "-o", home / "x.terse"),
            2,
            "dates: cannot store datetime64[D]; convert",
        ),
        (("compress", home / "code.pt", *pack, "-o", home / "x.terse"), 2, "code in a checkpoint is never run"),
        (("compress", home / "two.pt", *pack, "-o", home / "x.terse"), 2, "more than one network (net, ema)"),
        (("compress", home / "cut.safetensors", *pack, "-o", home / "x.terse"), 2, "not a whole safetensors file"),
        (("compress", home / "folder", *pack, "-o", home / "x.terse"), 2, "holds none of model.safetensors"),
        (("compress", home / "net.npz", "--ratio", "nan", "-o", home / "x.terse"), 2, "--ratio is a number"),
        (("compress", home / "net.npz", "--size", "0", "-o", home / "x.terse"), 2, "size is above 0"),
        (("compress", home / "net.npz", *pack, "--size", "10", "-o", home / "x.terse"), 1, "of 10 bytes cannot be met"),
        (("compress", home / "text.npz", *pack, "-o", home / "x.terse"), 2, "not an .npz file"),
        (("compress", home / "gone.npz", *pack, "-o", home / "x.terse"), 2, "No such file"),
        (("compress", home / "net.npz", *pack, "-o", home / "no" / "x.terse"), 2, "no such folder"),
        (("compress", home / "net.npz", *pack, "--ratio", 500, "-o", home / "x.terse"), 1, "cannot be met"),
        (("compress", home / "net.npz", "--recipe", "best", "-o", home / "x.terse"), 2, "no 'best'"),
        (("compress", home / "net.npz", *pack, "--size", "tiny", "-o", home / "x.terse"), 2, "is not a size"),
        (("compress", home / "net.npz", *pack, "--keep", "head*", "-o", home / "x.terse"), 2, "the rule 'head*' "),
        (("compress", home / "net.npz", "--rule", "w=kmeens", "-o", home / "x.terse"), 2, "no 'kmeens'; there are"),
        (("compress", home / "net.npz", "--rule", "w=kmeans:bits=4.5", "-o", home / "x.terse"), 2, "bits is 4.5"),
        (("compress", home / "net.npz", "--rule", "w=sparsegpt", "-o", home / "x.terse"), 2, "w: SparseGPT("),
        *[
            (("compress", home / "net.npz", "--recipe", home / name, "-o", home / "x.terse"), 2, message)
            for name, message in recipes.items()
        ],
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
    assert all(option in terse("compress", "--help") for option in ("--drop", "--keep", "--rule"))

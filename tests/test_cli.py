"""The command as a user runs it: exit codes, one-line errors, files."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import fresh_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tersenet
from tersenet import cores, load, native

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
    for name in ("a.npz", "a.safetensors", "a.pt"):
        terse("unpack", home / "a.terse", "-o", home / name)
    state = load_file(home / "a.safetensors")
    with np.load(home / "a.npz") as npz:
        assert all(np.array_equal(npz[n], a) for n, a in state.items())
    assert all(torch.equal(a, state[n]) for n, a in torch.load(home / "a.pt").items())
    assert "deep-compression" in terse("recipes")


def test_a_warning_is_one_line(home):
    norm = TASK.replace("torch.nn.ReLU()", "torch.nn.BatchNorm1d(64), torch.nn.ReLU()")
    other = norm.replace("return tn.Task(", "task = tn.Task(") + "    task.train[0].mul_(3)\n    return task\n"
    (home / "other.py").write_text(other)
    (home / "tune.yaml").write_text("stages: [finetune, narrow]")
    command = [sys.executable, "-m", "tersenet.cli", "compress", "--task", home / "other.py"]
    command += ["--recipe", home / "tune.yaml", "-o", home / "b.terse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "warning" in line]
    assert told.startswith("tersenet: warning: 1: the training data give it variances that are ")


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


NORMS = """
import torch, tersenet as tn
from torch import nn
def task():
    torch.manual_seed(0)
    x = torch.randn(300, 1, 6, 6); y = (x.mean((1, 2, 3)) > 0).long()
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    return tn.Task(net, (x[:200], y[:200]), (x[200:], y[200:]), schedule=tn.Schedule(epochs=2, lr=0.05, batch=32))
"""


def test_all_that_training_changes_is_told_so_that_the_file_is_no_worse_than_it_says(home):
    (home / "norms.py").write_text(NORMS)
    exec(NORMS, space := {})
    torch.save(space["task"]().model.state_dict(), home / "m.pt")
    recipe = ("--recipe", "deep-compression", "-o", home / "m.terse")
    terse("compress", home / "m.pt", "--task", home / "norms.py", *recipe)  # which checks it before there is a file
    found = load(home / "m.terse")
    assert found.unpack()["1.num_batches_tracked"] > 0 and found.tensors["1.num_batches_tracked"].error > 0
    assert "no worse than the file says" in terse("verify", home / "m.terse", "--against", home / "m.pt")


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


def test_help_teaches():
    said = terse("--help")
    assert all(word in said for word in ("compress", "inspect", "verify", "unpack", "recipes"))
    assert all(option in terse("compress", "--help") for option in ("--drop", "--keep", "--rule", "--plan"))


def test_the_doctor_tells_versions_the_core_and_what_is_missing():
    said = terse("doctor")
    for what in (
        f"tersenet: {tersenet.__version__} in",
        f"Python: {platform.python_version()}",
        f"NumPy: {np.__version__}",
        f"torch: {torch.__version__}",
        "[torch]: all there",
    ):
        assert what in said
    core = native.library()
    assert (f"core: {core._name}, ABI {native.ABI}" if core else "twins serve") in said
    assert f"cores: {cores.usable()} of {os.cpu_count()}" in said
    script = "import sys; sys.modules['torch'] = None; from tersenet.cli import main; main(['doctor'])"
    assert "cannot be imported" in fresh_process(script)


def test_the_version_is_that_of_the_package():
    assert tersenet.__version__ == metadata.version("tersenet")
    assert "importlib.metadata" not in fresh_process("import sys, tersenet; print(*sys.modules)").split()


def test_shells_can_complete(home):
    asked = {"_TERSE_COMPLETE": "complete_bash", "COMP_WORDS": "terse ins", "COMP_CWORD": "1"}
    assert fresh_process("from tersenet.cli import main; main()", **asked).split() == ["inspect"]


def test_a_plan_names_rule_and_stage_and_leaves_no_file(home):
    task = ("--task", home / "task.py", "--recipe", "deep-compression", "-o", home / "x.terse")
    said = terse("compress", *task, "--keep", "2.*", "--plan")
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "linear" in lines["0.weight"] and "1,280" in lines["0.weight"]
    assert "thinned by Prune; packed by Pack with KMeans(bits=5" in lines["0.weight"]
    assert "kept (by the rule '2.*')" in lines["2.weight"] and "rough estimate" in said
    assert not (home / "x.terse").exists() and not (home / "cache").exists()


def test_what_is_written_is_not_what_is_read(home):
    shutil.copy(home / "net.npz", home / "same.npz")
    (home / "link.npz").symlink_to(home / "same.npz")
    before = (home / "same.npz").read_bytes()
    pack = ("--recipe", home / "pack.yaml")
    for output in ("same.npz", "link.npz"):
        assert "is what is read" in terse("compress", home / "same.npz", *pack, "-o", home / output, code=2)
    assert (home / "same.npz").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_control_c_stops_with_one_line_and_leaves_what_was_there(home):
    (home / "slow.py").write_text(TASK.replace(".trained()", "").replace("def task():", "def task():\n    told()"))
    with (home / "slow.py").open("a") as file:
        file.write("\nimport pathlib, time\ndef told():\n    pathlib.Path('begun').touch(); time.sleep(60)\n")
    (home / "x.terse").write_bytes(b"old")
    before = {path.name for path in home.iterdir()} | {"begun", "__pycache__"}
    heard = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a run in the background ignores it
    )
    command = [sys.executable, "-c", f"{heard}; from tersenet.cli import main; main()"]
    command += ["compress", "--task", "slow.py", "-o", "x.terse"]
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True)
    while not (home / "begun").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "terse: stopped; no file was left half written\n"
    assert process.returncode == 130 and (home / "x.terse").read_bytes() == b"old"
    assert {path.name for path in home.iterdir()} <= before

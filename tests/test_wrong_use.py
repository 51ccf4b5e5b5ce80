"""Every wrong use of the command is one line that says what and where, with its exit code, and leaves no file."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import floats
from safetensors.torch import save_file

from tersenet import cli
from tersenet.artifact import Artifact, Tensor

GOOD = """
import torch, tersenet as tn
x = torch.randn(60, 8); y = (x.sum(1) > 0).long(); data = (x, y)
net = torch.nn.Linear(8, 2)
def task():
    return tn.Task(net, data, data)
"""
TASKS = {  # what a task file holds, and what is said of it
    "nothing": ("x = 1", "nothing.py: has no function task()"),
    "no_call": ("task = 3", "no_call.py: has no function task()"),
    "raises": ("def task():\n    raise RuntimeError('no data')", "raises.py, line 2: RuntimeError: no data"),
    "at_once": ("import math\nmath.sqrt(-1)", "at_once.py, line 2: ValueError: math domain error"),
    "key": ("def task():\n    return {}['w']", "key.py, line 2: KeyError: 'w'"),
    "leaves": ("import sys\nsys.exit(0)", "leaves.py, line 2: SystemExit: 0"),
    "unknown": ("import no_such_package", "unknown.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
    "other": ("def task():\n    return 3", "other.py: task() returned int, not a tersenet.Task"),
    "none": ("def task():\n    pass", "none.py: task() returned NoneType"),
    "asked": ("def task(name):\n    pass", "asked.py: task() is called without arguments: missing a required"),
    "broken": ("def task(:\n    pass", "broken.py, line 1: invalid syntax"),
    "latin": (b"x = 'caf\xe9'", "latin.py, line 1: (unicode error)"),
    "deep": ("def task():\n    return task()", "deep.py, line 2: RecursionError"),
    "model": (GOOD.replace("net,", "'net',"), "AttributeError: 'str' object has no attribute 'modules'"),
    "metric": (GOOD.replace("data)\n", "data, metric=lambda a, b: a.nope)\n"), "metric.py, line 6: AttributeError: "),
    "shapes": (GOOD.replace("8, 2", "9, 2"), "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
}  # fmt: skip
RECIPES = {
    "bits": ("paper: deep-compression\nbits: 4.5\n", "bits is 4.5: input should be a valid integer"),
    "rounds": ("stages: [narrow, prune: {rounds: 2.5}]", "stage 2 (prune): rounds is 2.5"),
    "list": ("paper: [a]", "paper: write one name"),
    "setting": ("stages: [pack: {other: 5}]", "no setting 'other'; there are method, rules"),
    "text": ("stages", "a recipe has either 'paper' or 'stages'"),
    "tab": ("stages:\n\t- pack", "tab.yaml: not YAML"),
    "bytes": (b"\xff\xfe\xff", "bytes.yaml: not YAML"),
    "nest": ("[" * 5000, "nest.yaml: not YAML"),
    "call": ("!!python/object/apply:os.mkdir ['here']", "call.yaml: not YAML"),
    "data": ("stages: [obs]", "OBS needs"),
}


class Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    np.savez("net.npz", w=floats(60, 60), b=np.zeros(60, np.float32))
    (tmp_path / "pack.yaml").write_text("stages: [pack, narrow]")
    Artifact({"w": Tensor(floats(30, 30))}).save("n.terse")
    return tmp_path


@pytest.fixture
def said(home, capsys):
    """Run the command with words; its exit code and the one line that it says, having left no file."""

    def run(words):
        before = {path.name for path in home.iterdir()}
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("terse: ") and "Traceback" not in lines[0], lines
        assert {path.name for path in home.iterdir()} <= before | {"__pycache__", "cache"}
        return end.value.code, lines[0]

    return run


def files(home):
    """Inputs that are wrong in themselves."""
    np.savez("odd.npz", w=np.ones(3), dates=np.array(["2024-01-01"], "datetime64[D]"))
    np.savez("text.npz", w=np.array(["a", "b"]))
    torch.save({"w": torch.ones(2), "x": Code()}, "code.pt")
    torch.save({"net": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, "two.pt")
    torch.save({"\ud800": torch.ones(2)}, "name.pt")
    save_file({"v": torch.ones(60, 60)}, "other.safetensors")
    whole = (home / "other.safetensors").read_bytes()
    (home / "tail.safetensors").write_bytes(whole + b"tail")
    (home / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    (home / "folder").mkdir()
    (home / "loop").symlink_to("loop")
    (home / "none.npz").write_text("hello")
    (home / "empty.npz").write_text("")
    (home / "bad.terse").write_bytes(b"TERSE\1 not a file at all........")
    (home / "new.terse").write_bytes(b"TERSE\x77" + bytes(100))
    (home / "x.index.json").write_text(json.dumps({"weight_map": {"w": "../net.npz"}}))
    Artifact({"../w": Tensor(floats(3)), "__metadata__": Tensor(floats(3))}).save(home / "names.terse")
    for name, (content, _) in TASKS.items():
        (home / f"{name}.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, (content, _) in RECIPES.items():
        (home / f"{name}.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())


OUT = ("-o", "x.terse")
PACK = ("--recipe", "pack.yaml", *OUT)
WRONG = [  # words, what is said
    ("compress", *PACK, "nothing to compress"),
    ("compress", "odd.npz", *PACK, "odd.npz: dates: cannot store datetime64[D]; convert"),
    ("compress", "text.npz", *PACK, "text.npz: w: cannot store str"),
    ("compress", "code.pt", *PACK, "code in a checkpoint is never run"),
    ("compress", "two.pt", *PACK, "more than one network (net, ema)"),
    ("compress", "name.pt", *PACK, "name.pt: the name '\\ud800' is no text"),
    ("compress", "cut.safetensors", *PACK, "cut.safetensors: not a whole safetensors file"),
    ("compress", "tail.safetensors", *PACK, "tail.safetensors: not a whole safetensors file"),
    ("compress", "x.index.json", *PACK, "'../net.npz' is not the name of a shard"),
    ("compress", "folder", *PACK, "folder: holds none of model.safetensors"),
    ("compress", "none.npz", *PACK, "none.npz: not an .npz file"),
    ("compress", "empty.npz", *PACK, "empty.npz: the file is empty"),
    ("compress", "gone.npz", *PACK, "gone.npz: No such file"),
    ("compress", "n.terse", *PACK, "n.terse: give a file that ends in"),
    ("compress", "net.npz", "--recipe", "pack.yaml", "-o", "no/x.terse", "no: no such folder"),
    ("compress", "net.npz", "--recipe", "pack.yaml", "-o", "folder", "folder: is there and is no file"),
    ("compress", "net.npz", "--recipe", "pack.yaml", "-o", "/dev/null", "/dev/null: is there and is no file"),
    ("compress", "net.npz", "--recipe", "pack.yaml", "-o", "net.npz", "net.npz: is what is read"),
    ("compress", "net.npz", "--recipe", "pack.yaml", "-o", "w" * 300, "File name too long"),
    ("compress", "net.npz", "--recipe", "best", *OUT, "no 'best'"),
    ("compress", "net.npz", "--recipe", "gone.yaml", *OUT, "gone.yaml: No such file"),
    ("compress", "net.npz", "--ratio", "nan", *OUT, "--ratio is a number"),
    ("compress", "net.npz", "--ratio", "-3", *OUT, "ratio is above 0"),
    ("compress", "net.npz", "--ratio", "many", *OUT, "'many' is not a valid float"),
    ("compress", "net.npz", "--size", "0", *OUT, "size is above 0"),
    ("compress", "net.npz", "--size", "tiny", *OUT, "'tiny' is not a size"),
    ("compress", "net.npz", "--size", "9" * 400, *OUT, "is not a size"),
    ("compress", "net.npz", "--size", "1kB", "--ratio", "2", *OUT, "one of size, ratio and drop"),
    ("compress", "net.npz", "--drop", "1", *OUT, "a drop is measured on data"),
    ("compress", "net.npz", "--seed", "-1", *PACK, "'--seed': -1 is not in the range"),
    ("compress", "net.npz", *PACK, "--keep", "head*", "the rule 'head*' "),
    ("compress", "net.npz", *PACK, "--keep", "", "the rule '': write one pattern"),
    ("compress", "net.npz", *PACK, "--keep", "w b", "the rule 'w b': write one pattern"),
    ("compress", "net.npz", "--recipe", "", *OUT, "no ''; there are"),
    ("compress", "net.npz", "--recipe", "lr-rewinding", *OUT, "Prune retrains the network: give a Task"),
    ("compress", "net.npz", "--recipe", "pack.yaml", "-o", "loop", "loop: is a link that leads to itself"),
    ("compare", "n.terse", "-o", "x.html", "give two files or more"),
    ("compare", "n.terse", "n.terse", "-o", "x.html", "give two files or more"),
    ("compress", "net.npz", "--rule", "w=kmeens", *OUT, "no 'kmeens'; there are"),
    ("compress", "net.npz", "--rule", "w=kmeans:bits=4.5", *OUT, "bits is 4.5"),
    ("compress", "net.npz", "--rule", "w=sparsegpt", *OUT, "w: SparseGPT("),
    ("compress", "net.npz", "--rule", "w", *OUT, "write a pattern of names and a method"),
    ("compress", "--task", "gone.py", *OUT, "gone.py: No such file"),
    ("compress", "--task", "pack.yaml", *OUT, "pack.yaml: not a Python file"),
    ("compress", "--task", "folder", *OUT, "folder: not a Python file"),
    ("compress", "net.npz", "--siz", "3", *OUT, "No such option"),
    ("compress", "net.npz", "more.npz", *OUT, "unexpected extra argument"),
    ("squeeze", "No such command 'squeeze'"),
    ("inspect", "Missing argument"),
    ("inspect", "bad.terse", "bad.terse: "),
    ("inspect", "new.terse", "new.terse: the file has format version 119"),
    ("inspect", "gone.terse", "gone.terse: No such file"),
    ("inspect", "folder", "folder: Is a directory"),
    ("inspect", "net.npz", "net.npz: not a tersenet file"),
    ("inspect", "n.terse", "--task", "raises.py", "raises.py, line 2: RuntimeError"),
    ("verify", "bad.terse", "bad.terse: "),
    ("verify", "bad.terse", "--against", "net.npz", "bad.terse: "),
    ("verify", "n.terse", "--against", "other.safetensors", ": in one of the two only"),
    ("verify", "n.terse", "--against", "net.npz", ": in one of the two only"),
    ("unpack", "n.terse", "Missing option"),
    ("unpack", "bad.terse", "-o", "x.npz", "bad.terse: "),
    ("unpack", "n.terse", "-o", "x.h5", "x.h5: give a name that ends in .safetensors, .pt or .npz"),
    ("unpack", "n.terse", "-o", "n.terse", "n.terse: is what is read"),
    ("unpack", "names.terse", "-o", "x.npz", "x.npz: '../w': an .npz would hold this name as a path"),
    ("unpack", "names.terse", "-o", "x.safetensors", "x.safetensors: '__metadata__'"),
]


def test_wrong_inputs_get_one_line_exit_code_two_and_no_file(home, said):
    files(home)
    for *words, message in WRONG:
        code, line = said(words)
        assert code == 2 and message in line, line


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_task_file_is_named_with_its_line(home, said, name):
    files(home)
    code, line = said(["compress", "--task", f"{name}.py", *OUT])
    assert code == 2 and TASKS[name][1] in line, line


def test_a_wrong_recipe_file_is_named_with_its_setting(home, said):
    files(home)
    for name, (_, message) in RECIPES.items():
        code, line = said(["compress", "net.npz", "--recipe", f"{name}.yaml", *OUT])
        assert code == 2 and message in line, line
    assert not (home / "here").exists()


def test_exit_code_one_is_a_broken_promise(home, said):
    for words in (("--size", "10"), ("--recipe", "pack.yaml", "--ratio", "500")):
        code, line = said(["compress", "net.npz", *words, *OUT])
        assert code == 1 and "cannot be met" in line and "-" not in line.split("bytes")[0].split("of")[-1], line
    np.savez("changed.npz", w=floats(30, 30) + 1)
    code, line = said(["verify", "n.terse", "--against", "changed.npz"])
    assert code == 1 and "w: the error is" in line


def test_without_torch_one_line_says_what_to_install(home):
    script = "import sys; sys.modules['torch'] = None; from tersenet.cli import main; main()"
    (home / "t.py").write_text("import torch\ndef task():\n    pass")
    for words in (["compress", "--task", "t.py", *OUT], ["unpack", "n.terse", "-o", "x.pt"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr == "terse: this needs torch: pip install 'tersenet[torch]'\n"
    done = subprocess.run([sys.executable, "-c", script, "unpack", "n.terse", "-o", "x.npz"], check=False)
    assert done.returncode == 0 and np.array_equal(np.load("x.npz")["w"], floats(30, 30))


def test_names_in_a_file_cannot_write_lines_or_move_the_cursor(home, capsys):
    names = ["a\nterse: fine", "b\x1b[2J", "c\u202e", "d\0"]
    Artifact({name: Tensor(floats(3)) for name in names}, meta={"loss": [float("nan")]}).save("odd.terse")
    cli.main(["inspect", "odd.terse"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in (r"a\nterse: fine", r"b\x1b[2J", r"c\u202e", r"d\x00"))
    assert all(char.isprintable() or char == "\n" for char in shown)
    cli.main(["inspect", "odd.terse", "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["name"] for row in told["tensors"]][:4] == names and told["meta"] == {"loss": [None]}

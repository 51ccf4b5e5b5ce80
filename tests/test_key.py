"""Keys: whatever a result depends on changes them, nothing else does, and what cannot be seen is named."""

import functools
import random
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_process
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tersenet as tn
from tersenet.key import FILES, Uncacheable, key_of


def made(text, name="made", **names):
    """What a source defines under a name, as a user's own module would."""
    space = {"torch": torch, "nn": nn, "F": F, "np": np, "dataclass": dataclass, "__name__": "mine", **names}
    exec(compile(text, "mine.py", "exec"), space)
    return space[name]


def data(seed=0, change=0.0):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    x[17, 1] += change
    return x, torch.arange(40) % 2


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2))


def smoothed(by):
    return lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=by)


FORWARD = """
class made(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 2))
    def forward(self, x):
        return {} @ self.scale
"""
HELPED = (
    "def helper(x):\n    return {}\ndef made(outputs, targets):\n    return helper(F.cross_entropy(outputs, targets))"
)
METRIC = "def made(outputs, targets):\n    return {}"
AUGMENT = "def made(inputs, generator):\n    return inputs + {} * torch.randn(inputs.shape, generator=generator)"
NESTED = "def made(model, inputs):\n    return (lambda: model(inputs * {}))()"
CLASS = (
    "class Loss:\n    power = {}\n    def __call__(self, o, t):\n        return o.pow(self.power).mean()\nmade = Loss()"
)


def task(**parts):
    return tn.Task(**{"model": net(nn.ReLU()), "train": data(), "test": data(1)} | parts)


def hooked(by):
    model = net(nn.ReLU())
    model[0].register_forward_hook(lambda layer, inputs, outputs: outputs * by)
    return model


def with_weight(change):
    model = net(nn.ReLU())
    with torch.no_grad():
        model[2].weight[1, 3] += change
    return model


def loader(change=0.0, **more):
    return DataLoader(TensorDataset(*data(0, change)), 8, **more)


def listed(change):
    return [[x, y] for x, y in zip(*(part.split(8) for part in data(0, change)), strict=True)]


class Drawn(Dataset):
    """Samples made as they are asked for."""

    def __init__(self, size=10, generator=None, source=None):
        self.size, self.generator, self.source = size, generator, source

    def __len__(self):
        return self.size

    def __getitem__(self, at):
        return torch.full((3,), float(at)), at % 2


CHANGES = {
    "one input": (lambda: task(train=data(0, 0.0)), lambda: task(train=data(0, 1e-6))),
    "one target": (task, lambda: task(train=(data()[0], data()[1] ^ torch.eye(1, 40).long()[0]))),
    "type of inputs": (task, lambda: task(train=(data()[0].double(), data()[1]))),
    "test data": (task, lambda: task(test=data(1, 1e-6))),
    "validation data": (lambda: task(valid=data(2)), lambda: task(valid=data(2, 1e-6))),
    "a loader's data": (lambda: task(train=loader()), lambda: task(train=loader(1e-6))),
    "a loader's batches": (lambda: task(train=loader()), lambda: task(train=DataLoader(TensorDataset(*data()), 9))),
    "a loader's order": (lambda: task(train=loader()), lambda: task(train=loader(shuffle=True))),
    "a loader's end": (lambda: task(train=loader()), lambda: task(train=loader(drop_last=True))),
    "a loader's collation": (
        lambda: task(train=loader(collate_fn=made("made = lambda rows: rows"))),
        lambda: task(train=loader(collate_fn=made("made = lambda rows: rows[::-1]"))),
    ),
    "a loader's generator": tuple(
        lambda seed=seed: task(train=loader(shuffle=True, generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 1)
    ),
    "a list of batches": (lambda: task(train=listed(0.0)), lambda: task(train=listed(1e-6))),
    "a dataset's state": (lambda: task(train=Drawn(10)), lambda: task(train=Drawn(11))),
    "a dataset's numbers": tuple(lambda s=s: task(train=Drawn(9, np.random.default_rng(s))) for s in (0, 1)),
    "loss by closure": (lambda: task(loss=smoothed(0.1)), lambda: task(loss=smoothed(0.2))),
    "loss by helper": tuple(lambda t=t: task(loss=made(HELPED.format(t))) for t in ("x", "x * 2")),
    "loss by class": tuple(lambda t=t: task(loss=made(CLASS.format(t))) for t in ("1", "2")),
    "loss by partial": tuple(
        lambda by=by: task(loss=functools.partial(F.cross_entropy, label_smoothing=by)) for by in (0.1, 0.2)
    ),
    "loss by module": tuple(lambda r=r: task(loss=nn.CrossEntropyLoss(reduction=r)) for r in ("mean", "sum")),
    "loss of torch": (lambda: task(loss=F.cross_entropy), lambda: task(loss=F.nll_loss)),
    "loss wrapped": tuple(lambda by=by: task(loss=functools.wraps(F.cross_entropy)(smoothed(by))) for by in (0.1, 0.2)),
    "loss under no_grad": tuple(lambda by=by: task(loss=torch.no_grad()(smoothed(by))) for by in (0.1, 0.2)),
    "loss by a global": tuple(
        lambda k=k: task(loss=made("def made(o, t):\n    return K * F.cross_entropy(o, t)", K=k)) for k in (1, 2)
    ),
    "metric": tuple(lambda t=t: task(metric=made(METRIC.format(t))) for t in ("outputs.mean()", "outputs.sum()")),
    "a metric's direction": tuple(lambda b=b: task(metric=tn.Metric(max, better=b)) for b in ("less", "more")),
    "augment": tuple(lambda t=t: task(augment=made(AUGMENT.format(t))) for t in ("0.1", "0.2")),
    "forward": tuple(lambda t=t: task(forward=made(NESTED.format(t))) for t in ("1.0", "2.0")),
    "forward in the class": tuple(lambda t=t: task(model=made(FORWARD.format(t))()) for t in ("x", "x.relu()")),
    "a layer's kind": (task, lambda: task(model=net(nn.Tanh()))),
    "a layer's place": (lambda: task(model=net(nn.ReLU(), nn.Tanh())), lambda: task(model=net(nn.Tanh(), nn.ReLU()))),
    "a plain attribute": (lambda: task(model=net(nn.LayerNorm(4))), lambda: task(model=net(nn.LayerNorm(4, eps=0.1)))),
    "one weight": (lambda: task(model=with_weight(0.0)), lambda: task(model=with_weight(1e-6))),
    "a hook": (lambda: task(model=hooked(1.0)), lambda: task(model=hooked(2.0))),
    "what is frozen": (task, lambda: task(model=net(nn.ReLU()).requires_grad_(False))),
    "mode": (task, lambda: task(model=net(nn.ReLU()).eval())),
    "snapshots": tuple(lambda k=k: task(snapshots={1: with_weight(k).state_dict()}) for k in (0.0, 1e-6)),
    "teacher": tuple(lambda k=k: task(teacher=with_weight(k)) for k in (0.0, 1e-6)),
    "schedule": (task, lambda: task(schedule=tn.Schedule(lr=0.01))),
    "device": (task, lambda: task(device="meta")),
    "likelihood": (lambda: task(likelihood="classes"), lambda: task(likelihood="gaussian")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_a_result_depends_on_changes_the_key_and_making_it_again_does_not(name):
    one, other = CHANGES[name]
    assert key_of(one()) == key_of(one())
    assert key_of(other()) == key_of(other())
    assert key_of(one()) != key_of(other())


STAGE = """
@dataclass(frozen=True)
class made:
    strength: float = 0.5
    def __call__(self, draft, task):
        {}
"""


def test_a_users_own_stage_counts_by_its_fields_and_its_code_but_not_by_comments():
    one, same, other = (made(STAGE.format(t)) for t in ("return draft", "return draft  # as it is", "return None"))
    assert key_of(one()) == key_of(same()) != key_of(other())
    assert key_of(one()) != key_of(one(0.4))
    below = made("class made(above):\n    pass", above=one)
    assert key_of(below()) != key_of(made("class made(above):\n    pass", above=other)())


def test_an_attribute_of_a_users_module_counts_and_the_rest_of_the_module_does_not(tmp_path, monkeypatch):
    keys = []
    texts = {"a": "def f(x): return x", "b": "def f(x): return x\nother = 3", "c": "def f(x): return -x"}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / name)
        monkeypatch.delitem(sys.modules, "theirs", raising=False)
        taken = made("import theirs\ndef made(x):\n    return theirs.f(x)")
        late = made("def made(x):\n    from theirs import f\n    return f(x)")
        keys.append((key_of(taken), key_of(late)))
    assert keys[0][0] == keys[1][0] != keys[2][0]
    assert len({late for _, late in keys}) == 3  # what is imported later counts as a whole


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_key
names = [name for name in test_key.CHANGES if name != "device"]
names = names[:: 1 if sys.argv[2] == "on" else -1]
keys = {name: test_key.key_of(test_key.CHANGES[name][0]()) for name in names}
kept = {"a", "b", "c", nn.Linear, nn.ReLU, 3} if (nn := test_key.nn) else None
keys["code"] = test_key.key_of(lambda x: x in {"one", "two", "three", kept})
print([keys[name] for name in sorted(keys)])
"""


def test_a_fresh_process_makes_the_same_keys_wherever_the_script_lies(tmp_path):
    (tmp_path / "test_key.py").write_text(Path(__file__).read_text())
    here = fresh_process(SCRIPT, Path(__file__).parent, "on", PYTHONHASHSEED="1")
    assert here.count(",") > 30
    assert fresh_process(SCRIPT, tmp_path, "back", PYTHONHASHSEED="2") == here


class Ring:
    def __init__(self, value):
        self.value, self.next, self.all = value, self, {self}


class Slotted:
    __slots__ = ("left", "value")

    def __init__(self, value):
        self.value = value


class Own(random.Random):
    pass


@pytest.mark.parametrize(
    "make", [lambda: functools.partial(F.cross_entropy, label_smoothing=0.1), lambda: random.Random(3)]
)
def test_looking_at_an_object_does_not_change_its_key(make):
    """A partial function has no dict until it is asked for it: its second key was another, so nothing was taken up."""
    thing = make()
    assert len({key_of(thing), key_of(thing), key_of(make())}) == 1


def test_cycles_slots_and_state_held_in_c_are_seen():
    assert key_of(Ring(1)) == key_of(Ring(1)) != key_of(Ring(2))
    assert key_of(Slotted(1)) == key_of(Slotted(1)) != key_of(Slotted(2))
    assert key_of(Own(1)) == key_of(Own(1)) != key_of(Own(2))
    base = torch.zeros(4)
    assert key_of([base, base]) != key_of([base, torch.zeros(4)])
    assert key_of([base[:2], base[2:]]) != key_of([torch.zeros(2), torch.zeros(2)])  # they share their numbers
    kinds = [torch.eye(3), torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), np.eye(3), np.eye(3).tolist()]
    kinds += [(1, 2), [1, 2], {1: 2}, {1, 2}, "12", b"12", 12, 12.0, True, np.float32(1), np.array([1, None])]
    assert len({key_of(kind) for kind in kinds}) == len(kinds)
    assert key_of({"b", "a"}) == key_of({"a", "b"}) and key_of({1: 0, 2: 0}) != key_of({2: 0, 1: 0})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=str)
def test_recurrent_and_parametrized_modules_have_keys(kind):
    def layer(seed):
        torch.manual_seed(seed)
        return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), kind(3, 4)

    assert key_of(layer(0)) == key_of(layer(0)) != key_of(layer(1))


def test_what_cannot_be_seen_is_named_by_where_it_is(tmp_path):
    with open(__file__, "rb") as file:
        found = DataLoader(Drawn(generator=file))
        with pytest.raises(
            Uncacheable, match=r"^task.train.dataset.generator: _io.BufferedReader cannot be looked into$"
        ):
            key_of(task(train=found))
    lock = threading.Lock()
    for thing, message in (
        (task(loss=lambda o, t: lock and o), r"^task.loss -> lock: _thread.lock cannot be looked into$"),
        (task(metric=made("def made(o, t):\n    return next(rows)", rows=(k for k in "a"))), r"-> rows: generator"),
        (task(train=[lock, 3, 3]), r"^task.train\[0\]: _thread.lock"),
    ):
        with pytest.raises(Uncacheable, match=message):
            key_of(thing)


def test_files_that_a_dataset_names_count_with_their_sizes_and_times(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one").write_text("1")
    sources = str(tmp_path), tmp_path, [("x", str(tmp_path / "images" / "one"))]
    before = [key_of(task(train=Drawn(source=source))) for source in sources]
    assert before == [key_of(task(train=Drawn(source=source))) for source in sources]
    (tmp_path / "images" / "one").write_text("12")
    after = [key_of(task(train=Drawn(source=source))) for source in sources]
    assert all(one != other for one, other in zip(before, after, strict=True))
    plain = key_of(task(loss=functools.partial(F.cross_entropy, str(tmp_path))))
    (tmp_path / "two").write_text("")
    assert key_of(task(train=Drawn(source=str(tmp_path)))) != after[0]
    assert key_of(task(loss=functools.partial(F.cross_entropy, str(tmp_path)))) == plain
    monkeypatch.setattr("tersenet.key.FILES", 1)
    with pytest.raises(Uncacheable, match=r"task.train.source: more than 1 files lie under"):
        key_of(task(train=Drawn(source=str(tmp_path))))
    assert FILES == 200_000


def test_our_own_sources_and_versions_are_in_every_key(monkeypatch):
    before = key_of(1)
    for name, value in (("sources", b"others"), ("versions", {"torch": "1.0"})):
        with monkeypatch.context() as changed:
            changed.setattr(f"tersenet.key.{name}", lambda value=value: value)
            assert key_of(1) != before
    assert key_of(1) == before
    assert key_of(replace(task(), schedule=tn.Schedule())) == key_of(task())

"""Journals, and runs that were stopped: rows that survive, and the very same bytes in the end."""

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_process
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import tersenet as tn
from tersenet import checkpoint
from tersenet.artifact import Artifact
from tersenet.draft import Draft, artifact_of
from tersenet.journal import Journal, cache_folder, read
from tersenet.methods.kmeans import KMeans
from tersenet.methods.uniform import Uniform
from tersenet.run import run
from tersenet.stages.activations import Activations
from tersenet.stages.dkm import DKM
from tersenet.stages.finetune import Finetune, TrainLevels
from tersenet.stages.low_precision import LowPrecision
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain

STOP = "TERSENET_TEST_STOP"  # after so many more losses; it stands where keys do not look


class Stopped(Exception):
    pass


def stopping(outputs, targets):
    """The cross-entropy, until the batch that the environment names."""
    left = int(os.environ.get(STOP, "1000000")) - 1
    os.environ[STOP] = str(left)
    if left < 0:
        raise Stopped
    return F.cross_entropy(outputs, targets)


def moved(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator) + 0.01 * float(np.random.rand())


class Net(nn.Module):
    """With everything that changes while it trains: a norm, dropout, and draws of NumPy's."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.drop(F.relu(self.norm(self.first(x))))
        if self.training:
            x = x + 0.01 * float(np.random.rand())
        return self.last(x)


def make_task(**parts):
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    schedule = tn.Schedule(4, 0.05, 16, adam=parts.pop("adam", False))
    return tn.Task(Net(), **{"train": (x, y), "loss": stopping, "schedule": schedule, "augment": moved} | parts)


def made(task, recipe, folder, rows=None):
    log = [].append if rows is None else rows.append
    return artifact_of(run(Draft.of_model(copy.deepcopy(task.model)), task, recipe, folder, log)).to_bytes()


# ---------------------------------------------------------------- the journal itself


def test_rows_are_there_again_whatever_was_torn(tmp_path):
    journal = Journal()
    journal.open(tmp_path / "run")
    journal.write(stage="one", metric=np.float32(0.5), bytes=np.int64(7))
    journal.write(candidate=2, loss=float("inf"))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"stage": "tw')  # killed while it wrote
    again = Journal()
    again.open(tmp_path / "run")
    assert [row.get("stage") for row in again.earlier] == ["one", None] and again.rows == []
    again.write(stage="two")
    assert [row.get("stage") for row in read(again.path)] == ["one", None, "two"]
    assert again.find(stage="one")[0]["metric"] == 0.5 and again.find(candidate=2)[0]["loss"] == float("inf")
    assert [row["stage"] for row in again.find(stage="two")] == ["two"] and again.find(stage="three") == []
    assert abs(json.loads(whole.splitlines()[0])["time"] - time.time()) < 60
    memory = Journal()
    memory.write(stage="one")
    memory.keep("x", b"data")
    assert memory.find(stage="one") and memory.path is None and memory.kept("x") is None


def test_what_is_kept_is_whole_or_not_there(tmp_path):
    journal = Journal(folder=tmp_path)
    journal.keep("moments", b"numbers" * 100)
    assert journal.kept("moments") == b"numbers" * 100 and journal.kept("others") is None
    file = tmp_path / "moments.kept"
    for damaged in (file.read_bytes()[:-1], b"", b"x" + file.read_bytes()[1:]):
        file.write_bytes(damaged)
        assert journal.kept("moments") is None
    journal.write(stage="one")
    journal.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_two_processes_may_write_into_one_journal(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tersenet.journal import Journal\n"
        "journal = Journal(); journal.open(Path(sys.argv[1]))\n"
        "for k in range(300): journal.write(who=sys.argv[2], k=k, text='x' * 500)"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), who]) for who in "ab"]
    assert [one.wait() for one in running] == [0, 0]
    rows = read(tmp_path / "run.jsonl")
    assert all([row["k"] for row in rows if row["who"] == who] == list(range(300)) for who in "ab")


def test_a_journal_tells_the_recipe_the_stages_the_epochs_and_the_end(tmp_path):
    recipe = (Prune(0.3, 2, 1), Narrow())
    result = tn.compress(make_task(test=make_task().train), recipe, folder=tmp_path)
    rows = read(result.journal)
    assert result.journal == next(tmp_path.glob("*/run.jsonl"))
    assert rows[0]["run"] == [str(stage) for stage in recipe] and rows[0]["torch"] == torch.__version__
    assert [row["epoch"] for row in rows if "epoch" in row] == [3, 3]
    assert all(0 < row["loss"] < 3 and row["rate"] > 0 for row in rows if "epoch" in row)
    stages = [row for row in rows if "stage" in row]
    assert [row["density"] for row in stages] == pytest.approx([0.3**0.5, 0.3, 0.3], abs=0.01)
    assert all(row["bytes"] > 100 and row["memory"] > 10 and row["seconds"] >= 0 for row in stages)
    assert rows[-2]["end"] and rows[-1]["result"] == result.artifact.nbytes and rows[-1]["metric"] == result.after
    assert (result.journal.parent / "result.terse").read_bytes() == result.artifact.to_bytes()
    assert [row["stage"] for row in result.rows] == [row["stage"] for row in stages]
    again = tn.compress(make_task(test=make_task().train), recipe, folder=tmp_path)
    assert again.artifact.to_bytes() == result.artifact.to_bytes() and again.journal == result.journal
    assert [row.get("kept") for row in again.rows] == [True] * 3


# ---------------------------------------------------------------- trainings that go on

TRAININGS = {
    "sgd": (make_task, (Finetune(3, 0.05),)),
    "adam": (lambda: make_task(adam=True), (Retrain("learning-rate", 3),)),
    "rounds": (make_task, (Prune(0.4, 2, 2), Pack(KMeans(2)), Finetune(1, 0.01), Narrow())),
    "levels": (make_task, (Pack(Uniform(4)), TrainLevels(2, 0.01))),
    "low precision": (make_task, (LowPrecision(8, 3),)),
    "soft shares": (make_task, (DKM(KMeans(2), epochs=3), Narrow())),
    "activations": (make_task, (Activations(4, 64), Finetune(3, 0.05))),
    "dataset": (lambda: make_task(train=TensorDataset(*make_task().train)), (Finetune(3, 0.05),)),
    "batches": (lambda: make_task(train=[list(make_task().train)] * 12), (Finetune(3, 0.05),)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_is_stopped_anywhere_goes_on_to_the_very_same_bytes(name, tmp_path, monkeypatch):
    make, recipe = TRAININGS[name]
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setenv(STOP, "1000000")
    whole = made(make(), recipe, tmp_path / "whole")
    count = 1_000_000 - int(os.environ[STOP])
    assert count > 10
    resumed, tries = [], 0
    for left in (5, 1, count // 2, 2, 9):  # batches, from where the last try was stopped
        monkeypatch.setenv(STOP, str(left))
        try:
            assert made(make(), recipe, tmp_path / "cut") == whole
            break
        except Stopped:
            tries += 1
    monkeypatch.setenv(STOP, "1000000")
    rows = []
    assert made(make(), recipe, tmp_path / "cut", rows) == whole
    assert 1_000_000 - int(os.environ[STOP]) < count - 5  # it did not begin anew
    journal = read(next((tmp_path / "cut").glob("*/run.jsonl")))
    resumed = [row for row in journal if "resumed" in row]
    assert tries >= 2 and len(resumed) >= 2
    assert not list(tmp_path.glob("cut/*/*.kept"))
    paths = (next((tmp_path / folder).glob("*/run.jsonl")) for folder in ("whole", "cut"))
    told = [{(r["training"], r["epoch"]): r["loss"] for r in read(path) if "loss" in r} for path in paths]
    assert told[0] == told[1] and len(told[0]) > 1


def test_a_damaged_checkpoint_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    whole = made(make_task(), (Finetune(2, 0.05),), None)
    monkeypatch.setenv(STOP, "15")
    with pytest.raises(Stopped):
        made(make_task(), (Finetune(2, 0.05),), tmp_path)
    file = next(tmp_path.glob("*/training-*.kept"))
    file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setenv(STOP, "1000000")
    assert made(make_task(), (Finetune(2, 0.05),), tmp_path) == whole
    assert not Journal(folder=file.parent).find(resumed="training")


class Counting(Net):
    """A network that behaves otherwise from its tenth batch on, and tells no buffer."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + (self.calls > 10))


def test_a_network_whose_attributes_change_while_it_trains_keeps_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    task = make_task()
    task = replace(task, model=Counting())
    whole = made(task, (Finetune(2, 0.05),), None)
    monkeypatch.setenv(STOP, "15")
    with pytest.raises(Stopped):
        made(task, (Finetune(2, 0.05),), tmp_path)
    assert not list(tmp_path.glob("*/*.kept"))
    monkeypatch.setenv(STOP, "1000000")
    assert made(task, (Finetune(2, 0.05),), tmp_path) == whole


# ---------------------------------------------------------------- what is served, and what is not


@dataclass(frozen=True)
class Scaled:
    """A user's own stage."""

    by: float = 2.0

    def __call__(self, draft, task):
        return draft.with_trees({"last.bias": np.asarray(draft.tensors["last.bias"].tree) * self.by})


def smoothed(by):
    return lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=by)


def turned(task):
    x, y = task.train
    changed = x.clone()
    changed[5, 2] += 1
    return replace(task, train=(changed, y))


OTHERS = {
    "loss": lambda task: replace(task, loss=smoothed(0.3)),
    "one input": turned,
    "augment": lambda task: replace(task, augment=lambda inputs, generator: inputs),
    "architecture": lambda task: replace(task, model=nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))),
    "loader": lambda task: replace(task, train=DataLoader(TensorDataset(*turned(task).train), 16)),
    "schedule": lambda task: replace(task, schedule=replace(task.schedule, lr=0.01)),
    "teacher": lambda task: replace(task, teacher=Net()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_experiment_is_never_served_the_result_of_this_one(name, tmp_path):
    task, recipe = replace(make_task(), loss=smoothed(0.1)), (Retrain("learning-rate", 2), Narrow())
    first, other = made(task, recipe, tmp_path), OTHERS[name](task)
    rows = []
    found = made(other, recipe, tmp_path, rows)
    assert not any("kept" in row for row in rows) and found == made(other, recipe, None) != first
    assert made(task, recipe, tmp_path, rows) == first and rows[-1]["kept"]


def test_a_users_own_stage_is_kept_until_its_fields_or_its_code_change(tmp_path, monkeypatch):
    task, rows = make_task(), []
    first = made(task, (Scaled(),), tmp_path)
    assert made(task, (Scaled(),), tmp_path, rows) == first and rows[-1]["kept"]
    assert made(task, (Scaled(3.0),), tmp_path, rows) != first and "kept" not in rows[-1]
    other = made(task, (Narrow(),), None)
    monkeypatch.setattr(Scaled, "__call__", lambda self, draft, task: Narrow()(draft, task))
    assert made(task, (Scaled(),), tmp_path, rows) == other and "kept" not in rows[-1]


def test_a_draft_that_is_not_the_tasks_network_has_a_key_of_its_own(tmp_path):
    task = make_task()
    draft = Draft.of_model(task.model)
    pruned = Prune(0.3, 1, retrain="none")(draft, task)
    files = [artifact_of(run(one, task, (Narrow(),), tmp_path, [].append)).to_bytes() for one in (draft, pruned)]
    assert files[0] != files[1]


def test_what_cannot_be_seen_is_said_and_nothing_is_kept(tmp_path, capsys):
    with open(__file__, "rb") as file:
        task = make_task(loss=lambda outputs, targets: F.cross_entropy(outputs, targets) + 0 * bool(file))
        draft = run(Draft.of_model(task.model), task, (Retrain("learning-rate", 1), Narrow()), tmp_path, [].append)
    reason = "task.loss -> file: _io.BufferedReader cannot be looked into"
    assert capsys.readouterr().err == f"tersenet: nothing is kept between runs: {reason}\n"
    assert draft.journal.find(unkept=reason) and not list(tmp_path.iterdir())


def test_a_task_that_changes_as_it_is_used_is_not_kept_and_repeats_itself(tmp_path, capsys):
    def make():
        x, y = make_task().train
        sampler = WeightedRandomSampler([1.0] * len(x), len(x), generator=torch.Generator().manual_seed(0))
        return make_task(train=DataLoader(TensorDataset(x, y), 16, sampler=sampler))

    recipe = (Narrow(), Retrain("learning-rate", 1), Narrow())
    first = made(make(), recipe, tmp_path)
    assert capsys.readouterr().err.count("change as they are used") == 1
    rows = []
    assert made(make(), recipe, tmp_path, rows) == first == made(make(), recipe, None)
    assert not any("kept" in row for row in rows)


# ---------------------------------------------------------------- killed

CHILD = """
import sys
from pathlib import Path
import tersenet as tn
from tersenet import checkpoint
from tersenet.artifact import Artifact
import test_journal
checkpoint.SECONDS = 0.1
recipe = tn.papers.deep_compression(0.3, 3, rounds=2, epochs=2)
result = tn.compress(test_journal.make_task(test=test_journal.make_task().train), recipe, folder=sys.argv[1])
Path(sys.argv[2]).write_bytes(result.artifact.to_bytes())
"""


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path):
    here = str(Path(__file__).parent)
    recipe = tn.papers.deep_compression(0.3, 3, rounds=2, epochs=2)
    task = make_task(test=make_task().train)
    whole = tn.compress(task, recipe, folder=tmp_path / "whole").artifact.to_bytes()
    folder, file = tmp_path / "killed", tmp_path / "file"
    command = [sys.executable, "-c", CHILD, str(folder), str(file)]

    def rows_written():
        return sum(p.read_bytes().count(b"\n") for p in folder.glob("*/*.jsonl"))

    for more in (4, 3, 3, 1000):  # rows of its own, after which it is killed
        begun = rows_written()
        child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": here})
        while child.poll() is None and rows_written() < begun + more:
            time.sleep(0.005)
        child.kill()
        child.wait()
    assert file.read_bytes() == whole
    rows = read(next(folder.glob("*/run.jsonl")))
    assert sum("run" in row for row in rows) == 4 and sum("end" in row for row in rows) == 1


def test_a_folder_that_takes_nothing_costs_nothing_but_what_would_be_kept(tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"no folder")
    state = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    for budget in (tn.Budget(size=2000), None):
        results = [tn.compress(state, budget=budget, folder=place) for place in (tmp_path / "kept", blocked / "cache")]
        assert results[0].artifact.to_bytes() == results[1].artifact.to_bytes()
        assert results[0].journal.exists() and results[1].journal is None
    assert capsys.readouterr().err.count("nothing is kept between runs: ") == 2
    # It may also fill up in the middle of a run.
    save = Artifact.save
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(Artifact, "save", lambda self, path: (_ for _ in ()).throw(full))
    last = tn.compress(state, (Pack(KMeans(3)), Narrow()), folder=tmp_path / "full")
    monkeypatch.setattr(Artifact, "save", save)
    same = tn.compress(state, (Pack(KMeans(3)), Narrow()), folder=tmp_path / "again")
    assert last.artifact.to_bytes() == same.artifact.to_bytes() and last.journal is None
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_the_cache_lies_where_the_user_has_a_home_and_never_where_the_process_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == Path("/home/someone/.cache/tersenet")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/tersenet")


def test_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    child = "from tersenet.journal import memory; print(memory())"
    script = f"import subprocess as s, sys\nheld = bytes([1]) * (400 << 20)\ns.run([sys.executable, '-c', {child!r}])"
    assert 5 < float(fresh_process(script)) < 200

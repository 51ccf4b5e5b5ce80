"""Curves of a run as TensorBoard and MLflow read them back."""

import pytest
from test_cli import home, terse  # noqa: F401
from test_report import small_task

import tersenet as tn
from tersenet.journal import RESULT, Journal
from tersenet.report.scalars import scalars, to_mlflow, to_tensorboard
from tersenet.report.told import Told

ROWS = [
    {"run": ["Prune(0.5, rounds=2)", "Narrow()"], "key": "ab"},
    {"epoch": 0, "training": "pruning, round 1 of 2", "loss": 0.5, "rate": 0.1},
    {"epoch": 1, "training": "pruning, round 1 of 2", "loss": 0.4, "rate": 0.01},
    {"stage": "Round 1", "density": 0.7, "metric": 0.8, "bytes": 900},
    {"epoch": 0, "training": "pruning, round 2 of 2", "loss": 0.45},
    {"stage": "Round 2", "density": 0.5, "bytes": 700},
    {"candidate": "c 1", "bytes": 650, "error": 0.25},
    {"search": "ab", "ratios": [1.0], "score": 0.75},
    {"end": True, "seconds": 3.0},
    {"result": 640, "before": 0.85, "metric": 0.8125},
]
CURVES = {
    "training/loss": [0.5, 0.4, 0.45],
    "training/rate": [0.1, 0.01],
    "stage/metric": [0.8],
    "stage/density": [0.7, 0.5],
    "stage/bytes": [900, 700],
    "candidate/error": [0.25],
    "candidate/bytes": [650],
    "search/score": [0.75],
    "test/metric": [0.85, 0.8125],
}


def events(folder):
    """The curves that TensorBoard reads from a folder."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = reading.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}


def numbered(curves):
    return {name: [(k, pytest.approx(v)) for k, v in enumerate(values, 1)] for name, values in curves.items()}


def test_tensorboard_reads_what_a_journal_tells_once_however_often_it_is_written(tmp_path):
    told = Told.of(ROWS)
    (tmp_path / "events.out.tfevents.1.other").write_bytes(b"")
    for rows in (ROWS[:4], ROWS, ROWS):
        to_tensorboard(Told.of(rows), tmp_path / "events")
    assert events(tmp_path / "events") == numbered(CURVES)
    assert len(list((tmp_path / "events").iterdir())) == 1 and len(list(scalars(told))) == 15
    assert to_tensorboard(told, tmp_path) == 15
    assert (tmp_path / "events.out.tfevents.1.other").exists()  # those of others stay


def test_mlflow_reads_what_a_journal_tells(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a real store without a server or a database
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny brings thirty packages: pip install '.[mlflow]'")
    long = "Pack(" + "x" * 9000 + ")"
    told = Told.of([*ROWS[:1], *[{"epoch": k, "training": "tuning", "loss": 1 / (1 + k)} for k in range(2500)]])
    told = Told(recipe=(*told.recipe, long), trainings=told.trainings)
    uri = f"file:{tmp_path / 'runs'}"
    assert to_mlflow(told, "many", uri) == 2500 and to_mlflow(Told.of(ROWS), "few", uri) == 15
    client = mlflow.MlflowClient(tracking_uri=uri)
    (place,) = client.search_experiments(filter_string="name = 'tersenet'")
    runs = {run.info.run_name: run for run in client.search_runs([place.experiment_id])}
    assert runs["few"].info.status == "FINISHED" and runs["few"].data.params["stage 1"] == "Prune(0.5, rounds=2)"
    assert runs["many"].data.params["stage 3"] == long[:500]
    found = {name: client.get_metric_history(runs["few"].info.run_id, name) for name in runs["few"].data.metrics}
    assert {name: [(one.step, one.value) for one in rows] for name, rows in found.items()} == numbered(CURVES)
    whole = client.get_metric_history(runs["many"].info.run_id, "training/loss")
    assert [one.value for one in whole] == [1 / (1 + k) for k in range(2500)]


def test_the_command_writes_the_curves_of_a_file_and_of_its_run(home):  # noqa: F811
    terse("compress", "--task", home / "task.py", "--recipe", "deep-compression", "-o", home / "a.terse")
    run = next((home / "cache" / "tersenet").glob(f"*/{RESULT}")).parent
    for source, folder in ((home / "a.terse", "file"), (run, "run")):
        assert "tensorboard --logdir" in terse("log", source, "--tensorboard", home / folder)
    assert events(home / "file") == events(home / "run")
    losses = [loss for one in Told.of_folder(run).trainings for loss in one.losses]
    assert len(losses) >= 6 and events(home / "run")["training/loss"] == numbered({"": losses})[""]
    assert "where to?" in terse("log", run, code=2)
    (run / RESULT).unlink()
    assert "give its folder" in terse("log", home / "a.terse", "--tensorboard", home / "x", code=2)
    assert not (home / "x").exists()


def test_a_run_that_goes_on_is_told_so_far(tmp_path):
    journal = Journal()
    journal.open(tmp_path)
    for row in ROWS[:3]:
        journal.write(**row)
    to_tensorboard(Told.of_folder(tmp_path), tmp_path / "events")
    assert events(tmp_path / "events") == numbered({"training/loss": [0.5, 0.4], "training/rate": [0.1, 0.01]})


def test_a_search_for_a_drop_has_a_point_for_each_candidate(tmp_path):
    result = tn.compress(small_task(), budget=tn.Budget(drop=3), folder=tmp_path / "runs")
    told = Told.of_folder(result.journal.parent)
    to_tensorboard(told, tmp_path / "events")
    assert events(tmp_path / "events")["candidate/bytes"] == numbered({"": [c.bytes for c in told.candidates]})[""]

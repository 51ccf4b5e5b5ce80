"""What the journal of a run tells as scalars over steps, written for TensorBoard and for MLflow."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tersenet.report.told import Told

SUFFIX = ".tersenet"  # of our file of events, which is written anew each time
EXPERIMENT, BATCH, LONGEST = "tersenet", 1000, 500  # scalars in a call and letters of a parameter that MLflow takes


class Scalar(NamedTuple):
    """A value of a curve at a step."""

    name: str
    step: int
    value: float


def scalars(told: Told) -> Iterator[Scalar]:
    """The curves of a run: epochs are numbered over all trainings, stages, candidates and tries each in their order."""
    epochs = [pair for one in told.trainings for pair in zip(one.losses, one.rates, strict=True)]
    curves: dict[str, list[dict[str, float | None]]] = {
        "training": [{"loss": loss, "rate": rate} for loss, rate in epochs],
        "stage": [{"metric": s.metric, "density": s.density, "bytes": s.bytes} for s in told.steps],
        "candidate": [{"metric": c.metric, "error": c.error, "bytes": c.bytes} for c in told.candidates],
        "search": [{"score": score} for score in told.scores],
        "test": [{"metric": value} for value in (told.before, told.after) if told.after is not None],
    }
    for curve, points in curves.items():
        for step, point in enumerate(points, 1):
            for name, value in point.items():
                if value is not None:
                    yield Scalar(f"{curve}/{name}", step, value)


def to_tensorboard(told: Told, folder: Path) -> int:
    """Write the curves as events for TensorBoard into a folder, in place of those written before: how many values.

    Needs `tersenet[tensorboard]`.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("curves for TensorBoard need tensorboard: pip install 'tersenet[tensorboard]'") from None
    before, found = list(folder.glob(f"events.out.tfevents.*{SUFFIX}")), list(scalars(told))
    with SummaryWriter(str(folder), filename_suffix=SUFFIX) as writer:
        for one in found:
            writer.add_scalar(one.name, one.value, one.step)
        writer.add_text("recipe", "\n".join(f"    {stage}" for stage in told.recipe))
    for path in before:
        path.unlink()
    return len(found)


def to_mlflow(told: Told, name: str, uri: str) -> int:
    """Write the curves into a new run of MLflow's experiment "tersenet" at a tracking address: how many values.

    The stages of the recipe are its parameters. Needs `tersenet[mlflow]`.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
    except ImportError:
        raise ImportError("curves for MLflow need mlflow: pip install 'tersenet[mlflow]'") from None
    client, found = MlflowClient(tracking_uri=uri), list(scalars(told))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    place = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    run = client.create_run(place, run_name=name).info.run_id
    for number, stage in enumerate(told.recipe, 1):
        client.log_param(run, f"stage {number}", stage[:LONGEST])
    for begin in range(0, len(found), BATCH):
        client.log_batch(run, [Metric(s.name, s.value, 0, s.step) for s in found[begin : begin + BATCH]])
    client.set_terminated(run)
    return len(found)

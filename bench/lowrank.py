"""Low rank without tuning: ENC on ResNet-56 at half the MACs, against uniform ranks and EVBMF's.

Run: make bench NAME=lowrank (or: python bench/lowrank.py). Accuracy on the first SCORED test images of the realised
network, as it is and with the running statistics of its BatchNorms taken again on CALIBRATION training images. The
first and the last layer stay whole, as in the paper's 54 layers. Seconds are of CPU time, of the whole stage.
"""

import time
from collections.abc import Callable

import torch
from table import real_data, write
from torch import nn

import tersenet as tn
from tersenet.draft import Draft
from tersenet.methods.factorize import SVD, Tucker2
from tersenet.realise import realise
from tersenet.run import Stage
from tersenet.stages.lowrank import ENC
from tersenet.stages.pack import Pack
from tersenet.stages.recalibrate import Recalibrate
from tersenet.tracing.operations import Watch
from tersenet.where import kept

SEED, SCORED, CALIBRATION, SAMPLES = 0, 1000, 500, 256
# By name, the stage, plain or in the metric of the data.
STAGES: dict[str, Callable[[bool], Stage]] = {
    "uniform ranks": lambda weighted: Pack(SVD(part=0.5, spatial=True, weighted=weighted), samples=SAMPLES),
    "ENC-Map": lambda weighted: ENC(0.5, weighted=weighted, samples=SAMPLES),
    "ENC-Map, by channels": lambda weighted: ENC(0.5, spatial=False, weighted=weighted, samples=SAMPLES),
    "ENC-Model": lambda weighted: ENC(0.5, by="model", weighted=weighted, samples=SAMPLES),
    "ENC-Inf": lambda weighted: ENC(0.5, by="inf", weighted=weighted, samples=SAMPLES, candidates=10, scored=500),
}


def task_of() -> tn.Task:
    datasets, models = real_data()
    parts = {}
    for part, count in (("train", 6000), ("test", SCORED)):
        images, labels = datasets.load("cifar10", part, count)
        parts[part] = (models.inputs("resnet56", images), torch.from_numpy(labels).long())
    return tn.Task(models.load("resnet56"), **parts)


def macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiplications for one image."""
    with torch.no_grad(), Watch(model.eval()) as watch:
        model(image)
    return sum(use.out.numel() * use.form.columns for use in watch.uses)


def main() -> None:
    task = task_of()
    draft = kept(Draft.of_model(task.model), ("conv1.weight", "linear.weight"))
    whole = macs(task.model, task.test[0][:1])
    rows: list[dict[str, object]] = [{"method": "dense", "accuracy": round(task.score(task.test), 4), "macs": 1.0}]
    stages = [(name, weighted, make(weighted)) for name, make in STAGES.items() for weighted in (False, True)]
    for name, weighted, stage in [*stages, ("Tucker-2 with EVBMF's ranks", False, Pack(Tucker2()))]:
        began = time.process_time()
        factored = stage(draft, task)
        seconds = time.process_time() - began
        small = realise(task.model, factored.tensors).eval()
        again = Recalibrate(CALIBRATION)(factored, task).module()
        rows.append({
            "method": name, "weighted": weighted, "macs": round(macs(small, task.test[0][:1]) / whole, 3),
            "accuracy": round(task.score(task.test, small), 4),
            "norms_again": round(task.score(task.test, again), 4),
            "seconds": round(seconds, 1),
        })  # fmt: skip
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    write("lowrank", rows, SEED, scored=SCORED, calibration=CALIBRATION, samples=SAMPLES)


if __name__ == "__main__":
    main()

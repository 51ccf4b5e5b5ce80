"""Tensor trains on the convolutional networks of Garipov et al. (2016), and Tucker-2 and CP on the same network.

Run: make bench NAME=trains (or: python bench/trains.py [PART ...]). Rows of parts that are not run again are kept.
Networks are trained here on the first IMAGES training images of CIFAR-10, far less than the paper's, and scored on the
first SCORED test images: rows compare with one another and with the paper's ratios, not with its accuracies.

ratios: how many times fewer numbers the layers have in trains, by the paper's parts of rows and columns, at the ranks
given; nothing is trained. The paper compresses linear layers alone 10.7 to 21 times, all layers 9.7 to 83 times.
begun: the network of six convolutions, trained whole and with its kernels in trains from the first step on.
linear: the same for the network with two wide linear layers, in trains alone.
taken: the trained network's kernels taken into trains, Tucker's form or CP, before and after an epoch of distillation;
milliseconds of one image by the realised network, on one thread, the median of rounds over all networks.
"""

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from lowrank import macs, parameters
from table import in_rounds, put, real_data
from torch import nn

import tersenet as tn
from tersenet.draft import Draft, artifact_of
from tersenet.methods.cp import CP
from tersenet.methods.factorize import SVD, Tucker2
from tersenet.methods.tensor_train import TensorTrain
from tersenet.packed import Packed, arrays
from tersenet.realise import realise
from tersenet.run import Stage
from tersenet.stages.finetune import Distill
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.recalibrate import Recalibrate

SEED, IMAGES, SCORED, EPOCHS = 0, 5000, 2000, 6
SCHEDULE = tn.Schedule(epochs=EPOCHS, lr=0.03, batch=50, weight_decay=1e-4, cosine=True)
KERNELS = ("3.weight", "7.weight", "10.weight", "14.weight", "17.weight")  # all but the first, as in the paper
WIDE = (  # the parts of rows and columns, and the ranks, of the paper's linear layers
    ("21.weight", (4, 6, 8, 8), (8, 8, 8, 16), 40),
    ("24.weight", (4, 4, 4, 8), (4, 6, 8, 8), 30),
)
Row = dict[str, Any]


def network(wide: bool = False) -> nn.Sequential:
    """Six convolutions in three pairs, with norms; with two linear layers of 1,536 and 512 behind them if wide."""
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    for k, (inner, outer) in enumerate(((3, 64), (64, 64), (64, 128), (128, 128), (128, 128), (128, 128))):
        layers += [nn.Conv2d(inner, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, 1)] if k in (1, 3) else []
    if not wide:
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    for inner, outer in ((8192, 1536), (1536, 512)):
        layers += [nn.Flatten()] if inner == 8192 else []
        layers += [nn.Linear(inner, outer, bias=False), nn.BatchNorm1d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def task_of(model: nn.Module) -> tn.Task:
    datasets, models = real_data()
    parts = {}
    for part, count in (("train", IMAGES), ("test", SCORED)):
        images, labels = datasets.load("cifar10", part, count)
        parts[part] = (models.inputs("resnet20", images), torch.from_numpy(labels).long())
    # No choices are made on data, so that all images are trained on.
    x, y = parts["train"]
    return tn.Task(model, **parts, valid=(x[:100], y[:100]), schedule=SCHEDULE)


@cache
def trained() -> tn.Task:
    return task_of(network()).trained(SEED)


def trains(rank: int) -> Pack:
    """Kernels in trains: channels of 64 as 4 x 4 x 4, of 128 as 4 x 8 x 4, as the paper has them."""
    shapes = [(4, 4, 4)] + [(4, 8, 4)] * 4
    before = [(4, 4, 4)] * 2 + [(4, 8, 4)] * 3
    rules = ((n, TensorTrain(rank, rows=m, columns=i)) for n, m, i in zip(KERNELS, shapes, before, strict=True))
    return Pack(None, tuple(rules))


def linear(part: float = 1.0) -> Pack:
    rules = ((n, TensorTrain(round(part * r), rows=m, columns=i)) for n, m, i, r in WIDE)
    return Pack(None, tuple(rules))


def fewer(draft: Draft, names: tuple[str, ...]) -> float:
    """How many times fewer numbers the trees of weights have than the weights."""
    trees = [draft.tensors[name].tree for name in names]
    held = sum(sum(a.size for _, a in arrays(t)) if isinstance(t, Packed) else t.size for t in trees)
    return round(sum(torch.Size(tree.shape).numel() for tree in trees) / held, 2)


def ratios() -> Iterator[Row]:
    convolutions, wide = Draft.of_model(network()), Draft.of_model(network(True))
    for rank in (12, 16, 24, 32):
        yield {"method": f"kernels, rank {rank}", "times_fewer": fewer(trains(rank)(convolutions, None), KERNELS)}
    names = (*KERNELS, *(name for name, *_ in WIDE))
    for part in (1.0, 0.5):
        ranks = " and ".join(str(round(part * rank)) for *_, rank in WIDE)
        both = linear(part)(wide, None)
        yield {"method": f"linear layers, ranks {ranks}", "times_fewer": fewer(both, names)}
        yield {"method": f"all layers, ranks 16, {ranks}", "times_fewer": fewer(trains(16)(both, None), names)}


def scratch(model: nn.Module, stages: dict[str, Stage], names: tuple[str, ...]) -> Iterator[Row]:
    """Networks trained from the first step on, whole and packed."""
    task = task_of(model)
    whole = task.trained(SEED)
    yield {"method": "whole", "times_fewer": 1.0, "accuracy": round(whole.score(whole.test), 4)}
    for name, stage in stages.items():
        before = stage(Draft.of_model(model), task)
        # Finetune's own schedule is for tuning; here is the whole network's.
        after = tn.stages.finetune.tune(before, task, SCHEDULE, range(EPOCHS), SEED)
        score = round(task.score(task.test, after.module()), 4)
        yield {"method": name, "times_fewer": fewer(after, names), "accuracy": score}


def begun() -> Iterator[Row]:
    yield from scratch(network(), {f"kernels in trains, rank {r}": trains(r) for r in (16, 32)}, KERNELS)


def wide() -> Iterator[Row]:
    names = tuple(name for name, *_ in WIDE)
    yield from scratch(network(True), {"linear layers in trains": linear()}, names)


def taken() -> Iterator[Row]:
    task = trained()
    image, draft = task.test[0][:1], Draft.of_model(task.model)
    stages: dict[str, Stage] = {
        "tensor trains, rank 32": trains(32),
        "Tucker-2 with EVBMF's ranks": Pack(Tucker2()),
        "Tucker-2, a half": Pack(Tucker2(part=0.5)),
        "CP, a half": Pack(CP(part=0.5)),
        "SVD, a half": Pack(SVD(part=0.5, spatial=True), samples=500),
    }
    rows: list[Row] = [{"method": "dense", "accuracy": round(task.score(task.test), 4), "tuned": None}]
    models = [task.model.eval()]
    for name, stage in stages.items():
        before = stage(draft, task)
        again = Recalibrate(500)(before, task)
        after = Distill(1, lr=0.01, temperature=3.0)(again, task)
        models.append(realise(task.model, after.tensors).eval())
        found = {
            "accuracy": before.module(), "norms_follow": again.module(), "tuned": models[-1],
        }  # fmt: skip
        scores = {key: round(task.score(task.test, model), 4) for key, model in found.items()}
        rows.append({"method": name, **scores, "bytes": artifact_of(Narrow()(after, None)).nbytes})
    torch.set_num_threads(1)
    with torch.no_grad():
        times = in_rounds([lambda m=model: m(image) for model in models])
    for row, model, (_, spent) in zip(rows, models, times, strict=True):
        size = {"parameters": parameters(model), "macs": round(macs(model, image) / macs(models[0], image), 3)}
        yield {**row, **size, "milliseconds": round(1000 * spent, 2)}


KEYS = ("part", "method")
PARTS = {"ratios": ratios, "begun": begun, "linear": wide, "taken": taken}


def main(names: list[str]) -> None:
    settings = {"images": IMAGES, "scored": SCORED, "epochs": EPOCHS}
    for name in names or list(PARTS):
        for row in PARTS[name]():
            put("trains", {"part": name, **row}, KEYS, lambda row: list(PARTS).index(row["part"]), SEED, **settings)


if __name__ == "__main__":
    main(sys.argv[1:])

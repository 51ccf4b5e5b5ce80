"""Low rank and compact filters: ranks chosen without training, what tuning gives back, and ranks beside bits.

Run: make bench NAME=lowrank (or: python bench/lowrank.py [PART [NETWORK ...]]). Rows that are not run again are kept;
networks may be named where a part has several. CIFAR images are varied for training as those who trained the networks
did.

ranks: ENC on ResNet-56 at half the MACs, against uniform ranks and EVBMF's. The first and the last layer stay whole, as
in the paper's 54 layers. Accuracy of the realised network on the first SCORED test images, as it is and with norms that
follow it (Recalibrate) on CALIBRATION training images; seconds are of CPU time, of the whole stage.
norms: what statistics of norms are worth: those held, taken anew on CALIBRATION plain images or varied ones, or
following what was done to the weights, in ResNet-56 as it is and with half of the MACs.
tuned: the same ranks and after TUNED of distillation from the float network on a part of the training images.
squeezenet: Tucker-2 and CP on SqueezeNet 1.1, tuned on 200 images, top-1 agreement on 300 others; milliseconds of one
image, one thread, the median of rounds over all networks.
compact: compact filters on ResNet-20, before and after COMPACT epochs of distillation.
others: ENC against uniform and EVBMF's ranks on SqueezeNet 1.1 and MobileNetV2, before and after two epochs on 200
images, top-1 agreement on 300 others.
bits: SVD and rounding together against rounding alone, on ResNet-56 and MiniLM, whole files, without training: rounding
to so many bits gives a size, and the others get that as their budget.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from augmentation import cropped
from bfloat16 import load as quick
from ptq import task_of as agreement
from table import in_rounds, put, real_data
from torch import nn

import tersenet as tn
from tersenet.draft import Draft, artifact_of
from tersenet.methods import chain
from tersenet.methods.cp import CP
from tersenet.methods.factorize import SVD, Tucker2
from tersenet.methods.uniform import Uniform
from tersenet.realise import realise
from tersenet.run import Recipe, Stage
from tersenet.running_statistics import of_batches
from tersenet.stages.finetune import Distill
from tersenet.stages.lowrank import ENC
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.recalibrate import Recalibrate
from tersenet.stages.waterfill import Waterfill
from tersenet.tracing.operations import Watch
from tersenet.where import kept

SEED, SCORED, CALIBRATION, SAMPLES = 0, 1000, 500, 256
TUNED, COMPACT = Distill(2, lr=0.001, temperature=3.0), 3
FEW = tn.Schedule(batch=20, adam=True)  # for 200 images
WHOLE = ("conv1.weight", "linear.weight")
Row = dict[str, Any]
# By name, the stage, plain or in the metric of the data.
STAGES: dict[str, Callable[[bool], Stage]] = {
    "uniform ranks": lambda weighted: Pack(SVD(part=0.5, spatial=True, weighted=weighted), samples=SAMPLES),
    "ENC-Map": lambda weighted: ENC(0.5, weighted=weighted, samples=SAMPLES),
    "ENC-Map, by channels": lambda weighted: ENC(0.5, spatial=False, weighted=weighted, samples=SAMPLES),
    "ENC-Model": lambda weighted: ENC(0.5, by="model", weighted=weighted, samples=SAMPLES),
    "ENC-Inf": lambda weighted: ENC(0.5, by="inf", weighted=weighted, samples=SAMPLES, candidates=10, scored=500),
}


def cifar(name: str, scored: int = SCORED) -> tn.Task:
    datasets, models = real_data()
    parts = {}
    for part, count in (("train", 6000), ("test", scored)):
        images, labels = datasets.load("cifar10", part, count)
        parts[part] = (models.inputs(name, images), torch.from_numpy(labels).long())
    return tn.Task(quick(name), **parts, augment=cropped)


def macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiplications for one image."""
    with torch.no_grad(), Watch(model.eval()) as watch:
        model(image)
    return sum(use.out.numel() * use.form.columns for use in watch.uses)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ranks() -> Iterator[Row]:
    task = cifar("resnet56")
    draft, image = kept(Draft.of_model(task.model), WHOLE), task.test[0][:1]
    whole = macs(task.model, image)
    yield {"network": "resnet56", "method": "dense", "accuracy": round(task.score(task.test), 4), "macs": 1.0}
    stages = [(name, weighted, make(weighted)) for name, make in STAGES.items() for weighted in (False, True)]
    for name, weighted, stage in [*stages, ("Tucker-2 with EVBMF's ranks", False, Pack(Tucker2()))]:
        began = time.process_time()
        factored = stage(draft, task)
        seconds = time.process_time() - began
        small = realise(task.model, factored.tensors).eval()
        again = Recalibrate(CALIBRATION)(factored, task).module()
        yield {
            "network": "resnet56", "method": name, "weighted": weighted, "macs": round(macs(small, image) / whole, 3),
            "accuracy": round(task.score(task.test, small), 4),
            "norms_follow": round(task.score(task.test, again), 4), "seconds": round(seconds, 1),
        }  # fmt: skip


def norms() -> Iterator[Row]:
    task = cifar("resnet56")
    draft = kept(Draft.of_model(task.model), WHOLE)
    plain = task.calibration(CALIBRATION, 128)
    varied = [cropped(images, torch.Generator().manual_seed(SEED + k)) for k, images in enumerate(plain)]
    for name, stage in {
        "as it is": Pack(None),
        **{n: STAGES[n](True) for n in ("ENC-Map", "ENC-Map, by channels")},
    }.items():
        made = stage(draft, task)
        anew = []
        for batches in (plain, varied):
            model = made.module()
            of_batches(model, task, batches)
            anew.append(round(task.score(task.test, model), 4))
        yield {
            "network": "resnet56", "method": name, "accuracy": round(task.score(task.test, made.module()), 4),
            "anew": anew[0], "anew_varied": anew[1],
            "norms_follow": round(task.score(task.test, Recalibrate(CALIBRATION)(made, task).module()), 4),
        }  # fmt: skip


def tuned() -> Iterator[Row]:
    task = cifar("resnet56")
    draft, image = kept(Draft.of_model(task.model), WHOLE), task.test[0][:1]
    whole = macs(task.model, image)
    stages = {
        "uniform ranks, as many MACs": Pack(SVD(part=0.52, spatial=True), samples=SAMPLES),
        "ENC-Map": ENC(0.5, samples=SAMPLES),
        "ENC-Map, plain SVD": ENC(0.5, weighted=False),
        "Tucker-2 with EVBMF's ranks": Pack(Tucker2()),
    }
    for name, stage in stages.items():
        before = Recalibrate(CALIBRATION)(stage(draft, task), task)
        after = TUNED(before, task)
        small = realise(task.model, after.tensors).eval()
        yield {
            "network": "resnet56", "method": name, "macs": round(macs(small, image) / whole, 3),
            "norms_follow": round(task.score(task.test, before.module()), 4),
            "tuned": round(task.score(task.test, small), 4),
        }  # fmt: skip


def squeezenet() -> Iterator[Row]:
    task = replace(agreement("squeezenet11"), schedule=FEW)
    image, draft = task.test[0][:1], Draft.of_model(task.model)
    stages = {
        "Tucker-2 with EVBMF's ranks": Pack(Tucker2()),
        "Tucker-2, three quarters": Pack(Tucker2(part=0.75)),
        "CP, three quarters": Pack(CP(part=0.75)),
        "SVD in the metric of the data, three quarters": Pack(SVD(part=0.75), samples=200),
    }
    rows: list[Row] = [{"method": "dense", "accuracy": task.score(task.test), "tuned": None}]
    models = [task.model.eval()]
    for name, stage in stages.items():
        before = stage(draft, task)
        after = Distill(2, lr=0.00001, temperature=3.0)(before, task)
        models.append(realise(task.model, after.tensors).eval())
        scores = (task.score(task.test, m) for m in (before.module(), models[-1]))
        rows.append({"method": name, **dict(zip(("accuracy", "tuned"), (round(s, 4) for s in scores), strict=True))})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        times = in_rounds([lambda m=model: m(image) for model in models])
    torch.set_num_threads(threads)
    for row, model, (_, spent) in zip(rows, models, times, strict=True):
        size = {"parameters": parameters(model), "macs": round(macs(model, image) / macs(models[0], image), 3)}
        yield {"network": "squeezenet11", **row, **size, "milliseconds": round(1000 * spent, 2)}


def compact() -> Iterator[Row]:
    task = cifar("resnet20", 2000)
    draft, image = kept(Draft.of_model(task.model), ("conv1.weight",)), task.test[0][:1]
    for kind, method in tn.papers.COMPACT.items():
        before = Recalibrate(CALIBRATION)(Pack(method)(draft, task), task)
        after = Distill(COMPACT, lr=0.02, temperature=3.0)(before, task)
        small = realise(task.model, after.tensors).eval()
        yield {
            "network": "resnet20", "method": kind, "norms_follow": round(task.score(task.test, before.module()), 4),
            "tuned": round(task.score(task.test, small), 4), "reference": round(task.score(task.test), 4),
            "macs": round(macs(small, image) / macs(task.model, image), 3), "parameters": parameters(small),
            "bytes": artifact_of(Narrow()(after, None)).nbytes,
        }  # fmt: skip


def others(*networks: str) -> Iterator[Row]:
    for network in networks or ("squeezenet11", "mobilenetv2"):
        task = replace(agreement(network), schedule=FEW)
        image, draft = task.test[0][:1], Draft.of_model(task.model)
        stages: dict[str, Stage] = {
            "uniform ranks": Pack(SVD(part=0.75, spatial=True), samples=200),
            "ENC-Map": ENC(0.75, samples=200),
            "ENC-Model": ENC(0.75, by="model", samples=200),
            "ENC-Map, plain SVD": ENC(0.75, weighted=False),
            "Tucker-2 with EVBMF's ranks": Pack(Tucker2()),
        }
        for name, stage in stages.items():
            before = stage(draft, task)
            after = Distill(2, lr=0.00001, temperature=3.0)(before, task)
            small = realise(task.model, after.tensors).eval()
            yield {
                "network": network, "method": name, "macs": round(macs(small, image) / macs(task.model, image), 3),
                "accuracy": round(task.score(task.test, before.module()), 4),
                "tuned": round(task.score(task.test, small), 4),
            }  # fmt: skip


def bits(*networks: str) -> Iterator[Row]:
    import sequence

    for network in networks or ("resnet56", "minilm"):
        task = cifar(network) if network == "resnet56" else sequence.encoder()
        for width in (6, 4):
            rounding = tuple(Uniform(b, by_row=True) for b in (3, 4, 5, 6, 8))
            ranks = tuple(chain(SVD(part=p), Uniform(b, by_row=True)) for p in (0.9, 0.6, 0.3) for b in (6, 8))
            recipes: dict[str, Recipe] = {
                "rounding": (Pack(Uniform(width, by_row=True)), Narrow()),
                "SVD of all, 8 bits": (Pack(chain(SVD(part=0.9), Uniform(8, by_row=True)), samples=128), Narrow()),
                "of both, what each layer loses least by": (Waterfill(methods=(*rounding, *ranks)),),
                "the same without SVD": (Waterfill(methods=rounding),),
            }
            size = None
            for name, recipe in recipes.items():
                began = time.process_time()
                with tempfile.TemporaryDirectory() as folder:
                    done = tn.compress(task, recipe, size and tn.Budget(size=size), folder=folder)
                size = size or done.artifact.nbytes
                kinds = [row.kind.partition("(")[0] for row in done.artifact.ledger() if len(row.shape) > 1]
                yield {
                    "network": network, "method": name, "setting": width, "bytes": done.artifact.nbytes,
                    "accuracy": round(done.after, 4), "reference": round(done.before, 4),
                    "factored": kinds.count("Factored"), "weights": len(kinds),
                    "seconds": round(time.process_time() - began, 1),
                }  # fmt: skip


KEYS = ("part", "network", "method", "weighted", "setting")
PARTS = {
    "ranks": ranks,
    "norms": norms,
    "tuned": tuned,
    "squeezenet": squeezenet,
    "others": others,
    "compact": compact,
    "bits": bits,
}


def main(part: str | None = None, *networks: str) -> None:
    settings = {"scored": SCORED, "calibration": CALIBRATION, "samples": SAMPLES}
    for name in [part] if part else PARTS:
        for row in PARTS[name](*networks):
            put("lowrank", {"part": name, **row}, KEYS, lambda row: list(PARTS).index(row["part"]), SEED, **settings)


if __name__ == "__main__":
    main(*sys.argv[1:])

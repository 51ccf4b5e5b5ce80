"""Deep Compression on the Caffe LeNets: bytes of the whole file and accuracy of the reopened one, stage by stage.

Run: make bench NAME=deep_compression (about ten minutes for each network on one core). Retraining sees the
training split alone, shifted by up to two pixels; the test split is measured once for each row. The paper's files
stand beside.
"""

import time
from dataclasses import replace

import torch
from augmentation import shifted
from table import real_data, write

import tersenet as tn
from tersenet.artifact import Artifact, load
from tersenet.draft import Draft, artifact_of
from tersenet.run import run

SEED = 0
PAPER = {"lenet300": 27_000, "lenet5": 44_000}  # bytes; Han, Mao, Dally 2016, tables 1, 2 and 3
SETTINGS = {
    "lenet300": {"density": 0.0485, "bits": 4, "rounds": 8, "epochs": 3},
    "lenet5": {"density": 0.028, "bits": 5, "rounds": 6, "epochs": 4},
}
LR = {"lenet300": 0.1, "lenet5": 0.02}
HUFFMAN = tn.Coding(("bits", "huffman", "gaps"))


def task_of(name: str) -> tn.Task:
    datasets, models = real_data()
    split = {}
    for part in ("train", "test"):
        images, labels = datasets.load("mnist", part)
        split[part] = (models.inputs(name, images), torch.from_numpy(labels).long())
    settings = SETTINGS[name]
    schedule = tn.Schedule(epochs=settings["epochs"], lr=LR[name], weight_decay=5e-4)
    valid = tuple(part[-5000:] for part in split["train"])
    return tn.Task(models.load(name), **split, valid=valid, schedule=schedule, augment=shifted)


def measure(name: str) -> list[dict[str, object]]:
    task = task_of(name)
    original = Draft.of_model(task.model)
    reference = task.score(task.test)
    dense = sum(4 * p.numel() for p in task.model.parameters())
    recipe = tn.papers.deep_compression(**SETTINGS[name], seed=SEED)
    rows: list[dict[str, object]] = []

    def row(stage: str, artifact: Artifact, began: float) -> None:
        data = artifact.to_bytes()
        accuracy = task.score(task.test, load(data).into(task.model))
        rows.append(
            {
                "network": name,
                "method": "deep-compression",
                "stage": stage,
                "bytes": len(data),
                "ratio": round(dense / len(data), 1),
                "accuracy": round(accuracy, 4),
                "reference": round(reference, 4),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        print(rows[-1], flush=True)

    began = time.monotonic()
    pruned = run(original, task, recipe[:1], None, print)
    row("pruned, float32 survivors, Huffman-coded positions", artifact_of(pruned, HUFFMAN), began)
    clustered = run(pruned, None, recipe[1:2], None, print)
    row("clustered, fixed-width indices", artifact_of(clustered, tn.Coding(("bits", "gaps"))), began)
    tuned = run(replace(clustered, model=task.model), task, recipe[2:], None, print)
    row("centroids tuned, Huffman (the paper's pipeline)", artifact_of(tuned, HUFFMAN), began)
    row("centroids tuned, smallest codec (context)", artifact_of(tuned), began)
    paper = {"network": name, "method": "deep-compression", "stage": "the paper's file", "bytes": PAPER[name]}
    rows.append({**paper, "ratio": {"lenet300": 40.0, "lenet5": 39.0}[name], "peer": True})
    return rows


if __name__ == "__main__":
    torch.manual_seed(SEED)
    write("deep_compression", [row for name in SETTINGS for row in measure(name)], SEED, settings=SETTINGS)

"""One budget for all methods: candidates from every method together against each method alone, without retraining.

Run: make bench NAME=mixed (or: python bench/mixed.py NETWORK ...). Whole-file bytes, accuracy of the reopened file on
the test split (agreement with the float network on 300 images for MobileNetV2, which is calibrated on 200 others). Each
method alone runs at its own setting that meets the size; where none does, its row says so.
"""

import sys
import tempfile
import time

from ptq import task_of
from table import earlier, write

import tersenet as tn
from tersenet.budget import UnmetBudget
from tersenet.methods.kmeans import KMeans
from tersenet.methods.uniform import Uniform
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune

SIZES = {
    "lenet5": (10_000, 16_000, 30_000),
    "resnet20": (45_000, 57_000, 80_000),
    "mobilenetv2": (1_000_000, 1_400_000, 1_800_000),
}
ALONE = {
    "waterfilling": tn.papers.output_aware(),
    "k-means": (Pack(KMeans(5)), Narrow()),
    "rounding by row": (Pack(Uniform(8, by_row=True)), Narrow()),
    "pruning, k-means 4 bit": (Prune(0.3, 1, retrain="none"), Pack(KMeans(4)), Narrow()),
}
MIXED = "all methods together"


def rows_of(name: str):
    task = task_of(name)
    for size in SIZES[name]:
        for method, recipe in {**ALONE, MIXED: tn.papers.mixed()}.items():
            row, began = {"network": name, "method": method, "asked": size}, time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    done = tn.compress(task, recipe, tn.Budget(size=size), folder=folder)
                except UnmetBudget as wrong:
                    row |= {"bytes": None, "accuracy": None, "least_bytes": wrong.least}
                else:
                    kinds = [r.kind.partition("(")[0] for r in done.artifact.ledger() if len(r.shape) > 1]
                    row |= {"bytes": done.artifact.nbytes, "accuracy": round(done.after, 4)}
                    row |= {
                        "reference": round(done.before, 4),
                        "kinds": {k: kinds.count(k) for k in sorted(set(kinds))},
                    }
            print(row | {"seconds": round(time.monotonic() - began, 1)}, flush=True)
            yield row | {"seconds": round(time.monotonic() - began, 1)}


def behind(rows) -> dict[str, list[float]]:
    """For each network and size, in points, how far all methods together are behind the best of them alone."""
    found = {}
    for row in (r for r in rows if r["method"] == MIXED):
        alike = [r for r in rows if (r["network"], r["asked"]) == (row["network"], row["asked"]) and r["accuracy"]]
        best = max(r["accuracy"] for r in alike if r["method"] != MIXED)
        found.setdefault(row["network"], []).append(round(100 * (best - row["accuracy"]), 2))
    return found


def main(names: list[str]) -> None:
    for name in names:
        rows = list(rows_of(name))
        kept = [r for r in earlier("mixed") if r["network"] != name] + rows
        write("mixed", kept, 0, points_behind_the_best_alone=behind(kept))
        print(behind(kept))


if __name__ == "__main__":
    main(sys.argv[1:] or list(SIZES))

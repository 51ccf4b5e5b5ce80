"""The information plane of Chelombiev et al. 2019 over many seeds, and that of LeNet-300-100 before and after pruning.

Run: make bench NAME=information (or: python bench/information.py PART ..., with "patterns" or "lenet"; the rows of a
part replace its earlier ones). docs/information.md says what the figures mean.

Patterns: all 4,096 patterns of 12 bits, one at each corner of an icosahedron. The label says whether the energy of the
pattern's spherical harmonics up to degree 4 is over its median, which no rotation changes: the kind of rule that
Shwartz-Ziv and Tishby 2017 describe, made here. Networks are 12-10-7-5-4-3-2; all seeds of a setting train at once as
batched matrices, each with its own start, split and order. As in the authors' code: batches of 256, Adam, 80 % for
training, 30 bins, weights drawn with a deviation of 1 / sqrt(inputs) for tanh and of twice that for others, L2 of 0.015
on all but the last weights. Shorter than there: 600 epochs at a rate of 2e-3 for 8,000 at 4e-4.
"""

import itertools
import math
import sys
import time
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from table import earlier, real_data, write
from torch import nn

import tersenet as tn
from tersenet.draft import Draft
from tersenet.information import InformationPlane, akde, binned, ebab
from tersenet.stages.prune import Prune

SEEDS, WIDTHS = 25, (12, 10, 7, 5, 4, 3, 2)
EPOCHS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 600)  # at whose ends the networks are looked at
KERNELS = 8, 1024  # aKDE: the seeds, and the patterns drawn from all
ACTIVATIONS = {
    "tanh": torch.tanh,
    "ReLU": F.relu,
    "ELU": F.elu,
    "Swish": F.silu,
    "centred softplus": lambda x: F.softplus(x) - math.log(2),
    "absolute value": torch.abs,
}
PENALIZED = ("tanh", "ReLU", "ELU", "Swish")
PENALTY = 0.015


def patterns() -> tuple[torch.Tensor, torch.Tensor]:
    """All patterns [4096, 12] and their labels."""
    golden = (1 + math.sqrt(5)) / 2
    corners = [
        corner for a, b in itertools.product((-1, 1), (-golden, golden)) for corner in ((0, a, b), (a, b, 0), (b, 0, a))
    ]
    places = np.array(corners) / math.hypot(1, golden)
    cosines = places @ places.T
    kernel = np.polynomial.legendre.legval(cosines, [2 * degree + 1 for degree in range(5)])
    x = np.array(list(itertools.product((0.0, 1.0), repeat=12)))
    energy = np.einsum("ni,ij,nj->n", x, kernel, x).round(6)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(energy > np.median(energy)).long()


def layers(weights, activation, x):
    """Outputs of all layers [seeds, samples, units], the logits last."""
    found = []
    for k, (matrix, bias) in enumerate(weights):
        x = torch.baddbmm(bias, x, matrix)
        x = activation(x) if k < len(weights) - 1 else x
        found.append(x)
    return found


def trained(name: str, penalty: float):
    """Weights of all seeds at EPOCHS, and which patterns [seeds, n] they were trained on."""
    x, y = patterns()
    generator = torch.Generator().manual_seed(0)
    deviation = 1.0 if name == "tanh" else 2.0
    weights = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        drawn = nn.init.trunc_normal_(torch.empty(SEEDS, inputs, outputs), generator=generator, a=-2, b=2)
        matrix = (drawn * deviation / math.sqrt(inputs)).requires_grad_()
        weights.append((matrix, torch.zeros(SEEDS, 1, outputs, requires_grad=True)))
    train = torch.rand(SEEDS, len(x), generator=generator).argsort(1)[:, : len(x) * 4 // 5]
    optimizer = torch.optim.Adam([part for pair in weights for part in pair], 2e-3, foreach=True)
    kept = []
    for epoch in range(EPOCHS[-1] + 1):
        if epoch in EPOCHS:
            kept.append([tuple(part.detach().clone() for part in pair) for pair in weights])
        order = train.gather(1, torch.rand(train.shape, generator=generator).argsort(1))
        for batch in order.split(256, 1):
            logits = layers(weights, ACTIVATIONS[name], x[batch])[-1]
            loss = F.cross_entropy(logits.flatten(0, 1), y[batch].flatten(), reduction="sum") / batch.shape[1]
            if penalty:
                loss = loss + penalty / 2 * sum(matrix.square().sum() for matrix, _ in weights[:-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return kept, train


def setting(name: str, penalty: float):
    """Rows of a setting: each layer by each estimator."""
    began = time.process_time()
    kept, train = trained(name, penalty)
    spent = time.process_time() - began
    x, y = patterns()
    with torch.no_grad():
        outputs = [layers(weights, ACTIVATIONS[name], x.expand(SEEDS, -1, -1)) for weights in kept]
    right = (outputs[-1][-1].argmax(2) == y).float()
    inside = torch.zeros(right.shape).scatter_(1, train, 1.0)
    scores = [((right * part).sum(1) / part.sum(1)).numpy() for part in (inside, 1 - inside)]
    told = [[layer.numpy() for layer in (*found[:-1], found[-1].softmax(2))] for found in outputs]
    some = np.random.default_rng(0).permutation(len(x))[: KERNELS[1]]
    labels = y.numpy()
    estimates = {"adaptive bins": [], "fixed bins": [], "aKDE, lower": [], "aKDE, upper": []}
    for seed in range(SEEDS):
        all_of_it = [layer[seed] for found in told for layer in found]
        spread = np.linspace(min(t.min() for t in all_of_it), max(t.max() for t in all_of_it), 31)[1:-1]
        estimates["adaptive bins"].append([ebab(t, labels) for t in all_of_it])
        estimates["fixed bins"].append([binned(t, labels, spread) for t in all_of_it])
        if seed < KERNELS[0]:
            bounds = [akde(t[some], labels[some]) for t in all_of_it]
            for label, found in zip(("aKDE, lower", "aKDE, upper"), zip(*bounds, strict=True), strict=True):
                estimates[label].append(found)
    print(name, penalty, "training", round(spent), "all", round(time.process_time() - began), flush=True)
    for (label, found), layer in itertools.product(estimates.items(), range(len(WIDTHS) - 1)):
        both = np.array([[(point.inputs, point.labels) for point in points] for points in found])
        both = both.reshape(len(found), len(EPOCHS), -1, 2)[:, :, layer]
        most, last = both[..., 0].max(1), both[:, -1, 0]
        compression = np.where(most > 0, (most - last) / most.clip(1e-9), 0.0)
        yield {
            "part": "patterns",
            "activation": name,
            "l2": penalty,
            "layer": layer + 1,
            "units": WIDTHS[layer + 1],
            "estimator": label,
            "seeds": len(found),
            "compression": round(float(compression.mean()), 4),
            "compression_deviation": round(float(compression.std()), 4),
            "compressed_by_a_twentieth": int((compression > 0.05).sum()),
            "inputs": both[..., 0].mean(0).round(3).tolist(),
            "labels": both[..., 1].mean(0).round(3).tolist(),
            "correlation": correlation(compression, scores[1][: len(found)]),
            "train": round(float(scores[0].mean()), 4),
            "test": round(float(scores[1].mean()), 4),
            "tests": [round(float(score), 4) for score in scores[1]],
        }


def correlation(compression: np.ndarray, test: np.ndarray) -> float | None:
    """Spearman's, of seeds; None where one of both is the same for all."""
    if np.ptp(compression) == 0 or np.ptp(test) == 0:
        return None
    return round(float(spearmanr(compression, test).statistic), 3)


def small_networks():
    for penalty, names in ((0.0, ACTIVATIONS), (PENALTY, PENALIZED)):
        for name in names:
            yield from setting(name, penalty)


# ---------------------------------------------------------------- LeNet-300-100


def lenet():
    """The plane of the given network's layers on 4,096 test images: untrained, as given, and pruned in rounds."""
    datasets, models = real_data()
    split = {}
    for part in ("train", "test"):
        images, labels = datasets.load("mnist", part)
        split[part] = (models.inputs("lenet300", images), torch.from_numpy(labels).long())
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
            softmax=nn.Softmax(1),
        )
    )
    schedule = tn.Schedule(epochs=2, lr=0.05, weight_decay=1e-4)
    yield from looked_at("untrained", 1.0, tn.Task(model.eval(), **split, schedule=schedule))
    model.load_state_dict(models.load("lenet300").state_dict())
    task = tn.Task(model, **split, schedule=schedule)
    yield from looked_at("as given", 1.0, task)
    logits = replace(task, model=model[:-1])
    draft = Draft.of_model(logits.model)
    for part in Prune(0.01, 4, 2).parts():
        draft = part(draft, logits)
        pruned = nn.Sequential(OrderedDict([*draft.module().named_children(), ("softmax", nn.Softmax(1))]))
        yield from looked_at(f"pruned, round {part.number}", 0.01 ** (part.number / 4), replace(task, model=pruned))


def looked_at(label: str, density: float, task: tn.Task):
    data = tuple(part[:4096] for part in task.test)
    estimators = {
        "adaptive bins": ebab,
        "aKDE, lower": lambda t, y: akde(t, y)[0],
        "aKDE, upper": lambda t, y: akde(t, y)[1],
        "aKDE at a noise of 0.1, lower": lambda t, y: akde(t, y, 0.1)[0],
        "aKDE at a noise of 0.1, upper": lambda t, y: akde(t, y, 0.1)[1],
    }
    for name, estimator in estimators.items():
        plane = InformationPlane(task, data, ("relu1", "relu2", "softmax"), estimator)
        plane.record(0)
        for point in plane.points:
            yield {
                "part": "lenet",
                "network": label,
                "density": round(density, 4),
                "accuracy": round(task.score(task.test), 4),
                "layer": point.layer,
                "estimator": name,
                "inputs": round(point.inputs, 3),
                "labels": round(point.labels, 3),
            }


PARTS = {"patterns": small_networks, "lenet": lenet}


def main() -> None:
    torch.set_num_threads(1)
    kept = earlier("information")
    for name in sys.argv[1:] or PARTS:
        rows = list(PARTS[name]())
        kept = [row for row in kept if row["part"] != name] + rows
        write("information", kept, epochs=EPOCHS, samples=4096, kernel_samples=KERNELS[1])


if __name__ == "__main__":
    main()

"""What each part of output-aware quantization earns: parts are added one by one at one size of the file.

Run: make bench NAME=ablation. The divergence from the float network (mean Kullback-Leibler, in thousandths of a nat)
and the accuracy, or the agreement, are those of the reopened file on the test inputs of ptq.py. The divergence tells
more, since accuracy moves by a fifth of a point between equal files.
"""

from dataclasses import replace

import numpy as np
import torch
from ptq import task_of
from table import write

from tersenet.artifact import Coding, load
from tersenet.draft import QUICK, Draft, artifact_of, dense_array
from tersenet.methods.feedback import diagonal, levels, paths
from tersenet.waterfilling import factors, layers
from tersenet.waterfilling.knowledge import Knowledge, outputs
from tersenet.waterfilling.layers import Waterfilling
from tersenet.waterfilling.search import Search
from tersenet.waterfilling.sensitivity import with_sensitivities

SIZES = {"resnet20": 66_000, "mobilenetv2": 1_600_000}
STATIC = Coding(("bits", "huffman", "rans"))


class Parts(Waterfilling):
    """`Waterfilling` with parts of it switched off."""

    feedback = steps = biased = trellis = True

    def at(self, c, rate=0.0):
        trees = {}
        biases = {n: dense_array(self.draft.tensors[n]).astype(np.float64) for n in self.shifts}
        for layer in self.layers:
            steps = layers.waterfilled(layer.metric, c, int(np.prod(layer.form.kernel)), layer.weight.shape)
            if not self.steps:  # the step of the middle column and row everywhere
                middle = float(np.exp(np.log(steps.dense()).mean()))
                zeros = [np.zeros_like(part) for part in (steps.rows, steps.channels, steps.places)]
                steps = replace(steps, scale=middle, rows=zeros[0], channels=zeros[1], places=zeros[2])
            metric = layer.metric
            if not self.feedback:
                metric = replace(metric, inputs=diagonal(metric.inputs)[..., None], outputs=metric.rows()[..., None])
            trellis = self.trellis and paths(layer.weight.shape[2])
            q = levels(layer.weight, metric, steps.parts(), rate, None, trellis)
            trees[layer.name] = layer.tree(q, steps, tuple(self.draft.tensors[layer.name].tree.shape))
            if self.biased and layer.bias is not None:
                error = layer.weight - q * steps.dense()
                biases[layer.bias] += (error @ layer.means[..., None]).reshape(-1)
        trees |= {name: layers.rounded(biases[name], c * unit) for name, unit in self.shifts.items()}
        return self.draft.with_trees(trees)


def without(waterfilling, *parts, layers=None):
    made = Parts(waterfilling.draft, layers or waterfilling.layers, waterfilling.shifts)
    for part in parts:
        object.__setattr__(made, part, False)
    return made


def relative(waterfilling):
    """The layers with metrics that know no gradients: equal relative errors of every layer's outputs."""

    def alone(layer):
        power = np.square(layer.weight @ layer.metric.inputs).sum(2).mean() + 1e-30
        rows = np.full((*layer.weight.shape[:2], 1), power**-0.5)
        return replace(layer, metric=replace(layer.metric, outputs=rows))

    return [alone(layer) for layer in waterfilling.layers]


def columns_only(waterfilling):
    metrics = [replace(layer.metric, outputs=layer.metric.rows()[..., None]) for layer in waterfilling.layers]
    return [replace(layer, metric=metric) for layer, metric in zip(waterfilling.layers, metrics, strict=True)]


def variants(knowledge, weigh):
    """(label, waterfilling, rate, coding) from the plainest to all parts."""
    whole, shrunk = Waterfilling.of(knowledge), factors.shrunk
    factors.shrunk = lambda one, other, shared=False: (one + other) / 2
    full = Waterfilling.of(knowledge)
    spatial, layers.spatial = layers.spatial, lambda shape: False
    untransformed = Waterfilling.of(knowledge)
    layers.spatial, factors.shrunk = spatial, shrunk

    flat, dct = relative(untransformed), relative(full)
    plain, scalar = ("biased", "trellis"), ("trellis",)
    yield (
        "rounding, one step a layer, static codes",
        without(full, "feedback", "steps", *plain, layers=flat),
        0.0,
        STATIC,
    )
    yield "+ error feedback over columns", without(full, "steps", *plain, layers=flat), 0.0, STATIC
    yield "+ waterfilled steps", without(full, *plain, layers=flat), 0.0, STATIC
    yield "+ DCT of kernels", without(full, *plain, layers=dct), 0.0, STATIC
    yield "+ context coding", without(full, *plain, layers=dct), 0.0, QUICK
    yield "+ rate-aware levels", without(full, *plain, layers=dct), 0.5, QUICK
    yield "+ biases that take up the mean error", without(full, *scalar, layers=dct), 0.5, QUICK
    yield "+ one global step in the Fisher metric", without(full, *scalar, layers=columns_only(full)), 0.5, QUICK
    yield "+ error feedback over rows", without(full, *scalar), 0.5, QUICK
    yield "+ moments shrunk as far as their halves disagree", without(whole, *scalar), 0.5, QUICK
    yield "+ trellis", whole, 0.5, QUICK
    yield "+ layers weighed by what their errors cost", Waterfilling.of(weigh(knowledge, whole)), 0.5, QUICK


def divergence(wanted, found):
    p, q = wanted.double().log_softmax(1), found.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def said(task, draft, batches):
    return torch.cat([part[0] for part in outputs(task, draft.module(), batches)])


def measure(name):
    torch.set_num_threads(1)
    task, most = task_of(name), SIZES[name]
    x = task.test[0]
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    knowledge = Knowledge.of(Draft.of_model(task.model), task)
    batches = list(x.split(100))
    wanted = said(task, knowledge.draft, batches)
    search = Search(most, QUICK)

    def row(label, draft, size):
        found = said(task, draft, batches)
        accuracy = task.score(task.test, load(artifact_of(draft, search.coding).to_bytes()).into(task.model))
        task.model.load_state_dict(state)
        made = {"network": name, "method": label, "bytes": size, "accuracy": round(accuracy, 4)}
        made["divergence"] = round(1000 * divergence(wanted, found), 2)
        print(made, flush=True)
        return made

    for label, waterfilling, rate, coding in variants(
        knowledge, lambda known, first: with_sensitivities(known, first, search.c)
    ):
        search.coding = coding
        yield row(label, *search.finest(waterfilling, rate, label))


if __name__ == "__main__":
    write("ablation", [row for name in SIZES for row in measure(name)])

"""Shared weights, vector codes and filters: every method at three sizes, with and without its training.

Run: python bench/codes.py [PART [NETWORK [METHOD ...]]] with parts table, published, clusters, filter, coders and
palettes; without arguments all of them. Rows that are not run again are kept. Whole-file bytes, accuracy of the
reopened file on the test split. Training sees IMAGES of the training split, varied as those who trained the networks
varied them, for few epochs: what a method reaches with the authors' schedules is not what stands here, but all have the
same. ResNet-20 trains in bfloat16. Seconds of the table are of CPU time.

table: lenet300, lenet5, resnet20, and products on squeezenet11 (agreement with itself on 300 images). published: the
authors' own files taken in without loss. clusters: k-means of vectors against scikit-learn's. filter: Bloomier filters
by their layout. coders: what codes make of the same dithered integers. palettes: what k-means for groups of channels
costs, by how its indices are stored.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from augmentation import cropped, shifted
from bfloat16 import load as quick
from ptq import task_of as agreement
from table import put, real_data
from universal_coders import ctw, lzw

import tersenet as tn
from tersenet.artifact import Artifact, Tensor
from tersenet.bloomier import built, queried
from tersenet.codecs import CODECS
from tersenet.draft import round_leaves
from tersenet.methods.fixed_point import FixedPoint, Ternary
from tersenet.methods.kmeans import KMeans
from tersenet.methods.product import Product, shared
from tersenet.packed import Codebook, Sparse, arrays, is_integer, narrowed
from tersenet.run import Recipe
from tersenet.stages.finetune import Distill
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune

SEED = 0
IMAGES = {"lenet300": 20_000, "lenet5": 10_000, "resnet20": 4_000, "squeezenet11": 200}
RATE = {"lenet300": 0.05, "lenet5": 0.02, "resnet20": 0.02}


def product(bits: int, epochs: int, weighted: bool = True, feedback: bool = False) -> Recipe:
    """Product quantization of all layers at once, distilled at the end."""
    rules = (("least:1000", Product(bits, weighted=weighted, feedback=feedback)),)
    everything = (Pack(KMeans(8), rules), Distill(epochs, lr=0.005)) if epochs else (Pack(KMeans(8), rules),)
    return (*everything, Narrow())


# By method: three settings, and the recipe of a setting and of so many epochs (0: without training).
METHODS: dict[str, tuple[tuple[Any, ...], Callable[[Any, int], Recipe]]] = {
    "k-means": ((5, 4, 3), lambda b, e: (Pack(KMeans(int(b))), *([Distill(e, lr=0.005)] if e else []), Narrow())),
    "k-means, groups of 8 channels": (
        (4, 3, 2),
        lambda b, e: (Pack(KMeans(int(b), group=8)), *([Distill(e, lr=0.005)] if e else []), Narrow()),
    ),
    "DKM": ((4, 3, 2), lambda b, e: tn.papers.dkm(int(b), epochs=e)),
    "DKM, vectors": ((8, 6, 4), lambda b, e: tn.papers.dkm(int(b), vectors=True, epochs=e)),
    "product, plain": ((8, 6, 4), lambda b, e: product(int(b), e, weighted=False)),
    "product, metric of the inputs": ((8, 6, 4), lambda b, e: product(int(b), e)),
    "product, error feedback": ((8, 6, 4), lambda b, e: product(int(b), e, feedback=True)),
    "And the Bit Goes Down": ((8, 6, 4), lambda b, e: tn.papers.bit_goes_down(int(b), epochs=min(e, 1), final=e)),
    "SLQ": ((5, 4, 3), lambda b, e: tn.papers.slq(int(b), epochs=e)),
    "MLQ": ((1, 2, 4), lambda r, e: tn.papers.mlq(int(r), epochs=e)),
    "INQ": ((5, 4, 3), lambda b, e: tn.papers.inq(int(b), epochs=e)),
    "LSQ": ((4, 3, 2), lambda b, e: tn.papers.lsq(int(b), epochs=2 * e)),
    "fixed point": ((8, 5, 4), lambda b, e: (Pack(FixedPoint(int(b))), Narrow())),
    "fixed point, activations of 8 bits": (
        ("8/5", "8/4", "4/2"),  # of weights in convolutional and linear layers
        lambda s, e: tn.papers.fixed_point(*map(int, s.split("/"))),
    ),
    "fixed point 8/5, activations": ((8, 6, 4), lambda w, e: tn.papers.fixed_point(width=int(w))),
    "low precision": ((16, 8, 6), lambda b, e: tn.papers.low_precision(int(b), epochs=4 * e)),
    "ternary (TWN)": ((0, 1), lambda r, e: (Pack(Ternary(bool(r))), Narrow())),
    "transform coding": ((8, 6, 5), lambda b, e: tn.papers.transform_coding(int(b))),
    "universal, 1 dimension": ((0.2, 0.1, 0.05), lambda d, e: tn.papers.universal(d, 4, 1, rounds=3, epochs=e)),
    "universal, 2 dimensions": ((0.2, 0.1, 0.05), lambda d, e: tn.papers.universal(d, 4, 2, rounds=3, epochs=e)),
    "universal, no dither": ((0.2, 0.1, 0.05), lambda d, e: tn.papers.universal(d, 4, 1, False, rounds=3, epochs=e)),
    "Weightless": ((0.1, 0.05, 0.03), lambda d, e: tn.papers.weightless(d, 3, 8, rounds=3, epochs=e)),
    "pruning, k-means": ((0.1, 0.05, 0.03), lambda d, e: tn.papers.deep_compression(d, 3, rounds=3, epochs=e)),
    "HashedNets": ((0.125, 0.0625, 0.03125), lambda d, e: tn.papers.hashed_nets(d, epochs=4 * e)),
}
UNTRAINED = ("HashedNets", "DKM", "DKM, vectors", "low precision")  # mean nothing without training
NEVER = (
    "fixed point", "fixed point, activations of 8 bits", "fixed point 8/5, activations", "ternary (TWN)",
    "transform coding",
)  # train nothing  # fmt: skip
PRUNED = (
    "universal, 1 dimension", "universal, 2 dimensions", "universal, no dither", "Weightless", "pruning, k-means",
)  # whose setting is a density  # fmt: skip
EPOCHS = 2


def task_of(name: str) -> tn.Task:
    if name == "squeezenet11":
        return agreement(name)
    datasets, models = real_data()
    objects = name == "resnet20"
    split, data = {}, "cifar10" if objects else "mnist"
    for part, count in (("train", IMAGES[name]), ("test", None)):
        images, labels = datasets.load(data, part, *([count] if count else []))
        split[part] = (models.inputs(name, images), torch.from_numpy(labels).long())
    schedule = tn.Schedule(epochs=EPOCHS, lr=RATE[name])
    model = quick(name) if objects else models.load(name)
    return tn.Task(model, **split, schedule=schedule, augment=cropped if objects else shifted)


def table(networks: list[str], methods: list[str]) -> Iterator[dict[str, object]]:
    for network in networks or list(IMAGES):
        task = task_of(network)
        reference = task.score(task.test)
        every = [name for name in METHODS if network != "squeezenet11" or name.startswith("product")]
        for method in methods or every:
            settings, recipe = METHODS[method]
            if network == "squeezenet11":
                settings = (12, 10, 8)  # fewer codewords leave little of it, and 200 images cannot bring it back
            elif network == "resnet20" and method in PRUNED:
                settings = (0.5, 0.3, 0.2)  # it has none of the LeNets' weights to spare
            for setting in settings:
                for epochs in (0, EPOCHS):
                    if (method in UNTRAINED and not epochs) or (method in NEVER and epochs):
                        continue
                    began = time.process_time()
                    with tempfile.TemporaryDirectory() as folder:
                        done = tn.compress(task, recipe(setting, epochs), folder=folder)
                    yield {
                        "part": "table", "network": network, "method": method, "setting": setting, "epochs": epochs,
                        "bytes": done.artifact.nbytes, "accuracy": round(done.after or 0.0, 4),
                        "reference": round(reference, 4), "seconds": round(time.process_time() - began, 1),
                    }  # fmt: skip


def published(*_: list[str]) -> Iterator[dict[str, object]]:
    """The authors' files as the trees that they are, bit for bit."""
    real_data()
    from published import BYTES, deep_compression, product_quantized

    layers, biases = deep_compression()
    tensors = {name: Tensor(bias) for name, bias in biases.items()}
    for name, (mask, index, codewords) in layers.items():
        tensors[f"{name}.weight"] = Tensor(Sparse(mask, Codebook(index, codewords[:, None])))
    yield {"network": "SqueezeNet of Deep Compression", **_stored(tensors), "published": BYTES["deep_compression"]}
    for depth in (18, 50):
        layers, rest = product_quantized(depth)
        tensors = {n: Tensor(np.asarray(a), str(a.dtype)) for n, a in rest.items()}
        for name, (index, codewords) in layers.items():
            tensors[f"{name}.weight"] = Tensor(Codebook(index, codewords.astype(np.float32)))
        network = f"ResNet-{depth} of And the Bit Goes Down"
        yield {"network": network, **_stored(tensors), "published": BYTES[f"product_quantized_{depth}"]}


def _stored(tensors: dict[str, Tensor]) -> dict[str, object]:
    began = time.monotonic()
    data = Artifact(tensors).to_bytes()
    coded, began = time.monotonic() - began, time.monotonic()
    opened = tn.load(data)
    decoded = time.monotonic() - began
    same = all(np.array_equal(opened.tensors[n].unpack(), tensor.unpack()) for n, tensor in tensors.items())
    return {
        "part": "published", "bytes": len(data), "same_weights": same, "encoding_seconds": round(coded, 2),
        "decoding_seconds": round(decoded, 3),
    }  # fmt: skip


def clusters(*_: list[str]) -> Iterator[dict[str, object]]:
    """Ten steps of k-means: 2 million vectors of 4 values, 256 clusters, both from the same beginning, in rounds."""
    from sklearn.cluster import KMeans as Peer

    vectors = np.random.default_rng(SEED).standard_normal((2_000_000, 4)).astype(np.float32)
    seconds: dict[str, list[float]] = {"tersenet": [], "scikit-learn": []}
    for _ in range(3):
        begins = vectors[np.sort(np.random.Generator(np.random.PCG64(SEED)).choice(len(vectors), 256, replace=False))]
        began = time.monotonic()
        shared(vectors, 256, 10, SEED)
        seconds["tersenet"].append(time.monotonic() - began)
        began = time.monotonic()
        Peer(256, init=begins, n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(vectors)
        seconds["scikit-learn"].append(time.monotonic() - began)
    for method, found in seconds.items():
        row = {"part": "clusters", "method": method, "seconds": round(statistics.median(found), 2)}
        yield row | ({"peer": True} if method == "scikit-learn" else {})


def filters(*_: list[str]) -> Iterator[dict[str, object]]:
    """Cells a key of both layouts, and the speed of one core, by CPU time."""
    draw = np.random.default_rng(SEED)
    for count in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        keys = np.sort(draw.choice(10 * count, count, replace=False))
        values = draw.integers(0, 8, count)
        for layout, windows in (("segments in a row", None), ("three blocks", 1)):
            began = time.thread_time()
            cells, seed, length = built(keys, values, 8, windows=windows)
            built_in, began = time.thread_time() - began, time.thread_time()
            queried(cells, 10 * count, seed, length, 8)
            rate = 10 * count / (time.thread_time() - began) / 1e6
            yield {
                "part": "filter", "method": layout, "keys": count, "cells_per_key": round(len(cells) / count, 4),
                "build_seconds": round(built_in, 3), "million_keys_per_second": round(rate, 1),
            }  # fmt: skip


def coders(*_: list[str]) -> Iterator[dict[str, object]]:
    """Files of the same trees by code: a LeNet-5, pruned to a tenth, on a dithered and on a plain lattice."""
    _, models = real_data()
    task = tn.Task(models.load("lenet5"))
    pruned = Prune(0.1, 1, retrain="none")(tn.draft.Draft.of_model(task.model), None)
    for dithered in (True, False):
        made = tn.papers.universal(0.1, 5, 1, dithered)[1](pruned, None)
        for codec in ("deflate", "bzip2", "lzma", "huffman", "rans", "context", "all"):
            coding = tn.Coding() if codec == "all" else tn.Coding(("bits", codec))
            size = tn.draft.artifact_of(made, coding).nbytes
            yield {"part": "coders", "network": "lenet5", "dithered": dithered, "method": codec, "bytes": size}
        plain = tn.draft.artifact_of(made, tn.Coding(("bits",)))
        integers = [
            a for tensor in plain.tensors.values() for _, a in arrays(tensor.tree) if is_integer(a) and a.size > 1
        ]
        for name, coder in (("LZW", lzw), ("context-tree weighting", ctw)):
            saved = sum(max(0, len(CODECS["bits"].encode(array)) - len(_coded(coder, array))) for array in integers)
            yield {
                "part": "coders", "network": "lenet5", "dithered": dithered, "method": name,
                "bytes": plain.nbytes - saved, "peer": True,
            }  # fmt: skip


def _coded(coder: Callable[[list[int], int], bytes], array: np.ndarray) -> bytes:
    low, high = int(array.min()), int(array.max())
    return coder((array.astype(np.int64) - low).reshape(-1).tolist(), high - low + 1)


def palettes(*_: list[str]) -> Iterator[dict[str, object]]:
    """Files of ResNet-20's weights in values that layers share, or groups of 8 channels, and how much these err."""
    _, models = real_data()
    draft = tn.draft.Draft.of_model(models.load("resnet20"))
    weights = {name: np.asarray(draft.tensors[name].tree) for name in draft.weights()}
    power = sum(float(np.square(w, dtype=np.float64).sum()) for w in weights.values())
    for bits in (4, 3):
        whole = {n: KMeans(bits).pack(w) for n, w in weights.items()}
        groups = {n: KMeans(bits, group=8).pack(w) for n, w in weights.items()}
        forms = {"values of a layer": whole, "values of groups": groups}
        forms["values of groups, numbered through"] = {
            n: Codebook(narrowed(tree.numbers()), tree.codewords.reshape(-1, 1)) if tree.codewords.ndim > 2 else tree
            for n, tree in groups.items()
        }
        forms["values of groups, arrays apart"] = {
            f"{n}.{at}": KMeans(bits).pack(w[at : at + 8]) if len(w) % 8 == 0 else KMeans(bits, group=8).pack(w)
            for n, w in weights.items() for at in (range(0, len(w), 8) if len(w) % 8 == 0 else (0,))
        }  # fmt: skip
        for method, trees in forms.items():
            row = {"part": "palettes", "network": "resnet20", "method": method, "setting": bits}
            row["bytes"] = Artifact({n: Tensor(round_leaves(tree)) for n, tree in trees.items()}).nbytes
            if method in ("values of a layer", "values of groups"):
                lost = sum(float(np.square(trees[n].unpack() - w, dtype=np.float64).sum()) for n, w in weights.items())
                row["error"] = round(lost / power, 5)
            yield row


PARTS: dict[str, Callable[..., Iterator[dict[str, object]]]] = {
    "table": table, "published": published, "clusters": clusters, "filter": filters, "coders": coders,
    "palettes": palettes,
}  # fmt: skip
KEYS = ("part", "network", "method", "setting", "epochs", "keys", "dithered")


def main(part: str | None = None, network: str | None = None, *methods: str) -> None:
    def order(row: dict[str, object]) -> list[str]:
        return [str(row.get(key, "")) for key in KEYS]

    for name in [part] if part else PARTS:
        for row in PARTS[name]([network] if network else [], list(methods)):
            put("codes", row, KEYS, order, SEED, images=IMAGES, epochs=EPOCHS)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    main(*sys.argv[1:])

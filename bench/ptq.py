"""Quantization without retraining against the ISO codec and what people use today: bytes against accuracy.

Run: NNC_PYTHON=ENV/bin/python make bench NAME=ptq (or: python bench/ptq.py NETWORK ...). Whole-file bytes, accuracy of
the reopened file: test accuracy for MNIST and CIFAR-10, agreement of top-1 with the float network on 300 images for the
ImageNet networks, which are calibrated on 200 others. Settings of the peers stand in each row. How to make the peer's
environment stands in nnc_peer.py; without NNC_PYTHON its rows are kept from the last run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zstandard
from table import ROOT, earlier, in_rounds, real_data, write

import tersenet as tn
from tersenet.artifact import load
from tersenet.calibrate import moments
from tersenet.draft import Draft, artifact_of
from tersenet.likelihood import Likelihood
from tersenet.methods.feedback import Metric, levels
from tersenet.methods.kmeans import KMeans
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.search import to_size

DATA = {"lenet300": "mnist", "lenet5": "mnist", "resnet20": "cifar10", "resnet56": "cifar10"}
SIZES = {  # bytes to be met, spanning what the ISO codec needs at the same accuracy
    "lenet300": (10_000, 16_000, 20_000, 24_000, 28_000, 34_000, 46_000, 60_000),
    "lenet5": (10_000, 13_000, 16_000, 24_000, 30_000, 36_000, 52_000, 75_000),
    "resnet20": (45_000, 51_000, 57_000, 66_000, 72_000, 80_000, 88_000, 95_000),
    "resnet56": (110_000, 130_000, 150_000, 176_000, 200_000, 235_000),
    "squeezenet11": (300_000, 370_000, 440_000, 480_000, 520_000, 560_000, 600_000, 720_000),
    "mobilenetv2": (1_000_000, 1_200_000, 1_400_000, 1_600_000, 1_800_000, 2_100_000),
}
STEPS = ("-18", "-20", "-22", "-24", "-26", "-30", "-34", "-38")


def task_of(name: str) -> tn.Task:
    datasets, models = real_data()
    model = models.load(name)
    if name in DATA:
        (x, y), (u, v) = (datasets.load(DATA[name], split) for split in ("train", "test"))
        x, u = models.inputs(name, x[:1024]), models.inputs(name, u)
        train, test = (x, torch.from_numpy(y[:1024]).long()), (u, torch.from_numpy(v).long())
        return tn.Task(model, train, test, valid=train)
    x = models.inputs(name, datasets.load("imagenet", "train")[0])
    with torch.no_grad():
        said = torch.cat([model(part).argmax(1) for part in x.split(50)])
    return tn.Task(model, (x[:200], said[:200]), (x[200:], said[200:]), valid=(x[:200], said[:200]))


class Bench:
    def __init__(self, name: str) -> None:
        self.name, self.task = name, task_of(name)
        self.state = {n: t.clone() for n, t in self.task.model.state_dict().items()}
        self.floats = {n: t.numpy() for n, t in self.state.items() if t.is_floating_point()}
        self.reference = self.task.score(self.task.test)
        self.rows: list[dict[str, object]] = []

    def row(self, method: str, size: int, state: dict[str, np.ndarray], **more: object) -> None:
        given = {n: torch.from_numpy(np.array(a)) for n, a in state.items()}
        merged = {n: given[n].reshape(t.shape) if n in given else t for n, t in self.state.items()}
        self.task.model.load_state_dict(merged)
        accuracy = self.task.score(self.task.test)
        row = {"network": self.name, "method": method, "bytes": size, "accuracy": round(accuracy, 4)}
        self.rows.append({**row, "reference": round(self.reference, 4), **more})
        print(self.rows[-1], flush=True)

    def ours(self) -> None:
        self.task.model.load_state_dict(self.state)
        began = time.monotonic()
        knowledge = Knowledge.of(Draft.of_model(self.task.model), self.task)
        gathering = time.monotonic() - began
        files = []
        for size in SIZES[self.name]:
            began = time.monotonic()
            data = artifact_of(to_size(knowledge, size)).to_bytes()
            seconds = gathering + time.monotonic() - began
            files.append(data)
            self.row("tersenet", len(data), load(data).unpack(), asked=size, seconds=round(seconds, 1))
        told = in_rounds([lambda data=data: load(data).unpack() for data in files])
        for row, (clock, spent) in zip(self.rows, told, strict=True):
            row |= {"decode_seconds": round(clock, 5), "decode_cpu_seconds": round(spent, 5)}

    def nnc(self, python: str) -> None:
        for method, state, back in (("NNC", self.floats, dict), ("NNC, BatchNorm folded", *self.folded_norms())):
            if state is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                np.savez(Path(folder) / "state.npz", **state)
                command = [python, str(ROOT / "bench/nnc_peer.py"), f"{folder}/state.npz", folder, *STEPS]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                for line in done.stdout.splitlines():
                    said = json.loads(line)
                    with np.load(Path(folder) / f"qp{said['qp']}.npz") as opened:
                        decoded = back({n: opened[n] for n in opened.files})
                    more = {"peer": True, "settings": f"qp {said['qp']}, nonweight_qp -40, dependent quantization"}
                    more["decode_seconds"] = round(said["decode_clock"], 5)
                    more["decode_cpu_seconds"] = round(said["decode"], 5)
                    self.row(method, said["bytes"], decoded, **more)

    def folded_norms(self):
        """The state with each BatchNorm as scale and shift, as the codec's own folding stores it, and the way back."""
        names = [n.removesuffix(".running_mean") for n in self.floats if n.endswith(".running_mean")]
        if not names:
            return None, None
        state = {n: a for n, a in self.floats.items() if not any(n.startswith(f"{m}.") for m in names)}
        for n in names:
            gamma, beta, mean, var = (
                self.floats[f"{n}.{p}"] for p in ("weight", "bias", "running_mean", "running_var")
            )
            state[f"{n}.weight"] = gamma / np.sqrt(var + 1e-5)
            state[f"{n}.bias"] = beta - mean * state[f"{n}.weight"]

        def back(decoded):
            for n in names:
                decoded[f"{n}.running_mean"] = np.zeros_like(decoded[f"{n}.bias"])
                decoded[f"{n}.running_var"] = np.full_like(decoded[f"{n}.bias"], 1 - 1e-5)
            return decoded

        return state, back

    def everyday(self) -> None:
        """Rounding to 4 and 8 bits, 4-bit k-means, GPTQ at 4 and 3 bits per channel, each followed by zstd -19."""
        self.task.model.load_state_dict(self.state)
        known = Likelihood.of(self.task)
        found = moments(self.task, self.task.model, self.task.calibration(1024), known)

        def scaled(w, bits, axis):
            return np.maximum(np.abs(w).max(axis=axis, keepdims=axis is not None), 1e-12) / (2 ** (bits - 1) - 1)

        def rounding(name, w, bits):
            step = scaled(w, bits, None)
            q = np.rint(w / step)
            return q, [step], q * step

        def clusters(name, w, bits):
            tree = KMeans(bits).pack(w)
            return np.asarray(tree.index), [tree.codewords], tree.unpack()

        def gptq(name, w, bits):
            step = scaled(w, bits, tuple(range(1, w.ndim)))
            if name not in found:
                return np.rint(w / step), [step], np.rint(w / step) * step
            a = found[name].inputs[:, 0]
            groups, n = len(a), a.shape[1]
            damp = 0.01 * a.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-9
            rows = w.astype(np.float64).reshape(groups, len(w) // groups, n)
            metric = Metric(torch.linalg.cholesky(a + damp * torch.eye(n)).numpy(), np.ones((*rows.shape[:2], 1)))
            most = 2 ** (bits - 1) - 1
            steps = step.astype(np.float64).reshape(rows.shape[:2]), np.ones(n)
            q = np.clip(levels(rows, metric, steps, 0.0), -most - 1, most).reshape(w.shape)
            return q, [step], q * step

        peers = {"rounding 8 bit + zstd": (rounding, 8), "rounding 4 bit + zstd": (rounding, 4)}
        peers |= {"k-means 4 bit + zstd": (clusters, 4), "GPTQ 4 bit + zstd": (gptq, 4), "GPTQ 3 bit + zstd": (gptq, 3)}
        for method, (pack, bits) in peers.items():
            streams, state = [], {}
            for name, w in self.floats.items():
                if w.ndim < 2:
                    streams.append(w.astype("<f4").tobytes())
                    state[name] = w
                    continue
                q, tables, dense = pack(name, w, bits)
                q = (q - q.min()).astype(np.uint8).reshape(-1)
                packed = q if bits > 4 else np.append(q, [0] * (q.size % 2)).reshape(-1, 2) @ np.array([1, 16])
                streams += [packed.astype(np.uint8).tobytes(), *(np.asarray(t, "<f4").tobytes() for t in tables)]
                state[name] = dense.astype(np.float32)
            size = len(zstandard.ZstdCompressor(level=19).compress(b"".join(streams)))
            self.row(method, size, state, peer=True, settings="weights per tensor (GPTQ per channel), the rest float32")


def ratios(rows) -> dict[str, float]:
    """Per network: geometric mean, over the ISO codec's points, of our bytes to its best bytes at equal accuracy."""
    found = {}
    for network in dict.fromkeys(r["network"] for r in rows):
        ours, peer = (
            sorted((r["bytes"], r["accuracy"]) for r in rows if r["network"] == network and r["method"].startswith(m))
            for m in ("tersenet", "NNC")
        )
        if not ours or not peer:
            continue
        reached = np.maximum.accumulate([a for _, a in ours])
        best, at = np.unique(reached, return_index=True)  # the smallest file of each accuracy
        ours, logs, top = [ours[k] for k in at], [], -1.0
        for size, accuracy in peer:
            if accuracy > top and best[0] <= accuracy <= best[-1]:
                logs.append(np.interp(accuracy, best, np.log([b for b, _ in ours])) - np.log(size))
            top = max(top, accuracy)
        if logs:
            found[network] = round(float(np.exp(np.mean(logs))), 3)
    return found


def speeds(rows) -> dict[str, float]:
    """Per network: how many times as fast as the ISO codec's decoder we are, at its point where that is least.

    By the clock, against the smallest file of ours that is at least as accurate.
    """
    found = {}
    for network in dict.fromkeys(r["network"] for r in rows):
        ours = sorted(of(rows, network, "tersenet"), key=lambda r: r["bytes"])
        ratios = []
        for peer in of(rows, network, "NNC"):
            reach = [r["decode_seconds"] for r in ours if r["accuracy"] >= peer["accuracy"]]
            if reach and peer["accuracy"] >= min(r["accuracy"] for r in ours):
                ratios.append(peer["decode_seconds"] / reach[0])
        if ratios:
            found[network] = round(min(ratios), 2)
    return found


def of(rows, network: str, method: str):
    return [r for r in rows if r["network"] == network and r["method"].startswith(method)]


def main(names: list[str]) -> None:
    for name in names:
        bench = Bench(name)
        bench.ours()
        bench.everyday()
        if os.environ.get("NNC_PYTHON"):
            bench.nnc(os.environ["NNC_PYTHON"])
        keep(bench)


def keep(bench: Bench) -> None:
    """Put one network's rows into the table, so that a run that is stopped loses nothing."""
    kept = earlier("ptq")
    if not os.environ.get("NNC_PYTHON"):
        bench.rows += [r for r in kept if r["network"] == bench.name and str(r["method"]).startswith("NNC")]
    kept = [r for r in kept if r["network"] != bench.name] + bench.rows
    found = ratios(kept)
    mean = round(float(np.exp(np.mean(np.log(list(found.values()))))), 3) if found else None
    fast = speeds(kept)
    write("ptq", kept, 0, bytes_to_nnc_at_equal_accuracy=found, geometric_mean=mean, least_speed_over_nnc=fast)
    print(found, mean, fast)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SIZES))

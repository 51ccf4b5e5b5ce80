"""A sentence encoder and a character LSTM, without retraining: bytes against Spearman and against nats a character.

Run: python bench/sequence.py [NETWORK [PART [SIZE ...]]], with networks and parts from PARTS; NNC's parts need
NNC_PYTHON=ENV/bin/python (nnc_peer.py says how to make it). Rows that are not run again are kept. MiniLM needs its
package, which minilm.py says how to install.

minilm: all-MiniLM-L6-v2, Spearman of cosine and score over the 1,379 pairs of the STS benchmark's test split; what
needs data has 512 sentences of its training split. Files hold all 90.9 MB of the encoder.
charlstm: nats a character of 64 rows of 257 characters from position 500,000, the first 64 as warm-up. Training and
calibration leave these rows out; the given network had presumably seen them.

"data" and "arrays" are ours with and without data, each file made by a process of its own, whose peak memory is told;
seconds hold the measuring before and after. "pruned" is retrained. Peers' weights are of two axes or more; what else is
float stays float32. Their levels are one stream of zstd -19, the rest is another.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import minilm
import numpy as np
import torch
import torch.nn.functional as F
import zstandard
from scipy.stats import spearmanr
from table import DATA, ROOT, put, real_data

import tersenet as tn
from tersenet.journal import memory
from tersenet.stages.pack import Narrow
from tersenet.stages.prune import Prune

SIZES = {  # bytes; for MiniLM 8, 6, 4, 3 and 2.5 bits a weight are 22.7, 17.0, 11.4, 8.5 and 7.1 MB
    "minilm": (22_700_000, 17_000_000, 11_400_000, 8_500_000, 8_000_000, 7_000_000, 6_200_000, 5_500_000),
    "charlstm": (280_000, 210_000, 140_000, 105_000, 88_000, 70_000, 53_000),
}
STEPS = {"minilm": (-38, -34, -30, -26, -24, -22, -20, -18), "charlstm": (-38, -34, -30, -26, -22, -20, -18, -16, -14)}
KEY = {"minilm": "accuracy", "charlstm": "nats"}
SENTENCES, BATCH = 512, 16
TESTED, ROWS, ROW, WARM = 500_000, 64, 257, 64  # of the text: where the evaluated rows begin, how many and how long
DENSITY, ROUNDS, EPOCHS, LAST, RATE = (
    0.1,
    4,
    3,
    9,
    0.006,
)  # of pruning: what stays, rounds, epochs of each and of the last
CHOSEN = 800_000  # where rows as many begin that choices are made on

# ---------------------------------------------------------------- tasks


def spearman(embeddings: torch.Tensor, targets: torch.Tensor) -> float:
    """Of the pairs' cosines and scores; targets [sentences, 2] are the number of the pair and its score."""
    order = targets[:, 0].argsort(stable=True)
    first, second = embeddings[order].unflatten(0, (-1, 2)).unbind(1)
    return float(spearmanr((first * second).sum(1), targets[order][::2, 1]).statistic)


def batches(sentences: list[str], targets: torch.Tensor) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches of sentences about as long as each other, padded to their longest, in a mixed order."""
    given = minilm.tokens(sentences)
    lengths = given["attention_mask"].sum(1)
    parts = lengths.argsort(stable=True).split(BATCH)
    mixed = [parts[k] for k in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))]
    return [({n: t[p, : int(lengths[p].max())] for n, t in given.items()}, targets[p]) for p in mixed]


def pairs(split: str, count: int | None = None) -> tuple[list[str], torch.Tensor]:
    """Sentences and the metric's targets of a split's pairs, or of some of them, drawn by a fixed seed."""
    with open(DATA / f"stsb/stsb-en-{split}.csv", encoding="utf8", newline="") as file:
        rows = list(csv.reader(file))
    if count is not None:
        rows = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))[:count]]
    scored = [(number, float(row[2])) for number, row in enumerate(rows) for _ in range(2)]
    return [sentence for row in rows for sentence in row[:2]], torch.tensor(scored, dtype=torch.float64)


def encoder() -> tn.Task:
    """MiniLM; in training the targets are the float network's own embeddings, so that outputs are Gaussian."""
    model = minilm.load()
    valid = batches(*pairs("train", SENTENCES // 2))
    with torch.inference_mode():
        train = [(inputs, model(**inputs).clone()) for inputs, _ in valid]
    return tn.Task(
        model,
        train=train,
        valid=valid,
        test=batches(*pairs("test")),
        loss=F.mse_loss,
        metric=tn.Metric(spearman, over="split"),
        likelihood="gaussian",
    )


def nats(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs[:, :, WARM:], targets[:, WARM:])


def characters(schedule: tn.Schedule | None = None, length: int = 128) -> tn.Task:
    """The character LSTM; it trains on rows of `length` outside those that are measured and chosen on."""
    _, models = real_data()
    ids = models.characters((DATA / "text/shakespeare.txt").read_text(encoding="utf8"))
    kept = [ids[:TESTED], ids[TESTED + ROWS * ROW : CHOSEN], ids[CHOSEN + ROWS * ROW :]]
    train = torch.cat([part[: len(part) // (length + 1) * (length + 1)].view(-1, length + 1) for part in kept])
    test, valid = (ids[at : at + ROWS * ROW].view(ROWS, ROW) for at in (TESTED, CHOSEN))
    return tn.Task(
        models.load("charlstm"),
        **{name: (x[:, :-1], x[:, 1:]) for name, x in (("train", train), ("valid", valid), ("test", test))},
        metric=tn.Metric(nats, better="less"),
        forward=lambda model, inputs: model(inputs).transpose(1, 2),  # classes on axis 1
        schedule=schedule or tn.Schedule(),
    )


TASKS: dict[str, Callable[[], tn.Task]] = {"minilm": encoder, "charlstm": characters}

# ---------------------------------------------------------------- peers


Pack = Callable[[str, np.ndarray], tuple[bytes, bytes, np.ndarray]]  # name and weight to levels, scales and values


def packed(q: np.ndarray, bits: int) -> bytes:
    """Levels in a byte each, or two to a byte where they have four bits or fewer.

    How well zstd does depends on which bytes these are: with the least level as 0 it needs 8 % more at 5 bits.
    """
    q = (q + 2 ** (bits - 1)).astype(np.uint8).reshape(-1)
    halves = np.append(q, [0] * (q.size % 2)).reshape(-1, 2).astype(np.uint8)
    return q.tobytes() if bits > 4 else (halves[:, 0] | halves[:, 1] << 4).tobytes()


def rounded(w: np.ndarray, bits: int, group: int | None = None) -> tuple[bytes, bytes, np.ndarray]:
    """Packed levels, fp16 scales and values of rounding by row, or by groups of a row's columns."""
    parts = w.reshape(len(w), -1, group or w[0].size)
    step = np.maximum(np.abs(parts).max(2, keepdims=True), 1e-12) / (2 ** (bits - 1) - 1)
    step = step.astype("<f2")
    q = np.rint(parts / np.maximum(step.astype(np.float32), 1e-12))
    return packed(q, bits), step.tobytes(), (q * step).reshape(w.shape).astype(np.float32)


def gptq(w: np.ndarray, moment: torch.Tensor, bits: int, group: int | None) -> tuple[bytes, bytes, np.ndarray]:
    """GPTQ (Frantar et al. 2023): columns in their order, damping of 1 %, scales of the largest weight of a group."""
    left, n = torch.from_numpy(w).double().clone(), w.shape[1]
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(n)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    most, levels, steps, values = 2 ** (bits - 1) - 1, torch.empty_like(left), [], torch.empty_like(left)
    for j in range(n):
        if j % (group or n) == 0:
            step = left[:, j : j + (group or n)].abs().amax(1).clamp_min(1e-12) / most
            steps.append((step := step.half()).numpy())
        levels[:, j] = (left[:, j] / step).round().clamp(-most - 1, most)
        values[:, j] = levels[:, j] * step
        left[:, j + 1 :] -= ((left[:, j] - values[:, j]) / inverse[j, j]).outer(inverse[j, j + 1 :])
    return packed(levels.numpy(), bits), np.stack(steps, 1).tobytes(), values.float().numpy()


def zipped_size(data: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=19).compress(data)) if data else 0


def moments(task: tn.Task) -> dict[str, torch.Tensor]:
    """E[u u^T] of the inputs of MiniLM's linear layers over the calibration sentences, without their padding."""
    found: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def hook(name: str):
        def add(layer, given):
            u = given[0][mask].double()
            found[name] = found.get(name, 0) + u.T @ u

        return add

    linear = [(f"{n}.weight", m) for n, m in task.model.named_modules() if isinstance(m, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linear]
    for inputs, _ in task.train:
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            task.model(**inputs)
    for handle in hooks:
        handle.remove()
    return found


class Peers:
    def __init__(self, network: str) -> None:
        self.network, self.task = network, TASKS[network]()
        self.state = {n: t.clone() for n, t in self.task.model.state_dict().items()}
        self.reference = self.task.score(self.task.test)

    def row(self, method: str, size: int, state: dict[str, np.ndarray], settings: str, begun: float) -> dict:
        seconds = time.monotonic() - begun
        given = {n: torch.from_numpy(np.array(a)).reshape(self.state[n].shape) for n, a in state.items()}
        self.task.model.load_state_dict({**self.state, **given})
        score = self.task.score(self.task.test)
        return row_of(self.network, method, size, score, self.reference, peer=True, settings=settings, seconds=seconds)

    def zipped(self, method: str, settings: str, pack: Pack) -> dict:
        begun, levels, rest, state = time.monotonic(), b"", b"", {}
        for name, tensor in self.state.items():
            w = tensor.numpy()
            if w.ndim < 2 or not tensor.is_floating_point():
                rest += w.tobytes()
                continue
            found, scales, state[name] = pack(name, w)
            levels, rest = levels + found, rest + scales
        size = zipped_size(levels) + zipped_size(rest)
        return self.row(f"{method} + zstd", size, state, settings, begun)

    def everyday(self) -> Iterator[dict]:
        """Rounding by row and by group; for the encoder GPTQ too."""
        for bits in (8, 6, 5, 4, 3):
            yield self.zipped(f"rounding by row, {bits} bit", "fp16 scales", lambda _, w, b=bits: rounded(w, b))
        for bits in (8, 4):
            settings = "fp16 scales of groups of 64"
            yield self.zipped(f"rounding by group, {bits} bit", settings, lambda _, w, b=bits: rounded(w, b, 64))
        if self.network != "minilm":
            return
        known = moments(self.task)
        for group in (None, 128):
            for embedding in (8, 4):

                def pack(name, w, group=group, embedding=embedding):
                    return gptq(w, known[name], 4, group) if name in known else rounded(w, embedding)

                scales = f"fp16 scales of groups of {group}" if group else "fp16 scales by row"
                settings = f"{scales}, {SENTENCES} sentences, embeddings and pooler {embedding} bit by row"
                yield self.zipped("GPTQ, 4 bit", settings, pack)

    def nnc(self) -> Iterator[dict]:
        """ISO/IEC 15938-17's reference coder, a step at a time; integers go through zstd."""
        floats = {n: t.numpy() for n, t in self.state.items() if t.is_floating_point()}
        rest = b"".join(t.numpy().tobytes() for t in self.state.values() if not t.is_floating_point())
        for step in STEPS[self.network]:
            begun = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                np.savez(Path(folder) / "state.npz", **floats)
                command = [os.environ["NNC_PYTHON"], str(ROOT / "bench/nnc_peer.py"), f"{folder}/state.npz", folder]
                done = subprocess.run([*command, str(step)], capture_output=True, text=True, check=True)
                with np.load(Path(folder) / f"qp{step}.npz") as opened:
                    state = {n: opened[n] for n in opened.files}
            settings = f"qp {step}, nonweight_qp -40, dependent quantization"
            yield self.row("NNC", json.loads(done.stdout)["bytes"] + zipped_size(rest), state, settings, begun)


# ---------------------------------------------------------------- ours


def ours(network: str, kind: str, sizes: list[int]) -> Iterator[dict]:
    """Files of these sizes, each made by a process of its own, since a process tells its peak memory alone."""
    for size in sizes or SIZES[network]:
        command = [sys.executable, __file__, "file", network, kind, str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{network}, {kind}, {size:,} bytes: no file", flush=True)
            continue
        yield json.loads(done.stdout.splitlines()[-1])


def file(network: str, kind: str, size: int) -> dict:
    """The row of one file of ours, in this process."""
    task, budget = TASKS[network](), tn.Budget(size=size)
    begun = time.monotonic()
    if kind == "data":
        result = tn.compress(task, budget=budget)
    else:
        result = tn.compress({n: t.numpy() for n, t in task.model.state_dict().items()}, budget=budget)
    seconds = time.monotonic() - begun
    peak = (memory() or 0) / 1e3
    before, after = result.before, result.after
    if before is None or after is None:
        before = task.score(task.test)
        after = task.score(task.test, result.artifact.into(task.model))
    method = "tersenet" if kind == "data" else "tersenet, without data"
    more = {"asked": size, "seconds": seconds, "peak_memory_GB": round(peak, 2)}
    return row_of(network, method, result.artifact.nbytes, after, before, **more)


def pruned(network: str) -> Iterator[dict]:
    """The LSTM with a tenth of its weights, its rate rewound, and the dense network trained for as many epochs."""
    schedule = tn.Schedule(EPOCHS, RATE, 64, adam=True, cosine=True)
    task = characters(schedule)
    begun = time.monotonic()
    result = tn.compress(task, (Prune(DENSITY, ROUNDS, EPOCHS, LAST), Narrow()))
    stored = result.artifact.unpack()
    weights = [stored[n] for n, t in task.model.named_parameters() if t.dim() > 1]
    density = sum(map(np.count_nonzero, weights)) / sum(w.size for w in weights)
    more = {
        "density": round(float(density), 4),
        "settings": f"{ROUNDS} rounds of {EPOCHS} epochs, the last of {LAST}, Adam, rate {RATE}, cosine",
    }
    more["seconds"] = time.monotonic() - begun
    yield row_of(network, "learning-rate rewinding", result.artifact.nbytes, result.after, result.before, **more)
    begun = time.monotonic()
    whole = (ROUNDS - 1) * EPOCHS + LAST
    task = characters(replace(schedule, epochs=whole)).trained()
    size = sum(t.numel() * t.element_size() for t in task.model.state_dict().values())
    more = {"settings": f"{whole} epochs", "density": 1.0, "seconds": time.monotonic() - begun}
    yield row_of(network, "dense, trained as long", size, task.score(task.test), result.before, **more)


# ---------------------------------------------------------------- rows


def row_of(network: str, method: str, size: int, score: float, reference: float, **more: object) -> dict:
    more["seconds"] = round(float(more["seconds"]), 1)
    return {
        "network": network,
        "method": method,
        "bytes": size,
        KEY[network]: round(score, 4),
        "reference": round(reference, 4),
        **more,
    }


PARTS: dict[tuple[str, str], Callable[[list[int]], Iterator[dict]]] = {
    ("minilm", "peers"): lambda _: Peers("minilm").everyday(),
    ("minilm", "nnc"): lambda _: Peers("minilm").nnc(),
    ("minilm", "data"): lambda sizes: ours("minilm", "data", sizes),
    ("minilm", "arrays"): lambda sizes: ours("minilm", "arrays", sizes),
    ("charlstm", "peers"): lambda _: Peers("charlstm").everyday(),
    ("charlstm", "nnc"): lambda _: Peers("charlstm").nnc(),
    ("charlstm", "data"): lambda sizes: ours("charlstm", "data", sizes),
    ("charlstm", "arrays"): lambda sizes: ours("charlstm", "arrays", sizes),
    ("charlstm", "pruned"): lambda _: pruned("charlstm"),
}


KEYS = "network", "method", "asked", "settings"  # what a row is known by


def main(network: str | None = None, part: str | None = None, *sizes: str) -> None:
    for (name, kind), rows in PARTS.items():
        if network in (None, name) and part in (None, kind) and (kind != "nnc" or os.environ.get("NNC_PYTHON")):
            for row in rows([int(size) for size in sizes]):
                put("sequence", row, KEYS, lambda row: (row["network"], row["method"], -row["bytes"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["file"]:
        print(json.dumps(file(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main(*sys.argv[1:])

"""The integer codecs against constriction, zstd and the ISO codec: bits over the entropy, and speeds as ratios.

Run: make bench NAME=codecs. Streams of 4,194,304 symbols on one thread, CPU time, medians of the rounds of one run:
S, 80 % zeros and 15 levels of Gaussian tails (4 bit); L, Laplace of scale 14 (8 bit). With NNC_PYTHON (see nnc_peer.py)
also ResNet-20's levels as the ISO codec quantized them (uniform, qp -20), weights alone, both as whole streams; without
it those rows stay as they are. Whole files, as floats and with matrices in 8 bits by row, are encoded on all cores, by
the clock and in CPU time.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import constriction
import numpy as np
import zstandard
from scipy.stats import norm
from table import ROOT, earlier, in_rounds, real_data, write

from tersenet import native
from tersenet.codecs import CODECS, rans
from tersenet.codecs.stream import Reader

N = 1 << 22
PATHS = ("portable", "AVX2", "AVX-512")


def median(action, rounds=7):
    seconds = []
    for _ in range(rounds):
        begun = time.process_time()
        action()
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds)


def streams():
    rng = np.random.default_rng(0)
    x, threshold = rng.normal(size=N), norm.ppf(0.9)
    tails, s = np.abs(x) > threshold, np.zeros(N, np.uint8)
    edges = np.quantile(x[tails], np.linspace(0, 1, 16))
    level = np.digitize(x[tails], edges[1:-1])
    s[tails] = np.where(level < 7, level, level + 1)  # ordered by value, zero in the middle
    s[~tails] = 7
    yield "S", s
    yield "L", (np.clip(np.rint(rng.laplace(0, 14, N)), -128, 127) + 128).astype(np.uint8)


def peers(values):
    ints = values.astype(np.int32)
    share = np.bincount(values) / values.size
    model = constriction.stream.model.Categorical(
        np.maximum(share, 1e-9) / np.maximum(share, 1e-9).sum(), perfect=False
    )
    coder = constriction.stream.stack.AnsCoder()
    encode = median(lambda: constriction.stream.stack.AnsCoder().encode_reverse(ints, model), 3)
    coder.encode_reverse(ints, model)
    data = coder.get_compressed()
    yield "constriction ANS", 4 * len(data), encode, lambda: constriction.stream.stack.AnsCoder(data).decode(model, N)
    encoder = constriction.stream.queue.RangeEncoder()
    encode = median(lambda: constriction.stream.queue.RangeEncoder().encode(ints, model), 3)
    encoder.encode(ints, model)
    queued = encoder.get_compressed()
    yield (
        "constriction range",
        4 * len(queued),
        encode,
        lambda: constriction.stream.queue.RangeDecoder(queued).decode(model, N),
    )
    packed = values if values.max() > 15 else values[::2] | values[1::2] << 4
    coder = zstandard.ZstdCompressor(level=19)
    encode = median(lambda: coder.compress(packed.tobytes()), 1)
    frame = coder.compress(packed.tobytes())
    yield "zstd -19 (nibbles packed)", len(frame), encode, lambda: zstandard.ZstdDecompressor().decompress(frame)


def measure():
    rows = []
    for name, values in streams():
        share = np.bincount(values) / N
        entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum()) * N / 8
        times = {}
        for peer, size, encode, decode in peers(values):
            times[peer] = (encode, median(decode))
            rows.append(row(name, peer, size, entropy, times[peer], times, peer=True))
        for codec in ("rans", "rans-pairs", "huffman", "context"):
            if codec == "rans-pairs" and values.max() > 15:
                continue
            size, spent = of_codec(codec, values)
            rows.append(row(name, codec, size, entropy, spent, times))
        for path in range(native.simd()):
            data = rans.encode_bytes(values)
            spent = (spent[0], median(lambda data=data, path=path: rans.decode_bytes(Reader(data), N, path)))
            rows.append(row(name, f"rans, {PATHS[path]} path", len(data), entropy, spent, times))
    return rows


def of_codec(codec, values):
    coder = CODECS[codec]
    data = coder.encode(values)
    assert np.array_equal(coder.decode(data, values.shape, values.dtype), values)
    encode = median(lambda: coder.encode(values), 1)
    return len(data), (encode, median(lambda: coder.decode(data, values.shape, values.dtype)))


def row(stream, method, size, entropy, spent, times, **more):
    ans = times.get("constriction ANS", spent)
    queue = times.get("constriction range", spent)
    return {
        "network": f"stream {stream}",
        "method": method,
        "bytes": size,
        "over_entropy_percent": round(100 * (size / entropy - 1), 3),
        "encode_msym_s": round(N / spent[0] / 1e6, 1),
        "decode_msym_s": round(N / spent[1] / 1e6, 1),
        "decode_over_constriction_ans": round(ans[1] / spent[1], 2),
        "decode_over_constriction_range": round(queue[1] / spent[1], 2),
        **more,
    }


def against_the_iso_codec(python):
    _, models = real_data()
    state = {n: t.numpy() for n, t in models.load("resnet20").state_dict().items() if t.dim() > 1}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "w.npz", **state)
        command = [python, str(ROOT / "bench/nnc_peer.py"), f"{folder}/w.npz", folder, "-20u", "-16u"]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            said = json.loads(line)
            qp = int(said["qp"][:-1])
            with np.load(f"{folder}/qp{said['qp']}.npz") as opened:
                levels = [np.rint(opened[n] / ((4 + qp % 4) * 2.0 ** (qp // 4 - 2))).astype(np.int16) for n in opened]
            count = sum(q.size for q in levels)
            peer = {"bytes": said["bytes"], "decode_mweights_s": round(count / said["decode"] / 1e6, 1), "peer": True}
            size, spent = of_levels(levels)
            ours = {"bytes": size, "decode_mweights_s": round(count / spent / 1e6, 1)}
            shared = {"network": "resnet20 levels", "qp": qp}
            rows.append({**shared, "method": "NNC", **peer})
            rows.append({**shared, "method": "context", **ours, "decode_over_nnc": round(said["decode"] / spent, 2)})
    return rows


def of_levels(levels):
    coder = CODECS["context"]
    coded = [(coder.encode(q), q.shape, q.dtype) for q in levels]
    return sum(len(c) for c, *_ in coded), median(lambda: [coder.decode(*c) for c in coded], 15)


def whole_files():
    from tersenet.artifact import Artifact, Tensor
    from tersenet.methods.uniform import Uniform

    _, models = real_data()
    rows = []
    for network in ("resnet20", "squeezenet11", "mobilenetv2"):
        state = {name: t.numpy() for name, t in models.load(network).state_dict().items()}
        levels = {name: Uniform(8, by_row=True).pack(w) if w.ndim > 1 else w for name, w in state.items()}
        count = sum(w.size for w in state.values())
        for method, trees in (("float32", state), ("8 bits", levels)):
            tensors = {name: Tensor(tree, str(state[name].dtype)) for name, tree in trees.items()}
            ((clock, spent),) = in_rounds([lambda tensors=tensors: Artifact(tensors).to_bytes()], 3)
            rows.append(
                {
                    "network": network,
                    "method": f"whole file, {method}",
                    "bytes": Artifact(tensors).nbytes,
                    "encode_mvalues_s": round(count / clock / 1e6, 2),
                    "encode_mvalues_cpu_s": round(count / spent / 1e6, 2),
                }
            )
    return rows


def loading():
    """CPU seconds of a fresh process that imports tersenet and loads a LeNet-5 of 3 % density; what is installed."""
    from tersenet.artifact import Artifact, Tensor
    from tersenet.packed import Codebook, Sparse

    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}.items():
        mask = rng.random(shape) < 0.03
        values = Codebook(
            rng.integers(0, 32, int(mask.sum())).astype(np.uint8), rng.normal(size=(32, 1)).astype(np.float32)
        )
        tensors[f"{name}.weight"] = Tensor(Sparse(mask, values))
        tensors[f"{name}.bias"] = Tensor(np.zeros(shape[0], np.float32))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lenet5.terse"
        Artifact(tensors).save(file)
        script = f"import sys; sys.modules['torch'] = None; import tersenet; tersenet.load({str(file)!r}).unpack()"
        spent = []
        for _ in range(7):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", script], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        installed = Path(folder) / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(installed)]
        subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)
        size = sum(
            p.stat().st_size
            for p in installed.rglob("*")
            if p.is_file() and "numpy" not in str(p.relative_to(installed))
        )
        row = {"network": "lenet5", "method": "import and load without torch", "bytes": file.stat().st_size}
        return [
            {
                **row,
                "cpu_seconds": round(statistics.median(spent), 3),
                "installed_mb_beyond_numpy": round(size / 1e6, 2),
            }
        ]


if __name__ == "__main__":
    rows = measure() + whole_files() + loading()
    if os.environ.get("NNC_PYTHON"):
        rows += against_the_iso_codec(os.environ["NNC_PYTHON"])
    else:
        rows += [row for row in earlier("codecs") if row["network"] == "resnet20 levels"]
    write("codecs", rows, 0, simd=PATHS[native.simd()])

"""A large checkpoint under the 3 GB that a small machine has: seconds, and the most memory of a process of its own.

Run: make bench NAME=checkpoint. 40 tensors of 2,500 x 3,000 bfloat16 weights, Gaussian with rows of their own sizes, in
a safetensors file. Without loss the whole of it is written and read back; what compressing takes, with all codecs or by
the default recipe without data, is measured on the first tensor. `read_bytes` counts what is read of the file, and
`cpu_seconds` are those of all threads, which other work on the machine changes less.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from table import write

import tersenet as tn
from tersenet.access import File
from tersenet.artifact import Artifact, Coding
from tersenet.journal import memory
from tersenet.sources import read

TENSORS, SHAPE, PART = 40, (2500, 3000), 1
SEED = 0


def make(folder):
    rng = np.random.default_rng(SEED)
    state = {}
    for k in range(TENSORS):
        rows = np.exp2(rng.uniform(-7, -3, (SHAPE[0], 1))).astype(np.float32)
        state[f"layers.{k}.weight"] = torch.from_numpy(rng.standard_normal(SHAPE, np.float32) * rows).bfloat16()
    save_file(state, folder / "model.safetensors")


def first(folder, count):
    tensors = read(folder / "model.safetensors").tensors
    return {name: tensors[name] for name in list(tensors)[:count]}


def written(folder):
    artifact = Artifact.of_arrays(first(folder, TENSORS))
    artifact.coding = Coding(("rans",))
    artifact.save(folder / "model.terse")
    return {"bytes": artifact.nbytes}


def all_codecs(folder):
    artifact = Artifact.of_arrays(first(folder, PART))
    artifact.save(folder / "part.terse")
    return {"bytes": artifact.nbytes}


def read_back(folder):
    return {"values": sum(tree.size for tree in tn.load(folder / "model.terse").values())}


def checked(folder):
    artifact, state = tn.load(folder / "model.terse"), first(folder, TENSORS)
    assert list(artifact) == list(state)
    for name, tree in artifact.items():
        assert np.array_equal(tree.view(np.uint32) >> 16, state[name].view(torch.uint16).numpy()), name
    return {}


def state_dict(folder):
    return {"values": sum(value.numel() for value in tn.load(folder / "model.terse").state_dict().values())}


def one(folder):
    count, part = 0, File._part

    def counted(file, offset, length):
        nonlocal count
        data = part(file, offset, length)
        count += len(data)
        return data

    File._part = counted
    artifact = tn.load(folder / "model.terse", tensors=["layers.20.weight"])
    return {"read_bytes": count, "values": artifact["layers.20.weight"].size}


def unpacked(folder):
    from tersenet.cli import main

    main(["unpack", str(folder / "model.terse"), "-o", str(folder / "back.safetensors")])
    return {"bytes": (folder / "back.safetensors").stat().st_size}


def compressed(folder):
    result = tn.compress(first(folder, PART), budget=tn.Budget(ratio=8), folder=folder / "stages")
    result.artifact.save(folder / "small.terse")
    return {"bytes": result.artifact.nbytes}


WHOLE, SOME = TENSORS * SHAPE[0] * SHAPE[1], PART * SHAPE[0] * SHAPE[1]
ACTIONS = {
    "written": ("without loss, rANS: read the safetensors file, write ours", WHOLE),
    "read_back": ("load, then each tree in turn", WHOLE),
    "checked": ("the same, every bit held against the safetensors file", WHOLE),
    "state_dict": ("load(...).state_dict()", WHOLE),
    "unpacked": ("terse unpack", WHOLE),
    "one": ("one tensor of the file", SHAPE[0] * SHAPE[1]),
    "all_codecs": ("without loss, all codecs", SOME),
    "compressed": ("compress(..., ratio 8), without data", SOME),
}


def in_a_process(action, folder):
    """The row of an action that runs in a process of its own."""
    done = subprocess.run([sys.executable, __file__, action, folder], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        in_a_process("make", folder)
        source = (Path(folder) / "model.safetensors").stat().st_size
        rows = []
        for action, (method, weights) in ACTIONS.items():
            row = {"network": "synthetic, bfloat16", "method": method, "weights": weights}
            rows.append(row | in_a_process(action, folder))
            print(rows[-1], flush=True)
    write("checkpoint", rows, SEED, source_bytes=source, limit_mb=3000)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        begun, used = time.perf_counter(), time.process_time()
        found = globals()[sys.argv[1]](Path(sys.argv[2])) or {}
        spent = {"seconds": round(time.perf_counter() - begun, 1), "cpu_seconds": round(time.process_time() - used, 1)}
        print(json.dumps(found | spent | {"peak_mb": round(memory() or 0)}))
    else:
        main()

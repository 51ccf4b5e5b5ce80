"""The small decoder of examples/c: bytes of code, of memory, and milliseconds on this machine, for both LeNets.

Run: make bench NAME=device (about ten minutes). Code is what the linker keeps of digits.c, the decoder and the kernels
at -Os, without the C library. Networks: Deep Compression in one short round, in the paper's codecs and in the smallest,
and the default path at 20 kB; the first 1,000 test digits are held to the dense model, accuracy is that of all 10,000.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import ROOT, real_data, write

import tersenet as tn
from tersenet.artifact import Artifact, load
from tersenet.export import c_header

EXAMPLE = ROOT / "examples" / "c"
MACHINES = {
    "x86-64": ("gcc", "size"),
    "32-bit x86": ("gcc -m32", "size"),
    "32-bit ARM (Thumb-2)": ("arm-linux-gnueabihf-gcc", "arm-linux-gnueabihf-size"),
}
BITS = {"lenet300": 4, "lenet5": 5}
CODINGS = {"Deep Compression": ("bits", "huffman", "gaps"), "Deep Compression, smallest codecs": tn.Coding().codecs}


def code(machine: str) -> dict[str, Any]:
    compiler, size = MACHINES[machine]
    subprocess.run(["make", "-s", "-B", "-C", EXAMPLE, f"CC={compiler}", "CFLAGS=-Os"], check=True)
    table = subprocess.run([size, "-A", EXAMPLE / "digits"], check=True, capture_output=True, text=True).stdout
    sizes = {section: int(count) for section, count in re.findall(r"^\.(text|rodata)\s+(\d+)", table, re.M)}
    version = subprocess.run([*compiler.split(), "-dumpversion"], check=True, capture_output=True, text=True).stdout
    return {"machine": machine, "compiler": f"{compiler} {version.strip()} -Os", **sizes}


def networks(name: str) -> dict[str, bytes]:
    datasets, models = real_data()
    split = {}
    for part in ("train", "test"):
        images, labels = datasets.load("mnist", part, 12_000)
        split[part] = (models.inputs(name, images), torch.from_numpy(labels).long())
    recipe = tn.papers.deep_compression(density=0.1, bits=BITS[name], rounds=1, epochs=1)
    tuned = tn.compress(tn.Task(models.load(name), **split), recipe).artifact
    files = {method: Artifact(tuned.tensors, tn.Coding(used)).to_bytes() for method, used in CODINGS.items()}
    default = tn.compress(tn.Task(models.load(name), **split), budget=tn.Budget(size="20kB")).artifact
    return files | {"default path at 20 kB": default.to_bytes()}


def measured(name: str, method: str, file: bytes, folder: Path) -> dict[str, Any]:
    datasets, models = real_data()
    images, labels = datasets.load("mnist", "test")
    (folder / "net.terse").write_bytes(file)
    (folder / "images").write_bytes(images.tobytes())
    command = [EXAMPLE / "digits", folder / "net.terse", folder / "images"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = np.array([line.split() for line in done.stdout.splitlines()], np.float64)
    model = load(file).into(models.load(name)).eval()
    with torch.inference_mode():
        outputs = model(models.inputs(name, images[:1000])).numpy()
    peak, kept, loading, digit = re.findall(r"[\d.]+(?= bytes| once| ms)", done.stderr)
    return {
        "network": name,
        "method": method,
        "bytes": len(file),
        "dense_bytes": sum(4 * p.numel() for p in model.parameters()),
        "peak_memory": int(peak),
        "memory_loaded": int(kept),
        "memory_told_by_export": int(re.findall(r"_arena = (\d+)", c_header(file, "net.terse"))[0]),
        "ms_to_load": float(loading),
        "ms_a_digit": float(digit),
        "same_answers_of_1000": int((found[:1000, 0] == outputs.argmax(1)).sum()),
        "largest_difference": float(np.abs(found[:1000, 1:] - outputs).max()),
        "accuracy": round(float((found[:, 0] == labels).mean()), 4),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = [code(machine) for machine in reversed(MACHINES)]
    subprocess.run(["make", "-s", "-B", "-C", EXAMPLE, "CFLAGS=-O2"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in BITS:
            rows += [measured(name, method, file, Path(folder)) for method, file in networks(name).items()]
    write("device", rows, stack="36 kB where a stream is context-coded, else 4 kB", flags="-O2 for milliseconds")

"""Train a small network on scikit-learn's digits, compress it, and verify the written file from a fresh process."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import tersenet as tn


def task() -> tn.Task:
    """The digits and an untrained network for them (64-128-64-10), split three to one."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return tn.Task(
        model, train=(x[:1347], y[:1347]), test=(x[1347:], y[1347:]), schedule=tn.Schedule(epochs=30, lr=0.1, batch=32)
    )


def main() -> None:
    trained = task().trained()
    print("1. trained a network of 17,226 weights, 68,904 bytes in float32")
    with tempfile.TemporaryDirectory() as folder:
        recipe = tn.papers.deep_compression(density=0.15, bits=4, rounds=4, epochs=10)
        result = tn.compress(trained, recipe, folder=folder)
        print(f"2. compressed it with Deep Compression:\n\n{result}\n")
        file = Path(folder) / "digits.terse"
        result.artifact.save(file)
        print("3. verified the written file from a fresh process:")
        subprocess.run([sys.executable, "-m", "tersenet.cli", "verify", str(file)], check=True)
    print("\nNext: terse compress --help, or the ten lines of Python in README.md with a network of your own.")


if __name__ == "__main__":
    main()

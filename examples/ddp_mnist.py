"""LeNet-5 on MNIST by several workers that exchange gradients by 3LC: bytes, time in the hook and ratio of each step.

    torchrun --nproc-per-node 2 examples/ddp_mnist.py --hook 3lc

`--hook none` exchanges float32. Reads the sheets of the folder in TERSENET_DATA (default ../shared/data); without them
scikit-learn's digits, enlarged, take their place. Each worker logs to ddp_mnist_<rank>.jsonl in the current folder.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel

from tersenet import threelc

DATA = Path(os.environ.get("TERSENET_DATA", Path(__file__).parents[2] / "shared" / "data"))


def digits():
    """Images [n, 1, 28, 28] and labels [n], to train on and to test with."""
    if (DATA / "datasets.py").exists():
        sys.path.insert(0, str(DATA))
        import datasets

        parts = [datasets.load("mnist", split, count) for split, count in (("train", 20_000), ("test", 5_000))]
        return [(torch.from_numpy(x).float()[:, None] / 256, torch.from_numpy(y).long()) for x, y in parts]
    from sklearn.datasets import load_digits

    found = load_digits()
    images = interpolate(torch.from_numpy(found.images).float()[:, None] / 16, size=28, mode="bilinear")
    labels = torch.from_numpy(found.target).long()
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def lenet5():
    convolutions = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hook", choices=["3lc", "none"], default="3lc")
    parser.add_argument("--sparsity", type=float, default=1.75)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(lenet5())
    exchange = threelc.register(model, threelc.ThreeLC(given.sparsity)) if given.hook == "3lc" else None
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    (images, labels), (unseen, answers) = digits()
    images, labels = images[rank::workers], labels[rank::workers]
    sent, plain, seconds = 0, 0, 0.0
    with Path(f"ddp_mnist_{rank}.jsonl").open("w") as log:
        for step in range(given.steps):
            at = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            loss = cross_entropy(model(images[at]), labels[at])
            loss.backward()
            optimizer.step()
            row = {"step": step, "loss": round(loss.item(), 4)}
            if exchange:
                row |= {"bytes": exchange.sent - sent, "seconds": round(exchange.seconds - seconds, 4)}
                row |= {"ratio": round((exchange.plain - plain) / row["bytes"], 1)}
                sent, plain, seconds = exchange.sent, exchange.plain, exchange.seconds
            print(json.dumps(row), file=log)
            if rank == 0 and (step % 20 == 0 or step == given.steps - 1):
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    with torch.no_grad():
        right = (model.module(unseen).argmax(1) == answers).float().mean().item()
    if rank == 0:
        whole = f", {plain / sent:.1f} times fewer bytes than float32" if exchange else ""
        print(f"accuracy {right:.4f} after {given.steps} steps of {workers} workers{whole}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

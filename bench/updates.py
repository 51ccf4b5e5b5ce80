"""Updates of ResNet-20 after an epoch on CIFAR-10, exact and lossy, beside zstd -19 and xz of the same difference.

Run: make bench NAME=updates. The epoch goes on from the trained network: constant rate of 0.01, crops and flips.
`accuracy` is on the 10,000 test images: of the new network, and of the old one after the update.
"""

import lzma
import tempfile
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from table import DATA, real_data, write
from torch.nn.functional import cross_entropy, pad

from tersenet.updates import diff, network, patch

RATE, BATCH, RATIOS = 0.01, 128, (20, 30, 50)


def part(split):
    datasets, models = real_data()
    images, labels = datasets.load("cifar10", split)
    return models.inputs("resnet20", images), torch.from_numpy(labels).long()


def trained():
    """The network's state after an epoch."""
    torch.manual_seed(0)
    net, (images, labels) = real_data()[1].load("resnet20").train(), part("train")
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    for at in torch.randperm(len(images)).split(BATCH):
        (i, j), flipped = torch.randint(0, 9, (2,)), torch.rand(()) < 0.5
        seen = pad(images[at], (4, 4, 4, 4))[:, :, i : i + 32, j : j + 32]
        optimizer.zero_grad()
        cross_entropy(net(seen.flip(3) if flipped else seen), labels[at]).backward()
        optimizer.step()
    return net.state_dict()


def accuracy(artifact, test):
    net = artifact.into(real_data()[1].load("resnet20")).eval()
    with torch.no_grad():
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in zip(*(t.split(500) for t in test)))
    return right / len(test[0])


def differences(old, new):
    """The bytes of new minus old, and of new exclusive or old, as whole integers; and the first plane by plane."""
    subtracted, exclusive, planes = bytearray(), bytearray(), bytearray()
    for name, tensor in new.tensors.items():
        after, before = (np.ascontiguousarray(each.tree).reshape(-1) for each in (tensor, old.tensors[name]))
        after, before = (array.view(f"u{array.itemsize}") for array in (after, before))
        subtracted += (after - before).tobytes()
        exclusive += (after ^ before).tobytes()
        planes += (after - before).view(np.uint8).reshape(-1, after.itemsize).T.tobytes()
    return {"subtracted": subtracted, "exclusive or": exclusive, "subtracted, by planes": planes}


def main():
    old = network(DATA / "models" / "resnet20.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new.safetensors"
        save_file(trained(), path)
        new = network(path)
    test, plain = part("test"), 4 * sum(t.tree.size for t in new.tensors.values())
    told = {"network": "resnet20", "reference": accuracy(new, test)}
    rows = [told | {"method": "none: the old network", "bytes": 0, "accuracy": accuracy(old, test)}]
    rows.append(told | {"method": "exact", "bytes": diff(old, new).nbytes, "accuracy": told["reference"]})
    for name, raw in differences(old, new).items():
        sizes = {"zstd -19": zstandard.ZstdCompressor(level=19).compress(raw), "xz -9": lzma.compress(raw, preset=9)}
        rows += [told | {"method": f"{by}, {name}", "bytes": len(data), "peer": True} for by, data in sizes.items()]
    for ratio in RATIOS:
        update = diff(old, new, ratio)
        row = told | {"method": f"lossy, ratio {ratio}", "bytes": update.nbytes}
        rows.append(row | {"accuracy": accuracy(patch(old, update), test)})
    for row in rows:
        row["times_smaller"] = round(plain / row["bytes"], 2) if row["bytes"] else None
    write("updates", rows, rate=RATE)


if __name__ == "__main__":
    main()

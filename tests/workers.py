"""One of several workers that train by 3LC, run by test_threelc.py: scenarios, folder, number of workers, rank."""

import contextlib
import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tersenet import threelc
from tersenet.threelc import ThreeLC

SCENARIOS, FOLDER, COUNT, RANK = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def network(kind=nn.Linear, **how):
    torch.manual_seed(0)
    return nn.Sequential(kind(40, 64, **how), nn.ReLU(), nn.Linear(64, 10))


def batch(step, rank=RANK, n=16):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(n, 40, generator=generator)
    return x, x[:, :10].argmax(1)


def registered(net, **how):
    model = DistributedDataParallel(net, **how)
    return model, threelc.register(model, ThreeLC(1.5)), torch.optim.SGD(model.parameters(), 0.05)


def train(model, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()


def fingerprint(model):
    state = model.state_dict().values()
    return hashlib.sha256(b"".join(bytes(t.detach().float().numpy()) for t in state)).hexdigest()


def training():
    model, exchange, optimizer = registered(network())
    x, y = batch(0, COUNT, 2000)
    begun = float(cross_entropy(model(x), y))
    train(model, optimizer, range(100))
    own = FOLDER / f"{RANK}.pt"
    torch.save((model.module.state_dict(), optimizer.state_dict(), exchange.state_dict()), own)
    train(model, optimizer, range(100, 200))
    loss = float(cross_entropy(model(x), y))
    told = fingerprint(model)
    model, exchange, optimizer = registered(network())
    parts = torch.load(own)
    for each, part in zip((model.module, optimizer, exchange), parts):
        each.load_state_dict(part)
    train(model, optimizer, range(100, 200))
    resumed = fingerprint(model)
    return told, resumed, loss, begun, mean(model, exchange)


def mean(model, exchange):
    """Whether a step's gradients are the mean of all messages, each decoded by itself."""
    before = exchange.state_dict()
    x, y = batch(777)
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    held = {name: p.grad.clone() for name, p in model.module.named_parameters()}
    with model.no_sync():
        model.zero_grad()
        cross_entropy(model(x), y).backward()
    exchange.load_state_dict(before)
    own = {name: p.grad for name, p in model.module.named_parameters()}
    messages = [None] * COUNT
    dist.all_gather_object(messages, exchange.message(own))
    sizes = [gradient.numel() for gradient in own.values()]
    parts = [exchange.values(message, sizes) for message in messages]
    means = [sum(each) / COUNT for each in zip(*parts)]
    return all(torch.equal(total, held[name].view(-1)) for total, name in zip(means, own))


def convex():
    """Least squares: each worker has half of the rows."""
    torch.manual_seed(0)
    a, wanted = torch.randn(200, 300), torch.randn(300, 1)
    a = torch.linalg.qr(a.T)[0].T * torch.linspace(1, 1.5, 200)[:, None]
    wanted = a.T @ (torch.linalg.pinv(a.T) @ wanted)  # what the rows can tell
    wanted /= wanted.norm()
    net = nn.Linear(300, 1, bias=False)
    nn.init.zeros_(net.weight)
    model, _, _ = registered(net)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    own = a[RANK::COUNT]
    for _ in range(400):
        optimizer.zero_grad()
        (model(own) - own @ wanted).square().sum().backward()
        optimizer.step()
    return fingerprint(model), float((net.weight.detach().T - wanted).norm())


def join():
    """Worker 1 has ten batches more than worker 0."""
    model, _, optimizer = registered(network())
    with model.join():
        train(model, optimizer, range(20 + 10 * RANK))
    return fingerprint(model)


def no_sync():
    model, exchange, optimizer = registered(network())
    for step in range(10):
        optimizer.zero_grad()
        for part in range(3):
            with model.no_sync() if part < 2 else contextlib.nullcontext():
                x, y = batch(3 * step + part)
                cross_entropy(model(x), y).backward()
        optimizer.step()
    assert exchange.plain == 10 * 4 * sum(p.numel() for p in model.parameters())  # sent once in three
    return fingerprint(model)


def bfloat16():
    model, _, optimizer = registered(network())
    with torch.autocast("cpu", torch.bfloat16):
        train(model, optimizer, range(20))
    return fingerprint(model)


def half_module():
    model, exchange, optimizer = registered(network().bfloat16())
    for step in range(20):
        x, y = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
    assert {residual.dtype for residual in exchange.residuals.values()} == {torch.float32}
    return fingerprint(model)


class Branches(nn.Module):
    """One of two layers, and one that nobody uses in even steps."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.rare = (nn.Linear(40, 10) for _ in range(3))

    def forward(self, x, step):
        hidden = self.first(x) if (step + RANK) % 2 else self.second(x)
        return hidden + self.rare(x) if step % 2 else hidden


def unused():
    torch.manual_seed(0)
    model, exchange, optimizer = registered(Branches(), find_unused_parameters=True)
    for step in range(20):
        x, y = batch(step)
        optimizer.zero_grad()
        before = exchange.state_dict().get("rare.weight")
        cross_entropy(model(x, step), y).backward()
        if step and step % 2 == 0:  # DDP drops this mean, so nothing may have been taken from what is to be sent
            assert torch.equal(before, exchange.residuals["rare.weight"])
        optimizer.step()
    return fingerprint(model)


def rebuilt():
    """Buckets so small that there are many, in another order after the first step."""
    model, exchange, optimizer = registered(network(), bucket_cap_mb=0.004)
    train(model, optimizer, range(20))
    assert set(exchange.residuals) == {"0.weight", "2.weight"}
    return fingerprint(model)


def view():
    model, _, optimizer = registered(network(), gradient_as_bucket_view=True, static_graph=True)
    train(model, optimizer, range(20))
    return fingerprint(model)


def stopped(action):
    try:
        action()
    except Exception as wrong:
        return f"{type(wrong).__name__}: {wrong}"
    return "nothing was raised"


def nan():
    model, _, optimizer = registered(network())
    train(model, optimizer, range(3))
    x, y = batch(3)
    x[0, 0] = float("nan") if RANK else 0
    return stopped(lambda: cross_entropy(model(x), y).backward())


def scaler():
    model, _, _ = registered(network())
    x, y = batch(0)
    scaled = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy(model(x), y)
    return stopped(scaled.scale(loss * 2.0**60).backward)


def death():
    model, _, optimizer = registered(network())
    train(model, optimizer, range(3))
    if RANK == 1:
        os._exit(0)
    return stopped(lambda: train(model, optimizer, range(3, 9)))


def silence():
    model, _, optimizer = registered(network())
    train(model, optimizer, range(3))
    if RANK == 1:
        time.sleep(12)
        os._exit(0)
    return stopped(lambda: train(model, optimizer, range(3, 9)))


def sparse():
    model, _, _ = registered(nn.Sequential(nn.Embedding(40, 64, sparse=True)))
    return stopped(lambda: model(torch.arange(4)).sum().backward())


def large():
    """Gradients of float16 that are finite, and whose scale, up to twice as large, is not."""
    model, _, _ = registered(nn.Sequential(nn.Linear(40, 64, bias=False)).half())
    return stopped(lambda: (model(torch.ones(1, 40).half()) * 5e4).sum().backward())


def double():
    return stopped(lambda: registered(network().double()))


dist.init_process_group(
    "gloo", init_method=f"file://{FOLDER}/group", rank=RANK, world_size=COUNT, timeout=datetime.timedelta(seconds=8)
)
for scenario in SCENARIOS.split():
    print(json.dumps([scenario, globals()[scenario]()]), flush=True)
os._exit(0)  # a group that has lost a worker does not close

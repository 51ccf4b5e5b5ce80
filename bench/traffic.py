"""Data-parallel training over slow links: 3LC against no hook, fp16 and PowerSGD; time of a step, bytes, accuracy.

Run as root: make bench NAME=traffic. Each worker lives in a network namespace of its own, joined to the others by a
bridge over virtual links, limited by tc in both directions. `bytes` are what all workers' interfaces sent, a step,
headers of TCP and IP included; the first steps, in which DDP rebuilds buckets and PowerSGD sends all, are not counted,
and norms keep their statistics to themselves. Where namespaces are not permitted, workers talk over the loopback
interface, whose bytes are counted, and there are no times. `accuracy` is that of 2,000 test images after `steps` steps
from the same random weights; all workers must end with the same bits. Before that, the codec alone: 25 million values.
A run that was stopped goes on after the last group of rows in bench/results/traffic.json; remove that to begin anew.
"""

import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from table import earlier, real_data, write
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tersenet.codecs import ternary
from tersenet.threelc import ThreeLC, register

RATES = {"1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit", "10 Mbit/s": "10mbit"}
STEPS = {"lenet5": 1000, "resnet20": 100}  # at the highest rate; TIMED at the others
TIMED, FIRST, BATCH = 8, 3, 32
THREELC = {f"3LC, s = {s}": ThreeLC(s) for s in (1.0, 1.5, 1.75, 1.9)}
THREELC["3LC, s = 1.75, no error accumulation"] = ThreeLC(1.75, accumulate=False)
METHODS = ["no hook", "fp16", *(f"PowerSGD, rank {rank}" for rank in (1, 2, 4)), *THREELC]
NAME = f"terse{os.getpid() % 10_000}"


def hooked(model, method):
    if method in THREELC:
        register(model, THREELC[method])
    elif method == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif method.startswith("PowerSGD"):
        state = powerSGD_hook.PowerSGDState(None, int(method[-1]), start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def trained(network, method, steps, data, interface):
    """Seconds and bytes of each step, and accuracy, of one worker."""
    images, labels, unseen, answers = data
    rank = dist.get_rank()
    torch.manual_seed(0)
    models = sys.modules["models"]
    one = {
        "bucket_cap_mb": 100
    }  # with two buckets PowerSGD, whose collectives start in callbacks, locks up on slow links
    model = DistributedDataParallel(models.NETWORKS[network](), forward_sync_buffers=False, **one)
    hooked(model, method)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    torch.manual_seed(1 + rank)
    counter = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    seconds = []
    for step in range(steps):
        if step == FIRST:
            dist.barrier()
            begun = int(counter.read_text())
        at = torch.randint(len(images), (BATCH,))
        since = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - since)
    dist.barrier()
    sent = (int(counter.read_text()) - begun) / (steps - FIRST)
    net = model.module.eval()
    with torch.no_grad():
        parts = zip(unseen.split(250), answers.split(250)) if rank == 0 and steps == STEPS[network] else ()
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in parts)
    parameters = b"".join(bytes(parameter.detach().numpy()) for parameter in net.parameters())
    digest = hashlib.sha256(parameters).hexdigest()
    return {"seconds": statistics.median(seconds[FIRST:]), "bytes": sent, "right": right / len(answers), "hash": digest}


def worker(network, steps, rank, count, address, interface, out):
    rank, count, steps = int(rank), int(count), int(steps)
    torch.set_num_threads(1)
    datasets, models = real_data()
    name = "cifar10" if network == "resnet20" else "mnist"
    data = []
    for split, limit in (("train", 8000), ("test", 2000)):
        images, labels = datasets.load(name, split, limit)
        share = slice(rank, None, count) if split == "train" else slice(None)
        data += [models.inputs(network, images)[share], torch.from_numpy(labels).long()[share]]
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group("gloo", init_method=f"tcp://{address}:29511", rank=rank, world_size=count)
    for method in METHODS:
        with Path(out).open("a") as file:
            print(json.dumps([method, trained(network, method, steps, data, interface)]), file=file)
    dist.destroy_process_group()


def shell(command):
    subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.contextmanager
def links(count, rate):
    """What to start each worker with and its interface; the namespaces are gone afterwards."""
    hub, workers = f"{NAME}h", [f"{NAME}w{k}" for k in range(count)]
    try:
        for name in (hub, *workers):
            shell(f"ip netns add {name}")
            shell(f"ip -n {name} link set lo up")
        shell(f"ip -n {hub} link add bridge type bridge")
        shell(f"ip -n {hub} link set bridge up")
        for k, name in enumerate(workers):
            shell(f"ip link add wire netns {name} type veth peer name port{k} netns {hub}")
            shell(f"ip -n {hub} link set port{k} master bridge up")
            shell(f"ip -n {name} addr add 10.77.0.{k + 1}/24 dev wire")
            shell(f"ip -n {name} link set wire up")
            for where, device in ((name, "wire"), (hub, f"port{k}")):
                burst = 256_000 if rate == "1gbit" else 16_000
                limit = f"rate {rate} burst {burst} latency 200ms"
                shell(f"ip netns exec {where} tc qdisc add dev {device} root tbf {limit}")
        yield [["ip", "netns", "exec", name] for name in workers]
    finally:
        for name in (hub, *workers):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def permitted():
    try:
        with links(1, "1gbit"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def run(network, steps, count, prefixes, address, interface):
    """What all workers tell, by method."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(count)]
        command = [sys.executable, __file__, network, str(steps)]
        begun = [
            subprocess.Popen([*prefix, *command, str(rank), str(count), address, interface, str(file)])
            for rank, (prefix, file) in enumerate(zip(prefixes, files))
        ]
        if any(process.wait() for process in begun):
            sys.exit("a worker has failed")
        return [dict(map(json.loads, file.read_text().splitlines())) for file in files]


def rows_of(network, count, rate, steps, told):
    plain = sum(each["no hook"]["bytes"] for each in told)
    for method in METHODS:
        parts = [each[method] for each in told]
        assert len({part["hash"] for part in parts}) == 1, f"{method}: workers have diverged"
        size = sum(part["bytes"] for part in parts)
        row = {"network": network, "workers": count, "rate": rate, "method": method, "steps": steps}
        row |= {"bytes": round(size), "times_fewer": round(plain / size, 1)}
        if rate != "loopback":
            seconds = max(part["seconds"] for part in parts)
            slowest = max(each["no hook"]["seconds"] for each in told)
            row |= {"seconds": round(seconds, 4), "times_faster": round(slowest / seconds, 2)}
        if steps == STEPS[network]:
            row["accuracy"] = parts[0]["right"]
        yield row | ({} if method in THREELC else {"peer": True})


def speeds():
    """Gigabytes of float32 a second of CPU time, each way, on one core, after the residual has filled."""
    rng, n = np.random.default_rng(0), 25_000_000
    for name, values in (("Gaussian", rng.standard_normal(n, np.float32)), ("zeros", np.zeros(n, np.float32))):
        for sparsity in (1.0, 1.75):
            residual, ways = np.zeros(n, np.float32), [[], []]
            for _ in range(8):
                begun = time.process_time()
                data = ternary.encode(values, residual, sparsity)
                coded = time.process_time()
                ternary.decode(data, n)
                for way, seconds in zip(ways, (coded - begun, time.process_time() - coded)):
                    way.append(4 * n / seconds / 1e9)
            encode, decode = (round(statistics.median(way[3:]), 2) for way in ways)
            row = {"method": f"3LC's codec, s = {sparsity}", "values": name, "bits": round(8 * len(data) / n, 4)}
            yield row | {"bytes": len(data), "encode_gb_s": encode, "decode_gb_s": decode}


def place(row):
    """Of a row in the table: the codec alone, then by network, workers and rate."""
    if "workers" not in row:
        return (-1,)
    return list(STEPS).index(row["network"]), row["workers"], [*RATES, "loopback"].index(row["rate"])


def main():
    rows, apart = earlier("traffic"), permitted()
    done = {(row["workers"], row["network"], row["rate"]) for row in rows if "rate" in row}
    if not any("values" in row for row in rows):
        rows += speeds()
    note = "times on a shared machine; counted after the first three steps"
    if not apart:
        note = "network namespaces are not permitted here: bytes of the loopback interface, no times"
        print(note)
    for count in (2, 4):
        for network, most in STEPS.items():
            for rate, limit in RATES.items() if apart else [("loopback", "")]:
                if (count, network, rate) in done:
                    continue
                steps = most if rate in ("1 Gbit/s", "loopback") else TIMED + FIRST
                if apart:
                    with links(count, limit) as prefixes:
                        told = run(network, steps, count, prefixes, "10.77.0.1", "wire")
                else:
                    told = run(network, steps, count, [[]] * count, "127.0.0.1", "lo")
                rows += rows_of(network, count, rate, steps, told)
                rows.sort(key=place)
                write("traffic", rows, batch=BATCH, note=note)


if __name__ == "__main__":
    worker(*sys.argv[1:]) if len(sys.argv) > 1 else main()

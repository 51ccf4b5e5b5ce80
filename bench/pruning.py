"""Pruning with retraining: accuracy against density for every form of retraining, and what becomes a file.

Run: make bench NAME=pruning (or: python bench/pruning.py PART ..., with names from PARTS; each part's rows replace its
earlier ones). Accuracies are those of the reopened file on the test split; a mean over seeds has its single figures
beside it. Training runs in bfloat16. One setting was not chosen blindly: LeNet-5's file was made again with more rounds
and 16 values after one with 8 had missed.

LeNets are trained from scratch for each seed and replay the schedule's last `epochs` in every round. The files are made
from the given networks, retrained with shifts (MNIST) or crops and flips (CIFAR-10).
"""

import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import ptq
import torch
from augmentation import cropped, shifted
from bfloat16 import FAST
from bfloat16 import load as quick
from table import earlier, real_data, write

import tersenet as tn
from tersenet.allocators.amc import AMC, RandomSearch
from tersenet.artifact import load
from tersenet.draft import Draft, artifact_of
from tersenet.journal import cache_folder
from tersenet.methods.kmeans import KMeans
from tersenet.packed import unpack
from tersenet.papers import mlprune
from tersenet.realise import realise
from tersenet.run import run
from tersenet.stages.channels import Channels, SearchChannels
from tersenet.stages.finetune import Finetune, TrainLevels
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.tracing.coupling import Coupling
from tersenet.waterfilling.knowledge import Knowledge
from tersenet.waterfilling.search import to_size

DATASETS, MODELS = real_data()
BITS = tn.Coding(("bits",))
SEEDS = (0, 1, 2)
LENETS = {  # a schedule for training from scratch, the epochs of each round, the rounds to half a per cent
    "lenet300": (tn.Schedule(epochs=8, lr=0.1, weight_decay=1e-4), 6, 24),
    "lenet5": (tn.Schedule(epochs=4, lr=0.05, weight_decay=1e-4), 3, 6),
}
LEAST = 0.005
ONE_SHOT = {"lenet300": (0.2, 0.1, 0.05, 0.02, 0.01, 0.005), "lenet5": (0.1, 0.02, 0.005)}
SURGERY = {"lenet300": (0.018, 0.9801), "lenet5": (0.009, 0.9909)}  # Dynamic Network Surgery (Guo et al. 2016)


def task_of(name: str, schedule: tn.Schedule, augment=None) -> tn.Task:
    """The given network; a tenth of the training split is for choosing."""
    split = {}
    for part in ("train", "test"):
        images, labels = DATASETS.load("cifar10" if name.startswith("resnet") else "mnist", part)
        split[part] = (MODELS.inputs(name, images), torch.from_numpy(labels).long())
    return tn.Task(quick(name), **split, schedule=schedule, augment=augment)


def scored(draft: Draft, task: tn.Task) -> tuple[int, float]:
    """Bytes of the draft's file and the test accuracy of that file, reopened."""
    data = artifact_of(draft).to_bytes()
    return len(data), task.score(task.test, load(data).into(draft.model))


def density_of(draft: Draft) -> float:
    sizes = [np.count_nonzero(draft.tensors[n].unpack()) for n in draft.weights()]
    return sum(sizes) / sum(draft.tensors[n].unpack().size for n in draft.weights())


# ---------------------------------------------------------------- accuracy against density


def curves(name: str):
    """Every form of retraining from dense to LEAST, SEEDS times."""
    schedule, epochs, rounds = LENETS[name]
    found: dict[tuple[str, float], list[float]] = {}
    floats = []
    base = task_of(name, schedule)
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = FAST[name]()
        task = replace(base, model=model).trained(seed, keep=(schedule.epochs - epochs,))
        state = {n: t.clone() for n, t in model.state_dict().items()}
        floats.append(task.score(task.test))
        print(name, seed, "float", floats[-1], flush=True)
        kinds = {"learning-rate rewinding": "learning-rate", "weight rewinding": "weights", "fine-tuning": "finetune"}
        for label, retrain in kinds.items():
            model.load_state_dict(state)
            draft = Draft.of_model(model)
            for part in Prune(LEAST, rounds, epochs, retrain=retrain, seed=100 * seed).parts():
                draft = part(draft, task)
                kept(found, label, LEAST ** (part.number / rounds), draft, task)
        for label, by in (("one-shot learning-rate rewinding", "magnitude"), ("random, one-shot", "random")):
            for density in ONE_SHOT[name]:
                model.load_state_dict(state)
                draft = Prune(density, 1, epochs, by=by, seed=100 * seed)(Draft.of_model(model), task)
                kept(found, label, density, draft, task)
        reference = round(float(np.mean(floats)), 4)
        yield [
            {
                "network": name,
                "method": label,
                "density": round(density, 5),
                "accuracy": round(float(np.mean(scores)), 4),
                "accuracies": [round(s, 4) for s in scores],
                "reference": reference,
                "epochs_a_round": epochs,
            }
            for (label, density), scores in found.items()
        ]


def kept(found, label, density, draft, task):
    score = task.score(task.test, load(artifact_of(draft, BITS).to_bytes()).into(draft.model))
    found.setdefault((label, density), []).append(score)
    print(label, round(density, 4), score, flush=True)


# ---------------------------------------------------------------- files


def surgery(name: str):
    """The given LeNet at the density of Dynamic Network Surgery, and its file."""
    density, accuracy = SURGERY[name]
    rate = {"lenet300": 0.1, "lenet5": 0.02}[name]
    epochs, rounds, bits = {"lenet300": (12, 18, 3), "lenet5": (5, 12, 4)}[name]
    task = task_of(name, tn.Schedule(epochs=epochs, lr=rate, weight_decay=1e-4), shifted)
    began, reference = time.monotonic(), round(task.score(task.test), 4)
    pruning = Prune(density, rounds, epochs, final=3 * epochs)
    recipe = (pruning, Pack(KMeans(bits)), Finetune(2 * epochs, lr=rate / 100), Narrow())
    draft, rows = Draft.of_model(task.model), []
    stages = {
        "learning-rate rewinding": recipe[:1],
        f"learning-rate rewinding, {2**bits} shared values, coded": recipe[1:],
    }
    for label, part in stages.items():
        draft = run(draft, task, part, cache_folder(), lambda row: print(row, flush=True))
        size, score = scored(draft, task)
        row = {"network": name, "method": label, "density": round(density_of(draft), 5), "bytes": size}
        more = {"reference": reference, "seed": 0, "seconds": round(time.monotonic() - began, 1)}
        rows.append({**row, "accuracy": round(score, 4), **more})
    surgery = {"network": name, "method": "Dynamic Network Surgery", "density": density, "accuracy": accuracy}
    yield [*rows, {**surgery, "peer": True, "reference": reference}]


def resnet_file(size: int = 51_700):
    """ResNet-20 pruned to a quarter with its rate rewound, quantized to a size with zeros held, its levels trained.

    Beside it what becomes of the dense network at that size. Nothing is chosen on the held data here, so all images of
    the training split train.
    """
    schedule = tn.Schedule(epochs=54, lr=0.1, cosine=True, weight_decay=3e-4)
    task = task_of("resnet20", schedule, cropped)
    task = replace(task, valid=task.held())
    few = replace(task, train=tuple(part[:1024] for part in task.train), augment=None)
    reference, dense = round(task.score(task.test), 4), Draft.of_model(task.model)
    quantized = "output-aware quantization"

    def row(method: str, draft: Draft, began: float) -> dict:
        bytes_, score = scored(draft, task)
        levels = [levels_of(draft.tensors[name].tree) for name in draft.weights()]
        density = sum(np.count_nonzero(q) for q in levels) / sum(q.size for q in levels)
        row = {"network": "resnet20", "method": method, "bytes": bytes_, "accuracy": round(score, 4)}
        row |= {"density_of_levels": round(float(density), 4), "reference": reference, "seed": 0}
        return {**row, "seconds": round(time.monotonic() - began, 1)}

    began = time.monotonic()
    rows = [row(f"{quantized}, without retraining", to_size(Knowledge.of(dense, few), size), began)]
    yield rows
    began = time.monotonic()
    draft = run(dense, task, (Prune(0.25, 2, 4, final=54),), cache_folder(), lambda row: print(row, flush=True))
    rows.append(row("learning-rate rewinding, 58 epochs", draft, began))
    draft = to_size(Knowledge.of(draft, few), size)
    rows.append(row(f"learning-rate rewinding, then {quantized}", draft, began))
    draft = TrainLevels(4, 2e-3)(draft, task)
    rows.append(row(f"learning-rate rewinding, then {quantized}, levels trained for 4 epochs", draft, began))
    yield rows


def levels_of(tree) -> np.ndarray:
    """What tells zeros: the levels, or the weights themselves."""
    return tree.coefficients.q if hasattr(tree, "coefficients") else tree.q if hasattr(tree, "q") else unpack(tree)


def resnet_curves():
    """Rewinding against fine-tuning from the given weights, at equal epochs, down to a tenth of the weights."""
    epochs, rounds = 2, 2
    task = task_of("resnet20", tn.Schedule(epochs=epochs, lr=0.02, drops=(0.5,), weight_decay=1e-4), cropped)
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    reference, rows = round(task.score(task.test), 4), []
    for label, retrain in (("learning-rate rewinding", "learning-rate"), ("fine-tuning", "finetune")):
        task.model.load_state_dict(state)
        draft = Draft.of_model(task.model)
        for part in Prune(0.1, rounds, epochs, retrain=retrain).parts():
            began = time.monotonic()
            draft = part(draft, task)
            size, score = scored(draft, task)
            row = {"network": "resnet20", "method": label, "density": round(0.1 ** (part.number / rounds), 4)}
            more = {"bytes": size, "accuracy": round(score, 4), "reference": reference, "epochs_a_round": epochs}
            rows.append({**row, **more, "seed": 0, "seconds": round(time.monotonic() - began, 1)})
            print(rows[-1], flush=True)
        yield rows


# ---------------------------------------------------------------- second order


def second_order(name: str):
    """MLPrune against magnitude at equal density and equal retraining, from the given weights.

    In one round, before and after it, and for the LeNets in three.
    """
    densities = {"lenet300": (0.1, 0.03), "lenet5": (0.1, 0.02), "resnet20": (0.5, 0.3)}[name]
    rate, epochs = {"lenet300": (0.02, 3), "lenet5": (0.01, 1), "resnet20": (0.01, 1)}[name]
    schedule = tn.Schedule(epochs=epochs, lr=rate, drops=(0.67,), weight_decay=1e-4)
    task = task_of(name, schedule, cropped if name == "resnet20" else shifted)
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    reference, rows = round(task.score(task.test), 4), []
    for density in densities:
        for label, stage in (
            ("magnitude", Prune(density, 1, retrain="none")),
            ("MLPrune", OBS(density, "kronecker", "sum")),
            ("MLPrune, best update", OBS(density, "kronecker", "best")),
        ):
            task.model.load_state_dict(state)
            pruned = stage(Draft.of_model(task.model), replace(task, augment=None))
            before = scored(pruned, task)[1]
            size, after = scored(Retrain(epochs=epochs)(pruned, task), task)
            row = {"network": name, "method": label, "density": density, "bytes": size, "before": round(before, 4)}
            rows.append({**row, "accuracy": round(after, 4), "reference": reference, "epochs": epochs, "seed": 0})
            print(rows[-1], flush=True)
        rounds = {
            "magnitude, three rounds": (Prune(density, 3, epochs),),
            "MLPrune, three rounds": mlprune(density, 3, epochs)[:-1],
        }
        for label, stages in () if name == "resnet20" else rounds.items():
            task.model.load_state_dict(state)
            draft = Draft.of_model(task.model)
            for stage in stages:
                draft = stage(draft, task)
            size, after = scored(draft, task)
            row = {"network": name, "method": label, "density": density, "bytes": size, "accuracy": round(after, 4)}
            rows.append({**row, "reference": reference, "epochs": 3 * epochs, "seed": 0})
            print(rows[-1], flush=True)
    yield rows


def surgery_curve():
    """ResNet-20 without retraining: exact optimal brain surgery, one sweep and magnitude, from 1,024 images."""
    task = ptq.task_of("resnet20")
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    reference, rows = round(task.score(task.test), 4), []
    for density in (0.5, 0.4, 0.3):
        for label, stage in (
            ("magnitude", Prune(density, 1, retrain="none")),
            ("SparseGPT", OBS(density, "sweep")),
            ("exact OBS", OBS(density, "exact")),
        ):
            task.model.load_state_dict(state)
            began = time.monotonic()
            draft = stage(Draft.of_model(task.model), task)
            size, score = scored(draft, task)
            row = {"network": "resnet20", "method": label, "zeros": round(1 - density, 2), "bytes": size}
            more = {"accuracy": round(score, 4), "reference": reference, "epochs": 0}
            rows.append({**row, **more, "seconds": round(time.monotonic() - began, 1)})
            print(rows[-1], flush=True)
    yield rows


# ---------------------------------------------------------------- channels


def searches(episodes: int = 80):
    """AMC, random search with as many episodes and uniform ratios at half of ResNet-20's MACs."""
    task = task_of("resnet20", tn.Schedule(epochs=1, lr=0.01, drops=(), weight_decay=1e-4), cropped)
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    reference, rows, plain = round(task.score(task.test), 4), [], replace(task, augment=None)
    for label, stage in (
        ("uniform ratios", Channels(0.5)),
        ("random search", SearchChannels(0.5, RandomSearch(episodes), scored=1000)),
        ("AMC", SearchChannels(0.5, AMC(episodes, episodes // 4), scored=1000)),
    ):
        task.model.load_state_dict(state)
        began = time.monotonic()
        draft = stage(Draft.of_model(task.model), plain)
        seconds = round(time.monotonic() - began, 1)
        before = scored(draft, task)[1]
        macs = Coupling.of(task, realise(draft.model, draft.tensors), task.test[0][:1]).macs(set())
        size, after = scored(Retrain(epochs=1)(draft, task), task)
        row = {"network": "resnet20", "method": label, "macs": macs, "bytes": size, "before": round(before, 4)}
        more = {"reference": reference, "epochs": 1, "search_seconds": seconds, "seed": 0}
        rows.append({**row, "accuracy": round(after, 4), **more})
        print(rows[-1], flush=True)
        yield rows


def halved():
    """Half of the MACs taken out as channels, without retraining; the smaller module runs, exports and is timed."""
    rows = []
    for name in ("resnet20", "resnet56", "squeezenet11", "mobilenetv2"):
        task = ptq.task_of(name)
        reference, x = round(task.score(task.test), 4), task.test[0][:1]
        draft = Channels(0.5)(Draft.of_model(MODELS.load(name)), task)
        whole, less = MODELS.load(name).eval(), realise(draft.model, draft.tensors).eval()
        exported = torch.export.export(less, (x,)).module()
        with torch.no_grad():
            assert torch.allclose(exported(x), less(x), atol=1e-4)
        size, score = scored(draft, task)
        times = latencies([whole, less], x)
        row = {"network": name, "method": "uniform ratios, half the MACs", "bytes": size, "accuracy": round(score, 4)}
        more = {"reference": reference, "macs": Coupling.of(task, less, x).macs(set())}
        more |= {"macs_before": Coupling.of(task, whole, x).macs(set()), "latency_ratio": round(times[1] / times[0], 3)}
        more |= {"parameters": count(less), "parameters_before": count(whole), "epochs": 0}
        rows.append({**row, **more})
        print(rows[-1], flush=True)
        yield rows


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def latencies(models: list[torch.nn.Module], x: torch.Tensor, rounds: int = 25) -> list[float]:
    """Median CPU seconds of one image on one thread, the models in turns."""
    spent = [[] for _ in models]
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(rounds):
            for model, kept_times in zip(models, spent):
                begun = time.process_time()
                model(x)
                kept_times.append(time.process_time() - begun)
    return [statistics.median(times) for times in spent]


PARTS = {
    "lenet300-curves": lambda: curves("lenet300"),
    "lenet5-curves": lambda: curves("lenet5"),
    "lenet300-file": lambda: surgery("lenet300"),
    "lenet5-file": lambda: surgery("lenet5"),
    "resnet20-file": resnet_file,
    "resnet20-curves": resnet_curves,
    "lenet300-second-order": lambda: second_order("lenet300"),
    "lenet5-second-order": lambda: second_order("lenet5"),
    "resnet20-second-order": lambda: second_order("resnet20"),
    "resnet20-surgery": surgery_curve,
    "resnet20-search": searches,
    "channels": halved,
}


def keep(part: str, rows: list[dict]) -> None:
    """Put a part's rows into the table, in place of those it had."""
    order = list(PARTS)
    merged = [r for r in earlier("pruning") if r["part"] != part] + [{"part": part, **row} for row in rows]
    write("pruning", sorted(merged, key=lambda r: order.index(r["part"])), 0)


def main(parts: list[str]) -> None:
    for part in parts:
        for rows in PARTS[part]():
            keep(part, rows)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PARTS))

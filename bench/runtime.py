"""Products and networks on packed weights, against dense torch, torch's int8, onnxruntime and SciPy.

Run: make bench NAME=runtime (or: python bench/runtime.py [PART [NAME ...]]) with parts networks, of which some may be
named, fully_connected and layers; without arguments all of them. Rows that are not run again are kept.

Layers: milliseconds of the calling thread's CPU clock at one thread, by the wall clock at two; least and median of
ROUNDS in which all take turns, fewer where they take over SECONDS, weights in turn from copies of LARGE bytes in all,
so that they come from memory as in a network. Networks: by the wall clock, and by how many bytes a fresh process grows
that has the module and an input already, loads the file and runs it once. MiniLM needs its package, which minilm.py
says how to install.
"""

import functools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from table import DATA, earlier, keep, real_data
from torch import nn

from tersenet import Budget, compress, native
from tersenet.artifact import Artifact, Tensor, load
from tersenet.methods import uniform
from tersenet.packed import Codebook, Sparse, Tree, Uniform, unpack
from tersenet.published import deep_compression, repacked, squeezenet
from tersenet.runtime import kernels
from tersenet.runtime.forms import Form
from tersenet.runtime.measure import Use, alone, first_use
from tersenet.stages.pack import Narrow, Pack

ROUNDS, SECONDS, LARGE, SHAPES, BATCHES = 25, 120.0, 128 << 20, ((4096, 4096), (1024, 4096)), (1, 32)
TOKENS = 32  # of a sentence
# Rows, columns and density of the fully connected layers of Deep Compression's AlexNet and VGG-16 (Han et al. 2016).
FULLY_CONNECTED = {
    "AlexNet fc6": (4096, 9216, 0.09), "AlexNet fc7": (4096, 4096, 0.09), "AlexNet fc8": (1000, 4096, 0.25),
    "VGG-16 fc6": (4096, 25_088, 0.04), "VGG-16 fc7": (4096, 4096, 0.04), "VGG-16 fc8": (1000, 4096, 0.23),
}  # fmt: skip
Action = Callable[[], object]
Row = dict[str, Any]


def timed(actions: dict[str, Sequence[Action]], threads: int) -> dict[str, tuple[float, float]]:
    """Least and median milliseconds of one of the actions that each name has, of rounds in which all take turns."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in actions}
    until = time.perf_counter() + SECONDS
    for done in range(ROUNDS):
        if done >= 5 and time.perf_counter() > until:
            break
        for name, copies in actions.items():
            begun = clock()
            for action in copies:
                action()
            spent[name].append(1e3 * (clock() - begun) / len(copies))
    return {name: (min(own), statistics.median(own)) for name, own in spent.items()}


def sparse(rng: np.random.Generator, shape: tuple[int, int], part: float, shared: int = 0) -> Tree:
    mask = rng.random(shape) < part
    n = int(np.count_nonzero(mask))
    if shared:
        return Sparse(mask, Codebook(rng.integers(0, shared, n).astype(np.uint8), floats(rng, shared, 1)))
    return Sparse(mask, floats(rng, n))


def floats(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def levels(rng: np.random.Generator, shape: tuple[int, int], low: int, high: int, group: int = 0) -> Tree:
    q = rng.integers(low, high + 1, shape).astype(np.int8)
    return Uniform(q, rng.random((shape[0], shape[1] // group if group else 1)).astype(np.float32) + 0.5)


def trees(rng: np.random.Generator, shape: tuple[int, int]) -> dict[str, tuple[Tree, int]]:
    """By name, a weight and the bits of its inputs."""
    found: dict[str, tuple[Tree, int]] = {
        f"sparse {100 - 100 * p:.0f} %": (sparse(rng, shape, p), 24) for p in (0.2, 0.1, 0.05)
    }
    found["sparse 90 %, 32 values"] = sparse(rng, shape, 0.1, 32), 24
    found["mask 60 %"] = sparse(rng, shape, 0.4), 24
    for bits in (8, 16, 24):
        found[f"8-bit levels, {bits}-bit inputs"] = levels(rng, shape, -127, 127), bits
        found[f"4-bit levels by 32, {bits}-bit inputs"] = levels(rng, shape, -8, 7, 32), bits
        found[f"ternary by 128, {bits}-bit inputs"] = levels(rng, shape, -1, 1, 128), bits
    found["16 values"] = Codebook(rng.integers(0, 16, shape).astype(np.uint8), floats(rng, 16, 1)), 24
    found["product quantization, d = 8"] = (
        Codebook(rng.integers(0, 256, (shape[0], shape[1] // 8)).astype(np.uint8), floats(rng, 256, 8)),
        24,
    )
    return found


def copies(n: int) -> int:
    return max(1, min(8, LARGE // max(n, 1)))


def packed_actions(form: Form, x: Any, threads: int) -> list[Action]:
    import copy

    forms = [copy.deepcopy(form) for _ in range(copies(form.nbytes))]
    return [functools.partial(one.product, x, threads) for one in forms]


def torch_actions(weight: Any, x: Any) -> dict[str, list[Action]]:
    inputs = torch.from_numpy(x)
    dense = [torch.from_numpy(weight.copy()) for _ in range(copies(weight.nbytes))]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(dense[0], False)
    with warnings.catch_warnings(action="ignore"):
        quantized: Any = torch.ao.quantization.quantize_dynamic
        eights = [quantized(nn.Sequential(linear), dtype=torch.qint8) for _ in range(copies(weight.size))]
    return {
        "torch float32": [functools.partial(nn.functional.linear, inputs, one) for one in dense],
        "torch dynamic int8": [functools.partial(one, inputs) for one in eights],
    }


def onnx_actions(weight: Any, x: Any, threads: int) -> dict[str, list[Action]]:
    """onnxruntime's own forms, where it is installed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    rows, columns = weight.shape
    rng = np.random.default_rng(0)

    def session(nodes: list[Any], constants: dict[str, Any]) -> Any:
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x.shape), ("y", (len(x), rows)))
        ]
        held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], held)
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=10)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def actions(size: int, nodes: list[Any], constants: dict[str, Any]) -> list[Action]:
        return [functools.partial(session(nodes, constants).run, None, {"x": x}) for _ in range(min(4, copies(size)))]

    found = {
        "onnxruntime float32": actions(
            weight.nbytes, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight.T.copy()}
        )
    }
    eight = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "c"], ["sc"]),
        helper.make_node("Mul", ["f", "sc"], ["y"]),
    ]
    q = rng.integers(-127, 128, (columns, rows)).astype(np.int8)
    found["onnxruntime dynamic int8"] = actions(q.nbytes, eight, {"w": q, "c": floats(rng, rows)})
    for bits, group in ((8, 32), (4, 32), (4, 128), (2, 32), (2, 128)):
        blocks = columns // group
        numbers = {"K": columns, "N": rows, "bits": bits, "block_size": group, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "c"], ["y"], domain="com.microsoft", **numbers)
        w = rng.integers(0, 256, (rows, blocks, group * bits // 8)).astype(np.uint8)
        scale = rng.random(rows * blocks).astype(np.float32)
        try:
            found[f"onnxruntime {bits} bits by {group}"] = actions(w.nbytes, [node], {"w": w, "c": scale})
        except Exception as wrong:  # what this version does not have
            print(f"onnxruntime {bits} bits by {group}: {wrong}", file=sys.stderr)
    return found


def scipy_actions(tree: Tree, x: Any) -> list[Action]:
    from scipy.sparse import csr_array

    matrix, across = csr_array(np.asarray(unpack(tree))), np.ascontiguousarray(x.T)
    return [functools.partial(matrix.copy().__matmul__, across) for _ in range(copies(matrix.data.nbytes))]


def rows_of(layer: str, batch: int, threads: int, spent: dict[str, tuple[float, float]]) -> list[Row]:
    least, median = spent["torch float32"]
    return [
        {
            "layer": layer, "batch": batch, "threads": threads, "form": name, "least_ms": round(own[0], 4),
            "median_ms": round(own[1], 4), "times_torch": round(least / own[0], 2),
            "times_torch_median": round(median / own[1], 2), "peer": not name.startswith("ours"),
        }
        for name, own in spent.items()
    ]  # fmt: skip


def layers() -> Iterator[Row]:
    """Every form and every peer."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        weight, own = floats(rng, *shape), trees(rng, shape)
        for batch in BATCHES:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                x = floats(rng, batch, shape[1])
                actions: dict[str, Sequence[Action]] = {**torch_actions(weight, x), **onnx_actions(weight, x, threads)}
                for name, (tree, bits) in own.items():
                    form = kernels.TABLE[type(tree)](tree, bits // 8)
                    assert form is not None
                    actions[f"ours, {name}"] = packed_actions(form, x, threads)
                    if threads == 1 and name in ("sparse 80 %", "sparse 90 %", "sparse 95 %"):
                        actions[f"SciPy CSR, {name}"] = scipy_actions(tree, x)
                yield from rows_of(f"{shape[0]} x {shape[1]}", batch, threads, timed(actions, threads))


def fully_connected() -> Iterator[Row]:
    """AlexNet's and VGG's at Deep Compression's densities, one input of which all or 30 % are not zero."""
    rng = np.random.default_rng(0)
    torch.set_num_threads(1)
    for name, (height, width, part) in FULLY_CONNECTED.items():
        tree, x = sparse(rng, (height, width), part, 32), np.abs(floats(rng, 1, width))
        forms = {"ours, by columns": kernels.choose(tree).form, "ours, by rows": kernels.TABLE[Sparse](tree, 3)}
        dense = torch.from_numpy(np.asarray(unpack(tree)))
        for kept in (1.0, 0.3):
            x = np.where(rng.random(x.shape) < kept, x, 0).astype(np.float32)
            linear = functools.partial(nn.functional.linear, torch.from_numpy(x), dense)
            actions: dict[str, Sequence[Action]] = {"torch float32": [linear]}
            actions |= {told: packed_actions(form, x, 1) for told, form in forms.items() if form}
            yield from ({**row, "inputs_not_zero": kept} for row in rows_of(name, 1, 1, timed(actions, 1)))


def module_of(name: str) -> nn.Module:
    _, models = real_data()
    if name == "minilm":
        import minilm

        return minilm.load()
    if name in ("deep_compression_squeezenet", "pq_resnet50"):
        from published import DeepCompressionSqueezeNet, PQResNet

        network: nn.Module = PQResNet.load(50) if name == "pq_resnet50" else DeepCompressionSqueezeNet()
        return network.eval()
    model: nn.Module = models.load(name)
    return model.eval()


def inputs_of(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if name == "minilm":
        ids = torch.randint(1000, 30_000, (batch, TOKENS), generator=generator)
        return ids, torch.ones_like(ids)
    size = {"lenet5": (1, 28, 28), "lenet300": (784,), "resnet20": (3, 32, 32)}
    return (torch.randn(batch, *size.get(name, (3, 224, 224)), generator=generator),)


def pruned(name: str) -> Artifact:
    """The 8 % of weights that are largest alone; only speed is asked of these."""
    tensors = {}
    for part, value in module_of(name).state_dict().items():
        w = value.numpy().copy()
        mask = np.abs(w) > np.quantile(np.abs(w), 0.92) if w.ndim > 1 else None
        tensors[part] = Tensor(w if mask is None else Sparse(mask, w[mask]), str(w.dtype))
    return Artifact(tensors)


def published(_: str) -> Artifact:
    """Deep Compression's own SqueezeNet, with the module's names."""
    artifact = deep_compression((DATA / "models" / "deep_compression_squeezenet.net").read_bytes(), squeezenet())
    return Artifact({"_".join(n.split(".")[:-1]) + n[n.rindex(".") :]: t for n, t in artifact.tensors.items()})


def product_quantized(name: str) -> Artifact:
    """The authors' own ResNet-50; the norms' means and variances, which are folded, are the module's."""
    state = module_of(name).state_dict()
    stored = repacked(load_file(DATA / "models" / f"{name}.safetensors"), {n: tuple(v.shape) for n, v in state.items()})
    rest = {n: Tensor(v.numpy(), str(v.dtype).removeprefix("torch.")) for n, v in state.items()}
    return Artifact({n: stored.tensors.get(n, rest[n]) for n in state})


def eight_bits(name: str) -> Artifact:
    """Levels of eight bits by row."""
    return compress(dict(module_of(name).state_dict()), (Pack(uniform.Uniform(8, by_row=True)), Narrow())).artifact


def by_default(name: str) -> Artifact:
    """Four bits a weight by the default path."""
    return compress(dict(module_of(name).state_dict()), budget=Budget(ratio=8)).artifact


NETWORKS: dict[str, Callable[[str], Artifact]] = {
    "lenet300": pruned, "lenet5": pruned, "deep_compression_squeezenet": published, "pq_resnet50": product_quantized,
    "resnet20": by_default, "squeezenet11": by_default, "mobilenetv2": by_default, "minilm": eight_bits,
}  # fmt: skip


def networks(*names: str) -> Iterator[Row]:
    """Whole networks from their files."""
    torch.set_num_threads(1)
    for name in names or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            path, plain = Path(folder) / "n.terse", Path(folder) / "n.pt"
            NETWORKS[name](name).save(path)
            artifact = load(path)
            dense = artifact.into(module_of(name))
            torch.save(dense.state_dict(), plain)
            for batch in BATCHES:
                x = inputs_of(name, batch)
                packed = artifact.attach(module_of(name), batch * (TOKENS if name == "minilm" else 1))
                with torch.inference_mode():
                    wanted, found = dense(*x), packed(*x)
                    error = float((found - wanted).norm() / wanted.norm())
                    assert error < 1e-4, f"{name}: outputs differ by {error}"
                    actions = {"torch float32": [functools.partial(dense, *x)], "ours": [functools.partial(packed, *x)]}
                    spent = timed(actions, 2)
                more = {"bytes": path.stat().st_size, "output_error": error}
                yield from ({"network": name, **more, **row} for row in rows_of("whole", batch, 1, spent))
            for way, file in (("attach", path), ("into", path), ("torch.load", plain)):
                uses = [alone(once, name, way, file) for _ in range(3)]
                loaded, first, memory = (statistics.median(part) for part in zip(*uses, strict=True))
                figures: Row = {"load_ms": round(1e3 * loaded, 1), "first_ms": round(1e3 * first, 1)}
                yield {"network": name, "way": way, **figures, "memory": round(memory), "peer": way == "torch.load"}


def once(name: str, way: str, path: Path) -> Use:
    """The first use of a network, for one input."""
    torch.set_num_threads(1)
    module, x = module_of(name), inputs_of(name, 1)

    def made() -> nn.Module:
        if way == "torch.load":
            module.load_state_dict(torch.load(path))
            return module
        network: nn.Module = load(path).attach(module) if way == "attach" else load(path).into(module)
        return network

    return first_use(made, lambda network: network(*x))


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "networks": networks, "fully_connected": fully_connected, "layers": layers
}  # fmt: skip


def place(row: Row) -> tuple[int, int]:
    """Where a row stands: the number of its part, and of networks its own."""
    if "network" in row:
        return 0, list(NETWORKS).index(row["network"])
    return (1 if row["layer"] in FULLY_CONNECTED else 2), 0


def main(part: str | None = None, *names: str) -> None:
    for name in [part] if part else PARTS:
        before, rows = earlier("runtime"), list[Row]()
        for row in PARTS[name](*names):
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            again = {place(row) for row in rows}
            keep("runtime", sorted([*rows, *(row for row in before if place(row) not in again)], key=place))


if __name__ == "__main__":
    assert native.library() is not None
    main(*sys.argv[1:])

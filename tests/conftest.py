"""Shared fixtures: real data where it lies beside the project, trees of every node, and the NumPy twins."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tersenet import native
from tersenet.artifact import Artifact, Coding, Section, Tensor
from tersenet.bloomier import built
from tersenet.codecs import CODECS
from tersenet.codecs.trellis import NEXT
from tersenet.packed import (
    Bloomier,
    Codebook,
    Factored,
    Hashed,
    Lattice,
    Reshaped,
    Sliced,
    Sparse,
    Transformed,
    Uniform,
)

collect_ignore = ["workers.py"]  # a program
# A machine that others use is slow for seconds at a time, which says nothing about an example.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that took long where all were timed are marked `slow`; `make quick` leaves them out."""
    slow = set(Path(__file__).with_name("slow.txt").read_text().split())
    for item in items:
        if slow & {item.nodeid, item.nodeid.partition("[")[0]}:
            item.add_marker("slow")


DATA = Path(os.environ.get("TERSENET_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Results of stages are kept for the test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data():
    """The modules `datasets` and `models` of the real data; skips where it is absent."""
    if not (DATA / "datasets.py").exists():
        pytest.skip("the real data is not beside the project")
    sys.path.insert(0, str(DATA))
    import datasets
    import models

    return datasets, models


@pytest.fixture(params=["native", "twin"])
def both(request, monkeypatch):
    """Run a test with the C core and with the NumPy twins."""
    if request.param == "twin":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C core was built")
    return request.param


def fresh_process(script, *arguments, check=True, **environment):
    """What a script prints in a fresh Python process, with names of this folder importable."""
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bloomier(rng):
    """Cells, codewords, bits, seed and length of a filter with a value for 20 of 120 places."""
    cells, seed, length = built(np.sort(rng.choice(120, 20, False)), rng.integers(0, 5, 20), 6)
    return cells.astype(np.uint8), floats(5), 6, seed, length


def trees():
    """A tree of every kind of node, some nested."""
    rng = np.random.default_rng(1)
    mask = rng.random((6, 20)) < 0.2
    scale = np.array(0.125, np.float32)
    levels = rng.integers(-3, 4, (4, 3, 3, 3)).astype(np.int8)
    steps = (rng.integers(-4, 5, (4, 1, 1, 1)).astype(np.int8), rng.integers(-4, 5, (1, 3, 3, 3)).astype(np.int8))
    groups = np.arange(-24, 24, dtype=np.int8).reshape(4, 12)
    codebook = Codebook(rng.integers(0, 5, int(mask.sum())).astype(np.uint8), floats(5, 1))
    return {
        "dense": floats(5, 7),
        "Uniform": Uniform(rng.integers(0, 16, (6, 8)).astype(np.uint8), floats(6, 1), np.full((6, 1), -8, np.int8)),
        "Uniform-steps": Uniform(levels, scale, None, steps),
        "Uniform-group": Uniform(groups, floats(4, 3), None, (np.array([[1, -1]], np.int8),)),
        "Codebook": Codebook(rng.integers(0, 9, (6, 4)).astype(np.uint8), floats(9, 3)),
        "Codebook-group": Codebook(np.arange(24, dtype=np.uint8).reshape(6, 4) % 5, floats(3, 5, 2)),
        "Sparse": Sparse(mask, floats(int(mask.sum()))),
        "Sparse-Codebook": Sparse(mask, codebook),
        "Sliced": Sliced(np.array([0, 2, 5], np.uint8), floats(4, 3), 1, 7),
        "Factored": Factored("or,ri->oi", (floats(6, 2), Uniform(np.ones((2, 5), np.int8), scale)), (6, 5)),
        "Transformed": Transformed(Uniform(levels, scale, None, steps)),
        "Lattice": Lattice(Codebook(np.arange(8, dtype=np.uint8) % 3, floats(3, 2)), -35, 7, 2, (3, 5)),
        "Hashed": Hashed(floats(9), 11, (4, 5)),
        "Bloomier": Bloomier(*bloomier(rng), (6, 20)),
        "Reshaped": Reshaped(Uniform(levels, floats(4, 1, 1, 1)), (2, 3, 2, 3, 3), (0, 2, 1, 3, 4), (6, 2, 3, 3)),
    }


def path_levels(*shape):
    """Levels whose rows follow the trellis, as dependent quantization makes them."""
    rng, levels = np.random.default_rng(3), np.zeros((shape[0], math.prod(shape[1:])), np.int8)
    for row in levels:
        state = 0
        for at, number in enumerate(rng.geometric(0.4, len(row)) - 1):
            row[at] = (2 * number - (state & 1 and number > 0)) * rng.choice([-1, 1])
            state = NEXT[state][number & 1]
    return levels.reshape(shape)


def small_files():
    """Bytes of files that hold every node, every codec, tied, shared, empty, scalar and odd tensors."""
    rng = np.random.default_rng(2)
    files = {f"node-{name}": Artifact({"layer.weight": Tensor(tree)}).to_bytes() for name, tree in trees().items()}
    shared = Tensor(floats(3, 4))
    odd = {
        "tied.a": shared,
        "tied.b": shared,
        "empty": Tensor(np.zeros((0, 3), np.float32), note="dense: empty"),
        "scalar": Tensor(np.array(7, np.int64), "int64"),
        "nan": Tensor(np.array([np.nan, -0.0, np.inf, 1e-42], np.float32)),
        "half": Tensor(np.array([1.5, 2.5], np.float16), "float16"),
        "flag": Tensor(np.array([True, False]), "bool"),
        "wide": Tensor(np.array([-(2**63), 2**63 - 1]), "int64"),
    }
    files["odd"] = Artifact(odd, meta={"metric": 0.5}).to_bytes()
    sections = {"graph": Section(b"a graph, a graph, a graph, a graph"), "\u00e9": Section(b"\0\1\2"), "": Section(b"")}
    files["sections"] = Artifact({"w": shared}, sections=sections).to_bytes()
    files["small"] = Artifact(odd | {n: Tensor(t, error=0.1) for n, t in trees().items()}, sections=sections).to_bytes()
    palette = np.sort(floats(70))
    palette[30:32] = -0.0, 0.0
    ends = np.concatenate([[-np.nan, -np.inf], np.linspace(-1, 3e38, 80), [np.inf, np.nan]]).astype(np.float32)
    rising = {"palette": palette, "ends": ends, "long": np.linspace(-1, 1, 1500, dtype=np.float32)}
    files["rising"] = Artifact({name: Tensor(values) for name, values in rising.items()}).to_bytes()
    codewords = floats(40, 9)
    several = [Codebook(rng.integers(0, 40, (n, 8)).astype(np.uint8), codewords) for n in (5, 6)]
    files["shared"] = Artifact({f"w{k}": Tensor(tree) for k, tree in enumerate(several)}).to_bytes()
    values = {
        "trits": rng.integers(-1, 2, (3, 67)),
        "wide": rng.integers(0, 1000, (5, 20)),
        "few": rng.choice([0, 0, 0, 5, -2], (9, 10)),
    }
    files["trellis"] = Artifact({"w": Tensor(Uniform(path_levels(8, 16, 3, 3), np.array(0.5, np.float32)))}).to_bytes()
    for codec in CODECS:
        tensors = {n: Tensor(Uniform(v.astype(np.int16), np.array(0.5, np.float32))) for n, v in values.items()}
        files[f"codec-{codec}"] = Artifact(tensors, Coding((codec,))).to_bytes()
    return files

"""Every network of the zoo: no worse than rounding at the same bytes, whole when opened, the same at every run."""

import copy
import functools
import math
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from networks import NETWORKS
from networks.data import perceptron
from networks.zoo import called, labelled, part
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tersenet as tn
from tersenet import cores

BATCH = 16
AGAIN = [name for name, zoo in NETWORKS.items() if zoo.again]
ROUNDED = [(name, bits) for name, zoo in NETWORKS.items() for bits in zoo.bits]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Torch and our own threads on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(cores, "usable", lambda: 1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def made(name):
    """A network's task, or named arrays."""
    return NETWORKS[name].make()


@functools.cache
def compressed(name, size=None):
    """The result at so many bytes, or at the network's ratio; it keeps to them and leaves all that it was given."""
    source, module = source_of(name), module_of(name)
    before = {n: t.clone() for n, t in module.state_dict().items()}, torch.get_rng_state(), module.training
    budget = tn.Budget(ratio=NETWORKS[name].ratio) if size is None else tn.Budget(size=size)
    result = tn.compress(source, budget=budget)
    if size is None:
        given = {(t.data_ptr(), t.shape): t.numel() for t in module.state_dict().values()}
        size = 4 * sum(given.values()) / NETWORKS[name].ratio
    assert result.artifact.nbytes <= size
    assert all(same(before[0][n], t) for n, t in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1]) and module.training == before[2]
    return result


def source_of(name):
    """What is compressed: the task, or the state dict alone."""
    source = made(name)
    return dict(source.model.state_dict()) if NETWORKS[name].blind else source


def module_of(name):
    """The network's module, or one that holds the named arrays."""
    source = made(name)
    if not isinstance(source, dict):
        return source.model
    holder = nn.Module()
    for path, value in source.items():
        at = holder
        *parents, last = path.split(".")
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        native = value.astype(value.dtype.newbyteorder("=")) if isinstance(value, np.ndarray) else value
        at.register_buffer(last, torch.as_tensor(native).clone())
    return holder


def fresh(name):
    """A module of the same architecture that holds nothing of the network."""
    module = module_of(name)
    if not isinstance(made(name), dict):
        outputs(name, module)  # whatever state it keeps is now without a graph
    own = copy.deepcopy(module)
    for value in own.state_dict().values():
        value.copy_(torch.zeros_like(value))
    return own


def batches(data):
    """The inputs of a split of any form, some at a time."""
    if isinstance(data, tuple):
        return [part(data[0], slice(at, at + BATCH)) for at in range(0, len(data[1]), BATCH)]
    return (inputs for inputs, _ in (DataLoader(data, BATCH) if isinstance(data, Dataset) else data))


def floats(inputs, dtype):
    if isinstance(inputs, dict):
        return {name: floats(one, dtype) for name, one in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(floats(one, dtype) for one in inputs)
    inputs = torch.as_tensor(inputs)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


@torch.no_grad()
def outputs(name, module):
    """What a module says to the test inputs, without what class scores have in common: [numbers]."""
    task, axis = made(name), NETWORKS[name].classes
    dtype, training = next(module.parameters()).dtype, module.training
    forward, module = task.forward or called, module.eval()
    found = [forward(module, floats(inputs, dtype)).double() for inputs in batches(task.test)]
    module.train(training)
    return torch.cat([(y if axis is None else y - y.mean(axis, keepdim=True)).flatten() for y in found])


def weights(name):
    """The names of what rounding takes: floats of two axes or more that are trained, or may be."""
    source, state = made(name), module_of(name).state_dict()
    if isinstance(source, dict):
        known = {n for n in state if not any(fnmatch(n, kept) for kept in NETWORKS[name].exact)}
    else:
        known = {n for n, _ in source.model.named_parameters(remove_duplicate=False)}
    return {n for n in known if state[n].is_floating_point() and state[n].dim() > 1 and state[n].numel()}


def rounded(name, bits):
    """The state after symmetric rounding by row of the first axis; its bytes: levels, an fp16 scale a row, the rest."""
    state, taken, most = module_of(name).state_dict(), weights(name), 2 ** (bits - 1) - 1
    done, size = {}, 0
    for n, value in state.items():
        where = value.data_ptr(), value.shape
        if where in done:
            state[n] = done[where]
            continue
        if n in taken:
            rows = value.double().flatten(1)
            scale = rows.abs().amax(1, keepdim=True) / most
            levels = torch.where(scale > 0, rows / scale, 0).round()
            state[n] = (levels * scale).view(value.shape).to(value.dtype)
            size += math.ceil(bits * value.numel() / 8) + 2 * len(value)
        else:
            floating = value.is_floating_point() and value.element_size() > 4
            size += value.numel() * (4 if floating else value.element_size())
        if value.numel():
            done[where] = state[n]
    return state, size


def difference(name, module):
    """The error at the outputs, relative and squared; of arrays alone the mean of their own."""
    if not isinstance(made(name), dict):
        wanted = outputs(name, module_of(name))
        return float((wanted - outputs(name, module)).square().sum() / wanted.square().sum())
    state, found = module_of(name).state_dict(), module.state_dict()
    pairs = [(state[n].double(), found[n].double()) for n in weights(name)]
    size = [was.abs().max() for was, _ in pairs]  # squares of 1e-200 are zero
    return float(
        np.mean([((was - now) / m).square().sum() / (was / m).square().sum() for (was, now), m in zip(pairs, size)])
    )


def same(one, other):
    """Whether two tensors hold the same bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) if t.numel() else t for t in (one, other)))


@pytest.mark.parametrize("name,bits", ROUNDED, ids=str)
def test_no_worse_than_rounding_by_row_at_the_same_bytes(name, bits):
    state, size = rounded(name, bits)
    result = compressed(name, size)
    plain = copy.deepcopy(fresh(name))
    plain.load_state_dict(state)
    ours = difference(name, tn.load(result.artifact.to_bytes()).into(fresh(name)))
    theirs = difference(name, plain)
    assert ours <= theirs + 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_opens_verifies_and_says_what_was_measured(name, tmp_path):
    source, zoo = source_of(name), NETWORKS[name]
    before = module_of(name).state_dict()
    result = compressed(name) if zoo.again or not zoo.bits else compressed(name, rounded(name, zoo.bits[0])[1])
    result.artifact.save(tmp_path / "n.terse")
    opened = tn.load(tmp_path / "n.terse")
    module = opened.into(fresh(name))
    task = None if isinstance(source, dict) else source
    found = tn.verify(tmp_path / "n.terse", against=before, task=task)
    assert found["bytes"] == (tmp_path / "n.terse").stat().st_size == result.artifact.nbytes
    kept_whole(name, before, module.state_dict())
    if not isinstance(made(name), dict):
        assert torch.equal(outputs(name, module), outputs(name, result.artifact.into(fresh(name))))
    if task is not None:
        assert task.score(task.test, module) == pytest.approx(result.after, abs=1e-9)
        assert found["metric"] == pytest.approx(result.after, abs=1e-9)
        assert opened.meta["metric"] == pytest.approx(result.after, rel=1e-5, abs=1e-6)


def kept_whole(name, before, after):
    """Names, shapes and types are kept, and buffers bit for bit, but for those of norms that were folded."""
    zoo = NETWORKS[name]
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    parameters = {n for n, _ in module_of(name).named_parameters(remove_duplicate=False)}
    for n, value in before.items():
        buffer = not isinstance(made(name), dict) and n not in parameters
        folded = not zoo.blind and n.endswith(("running_mean", "running_var", "num_batches_tracked"))
        if (buffer and not folded) or any(fnmatch(n, kept) for kept in zoo.exact):
            assert same(value, after[n]), n


@pytest.mark.parametrize("name", AGAIN)
def test_two_runs_and_any_number_of_threads_give_the_same_bytes(name, monkeypatch):
    one = compressed(name).artifact.to_bytes()
    monkeypatch.setattr(cores, "usable", lambda: 2)
    torch.set_num_threads(2)
    torch.manual_seed(torch.initial_seed() + 1)  # a run does not hang on what was drawn before
    assert tn.compress(source_of(name), budget=tn.Budget(ratio=NETWORKS[name].ratio)).artifact.to_bytes() == one


@pytest.mark.parametrize("name,unseen", [("experts", "experts.3"), ("tuple_of_outputs", "value")])
def test_what_no_output_shows_is_not_taken_for_free(name, unseen):
    """An expert that never runs and a head that nobody reads: coarse at most, never destroyed."""
    before, after = module_of(name).state_dict(), compressed(name).artifact.into(fresh(name)).state_dict()
    for n in weights(name):
        if n.startswith(unseen):
            assert (before[n] - after[n]).norm() < 0.5 * before[n].norm(), n


def broken(change):
    net, data = perceptron(), part(labelled(24), slice(0, 64))
    with torch.no_grad():
        change(net)
    return tn.Task(net, data, data)


def one_shot():
    data = labelled(24)
    return tn.Task(perceptron(), (part(data, slice(at, at + 16)) for at in range(0, 64, 16)))


def unequal():
    inputs, targets = labelled(24)
    return tn.Task(perceptron(), (inputs, targets[:5]))


def not_a_number():
    data = part(labelled(24), slice(0, 64))
    return tn.Task(perceptron(), data, data, metric=lambda outputs, targets: outputs.mean() * math.nan)


def on_no_device():
    with torch.device("meta"):
        net = perceptron()
    return tn.Task(net, part(labelled(24), slice(0, 64)))


REFUSED = {
    "a generator that is gone after one reading": (one_shot, "once"),
    "as many inputs as targets": (unequal, "576 inputs and 5 targets"),
    "no samples": (lambda: tn.Task(perceptron(), part(labelled(24), slice(0, 0))), "0 inputs"),
    "NaN weights": (lambda: broken(lambda net: net[2].weight[0, 0].fill_(math.nan)), "2.weight.*NaN"),
    "infinite weights": (lambda: broken(lambda net: net[0].weight[0, 0].fill_(math.inf)), "0.weight.*infinite"),
    "a metric that is not a number": (not_a_number, "metric is nan"),
    "meta tensors": (on_no_device, "meta"),
    "complex weights": (lambda: {"w": torch.randn(8, 8, dtype=torch.complex64)}, "w: .*complex64"),
    "sparse tensors": (lambda: {"w": torch.eye(8).to_sparse()}, "w: .*sparse|w: .*layout"),
    "text": (lambda: {"w": np.array(["a", "b"])}, "w: "),
    "dates": (lambda: {"w": np.array(["2020-01-01"], "datetime64[D]")}, "w: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compressed_is_refused_in_one_line(what):
    make, line = REFUSED[what]
    with pytest.raises(ValueError, match=line) as refused:
        tn.compress(make(), budget=tn.Budget(ratio=8))
    assert "\n" not in str(refused.value)

"""What goes in: every kind of checkpoint is read as it is, none of it is run, and bad ones say why in one line."""

import argparse
import collections
import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import floats
from safetensors.torch import load_file, save_file
from torch import nn

from tersenet.artifact import load
from tersenet.draft import Draft, artifact_of
from tersenet.sources import IN_FOLDERS, read

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EIGHT_BITS = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)  # fmt: skip
INTEGERS = (
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64,
)  # fmt: skip
STATE = {"module.fc.weight": torch.arange(12.0).reshape(3, 4), "_orig_mod.fc.bias": torch.ones(3)}


def every_type():
    """A matrix, a vector, a number and an empty tensor of every type, and the values that a cast would lose."""
    numbers = torch.tensor([[0.5, -3, 1e-30, 65504], [float("nan"), -0.0, float("inf"), 7]], dtype=torch.float64)
    state = {}
    for dtype in FLOAT_TYPES + EIGHT_BITS + INTEGERS:
        name = str(dtype).removeprefix("torch.")
        values = numbers.nan_to_num(0, 1).clamp(0, 1) if dtype in INTEGERS else numbers
        state[name] = values.to(dtype, copy=True)
        state |= {f"{name}.vector": values[0].to(dtype, copy=True), f"{name}.one": values[0, 0].to(dtype, copy=True)}
        state |= {f"{name}.empty": torch.zeros(0, 3).to(dtype)}
    state["nans"] = torch.tensor([0x7F81, 0xFFC1 - 65536], dtype=torch.int16).view(torch.bfloat16)
    return state


def same(a, b):
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
    return torch.equal(a, b)


def assert_same(found, state):
    assert set(found) == set(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert same(found[name], value), name


@pytest.fixture
def write(tmp_path):
    """Save an object as a file of a name and return its path."""

    def save(name, content, **metadata):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        match path.suffix:
            case ".safetensors":
                save_file(content, path, metadata or None)
            case ".npz":
                np.savez(path, **content)
            case ".json":
                path.write_text(json.dumps(content))
            case _:
                torch.save(content, path)
        return path

    return save


def refused(path):
    """The one line that reading a file ends in."""
    with pytest.raises((ValueError, OSError)) as wrong:
        read(path)
    assert len(str(wrong.value).splitlines()) == 1
    return str(wrong.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.PTH", "m.bin", "m.ckpt"])
def test_every_type_comes_in_as_it_is(write, name):
    state = every_type()
    assert_same(read(write(name, state)).tensors, state)


def test_names_are_kept_in_every_kind_of_file(write):
    for name in ("m.safetensors", "m.pt", "m.npz"):
        assert set(read(write(name, STATE)).tensors) == set(STATE)


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "net", "params", "module", "ema", "student"]
)
def test_a_training_checkpoint_gives_its_network(write, key):
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    rest = {
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": torch.tensor(0.7),
        "args": argparse.Namespace(lr=1),
    }
    if key == "student":  # no usual key: the only state dict there is
        del rest["best"]
    found = read(write("m.pt", {key: STATE, **rest, "scores": [np.float64(0.5), np.ones(3)]}))
    assert_same(found.tensors, STATE)
    assert found.words == [f"took the tensors under {key!r}"]


def test_what_is_no_tensor_is_left_out_with_a_word(write):
    found = read(write("m.pt", collections.OrderedDict(STATE) | {"version": 3, "fc._extra_state": {"a": 1}}))
    assert_same(found.tensors, STATE)
    assert found.words == ["left out version, fc._extra_state: no tensors"]


@pytest.mark.parametrize(
    "content,message",
    [
        (
            {"model": STATE, "ema": STATE, "epoch": 1},
            r"more than one network \(model, ema\) under its keys model, ema, ep",
        ),
        ({"generator": STATE, "critic": STATE}, r"more than one network \(generator, critic\)"),
        ({"epoch": 1, "lr": 0.1}, "no network under its keys epoch, lr"),
        ({}, "no network under its keys nothing"),
        ([torch.ones(2)], "holds a list; save the tensors by name"),
        (torch.ones(2), "holds a Tensor"),
    ],
)
def test_a_pytorch_file_without_one_clear_network_lists_its_keys(write, content, message):
    with pytest.raises(ValueError, match=message):
        read(write("m.pt", content))


class Code:
    def __init__(self, call, *given):
        self.call = call, given

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [os.mkdir, eval, open], ids=lambda f: f.__name__)
def test_code_in_a_pytorch_file_is_never_run(tmp_path, function, protocol):
    mark = tmp_path / "mark"
    given = {os.mkdir: (str(mark),), eval: (f"__import__('os').mkdir({str(mark)!r})",), open: (str(mark), "w")}[
        function
    ]
    torch.save({"w": torch.ones(2), "x": Code(function, *given)}, tmp_path / "m.pt", pickle_protocol=protocol)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": Code(function, *given)}, protocol))
    for name in ("m.pt", "plain.pt"):
        said = refused(tmp_path / name)
        assert "code in a checkpoint is never run" in said or "not a whole PyTorch checkpoint" in said
        assert not mark.exists()


def test_whole_modules_and_torchscript_say_what_to_save_instead(write, tmp_path):
    assert "save the tensors alone" in refused(write("m.pt", nn.Linear(2, 2)))
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "s.pt")
    assert "TorchScript" in refused(tmp_path / "s.pt")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.npz", "m.safetensors.index.json"])
def test_files_that_are_missing_empty_cut_off_or_garbled_are_one_line(write, tmp_path, name):
    whole = write(name, {"weight_map": {"w": "a.bin"}} if name.endswith("json") else STATE).read_bytes()
    rng = np.random.default_rng(0)
    assert "No such file" in refused(tmp_path / f"gone{name}")
    for cut in {0, 1, 9, len(whole) // 3, len(whole) - 1}:
        (tmp_path / name).write_bytes(whole[:cut])
        assert name in refused(tmp_path / name)
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            read(tmp_path / name)
        except (ValueError, OSError) as wrong:
            assert len(str(wrong).splitlines()) == 1, wrong


def test_shards_are_read_through_their_index(write, tmp_path):
    names = list(STATE)
    for end in ("safetensors", "bin"):
        for shard, name in enumerate(names):
            write(f"part-{shard}.{end}", {name: STATE[name], "spare": torch.ones(1)}, format="pt")
        index = {"metadata": {"total_size": 1}, "weight_map": {n: f"part-{i}.{end}" for i, n in enumerate(names)}}
        found = read(write(f"model.{end}.index.json", index))
        assert_same(found.tensors, STATE)
        assert found.metadata == ({"format": "pt"} if end == "safetensors" else {})
    (tmp_path / "part-1.bin").unlink()
    assert "part-1.bin" in refused(tmp_path / "model.bin.index.json")
    assert "w should be in part-0.bin" in refused(write("x.bin.index.json", {"weight_map": {"w": "part-0.bin"}}))


@pytest.mark.parametrize(
    "shard", ["../m.bin", "/etc/m.bin", "sub/m.bin", "..", "a\\m.bin", "x.bin.index.json", "", "m.py"]
)
def test_an_index_cannot_name_a_file_elsewhere(write, shard):
    write("sub/m.bin", STATE)
    assert "is not the name of a shard" in refused(write("sub/model.bin.index.json", {"weight_map": {"w": shard}}))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", "[" * 100_000, "\x00"])
def test_an_index_that_is_none_says_so(tmp_path, content):
    (tmp_path / "m.safetensors.index.json").write_text(content)
    assert "not an index of shards" in refused(tmp_path / "m.safetensors.index.json")


def test_a_folder_gives_the_network_in_it(write, tmp_path):
    assert "holds none of model.safetensors" in refused(tmp_path)
    write("other.safetensors", STATE)
    write("training_args.bin", STATE)
    assert_same(read(tmp_path).tensors, STATE)
    write("another.safetensors", STATE)
    assert "another.safetensors, other.safetensors" in refused(tmp_path)
    for name in reversed(IN_FOLDERS):  # the first of these that is there
        value = torch.full((2,), float(IN_FOLDERS.index(name)))
        write(name, {"weight_map": {"w": "other.safetensors"}} if name.endswith("json") else {"w": value})
        if not name.endswith("json"):
            assert torch.equal(read(tmp_path).tensors["w"], value)


def test_numpy_archives_with_other_things_than_numbers_name_the_array(write, tmp_path):
    odd = {
        "text": np.array(["a", "b"]),
        "objects": np.array([1, "a"], object),
        "dates": np.array(["2024-01-01"], "datetime64[D]"),
        "spans": np.array([3], "timedelta64[s]"),
        "long": np.ones(3, np.longdouble),
        "complex": np.ones(3, np.complex64),
        "records": np.zeros(3, [("a", np.float32), ("b", np.int8)]),
        "raw": np.zeros(3, "V2"),
    }
    for name, array in odd.items():
        said = refused(write("m.npz", {"w": np.ones(3), name: array}))
        assert f" {name}: " in said and "convert it to" in said
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert "npz" in refused(tmp_path / "a.npz")
    assert "give a file that ends in" in refused(write("m.py", STATE))


def test_big_endian_numbers_become_native(write):
    state = {"w": np.arange(4, dtype=">f4"), "i": np.arange(4, dtype=">i8"), "one": np.array(2, ">f8")}
    found = read(write("m.npz", state)).tensors
    assert [found[n].dtype for n in state] == [np.float32, np.int64, np.float64]
    assert all(np.array_equal(found[n], a) and found[n].shape == a.shape for n, a in state.items())
    assert Draft.of_arrays({"w": state["w"]}).tensors["w"].tree.dtype == np.float32


# ---------------------------------------------------------------- from a checkpoint to a draft and back


def test_every_type_leaves_as_it_came():
    state = every_type()
    back = load(artifact_of(Draft.of_arrays(state)).to_bytes())
    assert_same(back.state_dict(), state)
    for name, array in back.unpack().items():
        assert array.shape == state[name].shape
        kind = back.tensors[name].dtype
        assert str(array.dtype) == {"bfloat16": "float32"}.get(kind, "uint8" if "float8" in kind else kind)


def test_tensors_that_share_their_numbers_are_stored_once(write):
    shared = torch.randn(30, 30)
    state = {"a": shared, "b": shared, "turned": shared.T, "copy": shared.clone(), "part": shared[:10]}
    for arrays in (state, read(write("m.pt", state)).tensors, {n: t.numpy() for n, t in state.items()}):
        draft = Draft.of_arrays(arrays)
        assert draft.tensors["a"] is draft.tensors["b"] and draft.tensors["copy"] is draft.tensors["a"]
        assert len({id(t) for t in draft.tensors.values()}) == 3
        back = load(artifact_of(draft).to_bytes())
        assert back.tensors["a"] is back.tensors["b"] and len(back.tensors) == 5
        assert_same(back.state_dict(), state)


def test_without_a_module_names_and_values_tell_what_is_no_weight():
    causal = np.tril(np.ones((1, 1, 6, 6), np.float32))
    infinite = np.where(causal, 0, -np.inf).astype(np.float32)
    kept = {
        "bn.running_mean": floats(8), "bn.running_var": np.full(8, 1e5, np.float32), "BatchNorm_0/var": floats(8),
        "bn.num_batches_tracked": np.array(1e6), "rotary.inv_freq": floats(8), "position_ids": floats(1, 8),
        "token_type_ids": floats(1, 8), "attn.mask": floats(9, 9), "attn_mask": floats(9, 9), "anchors": floats(3, 2),
        "attn.relative_position_index": floats(4, 4), "attn.bias": causal, "attn.limit": infinite,
        "steps": np.arange(4), "flags": np.ones((2, 2), bool), "w": np.array([[1, np.nan]], np.float32),
    }  # fmt: skip
    weights = {"bn.weight": floats(8), "bn.bias": floats(8), "unmasked.weight": floats(4, 4), "ones": np.ones((4, 4))}
    draft = Draft.of_arrays(kept | weights)
    assert draft.trainable == set(weights)
    assert draft.weights() == ["unmasked.weight", "ones"]
    assert {draft.tensors[n].note for n in ("attn.limit", "w")} == {"dense: NaN or infinite values"}
    assert draft.tensors["bn.running_var"].note == "dense: a buffer, kept bit for bit"
    back = load(artifact_of(draft).to_bytes()).unpack()
    assert all(back[n].tobytes() == a.tobytes() for n, a in kept.items())


class Odd(nn.Module):
    """A layer with infinite buffers, an integer parameter, 8-bit floats, bfloat16, and state that is no tensor."""

    def __init__(self, extra):
        super().__init__()
        self.fc = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.register_buffer("causal", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("eight", torch.randn(4).to(torch.float8_e5m2))
        self.register_buffer("unknown", torch.tensor(torch.nan))
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra


@pytest.mark.parametrize("extra", [{"scale": 3}, torch.tensor([5.0])], ids=["object", "tensor"])
def test_a_module_with_infinite_buffers_odd_types_and_extra_state_goes_in_and_out(extra):
    model, other = Odd(extra), Odd(torch.zeros(1) if isinstance(extra, torch.Tensor) else {"own": 1})
    draft = Draft.of_model(model)
    assert draft.trainable == {"fc.weight", "fc.bias"}
    assert draft.tensors["causal"].note == draft.tensors["unknown"].note == "dense: NaN or infinite values"
    load(artifact_of(draft).to_bytes()).into(other)
    assert_same(*({n: v for n, v in m.state_dict().items() if n != "_extra_state"} for m in (other, model)))
    assert other.extra == ({"own": 1} if isinstance(extra, dict) else extra)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "value,message",
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "w: cannot store complex64; convert"),
        (lambda: torch.eye(3).to_sparse(), "w: cannot store sparse_coo float32"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "w: cannot store qint8"),
        (lambda: torch.ones(3, device="meta"), "w: holds no data"),
        (lambda: nn.LazyLinear(3).weight, "w: holds no data"),
        (lambda: np.ones(3, np.complex128), "w: cannot store complex128"),
        (lambda: np.array(["a"]), "w: cannot store str"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_stored_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        Draft.of_arrays({"v": floats(3), "w": value()})


def test_metadata_of_a_safetensors_file_is_read(write):
    path = write("m.safetensors", STATE, format="pt", author="somebody")
    assert read(path).metadata == {"format": "pt", "author": "somebody"}
    assert_same(load_file(path), STATE)

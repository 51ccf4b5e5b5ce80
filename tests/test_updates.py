"""Updates: exact ones bit for bit, lossy ones that lose nothing for good, and none applied to what it is not for."""

import contextlib
import io
import json
import lzma
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard
from conftest import DATA, floats, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from tersenet import FormatError, load
from tersenet.artifact import Artifact, Section, Tensor
from tersenet.cli import main
from tersenet.packed import unpack
from tersenet.updates import diff, digest, network, opened, patch

WORDS = {"float32": "u4", "float16": "u2", "float64": "u8"}


def terse(*arguments, code=0):
    """What the command says, in this process."""
    said = io.StringIO()
    ended = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            ended = end.code
    assert ended == code, said.getvalue()
    return said.getvalue()


def of(**named):
    return Artifact({name: Tensor(array, str(array.dtype)) for name, array in named.items()})


def reopened(update, tmp_path):
    update.save(tmp_path / "update.terse")
    return opened(tmp_path / "update.terse")


def same(first, second):
    """Whether all tensors are equal bit for bit, in name, type and shape."""
    a, b = first.unpack(), second.unpack()
    types = [[(n, t.dtype) for n, t in artifact.tensors.items()] for artifact in (first, second)]
    return types[0] == types[1] and all(a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)


@given(st.data(), st.sampled_from(["u1", "i2", "u4", "i8", "u8", "bool", *WORDS]), array_shapes(min_dims=0, max_side=6))
@settings(max_examples=60, deadline=None)
def test_an_exact_update_gives_every_bit_of_any_arrays(data, kind, shape):
    """Bits of floats are arbitrary: NaN of any payload, -0.0, subnormals, infinities."""
    raw = arrays(WORDS.get(kind, kind), shape)
    old, new = (np.asarray(data.draw(raw)).view(np.dtype(kind) if kind in WORDS else kind) for _ in "ab")
    update = diff(of(w=old), of(w=new))
    assert same(patch(of(w=old), Artifact(update.tensors, sections=update.sections)), of(w=new))


def special():
    w = floats(40, 30)
    w[0, :6] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-42]
    w.view(np.uint32)[1, :3] = [0x7F800001, 0xFFABCDEF, 0x7FC00123]  # payloads, of a signalling NaN too
    return w


def test_networks_of_all_types_come_out_bit_for_bit(tmp_path):
    """Through checkpoints and the command: new, gone, reshaped and retyped tensors, NaN payloads, -0.0, scalars."""
    torch.manual_seed(0)
    w = torch.from_numpy(special())
    old = {"w": w.flip(0), "half": torch.randn(300).half(), "b": torch.randn(9), "n": torch.tensor(3), "gone": w,
           "brain": torch.randn(70, 5).bfloat16(), "eight": torch.randn(60).to(torch.float8_e4m3fn), "kept": w + 1,
           "shape": w, "type": w, "empty": torch.zeros(0, 3), "mask": torch.rand(50) < 0.5}  # fmt: skip
    new = old | {"w": w, "half": old["half"] * 1.01, "b": -old["b"], "n": torch.tensor(-(2**62)), "added": w * 2,
                 "brain": torch.nextafter(old["brain"], torch.tensor(9).bfloat16()),
                 "eight": (old["eight"].float() * 2).to(torch.float8_e4m3fn),
                 "shape": w.T.contiguous(), "type": w.double(), "mask": ~old["mask"]}  # fmt: skip
    del new["gone"]
    new["brain"].view(torch.int16)[:2, :2] = torch.tensor([[0x7F81, -32768], [-1, 0x7FC1]]).short()
    for end, save in ((".safetensors", save_file), (".pt", torch.save)):
        before, after, update = tmp_path / f"old{end}", tmp_path / f"new{end}", tmp_path / "update.terse"
        for state, path in ((old, before), (new, after)):
            save({name: value.clone() for name, value in state.items()}, path)
        terse("diff", before, after, "-o", update)
        for result in (tmp_path / "result.safetensors", tmp_path / "result.pt"):
            terse("patch", before, update, "-o", result)
            assert same(network(result), Artifact({n: network(after).tensors[n] for n in network(result).tensors}))
            assert set(network(result).tensors) == set(new)


def test_packed_networks_come_out_as_the_same_file(tmp_path):
    packed = {name: Tensor(tree) for name, tree in trees().items()}
    old = Artifact(packed | {"bias": Tensor(floats(500))}, meta={"a": 1}, sections={"graph": Section(b"x" * 99)})
    name = next(iter(trees()))
    changed = {name: replace(packed[name], error=0.5), "bias": Tensor(floats(500) + 1), "more": Tensor(floats(7))}
    new = Artifact(old.tensors | changed | {"tied": packed[name]}, meta={"b": 2}, sections={"graph": Section(b"y")})
    old.save(tmp_path / "old.terse")
    new.save(tmp_path / "new.terse")
    terse("diff", tmp_path / "old.terse", tmp_path / "new.terse", "-o", tmp_path / "update.terse")
    terse("patch", tmp_path / "old.terse", tmp_path / "update.terse", "-o", tmp_path / "result.terse")
    assert (tmp_path / "result.terse").read_bytes() == (tmp_path / "new.terse").read_bytes()
    assert (tmp_path / "update.terse").stat().st_size < new.nbytes


def test_an_update_is_refused_where_it_is_not_for_and_nothing_is_written(tmp_path):
    for name, seed in (("old", 1), ("new", 2), ("other", 3)):
        save_file({"w": torch.from_numpy(floats(30, 30, seed=seed))}, tmp_path / f"{name}.safetensors")
    old, new, other = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "other"))
    update, result = tmp_path / "update.terse", tmp_path / "result.safetensors"
    terse("diff", old, new, "-o", update)
    said = terse("patch", other, update, "-o", result, code=2)
    own, wanted = (digest(network(path).tensors) for path in (other, old))
    assert f"other.safetensors: has the digest {own}, and the update is for the network of digest {wanted}" in said
    assert not result.exists() and said.count("\n") == 1
    save_file({"v": load_file(old)["w"]}, other)  # the same numbers by another name
    terse("patch", other, update, "-o", result, code=2)
    for wrong in (old, tmp_path / "whole.terse"):
        network(new).save(tmp_path / "whole.terse")
        terse("patch", old, wrong, "-o", result, code=2)
    for command in (("inspect", update), ("unpack", update, "-o", result), ("verify", update)):
        assert "this is an update, not a network" in terse(*command, code=2)
    with pytest.raises(FormatError, match="this is an update"):
        load(update)
    assert not result.exists()


def test_what_an_update_says_of_itself_is_checked(tmp_path):
    old, new = of(a=floats(300), b=floats(20)), of(a=floats(300) + 1, b=floats(20))
    update = diff(old, new)
    assert same(patch(old, reopened(update, tmp_path)), new)
    says = json.loads(update.sections["update"].data)
    assert says["how"] == "~="

    def refused(word, *, low=update.sections["update bits"].data, tensors=update.tensors, **changes):
        told = Section(json.dumps(says | changes).encode(), True)
        with pytest.raises(FormatError, match=word):
            patch(old, Artifact(dict(tensors), sections={"update": told, "update bits": Section(low)}))

    refused("does not give", result="0" * 64)
    refused("more tensors", how="~")
    refused("not known", how="?=")
    refused("not known", how="+=")
    refused("another shape", tensors={"a": update.tensors["b"], "b": update.tensors["b"]})
    refused("not there", tensors={"c": update.tensors["a"], "b": update.tensors["b"]})
    refused("end early", low=b"")
    refused("left over", low=update.sections["update bits"].data + b"\0")
    refused("end early", tensors=update.tensors | {"a": Tensor(np.full(300, 33, np.uint8), "uint8")})
    data = update.to_bytes()
    for at in range(0, len(data), 7):
        (tmp_path / "bad.terse").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(FormatError):
            opened(tmp_path / "bad.terse")


def test_a_lossy_update_meets_its_ratio_and_what_it_leaves_out_comes_later():
    """The same change, taken again and again from what the receivers have: its error falls, and at last it is exact."""
    rng = np.random.default_rng(0)
    w, other = floats(200, 300), floats(10)
    goal = of(w=w + rng.laplace(0, 0.01, w.shape).astype(np.float32), b=other + 1, n=np.array(7))
    held, errors = of(w=w, b=other, n=np.array(6)), []
    for _ in range(6):
        update = diff(held, goal, ratio=30)
        assert update.nbytes <= 4 * (w.size + 11) / 30
        held = patch(held, update)
        errors.append(np.linalg.norm(held.unpack()["w"] - goal.unpack()["w"]))
        assert np.array_equal(held.unpack()["b"], other + 1) and held.unpack()["n"] == 7  # small ones at once
    begun = np.linalg.norm(w - goal.unpack()["w"])
    assert errors[0] < 0.75 * begun and errors[-1] < 0.1 * begun and errors == sorted(errors, reverse=True)


def test_a_ratio_that_cannot_be_met_is_said():
    old, new = of(b=floats(200)), of(b=floats(200, seed=1))
    for ratio, word in ((100, "kept exactly"), (-1, "over 0"), (float("nan"), "over 0")):
        with pytest.raises(ValueError, match=word):
            diff(old, new, ratio)


@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16"])
def test_lossy_updates_of_other_floats_stay_in_their_type(kind):
    old, new = floats(60, 50), floats(60, 50) * np.float32(1.1)
    if kind == "bfloat16":
        old, new = ((a.view(np.uint32) & 0xFFFF0000).view(np.float32) for a in (old, new))
    else:
        old, new = old.astype(kind), new.astype(kind)
    old, new = Artifact({"w": Tensor(old, kind)}), Artifact({"w": Tensor(new, kind)})
    update = diff(old, new, 20)
    assert "+" in json.loads(update.sections["update"].data)["how"]
    found = patch(old, update).tensors["w"]
    assert found.dtype == kind and found.tree.dtype == new.tensors["w"].tree.dtype
    error = np.linalg.norm(unpack(found.tree) - unpack(new.tensors["w"].tree))
    assert error < 0.8 * np.linalg.norm(unpack(old.tensors["w"].tree) - unpack(new.tensors["w"].tree))


@pytest.mark.parametrize("kind,near,apart", [("float16", 6.3e4, 3e3), ("float32", 3.3e38, 2e37)])
def test_a_lossy_update_makes_no_infinity_of_what_is_finite(kind, near, apart, recwarn):
    """Tensors of which a step would leave the type, or that hold infinities, go exactly; others are rounded."""
    rng, top = np.random.default_rng(0), float(np.finfo(kind).max)
    old, new = (
        {
            "far": np.clip(near + apart * rng.normal(0, 1, 600), -top, top),
            "infinite": np.append(rng.normal(0, apart, 300), np.inf),
            "w": rng.normal(0, apart, 20_000),
        }
        for _ in "ab"
    )
    old, new = (of(**{name: array.astype(kind) for name, array in one.items()}) for one in (old, new))
    update = diff(old, new, 8)
    assert json.loads(update.sections["update"].data)["how"] == "~~+"
    found = patch(old, update)
    assert np.isfinite(found.unpack()["w"]).all() and not recwarn.list
    assert all(found.unpack()[name].tobytes() == new.unpack()[name].tobytes() for name in ("far", "infinite"))


def epoch(data, name, count, rate):
    """A network of others before and after some training."""
    datasets, models = data
    images, labels = datasets.load("mnist", "train", count)
    x, y = models.inputs(name, images), torch.from_numpy(labels).long()
    torch.manual_seed(0)
    net = models.load(name).train()
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    for at in torch.randperm(len(x)).split(100):
        optimizer.zero_grad()
        cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()
    return {name: value.detach() for name, value in net.state_dict().items()}


def test_an_exact_update_after_training_is_smaller_than_zstd_and_xz_of_the_difference(data):
    before = network(DATA / "models" / "lenet300.safetensors")
    state = epoch(data, "lenet300", 3000, 0.01)
    after = Artifact({name: Tensor(state[name].numpy()) for name in before.tensors})
    size = diff(before, after).nbytes
    subtracted, exclusive = bytearray(), bytearray()
    for name in before.tensors:
        new, old = (np.ascontiguousarray(a.tensors[name].tree).view(np.uint32) for a in (after, before))
        subtracted += (new - old).tobytes()
        exclusive += (new ^ old).tobytes()
    for raw in (bytes(subtracted), bytes(exclusive)):
        assert size < 0.98 * len(zstandard.ZstdCompressor(level=19).compress(raw))
        assert size < 0.98 * len(lzma.compress(raw, preset=6))


def test_digests_do_not_depend_on_the_file(tmp_path):
    state = {"b": torch.randn(7), "a": torch.randn(40, 9).bfloat16()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    found = {digest(network(tmp_path / name).tensors) for name in ("w.safetensors", "w.pt")}
    assert len(found) == 1 and re.fullmatch("[0-9a-f]{64}", found.pop())


def test_networks_whose_trees_are_made_when_they_are_read_give_the_same_update_and_take_it(monkeypatch, tmp_path):
    books = [trees()["Codebook"], trees()["Codebook"]]
    books[1] = replace(books[1], codewords=books[0].codewords)
    common = {f"w{k}": Tensor(tree) for k, tree in enumerate(books)}
    old, new = (Artifact(common | {n: Tensor(floats(60, 50, seed=s + k)) for k, n in enumerate("abc")}) for s in (0, 3))
    update, files = diff(old, new), (old.to_bytes(), new.to_bytes())
    monkeypatch.setattr("tersenet.container.GROUP", -1)
    lazy = [load(file) for file in files]
    assert diff(*lazy).to_bytes() == update.to_bytes()
    assert patch(lazy[0], reopened(update, tmp_path)).to_bytes() == files[1]

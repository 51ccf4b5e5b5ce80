"""Networks that others compressed: the same weights to the bit, in fewer bytes, and clear words for what is none."""

import numpy as np
import pytest
import torch
from conftest import DATA, floats
from safetensors.torch import save_file
from typer.testing import CliRunner

import tersenet as tn
from tersenet.cli import app, main
from tersenet.packed import Codebook, Reshaped, Sparse, Uniform, unpack
from tersenet.published import deep_compression, repacked, squeezenet


def gptq(rows, columns, group, seed=0):
    """A weight in GPTQ's layout, and what it stands for."""
    rng = np.random.default_rng(seed)
    levels, groups = rng.integers(0, 16, (columns, rows)), columns // group
    zeros, scales = rng.integers(0, 16, (groups, rows)), (rng.random((groups, rows)) / 50).astype(np.float16)
    shifts = 4 * np.arange(8)
    qweight = (levels.reshape(-1, 8, rows) << shifts[None, :, None]).sum(1).astype(np.uint32).view(np.int32)
    qzeros = (zeros.reshape(groups, -1, 8) << shifts).sum(2).astype(np.uint32).view(np.int32)
    dense = (levels - np.repeat(zeros, group, 0) - 1).astype(np.float32) * np.repeat(scales, group, 0).astype(
        np.float32
    )
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, dense.T.astype(np.float16)


def test_four_bit_weights_are_levels_by_group():
    parts, dense = gptq(24, 64, 16)
    state = {f"fc.{part}": torch.from_numpy(value) for part, value in parts.items()}
    state["fc.g_idx"] = torch.arange(64, dtype=torch.int32) // 16
    artifact = repacked(state | {"norm.weight": torch.ones(5)})
    assert isinstance(artifact.tensors["fc.weight"].tree, Uniform) and set(artifact.tensors) == {
        "fc.weight",
        "norm.weight",
    }
    found = tn.load(artifact.to_bytes()).unpack()["fc.weight"]
    assert found.dtype == np.float16 and np.array_equal(found, dense)
    state["fc.g_idx"] = state["fc.g_idx"].flip(0)
    with pytest.raises(ValueError, match="fc: its columns are not in the order"):
        repacked(state)
    with pytest.raises(ValueError, match="fc: has no qzeros"):
        repacked({name: value for name, value in state.items() if "zeros" not in name})


@pytest.mark.parametrize(
    "d,shape,wanted",
    [(1, (6, 8), None), (4, (6, 32), (6, 32, 1, 1)), (9, (6, 8, 3, 3), None), (18, (6, 16, 3, 3), None)],
)
def test_codewords_by_number_take_the_shape_of_the_network(d, shape, wanted):
    index, book = np.random.default_rng(0).integers(0, 7, (6, 8)), floats(7, d).astype(np.float16)
    shapes = {"c.weight": wanted} if wanted else None
    tree = repacked({"c.index": index, "c.codewords": book}, shapes).tensors["c.weight"].tree
    assert tree.shape == (wanted or shape)
    assert np.array_equal(unpack(tree).reshape(-1), book.astype(np.float32)[index].reshape(-1))
    assert isinstance(tree, Codebook if len(tree.shape) == 2 else Reshaped)


@pytest.mark.parametrize(
    "state,message",
    [
        ({"w": np.ones(3)}, "no weights of a kind"),
        ({"a.index": np.array([0, 9]), "a.codewords": floats(3, 1)}, "a: the index points"),
        ({"a.index": np.array([0.5]), "a.codewords": floats(3, 1)}, "a: an index of integers"),
        ({"a.index": np.array([[0]]), "a.codewords": floats(3, 1), "a.weight": np.ones(1)}, "a.weight: is there twice"),
    ],
)
def test_what_does_not_belong_together_is_named(state, message):
    with pytest.raises(ValueError, match=message):
        repacked(state)
    with pytest.raises(ValueError, match=r"a\.weight: holds 2 weights, but the network's has 6"):
        repacked({"a.index": np.array([0, 1]), "a.codewords": floats(3, 1)}, {"a.weight": (2, 3)})


def test_codewords_in_double_precision_keep_it(tmp_path):
    book, index = np.random.default_rng(0).normal(size=(5, 2)), np.arange(15).reshape(3, 5) % 5
    repacked({"a.index": index, "a.codewords": book}).save(tmp_path / "a.terse")
    found = tn.load(tmp_path / "a.terse").tensors["a.weight"]
    assert found.dtype == "float64" and np.array_equal(found.unpack(), book[index].reshape(3, 10))


def published_file(data):
    path = DATA / "models" / "deep_compression_squeezenet.net"
    if not path.exists():
        pytest.skip("the published file is not beside the project")
    return path


def test_the_file_of_deep_compression_is_repacked_bit_for_bit(data, tmp_path):
    path = published_file(data)
    import published

    done = CliRunner().invoke(app, ["repack", str(path), "-o", str(tmp_path / "s.terse")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "s.terse").stat().st_size < 535_000 < published.BYTES["deep_compression"]
    opened, (layers, biases) = tn.load(tmp_path / "s.terse"), published.deep_compression()
    assert len(opened.tensors) == 2 * len(layers)
    for name, (mask, index, codewords) in layers.items():
        dense = np.zeros(mask.shape, np.float32)
        dense[mask] = codewords[index]
        assert np.array_equal(unpack(opened[f"{name}.weight"]), dense) and isinstance(opened[f"{name}.weight"], Sparse)
        assert np.array_equal(unpack(opened[f"{name}.bias"]), biases[name])


def test_a_damaged_file_of_deep_compression_is_no_network(data):
    whole = published_file(data).read_bytes()
    for wrong, message in (
        (whole[:-1], "ends within a layer"),
        (whole + b"\0", "1 bytes are left"),
        (whole[:50], "too short"),
        (whole[:4] + b"\xff\xff\xff\x7f" + whole[8:], "ends within a layer"),
    ):
        with pytest.raises(ValueError, match=message):
            deep_compression(wrong, squeezenet())


def test_a_product_quantized_network_gets_its_models_shapes(data, tmp_path):
    published_file(data)
    import published

    layers, _ = published.product_quantized(18)
    few = [name for name in layers if name.startswith("layer1")]
    parts = {f"{n}.index": layers[n][0] for n in few} | {f"{n}.codewords": layers[n][1] for n in few}
    save_file({n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in parts.items()}, tmp_path / "p.safetensors")
    done = CliRunner().invoke(app, ["repack", str(tmp_path / "p.safetensors"), "-o", str(tmp_path / "p.terse")])
    assert done.exit_code == 0, done.output
    model, opened = published.PQResNet.load(18), tn.load(tmp_path / "p.terse")
    for name in few:
        assert np.array_equal(opened.unpack()[f"{name}.weight"], model.get_parameter(f"{name}.weight").detach().numpy())
    assert (tmp_path / "p.terse").stat().st_size < (tmp_path / "p.safetensors").stat().st_size
    done = CliRunner().invoke(app, ["repack", str(tmp_path / "p.terse")])
    assert done.exit_code != 0


def test_wrong_use_is_one_line_and_writes_nothing(tmp_path, capsys):
    np.savez(tmp_path / "n.npz", w=np.ones((4, 4), np.float32))
    with pytest.raises(SystemExit) as end:
        main(["repack", str(tmp_path / "n.npz"), "-o", str(tmp_path / "o.terse")])
    assert end.value.code == 2 and "holds no weights of a kind that is known" in capsys.readouterr().err
    assert not (tmp_path / "o.terse").exists()

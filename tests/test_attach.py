"""Networks that run on packed weights say what the dense ones say, wherever a module of torch is put."""

import copy
import io
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import fresh_process
from torch import nn
from torch.autograd import forward_ad

import tersenet as tn
from tersenet import FormatError, native
from tersenet.activations import calibrated, into
from tersenet.artifact import Artifact, Section, Tensor, load
from tersenet.methods.fixed_point import FixedPoint
from tersenet.packed import Codebook, Sparse, Uniform
from tersenet.runtime import kernels
from tersenet.runtime.attaching import attached
from tersenet.runtime.measure import alone, first_use
from tersenet.runtime.modules import PackedConv2d, PackedEmbedding, PackedLinear, PackedRecurrent, PackedWeight

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C core was built")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """A form for every tree that has one, however small the layer is."""
    monkeypatch.setattr(kernels, "CALL", dict.fromkeys(kernels.CALL, 0.0))
    monkeypatch.setattr(kernels, "MANY", 1e6)
    monkeypatch.setattr(kernels, "IMAGE", 9.0)
    monkeypatch.setattr(kernels, "ROW", 0)


def sparse(value):
    rng = np.random.default_rng(value.numel())
    mask = rng.random(value.shape) < 0.3
    return Sparse(mask, value.numpy()[mask])


def levels(value):
    scale = value.abs().amax(tuple(range(1, value.dim())), keepdim=True) / 7
    return Uniform((value / scale).round().numpy().astype(np.int8), scale.numpy())


def shared(value):
    rng = np.random.default_rng(value.numel())
    return Codebook(rng.integers(0, 20, value.shape).astype(np.uint8), rng.normal(0, 0.3, (20, 1)).astype(np.float32))


def stored(model, pack):
    """A file of the model with trees of `pack` for all weights."""
    tensors = {}
    for name, value in model.state_dict().items():
        weight = value.dim() > 1 and value.is_floating_point()
        kind = str(value.dtype).removeprefix("torch.")
        tensors[name] = Tensor(pack(value) if weight else value.numpy().copy(), kind)
    return load(Artifact(tensors).to_bytes())


class Mixed(nn.Module):
    """A layer of every kind, one of them twice."""

    def __init__(self):
        super().__init__()
        self.near, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.far = nn.Conv2d(16, 32, 5, stride=2, padding=(2, 1), dilation=(1, 2))
        self.flat = nn.Conv2d(32, 8, (1, 3), stride=(1, 3), padding="valid", bias=False)
        self.square = nn.Conv2d(8, 8, 3, padding="same")
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.gru, self.table = nn.GRU(24, 10, bias=False, batch_first=True), nn.Embedding(50, 10)
        self.first, self.last = nn.Linear(10, 10), nn.Linear(10, 7, bias=False)
        self.again = self.first

    def forward(self, x, ids):
        x = self.square(self.flat(self.far(self.norm(self.near(x).relu()))))
        x, _ = self.lstm(x.flatten(2).transpose(1, 2))
        x, _ = self.gru(x)
        return self.last(self.again(self.first(x + self.table(ids)[:, :1]).relu()))


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Mixed().eval(), (torch.randn(3, 3, 24, 21), torch.randint(0, 50, (3, 4)))


def close(found, expected, part=1e-5):
    return float((found - expected).abs().max()) <= part * float(expected.abs().max())


@pytest.mark.parametrize("pack", [sparse, levels, shared])
def test_an_attached_network_says_what_the_dense_one_says(pack, case):
    model, inputs = case
    artifact = stored(model, pack)
    dense, packed = artifact.into(copy.deepcopy(model)), artifact.attach(copy.deepcopy(model))
    kinds = {type(layer) for layer in packed.modules()}
    assert PackedLinear in kinds and PackedRecurrent in kinds
    assert PackedConv2d in kinds and (PackedEmbedding in kinds) == (pack is not sparse)
    assert packed.again is packed.first
    with torch.no_grad():
        assert close(packed(*inputs), dense(*inputs))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(packed(*inputs), packed(*inputs))


def test_it_can_be_copied_pickled_saved_and_printed(case):
    model, inputs = case
    packed = stored(model, levels).attach(copy.deepcopy(model))
    expected = packed(*inputs)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    others = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(file, weights_only=False)]
    assert all(torch.equal(other(*inputs), expected) for other in others)
    other = copy.deepcopy(packed)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(*inputs), expected)
    assert "(first): PackedLinear(" in str(packed) and "4-bit levels times inputs of 24 bits" in str(packed)


def test_it_can_be_exported(case):
    model, inputs = case
    for pack in (sparse, levels):
        packed = stored(model, pack).attach(copy.deepcopy(model))
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = ({0: batch}, {0: batch})
        exported = torch.export.export(packed, inputs, dynamic_shapes=shapes).module()
        more = torch.randn(5, 3, 24, 21), torch.randint(0, 50, (5, 4))
        assert torch.equal(exported(*inputs), packed(*inputs)) and torch.equal(exported(*more), packed(*more))


def test_it_can_be_compiled(case):
    model, inputs = case
    packed = stored(model, sparse).attach(copy.deepcopy(model))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(*inputs), packed(*inputs))


def test_operators_are_as_torch_asks_of_them(case):
    model, _ = case
    packed = stored(model, sparse).attach(copy.deepcopy(model))
    layer = packed.far.packed
    x = torch.randn(2, 16, 13, 17)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.tersenet.convolution.default, (x, layer.parts(), layer.spec, packed.far.geometry), test_utils=checks
    )
    layer = packed.first.packed
    args = (torch.randn(2, 5, 10), layer.parts(), layer.spec, layer.rows)
    torch.library.opcheck(torch.ops.tersenet.product.default, args, test_utils=checks)


def rounding(artifact, formats):
    """The file with a section that tells in which fixed point layers take and give values."""
    told = Section(json.dumps(formats).encode())
    return load(Artifact(artifact.tensors, sections={"activations": told}).to_bytes())


def formats_for(model, inputs):
    task = tn.Task(model, train=(inputs, torch.zeros(len(inputs[0]))))
    return calibrated(task, model, [], 8, len(inputs[0]))


@pytest.mark.parametrize("pack", [sparse, levels, shared])
def test_where_the_file_rounds_what_layers_take_and_give_so_does_the_network(pack, case):
    model, inputs = case
    artifact = stored(model, pack)
    file = rounding(artifact, formats_for(artifact.into(copy.deepcopy(model)), inputs))
    packed, wanted = file.attach(copy.deepcopy(model)), into(file, copy.deepcopy(model))
    assert isinstance(packed.first, PackedLinear) and isinstance(packed.near, PackedConv2d)
    with torch.no_grad():
        found, expected, floats = packed(*inputs), wanted(*inputs), file.into(model)(*inputs)
        for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert torch.equal(other(*inputs), found)
    # what lies on the edge between two steps may fall to either side
    assert (found - expected).norm() < 0.1 * (floats - expected).norm()


def test_fixed_point_is_multiplied_as_it_is_and_nothing_is_lost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 50), nn.ReLU(), nn.Linear(50, 9)).eval()
    x = torch.randn(40, 70)
    tensors = {name: Tensor(FixedPoint(8).pack(value.numpy())) for name, value in model.state_dict().items()}
    formats = formats_for(Artifact(tensors).into(copy.deepcopy(model)), (x,))
    file = rounding(Artifact(tensors), formats)
    packed, dense = file.attach(copy.deepcopy(model)), into(file, copy.deepcopy(model))
    assert "times inputs of 8 bits as they are" in str(packed[0]) and "as they are" in str(packed[2])
    with torch.no_grad():
        assert torch.equal(packed(4 * x), dense(4 * x))  # also where it saturates
        x[3, 5] = torch.nan
        assert torch.equal(packed(x).isnan(), dense(x).isnan()) and packed(x)[3].isnan().all()
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(packed, (x,), dynamic_shapes=(batch,)).module()
        assert torch.equal(exported(x[:3]), dense(x[:3]))


def test_more_bits_than_eight_are_multiplied_as_floats_are(case):
    layer = nn.Linear(10, 6)
    file = rounding(stored(layer, levels), {"": [12, 9, 9]})
    packed, dense = file.attach(nn.Linear(10, 6)), into(file, layer)
    x = torch.randn(200, 10)
    assert "times inputs of 24 bits" in str(packed) and ((packed(x) - dense(x)).abs() <= 2.0**-9).all()
    assert (packed(x) == dense(x)).double().mean() > 0.99


def test_a_section_that_does_not_fit_the_network_is_refused(case):
    model, _ = case
    artifact = stored(model, levels)
    with pytest.raises(ValueError, match="other: activations of this layer are to be rounded, but the model lacks it"):
        rounding(artifact, {"other": [8, 3, 3]}).attach(copy.deepcopy(model))
    with pytest.raises(FormatError, match="first: its activations have 2 to 16 bits"):
        rounding(artifact, {"first": [1, 3, 3]}).attach(copy.deepcopy(model))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_states_of_recurrent_layers_go_in_and_come_out(kind, settings):
    layer = kind(6, 5, **settings)
    artifact = stored(layer, levels)
    dense, packed = artifact.into(copy.deepcopy(layer)), artifact.attach(copy.deepcopy(layer))
    assert isinstance(packed, PackedRecurrent)
    many = dense.num_layers * (1 + dense.bidirectional)
    for x, shape in ((torch.randn(4, 4, 6), (many, 4, 5)), (torch.randn(7, 6), (many, 5))):
        state = torch.randn(shape), torch.randn(shape)
        for given in (None, state if kind is nn.LSTM else state[0]):
            (y, ends), (expected, last) = packed(x, given), dense(x, given)
            assert torch.allclose(y, expected, atol=1e-5)
            pairs = zip(ends, last, strict=True) if kind is nn.LSTM else [(ends, last)]
            assert all(torch.allclose(a, b, atol=1e-5) and a.shape == b.shape for a, b in pairs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_called_as_torch_calls_them_and_refuse_other_states(kind):
    layer = kind(6, 5, 2, batch_first=True)
    packed, dense = stored(layer, levels).attach(copy.deepcopy(layer)), stored(layer, levels).into(layer)
    x, state = torch.randn(3, 7, 6), torch.randn(2, 3, 5)

    def given(state):
        return {"input": x, "hx": (state, state) if kind is nn.LSTM else state}

    packed.flatten_parameters()
    assert close(packed(**given(state))[0], dense(**given(state))[0])
    for wrong in (state.transpose(0, 1), state[:, :1], state[0]):
        with pytest.raises(RuntimeError):
            dense(**given(wrong))
        with pytest.raises(ValueError, match=r"takes states \[2, 3, 5\], not "):
            packed(**given(wrong))
    with pytest.raises(ValueError, match="2 or 3 axes"):
        packed(x[None])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_whose_own_parts_are_tied_keep_them_all(kind):
    layer = kind(5, 5, bidirectional=True)
    layer.bias_hh_l0 = layer.bias_ih_l0
    layer.weight_ih_l0_reverse = layer.weight_ih_l0
    artifact = stored(layer, levels)
    packed, x = artifact.attach(copy.deepcopy(layer)), torch.randn(4, 3, 5)
    assert isinstance(packed, PackedRecurrent) and close(packed(x)[0], artifact.into(layer)(x)[0])


@pytest.mark.parametrize("pack", [levels, shared])
def test_embeddings_look_up_what_torch_does_and_nothing_else(pack):
    layer = nn.Embedding(20, 10)
    artifact = stored(layer, pack)
    packed, dense = artifact.attach(copy.deepcopy(layer)), artifact.into(layer)
    assert isinstance(packed, PackedEmbedding)
    for ids in (torch.tensor(3), torch.zeros(0, 4).long(), torch.randint(0, 20, (2, 3)).int()):
        assert torch.allclose(packed(input=ids), dense(ids)) and packed(ids).shape == dense(ids).shape
    for wrong in (torch.tensor([-1]), torch.tensor([20]), torch.ones(20).bool(), torch.ones(20).byte()):
        for layer in (dense, packed):
            with pytest.raises((IndexError, RuntimeError), match=r"index out of range|Long, Int"):
                layer(wrong)


class Twice(nn.Module):
    """Holds its layer in a tuple, too, which is no module."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(10, 10)
        self.layers = (self.layer,)

    def forward(self, x):
        return self.layers[0](x)[0]


def test_a_layer_that_is_held_elsewhere_does_not_run_on_its_old_weights():
    packed = stored(Twice(), levels).attach(Twice())
    assert isinstance(packed.layer, PackedRecurrent)
    with pytest.raises(RuntimeError, match="attach has replaced this layer"):
        packed(torch.randn(2, 10))


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    def made():
        model = nn.Sequential(nn.Linear(10, 10))
        model[0].forward = lambda x: 2 * nn.functional.linear(x, model[0].weight, model[0].bias)
        return model

    artifact, x = stored(made(), levels), torch.randn(3, 10)
    assert torch.equal(artifact.attach(made())(x), artifact.into(made())(x))


def test_a_trace_holds_the_product_and_not_what_it_gave():
    packed = stored(nn.Linear(10, 6), levels).attach(nn.Linear(10, 6))
    traced, x = torch.jit.trace(packed, torch.randn(2, 10)), torch.randn(5, 10)
    assert torch.equal(traced(x), packed(x))


def test_inputs_that_do_not_fit_are_refused(case):
    model, (images, ids) = case
    packed = stored(model, sparse).attach(model)
    with pytest.raises(ValueError, match=r"float32 \[..., 10\], not torch.float32 \[2, 9\]"):
        packed.first(torch.randn(2, 9))
    with pytest.raises(ValueError, match="float64"):
        packed.first(torch.randn(2, 10).double())
    with pytest.raises(ValueError, match=r"float32 images of 3 channels, not torch.float32 \[1, 4"):
        packed.near(torch.randn(1, 4, 9, 9))
    with pytest.raises(TypeError, match="no PackedSequence"):
        packed.lstm(nn.utils.rnn.pack_sequence([torch.randn(3, 8)]))
    with pytest.raises(RuntimeError, match="CPU in float32"):
        packed.double()(images, ids)


def test_no_gradient_is_lost_in_silence(case):
    model, (images, ids) = case
    packed = stored(model, sparse).attach(model)
    assert not any(p.requires_grad for p in packed.parameters())
    y = packed(images.requires_grad_(), ids)
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivatives"):
        packed.first(forward_ad.make_dual(torch.randn(2, 10), torch.randn(2, 10)))


def test_files_of_other_networks_are_refused(case):
    model, _ = case
    artifact = stored(model, sparse)
    with pytest.raises(RuntimeError, match=r"again.bias: only the file has it"):
        artifact.attach(nn.Sequential())
    other = copy.deepcopy(model)
    other.first = other.again = nn.Linear(10, 9)
    with pytest.raises(RuntimeError, match=r"(first|again).*(10, 10|\[10\])"):
        artifact.attach(other)


def test_layers_that_their_parent_reads_or_that_have_hooks_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 8)
    ).eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    artifact = stored(model, levels)
    dense = artifact.into(copy.deepcopy(model))
    packed, why = attached(model, artifact)
    assert {name for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)} == {"2"}
    assert "its parent reads its weight" in why["0.linear1"] and "hooks" in why["1"]
    assert why["0.self_attn"] == "dense: MultiheadAttention is not executed"
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert close(packed(x), dense(x)) and seen


def test_one_layer_can_be_the_network():
    layer = nn.Linear(30, 20)
    artifact = stored(layer, levels)
    packed = artifact.attach(nn.Linear(30, 20))
    assert isinstance(packed.packed, PackedWeight)
    x = torch.randn(30)
    assert close(packed(x), artifact.into(layer)(x).detach())


def test_forked_processes_have_threads_of_their_own():
    script = (
        "import os, sys\n"
        "import numpy as np\n"
        "from tersenet.runtime.forms import shared\n"
        "found = []\n"
        "shared(lambda a, b: found.append((a, b)), 10, 3)\n"
        "child = os.fork()\n"
        "shared(lambda a, b: found.append((a, b)), 10, 3)\n"
        "print(sorted(found) == sorted(2 * [(0, 3), (3, 6), (6, 10)]), flush=True)\n"
        "if child: sys.exit(os.waitpid(child, 0)[1])\n"
    )
    assert fresh_process(script).split() == ["True", "True"]


def grown(numbers, kept):
    """By how many bytes a process grows that makes a layer of so many numbers; run in a fresh one."""

    def make():
        layer = nn.Linear(1000, numbers // 1000, bias=False)
        return layer if kept else nn.Identity()

    return first_use(make, lambda layer: layer(torch.ones(1000))).memory


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told on Linux")
def test_memory_is_that_of_the_process_alone_and_counts_what_was_given_back():
    room = np.ones(50_000_000)  # 400 MB of this process, of which a child's rusage would tell
    for kept in (True, False):
        assert 80e6 <= alone(grown, 20_000_000, kept) < 120e6
    assert len(room) == 50_000_000


def test_bench_prints_what_each_network_takes_and_a_sentence_for_each_layer(tmp_path, case, capsys):
    from tersenet.cli import main

    (tmp_path / "task.py").write_text(
        "import torch, tersenet as tn\n"
        "from torch import nn\n"
        "def task():\n"
        "    torch.manual_seed(0)\n"
        "    data = torch.randn(80, 30), torch.randint(0, 9, (80,))\n"
        "    return tn.Task(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 9)), train=data, test=data)\n"
    )
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 9))
    stored(model, levels).save(tmp_path / "net.terse")
    main(["bench", str(tmp_path / "net.terse"), "--task", str(tmp_path / "task.py")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:9]]
    assert [row[0] for row in rows] == 4 * ["1"] + 4 * ["32"]
    if sys.platform == "linux":
        assert all(0 <= float(row[-2]) < 100 for row in rows if row[1] in ("dense", "packed") and row[2] != "8-bit")
    assert all(float(row[-1]) < (1e-4 if "packed" in row and "inputs" not in row else 0.1) for row in rows)
    assert sum(line.startswith(("0: 4-bit levels", "2: 4-bit levels")) for line in lines) == 4

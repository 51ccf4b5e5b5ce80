"""The file: what it keeps, what it refuses, and what a crash leaves."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import floats, fresh_process, small_files, trees
from hypothesis import given
from hypothesis import strategies as st

from tersenet import FormatError, load
from tersenet.artifact import Artifact, Coding, Tensor
from tersenet.codecs import CODECS
from tersenet.codecs.stream import Reader, put_number
from tersenet.container import (
    DICTIONARY,
    DTYPES,
    FOOTER,
    POOLED,
    PREAMBLE,
    SMALL,
    SMALL_FOOTER,
    expanded,
    from_order,
    in_order,
    inflated,
)
from tersenet.decoding import _risen
from tersenet.header import _plain
from tersenet.packed import Codebook, Sparse, Uniform, unpack
from tersenet.writing import _deflated

FILES = small_files()
GOLDEN = Path(__file__).parent / "golden" / "v1"
OLD = {f"old-{path.stem}": path.read_bytes() for path in sorted(GOLDEN.glob("*.terse"))}
EVERY = FILES | OLD


def rebuilt(plain: bytes, streams: bytes, small: bool = False) -> bytes:
    """A file around a plain header and streams, every checksum right."""
    if small:
        coded = _deflated(plain, DICTIONARY)
        body = b"TERSE\2" + put_number(len(coded)) + coded + streams
        return body + struct.pack("<I", zlib.crc32(body))
    coded = b"\0" + plain
    head = b"TERSE\1" + struct.pack("<I", len(coded))
    body = head + struct.pack("<I", zlib.crc32(head + coded)) + coded + streams
    body += struct.pack("<Q", len(body) + FOOTER)
    return body + struct.pack("<I", zlib.crc32(body))


def parts(file: bytes) -> tuple[bytes, bytes]:
    if file[5] == 2:
        reader = Reader(file[:-SMALL_FOOTER], 6)
        coded = reader.take(reader.number())
        return inflated(coded, expanded(len(coded)), DICTIONARY), reader.rest()
    (length,) = struct.unpack("<I", file[6:10])
    return _plain(file[PREAMBLE : PREAMBLE + length], 1 << 28), file[PREAMBLE + length : -FOOTER]


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(a[n].tobytes() == b[n].tobytes() and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_back_the_same_tensors_and_the_same_bytes(name):
    first = load(FILES[name])
    assert rebuilt(*parts(FILES[name]), small=True) == FILES[name]
    codec = (name.removeprefix("codec-"),) if name.startswith("codec-") else Coding().codecs
    again = Artifact(first.tensors, Coding(codec), first.meta, first.sections)
    assert again.to_bytes() == FILES[name]
    assert same(first.unpack(), load(again.to_bytes()).unpack())


def test_odd_tensors_keep_every_bit():
    state = load(FILES["odd"]).unpack()
    assert state["nan"].tobytes() == np.array([np.nan, -0.0, np.inf, 1e-42], np.float32).tobytes()
    assert state["empty"].shape == (0, 3) and state["scalar"].shape == () and state["scalar"] == 7
    assert state["tied.a"] is state["tied.b"]
    assert state["half"].dtype == np.float16 and state["flag"].dtype == np.bool_


@pytest.mark.parametrize("name", EVERY)
def test_every_truncation_and_every_flipped_bit_is_refused(name):
    file = EVERY[name]
    for cut in range(len(file)):
        with pytest.raises(FormatError):
            load(file[:cut])
    for at in range(len(file)):
        for bit in range(8):
            damaged = bytearray(file)
            damaged[at] ^= 1 << bit
            with pytest.raises(FormatError):
                load(bytes(damaged))


@pytest.mark.parametrize("extra", [b"\0", b"TERSE", b"x" * 64, FILES["odd"]])
@pytest.mark.parametrize("name", ["odd", "old-odd"])
def test_bytes_after_the_end_are_refused(name, extra):
    with pytest.raises(FormatError, match="bytes added"):
        load(EVERY[name] + extra)


def header(
    shape: tuple[int, ...], codec: int = 0, length: int = 2, crc: int = 0, count: int = 1, form: int = 10
) -> bytes:
    array = bytes([4, form, len(shape)]) + b"".join(map(put_number, shape)) + bytes([codec]) + put_number(length)
    tensor = put_number(0) + put_number(1) + b"w" + bytes([form, 0, 0, 0x7E]) + array + struct.pack("<I", crc)
    return put_number(count) + tensor + put_number(0)


def pooled_header(shape: tuple[int, ...], count: int) -> bytes:
    """Tensors a, b, ... of uint8 whose values lie in one pool of two bytes."""
    array = bytes([4, 1, len(shape)]) + b"".join(map(put_number, shape)) + bytes([POOLED])
    tensors = b"".join(b"\0\1" + bytes([65 + k]) + bytes([1, 0, 0, 0x7E]) + array for k in range(count))
    return put_number(count) + tensors + bytes([0, 2]) + struct.pack("<I", zlib.crc32(b"\0\0")) + put_number(0)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 3, 3), (2, 3, 0, 3), (0, 3, 3, 3)])
def test_an_empty_array_is_refused_or_empty_in_every_codec(shape):
    stream, outcomes = b"\0\0", set()
    for codec in range(len(CODECS)):
        for form in (2, 10):
            try:
                (found,) = (
                    load(rebuilt(header(shape, codec, crc=zlib.crc32(stream), form=form), stream)).unpack().values()
                )
                assert found.shape == shape
            except FormatError as wrong:
                outcomes.add(str(wrong))
    assert outcomes and all(text.startswith("w: ") for text in outcomes)


def test_very_sparse_weights_open_without_a_limit():
    mask = np.random.default_rng(0).random((2000, 2000)) < 0.003
    file = Artifact({"w": Tensor(Sparse(mask, np.ones(int(mask.sum()), np.float32)))}).to_bytes()
    assert len(file) < 20_000 and np.array_equal(load(file).unpack()["w"], mask)


def test_a_caller_may_allow_more_and_a_writer_refuses_what_its_reader_would(tmp_path, monkeypatch):
    monkeypatch.setattr("tersenet.header.ALWAYS", 1 << 24)
    artifact = Artifact({"w": Tensor(Uniform(np.zeros(5_000_000, np.int8), np.array(1, np.float32)))})
    with pytest.raises(FormatError, match="over the limit"):
        load(artifact.to_bytes())
    with pytest.raises(ValueError, match=r"over the limit of .* load\(path, limit="):
        artifact.save(tmp_path / "w.terse")
    assert not list(tmp_path.iterdir())
    artifact.save(tmp_path / "w.terse", limit=1 << 27)
    assert load(tmp_path / "w.terse", limit=1 << 27)["w"].shape == (5_000_000,)
    assert "5,000,000 weights" in str(artifact)


def test_a_newer_version_and_a_foreign_file_are_told_apart(tmp_path):
    with pytest.raises(FormatError, match="version 3"):
        load(b"TERSE\3" + FILES["odd"][6:])
    foreign = tmp_path / "x.terse"
    foreign.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(FormatError, match="not a tersenet file"):
        load(foreign)


def test_one_tensor_is_read_without_the_rest(tmp_path):
    path = tmp_path / "two.terse"
    Artifact({"a": Tensor(floats(120, 120)), "b": Tensor(floats(100, 100, seed=1))}).save(path)
    file = bytearray(path.read_bytes())
    file[len(file) - 100] ^= 1  # inside b
    path.write_bytes(file)
    assert np.array_equal(load(path, tensors=["a"])["a"], floats(120, 120))
    with pytest.raises(FormatError, match="b: "):
        load(path, tensors=["b"])
    with pytest.raises(FormatError):
        load(path)
    with pytest.raises(KeyError, match="no tensor 'c'"):
        load(path, tensors=["c"])


def test_small_arrays_share_streams_and_are_checked_with_each_of_their_tensors(tmp_path):
    many = {f"b{i}": Tensor(floats(20, seed=i)) for i in range(30)}
    alone = sum(Artifact({name: tensor}).nbytes - Artifact({}).nbytes for name, tensor in many.items())
    file = Artifact(many | {"w": Tensor(floats(150, 150))}).to_bytes()
    assert len(file) - Artifact({"w": Tensor(floats(150, 150))}).nbytes < alone - 30 * 8
    shared = load(rebuilt(pooled_header((2, 4), 3), b"\0\0")).unpack()
    assert [a.shape for a in shared.values()] == [(2, 4)] * 3
    path = tmp_path / "pool.terse"
    path.write_bytes(file[: -FOOTER - 40] + bytes([file[-FOOTER - 40] ^ 1]) + file[-FOOTER - 39 :])
    assert np.array_equal(load(path, tensors=["w"])["w"], floats(150, 150))
    with pytest.raises(FormatError, match="small arrays"):
        load(path, tensors=["b3"])


def test_any_number_of_threads_decodes_the_same(monkeypatch):
    tensors = {
        f"w{i}": Tensor(Uniform(floats(40, 40, seed=i).view(np.int32) >> 24, np.array(0.5, np.float32)))
        for i in range(9)
    }
    file = Artifact(tensors).to_bytes()
    monkeypatch.setattr("tersenet.container.WORTH_A_THREAD", 100)
    for threads in (1, 2, 5):
        monkeypatch.setattr("tersenet.container.THREADS", threads)
        assert all(np.array_equal(load(file)[name].q, t.tree.q) for name, t in tensors.items())


def test_the_ledger_adds_up_to_the_file():
    for file in EVERY.values():
        artifact = load(file)
        assert sum(row.total for row in artifact.ledger()) == len(file) == artifact.nbytes
        assert f"{len(file):,} bytes" in str(artifact)


def test_floats_are_stored_in_the_narrowest_type_that_loses_nothing():
    exact = np.array([1.0, 0.5, -3.0] * 40, np.float32)
    files = [Artifact({"w": Tensor(a)}, Coding(("bits",))) for a in (exact, exact * 2.0**60, floats(120))]
    sizes = [sum(row.tables for row in file.ledger()) for file in files]
    assert sizes[0] == sizes[1] < sizes[2]
    big = load(Artifact({"w": Tensor(exact * np.float32(2.0**60))}).to_bytes())["w"]
    assert big.dtype == np.float32 and np.array_equal(big, exact * np.float32(2.0**60))


@given(st.binary(min_size=4 * 64, max_size=4 * 1200))
def test_floats_that_rise_come_back_bit_for_bit_whatever_they_are(data):
    words = np.frombuffer(data[: len(data) // 4 * 4], "<u4")
    rising = from_order(np.sort(in_order(words))).view(np.float32)
    back = load(Artifact({"w": Tensor(rising), "x": Tensor(np.tile(rising, 40))}).to_bytes())
    assert back["w"].tobytes() == rising.tobytes() and back["x"].tobytes() == np.tile(rising, 40).tobytes()


def test_palettes_that_rise_cost_less_than_others_and_others_cost_no_more():
    palettes = np.random.default_rng(5).normal(size=(20, 256)).astype(np.float32)
    sizes = [
        Artifact({f"w{k}": Tensor(p) for k, p in enumerate(which)}).nbytes for which in (np.sort(palettes), palettes)
    ]
    least = 20 * sum(np.log2(np.arange(1, 257))) / 8  # the order of 256 values is worth 210 bytes
    assert sizes[1] - sizes[0] > 0.75 * least


def test_floats_that_rise_beyond_all_floats_are_refused():
    with pytest.raises(FormatError, match="go beyond all floats"):
        _risen(np.full(3, 2**31, np.uint32).view(np.float32))


def test_a_header_of_a_small_net_costs_tens_of_bytes():
    tensors = {f"fc{i}.{part}": Tensor(floats(4)) for i in (1, 2) for part in ("weight", "bias")}
    artifact = Artifact(tensors)
    assert artifact.nbytes - sum(row.payload + row.tables for row in artifact.ledger()) < 70


def test_a_reader_refuses_trees_that_a_type_cannot_have():
    plain, streams = parts(FILES["node-Uniform"])
    at = plain.index(b"layer.weight") + len(b"layer.weight")
    assert DTYPES[plain[at]] == "float32"
    for kind in ("int8", "bool", "float8_e5m2"):
        with pytest.raises(FormatError, match="type is not its array's"):
            load(rebuilt(plain[:at] + bytes([DTYPES.index(kind)]) + plain[at + 1 :], streams, small=True))


def test_what_a_file_cannot_hold_is_refused_with_the_tensors_name():
    for tree, kind in ((trees()["Uniform"], "int8"), (trees()["Uniform"], "float8_e5m2"), (floats(3), "int64")):
        with pytest.raises(ValueError, match=f"layer: a tensor of type {kind} cannot be held as"):
            Artifact({"layer": Tensor(tree, kind)}).to_bytes()
    with pytest.raises(ValueError, match="layer: cannot store"):
        Artifact({"layer": Tensor(floats(2), "complex64")}).to_bytes()
    with pytest.raises(ValueError, match="layer: a tensor has at most 8 axes"):
        Artifact({"layer": Tensor(np.zeros((1,) * 9, np.float32))}).to_bytes()
    with pytest.raises(ValueError, match="unknown codec"):
        Coding(("zip",))


def test_loading_opens_nothing_else_and_runs_no_code(tmp_path):
    path = tmp_path / "w.terse"
    Artifact({name: Tensor(tree) for name, tree in trees().items()}).save(path)
    script = (
        "import sys, tersenet, numpy as np\n"
        "tersenet.load(sys.argv[1]).unpack()\n"
        "events = []\n"
        "watched = ('exec', 'import', 'open', 'socket.connect')\n"
        "sys.addaudithook(lambda e, a: events.append((e, a)) if e in watched else 0)\n"
        "tersenet.load(sys.argv[1]).unpack()\n"
        "print([e for e, a in events if not (e == 'open' and str(a[0]) == sys.argv[1])])\n"
    )
    assert fresh_process(script, path).strip() == "[]"


def test_the_same_tensors_make_the_same_bytes_in_any_process():
    script = (
        "from conftest import small_files; import hashlib\n"
        "print([hashlib.sha256(f).hexdigest() for f in small_files().values()])"
    )
    found = set()
    for threads, hashes in (("1", "0"), ("2", "1"), ("2", "random")):
        found.add(fresh_process(script, OMP_NUM_THREADS=threads, PYTHONHASHSEED=hashes))
    assert len(found) == 1


def test_unpack_is_the_dense_weight():
    artifact = Artifact({name: Tensor(tree) for name, tree in trees().items()})
    for name, array in load(artifact.to_bytes()).unpack().items():
        assert np.array_equal(array, unpack(artifact[name]))


def test_a_changed_copy_of_a_file_has_its_own_bytes():
    written = Artifact({"w": Tensor(floats(40, 50))}, Coding(("rans",))).to_bytes()
    opened = load(written)
    assert opened.to_bytes() is written
    noted, plain = replace(opened, meta={"metric": 0.5}), replace(opened, coding=Coding(("bits",)))
    zeros = replace(opened, tensors={"w": Tensor(np.zeros((40, 50), np.float32))})
    assert load(noted.to_bytes()).meta == {"metric": 0.5}
    assert not load(zeros.to_bytes())["w"].any()
    assert plain.to_bytes() == Artifact(opened.tensors, Coding(("bits",))).to_bytes()
    assert opened.to_bytes() is written


def test_a_small_file_is_checked_as_a_whole_whichever_tensor_is_read(tmp_path):
    path = tmp_path / "two.terse"
    Artifact({"a": Tensor(floats(50, 50)), "b": Tensor(floats(40, 40, seed=1))}).save(path)
    file = bytearray(path.read_bytes())
    assert file[5] == 2 and np.array_equal(load(path, tensors=["a"])["a"], floats(50, 50))
    file[-100] ^= 1  # inside b
    path.write_bytes(file)
    with pytest.raises(FormatError, match="checksum"):
        load(path, tensors=["a"])


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_files_are_small_up_to_a_size_and_hold_the_same_on_either_side(more):
    def made(n: int) -> Artifact:
        return Artifact({"w": Tensor(np.random.default_rng(0).integers(0, 256, n).astype(np.uint8), "uint8")})

    n = SMALL - (made(SMALL - 1000).nbytes - (SMALL - 1000))  # random bytes take a byte each
    file = made(n + more).to_bytes()
    assert (file[5] == 2) == (more <= 0) and (more > 0 or len(file) == SMALL + more)
    assert np.array_equal(load(file)["w"], made(n + more)["w"])


def test_a_pruned_lenet_5_costs_at_most_150_bytes_beyond_its_arrays():
    """1,200 levels that are not zero, biases in half precision, errors measured: two kinds of trees."""
    shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    rng = np.random.default_rng(0)
    for shared in (False, True):
        tensors = {}
        for k, (name, shape) in enumerate(shapes.items()):
            mask = np.zeros(shape, bool)
            mask.reshape(-1)[rng.permutation(mask.size)[: (100, 300, 700, 100)[k]]] = True
            levels = np.where(mask, rng.integers(1, 16, shape) * rng.choice([-1, 1], shape), 0).astype(np.int8)
            tree = Uniform(levels, np.array(0.01 * (k + 1), np.float16).astype(np.float32))
            if shared:
                codewords = floats(32, 1, seed=k).astype(np.float16).astype(np.float32)
                tree = Sparse(mask, Codebook(rng.integers(0, 32, int(mask.sum())).astype(np.uint8), codewords))
            tensors[f"{name}.weight"] = Tensor(tree, error=0.9 + k / 100)
            bias = floats(shape[0], seed=k).astype(np.float16).astype(np.float32)
            tensors[f"{name}.bias"] = Tensor(bias, note="dense: no stage packed it", error=0.0002)
        file = Artifact(tensors)
        assert file.nbytes - sum(row.payload + row.tables for row in file.ledger()) <= 150


def test_the_page_has_the_dictionary_of_small_files():
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    block = page.split("**Dictionary.**")[1].split("```")[1]
    assert bytes.fromhex(block) == DICTIONARY

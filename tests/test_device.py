"""The small decoder in C (examples/c) and `terse export`: the dense model's answers, and what is refused."""

import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import floats, small_files, trees
from mutations import mutated, put_together, taken_apart
from test_real_networks import task_of

import tersenet as tn
from tersenet.artifact import Artifact, Coding, FormatError, Section, Tensor, load
from tersenet.budget import Budget
from tersenet.cli import main
from tersenet.export import c_header, c_name
from tersenet.packed import Codebook, Sparse, Uniform

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "c"
NATIVE = [HERE.parent / "native" / name for name in ("context.c", "abi.c")]
SOURCES = [*(EXAMPLE / f"{name}.c" for name in ("layers", "trees", "reader", "streams", "bits", "lzma")), *NATIVE]
SANITIZED = ["-std=c11", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ROOM = 1 << 20
UNSUPPORTED, MEMORY, MISSING = 2, 3, 4  # reader.h
# What Python alone looks at: texts, and sections that nobody asked the device for.
PYTHON_ONLY = "UTF-8|not JSON|longer than its tensors|section|two tensors are named|over the limit"


def built(folder, *settings):
    """The program of examples/c, by its own Makefile."""
    if not shutil.which("make") or not shutil.which("cc"):
        pytest.skip("no make or no C compiler")
    shutil.copytree(EXAMPLE, folder / "examples" / "c", dirs_exist_ok=True)
    shutil.copytree(HERE.parent / "native", folder / "native", dirs_exist_ok=True)
    command = ["make", "-s", "-B", "-C", str(folder / "examples" / "c"), "CFLAGS=-O1 -Wall -Wextra -Wpedantic -Werror"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "examples" / "c" / "digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return built(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """What device.c finds in files, under sanitizers: for each its code, and for each tensor two codes and arrays."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("device") / "device"
    command = ["cc", *SANITIZED, "-Wall", "-Wextra", "-Werror", HERE / "device.c", *SOURCES, "-lm", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "sanitize" in done.stderr or "asan" in done.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert done.returncode == 0, done.stderr

    def run(files, room=ROOM):
        given = b"".join(struct.pack("<I", len(file)) + file for file in files)
        done = subprocess.run([program, str(room)], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        out, at, found = done.stdout, 0, []
        for _ in files:
            code, tensors = struct.unpack_from("<II", out, at)
            at, parts = at + 8, []
            for _ in range(2 * tensors):
                wrong, count = struct.unpack_from("<II", out, at)
                parts.append((wrong, np.frombuffer(out, np.float32, count, at + 8)))
                at += 8 + 4 * count
            found.append((code, list(zip(parts[::2], parts[1::2], strict=True))))
        assert at == len(out)
        return found

    return run


def agree(file, tensors):
    """Whether what the device has of every tensor, if anything, is what Python has."""
    for tensor, forms in zip(load(file).tensors.values(), tensors, strict=True):
        dense = np.asarray(tensor.unpack(), np.float32).reshape(-1)
        near = 1e-5 * np.abs(dense, where=np.isfinite(dense), out=np.zeros_like(dense)).max(initial=0)
        for code, values in forms:
            if code not in (UNSUPPORTED, MEMORY, MISSING):
                assert code == 0
                assert np.allclose(values, dense, 0, near, equal_nan=True), tensor.tree
    return True


def deep(weight, share=0.12, bits=4):
    """A weight as Deep Compression has it, by size and by quantiles."""
    flat = np.abs(weight).reshape(-1)
    mask = np.abs(weight) >= np.partition(flat, int((1 - share) * flat.size))[int((1 - share) * flat.size)]
    words = np.quantile(weight[mask], (np.arange(1 << bits) + 0.5) / (1 << bits)).astype(np.float32)
    index = np.abs(weight[mask][:, None] - words).argmin(1).astype(np.uint8)
    return Sparse(mask, Codebook(index, words[:, None]))


def lenet(data, name, coding=None):
    """A LeNet's file: pruned and clustered with its own biases, or waterfilled where nothing is said."""
    model = data[1].load(name)
    if coding is None:
        return tn.compress(task_of(data, name, "mnist", 600), budget=Budget(size="30kB")).artifact.to_bytes()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    packed = {key: Tensor(deep(value) if value.ndim > 1 else value) for key, value in state.items()}
    return Artifact(packed, Coding(coding)).to_bytes()


def answered(program, *arguments):
    done = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()], np.float64)
    return rows[:, 0].astype(int), rows[:, 1:], [int(n) for n in re.findall(r"(\d+) (?:bytes|once)", done.stderr)]


def right(data, name, file, images, program, *arguments):
    """The answers and memory of the program, held to the dense model's."""
    model = load(file).into(data[1].load(name)).eval()
    with torch.inference_mode():
        outputs = model(data[1].inputs(name, images)).numpy()
    classes, found, memory = answered(program, *arguments)
    assert np.array_equal(classes, outputs.argmax(1))
    assert np.abs(found - outputs).max() <= 1e-4
    return memory


CODINGS = [("lenet300", ("bits", "huffman", "gaps")), ("lenet300", ("context", "lzma")), ("lenet5", None)]


@pytest.mark.parametrize(("name", "coding"), CODINGS)
def test_digits_are_told_apart_as_by_the_dense_model(data, digits, tmp_path, name, coding):
    file, images = lenet(data, name, coding), data[0].load("mnist", "test", 1000)[0]
    (tmp_path / "net.terse").write_bytes(file)
    (tmp_path / "images").write_bytes(images.tobytes())
    peak, kept = right(data, name, file, images, [digits], tmp_path / "net.terse", tmp_path / "images")
    enough = int(re.search(r"_arena = (\d+)", c_header(file, "net.terse"))[1])
    assert kept < peak <= enough < 1.6 * peak
    if coding and "gaps" in coding:
        assert peak < 5 * len(file)  # 40 times the file if it were dense


@pytest.mark.parametrize(("compiler", "machine"), [("arm-linux-gnueabihf-gcc -static", "qemu-arm"), ("gcc -m32", "")])
def test_a_network_that_is_built_in_runs_in_the_memory_that_export_tells(data, tmp_path, compiler, machine):
    if not shutil.which(compiler.split()[0]) or (machine and not shutil.which(machine)):
        pytest.skip(f"no {compiler} or {machine}")
    (tmp_path / "probe.c").write_text("#include <stdio.h>\nint main(void) { return 0; }\n")
    probe = [*compiler.split(), str(tmp_path / "probe.c"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no libraries")
    file, images = lenet(data, "lenet300", ("bits", "context", "gaps")), data[0].load("mnist", "test", 30)[0]
    (tmp_path / "le net.terse").write_bytes(file)
    (tmp_path / "images").write_bytes(images.tobytes())
    main(["export", str(tmp_path / "le net.terse"), "-o", str(tmp_path / "le_net.h")])
    program = built(tmp_path, f"CC={compiler}", f"MODEL={tmp_path / 'le_net.h'}")
    right(data, "lenet300", file, images, [*machine.split(), program], tmp_path / "images")


def test_every_node_and_codec_is_decoded_as_in_python_or_refused(decoder):
    files = small_files()
    masked = {name: Tensor(tree) for name, tree in trees().items() if name.startswith("Sparse")}
    for codec in ("bits", "trits", "huffman", "gaps", "runs", "rans", "rans-pairs", "context", "deflate", "lzma"):
        files[f"masked-{codec}"] = Artifact(masked, Coding((codec,))).to_bytes()
        lanes = {"w": Tensor(Uniform(np.arange(66_000, dtype=np.int32).reshape(6, -1) % 11 - 5, floats(6, 1)))}
        files[f"lanes-{codec}"] = Artifact(lanes, Coding((codec,))).to_bytes()
    for (name, file), (code, tensors) in zip(files.items(), decoder(files.values(), 1 << 22), strict=True):
        assert code == 0 and agree(file, tensors)
        lacking = [forms for forms in tensors if forms[0][0] == UNSUPPORTED]
        expected = name.removeprefix("node-").removeprefix("codec-")
        assert bool(lacking) == (
            expected in {"Factored", "Codebook-group", "Lattice", "Hashed", "Bloomier", "bzip2", "zstd", "odd", "small"}
        )


def test_every_truncation_and_every_flipped_bit_is_refused(decoder):
    rng = np.random.default_rng(0)
    net = {"w": Tensor(Sparse(rng.random((9, 30)) < 0.3, floats(1))), "b": Tensor(floats(9))}
    net["w"] = Tensor(deep(floats(9, 30), 0.3, 2))
    small = Artifact(net, sections={"graph": Section(b"of things")}).to_bytes()
    ordinary = put_together(taken_apart(small).parts)
    for file in (small, ordinary):
        wrong = [file[:at] for at in range(len(file))] + [file + b"\0"]
        for bit in range(8 * len(file)):
            flipped = bytearray(file)
            flipped[bit // 8] ^= 1 << bit % 8
            wrong.append(bytes(flipped))
        assert load(file) and decoder([file])[0][0] == 0
        assert all(code == 1 for code, _ in decoder(wrong))


def test_changed_files_with_right_checksums_are_taken_only_where_python_takes_them(decoder):
    cases = [mutated(number)[0] for number in range(1500)]
    file = Artifact({"w": Tensor(deep(floats(12, 40), 0.3, 2)), "b": Tensor(floats(12))}).to_bytes()
    for bit in range(8 * (len(file) - 4)):
        flipped = bytearray(file[:-4])
        flipped[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(flipped) + struct.pack("<I", zlib.crc32(flipped)))
    both = 0
    for case, (code, tensors) in zip(cases, decoder(cases), strict=True):
        try:
            load(case, limit=1 << 26)
        except FormatError as wrong:
            refused = code or any(wrong for forms in tensors for wrong, _ in forms)
            assert refused or re.search(PYTHON_ONLY, str(wrong)), wrong
        else:
            both += code == 0 and agree(case, tensors)
    assert both > 50


def test_too_little_memory_is_an_error_and_no_more(decoder):
    file = Artifact({"w": Tensor(deep(floats(20, 50), 0.3, 2)), "b": Tensor(floats(20))}).to_bytes()
    codes = set()
    for room in range(0, 12_000, 400):
        code, tensors = decoder([file], room)[0]
        codes |= {code, *(wrong for forms in tensors for wrong, _ in forms)}
        assert codes <= {0, MEMORY} and (code or agree(file, tensors))
    assert codes == {0, MEMORY}


def test_export_refuses_what_the_device_lacks_and_says_what_helps(tmp_path, capsys):
    path, out = tmp_path / "net.terse", tmp_path / "net.h"
    refused = [
        (
            {"layer.w": Tensor(trees()["Factored"])},
            Coding(),
            "layer.w: the small decoder has no Factored node; pack it",
        ),
        (
            {"w": Tensor(trees()["Codebook"])},
            Coding(("bzip2",)),
            "w: the codec bzip2 is not in the small decoder; save",
        ),
        (
            {"w": Tensor(floats(3).astype(np.float64), "float64")},
            Coding(),
            "w: the small decoder has no packed float64",
        ),
        (
            {"w": Tensor(trees()["Codebook-group"])},
            Coding(),
            "w: the small decoder has no codebooks by group; pack it without a group",
        ),
    ]
    for tensors, coding, said in refused:
        Artifact(tensors, coding).save(path)
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(path), "-o", str(out)])
        assert stopped.value.code == 2 and not out.exists()
        assert f"{path}: {said}" in capsys.readouterr().err


def test_a_hostile_name_stays_a_comment_and_a_file_name_becomes_an_identifier(tmp_path):
    names = [c_name(name) for name in ("../a b.terse", "x/while", "9.terse", "", "\u00e9 *", "C:\\_Z")]
    assert names == ["model_a_b", "model_while", "model_9", "model_", "model____", "model__Z"]
    names = ["*/ int hidden; /*", "a\n#error b", "a \\", "\u202e", "?" * 3 + "/"]
    file = Artifact({name: Tensor(floats(2, 2)) for name in names}).to_bytes()
    text = c_header(file, "*/ #error.terse")
    assert text.count("*/") == 1 and text.isascii()
    if shutil.which("cc"):
        (tmp_path / "a.c").write_text(
            text + f"int main(void) {{ return {c_name('*/ #error.terse')}_bytes != {len(file)}; }}\n"
        )
        flags = [
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-Wno-trigraphs",
            "-Wno-unused-const-variable",
        ]
        subprocess.run(["cc", *flags, tmp_path / "a.c", "-o", tmp_path / "a", "-Wno-unused-variable"], check=True)
        assert subprocess.run([tmp_path / "a"], check=False).returncode == 0
    array = bytes(int(n) for n in re.search(r"\[\] = \{(.*)\}", text, re.S)[1].split(","))
    assert array == file

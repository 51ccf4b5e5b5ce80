"""The C core on other machines: plain C11, the same bytes everywhere, and a core that does not fit is not called."""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import path_levels
from test_feedback import WAYS, even, levels, problem
from test_golden import GOLDEN, HASHES, fingerprint

from tersenet import container, native
from tersenet.bloomier import built, queried
from tersenet.codecs import CODECS
from tersenet.codecs.stream import Unsuited
from tersenet.codecs.ternary import decode, encode
from tersenet.methods.product import nearest
from tersenet.methods.recursion import EDGES
from tersenet.methods.surgeon import removals
from tersenet.runtime.layouts import levels as forms_of_levels

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parent / "native").glob("*.c"))
STRICT = ["-std=c11", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
FUNCTIONS = [
    *("bits_encode", "bits_decode", "trits_encode", "trits_decode", "gaps_encode", "gaps_decode", "runs_encode"),
    *("runs_decode", "huffman_encode", "huffman_decode", "rans_encode", "rans_decode", "rans_split"),
    *("context_encode", "context_decode", "feedback", "surgeon", "context_size", "literals_encode"),
    *("threelc_encode", "threelc_decode", "nearest", "bloomier_build", "bloomier_query", "levels_digits"),
    "levels_product",
]  # in the order of replay.c
MACHINES = {  # a compiler with its flags, and what runs its programs here
    "this": ("cc", ""),
    "this, by Clang": ("clang", ""),
    "this, in plain C": ("cc -DTERSE_PLAIN", ""),
    "32-bit x86": ("gcc -m32", ""),
    "32-bit ARM": ("arm-linux-gnueabihf-gcc -static", "qemu-arm"),
    "64-bit ARM": ("aarch64-linux-gnu-gcc -static", "qemu-aarch64"),
    "64-bit ARM, in plain C": ("aarch64-linux-gnu-gcc -static -DTERSE_PLAIN", "qemu-aarch64"),
    "Windows": ("x86_64-w64-mingw32-gcc", "wine"),
    "Windows, in plain C": ("x86_64-w64-mingw32-gcc -DTERSE_PLAIN", "wine"),
}


def compiled(folder, name, compiler, *flags):
    """A program or library of the core in this folder; skips where that compiler is absent."""
    command = [*compiler.split(), *STRICT, *map(str, flags), "-o", str(folder / name)]
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}")
    (folder / "empty.c").write_text("#include <stdlib.h>\nint main(void) { return 0; }\n")
    probe = [*compiler.split(), str(folder / "empty.c"), "-o", str(folder / "empty")]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no libraries")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / name


def library(folder, *flags):
    return compiled(folder, "core.so", "cc", "-shared", "-fPIC", *flags)


def flat(name, arguments):
    """Recorded arguments with structs taken apart: None, numbers, and arrays for all that is pointed to."""
    for argument in arguments:
        if isinstance(argument, ctypes.c_char_p):  # streams of context_decode, whose ends its arrays tell
            length = arguments[1].reshape(-1, native.ARRAY)[:, :2].sum(1).max(initial=0)
            yield np.frombuffer(ctypes.string_at(argument, int(length)), np.uint8)
        elif hasattr(argument, "_obj"):
            yield from members(argument._obj)
        else:
            yield argument


def members(s):
    if isinstance(s, native.Model):
        sizes = {"column": 4 * (s.columns + 1), "prior": 4 * 50 * 16}
    else:
        sizes = {"line": 8 * s.lines, "value": 8 * s.values, "edge": EDGES.nbytes, "profile": 8 * s.values}
        sizes |= {"bits": 64 * s.contexts, "kept": s.lines * s.values, "weight": 8 * s.values}
    for name, _ in s._fields_:
        value = getattr(s, name)
        yield np.frombuffer(ctypes.string_at(value, sizes[name]), np.uint8) if name in sizes and value else value


def exercised():
    """Calls every function of the core: golden files, every codec, error feedback, the surgeon, vectors, filters."""
    for name in HASHES:
        assert fingerprint((GOLDEN / f"{name}.terse").read_bytes()) == HASHES[name]
    rng = np.random.default_rng(0)
    sparse = rng.laplace(0, 0.6, (64, 100)) * (rng.random(100) < 0.3)
    wide, kernels, ternary = rng.laplace(0, 900, (9, 200)), rng.laplace(0, 3, (40, 16, 3, 3)), rng.uniform(-1, 1, 700)
    for values in (wide, kernels, ternary, sparse, path_levels(24, 16, 3, 3)):
        whole = np.rint(values).astype(np.int16)
        for codec in CODECS.values():
            with contextlib.suppress(Unsuited):
                assert np.array_equal(codec.decode(codec.encode(whole), whole.shape, whole.dtype), whole)
    w, metric = problem(37, 70, 0, (33, 18))
    for some, trellis in WAYS:
        levels(w, metric, even(w, 0.2), 0.5, rng.random(w.shape) < 0.4 if some else None, trellis)
    root = rng.normal(size=(30, 30))
    removals(root[0], np.linalg.inv(root @ root.T + np.eye(30)), 20)
    for spread in (1e-40, 1, 1e30):
        values, residual = rng.laplace(0, spread, (2, 12_007)).astype(np.float32)
        decode(encode(values, residual, 1.5), values.size)
    nearest(*(rng.normal(size=(n, 5)).astype(np.float32) for n in (900, 70)))
    keys = np.sort(rng.choice(9_000, 700, replace=False))
    cells, seed, length = built(keys, keys % 6, 5)
    queried(cells, 9_000, seed, length, 5)
    for most, planes in ((4, 1), (16, 2), (256, 3)):
        q, scale = rng.integers(0, most, (37, 96)), rng.random((37, 3)).astype(np.float32)
        form = forms_of_levels(q, scale, rng.integers(-9, 9, scale.shape), scale[:32].reshape(-1), planes)
        form.product(rng.normal(size=(11, 96)).astype(np.float32))


@pytest.fixture(scope="module")
def calls():
    """What `exercised` calls, as replay.c reads it."""
    record, names, call = [], set(), native.call

    def recorded(name, *arguments):
        given = list(flat(name, arguments))
        before = [argument.tobytes() if isinstance(argument, np.ndarray) else b"" for argument in given]
        done = call(name, *arguments)
        names.add(name)
        record.append(struct.pack("<3q", FUNCTIONS.index(name), done, len(given)))
        for at, (argument, old) in enumerate(zip(given, before, strict=True)):
            if name == "context_decode" and at == 6:  # room
                record.append(struct.pack("<2q", 3, len(old)))
            elif isinstance(argument, np.ndarray):
                record.append(struct.pack("<2q", 2, len(old)) + old + argument.tobytes())
            else:
                form = "<qd" if isinstance(argument, float) else "<2q"
                record.append(struct.pack(form, argument is not None, 0 if argument is None else argument))
        return done

    if native.library() is None:
        pytest.skip("no C core was built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "call", recorded)
        patch.setattr(container, "THREADS", 1)
        patch.setattr(container, "CORES", 1)
        exercised()
    assert names == set(FUNCTIONS)
    return b"".join(record)


@pytest.mark.parametrize("machine", MACHINES)
def test_other_machines_code_the_same_bytes(machine, calls, tmp_path):
    compiler, runner = MACHINES[machine]
    if not runner and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("programs of this machine are tried on Linux")
    if runner and not shutil.which(runner):
        pytest.skip(f"no {runner}")
    program = compiled(tmp_path, "replay.exe", compiler, *SOURCES, HERE / "replay.c")
    environment = os.environ | {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    done = subprocess.run([*runner.split(), program], input=calls, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    assert int(done.stdout.split()[0]) > 100


def test_a_library_for_windows_exports_what_the_header_declares(tmp_path):
    path = compiled(tmp_path, "_terse.dll", "x86_64-w64-mingw32-gcc -shared", *SOURCES)
    listed = subprocess.run(
        ["x86_64-w64-mingw32-objdump", "-p", path], capture_output=True, text=True, check=True
    ).stdout
    exported = re.findall(r"^\t\[ *\d+\] (\w+)$", listed, re.MULTILINE)
    declared = re.findall(
        r"^TERSE_API[^(;]*?\b(terse_\w+)\(", (HERE.parent / "native" / "terse.h").read_text(), re.MULTILINE
    )
    assert sorted(exported) == sorted(declared) and {f"terse_{name}" for name in FUNCTIONS} <= set(declared)
    assert not re.findall(r"DLL Name: (lib.*)", listed)  # which no Windows has


def test_the_core_is_c_that_msvc_takes(tmp_path):
    """As Clang reads C for it, with the little of its headers that the core includes."""
    if not shutil.which("clang"):
        pytest.skip("no clang")
    (tmp_path / "string.h").write_text(
        "#include <stddef.h>\nvoid *memset(void *, int, size_t);\nint memcmp(const void *, const void *, size_t);\n"
        "void *memcpy(void *, const void *, size_t);\nvoid *memmove(void *, const void *, size_t);\n"
    )
    (tmp_path / "intrin.h").write_text("long _InterlockedExchangeAdd(long volatile *, long);\n")
    for machine in ("x86_64", "aarch64"):
        target = f"--target={machine}-pc-windows-msvc", "-ffreestanding", "-fsyntax-only", "-isystem", tmp_path
        done = subprocess.run(["clang", *target, *STRICT, *SOURCES], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_plain_c_serves_files_as_the_core_does(tmp_path, monkeypatch):
    core = native.opened(library(tmp_path, "-DTERSE_PLAIN", *SOURCES))
    monkeypatch.setattr(native, "library", lambda: core)
    exercised()


SIZES = "void terse_sizes(long long *s) { s[0] = s[1] = s[2] = 8; }"


@pytest.mark.parametrize(
    ("source", "flags", "wrong"),
    [
        ("", (), "another tersenet.*ABI none, not"),
        ("int terse_abi(void) { return 99; }", (), "another tersenet.*ABI 99, not"),
        ("", ("-O3", "-ffp-contract=fast", "-mfma", SOURCES[0]), "rounds or orders"),
        (f"int terse_abi(void) {{ return {native.ABI}; }} {SIZES}", (), r"structs of \[8, 8, 8\] bytes"),
    ],
)
def test_a_core_that_does_not_fit_is_refused(source, flags, wrong, tmp_path):
    if "-mfma" in flags and platform.machine() != "x86_64":
        pytest.skip("flags of x86")
    (tmp_path / "other.c").write_text(source + "\nextern int any;\n")
    path = library(tmp_path, tmp_path / "other.c", *flags)
    if "-mfma" in flags and "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor does not fuse")
    with pytest.raises(OSError, match=wrong):
        native.opened(path)


def test_what_is_no_library_is_refused(tmp_path):
    (tmp_path / "core.so").write_bytes(b"no library")
    with pytest.raises(OSError):
        native.opened(tmp_path / "core.so")


def test_without_a_core_the_twin_serves_and_says_so_once(monkeypatch):
    name = "codec-context"
    monkeypatch.setattr(native, "SUFFIX", ".absent")
    native.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="without its C core. NumPy does its work") as said:
            assert fingerprint((GOLDEN / f"{name}.terse").read_bytes()) == HASHES[name]
            assert native.library() is None
        assert len(said) == 1
    finally:
        native.library.cache_clear()

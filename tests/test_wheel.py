"""What is released: an sdist, and wheels with the C core and without; both of these open a file with NumPy alone."""

import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_golden import GOLDEN, HASHES, fingerprint

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
OPEN = f"""
import hashlib, pathlib, sys, warnings
{inspect.getsource(fingerprint)}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import tersenet
    from tersenet import load
    from tersenet.packed import arrays
    print(fingerprint(pathlib.Path(sys.argv[1]).read_bytes()), tersenet.__version__, tersenet.__file__)
for warning in said:
    print(warning.category.__name__, warning.message)
"""


def ran(*command, **environment):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder that `make wheel` fills."""
    for module in ("build", "scikit_build_core"):
        pytest.importorskip(module)
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    folder = tmp_path_factory.mktemp("dist")
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    return folder


@pytest.fixture
def python(tmp_path):
    """A fresh Python that has NumPy and nothing else."""
    venv.create(tmp_path / "fresh", symlinks=os.name == "posix")
    program = tmp_path / "fresh" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(ran(program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for folder in Path(np.__file__).parents[1].glob("numpy*"):
        shutil.copytree(folder, packages / folder.name, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    return program


def opened(python, wheel, file):
    """The hash of what a file holds and the warnings, in a fresh Python in which that wheel is installed."""
    ran(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    first, *said = ran(python, "-I", "-c", OPEN, file).strip().split("\n")
    found, version, path = first.split(" ", 2)
    assert version == VERSION and Path(path).is_relative_to(python.parents[1])
    return found, said


def test_an_sdist_holds_what_a_wheel_is_made_of_and_no_results(released):
    with tarfile.open(released / f"tersenet-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {
        "CMakeLists.txt",
        "LICENSE",
        "native/terse.h",
        "src/tersenet/py.typed",
        "tests/golden/v1/odd.terse",
    }
    assert not [name for name in names if name.startswith(("bench/results", "build", ".venv")) or name.endswith(".so")]


def test_a_wheel_with_the_core_opens_a_file_with_numpy_alone(released, python):
    [wheel] = released.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if wheel.name.endswith("-any.whl"):
        pytest.skip("no compiler here")
    assert wheel.name.startswith(f"tersenet-{VERSION}-py3-none-")
    assert len([n for n in names if n.startswith("tersenet/_terse.")]) == 1 and "tersenet/py.typed" in names
    assert {f"tersenet/report/{name}" for name in ("page.css", "page.js", "page.html.j2")} <= set(names)
    assert opened(python, wheel, GOLDEN / "trellis.terse") == (HASHES["trellis"], [])


def test_where_no_compiler_works_a_wheel_opens_it_too_and_says_once_what_it_lacks(released, python, tmp_path):
    source = released / f"tersenet-{VERSION}.tar.gz"
    options = "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir"
    ran(sys.executable, "-m", "pip", "wheel", *options, tmp_path, source, CC="/bin/false")
    wheel = tmp_path / f"tersenet-{VERSION}-py3-none-any.whl"
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("tersenet/_terse")]
    found, said = opened(python, wheel, GOLDEN / "trellis.terse")
    assert found == HASHES["trellis"]
    assert said == [
        "RuntimeWarning tersenet was installed without its C core. NumPy does its work: the same bytes, slower."
    ]


def test_the_changelog_begins_with_this_version():
    heads = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert heads[0].split()[1] == VERSION

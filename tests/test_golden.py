"""Files of format version 1 decode for ever: one for each node and codec, with the hash of what is in it."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import small_files

from tersenet import load
from tersenet.codecs import CODECS
from tersenet.packed import NODES, arrays

GOLDEN = Path(__file__).parent / "golden" / "v1"
HASHES = json.loads((GOLDEN / "hashes.json").read_text()) if (GOLDEN / "hashes.json").exists() else {}


def fingerprint(file: bytes) -> str:
    """A hash of every array of every tree: what is stored, not the sums of products that unpacking makes of it."""
    mark = hashlib.sha256()
    for name, tensor in load(file).tensors.items():
        mark.update(f"{name}{tensor.dtype}{tensor.tree.shape}{type(tensor.tree).__name__}".encode())
        for path, array in arrays(tensor.tree):
            mark.update(f"{path}{array.dtype}{array.shape}".encode() + array.tobytes())
    return mark.hexdigest()


def write() -> None:
    """Add files for what is new; an old file is never written again. Run: python tests/test_golden.py"""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, file in small_files().items():
        path = GOLDEN / f"{name}.terse"
        if not path.exists():
            path.write_bytes(file)
            HASHES[name] = fingerprint(file)
    (GOLDEN / "hashes.json").write_text(json.dumps(HASHES, indent=1) + "\n")


def test_every_node_and_codec_has_its_golden_file():
    assert {f"codec-{name}" for name in CODECS} <= set(HASHES)
    assert all(any(h.startswith(f"node-{name}") for h in HASHES) for name in NODES)
    assert set(HASHES) == {path.stem for path in GOLDEN.glob("*.terse")}


@pytest.mark.parametrize("name", HASHES)
def test_golden_files_decode_as_ever(name, both):
    assert fingerprint((GOLDEN / f"{name}.terse").read_bytes()) == HASHES[name]


if __name__ == "__main__":
    write()

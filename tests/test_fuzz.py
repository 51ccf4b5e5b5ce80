"""Files of a stranger: changed ones with right checksums end in an error or a valid result, bombs are refused in little
memory, and what was found so is held by a test. bench/fuzz.py does the same a million times."""

import json
import tracemalloc

import numpy as np
import pytest
from bombs import CONSTANT, U8, bombs, file, pooled, raw
from conftest import floats, fresh_process, small_files
from mutations import Part, corpus, mutated, outcome, put_together

from tersenet import FormatError, load, native
from tersenet.access import Memory
from tersenet.artifact import Artifact, Tensor
from tersenet.codecs import CODECS
from tersenet.container import DEFLATED, FORMATS
from tersenet.header import Header
from tersenet.packed import NODES, Factored, Packed, Transformed, arrays, kernel_dct

CASES = 20_000


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutations_with_right_checksums_end_in_an_error_or_a_valid_result():
    ends = [outcome(*mutated(number)) for number in range(CASES)]
    assert ends.count("decoded") > CASES // 50
    assert len({text.split(": ", 1)[-1] for text in ends}) > 200


def test_what_is_mutated_is_valid_and_has_every_kind_of_array():
    forms = set()
    for whole in corpus():
        written = put_together(whole.parts)
        assert outcome(written, whole.names[0]) == "decoded"
        forms |= {p.form for entry in Header.read(Memory(written), None).entries.values() for p in entry.promises}
    assert forms == set(range(len(FORMATS)))


def test_files_that_are_cut_and_flipped_everywhere_have_every_node_codec_and_kind_of_section():
    nodes, used, flags = set(), set(), set()
    for written in small_files().values():  # test_artifact.py and test_sections.py cut and flip these
        header = Header.read(Memory(written), None)
        used |= {p.codec for entry in header.entries.values() for p in entry.promises}
        flags |= {place.flags for place in header.sections.values()}
        for tensor in load(written).tensors.values():
            nodes |= set(kinds(tensor.tree))
    assert nodes == set(NODES) and used >= set(range(len(CODECS))) and flags == {0, DEFLATED}


def kinds(tree):
    if isinstance(tree, Packed):
        yield type(tree).__name__
        for part in vars(tree).values():
            for below in part if isinstance(part, tuple) else (part,):
                yield from kinds(below)


def test_a_case_is_its_number():
    assert mutated(17) == mutated(17) != mutated(18) and mutated(17, seed=1) != mutated(17)


def test_the_core_and_its_twin_agree_on_mutated_files(monkeypatch):
    if native.library() is None:
        pytest.skip("no C core was built")
    files = [mutated(number)[0] for number in range(2_000)]
    by_core = [stored(written) for written in files]
    monkeypatch.setattr(native, "library", lambda: None)
    assert [stored(written) for written in files] == by_core


def stored(written):
    """All arrays of a small file; None where it is refused."""
    try:
        tensors = load(written, limit=1 << 18).tensors
    except FormatError:
        return None
    return [(name, path, a.dtype, a.shape, a.tobytes()) for name, t in tensors.items() for path, a in arrays(t.tree)]


def test_bombs_are_refused_in_64_megabytes(tmp_path):
    for at, (name, bomb) in enumerate(bombs().items()):
        assert len(bomb) < 1 << 20, name
        (tmp_path / f"{at:03}.terse").write_bytes(bomb)
    script = (
        "import pathlib, sys, tersenet\n"
        "from tersenet.journal import memory\n"
        "before = memory()\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n        tersenet.load(path)\n"
        "    except tersenet.FormatError:\n        print(memory() - before)\n"
    )
    grown = fresh_process(script, tmp_path).split()
    assert len(grown) == len(bombs()), f"{list(bombs())[len(grown)]} was not refused"
    assert float(grown[-1]) < 64


def test_a_large_transform_takes_no_matrix_of_the_square_of_its_size():
    w = floats(3, 20, 24)
    tree = Transformed(w)
    assert np.allclose(tree.unpack().reshape(3, -1), w.reshape(3, -1) @ kernel_dct(20, 24), atol=1e-4)
    torch = pytest.importorskip("torch")
    assert np.allclose(Transformed(torch.from_numpy(w)).unpack(), tree.unpack(), atol=1e-5)
    tracemalloc.start()
    Transformed(floats(1, 64, 64)).unpack()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_transform_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 x 1"):
        Transformed(floats(2, 3, 0)).check()


def test_products_on_the_way_count_against_the_limit():
    ring = Factored("abc,bcd,cde,def,efa,fab->", (floats(8, 8, 8),) * 6, ())
    assert ring.room() >= 8**4
    written = Artifact({"w": Tensor(ring)}).to_bytes()
    needed = Header.read(Memory(written), None).needed
    assert needed > 4 * ring.room()
    assert load(written, limit=needed)["w"].shape == ()
    with pytest.raises(FormatError, match="over the limit"):
        load(written, limit=needed - 1)


def test_notes_that_are_deep_or_no_rules_leave_the_ledger_as_it_is():
    for rules in (json.loads("[" * 500 + "]" * 500), {"a": 1}, None, 5):
        artifact = load(Artifact({"w": Tensor(floats(3, 4))}, meta={"rules": {"w": rules}}).to_bytes())
        assert artifact.ledger()[0].note == "" and str(artifact)


def test_a_pool_of_nothing_has_its_row_in_the_ledger():
    pool = [raw(0), Part("stream", CONSTANT), Part("check", True)]
    assert outcome(file(pooled((0, 3)), dtype=U8, pool=pool), "0") == "decoded"


def test_a_file_has_bounded_names_and_tensors():
    tensor = Tensor(np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="names of a file's tensors have at most"):
        Artifact({f"{k:05}".rjust(1020, "a"): tensor for k in range(16_500)}).to_bytes()
    with pytest.raises(ValueError, match="holds at most 65,536 tensors"):
        Artifact({str(k): tensor for k in range(70_000)}).to_bytes()
    assert len(load(Artifact({str(k): tensor for k in range(60_000)}).to_bytes()).tensors) == 60_000

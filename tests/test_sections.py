"""Named sections beside the tensors, scales by group, and products that are bounded."""

import json

import numpy as np
import pytest
from conftest import floats, small_files

from tersenet import FormatError, load
from tersenet.artifact import Artifact, Section, Tensor
from tersenet.methods.uniform import Uniform
from tersenet.packed import Factored, contractions
from tersenet.structure import taken


def with_section(data, required=False):
    return Artifact({"w": Tensor(floats(3, 4))}, meta={"a": 1}, sections={"graph": Section(data, required)})


def test_sections_come_back_are_in_the_ledger_and_cost_nothing_where_there_are_none():
    graph = json.dumps({"nodes": [{"op": "Conv", "inputs": ["x", "w"]}] * 5000}).encode()
    assert len(graph) > 1 << 16
    artifact = load(with_section(graph).to_bytes())
    assert artifact.sections == {"graph": Section(graph)} and artifact.meta == {"a": 1}
    assert np.array_equal(artifact.unpack()["w"], floats(3, 4))
    row = next(row for row in artifact.ledger() if row.name == "(graph)")
    assert 0 < row.payload < len(graph) / 20 and sum(row.total for row in artifact.ledger()) == artifact.nbytes
    assert Artifact({"w": Tensor(floats(3, 4))}, meta={"a": 1}).nbytes < with_section(b"").nbytes
    assert load(with_section(b"").to_bytes()).sections["graph"].data == b""


def test_a_required_section_that_is_not_known_is_refused_and_another_is_not():
    with pytest.raises(FormatError, match="needs its section 'graph' to be understood: update tersenet"):
        load(with_section(b"graph", required=True).to_bytes())
    load(with_section(b"graph").to_bytes())


def test_what_the_page_allows_is_written_and_read_and_no_more():
    def file(count=1, name=1, notes=10):
        sections = {f"{k:0{name}}": Section(b"x") for k in range(count)}
        return Artifact({"w": Tensor(floats(3))}, meta={"n": "x" * (notes - 8)}, sections=sections).to_bytes()

    for most in ({"count": 64}, {"name": 1024}, {"notes": 1 << 16}):
        opened = load(file(**most))
        assert len(opened.sections) == most.get("count", 1) and len(min(opened.sections)) == most.get("name", 1)
        assert len(opened.meta["n"]) == most.get("notes", 10) - 8
        with pytest.raises(ValueError, match="at most"):
            file(**{part: many + 1 for part, many in most.items()})


def test_damaged_and_cut_sections_are_refused():
    file = small_files()["sections"]
    assert set(load(file).sections) == {"graph", "\u00e9", ""}
    for at in range(len(file)):
        with pytest.raises(FormatError):
            load(file[:at])
        for bit in range(8):
            with pytest.raises(FormatError):
                load(file[:at] + bytes([file[at] ^ 1 << bit]) + file[at + 1 :])


def test_a_section_that_expands_too_far_meets_the_limit():
    with pytest.raises(FormatError, match="over the limit of"):
        load(with_section(bytes(1 << 20)).to_bytes(), limit=1 << 16)


@pytest.mark.parametrize("group", [2, 16, 64])
def test_scales_by_group_are_exact_in_the_file_and_finer_groups_err_less(group):
    w = floats(8, 64, seed=3) * np.repeat(2.0 ** np.arange(-2, 2, dtype=np.float32), 16)
    tree = Uniform(4, group=group).pack(w)
    assert tree.scale.shape == (8, 64 // group)
    by_hand = np.concatenate(
        [Uniform(4, by_row=True).pack(w[:, at : at + group]).unpack() for at in range(0, 64, group)], 1
    )
    assert np.array_equal(tree.unpack(), by_hand)
    assert np.array_equal(load(Artifact({"w": Tensor(tree)}).to_bytes()).unpack()["w"], by_hand)
    kept = np.array([0, 3, 17, 40])
    assert np.array_equal(taken(tree, 1, kept).unpack(), by_hand[:, kept])
    assert np.square(by_hand - w).sum() <= np.square(Uniform(4, by_row=True).pack(w).unpack() - w).sum()


def test_kernels_have_groups_along_their_rows():
    w = floats(6, 4, 3, 3)
    tree = Uniform(5, group=12).pack(w)
    assert tree.shape == w.shape and np.abs(tree.unpack() - w).max() <= np.abs(w).max() / 30
    assert np.array_equal(Uniform(5, by_row=True, group=7).pack(w).unpack(), Uniform(5, by_row=True).pack(w).unpack())


EQUATIONS = {
    "or,ri->oi": ((6, 2), (2, 5)),
    "or,ir,hr,wr->oihw": ((16, 9), (8, 9), (3, 9), (3, 9)),
    "oa,abhw,bi->oihw": ((12, 5), (5, 4, 3, 3), (4, 10)),
    "ar,rbs,sc->abc": ((4, 3), (3, 5, 2), (2, 6)),
    "ii->i": ((4, 4),),
    "ab,cd->": ((3, 4), (5, 6)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_factors_are_multiplied_two_at_a_time(equation):
    factors = tuple(floats(*shape, seed=k) for k, shape in enumerate(EQUATIONS[equation]))
    whole = np.einsum(equation, *(f.astype(np.float64) for f in factors))
    node = Factored(equation, factors, whole.shape)
    node.check()
    assert np.allclose(node.unpack(), whole, atol=1e-4)
    torch = pytest.importorskip("torch")
    assert np.allclose(
        Factored(equation, tuple(map(torch.from_numpy, factors)), whole.shape).unpack(), whole, atol=1e-4
    )


def test_an_equation_that_would_run_for_ever_is_refused_at_once():
    equation, shapes = "abc,bcd,cde,def,efa,fab->", [(300, 300, 300)] * 6
    assert min(step.work for step in contractions(equation[:-2].split(","), shapes, "")) > 1 << 32
    with pytest.raises(ValueError, match="products are not too many"):
        Factored(equation, tuple(np.broadcast_to(np.float32(1), s) for s in shapes), ()).check()

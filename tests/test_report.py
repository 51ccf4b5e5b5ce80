"""Pages of files and runs: what they say, that nothing in them is a stranger's code, that they work in a browser."""

import base64
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fresh_process, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import home, terse  # noqa: F401

import tersenet as tn
from tersenet.artifact import Artifact, Section, Tensor
from tersenet.journal import NAME, RESULT, read
from tersenet.packed import Codebook, Sparse, Uniform
from tersenet.report.facts import Facts, peers_of
from tersenet.report.page import HERE, compare, report
from tersenet.report.told import Told
from tersenet.report.weights import histogram, image, mask

HOSTILE = [
    "<script>alert(1)</script>.weight",
    '"><img src=x onerror=alert(1)>',
    "{{ 191 * 211 }}",
    "$\\frac{1}{2}$",
    "two\nlines\x1b[2J",
    "\ud800",
    "重み & <b>",
]


class Reader(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text without style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.inside = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def text_of(page):
    return " ".join(" ".join(Reader(page).text).split())


def page_of(tensors, told=None):
    return report(Facts.made("a file", tn.load(Artifact(tensors).to_bytes()), told or Told()))


def small_task(count=300):
    torch.manual_seed(0)
    x = torch.randn(count + 200, 20)
    y = (x[:, :10].sum(1) > x[:, 10:].sum(1)).long()
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    schedule = tn.Schedule(epochs=3, lr=0.1, batch=32)
    return tn.Task(net, (x[:count], y[:count]), (x[count:], y[count:]), schedule=schedule).trained()


def deep(layers=300):
    """Tensors of a network of many layers, half of them sparse with shared values."""
    rng, tensors = np.random.default_rng(0), {}
    for k in range(layers):
        kept = rng.random((48, 96)) < 0.2
        words = np.sort(rng.normal(size=(16, 1)), 0).astype(np.float32)
        shared = Sparse(kept, Codebook(rng.integers(0, 16, int(kept.sum())).astype(np.uint8), words))
        levels = Uniform(rng.integers(-7, 8, kept.shape).astype(np.int8), rng.random((48, 1)).astype(np.float32))
        name = f"backbone.stages.{k // 30}.blocks.{k % 30}.projection"
        tensors[f"{name}.weight"] = Tensor(shared if k % 2 else levels, error=0.01 + float(rng.random()))
        tensors[f"{name}.bias"] = Tensor(rng.normal(size=48).astype(np.float32))
    return tensors


# ---------------------------------------------------------------- what a page says


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    """A Deep Compression run of LeNet-5 in a folder of its own, and its result."""
    from conftest import DATA

    if not (DATA / "datasets.py").exists():
        pytest.skip("the real data is not beside the project")
    sys.path.insert(0, str(DATA))
    import datasets
    import models

    parts = {}
    for part, limit in (("train", 600), ("test", 300)):
        images, labels = datasets.load("mnist", part, limit)
        parts[part] = (models.inputs("lenet5", images), torch.from_numpy(labels).long())
    recipe = tn.papers.deep_compression(density=0.2, bits=4, rounds=2, epochs=1)
    return tn.compress(tn.Task(models.load("lenet5"), **parts), recipe, folder=tmp_path_factory.mktemp("runs"))


def test_a_page_of_lenet_5_says_what_the_file_and_its_run_say(lenet, tmp_path):
    lenet.report(tmp_path / "lenet.html")
    page = (tmp_path / "lenet.html").read_text("utf-8")
    said = text_of(page)
    before = 4 * 431_080
    assert f"{lenet.artifact.nbytes:,} bytes of {before:,} before" in said
    assert f"{before / lenet.artifact.nbytes:.1f}" in said and f"{lenet.before:.4f} → {lenet.after:.4f}" in said
    for row in lenet.artifact.ledger():
        assert row.name in said and f"{row.total:,}" in said
    assert said.count("16 codewords, which the ticks show") == 4
    assert "pruning, round 1 of 2, pruning, round 2 of 2, tuning" in said and "number=2" in said
    masks = [picture["alt"] for picture in Reader(page).all("img")]
    assert len(masks) == 4 and all("% kept" in alt for alt in masks)
    for missing in ("What was tried: one file was made", "What each layer could have been: this recipe does not"):
        assert missing in said
    assert len(page.encode()) < 500_000
    lenet.report(tmp_path / "beside.html", peers=[("theirs", 51_200, 0.971)])
    beside = text_of((tmp_path / "beside.html").read_text("utf-8"))
    assert "no points of others were given" in said and "theirs" in beside and "theirs" not in said
    with pytest.raises(ValueError, match="theirs: a peer has a size above 0"):
        lenet.report(tmp_path / "wrong.html", peers=[("theirs", 0, 0.971)])
    assert not (tmp_path / "wrong.html").exists()


def test_a_file_finds_its_run_and_a_run_its_file_and_their_pages_are_the_same_every_time(lenet, tmp_path, monkeypatch):
    run = lenet.journal.parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(run.parent, tmp_path / "tersenet")
    lenet.artifact.save(tmp_path / "lenet.terse")
    of_file, of_run = Facts.of(tmp_path / "lenet.terse"), Facts.of(run)
    assert of_file.told == of_run.told and of_file.lines == of_run.lines
    assert (of_file.told.before, of_file.metric) == (lenet.before, round(lenet.after, 6))
    script = (
        "import sys; from pathlib import Path; from tersenet.report.page import report\n"
        "from tersenet.report.facts import Facts\n"
        "sys.stdout.buffer.write(report(Facts.of(Path(sys.argv[1]))).encode())"
    )
    pages = {fresh_process(script, tmp_path / "lenet.terse", PYTHONHASHSEED=seed) for seed in ("0", "1")}
    assert pages == {report(of_file)}
    (tmp_path / "lenet.terse").write_bytes(Artifact({"w": Tensor(np.ones(9, np.float32))}).to_bytes())
    assert Facts.of(tmp_path / "lenet.terse").told == Told()  # another file of the same name


def test_a_network_of_300_layers_has_a_small_page_that_says_what_it_leaves_out():
    page = page_of(deep())
    said = text_of(page)
    assert len(page.encode()) < 2_000_000 and "601 rows" in said
    assert "The 12 largest of 300 weights are drawn." in said and "The 12 largest of 150 weights are drawn." in said
    assert len(Reader(page).all("svg")) == 2 + 12 and len(Reader(page).all("img")) == 12
    assert said.count("the run that made this file is not known") == 4


def test_a_drop_shows_what_was_tried_and_what_was_taken(tmp_path):
    result = tn.compress(small_task(), budget=tn.Budget(drop=3), folder=tmp_path)
    told = Told.of_folder(result.journal.parent)
    assert len(told.candidates) > 5 and sum(one.chosen for one in told.candidates) == 1
    taken = next(one for one in told.candidates if one.chosen)
    assert taken.bytes == min(one.bytes for one in told.candidates if one.bytes >= taken.bytes)
    assert f"{taken.label} was taken" in text_of(report(Facts.of(result.journal.parent)))


def test_settings_tried_for_a_drop_stand_in_the_journal_of_the_one_that_was_taken(tmp_path):
    result = tn.compress(small_task(), tn.papers.exact_obs(0.5, samples=64), tn.Budget(drop=5), folder=tmp_path)
    rows = read(result.journal)
    tried = {row["candidate"]: row for row in rows if "candidate" in row}
    chosen = [row["chosen"] for row in rows if "chosen" in row]
    assert len(tried) > 1 and len(chosen) == 1
    stages = [row for row in rows if "stage" in row]
    assert tried[chosen[0]]["metric"] == stages[-1]["metric"] and tried[chosen[0]]["bytes"] == stages[-1]["bytes"]


def test_a_mixture_shows_what_each_layer_could_have_been(tmp_path):
    result = tn.compress(small_task(), tn.papers.mixed(), tn.Budget(ratio=6), folder=tmp_path)
    told = Told.of_folder(result.journal.parent)
    assert set(told.offers) == {"0.weight", "2.weight"} and all(len(offers) > 5 for offers in told.offers.values())
    assert all(
        list(o) == sorted(o) and [c for _, c in o] == sorted((c for _, c in o), reverse=True)
        for o in told.offers.values()
    )
    assert "The best of what was offered to each of 2 layers" in text_of(report(Facts.of(result.journal.parent)))


def test_errors_at_the_outputs_have_a_column_where_they_are_known():
    tensors = {"a.weight": Tensor(np.ones((20, 20), np.float32)), "b.weight": Tensor(np.eye(20, dtype=np.float32))}
    facts = Facts.made("a file", Artifact(tensors), Told(), {"b.weight": 0.0625})
    said = text_of(report(facts))
    assert "Error of outputs" in said and "0.0625" in said
    assert "Error of outputs" not in text_of(page_of(tensors))


def test_errors_beyond_all_numbers_are_in_the_ledger_and_not_drawn():
    tensors = {"a": Tensor(np.ones((9, 9), np.float32), error=1e6), "b": Tensor(np.eye(9, dtype=np.float32), error=0.5)}
    page = report(Facts.made("a file", tn.load(Artifact(tensors).to_bytes()), Told()))
    assert "inf" in text_of(page) and "error of 1 weights" in page
    assert "no weight of the file tells an error" in text_of(page_of({"a": tensors["a"]}))


@pytest.mark.parametrize("claim", [float("nan"), float("inf"), 10**400, True, "0.5"])
def test_a_file_that_claims_no_number_as_its_metric_tells_none(claim):
    artifact = tn.load(Artifact({"w": Tensor(np.ones((9, 9), np.float32))}, meta={"metric": claim}).to_bytes())
    facts = Facts.made("a file", artifact, Told())
    assert facts.metric is None and "Metric on the test data" not in text_of(report(facts))


def test_sections_are_no_whole_numbers():
    tensors = {"w": Tensor(np.arange(900, dtype=np.int32))}
    plain, graph = Artifact(tensors), Artifact(tensors, sections={"graph": Section(bytes(range(200)))})
    one, other = (Facts.made("a", artifact, Told()) for artifact in (plain, graph))
    assert one.parts["whole numbers"] == other.parts["whole numbers"] and "sections" not in one.parts
    assert sum(other.parts.values()) == graph.nbytes and "200 of sections" in text_of(report(other))


def test_names_that_read_alike_are_compared_apart():
    tensors = {"a\nb": Tensor(np.ones((9, 9), np.float32)), "a\\nb": Tensor(np.eye(7, dtype=np.float32))}
    facts = Facts.made("a", Artifact(tensors), Told())
    assert text_of(compare({"a": facts, "b": facts})).count("a\\nb") == 2


def test_several_files_stand_side_by_side():
    rng = np.random.default_rng(0)
    one = Artifact({"w": Tensor(rng.normal(size=(9, 9)).astype(np.float32))}, meta={"metric": 0.75})
    other = Artifact({"w": Tensor(np.ones((9, 9), np.float32)), "only": Tensor(np.ones(3))}, meta={"metric": 0.5})
    files = {name: Facts.made(name, artifact, Told()) for name, artifact in {"a": one, "<b>": other}.items()}
    page = compare(files)
    said = text_of(page)
    assert all(f"{artifact.nbytes:,}" in said for artifact in (one, other)) and "0.7500" in said and "0.5000" in said
    assert "only" in said and "b" not in [tag for tag, _ in Reader(page).tags] and page == compare(files)
    alone = compare({"a": Facts.made("a", Artifact({"w": one.tensors["w"]}), Told())})
    assert "fewer than two of the files tell a metric" in text_of(alone)


# ---------------------------------------------------------------- pictures of weights


def test_what_others_made_stands_beside_a_file_that_tells_its_metric(tmp_path):
    peers = [{"name": "theirs", "bytes": 51200, "metric": 0.971}, {"name": "<b>$x$\x1b", "bytes": 9e6, "metric": 1}]
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    artifact = Artifact({"w": Tensor(np.ones((30, 40), np.float32))}, meta={"metric": 0.9875})
    facts = replace(Facts.made("ours", artifact, Told()), peers=peers_of(tmp_path / "peers.json"))
    page = report(facts)
    said = " ".join(svg["aria-label"] for svg in Reader(page).all("svg"))
    assert f"ours: {artifact.nbytes:,} bytes, 0.9875" in said and "theirs: 51,200 bytes, 0.9710" in said
    assert "<b>$x$\\x1b: 9,000,000 bytes, 1.0000" in said and "as they were given" in text_of(page)
    assert "the file tells no metric" in text_of(report(replace(facts, artifact=Artifact(artifact.tensors))))
    assert "no points of others were given" in text_of(report(replace(facts, peers=())))
    for wrong in (
        "{",
        "3",
        "[3]",
        '[{"name": "a"}]',
        '[{"name": "a", "bytes": 0, "metric": 1}]',
        '{"name": 3}',
        "{}",
        "[" * 100_000,
        f'[{{"name": 3, "bytes": 1{"0" * 400}, "metric": 1}}]',
    ):
        (tmp_path / "peers.json").write_text(wrong)
        with pytest.raises(ValueError, match="is no JSON list of peers"):
            peers_of(tmp_path / "peers.json")


def test_shares_of_values_and_zeros_add_up_for_every_kind_of_tree():
    for name, tree in trees().items():
        found = histogram(Tensor(tree))
        assert found.shares.sum() + found.zeros == pytest.approx(1), name
        assert len(found.places) == len(found.shares) and found.says


def test_codewords_and_levels_are_drawn_where_values_lie():
    codewords = np.array([[0.5], [-1.0], [2.0]], np.float32)
    found = histogram(Tensor(Codebook(np.array([[0, 1], [0, 2]], np.uint8), codewords)))
    assert found.places.tolist() == [-1, 0.5, 2] and found.shares.tolist() == [0.25, 0.5, 0.25]
    assert found.marks.tolist() == [-1, 0.5, 2] and found.says == "3 codewords, which the ticks show"
    levels = Uniform(np.array([[-2, 0, 1]], np.int8), np.array(0.25, np.float32))
    found = histogram(Tensor(levels))
    assert found.marks.tolist() == [-0.5, -0.25, 0, 0.25, 0.5] and found.zeros == pytest.approx(1 / 3)


def test_the_mask_of_a_matrix_over_images_is_folded_back_to_their_size():
    kept = np.zeros((30, 28, 28), bool)
    kept[:, 4:24, 4:24] = np.random.default_rng(0).random((30, 20, 20)) < 0.5
    tree = Sparse(kept.reshape(30, 784), np.ones(int(kept.sum()), np.float32))
    found = image(tree)
    assert found.cells.shape == (28, 28) and np.allclose(found.cells, kept.mean(0))
    assert "0.0 % in the three pixels at its border" in text_of(page_of({"fc1.weight": Tensor(tree)}))
    assert image(np.ones((30, 784), np.float32)) is None  # nothing is pruned
    assert image(Sparse(kept.reshape(30, 784)[:, :783], np.ones(1, np.float32))) is None  # no square


def test_cells_of_a_large_mask_are_means_of_its_blocks():
    kept = np.random.default_rng(0).random((700, 90, 3, 3)) < 0.1
    tree = Sparse(kept, np.ones(int(kept.sum()), np.float32))
    found = mask(tree)
    assert found.cells.shape == (256, 256) and found.kept == pytest.approx(kept.mean())
    edges = [0, *(np.arange(1, 256) * 810 // 256), 810]
    assert found.cells[0, 5] == pytest.approx(kept.reshape(700, 810)[:2, edges[5] : edges[6]].mean())
    assert mask(Sparse(np.ones((3, 3), bool), np.ones(9, np.float32))) is None


# ---------------------------------------------------------------- what is in a page, and what is not


def test_markup_in_names_is_text():
    rng, tensors = np.random.default_rng(0), {}
    for name in HOSTILE[:5] + HOSTILE[6:]:
        kept = rng.random((12, 12)) < 0.5
        tensors[name] = Tensor(Sparse(kept, rng.normal(size=int(kept.sum())).astype(np.float32)), error=0.1)
    rows = [
        {"run": HOSTILE, "key": "k"},
        {"likelihood": HOSTILE[0]},
        {"unkept": HOSTILE[1]},
        {"stage": HOSTILE[0], "density": 0.5, "metric": 0.5},
        {"stage": HOSTILE[1], "density": 0.4, "metric": 0.4},
        {"epoch": 0, "training": HOSTILE[0], "loss": 1.0, "rate": 0.1},
        *({"candidate": name, "bytes": 10 + k, "metric": 0.5} for k, name in enumerate(HOSTILE)),
        {"chosen": HOSTILE[0]},
        {"layer": HOSTILE[1], "offers": [[10, 1.0], [20, 0.5]]},
    ]
    artifact = tn.load(Artifact(tensors, meta={"metric": 0.5, "rules": dict.fromkeys(tensors, HOSTILE[1])}).to_bytes())
    facts = Facts.made(HOSTILE[0], artifact, Told.of(rows))
    for page in (report(facts), compare({HOSTILE[0]: facts, HOSTILE[1]: facts})):
        reader = Reader(page)
        assert len(reader.all("script")) == 1 and not reader.all("b")
        assert all(picture["src"].startswith("data:image/png;base64,") for picture in reader.all("img"))
        assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
        said = text_of(page)
        assert "<script>alert(1)</script>.weight" in said and "{{ 191 * 211 }}" in said and "40301" not in said
        assert "\x1b" not in page and "$\\frac{1}{2}$" in said
        page.encode("utf-8")


def test_a_page_asks_for_nothing_and_its_ids_are_its_own():
    page = page_of(deep(20))
    reader = Reader(page)
    for _, attributes in reader.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), value
    without = re.sub(r"<svg.*?</svg>|base64,[\w+/=\s]+", "", page, flags=re.DOTALL)
    assert "http:" not in without and "https:" not in without and "@import" not in page
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page)
    wanted += [
        i for _, a in reader.tags for n in ("aria-labelledby", "aria-describedby", "for") for i in [a.get(n)] if i
    ]
    assert wanted and set(wanted) <= set(ids)
    pictures = [a for tag, a in reader.tags if tag == "svg"]
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in pictures)
    assert all(len(a["alt"]) > 20 for a in reader.all("img"))
    assert all(a.get("scope") in ("col", "row") for a in reader.all("th"))
    assert len(reader.all("table")) == len(reader.all("caption"))


def test_text_can_be_read_on_its_ground_in_light_and_dark_and_figures_be_seen():
    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    style = (HERE / "page.css").read_text("utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(themes) == 3
    for theme in themes:
        for ground in ("page", "panel"):
            assert all(contrast(theme[ink], theme[ground]) >= 4.5 for ink in ("ink", "soft", "one"))
            assert all(contrast(theme[mark], theme[ground]) >= 3 for mark in ("one", "two", "grey"))


# ---------------------------------------------------------------- journals that are torn or odd


def test_a_torn_journal_is_told_and_one_that_cannot_be_read_is_an_error(tmp_path):
    rows = [{"run": ["Prune()"]}, {"stage": "Prune()", "density": 0.5, "metric": 0.75, "bytes": 10, "seconds": 1.0}]
    path = tmp_path / NAME
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "Na')
    said = text_of(report(Facts.of(tmp_path)))
    assert "1 of 3 lines of the journal cannot be read" in said and "The run has not ended" in said
    assert "0.7500" in said and said.count("the run has made no file.") == 4
    path.write_bytes(b"\x00\xff nothing")
    with pytest.raises(ValueError, match=r"run\.jsonl: no line of it can be read"):
        Facts.of(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"is no run: there is no run\.jsonl in it"):
        Facts.of(tmp_path)


@pytest.mark.parametrize("journal", [None, b"", b"\x00 nothing", b"[" * 100_000])
def test_a_file_is_shown_whatever_became_of_its_runs_journal(tmp_path, monkeypatch, journal):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = tmp_path / "tersenet" / "key"
    run.mkdir(parents=True)
    artifact = Artifact({"w": Tensor(np.ones((9, 9), np.float32))})
    for path in (tmp_path / "f.terse", run / RESULT):
        artifact.save(path)
    if journal is not None:
        (run / NAME).write_bytes(journal)
    said = text_of(report(Facts.of(tmp_path / "f.terse")))
    assert "journal of the run that made this file is gone or damaged" in said and f"{artifact.nbytes:,} bytes" in said


def test_rows_may_hold_integers_beyond_all_floats():
    told = Told.of([{"run": ["a"]}, {"stage": "a", "bytes": 10**400, "metric": 0.5}])
    assert told.steps[0].bytes is None and told.steps[0].metric == 0.5


def test_a_run_that_was_stopped_and_tried_again_is_told_once():
    epochs = [{"epoch": k, "training": "tuning", "loss": 1.0 / (k + 1), "rate": 0.1} for k in range(4)]
    first = [{"run": ["a", "b"]}, {"stage": "a", "bytes": 5}, *epochs[:2]]
    again = [{"run": ["a", "b"]}, {"stage": "a", "bytes": 5, "kept": True}, *epochs, {"stage": "b"}, {"end": True}]
    told = Told.of(first + again)
    assert [step.stage for step in told.steps] == ["a", "b"] and not told.words
    assert [one.losses for one in told.trainings] == [(1.0, 0.5, 1 / 3, 0.25)]
    twice = [row | {"loss": row["loss"] + 1} for row in epochs]
    assert [len(one.losses) for one in Told.of([*first[:1], *epochs, *twice]).trainings] == [4, 4]


names = st.sampled_from([
    "run", "stage", "epoch", "training", "loss", "rate", "candidate", "chosen", "bytes", "metric", "error", "layer",
    "offers", "search", "score", "result", "before", "seconds", "end", "unkept", "likelihood", "density",
])  # fmt: skip
odd = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
)


rows = st.lists(st.dictionaries(names, odd, max_size=6), max_size=8)


@given(rows)
def test_whatever_rows_say_they_tell_finite_numbers(rows):
    told = Told.of(rows)
    numbers = [value for step in told.steps for value in vars(step).values() if isinstance(value, float)]
    numbers += [loss for one in told.trainings for loss in one.losses] + [one.bytes for one in told.candidates]
    assert np.isfinite([*numbers, *told.scores, told.before or 0, told.after or 0, told.seconds or 0]).all()


@settings(max_examples=15, deadline=None)
@given(rows)
def test_whatever_rows_say_there_is_a_page(rows):
    artifact = Artifact({"b": Tensor(np.ones(9, np.float32))})
    assert "tersenet report" in report(Facts.made("odd", artifact, Told.of(rows)))


# ---------------------------------------------------------------- the command, and notebooks


def test_the_command_writes_pages_and_says_in_one_line_what_is_wrong(home):  # noqa: F811
    terse("compress", "--task", home / "task.py", "--size", "2kB", "-o", home / "a.terse")
    terse("compress", home / "net.npz", "--ratio", "8", "-o", home / "b.terse")
    out = terse("report", home / "a.terse", "--task", home / "task.py", "-o", home / "a.html")
    page = (home / "a.html").read_text("utf-8")
    assert "wrote" in out and "Error of outputs" in page and "What was tried" in page
    run = next((home / "cache" / "tersenet").glob(f"*/{RESULT}")).parent
    (home / "peers.json").write_text('[{"name": "theirs", "bytes": 1500, "metric": 0.9}]')
    terse("report", home / "a.terse", "--peers", home / "peers.json", "-o", home / "beside.html")
    assert "theirs: 1,500 bytes, 0.9000" in (home / "beside.html").read_text("utf-8")
    terse("report", run, "-o", home / "run.html")
    terse("compare", home / "a.terse", home / "b.terse", "-o", home / "both.html")
    assert "a.terse, b.terse" in (home / "both.html").read_text("utf-8")
    (home / "bad.terse").write_bytes((home / "a.terse").read_bytes()[:-3])
    for command, *others, source in (
        ("report", "bad.terse"), ("compare", "a.terse", "bad.terse"), ("report", "none"), ("report", "."),
    ):  # fmt: skip
        error = terse(command, *(home / name for name in (*others, source)), "-o", home / "x.html", code=2)
        assert error.startswith("terse: ") and error.count("\n") == 1 and source.strip(".") in error
    assert not (home / "x.html").exists()
    assert "is what is read" in terse("report", home / "a.terse", "-o", home / "a.terse", code=2)


def test_who_lacks_the_extra_is_told_what_to_install(home):  # noqa: F811
    np.savez(home / "w.npz", w=np.ones((30, 30), np.float32))
    terse("compress", home / "w.npz", "--ratio", "2", "-o", home / "w.terse")
    script = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\n"
        "from tersenet.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code)"
    )
    for package in ("matplotlib", "jinja2"):
        environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        command = [sys.executable, "-c", script, package, "report", home / "w.terse", "-o", home / "w.html"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.stderr == "terse: a page needs jinja2 and matplotlib: pip install 'tersenet[report]'\n"
        assert done.stdout == "2\n"


def test_files_and_results_show_themselves_in_notebooks(tmp_path):
    tensors = {HOSTILE[0]: Tensor(np.ones((9, 9), np.float32), error=0.25)}
    artifact = Artifact(tensors, meta={"rules": {HOSTILE[0]: HOSTILE[1]}})
    reader = Reader(artifact._repr_html_())
    assert not reader.all("script") and not reader.all("img") and len(reader.all("tr")) == 1 + 2
    said = " ".join(reader.text)
    assert HOSTILE[0] in said and repr(HOSTILE[1]) in said and f"{artifact.nbytes:,} bytes for 81 weights" in said
    result = tn.compress(small_task(), tn.papers.exact_obs(0.5, samples=64), folder=tmp_path)
    said = " ".join(Reader(result._repr_html_()).text)
    assert f"test metric {result.before:.4f} -> {result.after:.4f}" in said and "0.weight" in said
    assert f"test metric {result.before:.4f} -> {result.after:.4f} (from the reopened file)\n" in str(result)


# ---------------------------------------------------------------- in a browser

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium to open pages in")
USE = """
const table = document.querySelector("table[data-sorts=find]"), heads = [...table.tHead.rows[0].cells];
const head = name => heads.find(cell => cell.textContent.trim() === name);
const column = name => [...table.tBodies[0].rows].filter(row => !row.hidden)
  .map(row => row.cells[heads.indexOf(head(name))]).map(cell => cell.dataset.value ?? cell.textContent);
const click = name => { head(name).querySelector("button").click(); return [head(name).ariaSort, column(name)]; };
const found = { bytes: [click("Bytes"), click("Bytes")], names: click("Tensor"), bits: click("Bits per weight") };
const find = document.getElementById("find");
find.value = "FC1"; find.dispatchEvent(new Event("input"));
found.filtered = column("Tensor"); found.status = document.getElementById("find-rows").textContent;
find.value = ""; find.dispatchEvent(new Event("input"));
found.all = column("Tensor").length;
found.wide = document.documentElement.scrollWidth - window.innerWidth;
const asked = performance.getEntriesByType("resource").map(entry => entry.name);
found.asked = asked.filter(name => !name.startsWith("data:"));
"""


def opened(path, width=1280, *options):
    """The page as Chromium has it once its scripts have run, and what was said on the console."""
    profile = path.with_suffix(".profile")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},900", *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def used(page, path, width, script, options=()):
    """What a script finds that is run in a copy of the page, whose policy would not let it run."""
    assert page.count("</body>") == 1
    end = "document.body.innerHTML = `<pre>${btoa(unescape(encodeURIComponent(JSON.stringify(found))))}</pre>`;"
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)
    path.write_text(page.replace("</body>", f"<script type=module>{script}{end}</script></body>"), "utf-8")
    dump, said = opened(path, width, *options)
    assert not said, said
    return json.loads(base64.b64decode(re.search(r"<pre>([\w+/=]+)</pre>", dump)[1]))


@browser
@pytest.mark.parametrize("width", [1280, 500])
def test_tables_sort_and_filter_and_nothing_is_asked_for(lenet, tmp_path, width):
    page = report(Facts.of(lenet.journal.parent))
    (tmp_path / "page.html").write_text(page, "utf-8")
    _, said = opened(tmp_path / "page.html", width)
    assert not said, said
    found = used(page, tmp_path / "used.html", width, USE)
    (down, most), (up, least) = found["bytes"]
    sizes = sorted(row.total for row in lenet.artifact.ledger())
    assert (down, up) == ("descending", "ascending")
    assert [int(size) for size in least] == sizes and [int(size) for size in most] == sizes[::-1]
    names = sorted(row.name for row in lenet.artifact.ledger())
    assert found["names"][0] == "ascending" and sorted(found["names"][1]) == names
    assert found["bits"][1][-1] == ""  # the file's own bytes have no weights
    assert found["filtered"] and all("fc1" in name for name in found["filtered"])
    assert found["status"] == "2 of 9 rows" and found["all"] == 9
    assert found["wide"] <= 0 and found["asked"] == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core."""
    if not CHROMIUM or not shutil.which("npm"):
        pytest.skip("axe-core needs Chromium and npm")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4.14.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip("npm does not give axe-core")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_wrong(lenet, axe, tmp_path, dark):
    facts = Facts.of(lenet.journal.parent)
    script = (
        "const shown = await axe.run(); const found = shown.violations.map(one => [one.id, one.nodes[0].html]);"
        "found.push(matchMedia('(prefers-color-scheme: dark)').matches);"
    )
    for name, page in (("report", report(facts)), ("compare", compare({"a": facts, "b": facts}))):
        page = page.replace("</body>", f"<script>{axe}</script></body>")
        options = ["--force-dark-mode", "--virtual-time-budget=20000"] if dark else ["--virtual-time-budget=20000"]
        *wrong, is_dark = used(page, tmp_path / f"{name}.html", 1280, script, options)
        assert wrong == [] and is_dark == dark


@pytest.mark.parametrize("name, words, neighbours", [("Codebook", 9, 3), ("Codebook-group", 15, 2)])
def test_codewords_are_counted_over_all_groups(name, words, neighbours):
    said = histogram(Tensor(trees()[name])).says
    assert said == f"{words} codewords of {neighbours} neighbours each"

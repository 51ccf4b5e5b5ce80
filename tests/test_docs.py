"""The documentation: what it says to run runs, its links lead somewhere, its tables are those of the results."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import fresh_process

from tersenet.cli import app
from tersenet.recipe_file import find_recipe, parse_rule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = DOCS / "api.md"  # by bench/api.py
PAPERS = (
    "3lc amc bit-goes-down compact-filters context-coding cp deep-compression dkm enc exact-obs fixed-point hashed-nets"
    " inq lottery-ticket low-precision lr-rewinding lsq mixed mlprune mlq output-aware sequence-level slq soft-targets"
    " sparsegpt tensor-train transform-coding tucker-vbmf universal weightless"
)
OTHERS = (
    "404 api architecture choose contributing format index information notes papers reports results runtime security"
    " traffic"
)
BUILT = {f"{name}.html" for name in (*OTHERS.split(), *(f"papers/{paper}" for paper in PAPERS.split()))}
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md")) if path != MADE}
SOURCES |= {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w-]+\.\w+)\n")  # the first line of a block that is a file

# What the reader has: a network, its data, and files of others.
OWN = """
import os, sys
import torch
from safetensors.torch import save_file
sys.path.insert(0, os.getcwd())
torch.manual_seed(0)
"""
INDEX = """
net = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.ReLU(), torch.nn.Linear(300, 2))
torch.save(net.state_dict(), "model.pt")
"""
CHOOSE = """
open("my_network.py", "w").write('''
from torch import nn
class Classifier(nn.Sequential):
    def __init__(self):
        layers = [nn.Linear(n, m) for n, m in ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 10))]
        super().__init__(*[part for layer in layers[:-1] for part in (layer, nn.ReLU())], layers[-1])
''')
from my_network import Classifier
net, x = Classifier(), torch.randn(400, 64)
torch.save(net.state_dict(), "model.pt")
y = net(x).argmax(1)
torch.save({"x": x[:300], "y": y[:300], "x_test": x[300:], "y_test": y[300:]}, "data.pt")
save_file({"c.index": torch.randint(0, 7, (6, 8)), "c.codewords": torch.randn(7, 9)}, "theirs.safetensors")
for name, drift in (("old", 0), ("new", 0.001)):
    state = {key: value + drift for key, value in net.state_dict().items()}
    torch.save(state, name + ".pt")
    save_file(state, name + ".safetensors")
"""
TASK = """
import torch
import tersenet as tn
def made():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
    layers += [torch.nn.Linear(256, 24), torch.nn.ReLU(), torch.nn.Linear(24, 2)]
    x = torch.randn(320, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    train, test = (x[:256], y[:256]), (x[256:], y[256:])
    return tn.Task(torch.nn.Sequential(*layers), train, test, schedule=tn.Schedule(epochs=6, batch=64))
task = made().trained()
"""
WORKER = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def blocks(name):
    return BLOCK.findall(SOURCES[name])


def commands(text):
    """The lines of a block that a shell would run, without comments."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def script_of(name, folder, heading=""):
    """Python that does what a page says, in order, under headings that fit; its files are written into the folder."""
    parts, sections = [], re.split(r"^## ", SOURCES[name], flags=re.MULTILINE)
    for _, text in blocks(name):
        if named := FILE.match(text):
            (folder / named[1]).write_text(text)
    for language, text in (
        block for section in sections if re.match(heading, section) for block in BLOCK.findall(section)
    ):
        if FILE.match(text):
            continue
        if language == "python":
            parts.append(text)
        elif language == "sh":
            for program, *words in commands(text):
                if program == "terse":
                    parts.append(f"__import__('tersenet.cli').cli.main({words!r})")
                elif program == "python":
                    parts.append(f"__import__('runpy').run_path({words[0]!r})")
    return "\n".join(parts)


def lines_of_terse():
    for name in SOURCES:
        for language, text in blocks(name):
            if language in ("", "sh") and "terse " in text:
                for program, *words in (
                    c for line in text.splitlines() if line.startswith("terse ") for c in commands(line)
                ):
                    yield name, [program, *words]


def run_page(script, folder):
    return fresh_process(f"import os; os.chdir({str(folder)!r})\n{OWN}{script}", **WORKER)


def test_the_first_page_runs_in_order(tmp_path):
    assert "wrote model.terse" in run_page(INDEX + script_of("docs/index.md", tmp_path), tmp_path)


def test_a_classifier_is_made_to_fit_as_the_page_says(tmp_path):
    said = run_page(CHOOSE.replace("WIDTH", "450") + script_of("docs/choose.md", tmp_path, "A 10 MB"), tmp_path)
    assert (tmp_path / "model.pt").stat().st_size > 1_700_000
    assert (tmp_path / "model.terse").stat().st_size <= 1_000_000
    assert (tmp_path / "small.safetensors").stat().st_size > 1_700_000
    assert "test metric: " in said and "no worse than the file says" in said


def test_the_rest_of_the_page_on_choosing_runs_in_order(tmp_path):
    said = run_page(CHOOSE.replace("WIDTH", "100") + script_of("docs/choose.md", tmp_path, "(?!A 10 MB)"), tmp_path)
    assert said.count("wrote model.terse") == 4
    assert (tmp_path / "smallest.terse").stat().st_size <= 4 * 27_710 / 20


def test_the_python_of_traffic_runs(tmp_path):
    run_page("".join(text for language, text in blocks("docs/traffic.md") if language == "python"), tmp_path)
    assert (tmp_path / "residuals-0.pt").exists()


def test_every_block_of_python_on_the_pages_of_papers_runs(tmp_path):
    pages = {
        name: [t for language, t in blocks(name) if language == "python"] for name in SOURCES if "/papers/" in name
    }
    assert len(pages) == len(PAPERS.split()) and all(pages.values())
    script = "".join(
        f"exec(compile({text!r}, {name!r}, 'exec'), {{'task': task}})\n"
        for name, texts in pages.items()
        for text in texts
    )
    fresh_process(f"import os; os.chdir({str(tmp_path)!r})\n{TASK}{script}", **WORKER)


def test_the_python_of_running_packed_weights_runs(tmp_path):
    (script,) = (text for language, text in blocks("docs/runtime.md") if language == "python")
    before = "def Net():\n    return torch.nn.Linear(2000, 2000)\n"
    before += "import tersenet as tn\ntn.compress(dict(Net().state_dict()), budget=tn.Budget(ratio=8))"
    before += ".artifact.save('net.terse')\n"
    after = "x = torch.randn(1, 2000)\nassert torch.allclose(packed.eval()(x), dense.eval()(x), atol=1e-4)\n"
    fresh_process(f"import os; os.chdir({str(tmp_path)!r})\nimport torch\n{before}{script}{after}")


def test_no_other_page_has_python_that_is_not_run():
    run = {"docs/index.md", "docs/choose.md", "docs/traffic.md", "docs/runtime.md"}
    run |= {"README.md", "docs/information.md"}  # by test_readme.py and test_information.py
    assert not [n for n in SOURCES if n not in run and "/papers/" not in n and any(b[0] == "python" for b in blocks(n))]


def test_every_command_is_one_that_the_program_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in SOURCES:
        for _, text in blocks(name):
            if (named := FILE.match(text)) and named[1].endswith(".yaml"):
                Path(named[1]).write_text(text)
    group, seen = typer.main.get_command(app), 0
    for _, words in lines_of_terse():
        with group.make_context("terse", words[1:], resilient_parsing=True) as context:
            _, command, rest = group.resolve_command(context, words[1:])
            with command.make_context(words[1], rest) as inner:
                if recipe := inner.params.get("recipe"):
                    find_recipe(recipe)
                for rule in inner.params.get("rule") or ():
                    parse_rule(rule)
                seen += 1
    assert seen > 40


def anchors(text):
    """What may follow # in a link to a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(name):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", SOURCES[name]))
    return [
        (target, "") if "#" not in target else tuple(target.split("#"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_links_lead_somewhere(name):
    for target, anchor in links(name):
        assert not target.startswith("http"), target
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.is_file() or path == MADE, target
        if anchor:
            assert anchor in anchors(path.read_text()), f"{target}#{anchor}"


def test_the_readme_leads_to_a_small_file_without_a_gpu_in_three_clicks():
    assert ("docs/choose.md", "") in links("README.md")
    heading = "a-10-mb-classifier-must-fit-in-1-mb-and-there-is-no-gpu"
    assert ("", heading) in links("docs/choose.md") and heading in anchors(SOURCES["docs/choose.md"])
    section = SOURCES["docs/choose.md"].split("## A 10 MB classifier")[1].split("\n## ")[0]
    assert "terse compress --task task.py --size 1MB -o model.terse" in section


def test_tables_are_those_of_the_results():
    if not (ROOT / "bench/results").is_dir():
        pytest.skip("the results are not part of this copy of the sources")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import pages
    finally:
        sys.path.remove(str(ROOT / "bench"))
    assert len(pages.pages()) > 25
    for path in pages.pages():
        assert pages.filled(path.read_text()) == path.read_text(), f"{path.name}: make bench NAME=pages"


def test_the_site_is_built_of_these_pages_and_fetches_nothing(tmp_path):
    program = shutil.which("zensical", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("zensical is not installed: pip install '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("zensical.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, ROOT / "bench/api.py", tmp_path / "docs/api.md"], check=True)
    built = subprocess.run([program, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert set(pages) == BUILT
    for name, text in pages.items():
        fetched = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*\b(?:src|href)=\"([^\"]*)\"", text)
        assert fetched and not [a for a in fetched if re.match(r"(\w+:)?//", a)], name
        if name != "404.html":  # every page is on the way from the first
            assert re.search(f'href="(./)?{name}"', pages["index.html"]), f"{name}: add it to zensical.toml"
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path.name
    for name in ("InformationPlane", "akde", "beam_search", "sequence_level", "PackedLinear", "attached", "choose"):
        assert re.search(f"<h3[^>]*>{name}<", pages["api.html"]), name
    assert "_searched" not in pages["api.html"]
    assert "Append a line to" in pages["contributing.html"]
    assert (
        "deep_compression (deep-compression)" in pages["api.html"]
        and "The most bytes that a network" in pages["api.html"]
    )


def test_the_notebook_runs_without_jupyter_and_keeps_no_outputs(tmp_path):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed: pip install '.[demo]'")
    book = json.loads((ROOT / "examples/digits.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["nbformat"] == 4 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    script = "".join(f"exec({''.join(cell['source'])!r}, shared)\n" for cell in cells)
    said = fresh_process(
        f"import os; os.chdir({str(tmp_path)!r})\nshared = {{}}\n{script}"
        "task, small, smaller = (shared[name] for name in ('task', 'small', 'smaller'))\n"
        "print(small.before, small.after, smaller.after, small.artifact.nbytes, smaller.artifact.nbytes)\n"
        "assert task.score(task.test, shared['opened']) == smaller.after\n"
    )
    before, small, smaller, first, second = map(float, said.split())
    assert before > 0.95 and small > before - 0.02 and smaller > before - 0.02
    assert first <= 4 * 17_226 / 12 and second < 4 * 17_226 / 15

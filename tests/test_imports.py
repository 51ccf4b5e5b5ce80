"""Who may import whom (docs/architecture.md), and a file in a process without torch."""

import ast
from pathlib import Path

from conftest import fresh_process, trees

from tersenet.artifact import Artifact, Tensor

SOURCE = Path(__file__).parents[1] / "src" / "tersenet"
MAY = {
    "packed": "bloomier splitmix", "bloomier": "native splitmix", "splitmix": "",
    "activations": "display artifact data draft methods task",
    "structure": "packed", "display": "", "data": "", "budget": "", "tracing": "task data", "native": "", "cores": "",
    "information": "data task",
    "task": "display data cores teacher", "teacher": "data",
    "sequence": "data task teacher", "likelihood": "task data", "allocators": "display task journal budget",
    "codecs": "native", "deferred": "packed", "dense": "container packed",
    "container": "packed codecs cores deferred", "header": "access container packed codecs",
    "access": "container codecs", "decoding": "access container header packed codecs deferred",
    "writing": "container packed codecs",
    "norms": "container", "running_statistics": "data task",
    "artifact": "access container header decoding writing packed codecs norms replacing realise deferred dense notebook"
                " runtime",
    "realise": "artifact chains packed structure task", "chains": "packed", "methods": "packed native codecs cores",
    "calibrate": "display task data likelihood tracing",
    "draft": "packed task artifact norms journal dense", "journal": "display replacing", "replacing": "",
    "run": "activations container contract draft task artifact journal key origins data notebook replacing report"
           " display",
    "contract": "draft norms packed structure task",
    "folding": "draft norms packed structure artifact task tracing",
    "waterfilling": "budget journal draft folding methods calibrate statistics packed structure task artifact"
                    " allocators data likelihood tracing display",
    "stages": "waterfilling draft run budget folding methods calibrate packed task artifact allocators data likelihood"
              " tracing norms structure contract where statistics checkpoint key journal cores bloomier"
              " splitmix chains teacher activations display running_statistics",
    "papers": "stages methods allocators run budget where", "strength": "display allocators artifact budget run",
    "promise": "activations artifact budget calibrate contract draft folding journal likelihood methods packed papers"
               " run stages strength task where display",
    "recipe_file": "papers stages methods allocators run where",
    "origins": "", "key": "origins", "checkpoint": "journal key",
    "where": "draft norms", "statistics": "calibrate draft likelihood methods packed task",
    "runtime": "activations packed artifact native cores container journal norms task", "threelc": "codecs",
    "report": "artifact container journal packed structure",
    "notebook": "artifact", "cli_files": "artifact codecs replacing sources targets task_file",
    "cli_errors": "artifact codecs", "cli_pages": "artifact cli_files promise replacing report",
    "sources": "artifact", "targets": "artifact", "task_file": "task", "doctor": "cores native",
    "flower": "codecs", "updates": "access artifact container decoding header packed codecs sources",
    "plan": "artifact budget contract draft methods packed promise run strength task where",
    "published": "artifact packed", "export": "access artifact codecs container header packed",
    "cli": "cli_errors cli_files cli_pages replacing sources doctor plan papers runtime run budget draft artifact"
           " codecs promise published recipe_file updates export display task_file",
    "__init__": "artifact budget codecs task promise papers",
}  # fmt: skip
TORCH = {"realise", "chains", "allocators", "methods", "calibrate", "task", "draft", "run", "folding", "waterfilling",
         "tracing", "stages", "promise", "strength", "threelc", "information", "norms", "data", "likelihood",
         "where", "activations", "statistics", "key", "checkpoint", "task_file", "plan", "teacher",
         "sequence", "runtime", "running_statistics"}  # fmt: skip


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts == ["tersenet"]:
                yield from ((alias.name, node.col_offset) for alias in node.names)
            else:
                yield (parts[1] if parts[0] == "tersenet" else parts[0]), node.col_offset
        elif isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.col_offset) for alias in node.names)


def test_arrows_point_only_where_the_plan_says():
    modules = {p.stem if p.is_file() else p.name for p in SOURCE.iterdir() if p.suffix in (".py", "")} - {"__pycache__"}
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        for name, column in imports(file):
            if name in modules and name != own:
                assert name in MAY[own].split(), f"{file.name} imports {name}"
            if name == "torch" and (column == 0 or own in ("packed", "codecs", "native")):
                assert own in TORCH, f"{file.name} imports torch"


def test_a_file_loads_and_unpacks_where_torch_cannot_be_imported(tmp_path):
    path = tmp_path / "w.terse"
    Artifact({name: Tensor(tree) for name, tree in trees().items()}).save(path)
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['typer'] = sys.modules['rich'] = sys.modules['scipy'] = None\n"
        "import tersenet\n"
        "artifact = tersenet.load(sys.argv[1])\n"
        "print(len(artifact.unpack()), str(artifact).count('bits'))\n"
    )
    assert int(fresh_process(script, path).split()[0]) == len(trees())

"""The command `terse`: compress, inspect, verify, unpack, recipes.

Exit codes: 0 done, 1 the promise was not met, 2 wrong use or bad input (one line says what, where, and what to do).
"""

import importlib.util
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tersenet.artifact import load
from tersenet.codecs import FormatError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

SOURCE = Annotated[
    Path | None, typer.Argument(help="A .safetensors or .npz file; left out where the task brings the model")
]
FILE = Annotated[Path, typer.Argument(help="A .terse file")]
TASK = Annotated[Path | None, typer.Option("--task", help="Your Python file with a function task() -> tersenet.Task")]


@app.command(name="compress")
def compress_command(
    source: SOURCE = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write")] = Path("model.terse"),
    recipe: Annotated[str | None, typer.Option(help="A name that `terse recipes` lists, or a YAML file")] = None,
    size: Annotated[str | None, typer.Option(help="The most bytes, e.g. 500kB")] = None,
    ratio: Annotated[float | None, typer.Option(help="Times smaller than 32-bit weights, e.g. 20")] = None,
    drop: Annotated[float | None, typer.Option(help="The most that the metric may fall, in points, e.g. 0.5")] = None,
    task: TASK = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice")] = 0,
) -> None:
    """Compress a network into one file and prove it by opening the file again.

    [dim]terse compress --task task.py --recipe deep-compression -o lenet.terse[/dim]
    """
    from tersenet.promise import compress
    from tersenet.recipe import Budget
    from tersenet.recipe_file import find_recipe

    given = {"size": size, "ratio": ratio, "drop": drop}
    budget = Budget(**given) if any(v is not None for v in given.values()) else None  # type: ignore[arg-type]
    if not output.resolve().parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write to")
    job: Any = _task(task) if task else None
    if source is not None:
        state = read_state(source)
        job = state if job is None else _with_state(job, state, source)
    if job is None:
        raise ValueError("nothing to compress: give a SOURCE file, or --task with your model")
    result = compress(job, find_recipe(recipe, seed) if recipe else None, budget)
    result.artifact.save(output)
    typer.echo(str(result))
    typer.echo(f"wrote {output} ({result.artifact.nbytes:,} bytes). Next: terse verify {output}")


@app.command()
def inspect(
    file: FILE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON")] = False,
    task: TASK = None,
) -> None:
    """Print the ledger: for each tensor its tree, codec, bytes, error, and why it is as it is.

    With --task also how far each layer's outputs are from the original's on training inputs.
    """
    artifact = load(file)
    rows, outputs = artifact.ledger(), dict[str, float]()
    if task:
        from tersenet.promise import output_errors

        outputs = output_errors(artifact, _task(task))
    if as_json:
        body = [row._asdict() | {"shape": list(row.shape), "bytes": row.total} for row in rows]
        whole = {"bytes": artifact.nbytes, "meta": artifact.meta, "tensors": body, "output_errors": outputs}
        typer.echo(json.dumps(whole, indent=1))
        return
    typer.echo(str(artifact))
    if outputs:
        typer.echo("\nrelative error of the outputs:")
    for name, error in outputs.items():
        typer.echo(f"{name:<{max(map(len, outputs))}} {error:7.4f}")


@app.command()
def verify(
    file: FILE,
    against: Annotated[Path | None, typer.Option(help="The original .safetensors or .npz file")] = None,
    task: TASK = None,
) -> None:
    """Open the file afresh, check every byte, and measure its errors or its metric again."""
    if against is None and task is None:
        artifact = load(file)
        typer.echo(f"{file}: whole and undamaged, {artifact.nbytes:,} bytes, {len(artifact.tensors)} tensors")
        return
    from tersenet.promise import verify as prove

    found = prove(file, read_state(against) if against else None, _task(task) if task else None)
    typer.echo(f"{file}: whole and undamaged, {found['bytes']:,} bytes, {found['tensors']} tensors")
    if "errors" in found:
        name = max(found["errors"], key=found["errors"].get)
        typer.echo(f"largest error: {found['errors'][name]:.5f} ({name}), no worse than the file says")
    if "metric" in found:
        typer.echo(f"test metric: {found['metric']:.4f}, no worse than the file says")


@app.command()
def unpack(
    file: FILE,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .safetensors or .npz file")],
) -> None:
    """Write the dense weights to a .safetensors or .npz file."""
    state = {name: np.ascontiguousarray(array) for name, array in load(file).unpack().items()}
    if output.suffix == ".npz":
        with output.open("wb") as opened:
            np.savez(opened, **state)  # type: ignore[arg-type]
    elif output.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(state, output)
    else:
        raise ValueError(f"{output}: give a name that ends in .safetensors or .npz")
    typer.echo(f"wrote {output} ({len(state)} tensors)")


@app.command()
def recipes() -> None:
    """List the recipes that --recipe takes, with their settings."""
    import inspect as python

    from tersenet.papers import PAPERS

    for name, paper in PAPERS.items():
        settings = ", ".join(f"{p.name}={p.default}" for p in python.signature(paper).parameters.values())
        typer.echo(f"{name}: {(paper.__doc__ or '').splitlines()[0]}\n    {settings}")


def read_state(path: Path) -> Mapping[str, Any]:
    """The tensors of a .safetensors or .npz file by name; raises ValueError for anything else."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as wrong:
            raise ValueError(f"{path}: not a safetensors file: {wrong}") from None
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as opened:
                return {name: opened[name] for name in opened.files}
        except (zipfile.BadZipFile, ValueError, EOFError) as wrong:
            raise ValueError(f"{path}: not an .npz file of plain arrays: {wrong}") from None
    raise ValueError(f"{path}: give a .safetensors or .npz file")


def _task(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    if not hasattr(module, "task"):
        raise ValueError(f"{path}: has no function task() -> tersenet.Task")
    return module.task()


def _with_state(task: Any, state: Mapping[str, Any], source: Path) -> Any:
    import torch

    try:
        task.model.load_state_dict({name: torch.as_tensor(array) for name, array in state.items()})
    except RuntimeError as wrong:
        raise ValueError(f"{source}: does not fit the task's model: {' '.join(str(wrong).split())}") from None
    return task


def main() -> None:
    """Run the command; turn what the user can mend into one line and an exit code."""
    try:
        app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        _stop("stopped; nothing was written", 130)
    except Exception as wrong:
        if type(wrong).__name__ == "PromiseBroken":
            _stop(str(wrong), 1)
        if isinstance(wrong, FormatError | ValueError | OSError | ImportError | KeyError | MemoryError):
            _stop(_line(wrong), 2)
        if hasattr(wrong, "format_message"):
            _stop(wrong.format_message(), 2)
        raise


def _line(wrong: Exception) -> str:
    if isinstance(wrong, ImportError) and wrong.name in ("torch", "pydantic", "yaml", "safetensors"):
        return f"this needs {wrong.name}: pip install 'tersenet[torch]'"
    return " ".join(str(wrong.args[0] if isinstance(wrong, KeyError) else wrong).split()) or type(wrong).__name__


def _stop(text: str, code: int) -> None:
    print(f"terse: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

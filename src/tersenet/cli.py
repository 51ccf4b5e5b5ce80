"""The command `terse`: compress, inspect, verify, unpack, recipes.

Exit codes: 0 done, 1 the promise was not met, 2 wrong use or bad input (one line says what, where, and what to do).
"""

import importlib.util
import io
import json
import math
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tersenet.artifact import load
from tersenet.codecs import FormatError
from tersenet.replacing import write_atomically
from tersenet.sources import Checkpoint, read

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

SOURCE = Annotated[
    Path | None,
    typer.Argument(
        help="A checkpoint: .safetensors, .npz, .pt, .pth or .bin, an index of shards, or a Hugging Face folder;"
        " left out where the task brings the model"
    ),
]
METADATA_CAP = 30_000  # bytes of a checkpoint's own text that are kept; a file's notes hold 64 KiB in all
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
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Weights to leave as they are, e.g. 'head.*' or 'kind:embedding'; repeatable"),
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Weights to pack in their own way, e.g. 'conv*=kmeans:bits=4'; repeatable")
    ] = None,
    task: TASK = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice")] = 0,
) -> None:
    """Compress a network into one file and prove it by opening the file again.

    [dim]terse compress --task task.py --recipe deep-compression -o lenet.terse[/dim]
    [dim]terse compress model.pt --size 500kB --keep 'head.*' --rule 'embed*=uniform:bits=6' -o model.terse[/dim]
    """
    from tersenet.budget import Budget
    from tersenet.promise import compress
    from tersenet.recipe_file import find_recipe, parse_rule

    given = {"size": size, "ratio": ratio, "drop": drop}
    if wrong := [n for n, v in given.items() if isinstance(v, float) and not math.isfinite(v)]:
        raise ValueError(f"--{wrong[0]} is a number, e.g. 8")
    budget = Budget(**given) if any(v is not None for v in given.values()) else None  # type: ignore[arg-type]
    _check_folder(output)
    job: Any = _task(task) if task else None
    checkpoint = read(source) if source is not None else Checkpoint({})
    if source is not None:
        job = checkpoint.tensors if job is None else _with_state(job, checkpoint, source)
    if job is None:
        raise ValueError("nothing to compress: give a SOURCE file, or --task with your model")
    notes = _metadata(checkpoint)
    rules = [parse_rule(text, seed) for text in rule or ()]
    chosen = find_recipe(recipe, seed) if recipe else None
    result = compress(job, chosen, budget, keep=keep or (), rules=rules, notes=notes)
    artifact = result.artifact
    artifact.save(output)
    for word in checkpoint.words:
        typer.echo(f"{source}: {word}", err=True)
    typer.echo(str(result))
    typer.echo(f"wrote {output} ({artifact.nbytes:,} bytes). Next: terse verify {output}")


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
    against: Annotated[Path | None, typer.Option(help="The original checkpoint: a file or a folder")] = None,
    task: TASK = None,
) -> None:
    """Open the file afresh, check every byte, and measure its errors or its metric again."""
    if against is None and task is None:
        artifact = load(file)
        typer.echo(f"{file}: whole and undamaged, {artifact.nbytes:,} bytes, {len(artifact.tensors)} tensors")
        return
    from tersenet.promise import verify as prove

    found = prove(file, read(against).tensors if against else None, _task(task) if task else None)
    typer.echo(f"{file}: whole and undamaged, {found['bytes']:,} bytes, {found['tensors']} tensors")
    if "errors" in found:
        name = max(found["errors"], key=found["errors"].get)
        typer.echo(f"largest error: {found['errors'][name]:.5f} ({name}), no worse than the file says")
    if "metric" in found:
        typer.echo(f"test metric: {found['metric']:.4f}, no worse than the file says")


@app.command()
def unpack(
    file: FILE,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .safetensors, .pt or .npz file")],
) -> None:
    """Write the dense weights, each in its type; .npz has bfloat16 as float32 and 8-bit floats as bytes."""
    _check_folder(output)
    artifact, buffer = load(file), io.BytesIO()
    if output.suffix == ".npz":
        with zipfile.ZipFile(buffer, "w") as archive:  # np.savez takes some names for its own arguments
            for name, array in artifact.unpack().items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    elif output.suffix == ".pt":
        import torch

        torch.save(artifact.state_dict(), buffer)
    elif output.suffix == ".safetensors":
        from safetensors.torch import save

        state = {name: tensor.clone() for name, tensor in artifact.state_dict().items()}  # it holds no tied tensors
        text = artifact.meta.get("metadata")
        text = {str(key): str(value) for key, value in text.items()} if isinstance(text, dict) else None
        buffer.write(save(state, text))
    else:
        raise ValueError(f"{output}: give a name that ends in .safetensors, .pt or .npz")
    write_atomically(output, buffer.getvalue())
    typer.echo(f"wrote {output} ({len(artifact.tensors)} tensors)")


@app.command()
def recipes() -> None:
    """List the recipes that --recipe takes, with their settings."""
    import inspect as python

    from tersenet.papers import PAPERS

    for name, paper in PAPERS.items():
        settings = ", ".join(f"{p.name}={p.default}" for p in python.signature(paper).parameters.values())
        typer.echo(f"{name}: {(paper.__doc__ or '').splitlines()[0]}\n    {settings}")


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The notes that carry a checkpoint's own text; what is too long is left out with a word."""
    notes = {"metadata": checkpoint.metadata} if checkpoint.metadata else {}
    if len(json.dumps(notes)) <= METADATA_CAP:
        return notes
    checkpoint.words.append(f"left out its metadata, which is over {METADATA_CAP:,} bytes")
    return {}


def _check_folder(output: Path) -> None:
    if not output.resolve().parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write to")


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


def _with_state(task: Any, checkpoint: Checkpoint, source: Path) -> Any:
    from tersenet.draft import Draft, artifact_of

    try:
        artifact_of(Draft.of_arrays(checkpoint.tensors)).into(task.model)
    except RuntimeError as wrong:
        raise ValueError(f"{source}: does not fit the task's model: {wrong}") from None
    return task


def main() -> None:
    """Run the command; turn what the user can mend into one line and an exit code."""
    try:
        app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        _stop("stopped; nothing was written", 130)
    except Exception as wrong:
        if any(kind.__name__ == "PromiseBroken" for kind in type(wrong).__mro__):
            _stop(str(wrong), 1)
        misfit = isinstance(wrong, RuntimeError) and "loading state_dict" in str(wrong)
        if misfit or isinstance(wrong, FormatError | ValueError | OSError | ImportError | KeyError | MemoryError):
            _stop(_line(wrong), 2)
        if hasattr(wrong, "format_message"):
            _stop(wrong.format_message(), 2)
        raise


def _line(wrong: Exception) -> str:
    if isinstance(wrong, ImportError) and wrong.name in ("torch", "pydantic", "yaml", "safetensors"):
        return f"this needs {wrong.name}: pip install 'tersenet[torch]'"
    text = str(wrong.args[0] if isinstance(wrong, KeyError) and wrong.args else wrong)
    return textwrap.shorten(text, 600, placeholder=" ...") or type(wrong).__name__


def _stop(text: str, code: int) -> None:
    print(f"terse: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

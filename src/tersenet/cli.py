"""The command `terse`: compress, inspect, verify, report, log, compare, unpack, export, bench, diff, patch, and more.

Exit codes: 0 done, 1 the promise was not met, 2 wrong use or bad input (one line says what, where, and what to do).
"""

import functools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tersenet.artifact import load, printable
from tersenet.budget import PromiseBroken
from tersenet.cli_errors import line_of
from tersenet.cli_files import TASK, about, check_output, metadata, running, write_dense
from tersenet.cli_pages import app as pages
from tersenet.codecs import FormatError
from tersenet.display import plain_lines
from tersenet.replacing import write_atomically
from tersenet.sources import Checkpoint, read

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.add_typer(pages)

SOURCE = Annotated[
    Path | None,
    typer.Argument(
        help="A checkpoint: .safetensors, .npz, .pt, .pth or .bin, an index of shards, or a Hugging Face folder;"
        " left out where the task brings the model"
    ),
]
FILE = Annotated[Path, typer.Argument(help="A .terse file")]


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
    seed: Annotated[int, typer.Option(help="Seed of every random choice", min=0, max=2**32 - 1)] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done to which weight, and do nothing")
    ] = False,
) -> None:
    """Compress a network into one file and prove it by opening the file again.

    [dim]terse compress --task task.py --recipe deep-compression -o lenet.terse[/dim]
    [dim]terse compress model.pt --size 500kB --keep 'head.*' --rule 'embed*=uniform:bits=6' -o model.terse[/dim]
    """
    from tersenet.budget import Budget
    from tersenet.plan import plan as planned
    from tersenet.promise import compress, verify
    from tersenet.recipe_file import find_recipe, parse_rule

    given = {"size": size, "ratio": ratio, "drop": drop}
    if wrong := [n for n, v in given.items() if isinstance(v, float) and not math.isfinite(v)]:
        raise ValueError(f"--{wrong[0]} is a number, e.g. 8")
    budget = Budget(**given) if any(v is not None for v in given.values()) else None  # type: ignore[arg-type]
    rules = [parse_rule(text, seed) for text in rule or ()]
    chosen = None if recipe is None else find_recipe(recipe, seed)
    if source is None and task is None:
        raise ValueError("nothing to compress: give a SOURCE file, or --task with your model")
    check_output(output, source, task)
    checkpoint = read(source) if source is not None else Checkpoint({})
    with running(task) as job:
        if job is None:
            job = checkpoint.tensors
        elif source is not None:
            _with_state(job, checkpoint, source)
        if plan:
            typer.echo(str(planned(job, chosen, budget, keep=keep or (), rules=rules)))
            return
        notes = metadata(checkpoint)
        result = compress(job, chosen, budget, keep=keep or (), rules=rules, notes=notes)
    artifact = result.artifact
    verify(artifact.to_bytes(), checkpoint.tensors if source is not None else None)  # before there is a file
    artifact.save(output)
    for word in checkpoint.words:
        typer.echo(f"{source}: {printable(word)}", err=True)
    typer.echo(str(result))
    typer.echo(f"wrote {output} ({artifact.nbytes:,} bytes). Next: terse verify {output}")


@app.command()
def repack(
    source: Annotated[Path, typer.Argument(help="A network that others compressed: .safetensors, .npz, .pt, or .net")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write")] = Path("model.terse"),
    task: TASK = None,
) -> None:
    """Take in a compressed network of others without loss: palettes, product quantization, GPTQ's 4 bits.

    A .net file is Deep Compression's SqueezeNet. With --task weights get the shapes that your model has.

    [dim]terse repack pq_resnet18.safetensors --task task.py -o resnet18.terse[/dim]
    """
    from tersenet.published import deep_compression, repacked, squeezenet

    check_output(output, source, task)
    with running(task) as job:
        shapes = {name: tuple(value.shape) for name, value in job.model.state_dict().items()} if job else None
    try:
        if source.suffix.lower() == ".net":
            artifact = deep_compression(source.read_bytes(), squeezenet())
        else:
            artifact = repacked(read(source).tensors, shapes)
    except ValueError as wrong:
        raise ValueError(f"{source}: {str(wrong).removeprefix(f'{source}: ')}") from None
    artifact.save(output)
    before = source.stat().st_size if source.is_file() else 0
    typer.echo(f"wrote {output} ({artifact.nbytes:,} bytes, of {before:,}). Next: terse inspect {output}")


@app.command()
def inspect(
    file: FILE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON")] = False,
    task: TASK = None,
) -> None:
    """Print the ledger: for each tensor its tree, codec, bytes, error, and why it is as it is.

    With --task also how far each layer's outputs are from the original's on training inputs.
    """
    with about(file):
        artifact = load(file)
    rows, outputs = artifact.ledger(), dict[str, float]()
    if task:
        from tersenet.promise import output_errors

        with running(task) as job:
            outputs = output_errors(artifact, job)
    if as_json:
        body = [row._asdict() | {"shape": list(row.shape), "bytes": row.total} for row in rows]
        whole = {"bytes": artifact.nbytes, "meta": artifact.meta, "tensors": body, "output_errors": outputs}
        typer.echo(json.dumps(_finite(whole), indent=1))
        return
    typer.echo(str(artifact))
    if outputs:
        typer.echo("\nrelative error of the outputs:")
    for name, error in outputs.items():
        typer.echo(f"{printable(name):<{max(map(len, outputs))}} {error:7.4f}")


@app.command()
def verify(
    file: FILE,
    against: Annotated[Path | None, typer.Option(help="The original checkpoint: a file or a folder")] = None,
    task: TASK = None,
) -> None:
    """Open the file afresh, check every byte, and measure its errors or its metric again."""
    if against is None and task is None:
        with about(file):
            artifact = load(file)
            artifact.check()
        typer.echo(f"{file}: whole and undamaged, {artifact.nbytes:,} bytes, {len(artifact.tensors)} tensors")
        return
    from tersenet.promise import verify as prove

    tensors = read(against).tensors if against else None
    with running(task) as job, about(file):
        found = prove(file, tensors, job)
    typer.echo(f"{file}: whole and undamaged, {found['bytes']:,} bytes, {found['tensors']} tensors")
    if "errors" in found:
        name = max(found["errors"], key=found["errors"].get)
        typer.echo(f"largest error: {found['errors'][name]:.5f} ({printable(name)}), no worse than the file says")
    if "metric" in found:
        typer.echo(f"test metric: {found['metric']:.4f}, no worse than the file says")


@app.command()
def unpack(
    file: FILE,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .safetensors, .pt or .npz file")],
) -> None:
    """Write the dense weights, each in its type; .npz has bfloat16 as float32 and 8-bit floats as bytes."""
    check_output(output, file)
    with about(file):
        artifact = load(file)
    write_dense(artifact, output)
    typer.echo(f"wrote {output} ({len(artifact.tensors)} tensors)")


@app.command()
def export(
    file: FILE,
    output: Annotated[Path, typer.Option("-o", "--output", help="The C header to write")],
) -> None:
    """Write the file as a C array for small devices, with the memory that its decoder needs (examples/c).

    [dim]terse export lenet5.terse -o lenet5.h[/dim]
    """
    from tersenet.export import c_header, c_name

    check_output(output, file)
    data = file.read_bytes()
    try:
        with about(file):
            text = c_header(data, file.name)
    except FormatError:
        raise
    except ValueError as wrong:
        raise ValueError(f"{file}: {wrong}") from None
    write_atomically(output, text.encode())
    name = c_name(file.name)
    typer.echo(f"wrote {output}: {name}[{len(data)}]. Next: make -C examples/c MODEL={output.resolve()} NAME={name}")


@app.command(name="diff")
def diff_command(
    old: Annotated[Path, typer.Argument(help="What is to be updated: a .terse file or a checkpoint")],
    new: Annotated[Path, typer.Argument(help="What it is to become")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write")] = Path("update.terse"),
    ratio: Annotated[
        float | None, typer.Option(help="Times smaller than 32-bit weights, e.g. 30; without it the update is exact")
    ] = None,
) -> None:
    """Write what changed from one version of a network to another as one small file.

    After a lossy update take the next one from what `terse patch` wrote: it then makes up for what this one left out.
    """
    from tersenet.updates import diff, network

    check_output(output, old, new)
    with about(old):
        base = network(old)
    with about(new):
        changed = network(new)
    update = diff(base, changed, ratio)
    update.save(output)
    typer.echo(f"wrote {output} ({update.nbytes:,} bytes). Next: terse patch {old} {output} -o NEW")


@app.command(name="patch")
def patch_command(
    old: Annotated[Path, typer.Argument(help="What the update was made for")],
    update: Annotated[Path, typer.Argument(help="What `terse diff` wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .terse, .safetensors, .pt or .npz file")],
) -> None:
    """Apply an update to the network that it is for; the whole result is written, or nothing."""
    from tersenet.updates import network, opened, patch

    check_output(output, old, update)
    with about(old):
        base = network(old)
    with about(update):
        change = opened(update)
    try:
        with about(update):
            artifact = patch(base, change)
    except FormatError:
        raise
    except ValueError as wrong:
        raise ValueError(f"{old}: {wrong}") from None
    if output.suffix.lower() == ".terse":
        artifact.save(output)
    else:
        write_dense(artifact, output)
    typer.echo(f"wrote {output} ({len(artifact.tensors)} tensors)")


@app.command()
def bench(
    file: FILE,
    task: Annotated[Path, typer.Option("--task", help="Your Python file with a function task() -> tersenet.Task")],
    threads: Annotated[int, typer.Option(help="Threads of each product", min=1)] = 1,
) -> None:
    """Time the network on packed weights, dense and with torch's own 8 bits, and say why each layer is as it is."""
    from tersenet.runtime.measure import report
    from tersenet.task_file import task_of

    with running(task) as job, about(file):
        for line in report(file, job, functools.partial(task_of, task), threads):
            typer.echo(printable(line))


@app.command()
def recipes() -> None:
    """List the recipes that --recipe takes, with their settings."""
    import inspect as python

    from tersenet.papers import PAPERS

    for name, paper in PAPERS.items():
        settings = ", ".join(f"{p.name}={p.default}" for p in python.signature(paper).parameters.values())
        typer.echo(f"{name}: {(paper.__doc__ or '').splitlines()[0]}\n    {settings}")


@app.command()
def doctor() -> None:
    """Say what this installation has and lacks: versions, the C core, the extras."""
    from tersenet.doctor import diagnosis

    for line in diagnosis():
        typer.echo(line)


def _finite(value: Any) -> Any:
    """The value with null for infinities and NaN, which JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_state(task: Any, checkpoint: Checkpoint, source: Path) -> None:
    from tersenet.draft import Draft, artifact_of

    try:
        artifact_of(Draft.of_arrays(checkpoint.tensors)).into(task.model)
    except RuntimeError as wrong:
        raise ValueError(f"{source}: does not fit the task's model: {wrong}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; turn what goes wrong into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        with plain_lines(), warnings.catch_warnings():
            warnings.showwarning = _warned
            code = app(arguments, prog_name="terse", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except SystemExit as end:  # of shell completion, or of a pipe that was closed
        code = 2 if end.code == 1 else end.code
    except PromiseBroken as wrong:
        _stop(str(wrong), 1)
    except Exception as wrong:
        if os.environ.get("TERSE_TRACEBACK"):
            traceback.print_exc()
        _stop(line_of(wrong), 2)
    if code == 130:
        _stop("stopped; no file was left half written", 130)
    if code:
        sys.exit(code)


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"tersenet: warning: {printable(str(message))}", file=sys.stderr)


def _stop(text: str, code: int) -> None:
    if text:  # click has shown the help already where there are no words at all
        print(f"terse: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

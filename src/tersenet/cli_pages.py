"""The commands that show what was made: report and compare write pages, log writes curves for other tools."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tersenet.artifact import printable
from tersenet.cli_files import TASK, about, check_output, running
from tersenet.replacing import write_atomically

app = typer.Typer()


@app.command(name="report")
def report_command(
    source: Annotated[Path, typer.Argument(help="A .terse file, or the folder of a run")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write")] = Path("report.html"),
    task: TASK = None,
    peers: Annotated[
        Path | None, typer.Option(help='What others made, JSON: [{"name": "theirs", "bytes": 51200, "metric": 0.971}]')
    ] = None,
) -> None:
    """Write a page that shows a file, and the run that made it: ledger, pictures of weights, what was tried.

    With --task also how far each layer's outputs are from the original's on training inputs.
    """
    from tersenet.report.facts import Facts, peers_of
    from tersenet.report.page import report

    check_output(output, source, peers)
    others = peers_of(peers) if peers else ()
    with about(source):
        facts = Facts.of(source)
    if task and facts.artifact is not None:
        from tersenet.promise import output_errors

        with running(task) as job:
            facts = Facts.made(facts.title, facts.artifact, facts.told, output_errors(facts.artifact, job))
    write_atomically(output, report(replace(facts, peers=others)).encode())
    typer.echo(f"wrote {output} ({output.stat().st_size:,} bytes): open it in a browser")


@app.command()
def log(
    source: Annotated[Path, typer.Argument(help="A .terse file, or the folder of a run")],
    tensorboard: Annotated[Path | None, typer.Option(help="The folder to write events for TensorBoard to")] = None,
    mlflow: Annotated[str | None, typer.Option(help="MLflow's tracking address, e.g. http://localhost:5000")] = None,
) -> None:
    """Write the curves of a run, also of one that goes on, for TensorBoard or MLflow: losses, metrics, bytes.

    [dim]terse log model.terse --tensorboard runs/first[/dim]
    """
    from tersenet.report.facts import Facts
    from tersenet.report.scalars import to_mlflow, to_tensorboard

    if tensorboard is None and mlflow is None:
        raise ValueError("where to? give --tensorboard FOLDER or --mlflow ADDRESS")
    with about(source):
        told = Facts.of(source).told
    if not told.recipe:
        raise ValueError(f"{source}: the run that made this file is not known; give its folder instead of the file")
    if tensorboard is not None:
        count = to_tensorboard(told, tensorboard)
        typer.echo(f"wrote {count:,} values. Next: tensorboard --logdir {tensorboard}")
    if mlflow is not None:
        count = to_mlflow(told, source.name, mlflow)
        typer.echo(f"wrote {count:,} values. Next: the experiment 'tersenet' at {mlflow}, run {printable(source.name)}")


@app.command(name="compare")
def compare_command(
    files: Annotated[list[Path], typer.Argument(help="Two .terse files or more")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write")] = Path("compare.html"),
) -> None:
    """Write a page that shows several files side by side: sizes, metrics, and each tensor in each of them."""
    from tersenet.report.facts import Facts
    from tersenet.report.page import compare

    check_output(output, *files)
    if len(set(files)) < 2:
        raise ValueError("give two files or more to compare")
    found, names = dict[str, Facts](), [file.name for file in files]
    for file in files:
        with about(file):
            facts = Facts.of(file)
        if facts.artifact is None:
            raise ValueError(f"{file}: this run has made no file yet")
        found[printable(file.name if names.count(file.name) == 1 else str(file))] = facts
    write_atomically(output, compare(found).encode())
    typer.echo(f"wrote {output} ({output.stat().st_size:,} bytes): open it in a browser")

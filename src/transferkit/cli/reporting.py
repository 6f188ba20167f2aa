"""The command that shows a run: ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transferkit.cli._app import Device, Json, Run, app, print_json

__all__ = ["report"]


@app.command()
def report(
    run: Run,
    data: Annotated[
        Path | None, typer.Argument(help="Labelled pictures to judge the model on; those of the run by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The file; report.html in RUN by default.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a run's report: one HTML file with its figures, plan, curves, mistakes, calibration and data."""
    from transferkit.report import write_report

    file = write_report(run, output, data=data, device=device)
    if as_json:
        print_json({"report": str(file)})
        return
    typer.echo(f"written: {file}")

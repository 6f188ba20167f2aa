"""The command that sets backbones side by side: ``compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from transferkit.cli._app import Data, Device, Json, OnBadImage, Workers, app, print_json, print_table
from transferkit.exceptions import SettingError, TransferkitError
from transferkit.interrupts import EXIT_CODE, Interrupted

__all__ = ["compare"]


@app.command()
def compare(
    data: Data,
    models: Annotated[
        str,
        typer.Option(help="Backbones, with commas between; NAME@WEIGHTS for a path, a tag, bundled or none."),
    ],
    seeds: Annotated[
        str, typer.Option(help="Of everything that is random but the split, with commas between.")
    ] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="Passes over the training pictures.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="Also train each as a whole, for a column of its own.")] = False,
    val_fraction: Annotated[float, typer.Option(help="Share held out where the data has no val/.")] = 0.2,
    on_bad_image: OnBadImage = "skip",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the leaderboard; runs/NAME-OF-DATA-compared by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take over results that are there, if some are.")] = False,
    device: Device = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Compare backbones on a folder of pictures: the same budget for each, the head alone trained, several seeds."""
    from rich.console import Console
    from rich.progress import Progress

    from transferkit.comparison import compare as compare_backbones

    folder = output if output is not None else Path("runs") / f"{data.resolve().name}-compared"
    shown = Console(stderr=True)
    try:
        with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
            task = bar.add_task("looking at pictures", total=None)
            board = compare_backbones(
                data,
                [name.strip() for name in models.split(",") if name.strip()],
                seeds=_numbers(seeds),
                epochs=epochs,
                full=full,
                output_dir=folder,
                resume=resume,
                on_progress=lambda done, count, doing: bar.update(task, completed=done, total=count, description=doing),
                val_fraction=val_fraction,
                on_bad_image=on_bad_image,
                device=device,
                num_workers=workers,
            )
    except Interrupted as error:
        again = [each for each in sys.argv[1:] if each != "--resume"]
        line = shlex.join(["transferkit", *again, "--resume"])
        typer.echo(f"transferkit: {error}; to go on:\n  {line}", err=True)
        raise typer.Exit(EXIT_CODE) from None
    if as_json:
        print_json({"output": str(folder), **board.to_dict()})
    else:
        print_table(board.table())
        typer.echo()
        for note in board.notes():
            typer.echo(note)
        typer.echo(f"saved in {folder}: leaderboard.html, .md, .csv and .json, tradeoff.png")
    if all(row.accuracy is None for row in board.rows):
        raise TransferkitError("no backbone could be trained; their rows say why, and --resume tries them again")


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise SettingError(f"--seeds {text!r}; it can be whole numbers with commas between, such as 0,1,2") from None

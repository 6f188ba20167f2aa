"""The command's application, the options that several commands share, and how they print."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from transferkit import __version__

__all__ = [
    "BatchSize",
    "Data",
    "Device",
    "Engine",
    "ImageSize",
    "Json",
    "ModelName",
    "OnBadImage",
    "Run",
    "Seed",
    "Weights",
    "Workers",
    "app",
    "print_json",
    "print_table",
    "weights_named",
]


app = typer.Typer(
    name="transferkit",
    help="Fine-tune any torchvision or timm classifier on your own folder of pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output and nothing else there.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps …; the best there is by default.")]
Data = Annotated[Path, typer.Argument(help="Folder with train/ and val/, or with one folder per class.")]
ModelName = Annotated[
    str, typer.Option("--model", help="torchvision/NAME, timm/NAME, or a bare name; see `transferkit models`.")
]
Weights = Annotated[str, typer.Option(help="default, a tag, a path to a state dict, bundled, or none.")]
BatchSize = Annotated[int, typer.Option(help="Pictures per batch.")]
ImageSize = Annotated[int | None, typer.Option(help="Input side in pixels; the weights' by default.")]
Seed = Annotated[int, typer.Option(help="Of everything that is random.")]
Engine = Annotated[
    str, typer.Option(help="What computes where nothing is trained: eager, compile, onnxruntime or openvino.")
]
OnBadImage = Annotated[
    str, typer.Option(help="Pictures that cannot be read: skip leaves them out and lists them, raise stops.")
]
Workers = Annotated[int | None, typer.Option(help="Processes that read pictures.")]
Run = Annotated[Path, typer.Argument(help="Output folder of a run, or any saved model.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune any torchvision or timm classifier on your own folder of pictures."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("transferkit").setLevel(logging.INFO)


def weights_named(text: str) -> str | None:
    """Return what ``--weights`` names; ``none`` is no weights."""
    return None if text.lower() == "none" else text


def print_json(values: Any) -> None:
    """Print one JSON object to standard output."""
    typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))


def print_table(rows: list[list[str]]) -> None:
    """Print rows whose columns stand in line."""
    from rich.cells import cell_len, set_cell_size

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())

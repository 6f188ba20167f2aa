"""The ``transferkit`` command. Heavy imports live inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import sys

import typer

from transferkit.allocator import tune_allocator
from transferkit.cli import comparing, exporting, looking, reporting, training, using  # each adds its commands
from transferkit.cli._app import app
from transferkit.exceptions import TransferkitError

__all__ = ["app", "comparing", "exporting", "looking", "main", "reporting", "training", "using"]


def main() -> None:
    """Run the command line; a mistake of the user's ends with one sentence and exit code 2."""
    tune_allocator()
    try:
        app()
    except TransferkitError as error:
        typer.echo(f"transferkit: {error}", err=True)
        sys.exit(2)

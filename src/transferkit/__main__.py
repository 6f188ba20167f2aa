"""The ``transferkit`` command as a process of its own; ``python -m transferkit`` is the same."""

from __future__ import annotations

import atexit
import os
import sys

from transferkit.cli import main

__all__ = ["run"]


def run() -> None:
    """Run the command line and end the process, without taking apart torch's modules object by object.

    That lasts over a second. What was registered for the end runs; after an error all ends as usual. A program that
    goes on afterwards calls :func:`transferkit.cli.main`.
    """
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more; the interpreter knows what to say then
        return
    os._exit(0)


if __name__ == "__main__":
    run()

"""Every error transferkit raises on purpose: what was asked, what exists, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "CallbackError",
    "DataError",
    "ExportError",
    "OutputError",
    "PictureError",
    "SettingError",
    "SplitError",
    "TransferkitError",
    "UnknownModelError",
    "UnknownStageError",
    "WeightsError",
    "closest",
    "one_line",
]


class TransferkitError(Exception):
    """Base of all errors that a user can mend; the terminal prints its one sentence and exits with 2."""


class UnknownModelError(TransferkitError):
    """No torchvision or timm classifier has the requested name."""


class UnknownStageError(TransferkitError):
    """The network has no stage of the requested name."""


class WeightsError(TransferkitError):
    """The weights do not exist, cannot be read safely, or do not fit the network."""


class DataError(TransferkitError):
    """The folder or data set cannot be used for classification as it is."""


class PictureError(DataError):
    """One picture cannot be read; the message names it, as ``path`` and ``cause`` do where it was raised here."""

    path: str = ""
    cause: str = ""


class ArtifactError(TransferkitError):
    """A saved model or its ``config.json`` is missing, damaged, or from a newer format."""


class ExportError(TransferkitError):
    """A network cannot be exported, what was exported gives other logits, or it cannot be pushed."""


class CallbackError(TransferkitError):
    """A callback has raised something; the message names it and its hook, and the error that it raised is the cause."""


class OutputError(TransferkitError):
    """The output folder cannot be written, or already holds another run."""


class SettingError(TransferkitError, ValueError):
    """A setting is outside its range, or two settings exclude each other."""


class SplitError(TransferkitError):
    """The network cannot be cut behind its frozen stages, so they run at every epoch."""


def closest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Say which known names are nearest to a mistyped one.

    Args:
        name: What the user wrote.
        known: The names that exist.
        count: How many names to offer at most.

    Returns:
        ``" — did you mean 'a' or 'b'?"``, or ``""`` when nothing is near.

    Example:
        >>> closest("layer3", ["stem", "stage3", "head"])
        " — did you mean 'stage3'?"
    """
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" — did you mean {' or '.join(repr(each) for each in near)}?" if near else ""


def one_line(text: object, *, longest: int = 300) -> str:
    """Return a text as it may stand in a message: on one line, cut, and without a terminal's control characters.

    Args:
        text: An exception, or anything else with a ``str``.
        longest: Characters that remain at most.

    Example:
        >>> one_line("first\\n  second \\x1b[31m")
        'first second \N{REPLACEMENT CHARACTER}[31m'
    """
    words = " ".join(str(text).split())[:longest]
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in words)

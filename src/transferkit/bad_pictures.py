"""Pictures that cannot be read: refused before anything is trained, or left out and listed."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transferkit.exceptions import ArtifactError, DataError, OutputError, PictureError, SettingError
from transferkit.fingerprints import PictureFacts
from transferkit.scan import scan_pictures
from transferkit.sources import PictureData, PictureFiles

__all__ = [
    "ON_BAD_IMAGE",
    "check_on_bad_image",
    "facts_of",
    "load_bad_images",
    "readable_data",
    "readable_files",
    "save_bad_images",
    "unreadable",
]

log = logging.getLogger("transferkit")

ON_BAD_IMAGE = ("raise", "skip")
"""What can be done about a picture that cannot be read: stop before the work begins, or leave it out."""


def check_on_bad_image(on_bad_image: str) -> None:
    """Raise ``SettingError`` unless there is such a choice."""
    if on_bad_image not in ON_BAD_IMAGE:
        raise SettingError(f"on_bad_image={on_bad_image!r}; it can be {' or '.join(ON_BAD_IMAGE)}")


def facts_of(data: PictureData) -> dict[str, PictureFacts]:
    """Decode all picture files of a data set once; returns what is known of each, by path.

    Args:
        data: Sources that are no files have no facts.

    Example:
        >>> files = PictureFiles([])
        >>> facts_of(PictureData(files, files, ("cats", "dogs")))
        {}
    """
    parts = [each for each in (data.train, data.val, data.test) if isinstance(each, PictureFiles)]
    paths = list(dict.fromkeys(picture.path for part in parts for picture in part.pictures))
    return dict(zip(paths, scan_pictures(paths), strict=True)) if paths else {}


def readable_data(data: PictureData, facts: Mapping[str, PictureFacts], *, on_bad_image: str = "raise") -> PictureData:
    """Leave out the picture files of a data set that cannot be read, or refuse them.

    Args:
        data: Sources that are no files are taken as they are.
        facts: Of :func:`facts_of`.
        on_bad_image: One of :data:`ON_BAD_IMAGE`.

    Returns:
        The data; its ``left_out`` names what is missing and why.

    Raises:
        PictureError: Files cannot be read, and ``"raise"`` was asked for.
        DataError: A class has no picture left to train on, or no picture is left to validate on.

    Example:
        >>> files = PictureFiles([])
        >>> readable_data(PictureData(files, files, ("cats", "dogs")), {}).left_out
        {}
    """
    causes = _refused_or_told(facts, on_bad_image=on_bad_image)
    if not causes:
        return replace(data, left_out=dict(data.left_out))
    train, val, test = (_without(each, causes) for each in (data.train, data.val, data.test))
    left = Counter(train.labels())
    for label in Counter(data.train.labels()):
        if not left[label]:
            name = data.class_names[label]
            raise DataError(
                f"no picture of class {name!r} can be read: {_told(causes)}; mend some, or remove the class"
            )
    if not len(val):
        raise DataError(f"no picture to validate on can be read: {_told(causes)}; mend some")
    return replace(data, train=train, val=val, test=test, left_out=causes)


def readable_files(files: PictureFiles, *, on_bad_image: str = "raise") -> PictureFiles:
    """Do the same for one source, such as the pictures that a model is evaluated on.

    Raises:
        PictureError: Files cannot be read, and ``"raise"`` was asked for, or none is left.
    """
    causes = unreadable([picture.path for picture in files.pictures], on_bad_image=on_bad_image)
    left: PictureFiles = _without(files, causes)
    return left


def unreadable(paths: Sequence[str], *, on_bad_image: str = "raise", others: int = 0) -> dict[str, str]:
    """Decode files once and say which cannot be read, and why.

    Args:
        paths: The files.
        on_bad_image: One of :data:`ON_BAD_IMAGE`; ``"skip"`` logs them.
        others: How many pictures there are besides.

    Raises:
        PictureError: Files cannot be read, and ``"raise"`` was asked for, or nothing would be left.

    Example:
        >>> unreadable(["/no/such/file.jpg"])
        Traceback (most recent call last):
        transferkit.exceptions.PictureError: cannot read picture /no/such/file.jpg: there is no such file; ...
    """
    facts = dict(zip(paths, scan_pictures(paths), strict=True)) if paths else {}
    return _refused_or_told(facts, on_bad_image=on_bad_image, others=others)


def _refused_or_told(facts: Mapping[str, PictureFacts], *, on_bad_image: str, others: int = 0) -> dict[str, str]:
    causes = {path: each.cause for path, each in facts.items() if each.cause is not None}
    if not causes:
        return causes
    listed = f"{len(causes)} of {len(facts)} pictures cannot be read: {_told(causes)}"
    none_left = not others and len(causes) == len(facts)
    if on_bad_image == "raise" or none_left:
        if len(causes) == 1:
            [(path, cause)] = causes.items()
            sentence = f"cannot read picture {path}: {cause}; replace or remove it"
        else:
            sentence = f"{listed}; replace or remove them"
        hint = "" if none_left else ", or leave out what cannot be read (on_bad_image='skip')"
        raise PictureError(sentence + hint)
    log.warning("left out, since %s", listed)
    return causes


def save_bad_images(causes: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Write what was left out and why as a table, ``path,cause``.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "cause"))
            writer.writerows(causes.items())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def load_bad_images(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what :func:`save_bad_images` wrote: the cause by path.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return {row["path"]: row["cause"] for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise ArtifactError(f"{path} is no list of pictures that cannot be read: {error}") from error


def _told(causes: Mapping[str, str], *, most: int = 5) -> str:
    """List files and causes in a line, the first few of them."""
    first = [f"{path} ({cause})" for path, cause in list(causes.items())[:most]]
    return ", ".join(first) + (f" and {len(causes) - most} more" if len(causes) > most else "")


def _without(source: Any, causes: Mapping[str, str]) -> Any:
    if not isinstance(source, PictureFiles):
        return source
    return replace(source, pictures=[picture for picture in source.pictures if picture.path not in causes])

"""What a run is, in words: a run may only be gone on with by one that is the same."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from transferkit.exceptions import ArtifactError, PictureError
from transferkit.model import TransferModel
from transferkit.sources import LabelledPictures, Picture, PictureData, PictureFiles

__all__ = ["check_same_run", "contents_of", "described", "in_plain_values", "run_identity"]


def run_identity(model: TransferModel, data: PictureData, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a run by JSON values that are the same in another process and on another machine.

    Args:
        model: What is trained.
        data: The pictures; files count by their names below their common folder, and their sizes.
        settings: Everything else that its outcome depends on, by the name a user knows it by.

    Returns:
        One text, number or list per fact, with names for use in a sentence.

    Example:
        >>> from PIL import Image
        >>> from transferkit.create import create_model
        >>> from transferkit.data import from_datasets
        >>> pictures = [(Image.new("RGB", (8, 8)), label) for label in (0, 1)]
        >>> data = from_datasets(pictures, pictures, class_names=["ant", "bee"])
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=data.class_names, image_size=32)
        >>> run_identity(model, data, {"lr": 0.1})["training pictures"]
        2
    """
    return {
        "network": f"{model.name} with {sum(each.numel() for each in model.network.parameters()):,} parameters",
        "classes": list(data.class_names),
        "training pictures": len(data.train),
        "validation pictures": len(data.val),
        "list of training pictures": _fingerprint(data.train),
        "list of validation pictures": _fingerprint(data.val),
        **{name: described(value) for name, value in settings.items()},
    }


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, folder: str | os.PathLike[str]) -> None:
    """Raise where two runs differ.

    Args:
        saved: The identity of the run that is to be gone on with.
        wanted: That of the run which would go on with it.
        folder: Where the saved run is.

    Raises:
        ArtifactError: They differ; the message names the first differences.

    Example:
        >>> check_same_run({"lr": 0.1}, {"lr": 0.2}, folder="runs/bees")
        Traceback (most recent call last):
        transferkit.exceptions.ArtifactError: the run in runs/bees has lr 0.1 and cannot be resumed with 0.2; ...
    """
    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if not names:
        return
    differences = [f"{name} {saved.get(name)!r} and cannot be resumed with {wanted.get(name)!r}" for name in names[:3]]
    raise ArtifactError(
        f"the run in {folder} has {', '.join(differences)}; give it the same, or start anew with overwrite=True "
        "(--overwrite)"
    )


def contents_of(source: LabelledPictures) -> str | None:
    """Return a digest of what is in picture files, and of their labels, in order; ``None`` for pictures of other kinds.

    Args:
        source: Its files are read whole, but not decoded.

    Raises:
        PictureError: One cannot be read.

    Source: SHA-256.

    Example:
        >>> contents_of([("a picture", 0)]) is None
        True
    """
    if not isinstance(source, PictureFiles):
        return None
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as threads:
        for picture, content in zip(source.pictures, threads.map(_content, source.pictures), strict=True):
            digest.update(f"{picture.label} {source.channels} {content}\n".encode())
    return digest.hexdigest()


def _content(picture: Picture) -> str:
    try:
        with open(picture.path, "rb") as file:  # noqa: PTH123  # 100 000 of them are fast
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PictureError(f"cannot read picture {picture.path}: {error.strerror}; replace or remove it") from error


def _fingerprint(source: LabelledPictures) -> str:
    digest = hashlib.sha256()
    for line in _lines(source):
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _lines(source: LabelledPictures) -> Iterable[str]:
    if not isinstance(source, PictureFiles):
        return map(str, source.labels()) if hasattr(source, "labels") else ()
    paths = [os.path.abspath(picture.path) for picture in source.pictures]  # noqa: PTH100  # 100 000 of them are fast
    root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    return (
        f"{path[len(root) :]} {picture.label} {os.path.getsize(path)}"  # noqa: PTH202
        for path, picture in zip(paths, source.pictures, strict=True)
    )


def described(value: Any) -> Any:
    """Describe a setting by JSON values that are the same in another process.

    Args:
        value: Whatever a user has given.

    Example:
        >>> described((0.1, None, Path("bees.pth")))
        [0.1, None, 'bees.pth']
        >>> "0x" in described(object())
        False
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, os.PathLike):
        return str(Path(value))
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {hashlib.sha256(str(value).encode()).hexdigest()[:16]}"
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # where an object lies differs between processes


def in_plain_values(settings: Mapping[str, Any], *, longest: int = 200) -> dict[str, str | int | float | bool | None]:
    """Return settings as people read them: numbers and texts as they are, everything else in words.

    Args:
        settings: By name.
        longest: Characters of such words at most.

    Example:
        >>> in_plain_values({"lr": 0.1, "sizes": (1, 2)})
        {'lr': 0.1, 'sizes': '(1, 2)'}
    """
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else str(value)[:longest] for name, value in settings.items()}

"""What lies in a folder of labelled pictures: its parts, their classes, and the files of each. No file is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transferkit.exceptions import DataError
from transferkit.pictures import existing, find_pictures, picture_extensions

__all__ = ["PART_NAMES", "Part", "data_folder", "find_parts", "list_part", "list_parts"]

PART_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names, in lower case, of the folders that hold a part of the data instead of a class."""


@dataclass(frozen=True)
class Part:
    """One part of the data, or all of it.

    Args:
        root: The folder that holds the class folders.
        pictures: Sorted paths by the name of their class folder, the names sorted; also of folders without pictures.
        others: Files that are no pictures.
        loose: Pictures in no class folder.
        hidden: Files and folders whose name begins with a dot.
    """

    root: Path
    pictures: Mapping[str, Sequence[str]]
    others: Sequence[str]
    loose: Sequence[str]
    hidden: Sequence[str]


def data_folder(root: str | os.PathLike[str]) -> Path:
    """Check that data is a folder.

    Raises:
        DataError: It does not exist or is a file.
    """
    root = existing(root)
    if not root.is_dir():
        raise DataError(f"{root} is a file; give the folder that holds one folder per class")
    return root


def find_parts(root: Path, *, known: Sequence[str] = ()) -> dict[str, Path]:
    """Find the train, val and test folders: they hold folders themselves, and no class has their name.

    Args:
        root: The folder of the data.
        known: Classes of a model, if there is one.

    Returns:
        Folders by ``"train"``, ``"val"`` and ``"test"``, of those that are there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("Train/cats", "valid/cats", "cats"):
        ...         (Path(folder) / name).mkdir(parents=True)
        ...     {part: place.name for part, place in find_parts(Path(folder)).items()}
        {'train': 'Train', 'val': 'valid'}
    """
    folders = {path.name.lower(): path for path in _subfolders(root) if path.name not in known and _subfolders(path)}
    return {
        part: next(folders[name] for name in names if name in folders)
        for part, names in PART_NAMES.items()
        if not folders.keys().isdisjoint(names)
    }


def list_parts(root: str | os.PathLike[str], *, known: Sequence[str] = ()) -> dict[str, Part]:
    """List a folder of data: by part if it has such folders, else the class folders it holds itself, as ``"all"``.

    Args:
        root: The folder of the data.
        known: Classes of a model, if there is one.

    Raises:
        DataError: It does not exist or is a file.
    """
    root = data_folder(root)
    return {part: list_part(folder) for part, folder in find_parts(root, known=known).items()} or {
        "all": list_part(root)
    }


def list_part(root: Path) -> Part:
    """List the class folders and what lies in them.

    Args:
        root: A folder of class folders; pictures may lie deeper inside these.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cats/1.jpg", "dogs/notes.txt"):
        ...         (Path(folder) / name).parent.mkdir()
        ...         (Path(folder) / name).touch()
        ...     part = list_part(Path(folder))
        >>> {name: len(paths) for name, paths in part.pictures.items()}, len(part.others)
        ({'cats': 1, 'dogs': 0}, 1)
    """
    pictures: dict[str, Sequence[str]] = {}
    others: list[str] = []
    hidden: list[str] = []
    for folder in _subfolders(root):
        found = find_pictures(folder)
        pictures[folder.name] = found.pictures
        others.extend(found.others)
        hidden.extend(found.hidden)
    loose: list[str] = []
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            hidden.append(str(path))
        elif not path.is_dir():
            (loose if path.suffix.lower() in picture_extensions() else others).append(str(path))
    return Part(root, pictures, others, loose, hidden)


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))

"""Labelled pictures from folders and data sets: who belongs to which class, what is trained and what is validated on.

Class names come from the training pictures alone, sorted; everything else is mapped onto them by name. Sources of
pictures are in :mod:`transferkit.sources`, reading one picture in :mod:`transferkit.pictures`, making batches in
:mod:`transferkit.loading`; what a user needs of them is offered here as well.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from transferkit.exceptions import DataError, closest
from transferkit.folders import Part, data_folder, find_parts, list_part, list_parts
from transferkit.loading import loader
from transferkit.pictures import list_pictures, picture_extensions, read_picture
from transferkit.randomness import derive_seed
from transferkit.ranges import check_number, check_seed
from transferkit.reading import TransformedDataset
from transferkit.sampling import EpochSampler, SampleKey
from transferkit.sources import (
    DatasetPictures,
    LabelledPictures,
    Picture,
    PictureData,
    PictureFiles,
    raw_labels,
    source_of,
)

__all__ = [
    "DatasetPictures",
    "EpochSampler",
    "LabelledPictures",
    "Picture",
    "PictureData",
    "PictureFiles",
    "SampleKey",
    "TransformedDataset",
    "from_datasets",
    "image_folder",
    "labelled_folder",
    "list_pictures",
    "loader",
    "picture_extensions",
    "read_picture",
    "sort_pictures",
]

log = logging.getLogger("transferkit")


def image_folder(
    root: str | os.PathLike[str],
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    natural_sort: bool = False,
) -> PictureData:
    """Find the labelled pictures of a folder; a folder inside it is a class, and its name the class's name.

    The folder holds ``train/`` and ``val/`` (or ``valid/``, ``validation/``) with the same class folders in each, and
    perhaps ``test/``, which stands in for validation where there is none. Or it holds the class folders directly, which
    are then split, class by class: of two or more pictures at least one is on either side, a single one is trained on.
    Pictures may lie deeper inside a class folder. Hidden files, and files that are no pictures, are left out.

    Args:
        root: The folder.
        val_fraction: Share of every class that is validated on, above 0 and below 1; unused with ``val/`` or ``test/``.
        seed: Decides which pictures that is, 0 or more.
        class_names: Names to map the folders onto, as a saved model has them; by default those of the training
            folders, sorted.
        natural_sort: Whether classes are sorted by the numbers in their names, ``2`` before ``10``, and not letter by
            letter. A saved model holds its classes in their order either way.

    Returns:
        The sources and the class names; no picture has been opened yet.

    Raises:
        DataError: The folder is missing or has no class folders, a class is empty, unknown or the only one.
        SettingError: ``val_fraction`` or ``seed`` is outside its range.

    Source: the layout of torchvision ``ImageFolder``, whose class order can differ between train and val.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cats/1.jpg", "cats/2.jpg", "dogs/1.jpg", "dogs/2.jpg"):
        ...         (Path(root) / name).parent.mkdir(exist_ok=True)
        ...         (Path(root) / name).touch()
        ...     data = image_folder(root)
        >>> data.class_names, data.train_labels(), data.val_counts()
        (('cats', 'dogs'), [0, 1], {'cats': 1, 'dogs': 1})
    """
    data, notes = sort_pictures(
        list_parts(root, known=class_names or ()),
        val_fraction=val_fraction,
        seed=seed,
        class_names=class_names,
        natural_sort=natural_sort,
    )
    _tell(notes)
    return data


Notes = list[tuple[int, str]]
"""What is worth a line of the log, each with its level."""


def sort_pictures(
    parts: Mapping[str, Part],
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    natural_sort: bool = False,
) -> tuple[PictureData, Notes]:
    """Sort listed files into training and validation, as :func:`image_folder` says, and tell what is left out.

    Args:
        parts: What :func:`transferkit.folders.list_parts` gave.
        val_fraction: As for :func:`image_folder`.
        seed: The same.
        class_names: The same.
        natural_sort: The same.

    Raises:
        DataError: As for :func:`image_folder`, but for a folder that is missing.
        SettingError: ``val_fraction`` or ``seed`` is outside its range.
    """
    check_number("val_fraction", val_fraction, above=0, below=1)
    check_seed(seed)
    part = parts.get("train") or parts.get("all")
    if part is None:
        found = next(iter(parts.values())).root.parent
        raise DataError(
            f"{found} has {_listing(each.root.name for each in parts.values())} but no train with a folder per class; "
            "add it, or keep only class folders there"
        )
    notes = _check_part(part)
    empty = [name for name, paths in part.pictures.items() if not paths]
    if empty:
        raise DataError(f"no pictures in class folder {_listing(empty)} of {part.root}; add some or remove the folder")
    if len(part.pictures) == 1 and class_names is None:
        raise DataError(
            f"only one class, {_listing(part.pictures)}, in {part.root}; "
            "give the folder that holds two or more class folders"
        )
    names = tuple(class_names or sorted(part.pictures, key=_natural if natural_sort else None))
    held_out = parts.get("val") or parts.get("test")
    if held_out is None:
        train, val = _split(part.pictures, val_fraction, seed)
        single = [name for name, paths in val.items() if not paths]
        if len(single) == len(val):
            raise DataError(f"no class in {part.root} has two pictures, so none is left to validate on; add pictures")
        if single:
            sentence = "class %s has a single picture, which is trained on and not validated on"
            notes.append((logging.WARNING, sentence % _listing(single)))
        return PictureData(_files(train, names, part.root), _files(val, names, part.root), names), notes
    if "val" not in parts:
        notes.append(
            (logging.INFO, f"{part.root.parent} has no folder val; {held_out.root.name} is used for validation")
        )
    val_files, val_notes = _held_out_files(held_out, names)
    test_files, test_notes = _held_out_files(parts["test"], names) if {"val", "test"} <= parts.keys() else (None, [])
    data = PictureData(_files(part.pictures, names, part.root), val_files, names, test_files)
    return data, [*notes, *val_notes, *test_notes]


def _natural(name: str) -> tuple[list[int | str], str]:
    """Return what sorts names by the numbers in them; texts and numbers alternate, so that like meets like."""
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)], name


def labelled_folder(root: str | os.PathLike[str], class_names: Sequence[str]) -> PictureFiles:
    """Find the pictures to evaluate a model on, labelled with its own class names.

    Args:
        root: A folder of class folders; or one with ``val/`` (or ``valid/``, ``validation/``, failing that ``test/``),
            which is then used.
        class_names: The model's; a class without a folder is logged.

    Returns:
        The picture files, in class order; none has been opened yet.

    Raises:
        DataError: The folder is missing, has no pictures, or has class folders the model does not know.

    Source: as for :func:`image_folder`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     (Path(root) / "dogs").mkdir()
        ...     (Path(root) / "dogs" / "1.jpg").touch()
        ...     labelled_folder(root, ["cats", "dogs"]).labels()
        [1]
    """
    root = data_folder(root)
    parts = find_parts(root, known=class_names)
    part = parts.get("val") or parts.get("test") or root
    if part != root:
        log.info("evaluating on %s", part)
    files, notes = _held_out_files(list_part(part), class_names)
    _tell(notes)
    return files


def from_datasets(train: Any, val: Any, *, class_names: Sequence[str] | None = None) -> PictureData:
    """Use data sets that are there already, torchvision's or any with ``len`` and (image, label) pairs.

    Where both have ``.classes``, in another order, the validation labels are mapped onto the training classes by name.

    Args:
        train: Images are PIL, uint8 arrays, or uint8 or float tensors, not normalised (see
            :func:`transferkit.pictures.as_picture`), with any number of channels where the network takes that many;
            labels are whole numbers from 0. A torch ``Subset`` is fine.
        val: The same.
        class_names: One per class; by default ``train.classes``, else ``"0"``, ``"1"``, … up to the largest label.

    Returns:
        The sources and the class names.

    Raises:
        DataError: A data set is empty or not map-style, a class is only in ``val`` or the only one, or a label has no
            name.

    Source: torchvision ``VisionDataset``.

    Example:
        >>> from PIL import Image
        >>> pairs = [(Image.new("L", (4, 2)), label) for label in (0, 2)]
        >>> from_datasets(pairs, pairs).class_names
        ('0', '1', '2')
    """
    for name, dataset in (("train", train), ("val", val)):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(f"{name} is a {type(dataset).__name__}; it needs len() and (image, label) pairs by index")
        if len(dataset) == 0:
            raise DataError(f"the {name} data set is empty; give one with pictures")
    train_classes, val_classes = _classes(train), _classes(val)
    if class_names is not None:
        names = tuple(class_names)
    elif train_classes is not None:
        names = train_classes
    else:
        names = tuple(str(label) for label in range(max(raw_labels(train)) + 1))
    if len(names) < 2:
        raise DataError(f"only one class, {_listing(names)}, in the train data set; a classifier needs two or more")
    if train_classes is not None and len(names) != len(train_classes):
        raise DataError(
            f"class_names has {len(names)} names, the train data set {len(train_classes)} classes; name each"
        )
    same = tuple(range(len(names)))
    if train_classes is None or val_classes is None or train_classes == val_classes:
        return PictureData(source_of(train, same), source_of(val, same), names)
    _check_known(val_classes, train_classes, "the val data set")
    by_name = tuple(train_classes.index(name) for name in val_classes)
    return PictureData(source_of(train, same), source_of(val, by_name), names)


def _classes(dataset: Any) -> tuple[str, ...] | None:
    if isinstance(dataset, Subset):
        return _classes(dataset.dataset)
    classes = getattr(dataset, "classes", None)
    if classes is None:
        return None
    # torchvision's ImageNet has a tuple of synonyms per class.
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in classes)


def _tell(notes: Notes) -> None:
    for level, sentence in notes:
        log.log(level, "%s", sentence)


def _check_part(part: Part) -> Notes:
    """Check that there are pictures in class folders; tell what is left out."""
    root = part.root
    if not any(part.pictures.values()):
        raise DataError(
            f"no pictures in {root}: looked for one folder per class, such as {root / 'cats' / '1.jpg'}, "
            f"and found {len(part.pictures)} folder(s) without pictures and {len(part.loose)} picture(s) in no folder"
        )
    notes: Notes = []
    if part.others:
        sentence = f"{root}: left out {len(part.others)} file(s) that are no pictures: {_listing(part.others)}"
        notes.append((logging.INFO, sentence))
    if part.loose:
        notes.append((logging.WARNING, f"{root}: left out {len(part.loose)} picture(s) in no class folder"))
    return notes


def _split(
    found: Mapping[str, Sequence[str]], val_fraction: float, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split class by class, since a stratified draw over all may leave a small class on one side only."""
    train: dict[str, list[str]] = {}
    val: dict[str, list[str]] = {}
    for position, (name, paths) in enumerate(found.items()):
        count = min(max(round(len(paths) * val_fraction), 1), len(paths) - 1)
        order = np.random.default_rng(derive_seed(seed, 2, position)).permutation(len(paths)).tolist()
        val[name] = [paths[index] for index in sorted(order[:count])]
        train[name] = [paths[index] for index in sorted(order[count:])]
    return train, val


def _files(found: Mapping[str, Sequence[str]], names: Sequence[str], root: Path) -> PictureFiles:
    """Label pictures by the position of their folder's name among the class names."""
    _check_known([name for name, paths in found.items() if paths], names, str(root))
    return PictureFiles([Picture(path, label) for label, name in enumerate(names) for path in found.get(name, ())])


def _held_out_files(part: Part, names: Sequence[str]) -> tuple[PictureFiles, Notes]:
    notes = _check_part(part)
    missing = [name for name in names if not part.pictures.get(name)]
    if missing:
        notes.append((logging.WARNING, f"{part.root} has no pictures of class {_listing(missing)}"))
    return _files(part.pictures, names, part.root), notes


def _check_known(names: Sequence[str], known: Sequence[str], where: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"{where} has pictures of class {_listing(unknown)}, which is not among the classes {_listing(known)}; "
            f"rename or remove it{closest(unknown[0], known)}"
        )


def _listing(names: Any, *, most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more

"""Where labelled pictures come from: files that are named, or a data set that is there already."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import DatasetFolder, ImageFolder, VisionDataset
from torchvision.datasets.folder import default_loader

from transferkit.exceptions import DataError
from transferkit.pictures import as_picture, check_file_channels, decode_picture, read_picture

__all__ = [
    "DatasetPictures",
    "LabelledPictures",
    "Picture",
    "PictureData",
    "PictureFiles",
    "raw_labels",
    "source_of",
]


class LabelledPictures(Protocol):
    """A source of labelled pictures, before any transform; worker processes get a pickled copy.

    Where it says ``random = False``, reading a picture twice gives the same. Where it has ``decode(index)``, several
    threads may read by that at once.
    """

    def __len__(self) -> int:
        """Count the pictures."""

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        """Return picture ``index``, upright, as a PIL image or a tensor (C, H, W), and its label.

        It is RGB, or has the channels asked for by :meth:`with_channels`.
        """

    def labels(self) -> list[int]:
        """Return every label in order, without decoding pictures where that is possible."""

    def name(self, index: int) -> str:
        """Say which picture ``index`` is: its path where it has one."""

    def with_channels(self, channels: int) -> LabelledPictures:
        """Return the same pictures for a network that takes so many channels; see ``as_picture`` for what they are."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file and the index of its class.

    Example:
        >>> Picture("cats/1.jpg", 0)
        Picture(path='cats/1.jpg', label=0)
    """

    path: str
    label: int


@dataclass(frozen=True)
class PictureFiles:
    """A source that reads picture files when they are asked for.

    Args:
        pictures: The files and their labels.
        channels: What the network takes: 1, 3 or 4 (see :func:`transferkit.pictures.read_picture`).
        least_side: Pixels that the shorter side must keep, so that large JPEG files can be decoded smaller; ``None``
            for all there are.

    Raises:
        DataError: ``channels`` is none of these.

    Example:
        >>> PictureFiles([Picture("cats/1.jpg", 0), Picture("dogs/1.jpg", 1)]).labels()
        [0, 1]
    """

    pictures: Sequence[Picture]
    channels: int = 3
    least_side: int | None = None

    def __post_init__(self) -> None:
        """Refuse at once what no file has."""
        check_file_channels(self.channels)

    def __len__(self) -> int:
        """Count the files."""
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return picture ``index``, upright RGB or RGBA, and its label; an unreadable file raises ``PictureError``."""
        picture = self.pictures[index]
        return read_picture(picture.path, channels=self.channels, at_least=self.least_side), picture.label

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """Do the same in one of several threads, where the caller has silenced Pillow's warnings."""
        picture = self.pictures[index]
        return decode_picture(picture.path, channels=self.channels, at_least=self.least_side), picture.label

    def labels(self) -> list[int]:
        """Return every label in order; no file is opened."""
        return [picture.label for picture in self.pictures]

    def name(self, index: int) -> str:
        """Return the path of picture ``index``."""
        return self.pictures[index].path

    @property
    def random(self) -> bool:
        """Reading a file draws no random numbers."""
        return False

    def with_channels(self, channels: int) -> Self:
        """Return the same files for a network that takes 1, 3 or 4 channels; another number raises ``DataError``."""
        return self if channels == self.channels else replace(self, channels=channels)

    def with_least_side(self, pixels: int) -> Self:
        """Return the same files for a transform that needs so many pixels of the shorter side."""
        return replace(self, least_side=pixels)


@dataclass(frozen=True, eq=False)
class DatasetPictures:
    """A source over a map-style data set of (image, label) pairs.

    Args:
        dataset: Its images are PIL, uint8 arrays, or uint8 or float tensors (see
            :func:`transferkit.pictures.as_picture`); its labels whole numbers.
        label_map: The data set's label ``i`` becomes ``label_map[i]``.
        channels: What the network takes; other numbers than 1, 3 and 4 need tensors, or arrays, that have them.

    Example:
        >>> source = DatasetPictures([(Image.new("L", (4, 2)), 1)], label_map=(1, 0))
        >>> source[0][0].mode, source[0][1], source.labels()
        ('RGB', 0, [0])
    """

    dataset: Any
    label_map: tuple[int, ...]
    channels: int = 3

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        """Return picture ``index``, upright, and its label; a pair that is neither raises ``DataError``."""
        image, label = _pair(self.dataset, index)
        try:
            picture = as_picture(image, channels=self.channels)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from error
        return picture, self._mapped(label, index)

    def labels(self) -> list[int]:
        """Return every label in order: from the data set's own list where it has one, else, once, from its pairs."""
        return list(self._labels)

    def name(self, index: int) -> str:
        """Return the path of picture ``index`` where the data set knows it, else its number."""
        return _name(self.dataset, index)

    @property
    def random(self) -> bool:
        """Whether the data set may draw random numbers: one of torchvision without transforms, or a list, does not."""
        dataset = self.dataset
        while type(dataset) is Subset:
            dataset = dataset.dataset
        if type(dataset) in (list, tuple, TensorDataset):
            return False
        known = isinstance(dataset, VisionDataset) and type(dataset).__module__.startswith("torchvision.")
        return not known or any(getattr(dataset, name, None) is not None for name in ("transform", "transforms"))

    def with_channels(self, channels: int) -> Self:
        """Return the same data set for a network that takes so many channels."""
        return self if channels == self.channels else replace(self, channels=channels)

    @cached_property
    def _labels(self) -> list[int]:
        return [self._mapped(label, index) for index, label in enumerate(raw_labels(self.dataset))]

    def _mapped(self, label: Any, index: int) -> int:
        number = _whole(label, self.dataset, index)
        if number >= len(self.label_map):
            raise DataError(
                f"the label of {self.name(index)} is {number}, and there are {len(self.label_map)} classes; "
                f"labels can be 0 to {len(self.label_map) - 1}"
            )
        return self.label_map[number]


@dataclass(frozen=True)
class PictureData:
    """What a classifier is trained and validated on.

    Args:
        train: Pictures to learn from.
        val: Pictures to validate on.
        class_names: Name of class ``i`` at position ``i``.
        test: Pictures for a last check, where there are some.
        left_out: Files that cannot be read, each with the cause; those that go bad during a run join them.
        findings: What training was warned of, a sentence each.

    Example:
        >>> files = PictureFiles([Picture("cats/1.jpg", 0), Picture("dogs/1.jpg", 1)])
        >>> PictureData(train=files, val=files, class_names=("cats", "dogs")).train_counts()
        {'cats': 1, 'dogs': 1}
    """

    train: LabelledPictures
    val: LabelledPictures
    class_names: tuple[str, ...]
    test: LabelledPictures | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    def train_labels(self) -> list[int]:
        """Return the training labels in order; folders are not decoded for it."""
        return self.train.labels()

    def val_labels(self) -> list[int]:
        """Return the validation labels in order; folders are not decoded for it."""
        return self.val.labels()

    def train_counts(self) -> dict[str, int]:
        """Count the training pictures of each class."""
        return _counts(self.train_labels(), self.class_names)

    def val_counts(self) -> dict[str, int]:
        """Count the validation pictures of each class."""
        return _counts(self.val_labels(), self.class_names)


def raw_labels(dataset: Any) -> list[int]:
    """Return a data set's labels in order, as it numbers them.

    Args:
        dataset: Gives (image, label) pairs. Its list of labels is used where it has one, so that no picture is decoded.

    Returns:
        One whole number, 0 or more, per pair.

    Raises:
        DataError: A label is something else, or the data set does not give pairs.

    Source: torchvision data sets carry ``targets`` or ``labels``.

    Example:
        >>> raw_labels([("a picture", 1), ("another", 0)])
        [1, 0]
    """
    listed = _listed_labels(dataset)
    if listed is None:
        listed = [_pair(dataset, index)[1] for index in range(len(dataset))]
    return [_whole(label, dataset, index) for index, label in enumerate(listed)]


def source_of(dataset: Any, label_map: tuple[int, ...]) -> LabelledPictures:
    """Wrap a map-style data set; one that only reads files is replaced by its files.

    Args:
        dataset: Gives (image, label) pairs.
        label_map: The data set's label ``i`` becomes ``label_map[i]``.

    Returns:
        :class:`PictureFiles` for a torchvision ``ImageFolder`` without transforms or loader of its own, also inside a
        ``Subset``, so that its pictures are read upright as all others; else :class:`DatasetPictures`.

    Raises:
        DataError: A label the data set lists is outside ``label_map``.

    Source: torchvision ``DatasetFolder``.

    Example:
        >>> source_of([(Image.new("L", (4, 2)), 1)], (0, 1)).name(0)
        'sample 0 of list'
    """
    source = DatasetPictures(dataset, label_map)
    if _listed_labels(dataset) is None:
        return source
    labels = source.labels()
    if not _only_reads_files(dataset):
        return source
    return PictureFiles([Picture(source.name(index), label) for index, label in enumerate(labels)])


def _only_reads_files(dataset: Any) -> bool:
    # Subclasses may do more in their __getitem__.
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return (
        type(dataset) in (DatasetFolder, ImageFolder) and dataset.loader is default_loader and dataset.transform is None
    )


def _listed_labels(dataset: Any) -> Sequence[Any] | None:
    if isinstance(dataset, Subset):
        listed = _listed_labels(dataset.dataset)
        return None if listed is None else [listed[index] for index in dataset.indices]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for listed in (getattr(dataset, "targets", None), getattr(dataset, "labels", None)):
        if isinstance(listed, Sequence | np.ndarray | Tensor) and len(listed) == len(dataset):
            return listed
    return None


def _pair(dataset: Any, index: int) -> tuple[Any, Any]:
    sample = dataset[index]
    if not (isinstance(sample, tuple | list) and len(sample) == 2):
        raise DataError(
            f"{_name(dataset, index)} is a {type(sample).__name__}; the data set needs to give (image, label) pairs"
        )
    return sample[0], sample[1]


def _whole(label: Any, dataset: Any, index: int) -> int:
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    if number < 0:
        raise DataError(f"the label of {_name(dataset, index)} is {label!r}; it needs to be a whole number, 0 or more")
    return number


def _name(dataset: Any, index: int) -> str:
    if isinstance(dataset, Subset):
        return _name(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, DatasetFolder):
        return str(dataset.samples[index][0])
    return f"sample {index} of {type(dataset).__name__}"


def _counts(labels: Sequence[int], class_names: Sequence[str]) -> dict[str, int]:
    counts = Counter(labels)
    return {name: counts[label] for label, name in enumerate(class_names)}

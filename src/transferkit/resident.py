"""Pictures that stay on the device: decoded once, kept there as uint8, and augmented there, a whole batch in one go.

No step waits for worker processes or for a copy to the device. What is random about an epoch is drawn at its beginning,
for all its pictures, and moved in one piece, so that between its batches nothing waits for the device either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from transferkit.batch_transforms import Change, Crop, Shift, uniform_numbers
from transferkit.exceptions import SettingError
from transferkit.loading import Batches, loader, none_left
from transferkit.randomness import derive_seed
from transferkit.sources import PictureFiles
from transferkit.transforms import is_preset

__all__ = [
    "ResidentBatches",
    "can_be_resident",
    "resident_bytes",
]


class ResidentBatches(Batches):
    """The batches of a loader, from pictures that are kept on a device.

    They are decoded when an iteration begins for the first time, in worker processes, so that a run whose activations
    are all kept decodes nothing here. Order, names, labels, places in an epoch and the number of batches are the
    loader's, whose sampler it shares; so are the images where nothing is random, bit by bit on the CPU.

    Random crops, shifts and flips follow the loader's law and are a function of (seed, epoch, index, view) as there,
    but of other random numbers: a run with and one without residency see different draws. Crops are a little softer,
    those of less than a quarter of a large picture clearly, since they are cut from a square copy of it.

    Each process keeps what it may be asked for: all pictures in training, its share in evaluation.

    Args:
        batches: From :func:`transferkit.loading.loader`; :func:`can_be_resident` says whether they can be kept, and
            :func:`resident_bytes` what it takes.
        device: Where the pictures are kept and augmented.

    Raises:
        SettingError: They cannot be kept.
        PictureError: At the first iteration, before the first batch: a picture cannot be read.

    Source: the idea is that of GPU loaders such as NVIDIA DALI and Keller Jordan's ``airbench``.

    Example:
        >>> from PIL import Image
        >>> from transferkit.preprocessing import Preprocessing
        >>> from transferkit.sources import DatasetPictures
        >>> from transferkit.transforms import light
        >>> pictures = DatasetPictures([(Image.new("RGB", (9, 7)), 1)] * 4, label_map=(0, 1))
        >>> batches = loader(pictures, light(Preprocessing(size=8, resize_size=8)), batch_size=2, train=True)
        >>> for images, labels in ResidentBatches(batches, torch.device("cpu")):
        ...     print(tuple(images.shape), images.dtype, labels.tolist())
        (2, 3, 8, 8) torch.float32 [1, 1]
        (2, 3, 8, 8) torch.float32 [1, 1]
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        """Decode nothing yet."""
        super().__init__(
            batches.pictures,
            lost=batches.lost,
            batch_size=batches.batch_size,
            sampler=batches.order,
            num_workers=batches.num_workers,
            drop_last=batches.drop_last,
        )
        self.device = device
        self._parts = _parts_of(batches)
        self._store: _Store | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator
        """Yield images (B, C, S, S) float32, normalised, and labels (B,) int64, both on the device."""
        if self._store is None:
            self._store = _stored(self, self._parts, self.device)
        store, change = self._store, self._parts.change
        first, step = _share(self)
        batches = [[key for key in batch if store.read[(key[1] - first) // step]] for batch in self.batch_keys()]
        if not all(batches):
            if self.order.shuffle:
                raise none_left(self.lost or ())
            batches = [batch for batch in batches if batch]
        keys = np.array([key for batch in batches for key in batch], dtype=np.int64).reshape(-1, 3)
        rows = torch.from_numpy((keys[:, 1] - first) // step)
        drawn = rows
        if change is not None:
            key = derive_seed(self.pictures.seed, 7, self.order.epoch)
            uniform = uniform_numbers(key, keys[:, 1], keys[:, 2], change.numbers)
            drawn = torch.from_numpy(change.drawn(uniform, store.sizes[rows].numpy()))
        rows, drawn = rows.to(self.device), drawn.to(self.device)
        lengths = [len(batch) for batch in batches]
        for chosen, ours in zip(torch.split(rows, lengths), torch.split(drawn, lengths), strict=True):
            images = store.images[chosen]
            if change is not None:
                images = change.applied(images, ours)
            levels = v2.functional.to_dtype(images, torch.float32, scale=True)
            yield levels.sub_(store.mean).div_(store.std), store.labels[chosen]


def can_be_resident(batches: Batches, *, sharp: bool = False) -> bool:
    """Whether a loader's pictures can be kept on a device and augmented there.

    They can under the presets ``none``, ``imagenet_eval``, ``imagenet_train``, ``light``, ``cifar_eval``, and
    ``cifar_train`` without jitter and rotation, where reading a picture twice gives the same and pictures are not
    tensors of floats.

    Args:
        batches: From :func:`transferkit.loading.loader`. Where the pictures are not files, the first one is looked at.
        sharp: Whether that includes that no crop is enlarged from what is kept, which ``imagenet_train`` asks for.

    Example:
        >>> from transferkit.preprocessing import Preprocessing
        >>> from transferkit.sources import Picture, PictureFiles
        >>> from transferkit.transforms import light, trivial_augment
        >>> files = PictureFiles([Picture("cats/1.jpg", 0)])
        >>> given = {"batch_size": 1, "train": True}
        >>> [can_be_resident(loader(files, make(Preprocessing()), **given)) for make in (light, trivial_augment)]
        [True, False]
    """
    try:
        change = _parts_of(batches).change
    except SettingError:
        return False
    return not (sharp and isinstance(change, Crop) and change.enlarges)


def resident_bytes(batches: Batches) -> int:
    """Say how many bytes :class:`ResidentBatches` keep on the device; no picture file is read for it.

    A batch in the making takes about ten times the bytes of its float32 images beside them.

    Args:
        batches: From :func:`transferkit.loading.loader`.

    Raises:
        SettingError: They cannot be kept.

    Example:
        >>> from transferkit.preprocessing import Preprocessing
        >>> from transferkit.sources import Picture, PictureFiles
        >>> from transferkit.transforms import imagenet_eval
        >>> files = PictureFiles([Picture("cats/1.jpg", 0)])
        >>> resident_bytes(loader(files, imagenet_eval(Preprocessing()), batch_size=1, train=False)) - 3 * 224 * 224
        8
    """
    first, step = _share(batches)
    each = math.prod(_parts_of(batches).shape) + torch.int64.itemsize
    return each * len(range(first, len(batches.pictures), step))


class _Keep:
    """A picture as it is kept, with the height and width it had before it was squashed; goes to worker processes."""

    def __init__(self, steps: Sequence[nn.Module], squash: nn.Module) -> None:
        self.steps, self.squash = steps, squash

    def __call__(self, picture: Any) -> tuple[Tensor, Tensor]:
        for step in self.steps:
            picture = step(picture)
        tensor = v2.functional.to_dtype(v2.functional.to_image(self.squash(picture)), torch.uint8, scale=True)
        return tensor.as_subclass(Tensor), torch.tensor(v2.functional.get_size(picture))


class _Parts(NamedTuple):
    """A preset taken apart: what is done once, and what at every epoch, if anything; and a kept picture's shape."""

    keep: _Keep
    change: Change | None
    shape: tuple[int, ...]


class _Store(NamedTuple):
    """All on the device but for the sizes, of which random numbers are made, and which pictures could be read."""

    images: Tensor
    sizes: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    read: np.ndarray[Any, Any]


def _parts_of(batches: Batches) -> _Parts:
    """Take the transform apart; ``SettingError`` where it, or the source, is none that can be kept."""
    source, transform = batches.pictures.source, cast(Any, batches.pictures.transform)
    change: Change | None = None
    possible = is_preset(transform) and transform.random == batches.augmented and not getattr(source, "random", True)
    if possible:
        *steps, _, _ = transform.transforms
        if transform.random:
            steps, change = _random_part(steps)
            possible = change is not None
    if not possible or not _has_levels(source):
        raise SettingError(
            "these pictures cannot be kept on a device; that takes pictures of 8 bits that are the same whenever they "
            "are read, and a preset without jitter, rotation or trivial_augment"
        )
    keep = _Keep(steps, change.squash if isinstance(change, Crop) else nn.Identity())
    blank = torch.zeros((transform.channels, 8, 8), dtype=torch.uint8)
    return _Parts(keep, change, tuple(keep(blank)[0].shape))


def _random_part(steps: Sequence[nn.Module]) -> tuple[list[nn.Module], Change | None]:
    """Return the steps before what is random, and that, if it is a crop and a flip and nothing more."""
    before = list(takewhile(lambda step: not isinstance(step, v2.RandomResizedCrop | v2.RandomCrop), steps))
    crop, flip, *following = steps[len(before) :]
    if not all(isinstance(step, v2.Resize | v2.PILToTensor) for step in following):
        return before, None
    return before, Shift(crop, flip, following) if isinstance(crop, v2.RandomCrop) else Crop(crop, flip)


def _has_levels(source: Any) -> bool:
    """Whether pictures have 8 bits: files do, and others do where the first one does."""
    if isinstance(source, PictureFiles):
        return True
    picture, _ = source[0]
    return not (isinstance(picture, Tensor) and picture.is_floating_point())


def _share(batches: Batches) -> tuple[int, int]:
    """Return the first of the pictures that this process may be asked for, and how far it is to the next."""
    order = batches.order
    return (0, 1) if order.shuffle else (order.rank, order.world_size)


def _stored(batches: Batches, parts: _Parts, device: torch.device) -> _Store:
    """Decode the pictures of this process's share."""
    first, step = _share(batches)
    reading = loader(
        batches.pictures.source,
        cast(Any, parts.keep),
        batch_size=cast(int, batches.batch_size),
        train=False,
        num_workers=batches.num_workers,
        rank=first,
        world_size=step,
        lost=batches.lost,
    )
    count = len(reading.order)
    images = torch.empty((count, *parts.shape), dtype=torch.uint8, device=device)
    sizes, labels = torch.empty((count, 2), dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    read = np.zeros(count, dtype=bool)
    for indices, ((some_images, some_sizes), some_labels) in reading.with_rows():
        rows = [(index - first) // step for index in indices]
        images[rows], sizes[rows], labels[rows] = some_images.to(device), some_sizes, some_labels
        read[rows] = True
    normalize = cast(Any, batches.pictures.transform).transforms[-1]
    mean, std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (normalize.mean, normalize.std))
    return _Store(images, sizes, labels.to(device), mean, std, read)

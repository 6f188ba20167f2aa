"""Pictures that stay on the device: decoded once, kept there as uint8, and augmented there, a whole batch in one go.

No step waits for worker processes or for a copy to the device. What is random about an epoch is drawn at its beginning,
for all its pictures, and moved in one piece, so that between its batches nothing waits for the device either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2

from transferkit.exceptions import SettingError
from transferkit.loading import Batches, loader
from transferkit.randomness import derive_seed
from transferkit.sources import PictureFiles
from transferkit.transforms import is_preset

__all__ = [
    "ResidentBatches",
    "can_be_resident",
    "crop_boxes",
    "resident_bytes",
]

Array = np.ndarray[Any, np.dtype[Any]]

_TRIES = 10  # torchvision's number of attempts at a box
_FINER = 2  # samples per pixel and direction, whose mean is the pixel: shrinking up to so many times does not alias


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
        batches = list(self.batch_keys())
        keys = np.array([key for batch in batches for key in batch], dtype=np.int64).reshape(-1, 3)
        first, step = _share(self)
        rows = torch.from_numpy((keys[:, 1] - first) // step)
        drawn = rows
        if change is not None:
            key = derive_seed(self.pictures.seed, 7, self.order.epoch)
            uniform = _uniform_numbers(key, keys[:, 1], keys[:, 2], change.numbers)
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
    return not (sharp and isinstance(change, _Crop) and change.enlarges)


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


def crop_boxes(uniform: Array, sizes: Array, *, scale: Sequence[float], ratio: Sequence[float]) -> Array:
    """Choose a box in each picture by the law of ``RandomResizedCrop``.

    Args:
        uniform: (N, 22) in [0, 1): areas and aspect ratios of ten tries, then the place from above and from the left.
        sizes: Height and width of each picture in pixels, (N, 2).
        scale: Smallest and largest share of the picture's area.
        ratio: Smallest and largest width over height.

    Returns:
        Top, left, height and width in pixels, (N, 4) int64; where no try fits, the largest central box in the ratios.

    Source: torchvision ``v2.RandomResizedCrop.make_params``.

    Example:
        >>> crop_boxes(np.full((1, 22), 0.5), np.array([[40, 40]]), scale=(0.25, 0.25), ratio=(1, 1)).tolist()
        [[10, 10, 20, 20]]
    """
    heights, widths = sizes.T
    shares, shapes = uniform[:, :_TRIES], uniform[:, _TRIES : 2 * _TRIES]
    areas = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * shares)
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * shapes)
    tall, wide = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    fits = (tall > 0) & (tall <= heights[:, None]) & (wide > 0) & (wide <= widths[:, None])
    found, each = fits.any(axis=1), np.arange(len(sizes))
    tried = fits.argmax(axis=1)
    height = np.where(found, tall[each, tried], np.minimum(heights, np.rint(widths / ratio[0])))
    width = np.where(found, wide[each, tried], np.minimum(widths, np.rint(heights * ratio[1])))
    free = np.stack([heights - height, widths - width], axis=1)
    corner = np.where(found[:, None], np.floor(uniform[:, 2 * _TRIES :] * (free + 1)), free // 2)
    return np.concatenate([corner, height[:, None], width[:, None]], axis=1).astype(np.int64)


def _uniform_numbers(key: int, indices: Array, views: Array, numbers: int) -> Array:
    """Draw (N, numbers) in [0, 1), a function of (key, index, view) alone and so of no order.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64), each number by its
        place in the stream.
    """
    pictures = (views.astype(np.uint64) << np.uint64(32)) + indices.astype(np.uint64)
    places = pictures[:, None] * np.uint64(numbers) + np.arange(1, numbers + 1, dtype=np.uint64)
    mixed: Array = places * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)) * 2.0**-53


def _placements(boxes: Array, sizes: Array, flipped: Array) -> Array:
    """Return half the extent and the middle of crops along x and y, (N, 2, 2); -1 to 1 is the whole picture."""
    extents = boxes[:, 2:] / sizes
    middles = 2 * boxes[:, :2] / sizes + extents - 1
    extents[:, 1] *= np.where(flipped, -1, 1)
    return np.stack([extents[:, ::-1], middles[:, ::-1]], axis=2).astype(np.float32)


def _cut(images: Tensor, places: Tensor, size: int, interpolation: str) -> Tensor:
    """Cut one crop out of each image (B, C, H, W) uint8 and bring it to a size; the same type."""
    finer = 1 if interpolation == "nearest" else _FINER  # which is not antialiased elsewhere either
    samples = finer * size
    along = (2 * torch.arange(samples, device=images.device) + 1) / samples - 1
    # Not by affine_grid: its matrix product would lose tenths of a pixel where a user has allowed TF32.
    x, y = (places[:, :, :1] * along + places[:, :, 1:]).unbind(1)
    grid = torch.stack([x[:, None].expand(-1, samples, -1), y[:, :, None].expand(-1, -1, samples)], dim=3)
    cut = functional.grid_sample(images.float(), grid, interpolation, "border", align_corners=False)
    return functional.avg_pool2d(cut, finer).round_().clamp_(0, 255).to(torch.uint8)


def _shifted(images: Tensor, starts: Tensor, size: int) -> Tensor:
    """Cut one square out of each image; ``starts`` are its first row and column, and the step to the next column."""
    along = torch.arange(size, device=images.device)
    rows = starts[:, 0, None] + along
    columns = starts[:, 1, None] + starts[:, 2, None] * along
    each, channel = (torch.arange(length, device=images.device) for length in images.shape[:2])
    return images[each[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


class _Change(Protocol):
    """What is random about a preset."""

    numbers: int

    def drawn(self, uniform: Array, sizes: Array) -> Array:
        """Turn random numbers (N, numbers) into what is done to pictures of these sizes, (N, 2)."""

    def applied(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Do it to a batch of uint8 images."""


class _Crop:
    """``RandomResizedCrop`` and a flip, from a square copy of the picture."""

    numbers = 2 * _TRIES + 3

    def __init__(self, crop: v2.RandomResizedCrop, flip: v2.RandomHorizontalFlip) -> None:
        self.crop, self.flip = crop, flip

    @property
    def enlarges(self) -> bool:
        """Whether the smallest box has fewer pixels in the copy than in what comes out."""
        return bool(self.crop.scale[0] < _FINER**-2)

    @property
    def squash(self) -> nn.Module:
        """The step that makes the copy, twice as large as what comes out.

        A larger one would alias where it is shrunk. From one that just need not be enlarged for the smallest box of
        ``light``, crops of photos had 0.86 of the loader's contrast between neighbours, and have 0.93 from this.
        """
        side = _FINER * self.crop.size[0]
        squash: nn.Module = v2.Resize((side, side), interpolation=self.crop.interpolation, antialias=True)
        return squash

    def drawn(self, uniform: Array, sizes: Array) -> Array:
        boxes = crop_boxes(uniform[:, :-1], sizes, scale=self.crop.scale, ratio=self.crop.ratio)
        return _placements(boxes, sizes, uniform[:, -1] < self.flip.p)

    def applied(self, images: Tensor, drawn: Tensor) -> Tensor:
        return _cut(images, drawn, self.crop.size[0], InterpolationMode(self.crop.interpolation).value)


class _Shift:
    """``RandomCrop`` with a border of zeros, a flip, and what follows them."""

    numbers = 3

    def __init__(self, crop: v2.RandomCrop, flip: v2.RandomHorizontalFlip, following: Sequence[nn.Module]) -> None:
        self.crop, self.flip, self.following = crop, flip, following

    def drawn(self, uniform: Array, sizes: Array) -> Array:
        size = self.crop.size[0]
        left, right, top, bottom = self.crop.padding
        free = sizes + np.array([top + bottom, left + right]) - size
        starts = np.floor(uniform[:, :2] * (free + 1)).astype(np.int64)
        flipped = uniform[:, 2] < self.flip.p
        return np.stack([starts[:, 0], starts[:, 1] + np.where(flipped, size - 1, 0), np.where(flipped, -1, 1)], axis=1)

    def applied(self, images: Tensor, drawn: Tensor) -> Tensor:
        padded = functional.pad(images, self.crop.padding, value=self.crop.fill)
        images = _shifted(padded, drawn, self.crop.size[0])
        for step in self.following:
            images = step(images)
        return images


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
    change: _Change | None
    shape: tuple[int, ...]


class _Store(NamedTuple):
    """All on the device but for the sizes, of which random numbers are made."""

    images: Tensor
    sizes: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor


def _parts_of(batches: Batches) -> _Parts:
    """Take the transform apart; ``SettingError`` where it, or the source, is none that can be kept."""
    source, transform = batches.pictures.source, cast(Any, batches.pictures.transform)
    change: _Change | None = None
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
    keep = _Keep(steps, change.squash if isinstance(change, _Crop) else nn.Identity())
    blank = torch.zeros((transform.channels, 8, 8), dtype=torch.uint8)
    return _Parts(keep, change, tuple(keep(blank)[0].shape))


def _random_part(steps: Sequence[nn.Module]) -> tuple[list[nn.Module], _Change | None]:
    """Return the steps before what is random, and that, if it is a crop and a flip and nothing more."""
    before = list(takewhile(lambda step: not isinstance(step, v2.RandomResizedCrop | v2.RandomCrop), steps))
    crop, flip, *following = steps[len(before) :]
    if not all(isinstance(step, v2.Resize | v2.PILToTensor) for step in following):
        return before, None
    return before, _Shift(crop, flip, following) if isinstance(crop, v2.RandomCrop) else _Crop(crop, flip)


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
    )
    count = len(reading.order)
    images = torch.empty((count, *parts.shape), dtype=torch.uint8, device=device)
    sizes, labels = torch.empty((count, 2), dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    done = 0
    for (some_images, some_sizes), some_labels in reading:
        rows = slice(done, done + len(some_labels))
        images[rows], sizes[rows], labels[rows] = some_images, some_sizes, some_labels
        done = rows.stop
    normalize = cast(Any, batches.pictures.transform).transforms[-1]
    mean, std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (normalize.mean, normalize.std))
    return _Store(images, sizes, labels.to(device), mean, std)

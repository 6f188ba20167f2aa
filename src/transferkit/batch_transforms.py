"""Random crops, shifts and flips of a whole batch at once, each picture by random numbers of its own.

They follow the laws of torchvision's transforms, which draw for one picture at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2

__all__ = ["Array", "Change", "Crop", "Shift", "crop_boxes", "cut", "placements", "uniform_numbers"]

Array = np.ndarray[Any, np.dtype[Any]]

_TRIES = 10  # torchvision's number of attempts at a box
_FINER = 2  # samples per pixel and direction, whose mean is the pixel: shrinking up to so many times does not alias


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


def uniform_numbers(key: int, indices: Array, views: Array, numbers: int) -> Array:
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


def placements(boxes: Array, sizes: Array, flipped: Array) -> Array:
    """Return half the extent and the middle of crops along x and y, (N, 2, 2); -1 to 1 is the whole picture."""
    extents = boxes[:, 2:] / sizes
    middles = 2 * boxes[:, :2] / sizes + extents - 1
    extents[:, 1] *= np.where(flipped, -1, 1)
    return np.stack([extents[:, ::-1], middles[:, ::-1]], axis=2).astype(np.float32)


def cut(images: Tensor, places: Tensor, size: int, interpolation: str) -> Tensor:
    """Cut one crop out of each image (B, C, H, W) uint8 and bring it to a size; the same type."""
    finer = 1 if interpolation == "nearest" else _FINER  # which is not antialiased elsewhere either
    samples = finer * size
    along = (2 * torch.arange(samples, device=images.device) + 1) / samples - 1
    # Not by affine_grid: its matrix product would lose tenths of a pixel where a user has allowed TF32.
    x, y = (places[:, :, :1] * along + places[:, :, 1:]).unbind(1)
    grid = torch.stack([x[:, None].expand(-1, samples, -1), y[:, :, None].expand(-1, -1, samples)], dim=3)
    sampled = functional.grid_sample(images.float(), grid, interpolation, "border", align_corners=False)
    return functional.avg_pool2d(sampled, finer).round_().clamp_(0, 255).to(torch.uint8)


def _shifted(images: Tensor, starts: Tensor, size: int) -> Tensor:
    """Cut one square out of each image; ``starts`` are its first row and column, and the step to the next column."""
    along = torch.arange(size, device=images.device)
    rows = starts[:, 0, None] + along
    columns = starts[:, 1, None] + starts[:, 2, None] * along
    each, channel = (torch.arange(length, device=images.device) for length in images.shape[:2])
    return images[each[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


class Change(Protocol):
    """What is random about a preset."""

    numbers: int

    def drawn(self, uniform: Array, sizes: Array) -> Array:
        """Turn random numbers (N, numbers) into what is done to pictures of these sizes, a row each."""

    def applied(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Do it to a batch of uint8 images."""


class Crop:
    """``RandomResizedCrop`` and a flip, from a square copy of the picture."""

    numbers = 2 * _TRIES + 3

    def __init__(self, crop: v2.RandomResizedCrop, flip: v2.RandomHorizontalFlip) -> None:
        """Take the law from these two."""
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
        """Choose a box for each picture, and whether it is mirrored, as (N, 2, 3) matrices."""
        boxes = crop_boxes(uniform[:, :-1], sizes, scale=self.crop.scale, ratio=self.crop.ratio)
        return placements(boxes, sizes, uniform[:, -1] < self.flip.p)

    def applied(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Cut the boxes out and bring them to the size."""
        return cut(images, drawn, self.crop.size[0], InterpolationMode(self.crop.interpolation).value)


class Shift:
    """``RandomCrop`` with a border of zeros, a flip, and what follows them."""

    numbers = 3

    def __init__(self, crop: v2.RandomCrop, flip: v2.RandomHorizontalFlip, following: Sequence[nn.Module]) -> None:
        """Take the law from the first two."""
        self.crop, self.flip, self.following = crop, flip, following

    def drawn(self, uniform: Array, sizes: Array) -> Array:
        """Choose a place for each picture, and whether it is mirrored, as (N, 3) starts and steps."""
        size = self.crop.size[0]
        left, right, top, bottom = self.crop.padding
        free = sizes + np.array([top + bottom, left + right]) - size
        starts = np.floor(uniform[:, :2] * (free + 1)).astype(np.int64)
        flipped = uniform[:, 2] < self.flip.p
        return np.stack([starts[:, 0], starts[:, 1] + np.where(flipped, size - 1, 0), np.where(flipped, -1, 1)], axis=1)

    def applied(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Shift and mirror the pictures, then do what follows."""
        padded = functional.pad(images, self.crop.padding, value=self.crop.fill)
        images = _shifted(padded, drawn, self.crop.size[0])
        for step in self.following:
            images = step(images)
        return images
